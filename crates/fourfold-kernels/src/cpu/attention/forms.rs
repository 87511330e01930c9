//! Rows of a block in the forms that products read: floats, or two neighbours rounded to bf16 or to integers (`Form`).

use super::block::padded;
use crate::cpu::FloatProducts;
use crate::cpu::dense::{BLOCK, Form, Lanes, Matrices, Operands};
use crate::cpu::quant::Context;
use crate::cpu::simd::{MAX_LANES, Simd};

/// What products of heads with so many elements are made in: two at once where the heads are even, integers where a scale covers a head.
pub fn products(context: Context, key_dim: usize, value_dim: usize) -> FloatProducts {
    match context.products {
        _ if key_dim % 2 + value_dim % 2 > 0 => FloatProducts::F32,
        FloatProducts::Int16 if key_dim.max(value_dim) > BLOCK => FloatProducts::F32,
        products => products,
    }
}

/// Floats of working memory for `rows` rows of `dim` elements in any form, whole vectors, with a scale for each row.
pub fn room(rows: usize, dim: usize) -> usize {
    padded(rows) * (padded(dim) + 1) + MAX_LANES
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
pub fn lane_count<S: Simd, F: Form<S>>(dim: usize) -> usize {
    dim.div_ceil(F::PER_LANE)
}

/// `rows` `[width][padded dim]`, zero beyond `dim`, as `transposed[lane][width]`, their scales after the last lane; `lanes` is working
/// memory.
#[inline(always)]
pub fn transpose<S: Simd, F: Form<S>>(
    s: S,
    rows: &[f32],
    width: usize,
    dim: usize,
    lanes: &mut [f32],
    transposed: &mut [f32],
) {
    let (row, lane_row) = (padded(dim), padded(lane_count::<S, F>(dim)));
    assert!(width.is_multiple_of(MAX_LANES) && rows.len() >= width * row);
    assert!(lanes.len() >= width * lane_row);
    let (transposed, scales) = transposed.split_at_mut(lane_row * width);
    let mut square = [s.splat(0.0); MAX_LANES];
    // SAFETY: as asserted; all counts are whole vectors.
    unsafe {
        for (r, scale) in scales[..width].iter_mut().enumerate() {
            *scale = F::lanes_of_row(s, rows.as_ptr().add(r * row), row, lanes.as_mut_ptr().add(r * lane_row));
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

/// The scales that [`transpose`] writes.
#[inline(always)]
fn transposed_scales<S: Simd, F: Form<S>>(transposed: &[f32], width: usize, dim: usize) -> *const f32 {
    transposed[padded(lane_count::<S, F>(dim)) * width..].as_ptr()
}

/// Rows as steps of a sum over rows.
#[derive(Clone, Copy)]
pub struct Steps {
    /// `[step][row]`.
    pub data: *const f32,
    /// Elements from a step to the next.
    pub row: usize,
    /// The columns' scales.
    pub scales: *const f32,
}

/// `rows` rows of `cols` elements, `stride` apart, as steps of a sum over rows, `[step][padded cols]`. Rows that are steps as they
/// lie stay there.
#[inline(always)]
pub fn steps<S: Simd, F: Form<S>>(
    s: S,
    from: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    to: &mut [f32],
) -> Steps {
    let row = padded(cols);
    if F::PER_LANE == 1 && stride == row {
        return Steps { data: from.as_ptr(), row, scales: from.as_ptr() };
    }
    assert!(rows > 0 && from.len() >= (rows - 1) * stride + cols && to.len() >= F::rows(rows) * row);
    // SAFETY: as asserted.
    unsafe { F::steps(s, from.as_ptr(), stride, rows, cols, to.as_mut_ptr(), row) }
    Steps { data: to.as_ptr(), row, scales: to[lane_count::<S, F>(rows) * row..].as_ptr() }
}

/// `c [count][width] = x · bᵀ` for rows of `x` from `position` on, of one head, and transposed rows `b` of as many elements.
#[inline(always)]
pub fn rows_by_rows<S: Simd, F: Form<S>>(
    x: &Lanes,
    position: usize,
    head: usize,
    dim: usize,
    b: &[f32],
    width: usize,
    c: &mut [f32],
) -> Matrices {
    let scales = x.run_scales(position, head);
    Matrices {
        lanes: Operands {
            a: x.data[position * x.row + lane_count::<S, F>(head * dim)..].as_ptr(),
            a_row: x.row,
            a_step: 1,
            b: b.as_ptr(),
            b_step: width,
            c: c.as_mut_ptr(),
            c_row: width,
            steps: lane_count::<S, F>(dim),
            accumulate: false,
        },
        a_scales: scales.at,
        a_scale_row: scales.row,
        a_scale_block: 1,
        b_scales: transposed_scales::<S, F>(b, width, dim),
    }
}

/// `c += aᵀ · b`, a sum over `count` rows of both.
#[inline(always)]
pub fn over_steps<S: Simd, F: Form<S>>(a: Steps, b: Steps, count: usize, c: &mut [f32], c_row: usize) -> Matrices {
    Matrices {
        lanes: Operands {
            a: a.data,
            a_row: 1,
            a_step: a.row,
            b: b.data,
            b_step: b.row,
            c: c.as_mut_ptr(),
            c_row,
            steps: lane_count::<S, F>(count),
            accumulate: true,
        },
        a_scales: a.scales,
        a_scale_row: 1,
        a_scale_block: 0,
        b_scales: b.scales,
    }
}
