//! `dw += dyᵀ · x`: a sum over tokens.

use std::ops::Range;

use half::bf16;

use super::PANEL_ROWS;
use super::fixed::{Ints, panel_rows};
use super::form::{Form, Matrices, Plain};
use super::lanes::Lanes;
use super::product::{Fma, Pairs};
use super::tile::Operands;
use crate::cpu::FloatProducts;
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_panel;
use crate::cpu::simd::{Element, MAX_LANES, Simd, for_isa, for_pairs};
use crate::cpu::unwritten::Unwritten;
use crate::{Input, Tensor};

/// Columns of a strip of `x`.
const STRIP: usize = PANEL_ROWS;

/// Tokens that are summed over at a time.
const TOKENS: usize = 1024;

/// Rows of `dw` of a work item, at most. Their lanes of `dy` lie an odd number of cache lines apart from step to step, so that steps
/// do not meet in one set of the first cache.
const ROWS: usize = 7 * MAX_LANES;

/// Lanes of strips of `x` that are brought in at a time: with a work item's lanes of `dy` they stay in the second cache.
const STRIPS_LEN: usize = 1 << 17;

/// `dw += dyᵀ · x`: x `[tokens, in]`, dy `[tokens, out]`, dw `[out, in]`. With fast activations both are rounded, to bf16
/// as mixed-precision training does (Micikevicius et al. 2018) or to integers with scales ([`FloatProducts`]); sums are f32.
pub fn weight_gradient(context: Context, x: Input, dy: Input, dw: &mut Tensor) {
    assert_eq!((x.rows(), dw.rows(), dw.cols()), (dy.rows(), dy.cols(), x.cols()), "weight gradient: shapes");
    write(context, x, dy, SendPtr::new(dw.host_mut()), true);
}

/// `dyᵀ · x` as a new tensor.
pub fn new_weight_gradient(context: Context, x: Input, dy: Input) -> Tensor {
    assert_eq!(x.rows(), dy.rows(), "weight gradient: shapes");
    let (outputs, inputs) = (dy.cols(), x.cols());
    if x.rows() == 0 {
        return Tensor::zeros(outputs, inputs);
    }
    let mut dw = Unwritten::new(outputs * inputs);
    write(context, x, dy, dw.target(), false);
    // SAFETY: the first tokens' product has written every element.
    Tensor::new(outputs, inputs, unsafe { dw.written() })
}

/// Adds `dyᵀ · x` to what `to` points to, or writes it there.
fn write(context: Context, x: Input, dy: Input, to: SendPtr<f32>, accumulate: bool) {
    let (outputs, inputs) = (dy.cols(), x.cols());
    if outputs == 0 || inputs == 0 {
        return;
    }
    let kind = context.products;
    let rows = rows_of_item(outputs, context.pool.threads());
    for first in (0..x.rows()).step_by(TOKENS) {
        let tokens = TOKENS.min(x.rows() - first);
        let steps = steps_of(kind, tokens);
        let group = (STRIPS_LEN / (steps * STRIP)).max(1) * STRIP;
        for start in (0..inputs).step_by(group) {
            let columns = start..inputs.min(start + group);
            let strips = strips(context, kind, x, first..first + tokens, columns.clone());
            context.pool.for_ranges(outputs.div_ceil(rows), 1, |items| {
                with_panel(steps * ROWS, |panel| {
                    for row in items.map(|item| item * rows) {
                        let rows = rows.min(outputs - row);
                        fill(context, kind, dy, first..first + tokens, row..row + rows, panel, ROWS);
                        for (strip, lanes) in strips.chunks_exact(steps * STRIP).enumerate() {
                            let col = columns.start + strip * STRIP;
                            let part = Part {
                                lanes: panel,
                                strip: lanes,
                                tokens,
                                to: to.get().wrapping_add(row * inputs + col),
                                to_row: inputs,
                                accumulate: accumulate || first > 0,
                                rows,
                                cols: STRIP.min(columns.end - col),
                            };
                            run(context, kind, &part);
                        }
                    }
                });
            });
        }
    }
}

/// Rows of a work item, so that each thread has as many items of nearly as many rows: an item's cost is its rows', for strips are brought
/// in once for all. Some items a thread, so that one that falls behind gets help; but not so many that tiles are low.
fn rows_of_item(outputs: usize, threads: usize) -> usize {
    const ITEMS_A_THREAD: usize = 4;
    let wanted = (outputs / (ITEMS_A_THREAD * threads)).clamp(ROWS / 2, ROWS);
    let items = outputs.div_ceil(wanted * threads) * threads;
    // Rows of `dy`'s memory that an item reads begin at a half of a cache line, most often.
    outputs.div_ceil(items).next_multiple_of(8)
}

/// Columns of `x` as lanes, `[strips][steps][STRIP]`, zeros beyond the last.
fn strips(context: Context, kind: FloatProducts, x: Input, tokens: Range<usize>, columns: Range<usize>) -> Vec<f32> {
    let len = steps_of(kind, tokens.len()) * STRIP;
    let count = columns.len().div_ceil(STRIP);
    let mut lanes = Unwritten::<f32>::new(count * len);
    let to = lanes.target();
    context.pool.for_ranges(count, 1, |items| {
        for strip in items {
            let col = columns.start + strip * STRIP;
            let cols = STRIP.min(columns.end - col);
            // SAFETY: the strip is inside the memory and this item's alone; it is written and not read.
            let lanes = unsafe { std::slice::from_raw_parts_mut(to.get().add(strip * len), len) };
            if cols < STRIP {
                lanes.fill(0.0);
            }
            fill(context, kind, x, tokens.clone(), col..col + cols, lanes, STRIP);
        }
    });
    // SAFETY: every strip has been written: its columns, and zeros where these leave room.
    unsafe { lanes.written() }
}

