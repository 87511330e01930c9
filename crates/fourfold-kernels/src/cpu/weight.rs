//! Products with weights of every form: what multiplies the same input is done together, composite forms go through their parts.

use std::ops::Range;

use fourfold_tensor::{Dense, Sparse, Weight};

use super::dense::{self, DenseArg};
use super::elementwise;
use super::quant::{self, Context, QuantWeight};
use super::sparse;
use crate::{Input, KernelError, Tensor};

/// A weight in this backend's layout.
pub enum CpuWeight {
    Dense(Dense),
    Quantized(Box<QuantWeight>),
    Sparse(Sparse),
    LowRank { up: Box<CpuWeight>, down: Box<CpuWeight> },
    Sum(Vec<CpuWeight>),
}

/// A weight to multiply with.
pub struct Product<'a> {
    pub weight: &'a CpuWeight,
    pub bias: Option<&'a Tensor>,
}

impl CpuWeight {
    /// Takes a weight into the kernels' layout.
    pub fn prepare(context: Context, weight: Weight) -> Result<Self, KernelError> {
        Ok(match weight {
            Weight::Dense(w) => Self::Dense(w),
            Weight::Quantized(w) => Self::Quantized(Box::new(QuantWeight::prepare(w, context.pool)?)),
            Weight::Sparse(w) => Self::Sparse(w),
            Weight::LowRank(w) => {
                let (up, down) = w.into_factors();
                Self::LowRank {
                    up: Box::new(Self::prepare(context, up)?),
                    down: Box::new(Self::prepare(context, down)?),
                }
            }
            Weight::Sum(w) => {
                Self::Sum(w.into_terms().into_iter().map(|w| Self::prepare(context, w)).collect::<Result<_, _>>()?)
            }
        })
    }

    /// Bytes it takes in memory.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::Dense(w) => w.data().byte_len(),
            Self::Quantized(w) => w.byte_len(),
            // The mask's running counts besides what is stored.
            Self::Sparse(w) => w.byte_len() + (w.rows() + 1) * size_of::<usize>(),
            Self::LowRank { up, down } => up.byte_len() + down.byte_len(),
            Self::Sum(terms) => terms.iter().map(Self::byte_len).sum(),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows(),
            Self::Quantized(w) => w.rows(),
            Self::Sparse(w) => w.rows(),
            Self::LowRank { up, .. } => up.rows(),
            Self::Sum(terms) => terms[0].rows(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols(),
            Self::Quantized(w) => w.cols(),
            Self::Sparse(w) => w.cols(),
            Self::LowRank { down, .. } => down.cols(),
            Self::Sum(terms) => terms[0].cols(),
        }
    }

    /// The parts that multiply the layer's input itself.
    fn inputs<'a>(&'a self, found: &mut Vec<&'a Self>) {
        match self {
            Self::Dense(_) | Self::Quantized(_) | Self::Sparse(_) => found.push(self),
            Self::LowRank { down, .. } => down.inputs(found),
            Self::Sum(terms) => terms.iter().for_each(|term| term.inputs(found)),
        }
    }

    /// The whole product from the products of [`CpuWeight::inputs`], taken in its order.
    fn finish(&self, context: Context, parts: &mut impl Iterator<Item = Tensor>) -> Tensor {
        match self {
            Self::Dense(_) | Self::Quantized(_) | Self::Sparse(_) => {
                parts.next().unwrap_or_else(|| unreachable!("a product for each part"))
            }
            Self::LowRank { up, down } => {
                let inner = down.finish(context, parts);
                linear(context, &inner, &[Product { weight: up, bias: None }]).swap_remove(0)
            }
            Self::Sum(terms) => sum(context, terms.iter().map(|term| term.finish(context, parts)).collect()),
        }
    }

    /// `y = x · W[rows, :]ᵀ`.
    pub fn linear_rows(&self, context: Context, x: &Tensor, rows: Range<usize>) -> Tensor {
        match self {
            Self::Dense(weight) => dense::linear(context, x, &[DenseArg { weight, rows, bias: None }]).swap_remove(0),
            Self::Quantized(weight) => quant::linear_rows(context, x, weight, rows),
            Self::Sparse(weight) => sparse::linear_rows(context, x, weight, rows),
            Self::LowRank { up, down } => up.linear_rows(context, &down.linear_rows(context, x, 0..down.rows()), rows),
            Self::Sum(terms) => {
                sum(context, terms.iter().map(|term| term.linear_rows(context, x, rows.clone())).collect())
            }
        }
    }

    /// `y = x · W[rows, :]`.
    pub fn linear_transposed(&self, context: Context, x: &Tensor, rows: Range<usize>) -> Tensor {
        match self {
            Self::Dense(weight) => dense::linear_transposed(context, x, weight, rows),
            Self::Quantized(weight) => quant::linear_transposed(context, x, weight, rows),
            Self::Sparse(weight) => sparse::linear_transposed(context, x, weight, rows),
            Self::LowRank { up, down } => {
                down.linear_transposed(context, &up.linear_transposed(context, x, rows), 0..down.rows())
            }
            Self::Sum(terms) => {
                sum(context, terms.iter().map(|term| term.linear_transposed(context, x, rows.clone())).collect())
            }
        }
    }

    /// Whether its products, and its gradient, take rounded activations.
    pub fn reads_rounded(&self, context: Context) -> bool {
        matches!(self, Self::Dense(weight) if dense::reads_rounded(context, weight))
    }

    /// All rows of a weight that takes rounded activations.
    pub fn dense_arg<'a>(&'a self, bias: Option<&'a Tensor>) -> DenseArg<'a> {
        match self {
            Self::Dense(weight) => DenseArg { weight, rows: 0..weight.rows(), bias },
            Self::Quantized(_) | Self::Sparse(_) | Self::LowRank { .. } | Self::Sum(_) => {
                panic!("rounded activations for a weight that is not dense")
            }
        }
    }

    /// `dy · W`, added to `sum` where there is one.
    pub fn input_gradient(&self, context: Context, dy: Input, sum: Option<Tensor>) -> Tensor {
        match (self, sum) {
            (Self::Dense(weight), sum) => dense::input_gradient(context, dy, weight, 0..weight.rows(), sum),
            (_, None) => self.linear_transposed(context, dy.tensor(), 0..self.rows()),
            (_, Some(mut sum)) => {
                let dx = self.linear_transposed(context, dy.tensor(), 0..self.rows());
                elementwise::add(context.pool, &mut sum, &dx);
                sum
            }
        }
    }

    /// The named rows: `[ids.len(), cols]`.
    pub fn embedding(&self, context: Context, ids: &[u32]) -> Tensor {
        let cols = self.cols();
        let read = |read: &dyn Fn(usize, &mut [f32])| {
            let mut y = Tensor::zeros(ids.len(), cols);
            let rows = y.host_mut().chunks_exact_mut(cols.max(1)).zip(ids);
            rows.for_each(|(row, &id)| read(id as usize, row));
            y
        };
        match self {
            Self::Dense(w) => read(&|id, row| w.data().read_f32(id * cols, row)),
            Self::Quantized(w) => read(&|id, row| w.read_row(id, row)),
            Self::Sparse(w) => read(&|id, row| w.read_row(id, row)),
            Self::LowRank { up, down } => down.linear_transposed(context, &up.embedding(context, ids), 0..down.rows()),
            Self::Sum(terms) => sum(context, terms.iter().map(|term| term.embedding(context, ids)).collect()),
        }
    }
}

