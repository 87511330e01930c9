//! Few tokens: rows of the weight are read once, straight from where they lie, and multiplied with every token.

use super::panel::RowProduct;
use super::product::Product;
use crate::cpu::simd::Simd;

/// `y[t, r] (+)= Σ_c x[t, c] · w[r, c]`. One row after the other: reading several rows at once is half as fast from memory,
/// for the hardware looks ahead best along one stream.
///
/// # Safety
/// The pointers hold what [`RowProduct`] says of them, and nobody else writes these parts of `y`.
#[inline(always)]
pub unsafe fn dots<S: Simd, P: Product<S>>(s: S, d: RowProduct<P::W>) {
    for row in 0..d.rows {
        let mut token = 0;
        while token < d.tokens {
            let tokens = (d.tokens - token).min(8);
            // SAFETY: a part of what the caller promises.
            unsafe {
                let part = RowProduct {
                    weights: d.weights.add(row * d.cols),
                    x: d.x.add(token * d.x_row),
                    y: d.y.add(token * d.y_row + row),
                    ..d
                };
                match tokens {
                    1 => one_row::<S, P, 1>(s, part),
                    2 => one_row::<S, P, 2>(s, part),
                    3 => one_row::<S, P, 3>(s, part),
                    4 => one_row::<S, P, 4>(s, part),
                    5 => one_row::<S, P, 5>(s, part),
                    6 => one_row::<S, P, 6>(s, part),
                    7 => one_row::<S, P, 7>(s, part),
                    _ => one_row::<S, P, 8>(s, part),
                }
            }
            token += tokens;
        }
    }
}

/// The first row against `T` tokens.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn one_row<S: Simd, P: Product<S>, const T: usize>(s: S, d: RowProduct<P::W>) {
    let width = S::LANES * P::PER_LANE;
    let mut acc = [s.splat(0.0); T];
    let whole = d.cols / width * width;
    for c in (0..whole).step_by(width) {
        // SAFETY: c + width ≤ cols; tokens are as long.
        unsafe {
            let w = P::load(s, d.weights.add(c));
            for (t, acc) in acc.iter_mut().enumerate() {
                *acc = P::step(s, *acc, w, s.load(d.x.add(t * d.x_row + c / P::PER_LANE)));
            }
        }
    }
    if whole < d.cols {
        // SAFETY: the row's last columns; tokens are padded to whole vectors.
        unsafe {
            let w = P::load_first(s, d.weights.add(whole), d.cols - whole);
            for (t, acc) in acc.iter_mut().enumerate() {
                *acc = P::step(s, *acc, w, s.load(d.x.add(t * d.x_row + whole / P::PER_LANE)));
            }
        }
    }
    for (t, &acc) in acc.iter().enumerate() {
        // SAFETY: result (t, this row).
        unsafe {
            let to = d.y.add(t * d.y_row);
            *to = if d.accumulate { *to } else { 0.0 } + s.sum(acc);
        }
    }
}
