//! The inner loops of the scale search: many candidates scored in one pass over a group.
//!
//! A candidate is a lane of a vector, so that no sum crosses lanes: results are the same whatever the machine's vector width.

use pulp::{Arch, Simd, WithSimd};

use super::lattice::{Group, Lattice, SHIFT};
use crate::vector::{LANES, sum};

/// Candidates scored at once.
pub(crate) const CANDIDATES: usize = 16;
/// Elements summed in f32 before the sums are added up in f64.
const CHUNK: usize = 256;

/// Weights where every element counts the same.
static ONES: [f32; CHUNK] = [1.0; CHUNK];

/// Values and their weights, [`CHUNK`] at a time; weights of 1 where `h` is empty.
fn pieces<'a>(x: &'a [f32], h: &'a [f32]) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
    let weights = move |i: usize, len: usize| if h.is_empty() { &ONES[..len] } else { &h[i * CHUNK..i * CHUNK + len] };
    x.chunks(CHUNK).enumerate().map(move |(i, x)| (x, weights(i, x.len())))
}

/// Smallest and largest value.
#[inline(always)]
pub(crate) fn range(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let chunks = x.chunks_exact(LANES);
    for (i, &v) in chunks.remainder().iter().enumerate() {
        (low[i], high[i]) = (v, v);
    }
    for x in chunks {
        for i in 0..LANES {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    // Halves onto each other; the values are finite, so that a comparison is enough.
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            low[i] = if low[i + width] < low[i] { low[i + width] } else { low[i] };
            high[i] = if high[i + width] > high[i] { high[i + width] } else { high[i] };
        }
        width /= 2;
    }
    (low[0], high[0])
}

/// `(Σ h x², Σ h)`; weights of 1 where `h` is empty.
#[inline(always)]
pub(crate) fn energy(x: &[f32], h: &[f32]) -> (f32, f32) {
    let mut squares = [0.0f32; LANES];
    if h.is_empty() {
        for x in x.chunks(LANES) {
            for (s, &x) in squares.iter_mut().zip(x) {
                *s += x * x;
            }
        }
        return (sum(&squares), x.len() as f32);
    }
    let mut weights = [0.0f32; LANES];
    for (x, h) in x.chunks(LANES).zip(h.chunks(LANES)) {
        for (((s, w), &x), &h) in squares.iter_mut().zip(&mut weights).zip(x).zip(h) {
            *s += h * x * x;
            *w += h;
        }
    }
    (sum(&squares), sum(&weights))
}

/// For each candidate `Σ h x v` and `Σ h v²` over the levels v that `x · inverse` rounds to. The best scale for these levels is
/// their quotient, and it leaves the error `Σ h x² − (Σ h x v)² / Σ h v²`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Projections {
    xv: [f32; CANDIDATES],
    vv: [f32; CANDIDATES],
}

impl Projections {
    /// The candidate that explains most of `Σ h x²`, the first of equals, and how much; 0 where all levels are 0.
    pub(crate) fn best(&self) -> (usize, f64) {
        // In f64, where no square overflows.
        let mut shares = [0.0f64; CANDIDATES];
        for ((share, xv), vv) in shares.iter_mut().zip(self.xv).zip(self.vv) {
            *share = f64::from(xv) * f64::from(xv) / f64::from(vv.max(f32::MIN_POSITIVE));
        }
        let mut best = (0, shares[0]);
        for (k, &share) in shares.iter().enumerate() {
            best = if share > best.1 { (k, share) } else { best };
        }
        best
    }

    /// The scale that fits candidate `k`'s levels best.
    pub(crate) fn scale(&self, k: usize) -> f32 {
        self.xv[k] / self.vv[k]
    }
}