/// `y_i = x · W_iᵀ + b_i`. Dense, quantized and sparse parts want the input in different forms: one region for each kind that is
/// there, over all weights' parts.
pub fn linear(context: Context, x: &Tensor, products: &[Product]) -> Vec<Tensor> {
    let mut parts = Vec::with_capacity(products.len());
    let mut counts = Vec::with_capacity(products.len());
    for product in products {
        let before = parts.len();
        product.weight.inputs(&mut parts);
        counts.push(parts.len() - before);
    }
    // A dense weight's bias is added in its kernel.
    let mut biases = vec![None; parts.len()];
    let mut first = 0;
    for (product, count) in products.iter().zip(&counts) {
        if matches!(product.weight, CpuWeight::Dense(_)) {
            biases[first] = product.bias;
        }
        first += count;
    }
    let (mut dense, mut quantized) = (Vec::with_capacity(parts.len()), Vec::with_capacity(parts.len()));
    for (part, &bias) in parts.iter().zip(&biases) {
        match part {
            CpuWeight::Dense(weight) => dense.push(DenseArg { weight, rows: 0..weight.rows(), bias }),
            CpuWeight::Quantized(weight) => quantized.push(&**weight),
            CpuWeight::Sparse(_) | CpuWeight::LowRank { .. } | CpuWeight::Sum(_) => {}
        }
    }
    let mut dense = run_unless_empty(&dense, |args| dense::linear(context, x, args)).into_iter();
    let mut quantized = run_unless_empty(&quantized, |w| quant::linear(context, x, w)).into_iter();
    let mut outputs = parts.iter().filter_map(|part| match part {
        CpuWeight::Dense(_) => dense.next(),
        CpuWeight::Quantized(_) => quantized.next(),
        CpuWeight::Sparse(w) => Some(sparse::linear_rows(context, x, w, 0..w.rows())),
        CpuWeight::LowRank { .. } | CpuWeight::Sum(_) => None,
    });
    products
        .iter()
        .map(|product| {
            let y = product.weight.finish(context, &mut outputs);
            if matches!(product.weight, CpuWeight::Dense(_)) { y } else { with_bias(y, product.bias) }
        })
        .collect()
}

/// `Σ terms`.
fn sum(context: Context, terms: Vec<Tensor>) -> Tensor {
    let mut terms = terms.into_iter();
    let mut total = terms.next().unwrap_or_else(|| unreachable!("a sum has terms"));
    terms.for_each(|term| elementwise::add(context.pool, &mut total, &term));
    total
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
