//! The CPU backend: kernels for AVX512, AVX2 and any machine, chosen at run time.

mod isa;
pub mod pool;
pub mod quant;

use std::ops::Range;

use fourfold_tensor::Weight;

pub use isa::Isa;

use crate::{
    AttentionSpec, Backend, DeviceWeight, KernelError, KvCache, LinearArg, Reference, RopeSpec, Tensor, Values,
};

/// In which precision activations enter a product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Rounded to int8 (quantized weights) or bf16 (bf16 weights) where that is faster.
    #[default]
    Fast,
    /// As they are.
    F32,
}

/// How to set up the CPU backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads to compute with; 0 for as many as there are cores.
    pub threads: usize,
    /// Instruction set; the best there is when absent.
    pub isa: Option<Isa>,
    /// Precision of activations in products.
    pub activations: Activations,
}

/// The CPU backend.
#[derive(Clone, Debug)]
pub struct Cpu {
    isa: Isa,
}

impl Cpu {
    /// A backend with its own threads.
    ///
    /// # Errors
    /// [`KernelError::NoIsa`] when this machine lacks the instruction set asked for.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(KernelError::NoIsa(isa.name()));
        }
        Ok(Self { isa })
    }
}

impl Backend for Cpu {
    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        Reference.upload(weight)
    }

    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        Reference.linear(x, weights)
    }

    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        Reference.linear_rows(x, weight, rows)
    }

    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        Reference.linear_transposed(x, weight, rows)
    }

    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        Reference.embedding(weight, ids)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        Reference.rms_norm(x, weight, eps)
    }

    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        Reference.rope(x, cos, sin, spec);
    }

    fn attention(&self, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
        Reference.attention(q, keys, values, spec)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor {
        Reference.swiglu(gate, up)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        Reference.add(x, y);
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        Reference.columns(x, range)
    }

    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        Reference.concat_columns(a, b)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        Reference.gather_rows(x, rows)
    }

    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        Reference.scatter_add_rows(x, y, rows, factors);
    }
}