/// Lanes that a column of `tokens` takes, integers with their scales.
fn steps_of(kind: FloatProducts, tokens: usize) -> usize {
    match kind {
        FloatProducts::F32 => tokens,
        FloatProducts::Bf16 => tokens.div_ceil(2),
        FloatProducts::Int16 => panel_rows(tokens),
    }
}

/// Rows to bring into lanes; the last one may end after `cols`.
pub(super) struct Rows<'a, E> {
    pub data: &'a [E],
    pub stride: usize,
    pub cols: usize,
}

/// Brings some tokens' columns into lanes.
fn fill(
    context: Context,
    kind: FloatProducts,
    x: Input,
    tokens: Range<usize>,
    columns: Range<usize>,
    to: &mut [f32],
    to_row: usize,
) {
    let (cols, stride) = (columns.len(), x.cols());
    match x {
        Input::Rounded(x) => {
            let (data, stride) = x.get::<Lanes>().rounded();
            let data = &data[tokens.start * stride + columns.start..tokens.end * stride];
            fill_rounded(&Rows { data, stride, cols }, to, to_row);
        }
        Input::F32(x) => {
            let data = &x.host()[tokens.start * stride + columns.start..tokens.end * stride];
            let rows = &Rows { data, stride, cols };
            match kind {
                FloatProducts::F32 => fill_floats(context.isa, rows, to, to_row),
                FloatProducts::Bf16 => fill_pairs(rows, to, to_row),
                FloatProducts::Int16 => fill_ints(context.isa, rows, to, to_row),
            }
        }
    }
}

for_pairs! {
    fn fill_pairs(rows: &Rows<f32>, to: &mut [f32], to_row: usize) = fill_with::<_, Plain<Pairs>, f32>
}

for_pairs! {
    /// Rows that are bf16 already.
    fn fill_rounded(rows: &Rows<bf16>, to: &mut [f32], to_row: usize) = fill_with::<_, Plain<Pairs>, bf16>
}

for_isa! {
    fn fill_ints(rows: &Rows<f32>, to: &mut [f32], to_row: usize) = fill_with::<_, Ints, f32>
}

for_isa! {
    fn fill_floats(rows: &Rows<f32>, to: &mut [f32], to_row: usize) = fill_with::<_, Plain<Fma<f32>>, f32>
}

#[inline(always)]
fn fill_with<S: Simd, F: Form<S>, E: Element>(s: S, rows: &Rows<E>, to: &mut [f32], to_row: usize) {
    let count = rows.data.len().div_ceil(rows.stride);
    assert!(rows.data.len() >= (count - 1) * rows.stride + rows.cols);
    assert!(rows.cols.next_multiple_of(S::LANES) <= to_row && F::rows(count) * to_row <= to.len());
    // SAFETY: as asserted.
    unsafe { F::steps(s, rows.data.as_ptr(), rows.stride, count, rows.cols, to.as_mut_ptr(), to_row) }
}

/// Some rows and columns of `dw`.
struct Part<'a> {
    /// `dy`'s lanes, `[steps][ROWS]`.
    lanes: &'a [f32],
    /// `x`'s lanes, `[steps][STRIP]`.
    strip: &'a [f32],
    /// Terms of the sums.
    tokens: usize,
    to: *mut f32,
    to_row: usize,
    accumulate: bool,
    rows: usize,
    cols: usize,
}

/// One work item.
fn run(context: Context, kind: FloatProducts, part: &Part) {
    match kind {
        FloatProducts::F32 => run_floats(context.isa, part),
        FloatProducts::Bf16 => run_pairs(part),
        FloatProducts::Int16 => run_ints(context.isa, part),
    }
}

for_pairs! {
    fn run_pairs(part: &Part) = run_with::<_, Plain<Pairs>>
}

for_isa! {
    fn run_ints(part: &Part) = run_with::<_, Ints>
}

for_isa! {
    fn run_floats(part: &Part) = run_with::<_, Plain<Fma<f32>>>
}

#[inline(always)]
fn run_with<S: Simd, F: Form<S>>(s: S, part: &Part) {
    let steps = part.tokens.div_ceil(F::PER_LANE);
    let matrices = Matrices {
        lanes: Operands {
            a: part.lanes.as_ptr(),
            a_row: 1,
            a_step: ROWS,
            b: part.strip.as_ptr(),
            b_step: STRIP,
            c: part.to,
            c_row: part.to_row,
            steps,
            accumulate: part.accumulate,
        },
        a_scales: part.lanes[steps * ROWS..].as_ptr(),
        a_scale_row: 1,
        a_scale_block: ROWS,
        b_scales: part.strip[steps * STRIP..].as_ptr(),
    };
    // SAFETY: the lanes hold `rows` columns in each step, the strip whole vectors of `cols`; items write disjoint parts of dw.
    unsafe { F::multiply(s, matrices, part.rows, part.cols) }
}