/// Scores candidates of one scale, and one zero, each.
pub(crate) fn project(
    lattice: &Lattice,
    x: &[f32],
    h: &[f32],
    inverses: &[f32; CANDIDATES],
    zeros: &[f32; CANDIDATES],
) -> Projections {
    let chunk = |x, h| Arch::new().dispatch(Projection { lattice, x, h, inverses, zeros });
    if x.len() <= CHUNK {
        return chunk(x, h);
    }
    let mut sums = [[0.0f64; CANDIDATES]; 2];
    for (i, x) in x.chunks(CHUNK).enumerate() {
        let part = chunk(x, if h.is_empty() { h } else { &h[i * CHUNK..][..x.len()] });
        for (sums, part) in sums.iter_mut().zip([part.xv, part.vv]) {
            for (sum, part) in sums.iter_mut().zip(part) {
                *sum += f64::from(part);
            }
        }
    }
    let [xv, vv] = sums.map(|sums| sums.map(|sum| sum as f32));
    Projections { xv, vv }
}

struct Projection<'a> {
    lattice: &'a Lattice,
    x: &'a [f32],
    h: &'a [f32],
    inverses: &'a [f32; CANDIDATES],
    zeros: &'a [f32; CANDIDATES],
}

impl WithSimd for Projection<'_> {
    type Output = Projections;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let mut out = Projections::default();
        let (xv_out, _) = S::as_mut_simd_f32s(&mut out.xv);
        let (vv_out, _) = S::as_mut_simd_f32s(&mut out.vv);
        let (inverses, _) = S::as_simd_f32s(self.inverses);
        let (zeros, _) = S::as_simd_f32s(self.zeros);
        for (((xv_out, vv_out), &inverse), &zero) in xv_out.iter_mut().zip(vv_out).zip(inverses).zip(zeros) {
            let rounding = Rounding::new(simd, self.lattice, inverse, zero);
            // Even and odd elements, so that one addition need not wait for the other. No closure: it might not be inlined, and
            // would then not be compiled for these vectors.
            let mut xv = [simd.splat_f32s(0.0); 2];
            let mut vv = [simd.splat_f32s(0.0); 2];
            if self.h.is_empty() {
                for pair in self.x.chunks(2) {
                    for (i, &x) in pair.iter().enumerate() {
                        let x = simd.splat_f32s(x);
                        let v = rounding.level(simd, x);
                        xv[i] = simd.add_f32s(xv[i], simd.mul_f32s(v, x));
                        vv[i] = simd.add_f32s(vv[i], simd.mul_f32s(v, v));
                    }
                }
            } else {
                for (pair, h) in self.x.chunks(2).zip(self.h.chunks(2)) {
                    for (i, (&x, &h)) in pair.iter().zip(h).enumerate() {
                        let x = simd.splat_f32s(x);
                        let v = rounding.level(simd, x);
                        let hv = simd.mul_f32s(simd.splat_f32s(h), v);
                        xv[i] = simd.add_f32s(xv[i], simd.mul_f32s(hv, x));
                        vv[i] = simd.add_f32s(vv[i], simd.mul_f32s(hv, v));
                    }
                }
            }
            *xv_out = simd.add_f32s(xv[0], xv[1]);
            *vv_out = simd.add_f32s(vv[0], vv[1]);
        }
        out
    }
}

/// [`Lattice::encode`] and [`Lattice::level`] of `x · inverse` for a vector of candidates.
enum Rounding<'a, S: Simd> {
    /// Codes are kept within bounds while they are shifted: added to 1.5·2²³, a number has no fraction bits.
    Uniform {
        inverse: S::f32s,
        shift: S::f32s,
        least: S::f32s,
        most: S::f32s,
    },
    Codebook {
        inverse: S::f32s,
        levels: &'a [f32],
        midpoints: &'a [f32],
    },
}

impl<'a, S: Simd> Rounding<'a, S> {
    #[inline(always)]
    fn new(simd: S, lattice: &'a Lattice, inverse: S::f32s, zero: S::f32s) -> Self {
        match lattice {
            Lattice::Uniform { top } => Self::Uniform {
                inverse,
                shift: simd.add_f32s(simd.splat_f32s(SHIFT), zero),
                least: simd.splat_f32s(SHIFT),
                most: simd.splat_f32s(SHIFT + top),
            },
            Lattice::Codebook { levels, midpoints } => Self::Codebook { inverse, levels, midpoints },
        }
    }

