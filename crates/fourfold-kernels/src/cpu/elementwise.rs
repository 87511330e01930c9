//! Operations on rows and elements. Small inputs are done by the caller alone: a parallel region costs more than they do.

use super::Isa;
use super::dense::Lanes;
use super::pool::Pool;
use super::quant::Context;
use super::simd::{Map2, Simd, dot, exp, for_isa, map2, map2_in_place};
use super::unwritten::Unwritten;
use crate::{RopeSpec, Rounded, Tensor};

/// Elements below which threads do not pay, for operations that read and write memory and little else.
const GRAIN: usize = 1 << 15;

/// The same for operations that compute an exponential.
const EXP_GRAIN: usize = 1 << 13;

/// `x / √(mean(x²) + eps) · weight` over each row.
pub fn rms_norm(pool: &Pool, isa: Isa, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
    assert_eq!(x.cols(), weight.cols(), "a norm of {} elements on rows of {}", weight.cols(), x.cols());
    let cols = x.cols().max(1);
    map(pool, x, cols, GRAIN, |from, to, _| norm_rows(isa, from, to, weight.host(), eps))
}

/// As [`rms_norm`], as products read it.
pub fn rms_norm_rounded(context: Context, x: &Tensor, weight: &Tensor, eps: f32) -> Rounded {
    let (rows, cols) = (x.rows(), x.cols());
    assert_eq!(cols, weight.cols(), "a norm of {} elements on rows of {cols}", weight.cols());
    let lanes = Lanes::rounded_rows(context, rows, cols, |t, to| {
        norm_rows(context.isa, x.row(t), to, weight.host(), eps);
    });
    Rounded::new(rows, cols, lanes)
}

for_isa! {
    fn norm_rows(from: &[f32], to: &mut [f32], weight: &[f32], eps: f32) = norm_rows_with
}

#[inline(always)]
fn norm_rows_with<S: Simd>(s: S, from: &[f32], to: &mut [f32], weight: &[f32], eps: f32) {
    for (from, to) in from.chunks_exact(weight.len()).zip(to.chunks_exact_mut(weight.len())) {
        let inverse = 1.0 / (dot(s, from, from) / from.len() as f32 + eps).sqrt();
        map2(s, from, weight, to, Scaled(s.splat(inverse)));
    }
}

/// `value · factor · weight`.
struct Scaled<V>(V);

impl<S: Simd> Map2<S> for Scaled<S::V> {
    #[inline(always)]
    fn apply(&self, s: S, value: S::V, weight: S::V) -> S::V {
        s.mul(s.mul(value, self.0), weight)
    }
}

/// Rotates parts of each head in place; by the negative angles with `direction` −1.
pub fn rope(pool: &Pool, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec, direction: f32) {
    let token = spec.heads * spec.head_dim;
    assert!(
        token > 0 && (x.rows() * x.cols()).is_multiple_of(token),
        "rope: no whole number of tokens of {token} elements"
    );
    let half = cos.cols();
    assert!(spec.start + 2 * half <= spec.head_dim, "rope: {half} pairs from {} in {}", spec.start, spec.head_dim);
    pool.for_chunks_mut(x.host_mut(), token, GRAIN / token, |first, tokens| {
        for (t, heads) in tokens.chunks_exact_mut(token).enumerate() {
            let position = spec.first_position + first + t;
            let (cos, sin) = (cos.row(position), sin.row(position));
            for head in heads.chunks_exact_mut(spec.head_dim) {
                let rotated = &mut head[spec.start..spec.start + 2 * half];
                if spec.interleaved {
                    for (pair, (&c, &s)) in rotated.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                        let s = s * direction;
                        (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
                    }
                } else {
                    let (firsts, seconds) = rotated.split_at_mut(half);
                    for ((a, b), (&c, &s)) in firsts.iter_mut().zip(seconds).zip(cos.iter().zip(sin)) {
                        let s = s * direction;
                        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                    }
                }
            }
        }
    });
}

