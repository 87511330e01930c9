//! Few tokens: rows of the weight are read once, straight from where they lie, and multiplied with every token.

use super::product::Product;
use crate::cpu::simd::Simd;

/// Rows of a weight against tokens.
#[derive(Clone, Copy)]
pub struct Dots<W> {
    /// The first row.
    pub weights: *const W,
    /// Elements from a row to the next.
    pub stride: usize,
    /// Columns.
    pub cols: usize,
    /// Rows.
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
    /// Elements from a row's results to the next's.
    pub y_step: usize,
    /// Whether to add to what is in `y`.
    pub accumulate: bool,
}

/// Rows taken together: as many streams from memory.
const ROWS: usize = 4;

/// `y[t, r] (+)= Σ_c x[t, c] · w[r, c]`.
///
/// # Safety
/// The pointers hold what [`Dots`] says of them, and nobody else writes these parts of `y`.
#[inline(always)]
pub unsafe fn dots<S: Simd, P: Product<S>>(s: S, d: Dots<P::W>) {
    let mut row = 0;
    while row < d.rows {
        let taken = if row + ROWS <= d.rows { ROWS } else { 1 };
        let mut token = 0;
        while token < d.tokens {
            // SAFETY: a part of what the caller promises.
            unsafe {
                let part = Dots {
                    weights: d.weights.add(row * d.stride),
                    x: d.x.add(token * d.x_row),
                    y: d.y.add(token * d.y_row + row * d.y_step),
                    ..d
                };
                let tokens = (d.tokens - token).min(4);
                match (taken, tokens) {
                    (ROWS, 1) => block::<S, P, ROWS, 1>(s, part),
                    (ROWS, 2) => block::<S, P, ROWS, 2>(s, part),
                    (ROWS, 3) => block::<S, P, ROWS, 3>(s, part),
                    (ROWS, _) => block::<S, P, ROWS, 4>(s, part),
                    (_, 1) => block::<S, P, 1, 1>(s, part),
                    (_, 2) => block::<S, P, 1, 2>(s, part),
                    (_, 3) => block::<S, P, 1, 3>(s, part),
                    (_, _) => block::<S, P, 1, 4>(s, part),
                }
                token += tokens;
            }
        }
        row += taken;
    }
}

/// `R` rows against `T` tokens.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn block<S: Simd, P: Product<S>, const R: usize, const T: usize>(s: S, d: Dots<P::W>) {
    let width = S::LANES * P::PER_LANE;
    let mut acc = [[s.splat(0.0); T]; R];
    let mut c = 0;
    while c < d.cols {
        let mut tokens = [s.splat(0.0); T];
        for (t, token) in tokens.iter_mut().enumerate() {
            // SAFETY: tokens are padded to whole vectors.
            *token = unsafe { s.load(d.x.add(t * d.x_row + c / P::PER_LANE)) };
        }
        let n = d.cols - c;
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: n columns of row r are left.
            let w = unsafe {
                let from = d.weights.add(r * d.stride + c);
                if n >= width { P::load(s, from) } else { P::load_first(s, from, n) }
            };
            for (acc, &token) in acc.iter_mut().zip(&tokens) {
                *acc = P::step(s, *acc, w, token);
            }
        }
        c += width;
    }
    for (r, acc) in acc.iter().enumerate() {
        for (t, &acc) in acc.iter().enumerate() {
            // SAFETY: result (t, r).
            unsafe {
                let to = d.y.add(t * d.y_row + r * d.y_step);
                *to = if d.accumulate { *to } else { 0.0 } + s.sum(acc);
            }
        }
    }
}
