//! The pruned storage form: one bit for each element, and the values that are left.
//!
//! Bit `c % 64` of word `c / 64` of a row says whether element (r, c) is kept. Kept values follow one another row after row, as
//! floats, or as b-bit codes whose scales each cover a group of the row's COLUMNS (kept or not):
//!
//! ```text
//! w[r, c] = scale[r, c / group_size] · (code − 2^(bits−1))        for a kept element, else 0
//! ```
//!
//! Groups of columns, not of kept values, make the number of scales independent of the mask. Every N:M pattern (2:4 among them) is
//! stored the same way.

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use crate::{Buffer, FloatBuffer, Mask, packed_words_per_row};

/// The kept values of a [`Sparse`].
#[derive(Clone, Debug, PartialEq)]
pub enum SparseValues {
    /// One float each.
    Float(FloatBuffer),
    /// Codes with scales.
    Codes(SparseCodes),
}

/// Kept values as codes. The zero point is `2^(bits−1)`.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseCodes {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale; the last group of a row may be short.
    pub group_size: usize,
    /// Code i of the whole matrix begins at bit `i · bits`, least significant bit first.
    pub packed: Buffer<u32>,
    /// `[rows, ceil(cols / group_size)]`.
    pub scales: FloatBuffer,
}

/// A matrix of which only some elements are stored. See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse {
    mask: Arc<Mask>,
    values: SparseValues,
}

/// Why the parts of a sparse matrix do not fit together.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SparseError {
    /// Rows and columns whose mask no machine could hold.
    #[error("[{rows}, {cols}] is too large")]
    TooLarge {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// A mask of the wrong size.
    #[error("the mask has {found} words, [{rows}, {cols}] needs {expected}")]
    MaskLength {
        /// Words found.
        found: usize,
        /// Words needed.
        expected: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// A mask that keeps elements which do not exist.
    #[error("the mask of row {row} keeps columns beyond {cols}")]
    MaskTail {
        /// The row.
        row: usize,
        /// Columns.
        cols: usize,
    },
    /// More or fewer values than the mask keeps.
    #[error("the mask keeps {kept} elements, and there are {found} {unit}, not {expected}")]
    Values {
        /// Elements the mask keeps.
        kept: usize,
        /// Values, or words of packed codes, found.
        found: usize,
        /// Values, or words of packed codes, needed.
        expected: usize,
        /// What is counted.
        unit: &'static str,
    },
    /// A width that has no kernel.
    #[error("{0} bits: codes have 2 to 8 bits")]
    Bits(u8),
    /// A group of no columns.
    #[error("group size 0")]
    GroupSize,
    /// More or fewer scales than groups.
    #[error("{found} scales for {expected} groups")]
    Scales {
        /// Scales found.
        found: usize,
        /// Scales needed.
        expected: usize,
    },
}

/// 64-bit words that the mask of a row of `cols` takes.
pub const fn mask_words_per_row(cols: usize) -> usize {
    cols.div_ceil(64)
}

/// Columns whose bits are set in the mask of a row, in order.
pub fn kept_columns(mask: &[u64]) -> impl Iterator<Item = usize> {
    mask.iter().enumerate().flat_map(|(w, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = left.trailing_zeros() as usize;
            (left != 0).then(|| {
                left &= left - 1;
                w * 64 + bit
            })
        })
    })
}

impl Sparse {
    /// Joins a mask, `[rows, mask_words_per_row(cols)]`, to the values it keeps.
    ///
    /// # Errors
    /// The first part that does not fit.
    pub fn new(rows: usize, cols: usize, mask: Buffer<u64>, values: SparseValues) -> Result<Self, SparseError> {
        Self::of(Arc::new(Mask::new(rows, cols, mask)?), values)
    }

    /// Joins a mask that others share to the values it keeps.
    ///
    /// # Errors
    /// The first part that does not fit.
    pub fn of(mask: Arc<Mask>, values: SparseValues) -> Result<Self, SparseError> {
        let (rows, cols, kept) = (mask.rows(), mask.cols(), mask.kept());
        let count = |unit, found, expected| {
            if found == expected { Ok(()) } else { Err(SparseError::Values { kept, found, expected, unit }) }
        };
        match &values {
            SparseValues::Float(values) => count("values", values.len(), kept)?,
            SparseValues::Codes(codes) => {
                if !(2..=8).contains(&codes.bits) {
                    return Err(SparseError::Bits(codes.bits));
                }
                if codes.group_size == 0 {
                    return Err(SparseError::GroupSize);
                }
                count("words of codes", codes.packed.len(), packed_words_per_row(kept, codes.bits))?;
                let (found, expected) = (codes.scales.len(), rows * cols.div_ceil(codes.group_size));
                if found != expected {
                    return Err(SparseError::Scales { found, expected });
                }
            }
        }
        Ok(Self { mask, values })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.mask.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.mask.cols()
    }

    /// Elements kept.
    pub fn kept(&self) -> usize {
        self.mask.kept()
    }

    /// The mask.
    pub fn mask(&self) -> &Arc<Mask> {
        &self.mask
    }

