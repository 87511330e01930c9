//! Linear layers whose weights are floats: f32, f16, bf16. Weights stay as they are stored (in a memory-mapped file, say) and
//! are widened, or brought into panels of some 50 KB, as they are multiplied.

mod dots;
mod fixed;
mod form;
mod gradient;
mod lanes;
mod panel;
mod product;
mod steps;
mod tile;
mod transposed;

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer};
use half::bf16;

pub use gradient::{new_weight_gradient, weight_gradient};
pub use lanes::{Lanes, round_to_bf16, write_bf16};
pub use transposed::{input_gradient, linear_transposed};

use self::dots::dots;
pub(super) use self::fixed::{BLOCK, Ints};
pub(super) use self::form::{Form, Matrices, Plain};
use self::panel::{PANEL_ROWS, RowProduct, panel_len, panel_product};
use self::product::Product;
pub(super) use self::product::{Fma, Pairs};
pub(super) use self::tile::{Operands, product};
use super::pool::SendPtr;
use super::quant::Context;
use super::simd::{Element, Simd, for_isa, for_pairs};
use super::unwritten::Unwritten;
use super::{FloatProducts, Isa};
use crate::cpu::scratch::with_panel;
use crate::{Rounded, Tensor};

/// From this many tokens on, weights are brought into panels.
const PANEL_TOKENS: usize = 16;

/// Tokens that a panel is multiplied with in one work item, at least: enough to pay for the panel.
const TOKENS_PER_ITEM: usize = 14 * 20;

/// Weight rows of a work item where tokens are few.
const DOT_ROWS: usize = 8;

/// A weight to multiply with, and the rows of it that are wanted.
pub struct DenseArg<'a> {
    /// The weight.
    pub weight: &'a Dense,
    /// Its rows that are wanted.
    pub rows: Range<usize>,
    /// Added to each result: `[1, weight.rows()]`.
    pub bias: Option<&'a Tensor>,
}

/// `y_i = x · W_i[rows_i, :]ᵀ + b_i`, in one parallel region.
pub fn linear(context: Context, x: &Tensor, args: &[DenseArg]) -> Vec<Tensor> {
    let shape = [x.rows(), x.cols()];
    if x.host().is_empty() {
        return args.iter().map(|arg| bias_rows(shape, arg)).collect();
    }
    // Each kind of product needs the tokens in its own lanes.
    let many = x.rows() >= PANEL_TOKENS;
    let kinds: Vec<FloatProducts> = args.iter().map(|arg| products(context, arg.weight, many)).collect();
    let lanes = FloatProducts::ALL.map(|kind| kinds.contains(&kind).then(|| Lanes::of(context, kind, x, 0..x.cols())));
    multiply(context, shape, args, &kinds, lanes.each_ref().map(Option::as_ref))
}

/// [`linear`] of an input in pairs of bf16, which all the products take ([`reads_rounded`]).
pub fn linear_rounded(context: Context, x: &Rounded, args: &[DenseArg]) -> Vec<Tensor> {
    let shape = [x.rows(), x.cols()];
    if shape.contains(&0) {
        return args.iter().map(|arg| bias_rows(shape, arg)).collect();
    }
    let lanes = FloatProducts::ALL.map(|kind| (kind == FloatProducts::Bf16).then(|| x.get()));
    multiply(context, shape, args, &vec![FloatProducts::Bf16; args.len()], lanes)
}

