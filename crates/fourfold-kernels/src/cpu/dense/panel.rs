//! Many tokens: some rows of the weight are brought into a panel whose lanes are rows, and multiplied with all tokens.

use super::fixed::panel_rows;
use super::product::Product;
use super::tile::{Operands, product};
use crate::cpu::simd::{MAX_LANES, Simd};

/// Rows of a weight that make a panel.
pub const PANEL_ROWS: usize = 32;

/// Lanes of a row that are brought in at a time: a panel of 256 KB stays in the second cache.
pub const PANEL_STEPS: usize = 2048;

/// Floats of a panel for rows of `cols` columns, of any kind of product.
pub fn panel_len(cols: usize) -> usize {
    PANEL_ROWS * cols.min(PANEL_STEPS).max(panel_rows(cols.min(2 * PANEL_STEPS)))
}

/// Rows of a weight against tokens.
#[derive(Clone, Copy)]
pub struct RowProduct<W> {
    /// The first row.
    pub weights: *const W,
    /// Columns, which is also the stride of the rows.
    pub cols: usize,
    /// Rows; of a panel at most [`PANEL_ROWS`].
    pub rows: usize,
    /// Lanes of the tokens, each padded with zeros to whole vectors.
    pub x: *const f32,
    /// Lanes from a token to the next.
    pub x_row: usize,
    /// Tokens.
    pub tokens: usize,
    /// Where result (token 0, first row) goes.
    pub y: *mut f32,
    /// Elements from a token's results to the next's.
    pub y_row: usize,
    /// Whether to add to what is in `y`.
    pub accumulate: bool,
}

/// `y[t, r] (+)= Σ_c x[t, c] · w[r, c]`.
///
/// # Safety
/// The pointers hold what [`RowProduct`] says of them, and nobody else writes these parts of `y`.
#[inline(always)]
pub unsafe fn panel_product<S: Simd, P: Product<S>>(s: S, p: RowProduct<P::W>, panel: &mut [f32]) {
    let steps = p.cols.div_ceil(P::PER_LANE);
    assert!(panel.len() >= PANEL_ROWS * steps.min(PANEL_STEPS), "a panel of {} floats", panel.len());
    let mut first = 0;
    while first < steps {
        let count = (steps - first).min(PANEL_STEPS);
        // SAFETY: the rows are the caller's promise; the panel holds `count` steps of PANEL_ROWS lanes.
        unsafe {
            let col = first * P::PER_LANE;
            pack::<S, P>(s, p.weights.add(col), p.cols, p.rows, p.cols - col, count, panel.as_mut_ptr());
            let operands = Operands {
                a: p.x.add(first),
                a_row: p.x_row,
                a_step: 1,
                b: panel.as_ptr().cast(),
                b_step: PANEL_ROWS * P::Packed::PER_LANE,
                c: p.y,
                c_row: p.y_row,
                steps: count,
                accumulate: p.accumulate || first > 0,
            };
            product::<S, P::Packed>(s, operands, p.tokens, p.rows);
        }
        first += count;
    }
}

/// Brings `steps` lanes of `rows` rows into `panel[step][PANEL_ROWS]`; missing rows and columns become zeros.
///
/// # Safety
/// Row r has `cols` readable elements at `weights + r · stride`; the panel has `steps · PANEL_ROWS` lanes.
#[inline(always)]
pub unsafe fn pack<S: Simd, P: Product<S>>(
    s: S,
    weights: *const P::W,
    stride: usize,
    rows: usize,
    cols: usize,
    steps: usize,
    panel: *mut f32,
) {
    let mut square = [s.splat(0.0); MAX_LANES];
    for block in (0..PANEL_ROWS).step_by(S::LANES) {
        // Many rows at once are read slowly from memory; asked for one after the other they come at its full speed.
        let bytes = steps * P::PER_LANE * size_of::<P::W>();
        for row in block..rows.min(block + S::LANES) {
            for byte in (0..bytes).step_by(64) {
                s.prefetch(weights.wrapping_add(row * stride).wrapping_byte_add(byte));
            }
        }
        let mut step = 0;
        while step < steps {
            let left = cols - step * P::PER_LANE;
            for (i, lanes) in square.iter_mut().enumerate().take(S::LANES) {
                *lanes = if block + i >= rows {
                    s.splat(0.0)
                } else {
                    // SAFETY: `left` elements of this row are left.
                    unsafe {
                        let from = weights.add((block + i) * stride + step * P::PER_LANE);
                        if left >= S::LANES * P::PER_LANE { P::load(s, from) } else { P::load_first(s, from, left) }
                    }
                };
            }
            s.transpose(&mut square);
            for (i, &lanes) in square.iter().enumerate().take(S::LANES.min(steps - step)) {
                // SAFETY: step + i < steps.
                unsafe { s.store(panel.add((step + i) * PANEL_ROWS + block), lanes) }
            }
            step += S::LANES;
        }
    }
}
