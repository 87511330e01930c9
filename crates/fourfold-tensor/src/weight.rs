//! The closed set of storage forms.

use crate::{Dense, Quantized};

/// A stored weight. The set is closed: a new form makes the compiler list every kernel and codec that has to learn it, so no
/// `match` on it has a `_` arm.
// A few hundred bytes beside the megabytes they describe.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Weight {
    /// One float an element.
    Dense(Dense),
    /// Packed codes with group scales.
    Quantized(Quantized),
}

impl Weight {
    /// Rows of the matrix view: output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows(),
            Self::Quantized(w) => w.rows,
        }
    }

    /// Columns of the matrix view: input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols(),
            Self::Quantized(w) => w.cols,
        }
    }

    /// The tensor's own shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(w) => w.shape().to_vec(),
            Self::Quantized(w) => vec![w.rows, w.cols],
        }
    }

    /// Bytes stored, scales and offsets included.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::Dense(w) => w.data().byte_len(),
            Self::Quantized(w) => w.byte_len(),
        }
    }

    /// Row `r` as f32, into `out` of length `cols`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.data().read_f32(r * w.cols(), &mut out[..w.cols()]),
            Self::Quantized(w) => w.dequantize_row(r, out),
        }
    }

    /// The whole matrix as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut out = vec![0.0; rows * cols];
        for (r, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
            self.read_row(r, row);
        }
        out
    }

    /// How the weight is stored, in a few words: `BF16`, `int4 g64`.
    pub fn describe(&self) -> String {
        match self {
            Self::Dense(w) => w.dtype().to_string(),
            Self::Quantized(w) => {
                let kind = if w.codebook.is_some() { "codebook" } else { "int" };
                if w.is_per_tensor() {
                    format!("{kind}{} per-tensor", w.bits)
                } else if w.group_size >= w.cols {
                    format!("{kind}{} per-channel", w.bits)
                } else {
                    format!("{kind}{} g{}", w.bits, w.group_size)
                }
            }
        }
    }
}

impl From<Dense> for Weight {
    fn from(w: Dense) -> Self {
        Self::Dense(w)
    }
}

impl From<Quantized> for Weight {
    fn from(w: Quantized) -> Self {
        Self::Quantized(w)
    }
}
