//! The transposed product of many tokens through bf16: some rows of the weight at a time are written out with rows and columns
//! exchanged, and multiplied as a dense weight. Codes lie sixteen rows a vector, so that a column's sixteen values come out side by side,
//! as the dense product wants its inputs.

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer};
use half::bf16;

use super::exact::PANEL;
use super::kernel::panel_kernel;
use super::layout::{BLOCK, STRIP};
use super::{Context, QuantWeight};
use crate::Tensor;
use crate::cpu::dense::{self, DenseArg};
use crate::cpu::elementwise;
use crate::cpu::pool::SendPtr;
use crate::cpu::{Activations, FloatProducts, Isa};

/// From this many tokens on the time to write the weight out is made up for.
pub(super) const TOKENS: usize = 16;

/// Elements written out at a time: as many bytes as a second-level cache has.
const PART: usize = 1 << 19;

/// Strips written out at a time, at most: so many columns of the input are copied.
const STRIPS: usize = 64;

/// Whether weights are to be written out in bf16. With AVX512 that is faster than from the codes whatever the dense product makes of it.
pub(super) fn is_wanted(context: Context, tokens: usize) -> bool {
    let is_fast = context.isa == Isa::Avx512 || context.products != FloatProducts::F32;
    tokens >= TOKENS && is_fast && context.activations == Activations::Fast
}

/// `y = x · W[rows, :]`, both factors rounded to bf16, or from there to what [`dense`] multiplies: x `[tokens, rows.len()]`, y `[tokens, cols]`.
pub(super) fn linear_transposed(context: Context, x: &Tensor, w: &QuantWeight, rows: Range<usize>) -> Tensor {
    let strips = rows.start / STRIP..rows.end.div_ceil(STRIP);
    let step = (PART / (w.cols().max(1) * STRIP)).clamp(4, STRIPS);
    let mut total: Option<Tensor> = None;
    for first in strips.clone().step_by(step) {
        let part = first..strips.end.min(first + step);
        let turned = turned(context, w, part.clone());
        let arg = DenseArg { weight: &turned, rows: 0..w.cols(), bias: None };
        let y = dense::linear(context, &input(context, x, &rows, part), &[arg]).swap_remove(0);
        match &mut total {
            Some(total) => elementwise::add(context.pool, total, &y),
            None => total = Some(y),
        }
    }
    total.unwrap_or_else(|| Tensor::zeros(x.rows(), w.cols()))
}

/// The columns of x that belong to the rows of `strips`; zeros for rows that are not wanted.
fn input(context: Context, x: &Tensor, rows: &Range<usize>, strips: Range<usize>) -> Tensor {
    let height = strips.len() * STRIP;
    let first = strips.start * STRIP;
    let wanted = rows.start.max(first)..rows.end.min(first + height);
    let mut part = vec![0.0; x.rows() * height];
    context.pool.for_chunks_mut(&mut part, height, 8, |at, lines| {
        for (i, line) in lines.chunks_exact_mut(height).enumerate() {
            let from = &x.row(at + i)[wanted.start - rows.start..wanted.end - rows.start];
            line[wanted.start - first..wanted.end - first].copy_from_slice(from);
        }
    });
    Tensor::new(x.rows(), height, part)
}

/// The rows of `strips` as `[cols, rows]`.
fn turned(context: Context, w: &QuantWeight, strips: Range<usize>) -> Dense {
    let (cols, height) = (w.cols(), strips.len() * STRIP);
    let mut turned = vec![bf16::ZERO; cols * height];
    let to = SendPtr::new(&mut turned);
    let panel_of = panel_kernel(context.isa, w);
    context.pool.for_ranges(w.columns.blocks.div_ceil(PANEL), 1, |panels| {
        let mut panel = vec![[0.0; STRIP]; PANEL * BLOCK];
        let mut rounded = vec![bf16::ZERO; PANEL * BLOCK * STRIP];
        for p in panels {
            let first = p * PANEL;
            let blocks = first..w.columns.blocks.min(first + PANEL);
            for (i, strip) in strips.clone().enumerate() {
                // SAFETY: strip and blocks exist, the panel has room, and the instruction set is available.
                unsafe { panel_of(w, strip, first, blocks.len(), panel.as_mut_ptr()) };
                dense::round_to_bf16(context.isa, panel.as_flattened(), &mut rounded);
                w.columns.places(blocks.clone(), |position, column| {
                    let from = &rounded[position * STRIP..(position + 1) * STRIP];
                    // SAFETY: within the matrix; each column is one thread's.
                    let to =
                        unsafe { std::slice::from_raw_parts_mut(to.get().add(column * height + i * STRIP), STRIP) };
                    to.copy_from_slice(from);
                });
            }
        }
    });
    Dense::new(vec![cols, height], FloatBuffer::Bf16(turned.into()))
}
