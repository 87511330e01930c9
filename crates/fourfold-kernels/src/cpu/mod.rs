//! The CPU backend: kernels for AVX512, AVX2 and any machine, chosen at run time.

mod attention;
mod backward;
mod bandwidth;
mod dense;
mod elementwise;
mod fp8;
mod isa;
mod memory;
pub mod pool;
#[cfg(test)]
mod pool_tests;
pub mod quant;
mod rows;
mod scratch;
mod simd;
mod sparse;
mod spatial;
mod sync;
mod unwritten;
mod weight;

use std::ops::Range;

use fourfold_tensor::Weight;

pub use bandwidth::measure_read_bandwidth;
pub use isa::{FloatProducts, Isa};
pub use memory::{MAPPED_BYTES, keep_freed_memory};

use self::pool::Pool;
use self::quant::Context;
use self::weight::{CpuWeight, Leaf};
use crate::composite::{self, Product};
use crate::{AttentionSpec, Backend, DeviceWeight, KernelError, KvCache, LinearArg, Memory, RopeSpec, Tensor, Values};

/// In which precision activations enter a product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Rounded to int8 (quantized weights) or as [`FloatProducts`] says (bf16 weights, gradients) where that is faster.
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
    /// What fast products of floats are made in; the fastest there is when absent.
    pub products: Option<FloatProducts>,
}

/// The CPU backend.
pub struct Cpu {
    pool: Pool,
    isa: Isa,
    activations: Activations,
    products: FloatProducts,
}

impl Cpu {
    /// A backend with its own threads.
    ///
    /// # Errors
    /// [`KernelError::NoIsa`] when this machine lacks the instruction set asked for; [`KernelError::NoProducts`] when that lacks the products.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(KernelError::NoIsa(isa.name()));
        }
        let products = options.products.unwrap_or_else(|| FloatProducts::fastest(isa));
        if !products.is_of(isa) {
            return Err(KernelError::NoProducts { isa: isa.name(), products: products.name() });
        }
        Ok(Self { pool: Pool::new(options.threads), isa, activations: options.activations, products })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// All that its results depend on, in words: instruction set, precision of activations, what products are made in.
    pub fn describe(&self) -> String {
        let context = self.context();
        let activations = match self.activations {
            Activations::Fast => "fast",
            Activations::F32 => "f32",
        };
        format!("{}, {activations} activations, products in {}", self.isa.name(), context.products.name())
    }

    /// The threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes a second that its threads read from memory: see [`measure_read_bandwidth`].
    pub fn read_bandwidth(&self) -> f64 {
        measure_read_bandwidth(&self.pool)
    }

    fn context(&self) -> Context<'_> {
        let products = match self.activations {
            Activations::Fast => self.products,
            Activations::F32 => FloatProducts::F32,
        };
        Context { pool: &self.pool, isa: self.isa, activations: self.activations, products }
    }
}

impl Memory for Cpu {
    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let weight = CpuWeight::of(self.context(), weight)?;
        Ok(DeviceWeight::new(rows, cols, weight.byte_len(), weight))
    }
}

impl Backend for Cpu {
    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        let products: Vec<Product<Leaf>> =
            weights.iter().map(|arg| Product { weight: arg.weight.get(), bias: arg.bias }).collect();
        composite::linear(&self.context(), x, &products)
    }

    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        weight.get::<CpuWeight>().linear_rows(&self.context(), x, rows)
    }

    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        weight.get::<CpuWeight>().linear_transposed(&self.context(), x, rows)
    }

    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        weight.get::<CpuWeight>().embedding(&self.context(), ids)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        elementwise::rms_norm(&self.pool, self.isa, x, weight, eps)
    }

    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        elementwise::rope(&self.pool, x, cos, sin, spec, 1.0);
    }

    fn attention(&self, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
        attention::attention(&self.pool, self.isa, q, keys, values, spec)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor {
        elementwise::swiglu(&self.pool, self.isa, gate, up)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        elementwise::add(&self.pool, x, y);
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        rows::columns(&self.pool, x, range)
    }

    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        rows::concat_columns(&self.pool, a, b)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        rows::gather_rows(&self.pool, x, rows)
    }

    fn split_heads(&self, kv: &Tensor, shared: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
        rows::split_heads(&self.pool, kv, shared, heads, own)
    }

    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        rows::scatter_add_rows(&self.pool, x, y, rows, factors);
    }
}
