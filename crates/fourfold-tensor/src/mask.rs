//! Which elements of a pruned matrix are kept: one bit each.

use std::ops::Range;

use crate::Buffer;
use crate::sparse::{SparseError, kept_columns, mask_words_per_row};

/// The mask of a [`crate::Sparse`], which several weights and gradients of one shape may share.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    words: Buffer<u64>,
    /// Kept elements before each row, and of all: `[rows + 1]`.
    starts: Vec<usize>,
}

impl Mask {
    /// A mask of `[rows, mask_words_per_row(cols)]` words.
    ///
    /// # Errors
    /// Another number of words, or a bit beyond a row's end.
    pub fn new(rows: usize, cols: usize, words: Buffer<u64>) -> Result<Self, SparseError> {
        let per_row = mask_words_per_row(cols);
        let fits = rows.checked_mul(cols).and_then(|n| n.checked_mul(8)).is_some();
        let expected = rows.checked_mul(per_row).filter(|_| fits).ok_or(SparseError::TooLarge { rows, cols })?;
        if words.len() != expected {
            return Err(SparseError::MaskLength { found: words.len(), expected, rows, cols });
        }
        let mut starts = Vec::with_capacity(rows + 1);
        let mut kept = 0;
        starts.push(0);
        for row in 0..rows {
            let line = &words[row * per_row..(row + 1) * per_row];
            if !cols.is_multiple_of(64) && line.last().is_some_and(|last| last >> (cols % 64) != 0) {
                return Err(SparseError::MaskTail { row, cols });
            }
            kept += line.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            starts.push(kept);
        }
        Ok(Self { rows, cols, words, starts })
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements kept.
    pub fn kept(&self) -> usize {
        self.starts[self.rows]
    }

    /// All rows' words.
    pub fn words(&self) -> &Buffer<u64> {
        &self.words
    }

    /// The words of row `r`.
    pub fn row(&self, r: usize) -> &[u64] {
        let per_row = mask_words_per_row(self.cols);
        &self.words[r * per_row..(r + 1) * per_row]
    }

    /// Which of the kept elements are row `r`'s.
    pub fn values(&self, r: usize) -> Range<usize> {
        self.starts[r]..self.starts[r + 1]
    }

    /// Columns of row `r` that are kept, in order.
    pub fn columns(&self, r: usize) -> impl Iterator<Item = usize> {
        kept_columns(self.row(r))
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        self.words.byte_len()
    }
}
