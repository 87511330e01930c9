//! Root-mean-square normalisation (Zhang & Sennrich 2019).

use fourfold_kernels::Tensor;

use super::Pass;
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// The shape and name of a norm.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// Name without `.weight`.
    pub name: String,
    /// Elements of a row.
    pub size: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormSpec {
    /// Its tensor, `[size]`.
    pub fn weight(&self) -> WeightSpec {
        WeightSpec { name: format!("{}.weight", self.name), shape: vec![self.size], role: Role::Norm, block: None }
    }
}

/// `x / √(mean(x²) + eps) · weight` over each row. The weight stays f32.
pub struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    pub(crate) fn load(spec: &NormSpec, loader: &Loader) -> Result<Self, ModelError> {
        Ok(Self { weight: loader.vector(&format!("{}.weight", spec.name), spec.size)?, eps: spec.eps })
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.weight.cols() * size_of::<f32>()
    }

    /// x `[rows, size]` to the same shape.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Tensor {
        pass.backend.rms_norm(x, &self.weight, self.eps)
    }

    /// Normalises each of the `heads` parts of a row on its own (qwen3's query and key norms).
    pub fn forward_heads(&self, x: Tensor, pass: &Pass) -> Tensor {
        let (rows, cols, size) = (x.rows(), x.cols(), self.weight.cols());
        let parts = x.reshape(rows * (cols / size), size);
        self.forward(&parts, pass).reshape(rows, cols)
    }
}
