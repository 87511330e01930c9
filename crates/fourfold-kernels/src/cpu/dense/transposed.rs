//! `y = x · W[rows, :]`: the weight's rows are already as wide as the result.

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer};
use half::bf16;

use super::fixed::{Ints, panel_rows};
use super::form::{Form, Matrices, Plain};
use super::lanes::Lanes;
use super::product::{Fma, Pairs};
use super::steps::pack_steps;
use super::tile::{Operands, product, tile};
use super::{PANEL_ROWS, PANEL_TOKENS, products, shares, token_chunks};
use crate::cpu::FloatProducts;
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_panel;
use crate::cpu::simd::{Element, MAX_LANES, Simd, for_isa, for_pairs};
use crate::cpu::unwritten::Unwritten;
use crate::{Input, Tensor};

/// Columns of a work item where tokens are few.
const COLUMNS: usize = 8 * MAX_LANES;

/// Columns of a panel.
const STRIP: usize = PANEL_ROWS;

/// Rows of the weight that are summed over at a time, for all columns before the next: so many of the tokens' lanes are in memory, and
/// stay near from strip to strip.
const ROWS: usize = 2048;

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, weight.cols()]`.
pub fn linear_transposed(context: Context, x: &Tensor, weight: &Dense, rows: Range<usize>) -> Tensor {
    input_gradient(context, x.into(), weight, rows, None)
}

/// As [`linear_transposed`] of what may be rounded, added to `sum` where there is one.
pub fn input_gradient(context: Context, x: Input, weight: &Dense, rows: Range<usize>, sum: Option<Tensor>) -> Tensor {
    let (tokens, cols) = (x.rows(), weight.cols());
    assert_eq!(x.cols(), rows.len(), "an input of {} columns for {} rows of a weight", x.cols(), rows.len());
    assert!(rows.end <= weight.rows(), "rows {rows:?} of a weight of {}", weight.rows());
    if let Some(sum) = &sum {
        assert_eq!((sum.rows(), sum.cols()), (tokens, cols), "a sum of another shape");
    }
    if tokens == 0 || cols == 0 || rows.is_empty() {
        return sum.unwrap_or_else(|| Tensor::zeros(tokens, cols));
    }
    match sum {
        Some(mut sum) => {
            write(context, x, weight, rows, SendPtr::new(sum.host_mut()), true);
            sum
        }
        None => {
            let mut y = Unwritten::new(tokens * cols);
            write(context, x, weight, rows, y.target(), false);
            // SAFETY: the product is all columns, for all tokens.
            Tensor::new(tokens, cols, unsafe { y.written() })
        }
    }
}

/// Adds `x · W[rows, :]` to what `to` points to, or writes it there.
fn write(context: Context, x: Input, weight: &Dense, rows: Range<usize>, to: SendPtr<f32>, accumulate: bool) {
    let (tokens, cols) = (x.rows(), weight.cols());
    let many = tokens >= PANEL_TOKENS;
    let kind = if many { products(context, weight, many) } else { FloatProducts::F32 };
    let unit = if many { STRIP } else { COLUMNS };
    let chunks = if many { token_chunks(context, tokens, cols.div_ceil(unit)) } else { 1 };
    let step = if many { ROWS } else { rows.len() };
    for first in (0..rows.len()).step_by(step) {
        let block = first..rows.len().min(first + step);
        let made;
        // The lanes, and of each row the first one of this block.
        let (lanes, first_lane) = match x {
            Input::Rounded(x) if many => (x.get::<Lanes>(), block.start / 2),
            Input::Rounded(x) => {
                made = Lanes::floats_of(context, &x.get::<Lanes>().widened(tokens, block.clone()), 0..block.len());
                (&made, 0)
            }
            Input::F32(x) => {
                made = Lanes::of(context, kind, x, block.clone());
                (&made, 0)
            }
        };
        let rows = rows.start + block.start..rows.start + block.end;
        let panels = cols.div_ceil(unit);
        context.pool.for_ranges(panels * chunks, 1, |items| {
            with_panel(rows.len().max(panel_rows(rows.len())) * STRIP, |panel| {
                for item in items {
                    let start = item % panels * unit;
                    let columns = start..(start + unit).min(cols);
                    let tokens = shares(tokens, chunks, item / panels);
                    let (rows, accumulate) = (rows.clone(), accumulate || first > 0);
                    let part = Part { lanes, first_lane, many, rows, cols, columns, tokens, y: &to, accumulate };
                    match weight.data() {
                        FloatBuffer::F32(w) => run_floats(context.isa, &part, w, panel),
                        FloatBuffer::F16(w) => run_floats(context.isa, &part, w, panel),
                        FloatBuffer::Bf16(w) if kind == FloatProducts::Bf16 => run_pairs(&part, w, panel),
                        FloatBuffer::Bf16(w) if kind == FloatProducts::Int16 => run_ints(context.isa, &part, w, panel),
                        FloatBuffer::Bf16(w) => run_floats(context.isa, &part, w, panel),
                    }
                }
            });
        });
    }
}

/// Some rows' share of some columns for some tokens.
struct Part<'a> {
    lanes: &'a Lanes,
    first_lane: usize,
    many: bool,
    rows: Range<usize>,
    cols: usize,
    columns: Range<usize>,
    tokens: Range<usize>,
    y: &'a SendPtr<f32>,
    /// Whether to add to what is in `y`.
    accumulate: bool,
}

impl Part<'_> {
    /// The lanes of the part's tokens.
    fn x(&self) -> &[f32] {
        &self.lanes.data[self.tokens.start * self.lanes.row + self.first_lane..self.tokens.end * self.lanes.row]
    }

    /// Where the result of the first token goes, from `column` on.
    fn y(&self, column: usize) -> *mut f32 {
        self.y.get().wrapping_add(self.tokens.start * self.cols + column)
    }
}

for_pairs! {
    /// One work item in pairs of bf16.
    fn run_pairs(part: &Part, w: &[bf16], panel: &mut [f32]) = by_panels::<_, Plain<Pairs>, bf16>
}

for_isa! {
    /// One work item in pairs of integers.
    fn run_ints(part: &Part, w: &[bf16], panel: &mut [f32]) = by_panels::<_, Ints, bf16>
}

for_isa! {
    /// One work item with f32 activations.
    fn run_floats<E: Element>(part: &Part, w: &[E], panel: &mut [f32]) = run_floats_with
}

#[inline(always)]
fn run_floats_with<S: Simd, E: Element>(s: S, part: &Part, w: &[E], panel: &mut [f32]) {
    if part.many {
        by_panels::<S, Plain<Fma<f32>>, E>(s, part, w, panel);
    } else {
        in_place(s, part, w, panel);
    }
}

/// Many tokens: a strip of the weight's columns is brought into a panel.
#[inline(always)]
fn by_panels<S: Simd, F: Form<S>, E: Element>(s: S, part: &Part, w: &[E], panel: &mut [f32]) {
    let (rows, columns) = (part.rows.len(), part.columns.len());
    let start = part.rows.start * part.cols;
    let weights = &w[start + part.columns.start..start + (rows - 1) * part.cols + part.columns.end];
    assert!(columns <= STRIP && panel.len() >= F::rows(rows) * STRIP);
    let steps = rows.div_ceil(F::PER_LANE);
    let scales = part.lanes.scales_from(part.tokens.start);
    // SAFETY: the weights end with the last row's last column; the panel was measured; x has its shape's lanes; items write
    // disjoint parts of y.
    unsafe {
        F::steps(s, weights.as_ptr(), part.cols, rows, columns, panel.as_mut_ptr(), STRIP);
        let matrices = Matrices {
            lanes: Operands {
                a: part.x().as_ptr(),
                a_row: part.lanes.row,
                a_step: 1,
                b: panel.as_ptr(),
                b_step: STRIP,
                c: part.y(part.columns.start),
                c_row: part.cols,
                steps,
                accumulate: part.accumulate,
            },
            a_scales: scales.at,
            a_scale_row: scales.row,
            a_scale_block: 1,
            b_scales: panel[steps * STRIP..].as_ptr(),
        };
        F::multiply(s, matrices, part.tokens.len(), columns);
    }
}

/// Few tokens: the weight is read where it lies. Only columns that are no whole vector go through a panel, for a load may not
/// pass the last row's end.
#[inline(always)]
fn in_place<S: Simd, E: Element>(s: S, part: &Part, w: &[E], panel: &mut [f32]) {
    let whole = part.columns.len() / S::LANES * S::LANES;
    let tokens = part.tokens.len();
    let (a, a_row, a_step) = (part.x().as_ptr(), part.lanes.row, 1);
    let (c_row, steps, accumulate) = (part.cols, part.rows.len(), part.accumulate);
    let w = &w[part.rows.start * part.cols..part.rows.end * part.cols];
    // SAFETY: x and w are as long as their shapes say; items write disjoint parts of y; the panel has whole vectors.
    unsafe {
        let b = w[part.columns.start..].as_ptr();
        let c = part.y(part.columns.start);
        let operands = Operands { a, a_row, a_step, b, b_step: part.cols, c, c_row, steps, accumulate };
        if tokens == 1 && whole == 8 * S::LANES {
            // One token is bound by memory: wide reads.
            tile::<S, Fma<E>, 1, 8>(s, operands, whole);
        } else {
            product::<S, Fma<E>>(s, operands, tokens, whole);
        }
        let rest = part.columns.len() - whole;
        if rest > 0 {
            let first = part.columns.start + whole;
            assert!(panel.len() >= steps * S::LANES);
            pack_steps::<S, Fma<f32>, E>(s, w[first..].as_ptr(), part.cols, steps, rest, panel.as_mut_ptr(), S::LANES);
            let (b, c) = (panel.as_ptr(), part.y(first));
            let operands = Operands { a, a_row, a_step, b, b_step: S::LANES, c, c_row, steps, accumulate };
            product::<S, Fma<f32>>(s, operands, tokens, rest);
        }
    }
}