/// Products of an input `[tokens, cols]` that is in lanes for each kind of them.
fn multiply(
    context: Context,
    shape: [usize; 2],
    args: &[DenseArg],
    kinds: &[FloatProducts],
    all_lanes: [Option<&Lanes>; FloatProducts::ALL.len()],
) -> Vec<Tensor> {
    let [tokens, cols] = shape;
    let mut outputs: Vec<Output> = args.iter().map(|arg| Output::new(shape, arg)).collect();
    let many = tokens >= PANEL_TOKENS;
    let unit = if many { PANEL_ROWS } else { DOT_ROWS };
    let panels: usize = args.iter().map(|arg| arg.rows.len().div_ceil(unit)).sum();
    let chunks = if many { token_chunks(context, tokens, panels) } else { 1 };

    // Items are (tokens, weight, rows), rows fastest.
    let mut jobs = Vec::with_capacity(args.len());
    let mut first_panel = 0;
    for ((arg, y), &kind) in args.iter().zip(&mut outputs).zip(kinds) {
        let Some(lanes) = all_lanes[kind as usize] else { continue };
        jobs.push(Job { arg, lanes, kind, y: y.target(), first_panel });
        first_panel += arg.rows.len().div_ceil(unit);
    }
    context.pool.for_ranges(panels * chunks, 1, |items| {
        let mut start = items.start;
        while start < items.end {
            let (chunk, first) = (start / panels, start % panels);
            let index = jobs.partition_point(|job| job.first_panel <= first) - 1;
            let end = jobs.get(index + 1).map_or(panels, |next| next.first_panel).min(first + items.end - start);
            let job = &jobs[index];
            let local = first - job.first_panel..end - job.first_panel;
            if many {
                let tokens = shares(tokens, chunks, chunk);
                with_panel(panel_len(cols), |panel| {
                    for i in local {
                        let rows = rows_of(i..i + 1, unit, job);
                        job.run(context.isa, Some(&mut *panel), rows, tokens.clone());
                    }
                });
            } else {
                job.run(context.isa, None, rows_of(local, unit, job), 0..tokens);
            }
            start += end - first;
        }
    });
    drop(jobs);
    let shaped = outputs.into_iter().zip(args);
    // SAFETY: the items of a weight are all its rows wanted, for all tokens.
    shaped.map(|(y, arg)| unsafe { y.written(tokens, arg.rows.len()) }).collect()
}

/// The memory of an output.
enum Output {
    /// Holds the bias, to be added to.
    Bias(Tensor),
    Unwritten(Unwritten<f32>),
}

impl Output {
    fn new(shape: [usize; 2], arg: &DenseArg) -> Self {
        match arg.bias {
            Some(_) => Self::Bias(bias_rows(shape, arg)),
            None => {
                check(shape, arg);
                Self::Unwritten(Unwritten::new(shape[0] * arg.rows.len()))
            }
        }
    }

    fn target(&mut self) -> SendPtr<f32> {
        match self {
            Self::Bias(y) => SendPtr::new(y.host_mut()),
            Self::Unwritten(y) => y.target(),
        }
    }

    /// # Safety
    /// Every element has been written.
    unsafe fn written(self, rows: usize, cols: usize) -> Tensor {
        match self {
            Self::Bias(y) => y,
            // SAFETY: the caller's promise.
            Self::Unwritten(y) => Tensor::new(rows, cols, unsafe { y.written() }),
        }
    }
}

/// Into how many items the tokens of a panel are cut: no more than it takes to share out the work, for each packs the panel anew, but one a
/// thread where tokens are many. Then a thread's results are rows, as in operations on rows, and stay in its own caches.
fn token_chunks(context: Context, tokens: usize, panels: usize) -> usize {
    const ITEMS_A_THREAD: usize = 4;
    let threads = context.pool.threads();
    let wanted = (ITEMS_A_THREAD * threads).div_ceil(panels.max(1)).max(threads);
    wanted.clamp(1, tokens.div_ceil(TOKENS_PER_ITEM).max(1))
}

/// What products with a weight are made in: only bf16's are fast, and integers pay for their scales with many tokens alone.
fn products(context: Context, weight: &Dense, many: bool) -> FloatProducts {
    match (context.products, weight.data()) {
        (FloatProducts::Int16, FloatBuffer::Bf16(_)) if many => FloatProducts::Int16,
        (FloatProducts::Bf16, FloatBuffer::Bf16(_)) => FloatProducts::Bf16,
        _ => FloatProducts::F32,
    }
}

/// Whether products with a weight take an input in pairs of bf16, and its gradient's too, with any number of tokens.
pub fn reads_rounded(context: Context, weight: &Dense) -> bool {
    context.products == FloatProducts::Bf16 && matches!(weight.data(), FloatBuffer::Bf16(_))
}

fn check([_, cols]: [usize; 2], arg: &DenseArg) {
    assert_eq!(cols, arg.weight.cols(), "an input of {cols} columns for a weight of {}", arg.weight.cols());
    assert!(arg.rows.end <= arg.weight.rows(), "rows {:?} of a weight of {}", arg.rows, arg.weight.rows());
}

/// The bias for each token; zeros where there is none.
fn bias_rows(shape: [usize; 2], arg: &DenseArg) -> Tensor {
    check(shape, arg);
    let tokens = shape[0];
    match arg.bias {
        None => Tensor::zeros(tokens, arg.rows.len()),
        Some(bias) => {
            assert_eq!(bias.cols(), arg.weight.rows(), "a bias of {} for {} rows", bias.cols(), arg.weight.rows());
            Tensor::new(tokens, arg.rows.len(), bias.host()[arg.rows.clone()].repeat(tokens))
        }
    }
}

