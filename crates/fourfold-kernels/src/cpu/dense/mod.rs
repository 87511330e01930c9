//! Linear layers whose weights are floats: f32, f16, bf16. Weights stay as they are stored (in a memory-mapped file, say) and
//! are widened, or brought into panels of some 50 KB, as they are multiplied.

mod dots;
mod fixed;
mod form;
mod gradient;
mod panel;
mod product;
mod steps;
mod tile;
mod transposed;

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer};
use half::bf16;

pub use gradient::{new_weight_gradient, weight_gradient};
pub use transposed::linear_transposed;

use self::dots::dots;
pub(super) use self::fixed::{BLOCK, Ints};
use self::fixed::{TokenScales, quantize_row};
pub(super) use self::form::{Form, Matrices, Plain};
use self::panel::{PANEL_ROWS, RowProduct, panel_len, panel_product};
use self::product::Product;
pub(super) use self::product::{Fma, Pairs};
pub(super) use self::tile::{Operands, product};
use super::pool::SendPtr;
use super::quant::Context;
use super::simd::{Element, MAX_LANES, PairDot, Simd, for_isa, for_pairs};
use super::unwritten::Unwritten;
use super::{FloatProducts, Isa};
use crate::Tensor;
use crate::cpu::scratch::with_panel;

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
    if x.rows() == 0 || x.cols() == 0 {
        return args.iter().map(|arg| bias_rows(x, arg)).collect();
    }
    let mut outputs: Vec<Output> = args.iter().map(|arg| Output::new(x, arg)).collect();
    let many = x.rows() >= PANEL_TOKENS;
    // Each kind of product needs the tokens in its own lanes.
    let kinds: Vec<FloatProducts> = args.iter().map(|arg| products(context, arg.weight, many)).collect();
    let all_lanes =
        FloatProducts::ALL.map(|kind| kinds.contains(&kind).then(|| Lanes::of(context, kind, x, 0..x.cols())));
    let unit = if many { PANEL_ROWS } else { DOT_ROWS };
    let panels: usize = args.iter().map(|arg| arg.rows.len().div_ceil(unit)).sum();
    let chunks = if many { token_chunks(context, x.rows(), panels) } else { 1 };

    // Items are (tokens, weight, rows), rows fastest.
    let mut jobs = Vec::with_capacity(args.len());
    let mut first_panel = 0;
    for ((arg, y), kind) in args.iter().zip(&mut outputs).zip(kinds) {
        let Some(lanes) = &all_lanes[kind as usize] else { continue };
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
                let tokens = shares(x.rows(), chunks, chunk);
                with_panel(panel_len(x.cols()), |panel| {
                    for i in local {
                        let rows = rows_of(i..i + 1, unit, job);
                        job.run(context.isa, Some(&mut *panel), rows, tokens.clone());
                    }
                });
            } else {
                job.run(context.isa, None, rows_of(local, unit, job), 0..x.rows());
            }
            start += end - first;
        }
    });
    drop(jobs);
    let shaped = outputs.into_iter().zip(args);
    // SAFETY: the items of a weight are all its rows wanted, for all tokens.
    shaped.map(|(y, arg)| unsafe { y.written(x.rows(), arg.rows.len()) }).collect()
}

/// The memory of an output.
enum Output {
    /// Holds the bias, to be added to.
    Bias(Tensor),
    Unwritten(Unwritten<f32>),
}

