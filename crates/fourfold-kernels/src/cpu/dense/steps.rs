//! Matrices whose rows are the steps of a product: no transposition, only lanes to fill.

use super::product::Product;
use crate::cpu::simd::{Element, MAX_LANES, Simd};

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
    let nothing = [E::default(); MAX_LANES];
    for (step, first) in (0..rows).step_by(P::PER_LANE).enumerate() {
        let has_second = P::PER_LANE == 2 && first + 1 < rows;
        let mut col = 0;
        while col < cols {
            let left = cols - col;
            // SAFETY: `left` elements are left in these rows; the arrays have LANES or more.
            unsafe {
                let at = from.add(first * stride + col);
                let second = if has_second { at.add(stride) } else { nothing.as_ptr() };
                let lanes = if left >= S::LANES {
                    P::load_step(s, at, second)
                } else {
                    let (mut ends, n) = ([nothing; 2], if has_second { left } else { 0 });
                    std::ptr::copy_nonoverlapping(at, ends[0].as_mut_ptr(), left);
                    std::ptr::copy_nonoverlapping(second, ends[1].as_mut_ptr(), n);
                    P::load_step(s, ends[0].as_ptr(), ends[1].as_ptr())
                };
                s.store(to.add(step * to_row + col), lanes);
            }
            col += S::LANES;
        }
    }
}
