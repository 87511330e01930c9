//! Low-rank adaptation (LoRA, Hu et al. 2021, section 4.1): beside a weight that stays as it is, `scaling · B · A` is learned, with
//! A `[rank, inputs]` and B `[outputs, rank]`. The weight may be packed (QLoRA, Dettmers et al. 2023): nothing here reads it.
//!
//! A linear layer named `q_proj` has an adapter where its source has `q_proj.lora_A.weight`, `q_proj.lora_B.weight` and
//! `q_proj.lora_scaling`, a single number: `lora_alpha / rank` in PEFT's configuration.

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::{Backend, DeviceWeight, Tensor};

use super::{Dropout, Gradients, LinearSpec, TrainPass};
use crate::loader::Loader;
use crate::{ModelError, ModelSpec, Role, WeightSpec};

/// What the name of A ends with, after its layer's name.
pub const LORA_A: &str = ".lora_A.weight";
/// What the name of B ends with.
pub const LORA_B: &str = ".lora_B.weight";
/// What the name of the scaling ends with.
pub const LORA_SCALING: &str = ".lora_scaling";

/// Which linear layers get an adapter, and how large.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rows of A.
    pub rank: usize,
    /// The product counts `alpha / rank`.
    pub alpha: f32,
    /// Last parts of the layers' names (`q_proj`); empty for every linear layer of attention and feed-forward.
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// Factor of B · A.
    pub fn scaling(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// A and B of every layer it applies to, in the order of the stack. Embeddings, heads and routers have none.
    pub fn weights(&self, spec: &ModelSpec) -> Vec<WeightSpec> {
        let applies = |weight: &WeightSpec| match weight.role {
            Role::Attention | Role::Mlp | Role::SharedExpert | Role::RoutedExpert => {
                let part = weight.name.strip_suffix(".weight").and_then(|stem| stem.rsplit('.').next());
                weight.shape.len() == 2
                    && (self.targets.is_empty() || self.targets.iter().any(|t| Some(t.as_str()) == part))
            }
            Role::Embedding
            | Role::LmHead
            | Role::Router
            | Role::Norm
            | Role::Bias
            | Role::Convolution
            | Role::RunningMean
            | Role::RunningVariance => false,
        };
        spec.weights().into_iter().filter(applies).flat_map(|weight| self.pair(&weight)).collect()
    }

    fn pair(&self, weight: &WeightSpec) -> [WeightSpec; 2] {
        let stem = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
        let part = |suffix, shape| WeightSpec {
            name: format!("{stem}{suffix}"),
            shape,
            role: weight.role,
            block: weight.block,
        };
        [part(LORA_A, vec![self.rank, weight.shape[1]]), part(LORA_B, vec![weight.shape[0], self.rank])]
    }
}

/// The adapter of a linear layer.
pub(crate) struct Lora {
    names: [String; 2],
    a: Arc<DeviceWeight>,
    b: Arc<DeviceWeight>,
    scaling: f32,
}

impl Lora {
    /// The adapter of `spec`, where the source has one.
    pub fn load(spec: &LinearSpec, loader: &Loader) -> Result<Option<Self>, ModelError> {
        let names = [LORA_A, LORA_B].map(|suffix| format!("{}{suffix}", spec.name));
        let Some(rank) = loader.adapter_rank(&names[0]) else { return Ok(None) };
        let a = loader.matrix(&names[0], rank, spec.inputs)?;
        let b = loader.matrix(&names[1], spec.outputs, rank)?;
        let scaling = loader.values(&format!("{}{LORA_SCALING}", spec.name), 1)?[0];
        Ok(Some(Self { names, a, b, scaling }))
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.a.byte_len() + self.b.byte_len() + size_of::<f32>()
    }

    /// `y += scaling · (x · Aᵀ) · B[rows, :]ᵀ`: x `[tokens, inputs]`, y `[tokens, rows.len()]`.
    pub fn add_to(
        &self,
        y: &mut Tensor,
        x: &Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
        backend: &dyn Backend,
    ) {
        let down = self.down(x, dropout, backend);
        self.add_scaled(y, &backend.linear_rows(&down, &self.b, rows), backend);
    }

    /// `dx += scaling · (dy · B[rows, :]) · A`: dy `[tokens, rows.len()]`, dx `[tokens, inputs]`.
    pub fn add_transposed_to(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
        backend: &dyn Backend,
    ) {
        let down = backend.linear_transposed(dy, &self.b, rows);
        let mut share = backend.linear_transposed(&down, &self.a, 0..self.a.rows());
        if let Some(dropout) = dropout {
            dropout.apply(&self.names[0], &mut share);
        }
        self.add_scaled(dx, &share, backend);
    }

    /// `x · Aᵀ`, with dropout of x.
    fn down(&self, x: &Tensor, dropout: Option<Dropout>, backend: &dyn Backend) -> Tensor {
        match dropout {
            None => backend.linear_rows(x, &self.a, 0..self.a.rows()),
            Some(dropout) => backend.linear_rows(&dropout.of(&self.names[0], x, backend), &self.a, 0..self.a.rows()),
        }
    }

    /// Adds the gradients of A, `scaling · (dy · B)ᵀ · x`, and of B, `scaling · dyᵀ · (x · Aᵀ)`.
    pub fn weight_backward(&self, x: &Tensor, dy: &Tensor, pass: &TrainPass, gradients: &mut Gradients) {
        let backend = pass.backend;
        if let Some(da) = gradients.of(&self.names[0], self.a.rows(), self.a.cols()) {
            let d_down = backend.linear_transposed(dy, &self.b, 0..self.b.rows());
            let dropped = pass.dropout.map(|dropout| dropout.of(&self.names[0], x, backend));
            backend.linear_weight_gradient(dropped.as_ref().unwrap_or(x), &self.scaled(&d_down, backend), da);
        }
        if let Some(db) = gradients.of(&self.names[1], self.b.rows(), self.b.cols()) {
            let down = self.down(x, pass.dropout, backend);
            backend.linear_weight_gradient(&self.scaled(&down, backend), dy, db);
        }
    }

    fn scaled(&self, x: &Tensor, backend: &dyn Backend) -> Tensor {
        let mut scaled = backend.zeros(x.rows(), x.cols());
        self.add_scaled(&mut scaled, x, backend);
        scaled
    }

    fn add_scaled(&self, sum: &mut Tensor, x: &Tensor, backend: &dyn Backend) {
        let rows: Vec<usize> = (0..x.rows()).collect();
        backend.scatter_add_rows(sum, x, &rows, &vec![self.scaling; rows.len()]);
    }
}
