//! Products with weights of every form: what multiplies the same input is done together.

use std::ops::Range;

use fourfold_tensor::{Dense, Fp8, Sparse, Weight};

use super::dense::{self, DenseArg};
use super::elementwise;
use super::fp8;
use super::quant::{self, Context, QuantWeight};
use super::sparse;
use crate::composite::{Composite, LeafArg, Leaves};
use crate::{Input, KernelError, Tensor};

/// A weight in this backend's layout.
pub type CpuWeight = Composite<Leaf>;

/// A form that has kernels of its own.
pub enum Leaf {
    Dense(Dense),
    Quantized(Box<QuantWeight>),
    Fp8(Fp8),
    Sparse(Sparse),
}

impl Leaf {
    fn prepare(context: Context, weight: Weight) -> Result<Self, KernelError> {
        match weight {
            Weight::Dense(w) => Ok(Self::Dense(w)),
            Weight::Quantized(w) => Ok(Self::Quantized(Box::new(QuantWeight::prepare(w, context.pool)?))),
            Weight::Fp8(w) => Ok(Self::Fp8(w)),
            Weight::Sparse(w) => Ok(Self::Sparse(w)),
            Weight::LowRank(_) | Weight::Sum(_) => unreachable!("composite weights are given leaf by leaf"),
        }
    }

    fn byte_len(&self) -> usize {
        match self {
            Self::Dense(w) => w.data().byte_len(),
            Self::Quantized(w) => w.byte_len(),
            Self::Fp8(w) => w.byte_len(),
            // The mask's running counts besides what is stored.
            Self::Sparse(w) => w.byte_len() + (w.rows() + 1) * size_of::<usize>(),
        }
    }
}

impl CpuWeight {
    /// Takes a weight into the kernels' layout.
    pub fn of(context: Context, weight: Weight) -> Result<Self, KernelError> {
        Self::prepare(weight, &mut |leaf| Leaf::prepare(context, leaf))
    }

    /// Bytes it takes in memory.
    pub fn byte_len(&self) -> usize {
        self.total(&Leaf::byte_len)
    }

    /// Whether its products, and its gradient, take rounded activations.
    pub fn reads_rounded(&self, context: Context) -> bool {
        matches!(self, Self::Leaf(Leaf::Dense(weight)) if dense::reads_rounded(context, weight))
    }

    /// All rows of a weight that takes rounded activations.
    pub fn dense_arg<'a>(&'a self, bias: Option<&'a Tensor>) -> DenseArg<'a> {
        match self {
            Self::Leaf(Leaf::Dense(weight)) => DenseArg { weight, rows: 0..weight.rows(), bias },
            Self::Leaf(Leaf::Quantized(_) | Leaf::Fp8(_) | Leaf::Sparse(_)) | Self::LowRank { .. } | Self::Sum(_) => {
                panic!("rounded activations for a weight that is not dense")
            }
        }
    }

    /// `dy · W` over all `rows`, added to `sum` where there is one.
    pub fn input_gradient(&self, context: Context, dy: Input, rows: usize, sum: Option<Tensor>) -> Tensor {
        match (self, sum) {
            (Self::Leaf(Leaf::Dense(weight)), sum) => dense::input_gradient(context, dy, weight, 0..rows, sum),
            (_, None) => self.linear_transposed(&context, dy.tensor(), 0..rows),
            (_, Some(mut sum)) => {
                let dx = self.linear_transposed(&context, dy.tensor(), 0..rows);
                elementwise::add(context.pool, &mut sum, &dx);
                sum
            }
        }
    }
}

