//! Rows of a block in the forms that products read. A lane is a float, or two neighbours rounded to bf16 (`Product`).

use super::block::padded;
use crate::Tensor;
use crate::cpu::FloatProducts;
use crate::cpu::dense::{Lanes, Product, pack_steps};
use crate::cpu::quant::Context;
use crate::cpu::simd::{MAX_LANES, Simd};

/// Whether products of heads with so many elements are made in pairs of bf16.
pub fn in_pairs(context: Context, key_dim: usize, value_dim: usize) -> bool {
    context.products == FloatProducts::Bf16 && key_dim.is_multiple_of(2) && value_dim.is_multiple_of(2)
}

/// A whole tensor as lanes of neighbours.
pub fn lanes(context: Context, pairs: bool, x: &Tensor) -> Lanes {
    if pairs { Lanes::pairs(context, x) } else { Lanes::floats(context, x) }
}

/// Floats of working memory for `rows` rows of `dim` elements in any form, whole vectors.
pub fn room(rows: usize, dim: usize) -> usize {
    padded(rows) * padded(dim) + MAX_LANES
}

/// Cuts working memory into parts.
pub struct Scratch<'a>(pub &'a mut [f32]);

impl<'a> Scratch<'a> {
    /// The next `len` floats.
    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        part
    }
}

/// Lanes of `dim` elements.
#[inline(always)]
pub fn lane_count<S: Simd, P: Product<S>>(dim: usize) -> usize {
    dim.div_ceil(P::PER_LANE)
}

/// `rows` `[width][padded dim]`, zero beyond `dim`, as `transposed[lane][width]`; `lanes` is working memory.
#[inline(always)]
pub fn transpose<S: Simd, P: Product<S>>(
    s: S,
    rows: &[f32],
    width: usize,
    dim: usize,
    lanes: &mut [f32],
    transposed: &mut [f32],
) {
    let (row, lane_row) = (padded(dim), padded(lane_count::<S, P>(dim)));
    assert!(width.is_multiple_of(MAX_LANES) && rows.len() >= width * row);
    assert!(lanes.len() >= width * lane_row && transposed.len() >= lane_row * width);
    let mut square = [s.splat(0.0); MAX_LANES];
    // SAFETY: as asserted; all counts are whole vectors.
    unsafe {
        for r in 0..width {
            P::lanes_of_row(s, rows.as_ptr().add(r * row), row, lanes.as_mut_ptr().add(r * lane_row));
        }
        for r in (0..width).step_by(S::LANES) {
            for lane in (0..lane_row).step_by(S::LANES) {
                for (i, vector) in square.iter_mut().enumerate().take(S::LANES) {
                    *vector = s.load(lanes.as_ptr().add((r + i) * lane_row + lane));
                }
                s.transpose(&mut square);
                for (i, &vector) in square.iter().enumerate().take(S::LANES) {
                    s.store(transposed.as_mut_ptr().add((lane + i) * width + r), vector);
                }
            }
        }
    }
}

/// `rows` rows of `cols` elements, `stride` apart, as steps of a sum over rows, `[step][padded cols]`. Rows that are steps as they
/// lie stay there.
#[inline(always)]
pub fn steps<'a, S: Simd, P: Product<S>>(
    s: S,
    from: &'a [f32],
    stride: usize,
    rows: usize,
    cols: usize,
    to: &'a mut [f32],
) -> (&'a [f32], usize) {
    let to_row = padded(cols);
    if P::PER_LANE == 1 && stride == to_row {
        return (from, stride);
    }
    assert!(rows > 0 && from.len() >= (rows - 1) * stride + cols && to.len() >= rows.div_ceil(P::PER_LANE) * to_row);
    // SAFETY: as asserted.
    unsafe { pack_steps::<S, P, f32>(s, from.as_ptr(), stride, rows, cols, to.as_mut_ptr(), to_row) }
    (to, to_row)
}