    /// The level nearest to `x · inverse`, less the zero.
    #[inline(always)]
    fn level(&self, simd: S, x: S::f32s) -> S::f32s {
        match *self {
            Self::Uniform { inverse, shift, least, most } => {
                let code = simd.add_f32s(simd.mul_f32s(x, inverse), shift);
                simd.sub_f32s(simd.min_f32s(simd.max_f32s(code, least), most), shift)
            }
            Self::Codebook { inverse, levels, midpoints } => {
                let y = simd.mul_f32s(x, inverse);
                let mut v = simd.splat_f32s(levels[0]);
                for (&midpoint, &level) in midpoints.iter().zip(&levels[1..]) {
                    let above = simd.greater_than_f32s(y, simd.splat_f32s(midpoint));
                    v = simd.select_f32s(above, simd.splat_f32s(level), v);
                }
                v
            }
        }
    }
}

/// `y` rounded and kept within `0..=top`.
#[inline(always)]
fn code<S: Simd>(simd: S, top: f32, y: S::f32s) -> S::f32s {
    let shift = simd.splat_f32s(SHIFT);
    let y = simd.min_f32s(simd.max_f32s(y, simd.splat_f32s(0.0)), simd.splat_f32s(top));
    simd.sub_f32s(simd.add_f32s(y, shift), shift)
}

/// Weighted sums over a group and its codes v, from which a line `x ≈ scale · v − min` and its error follow.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    h: f64,
    hx: f64,
    hxx: f64,
    hv: f64,
    hvv: f64,
    hxv: f64,
}

impl Moments {
    /// The scale and offset of least squares; `None` where the codes are all the same or the line falls.
    pub(crate) fn line(&self) -> Option<(f64, f64)> {
        let determinant = self.h * self.hvv - self.hv * self.hv;
        let scale = (self.h * self.hxv - self.hx * self.hv) / determinant;
        let min = (self.hv * self.hxv - self.hvv * self.hx) / determinant;
        (determinant > 0.0 && scale > 0.0).then_some((scale, min))
    }

    /// `Σ h (x − scale · v + min)²`.
    pub(crate) fn residual(&self, scale: f64, min: f64) -> f64 {
        self.hxx + scale * scale * self.hvv + min * min * self.h - 2.0 * scale * self.hxv + 2.0 * min * self.hx
            - 2.0 * scale * min * self.hv
    }
}

/// The moments of each candidate's codes, `0..=top`.
pub(crate) fn regress(top: f32, x: &[f32], h: &[f32], groups: &[Group; CANDIDATES]) -> [Moments; CANDIDATES] {
    let mut moments = [Moments::default(); CANDIDATES];
    let inverses = groups.map(|g| 1.0 / g.scale);
    let shifts = groups.map(|g| g.min / g.scale);
    for (x, h) in pieces(x, h) {
        let task = Regression { top, x, h, inverses: &inverses, shifts: &shifts };
        let [hv, hvv, hxv] = Arch::new().dispatch(task);
        let (mut sum_h, mut sum_hx, mut sum_hxx) = (0.0, 0.0, 0.0);
        for (&x, &h) in x.iter().zip(h) {
            let (h, x) = (f64::from(h), f64::from(x));
            sum_h += h;
            sum_hx += h * x;
            sum_hxx += h * x * x;
        }
        for (k, m) in moments.iter_mut().enumerate() {
            m.h += sum_h;
            m.hx += sum_hx;
            m.hxx += sum_hxx;
            m.hv += f64::from(hv[k]);
            m.hvv += f64::from(hvv[k]);
            m.hxv += f64::from(hxv[k]);
        }
    }
    moments
}

struct Regression<'a> {
    top: f32,
    x: &'a [f32],
    h: &'a [f32],
    inverses: &'a [f32; CANDIDATES],
    shifts: &'a [f32; CANDIDATES],
}