/// Rows (counted from `job.arg.rows.start`) of some units.
fn rows_of(units: Range<usize>, unit: usize, job: &Job) -> Range<usize> {
    units.start * unit..(units.end * unit).min(job.arg.rows.len())
}

/// Share `i` of `total` in `shares` nearly equal ones.
fn shares(total: usize, shares: usize, i: usize) -> Range<usize> {
    total * i / shares..total * (i + 1) / shares
}

/// One weight's part of a region.
struct Job<'a> {
    arg: &'a DenseArg<'a>,
    lanes: &'a Lanes,
    kind: FloatProducts,
    y: SendPtr<f32>,
    /// Of all weights' panels, its first.
    first_panel: usize,
}

impl Job<'_> {
    /// `rows` (counted from the first one wanted) of a weight's elements for `tokens`.
    fn product<W>(&self, w: &[W], rows: Range<usize>, tokens: Range<usize>) -> RowProduct<W> {
        let (cols, y_row, x_row) = (self.arg.weight.cols(), self.arg.rows.len(), self.lanes.row);
        let first = self.arg.rows.start + rows.start;
        RowProduct {
            weights: w[first * cols..(first + rows.len()) * cols].as_ptr(),
            cols,
            rows: rows.len(),
            x: self.lanes.data[tokens.start * x_row..tokens.end * x_row].as_ptr(),
            x_row,
            tokens: tokens.len(),
            y: self.y.get().wrapping_add(tokens.start * y_row + rows.start),
            y_row,
            accumulate: self.arg.bias.is_some(),
        }
    }

    /// Computes `rows` (counted from the first one wanted) for `tokens`.
    fn run(&self, isa: Isa, panel: Option<&mut [f32]>, rows: Range<usize>, tokens: Range<usize>) {
        match self.arg.weight.data() {
            FloatBuffer::F32(w) => run_floats(isa, self, w, panel, rows, tokens),
            FloatBuffer::F16(w) => run_floats(isa, self, w, panel, rows, tokens),
            FloatBuffer::Bf16(w) => match (self.kind, panel) {
                (FloatProducts::Bf16, panel) => run_pairs(self, w, panel, rows, tokens),
                (FloatProducts::Int16, Some(panel)) => run_ints(isa, self, w, panel, rows, tokens),
                (_, panel) => run_floats(isa, self, w, panel, rows, tokens),
            },
        }
    }
}

for_pairs! {
    /// Both factors in pairs of bf16.
    fn run_pairs(job: &Job, w: &[bf16], panel: Option<&mut [f32]>, rows: Range<usize>, tokens: Range<usize>) = run_with::<_, Pairs>
}

for_isa! {
    /// Both factors in pairs of integers.
    fn run_ints(job: &Job, w: &[bf16], panel: &mut [f32], rows: Range<usize>, tokens: Range<usize>) = run_ints_with
}

for_isa! {
    /// f32 activations times weights of any float type.
    fn run_floats<E: Element>(job: &Job, w: &[E], panel: Option<&mut [f32]>, rows: Range<usize>, tokens: Range<usize>) = run_with::<_, Fma<E>>
}

/// The kernel for many or few tokens.
#[inline(always)]
fn run_with<S: Simd, P: Product<S>>(
    s: S,
    job: &Job,
    w: &[P::W],
    panel: Option<&mut [f32]>,
    rows: Range<usize>,
    tokens: Range<usize>,
) {
    let p = job.product(w, rows, tokens);
    // SAFETY: `product` has taken the slices; items write disjoint parts of y; the instruction set has been checked, as the token says.
    unsafe {
        match panel {
            Some(panel) => panel_product::<S, P>(s, p, panel),
            None => dots::<S, P>(s, p),
        }
    }
}

#[inline(always)]
fn run_ints_with<S: Simd>(s: S, job: &Job, w: &[bf16], panel: &mut [f32], rows: Range<usize>, tokens: Range<usize>) {
    let scales = job.lanes.scales_from(tokens.start);
    // SAFETY: as in `run_with`; the lanes are integers, which have scales.
    unsafe { fixed::panel_product(s, job.product(w, rows, tokens), scales, panel) }
}
