//! The CPU backend: kernels for AVX512, AVX2 and any machine, chosen at run time.

mod attention;
mod backward;
mod bandwidth;
mod dense;
mod elementwise;
mod isa;
mod memory;
pub mod pool;
pub mod quant;
mod simd;
mod unwritten;

use std::ops::Range;

use fourfold_tensor::{Dense, Weight};

pub use bandwidth::measure_read_bandwidth;
pub use isa::Isa;
pub use memory::keep_freed_memory;

use self::dense::DenseArg;
use self::pool::Pool;
use self::quant::{Context, QuantWeight};
use crate::{AttentionSpec, Backend, DeviceWeight, KernelError, KvCache, LinearArg, RopeSpec, Tensor, Values};

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
pub struct Cpu {
    pool: Pool,
    isa: Isa,
    activations: Activations,
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
        Ok(Self { pool: Pool::new(options.threads), isa, activations: options.activations })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
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
        Context { pool: &self.pool, isa: self.isa, activations: self.activations }
    }
}

/// A weight in this backend's layout.
// A few hundred bytes beside the megabytes they hold.
#[allow(clippy::large_enum_variant)]
enum CpuWeight {
    Dense(Dense),
    Quantized(QuantWeight),
}

impl Backend for Cpu {
    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        let (rows, cols) = (weight.rows(), weight.cols());
        Ok(match weight {
            Weight::Dense(w) => DeviceWeight::new(rows, cols, w.data().byte_len(), CpuWeight::Dense(w)),
            Weight::Quantized(w) => {
                let w = QuantWeight::prepare(w, &self.pool)?;
                DeviceWeight::new(rows, cols, w.byte_len(), CpuWeight::Quantized(w))
            }
        })
    }

    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        // Dense and quantized weights want the input in different forms: one region for each kind that is there.
        let mut dense = Vec::with_capacity(weights.len());
        let mut quantized = Vec::with_capacity(weights.len());
        for arg in weights {
            match arg.weight.get() {
                CpuWeight::Dense(weight) => dense.push(DenseArg { weight, rows: 0..weight.rows(), bias: arg.bias }),
                CpuWeight::Quantized(weight) => quantized.push(weight),
            }
        }
        let mut dense = run_unless_empty(&dense, |args| dense::linear(self.context(), x, args)).into_iter();
        let mut quantized = run_unless_empty(&quantized, |w| quant::linear(self.context(), x, w)).into_iter();
        let mut outputs = Vec::with_capacity(weights.len());
        for arg in weights {
            let y = match arg.weight.get() {
                CpuWeight::Dense(_) => dense.next(),
                CpuWeight::Quantized(_) => quantized.next().map(|y| with_bias(y, arg.bias)),
            };
            outputs.extend(y);
        }
        outputs
    }

    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        match weight.get() {
            CpuWeight::Dense(weight) => {
                dense::linear(self.context(), x, &[DenseArg { weight, rows, bias: None }]).swap_remove(0)
            }
            CpuWeight::Quantized(weight) => quant::linear_rows(self.context(), x, weight, rows),
        }
    }

    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        match weight.get() {
            CpuWeight::Dense(weight) => dense::linear_transposed(self.context(), x, weight, rows),
            CpuWeight::Quantized(weight) => quant::linear_transposed(self.context(), x, weight, rows),
        }
    }

    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        let mut y = Tensor::zeros(ids.len(), weight.cols());
        for (row, &id) in y.host_mut().chunks_exact_mut(weight.cols().max(1)).zip(ids) {
            let id = id as usize;
            match weight.get() {
                CpuWeight::Dense(w) => w.data().read_f32(id * w.cols(), row),
                CpuWeight::Quantized(w) => w.read_row(id, row),
            }
        }
        y
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
        elementwise::columns(x, range)
    }

    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        elementwise::concat_columns(a, b)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        elementwise::gather_rows(x, rows)
    }

    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        elementwise::scatter_add_rows(x, y, rows, factors);
    }
}

/// `run(args)`, or nothing for nothing.
fn run_unless_empty<T>(args: &[T], run: impl FnOnce(&[T]) -> Vec<Tensor>) -> Vec<Tensor> {
    if args.is_empty() { Vec::new() } else { run(args) }
}

/// `y + bias` in each row.
fn with_bias(mut y: Tensor, bias: Option<&Tensor>) -> Tensor {
    if let Some(bias) = bias {
        let cols = y.cols().max(1);
        for row in y.host_mut().chunks_exact_mut(cols) {
            row.iter_mut().zip(bias.host()).for_each(|(y, b)| *y += b);
        }
    }
    y
}
