//! Root-mean-square normalisation (Zhang & Sennrich 2019).

use fourfold_kernels::{Prepared, Tensor};

use super::{Gradients, Pass, TrainPass};
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
    name: String,
    weight: Tensor,
    eps: f32,
}

impl Norm {
    pub(crate) fn load(spec: &NormSpec, loader: &Loader) -> Result<Self, ModelError> {
        let name = format!("{}.weight", spec.name);
        Ok(Self { weight: loader.vector(&name, spec.size)?, name, eps: spec.eps })
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.weight.cols() * size_of::<f32>()
    }

    /// x `[rows, size]` to the same shape.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Tensor {
        pass.backend.rms_norm(x, &self.weight, self.eps)
    }

    /// As [`Norm::forward`] in training, for products alone: rounded where all of these round.
    pub(crate) fn for_products(&self, x: &Tensor, rounded: bool, pass: &TrainPass) -> Prepared {
        pass.backend.rms_norm_for_products(x, &self.weight, self.eps, rounded)
    }

    /// Normalises each of the `heads` parts of a row on its own (qwen3's query and key norms).
    pub fn forward_heads(&self, x: Tensor, pass: &Pass) -> Tensor {
        let (rows, cols, size) = (x.rows(), x.cols(), self.weight.cols());
        let parts = x.reshape(rows * (cols / size), size);
        self.forward(&parts, pass).reshape(rows, cols)
    }

    /// The gradient of `x` `[rows, size]`; adds the weight's.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, pass: &TrainPass, gradients: &mut Gradients) -> Tensor {
        let mut unused = Tensor::zeros(1, self.weight.cols());
        let dw = gradients.of(&self.name, 1, self.weight.cols()).unwrap_or(&mut unused);
        pass.backend.rms_norm_backward(x, &self.weight, self.eps, dy, dw)
    }

    /// As [`Norm::backward`], of [`Norm::forward_heads`].
    pub fn backward_heads(&self, x: &Tensor, dy: Tensor, pass: &TrainPass, gradients: &mut Gradients) -> Tensor {
        let (rows, cols, size) = (x.rows(), x.cols(), self.weight.cols());
        let parts = |t: Tensor| t.reshape(rows * (cols / size), size);
        self.backward(&parts(x.clone()), &parts(dy), pass, gradients).reshape(rows, cols)
    }
}
