//! Matrices whose rows are the steps of a product: no transposition, only lanes to fill.

use super::product::Product;
use crate::cpu::simd::{Element, Simd};

/// Brings `rows` rows of `cols` elements into lanes `to[step][to_row]`: one row a step, or two rows as bf16 pairs. Columns up to
/// whole vectors, and a missing second row, become zeros.
///
/// # Safety
/// Row r has `cols` readable elements at `from + r · stride`; `to` has room for every step's whole vectors.
#[inline(always)]
pub unsafe fn pack_steps<S: Simd, P: Product<S>, E: Element>(
    s: S,
    from: *const E,
    stride: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_row: usize,
) {
    for (step, first) in (0..rows).step_by(P::PER_LANE).enumerate() {
        let mut col = 0;
        while col < cols {
            let left = cols - col;
            // SAFETY: `left` elements are left in these rows.
            unsafe {
                let load = |row: usize| {
                    let at = from.add(row * stride + col);
                    if left >= S::LANES { E::load(s, at) } else { s.load_first(at, left) }
                };
                let second = if P::PER_LANE == 2 && first + 1 < rows { load(first + 1) } else { s.splat(0.0) };
                s.store(to.add(step * to_row + col), P::join(s, load(first), second));
            }
            col += S::LANES;
        }
    }
}