/// A tensor of `x`'s shape, of which `write(elements of x, elements of the result, first)` writes runs of whole units.
fn map(pool: &Pool, x: &Tensor, unit: usize, grain: usize, write: impl Fn(&[f32], &mut [f32], usize) + Sync) -> Tensor {
    let len = x.host().len();
    let mut y = Unwritten::<f32>::new(len);
    let to = y.target();
    pool.for_ranges(len.div_ceil(unit), grain / unit, |units| {
        let range = units.start * unit..(units.end * unit).min(len);
        // SAFETY: ranges do not overlap, and `write` does not read what it has not written.
        let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(range.start), range.len()) };
        write(&x.host()[range.clone()], to, range.start);
    });
    // SAFETY: the units are all elements.
    Tensor::new(x.rows(), x.cols(), unsafe { y.written() })
}

/// `silu(gate) ⊙ up`, beside `gate`.
pub fn swiglu_of(pool: &Pool, isa: Isa, gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()), "swiglu of unequal shapes");
    map(pool, gate, 64, EXP_GRAIN, |gate, to, first| swiglu_out(isa, gate, &up.host()[first..first + gate.len()], to))
}

/// As [`swiglu_of`], as products read it.
pub fn swiglu_rounded(context: Context, gate: &Tensor, up: &Tensor) -> Rounded {
    let (rows, cols) = (gate.rows(), gate.cols());
    assert_eq!((rows, cols), (up.rows(), up.cols()), "swiglu of unequal shapes");
    let lanes = Lanes::rounded_rows(context, rows, cols, |t, to| swiglu_out(context.isa, gate.row(t), up.row(t), to));
    Rounded::new(rows, cols, lanes)
}

for_isa! {
    fn swiglu_out(gate: &[f32], up: &[f32], to: &mut [f32]) = swiglu_out_with
}

#[inline(always)]
fn swiglu_out_with<S: Simd>(s: S, gate: &[f32], up: &[f32], to: &mut [f32]) {
    map2(s, gate, up, to, Swiglu);
}

/// `x + y`.
pub fn sum(pool: &Pool, x: &Tensor, y: &Tensor) -> Tensor {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "sum of unequal shapes");
    map(pool, x, 64, GRAIN, |x, to, first| {
        let y = &y.host()[first..first + x.len()];
        to.iter_mut().zip(x).zip(y).for_each(|((to, x), y)| *to = x + y);
    })
}

/// `silu(gate) ⊙ up`.
pub fn swiglu(pool: &Pool, isa: Isa, mut gate: Tensor, up: &Tensor) -> Tensor {
    assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()), "swiglu of unequal shapes");
    // Units of 64: threads write different cache lines, and every element is computed in a whole vector or in the same tail.
    pool.for_chunks_mut(gate.host_mut(), 64, EXP_GRAIN / 64, |first, gate| {
        swiglu_slice(isa, gate, &up.host()[first * 64..first * 64 + gate.len()]);
    });
    gate
}

for_isa! {
    fn swiglu_slice(gate: &mut [f32], up: &[f32]) = swiglu_slice_with
}

#[inline(always)]
fn swiglu_slice_with<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    map2_in_place(s, gate, up, Swiglu);
}

struct Swiglu;

impl<S: Simd> Map2<S> for Swiglu {
    #[inline(always)]
    fn apply(&self, s: S, gate: S::V, up: S::V) -> S::V {
        let silu = s.div(gate, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), gate))));
        s.mul(silu, up)
    }
}

/// `x += y`.
pub fn add(pool: &Pool, x: &mut Tensor, y: &Tensor) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "add of unequal shapes");
    pool.for_chunks_mut(x.host_mut(), 64, GRAIN / 64, |first, x| {
        let y = &y.host()[first * 64..first * 64 + x.len()];
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    });
}
