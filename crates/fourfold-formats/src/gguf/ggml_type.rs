//! ggml's tensor types: number, name, elements and bytes of a block.

use fourfold_tensor::BlockType;

/// A tensor type whose bytes this crate can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are ggml's own")]
pub enum GgmlType {
    F32,
    F16,
    BF16,
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
    MXFP4,
}

/// Number, type, name, elements and bytes of a block.
const SUPPORTED: &[(u32, GgmlType, &str, u64, u64)] = &[
    (0, GgmlType::F32, "F32", 1, 4),
    (1, GgmlType::F16, "F16", 1, 2),
    (2, GgmlType::Q4_0, "Q4_0", 32, 18),
    (3, GgmlType::Q4_1, "Q4_1", 32, 20),
    (6, GgmlType::Q5_0, "Q5_0", 32, 22),
    (7, GgmlType::Q5_1, "Q5_1", 32, 24),
    (8, GgmlType::Q8_0, "Q8_0", 32, 34),
    (10, GgmlType::Q2_K, "Q2_K", 256, 84),
    (11, GgmlType::Q3_K, "Q3_K", 256, 110),
    (12, GgmlType::Q4_K, "Q4_K", 256, 144),
    (13, GgmlType::Q5_K, "Q5_K", 256, 176),
    (14, GgmlType::Q6_K, "Q6_K", 256, 210),
    (20, GgmlType::IQ4_NL, "IQ4_NL", 32, 18),
    (23, GgmlType::IQ4_XS, "IQ4_XS", 256, 136),
    (30, GgmlType::BF16, "BF16", 1, 2),
    (39, GgmlType::MXFP4, "MXFP4", 32, 17),
];

/// Types that exist and are not read, so that an error can name them.
const UNSUPPORTED: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// Every type that is read.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        SUPPORTED.iter().map(|row| row.1)
    }

    /// The type of a number in a file; `Err` holds the name of a type that exists and is not read.
    pub fn from_id(id: u32) -> Result<Self, Option<&'static str>> {
        match SUPPORTED.iter().find(|row| row.0 == id) {
            Some(row) => Ok(row.1),
            None => Err(UNSUPPORTED.iter().find(|row| row.0 == id).map(|row| row.1)),
        }
    }

    fn row(self) -> &'static (u32, GgmlType, &'static str, u64, u64) {
        // The enum's order is not the table's; the table is complete, which a test checks.
        SUPPORTED.iter().find(|row| row.1 == self).unwrap_or(&SUPPORTED[0])
    }

    /// The type of blocks that can be written.
    pub fn of_blocks(kind: BlockType) -> Self {
        match kind {
            BlockType::Q4_0 => Self::Q4_0,
            BlockType::Q4_1 => Self::Q4_1,
            BlockType::Q5_0 => Self::Q5_0,
            BlockType::Q5_1 => Self::Q5_1,
            BlockType::Q8_0 => Self::Q8_0,
            BlockType::Q2_K => Self::Q2_K,
            BlockType::Q3_K => Self::Q3_K,
            BlockType::Q4_K => Self::Q4_K,
            BlockType::Q5_K => Self::Q5_K,
            BlockType::Q6_K => Self::Q6_K,
            BlockType::IQ4_NL => Self::IQ4_NL,
            BlockType::IQ4_XS => Self::IQ4_XS,
        }
    }

    /// The blocks of a type that can be written; `None` for floats and MXFP4.
    pub fn blocks(self) -> Option<BlockType> {
        BlockType::all().find(|&kind| Self::of_blocks(kind) == self)
    }

    /// The number in a file.
    pub fn id(self) -> u32 {
        self.row().0
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Elements of a block.
    pub fn block_len(self) -> u64 {
        self.row().3
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        self.row().4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_its_own_type() {
        for t in GgmlType::all() {
            assert_eq!(GgmlType::from_id(t.id()), Ok(t));
            assert_eq!(format!("{t:?}"), t.name());
        }
        for kind in BlockType::all() {
            let t = GgmlType::of_blocks(kind);
            assert_eq!((t.name(), t.blocks()), (kind.name(), Some(kind)));
            assert_eq!((t.block_len(), t.block_bytes()), (kind.block_len() as u64, kind.block_bytes() as u64));
        }
        assert_eq!(GgmlType::MXFP4.blocks(), None);
        assert_eq!(GgmlType::all().count(), 16);
        assert_eq!(GgmlType::from_id(16), Err(Some("IQ2_XXS")));
        assert_eq!(GgmlType::from_id(4), Err(None));
    }
}
