//! ggml's block types as grids of [`Quantized`]: which forms a GGUF file can hold, and how many bytes they take there.
//!
//! ```text
//! symmetric   w = scale · (code − 2^(bits−1))     Q4_0 Q5_0 Q8_0 Q3_K Q6_K
//! min         w = scale · code − min              Q4_1 Q5_1 Q2_K Q4_K Q5_K
//! codebook    w = scale · value[code]             IQ4_NL IQ4_XS
//! ```
//!
//! The types of 256 elements store a group's scale (and offset) as a small integer times a float of the block.

use crate::{DType, DoubleForm, OffsetsForm, Quantized, QuantizedForm, ScalesForm};

/// The values of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// A block type that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are ggml's own")]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockGrid {
    /// A level about zero.
    Symmetric,
    /// A level above an offset.
    Min,
    /// One of [`IQ4_VALUES`].
    Codebook,
}

/// How the scales of a block's groups are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockScales {
    /// A block is a group: an f16, and another for the offset.
    Float,
    /// Unsigned integers below this, beside the block's floats.
    Unsigned(u8),
    /// Signed integers from −this to this − 1.
    Signed(u8),
}

/// A type's name, bits, group, block, bytes of a block, grid and scales.
type Row = (BlockType, &'static str, u8, usize, usize, usize, BlockGrid, BlockScales);

const ROWS: [Row; 12] = {
    use BlockGrid::{Codebook, Min, Symmetric};
    use BlockScales::{Float, Signed, Unsigned};
    [
        (BlockType::Q4_0, "Q4_0", 4, 32, 32, 18, Symmetric, Float),
        (BlockType::Q4_1, "Q4_1", 4, 32, 32, 20, Min, Float),
        (BlockType::Q5_0, "Q5_0", 5, 32, 32, 22, Symmetric, Float),
        (BlockType::Q5_1, "Q5_1", 5, 32, 32, 24, Min, Float),
        (BlockType::Q8_0, "Q8_0", 8, 32, 32, 34, Symmetric, Float),
        (BlockType::Q2_K, "Q2_K", 2, 16, 256, 84, Min, Unsigned(16)),
        (BlockType::Q3_K, "Q3_K", 3, 16, 256, 110, Symmetric, Signed(32)),
        (BlockType::Q4_K, "Q4_K", 4, 32, 256, 144, Min, Unsigned(64)),
        (BlockType::Q5_K, "Q5_K", 5, 32, 256, 176, Min, Unsigned(64)),
        (BlockType::Q6_K, "Q6_K", 6, 16, 256, 210, Symmetric, Signed(128)),
        (BlockType::IQ4_NL, "IQ4_NL", 4, 32, 32, 18, Codebook, Float),
        (BlockType::IQ4_XS, "IQ4_XS", 4, 32, 256, 136, Codebook, Signed(32)),
    ]
};

impl BlockType {
    /// Every type.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|row| row.0)
    }

    fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The type of a name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// Bits of a code.
    pub fn bits(self) -> u8 {
        self.row().2
    }

    /// Elements that share a scale.
    pub fn group_len(self) -> usize {
        self.row().3
    }

    /// Elements of a block; rows are whole blocks.
    pub fn block_len(self) -> usize {
        self.row().4
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().5
    }

    /// What a code stands for.
    pub fn grid(self) -> BlockGrid {
        self.row().6
    }

    /// How scales are stored.
    pub fn scales(self) -> BlockScales {
        self.row().7
    }

    /// Groups of a block.
    pub fn groups(self) -> usize {
        self.block_len() / self.group_len()
    }

    /// The form of a `[rows, cols]` matrix of whole blocks; `None` where rows are none.
    pub fn form(self, rows: usize, cols: usize) -> Option<QuantizedForm> {
        if cols == 0 || !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        let dtype = DType::F16;
        let one = rows * cols == self.group_len();
        let double = |signed| DoubleForm { dtype, span: self.groups(), signed };
        Some(QuantizedForm {
            rows,
            cols,
            bits: self.bits(),
            group_size: self.group_len(),
            scales: match self.scales() {
                BlockScales::Float if one => ScalesForm::PerTensor(dtype),
                BlockScales::Float => ScalesForm::PerGroup(dtype),
                BlockScales::Unsigned(_) => ScalesForm::Double(double(false)),
                BlockScales::Signed(_) => ScalesForm::Double(double(true)),
            },
            offsets: match (self.grid(), self.scales()) {
                (BlockGrid::Min, BlockScales::Float) => OffsetsForm::Min(dtype),
                (BlockGrid::Min, _) => OffsetsForm::Double(double(false)),
                (BlockGrid::Symmetric | BlockGrid::Codebook, _) => OffsetsForm::Symmetric,
            },
            codebook: self.grid() == BlockGrid::Codebook,
            g_idx: false,
        })
    }

    /// The type of this form, if there is one. A codebook is taken for [`IQ4_VALUES`]: [`BlockType::of`] looks at it.
    pub fn of_form(form: &QuantizedForm) -> Option<Self> {
        Self::all().find(|kind| kind.form(form.rows, form.cols).as_ref() == Some(form))
    }

    /// The type that holds a matrix without loss, if there is one.
    pub fn of(weight: &Quantized) -> Option<Self> {
        let known = weight.codebook.as_ref().is_none_or(|values| values[..] == IQ4_VALUES);
        Self::of_form(&QuantizedForm::of(weight)).filter(|_| known)
    }

    /// Bytes of so many elements, whole blocks.
    pub fn bytes(self, elements: u64) -> u64 {
        elements / self.block_len() as u64 * self.block_bytes() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_known_by_name_and_form() {
        for (i, kind) in BlockType::all().enumerate() {
            assert_eq!(kind as usize, i, "the table has the enum's order");
            assert_eq!(BlockType::from_name(&kind.name().to_lowercase()), Some(kind));
            for rows in [1, 3] {
                let form = kind.form(rows, 512).unwrap();
                assert_eq!(BlockType::of_form(&form), Some(kind));
            }
            let one = kind.form(1, kind.block_len()).unwrap();
            assert_eq!(BlockType::of_form(&one), Some(kind));
            assert_eq!(kind.form(1, kind.block_len() + 1), None);
        }
        assert_eq!(BlockType::Q4_K.bytes(512), 288);
        assert_eq!(BlockType::from_name("Q4_2"), None);
    }
}