impl WithSimd for Regression<'_> {
    type Output = [[f32; CANDIDATES]; 3];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let mut out = [[0.0f32; CANDIDATES]; 3];
        let [hv_out, hvv_out, hxv_out] = &mut out;
        let (hv_out, _) = S::as_mut_simd_f32s(hv_out);
        let (hvv_out, _) = S::as_mut_simd_f32s(hvv_out);
        let (hxv_out, _) = S::as_mut_simd_f32s(hxv_out);
        let (inverses, _) = S::as_simd_f32s(self.inverses);
        let (shifts, _) = S::as_simd_f32s(self.shifts);
        for (k, (&inverse, &shift)) in inverses.iter().zip(shifts).enumerate() {
            let zero = simd.splat_f32s(0.0);
            let (mut hv_sum, mut hvv_sum, mut hxv_sum) = (zero, zero, zero);
            for (&x, &h) in self.x.iter().zip(self.h) {
                let x = simd.splat_f32s(x);
                let v = code(simd, self.top, simd.add_f32s(simd.mul_f32s(x, inverse), shift));
                let hv = simd.mul_f32s(simd.splat_f32s(h), v);
                hv_sum = simd.add_f32s(hv_sum, hv);
                hvv_sum = simd.add_f32s(hvv_sum, simd.mul_f32s(hv, v));
                hxv_sum = simd.add_f32s(hxv_sum, simd.mul_f32s(hv, x));
            }
            (hv_out[k], hvv_out[k], hxv_out[k]) = (hv_sum, hvv_sum, hxv_sum);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> (Vec<f32>, Vec<f32>) {
        let x: Vec<f32> = (0..300).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.031).collect();
        let h = (0..300).map(|i| 0.5 + (i * 11 % 7) as f32).collect();
        (x, h)
    }

    #[test]
    fn candidates_are_scored_as_the_lattice_rounds() {
        let (x, h) = values();
        for lattice in [Lattice::uniform(4), Lattice::codebook(vec![-127.0, -40.0, 3.0, 90.0])] {
            let zero = if matches!(lattice, Lattice::Uniform { .. }) { 8.0 } else { 0.0 };
            let inverses: [f32; CANDIDATES] = std::array::from_fn(|i| 3.0 + i as f32);
            for h in [&h[..], &[]] {
                let sums = project(&lattice, &x, h, &inverses, &[zero; CANDIDATES]);
                let mut shares = Vec::new();
                for (k, inverse) in inverses.into_iter().enumerate() {
                    let group = Group { scale: 1.0 / inverse, zero, ..Group::default() };
                    let (xv, vv) = x.iter().enumerate().fold((0.0, 0.0), |(xv, vv), (i, &x)| {
                        let h = h.get(i).map_or(1.0, |&h| f64::from(h));
                        let v = f64::from(lattice.level(lattice.encode(x, &group), &group));
                        (xv + h * v * f64::from(x), vv + h * v * v)
                    });
                    let scale = f64::from(sums.scale(k));
                    assert!((scale - xv / vv).abs() < 1e-3 * scale.abs(), "{scale} {}", xv / vv);
                    shares.push(xv * xv / vv);
                }
                let (best, share) = sums.best();
                let most = shares.iter().copied().fold(0.0, f64::max);
                assert!(shares[best] > most * 0.9999 && (share - most).abs() < 1e-3 * most);
                assert!(shares.iter().any(|&s| s < most * 0.999), "the candidates must differ");
            }
        }
    }

    #[test]
    fn a_line_through_its_own_codes_leaves_nothing() {
        let codes: Vec<f32> = (0..64).map(|i| (i % 16) as f32).collect();
        let x: Vec<f32> = codes.iter().map(|v| 0.25 * v - 1.5).collect();
        let group = Group { scale: 0.25, min: 1.5, ..Group::default() };
        let moments = regress(15.0, &x, &[], &[group; CANDIDATES])[3];
        let (scale, min) = moments.line().unwrap();
        assert!((scale - 0.25).abs() < 1e-6 && (min - 1.5).abs() < 1e-6, "{scale} {min}");
        assert!(moments.residual(scale, min) < 1e-6 && moments.residual(0.3, min) > 1.0);
    }
}
