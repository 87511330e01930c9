//! The closed set of storage forms.

use crate::{Dense, Form, Fp8, LowRank, Quantized, Sparse, Sum};

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
    /// 8-bit floats with block scales.
    Fp8(Fp8),
    /// A bitmask and the values it keeps.
    Sparse(Sparse),
    /// The product of two thin matrices.
    LowRank(LowRank),
    /// The sum of several weights.
    Sum(Sum),
}

impl Weight {
    /// Rows of the matrix view: output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows(),
            Self::Quantized(w) => w.rows,
            Self::Fp8(w) => w.rows(),
            Self::Sparse(w) => w.rows(),
            Self::LowRank(w) => w.up().rows(),
            Self::Sum(w) => w.rows(),
        }
    }

    /// Columns of the matrix view: input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols(),
            Self::Quantized(w) => w.cols,
            Self::Fp8(w) => w.cols(),
            Self::Sparse(w) => w.cols(),
            Self::LowRank(w) => w.down().cols(),
            Self::Sum(w) => w.cols(),
        }
    }

    /// The tensor's own shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(w) => w.shape().to_vec(),
            Self::Quantized(w) => vec![w.rows, w.cols],
            Self::Fp8(_) | Self::Sparse(_) | Self::LowRank(_) | Self::Sum(_) => vec![self.rows(), self.cols()],
        }
    }

    /// Bytes stored, scales and offsets included.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::Dense(w) => w.data().byte_len(),
            Self::Quantized(w) => w.byte_len(),
            Self::Fp8(w) => w.byte_len(),
            Self::Sparse(w) => w.byte_len(),
            Self::LowRank(w) => w.up().byte_len() + w.down().byte_len(),
            Self::Sum(w) => w.terms().iter().map(Self::byte_len).sum(),
        }
    }

    /// Row `r` as f32, into `out` of length `cols`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        match self {
            Self::Dense(w) => w.data().read_f32(r * w.cols(), &mut out[..w.cols()]),
            Self::Quantized(w) => w.dequantize_row(r, out),
            Self::Fp8(w) => w.read_row(r, out),
            Self::Sparse(w) => w.read_row(r, out),
            Self::LowRank(w) => w.read_row(r, out),
            Self::Sum(w) => w.read_row(r, out),
        }
    }

    /// The whole matrix as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::LowRank(w) => w.to_f32(),
            Self::Sum(w) => w.to_f32(),
            Self::Dense(_) | Self::Quantized(_) | Self::Fp8(_) | Self::Sparse(_) => {
                let cols = self.cols();
                let mut out = vec![0.0; self.rows() * cols];
                for (r, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
                    self.read_row(r, row);
                }
                out
            }
        }
    }

    /// How the weight is stored, in a few words: see [`Form::describe`].
    pub fn describe(&self) -> String {
        Form::of(self).describe()
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

impl From<Fp8> for Weight {
    fn from(w: Fp8) -> Self {
        Self::Fp8(w)
    }
}

impl From<Sparse> for Weight {
    fn from(w: Sparse) -> Self {
        Self::Sparse(w)
    }
}

impl From<LowRank> for Weight {
    fn from(w: LowRank) -> Self {
        Self::LowRank(w)
    }
}

impl From<Sum> for Weight {
    fn from(w: Sum) -> Self {
        Self::Sum(w)
    }
}