impl Leaves<Leaf> for Context<'_> {
    fn shape(&self, leaf: &Leaf) -> [usize; 2] {
        match leaf {
            Leaf::Dense(w) => [w.rows(), w.cols()],
            Leaf::Quantized(w) => [w.rows(), w.cols()],
            Leaf::Fp8(w) => [w.rows(), w.cols()],
            Leaf::Sparse(w) => [w.rows(), w.cols()],
        }
    }

    /// Dense and quantized leaves want the input in different forms: one region for each kind that is there. The others have a region
    /// of their own each.
    fn linear(&self, x: &Tensor, leaves: &[LeafArg<Leaf>]) -> Vec<Tensor> {
        let context = *self;
        let (mut dense, mut quantized) = (Vec::with_capacity(leaves.len()), Vec::with_capacity(leaves.len()));
        for LeafArg { leaf, bias } in leaves {
            match leaf {
                // Its bias is added in its kernel.
                Leaf::Dense(weight) => dense.push(DenseArg { weight, rows: 0..weight.rows(), bias: *bias }),
                Leaf::Quantized(weight) => quantized.push(&**weight),
                Leaf::Fp8(_) | Leaf::Sparse(_) => {}
            }
        }
        let mut dense = run_unless_empty(&dense, |args| dense::linear(context, x, args)).into_iter();
        let mut quantized = run_unless_empty(&quantized, |w| quant::linear(context, x, w)).into_iter();
        let one = |LeafArg { leaf, bias }: &LeafArg<Leaf>| match leaf {
            Leaf::Dense(_) => dense.next().unwrap_or_else(|| unreachable!("a product for each leaf")),
            Leaf::Quantized(_) => {
                with_bias(quantized.next().unwrap_or_else(|| unreachable!("a product for each leaf")), *bias)
            }
            Leaf::Fp8(w) => with_bias(fp8::linear_rows(context, x, w, 0..w.rows()), *bias),
            Leaf::Sparse(w) => with_bias(sparse::linear_rows(context, x, w, 0..w.rows()), *bias),
        };
        leaves.iter().map(one).collect()
    }

    fn linear_rows(&self, x: &Tensor, leaf: &Leaf, rows: Range<usize>) -> Tensor {
        let context = *self;
        match leaf {
            Leaf::Dense(weight) => dense::linear(context, x, &[DenseArg { weight, rows, bias: None }]).swap_remove(0),
            Leaf::Quantized(weight) => quant::linear_rows(context, x, weight, rows),
            Leaf::Fp8(weight) => fp8::linear_rows(context, x, weight, rows),
            Leaf::Sparse(weight) => sparse::linear_rows(context, x, weight, rows),
        }
    }

    fn linear_transposed(&self, x: &Tensor, leaf: &Leaf, rows: Range<usize>) -> Tensor {
        let context = *self;
        match leaf {
            Leaf::Dense(weight) => dense::linear_transposed(context, x, weight, rows),
            Leaf::Quantized(weight) => quant::linear_transposed(context, x, weight, rows),
            Leaf::Fp8(weight) => fp8::linear_transposed(context, x, weight, rows),
            Leaf::Sparse(weight) => sparse::linear_transposed(context, x, weight, rows),
        }
    }

    fn embedding(&self, leaf: &Leaf, ids: &[u32]) -> Tensor {
        let cols = self.shape(leaf)[1];
        let read = |read: &dyn Fn(usize, &mut [f32])| {
            let mut y = Tensor::zeros(ids.len(), cols);
            let rows = y.host_mut().chunks_exact_mut(cols.max(1)).zip(ids);
            rows.for_each(|(row, &id)| read(id as usize, row));
            y
        };
        match leaf {
            Leaf::Dense(w) => read(&|id, row| w.data().read_f32(id * cols, row)),
            Leaf::Quantized(w) => read(&|id, row| w.read_row(id, row)),
            Leaf::Fp8(w) => read(&|id, row| w.read_row(id, row)),
            Leaf::Sparse(w) => read(&|id, row| w.read_row(id, row)),
        }
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        elementwise::add(self.pool, x, y);
    }

    fn add_bias(&self, y: &mut Tensor, bias: &Tensor) {
        add_bias(y, bias);
    }
}

/// `run(args)`, or nothing for nothing.
fn run_unless_empty<T>(args: &[T], run: impl FnOnce(&[T]) -> Vec<Tensor>) -> Vec<Tensor> {
    if args.is_empty() { Vec::new() } else { run(args) }
}

/// `y + bias` in each row.
fn with_bias(mut y: Tensor, bias: Option<&Tensor>) -> Tensor {
    if let Some(bias) = bias {
        add_bias(&mut y, bias);
    }
    y
}

/// `y += bias` in each row.
fn add_bias(y: &mut Tensor, bias: &Tensor) {
    let cols = y.cols().max(1);
    for row in y.host_mut().chunks_exact_mut(cols) {
        row.iter_mut().zip(bias.host()).for_each(|(y, b)| *y += b);
    }
}