impl Output {
    fn new(x: &Tensor, arg: &DenseArg) -> Self {
        match arg.bias {
            Some(_) => Self::Bias(bias_rows(x, arg)),
            None => {
                check(x, arg);
                Self::Unwritten(Unwritten::new(x.rows() * arg.rows.len()))
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

fn check(x: &Tensor, arg: &DenseArg) {
    assert_eq!(x.cols(), arg.weight.cols(), "an input of {} columns for a weight of {}", x.cols(), arg.weight.cols());
    assert!(arg.rows.end <= arg.weight.rows(), "rows {:?} of a weight of {}", arg.rows, arg.weight.rows());
}

/// The bias for each token; zeros where there is none.
fn bias_rows(x: &Tensor, arg: &DenseArg) -> Tensor {
    check(x, arg);
    match arg.bias {
        None => Tensor::zeros(x.rows(), arg.rows.len()),
        Some(bias) => {
            assert_eq!(bias.cols(), arg.weight.rows(), "a bias of {} for {} rows", bias.cols(), arg.weight.rows());
            Tensor::new(x.rows(), arg.rows.len(), bias.host()[arg.rows.clone()].repeat(x.rows()))
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

/// Activations as 32-bit lanes, rows padded with zeros to whole vectors.
pub(super) struct Lanes {
    /// All rows.
    pub data: Vec<f32>,
    /// Lanes from a row to the next.
    pub row: usize,
    /// Of integers: each block's scale, row after row.
    pub scales: Vec<f32>,
}

impl Lanes {
    /// Lanes from a row to the next: whole vectors, and an odd number of cache lines, so that many rows at one column do not
    /// meet in one set of the first cache.
    fn stride(lanes: usize) -> usize {
        let vectors = lanes.div_ceil(MAX_LANES);
        (vectors | 1) * MAX_LANES
    }

    /// All columns for a kind of product, integers with a scale for each run of `dim`.
    pub fn by_head(context: Context, kind: FloatProducts, x: &Tensor, dim: usize) -> Self {
        match kind {
            FloatProducts::Int16 => Self::ints_of(context, x, 0..x.cols(), dim),
            kind => Self::of(context, kind, x, 0..x.cols()),
        }
    }

    /// Some columns, for a kind of product.
    pub fn of(context: Context, kind: FloatProducts, x: &Tensor, cols: Range<usize>) -> Self {
        match kind {
            FloatProducts::F32 => Self::floats_of(context, x, cols),
            FloatProducts::Bf16 => Self::pairs_of(context, x, cols),
            FloatProducts::Int16 => Self::ints_of(context, x, cols, BLOCK),
        }
    }

    /// Some columns.
    pub fn floats_of(context: Context, x: &Tensor, cols: Range<usize>) -> Self {
        let row = Self::stride(cols.len());
        Self::fill(context, x.rows(), row, cols.len(), |t, lanes| {
            lanes[..cols.len()].copy_from_slice(&x.row(t)[cols.clone()]);
        })
    }

    /// Some columns.
    pub fn pairs_of(context: Context, x: &Tensor, cols: Range<usize>) -> Self {
        let row = Self::stride(cols.len().div_ceil(2));
        Self::fill(context, x.rows(), row, cols.len() / 2, |t, lanes| write_pairs(&x.row(t)[cols.clone()], lanes))
    }

    /// Some columns, with a scale for each run of `run`, at most a block and even.
    fn ints_of(context: Context, x: &Tensor, cols: Range<usize>, run: usize) -> Self {
        assert!(run <= BLOCK && (run.is_multiple_of(2) || run >= cols.len()), "a scale for {run} columns");
        let row = Self::stride(cols.len().div_ceil(2));
        let runs = cols.len().div_ceil(run);
        let mut scales = Unwritten::<f32>::new(x.rows() * runs);
        let to = scales.target();
        let lanes = Self::fill(context, x.rows(), row, cols.len() / 2, |t, lanes| {
            let halves: &mut [bf16] = &mut bytemuck::cast_slice_mut(lanes)[..cols.len()];
            // SAFETY: row t's scales are inside the memory and this item's alone; they are written and not read.
            let scales = unsafe { std::slice::from_raw_parts_mut(to.get().add(t * runs), runs) };
            quantize(context.isa, &x.row(t)[cols.clone()], halves, scales, run);
        });
        // SAFETY: every row's scales have been written.
        Self { scales: unsafe { scales.written() }, ..lanes }
    }

    /// The scales of run `run` from a token on.
    pub fn run_scales(&self, token: usize, run: usize) -> TokenScales {
        let scales = self.scales_from(token);
        TokenScales { at: scales.at.wrapping_add(run), ..scales }
    }

    /// The scales from a token on.
    fn scales_from(&self, token: usize) -> TokenScales {
        let row = self.scales.len() * self.row / self.data.len().max(1);
        TokenScales { at: self.scales[token * row..].as_ptr(), row }
    }

    /// Rows of `row` lanes, of which `write` writes the first `whole`, or some more; the others are zero.
    fn fill(context: Context, rows: usize, row: usize, whole: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut data = Unwritten::<f32>::new(rows * row);
        let to = data.target();
        context.pool.for_ranges(rows, (1 << 14) / row + 1, |range| {
            for t in range {
                // SAFETY: row t is inside the memory and this item's alone; `write` does not read it.
                let lanes = unsafe { std::slice::from_raw_parts_mut(to.get().add(t * row), row) };
                lanes[whole..].fill(0.0);
                write(t, lanes);
            }
        });
        // SAFETY: every row has been written.
        Self { data: unsafe { data.written() }, row, scales: Vec::new() }
    }
}

/// Rounds to nearest, ties to even.
pub fn write_bf16(context: Context, values: &[f32], rounded: &mut [bf16]) {
    context.pool.for_chunks_mut(rounded, 1, 1 << 14, |first, rounded| {
        round_to_bf16(context.isa, &values[first..first + rounded.len()], rounded);
    });
}

for_isa! {
    /// Rounds to nearest, ties to even.
    pub fn round_to_bf16(from: &[f32], to: &mut [bf16]) = round_to_bf16_with
}

#[inline(always)]
fn round_to_bf16_with<S: Simd>(_s: S, from: &[f32], to: &mut [bf16]) {
    for (to, &from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        // NaN must not round up to infinity's neighbour zero: it keeps its sign and a quiet bit.
        let rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        *to = bf16::from_bits(if from.is_nan() { quiet as u16 } else { rounded as u16 });
    }
}

for_pairs! {
    /// Brings a row into pairs of bf16.
    fn write_pairs(from: &[f32], to: &mut [f32]) = write_pairs_with
}

#[inline(always)]
fn write_pairs_with<S: PairDot>(s: S, from: &[f32], to: &mut [f32]) {
    assert!(from.len().div_ceil(2).next_multiple_of(S::LANES) <= to.len());
    // SAFETY: as asserted.
    unsafe { Pairs::lanes_of_row(s, from.as_ptr(), from.len(), to.as_mut_ptr()) }
}

for_isa! {
    /// Brings a row into integers, with a scale for each run of `run`.
    fn quantize(from: &[f32], to: &mut [bf16], scales: &mut [f32], run: usize) = quantize_runs
}

#[inline(always)]
fn quantize_runs<S: Simd>(s: S, from: &[f32], to: &mut [bf16], scales: &mut [f32], run: usize) {
    if run == BLOCK {
        return quantize_row(s, from, to, scales);
    }
    for ((from, to), scale) in from.chunks(run).zip(to.chunks_mut(run)).zip(scales) {
        quantize_row(s, from, to, std::slice::from_mut(scale));
    }
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