    /// The mask of row `r`.
    pub fn row_mask(&self, r: usize) -> &[u64] {
        self.mask.row(r)
    }

    /// Which of the kept values are row `r`'s.
    pub fn row_values(&self, r: usize) -> Range<usize> {
        self.mask.values(r)
    }

    /// The kept values.
    pub fn values(&self) -> &SparseValues {
        &self.values
    }

    /// The codes of row `r`'s kept values, into `codes` of their number. Floats have none.
    pub fn row_codes(&self, r: usize, codes: &mut [u8]) {
        if let SparseValues::Codes(stored) = &self.values {
            let first = self.row_values(r).start;
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = stored.code(first + i));
        }
    }

    /// Row `r` as f32, zeros included, into `out` of length `cols`. The definition of the form: kernels are checked against it.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let cols = self.cols();
        out[..cols].fill(0.0);
        let kept = kept_columns(self.row_mask(r)).zip(self.row_values(r));
        match &self.values {
            SparseValues::Float(values) => kept.for_each(|(c, i)| out[c] = values.get(i)),
            SparseValues::Codes(codes) => {
                let groups = cols.div_ceil(codes.group_size);
                let zero = (1i32 << (codes.bits - 1)) as f32;
                for (c, i) in kept {
                    let scale = codes.scales.get(r * groups + c / codes.group_size);
                    out[c] = scale * (f32::from(codes.code(i)) - zero);
                }
            }
        }
    }

    /// Bytes of mask and values, scales included.
    pub fn byte_len(&self) -> usize {
        let values = match &self.values {
            SparseValues::Float(values) => values.byte_len(),
            SparseValues::Codes(codes) => codes.packed.byte_len() + codes.scales.byte_len(),
        };
        self.mask.byte_len() + values
    }
}

impl SparseCodes {
    /// Code `i` of the matrix.
    fn code(&self, i: usize) -> u8 {
        let (bits, bit) = (self.bits as usize, i * self.bits as usize);
        let mut wide = u64::from(self.packed[bit / 32]);
        if bit % 32 + bits > 32 {
            wide |= u64::from(self.packed[bit / 32 + 1]) << 32;
        }
        ((wide >> (bit % 32)) & ((1 << bits) - 1)) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, pack_row};

    fn codes(values: &[u8], scales: Vec<f32>) -> SparseValues {
        let mut packed = vec![0; packed_words_per_row(values.len(), 3)];
        pack_row(values, 3, &mut packed);
        let scales = FloatBuffer::from_f32(scales, DType::F16);
        SparseValues::Codes(SparseCodes { bits: 3, group_size: 64, packed: packed.into(), scales })
    }

    #[test]
    fn rows_are_read_through_the_mask() {
        let mask = vec![1 << 63 | 0b101, 0b10, 0, 1];
        let values = SparseValues::Float(FloatBuffer::from_f32(vec![1.0, 2.0, 3.0, 4.0, 5.0], DType::Bf16));
        let sparse = Sparse::new(2, 70, mask.clone().into(), values).unwrap();
        let mut row = vec![9.0; 70];
        sparse.read_row(0, &mut row);
        let found: Vec<(usize, f32)> = row.iter().copied().enumerate().filter(|(_, v)| *v != 0.0).collect();
        assert_eq!(found, [(0, 1.0), (2, 2.0), (63, 3.0), (65, 4.0)]);
        sparse.read_row(1, &mut row);
        assert_eq!((row[64], row.iter().sum::<f32>()), (5.0, 5.0));

        let sparse = Sparse::new(2, 70, mask.into(), codes(&[0, 4, 7, 5, 3], vec![1.0, 2.0, 4.0, 8.0])).unwrap();
        sparse.read_row(0, &mut row);
        assert_eq!((row[0], row[2], row[63], row[65]), (-4.0, 0.0, 3.0, 2.0));
        sparse.read_row(1, &mut row);
        assert_eq!(row[64], -8.0);
        assert_eq!(sparse.byte_len(), 4 * 8 + 4 + 4 * 2);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let floats = |n| SparseValues::Float(FloatBuffer::from_f32(vec![1.0; n], DType::F32));
        let new = |mask: Vec<u64>, values| Sparse::new(2, 70, mask.into(), values).unwrap_err();
        assert!(matches!(new(vec![0; 3], floats(0)), SparseError::MaskLength { found: 3, expected: 4, .. }));
        assert!(matches!(new(vec![0, 0, 0, 1 << 6], floats(1)), SparseError::MaskTail { row: 1, cols: 70 }));
        assert!(matches!(new(vec![1, 1, 1, 1], floats(3)), SparseError::Values { kept: 4, found: 3, .. }));
        assert!(matches!(new(vec![1, 1, 1, 1], codes(&[0; 20], vec![])), SparseError::Values { kept: 4, .. }));
        assert!(matches!(new(vec![1, 1, 1, 1], codes(&[0; 4], vec![])), SparseError::Scales { expected: 4, .. }));
        let huge = Sparse::new(usize::MAX, 70, Vec::new().into(), floats(0));
        assert!(matches!(huge, Err(SparseError::TooLarge { .. })));
    }
}
