//! Functions of vectors, and loops over slices.

use super::Simd;

/// `e^x` to about 1 ulp. Arguments are held to [−87, 88]: e^−∞ gives 1.6e−38, which is nothing beside a sum that contains
/// e^0.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.min(x, s.splat(88.0)), s.splat(-87.0));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts (Cody & Waite), so that the remainder keeps its low bits: |r| ≤ ln 2 / 2.
    let r = s.mul_add(n, s.splat(-0.693_359_4), x);
    let r = s.mul_add(n, s.splat(2.121_944_4e-4), r);
    // Taylor's series; the first term left out is r^8/8! < 6e-9.
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.mul_add(p, r, s.splat(c));
    }
    s.mul(p, s.pow2(n))
}

/// `e^x` as a term of a softmax, beside a largest one of 1: what is below 1e-20 becomes zero, `e^−∞` too. Products with smaller numbers
/// would be denormal, for which Intel's CPUs take a hundred times as long.
#[inline(always)]
pub fn softmax_exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Nothing is lost of terms above 1e-13, for which 1e-20 is less than half of the last bit.
    s.max(s.splat(0.0), s.sub(exp(s, x), s.splat(1e-20)))
}

/// A function of two vectors. (Not a closure: one that is too long to be inlined is compiled without the caller's instructions,
/// and every operation in it becomes a call.)
pub trait Map2<S: Simd> {
    /// Its value; implementations are `#[inline(always)]`.
    fn apply(&self, s: S, a: S::V, b: S::V) -> S::V;
}

/// `x = f(x, y)` for each pair of elements.
#[inline(always)]
pub fn map2_in_place<S: Simd>(s: S, x: &mut [f32], y: &[f32], f: impl Map2<S>) {
    assert_eq!(x.len(), y.len());
    // SAFETY: both are as long.
    unsafe { map2_by_pointers(s, x.as_ptr(), y.as_ptr(), x.as_mut_ptr(), x.len(), f) }
}

/// `to = f(x, y)` for each pair of elements.
#[inline(always)]
pub fn map2<S: Simd>(s: S, x: &[f32], y: &[f32], to: &mut [f32], f: impl Map2<S>) {
    assert_eq!((x.len(), y.len()), (to.len(), to.len()));
    // SAFETY: all are as long.
    unsafe { map2_by_pointers(s, x.as_ptr(), y.as_ptr(), to.as_mut_ptr(), to.len(), f) }
}

/// # Safety
/// `x` and `y` hold `len` elements, `to` has room for as many; it may be `x`.
#[inline(always)]
unsafe fn map2_by_pointers<S: Simd>(s: S, x: *const f32, y: *const f32, to: *mut f32, len: usize, f: impl Map2<S>) {
    let whole = len / S::LANES * S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: i + LANES ≤ whole ≤ len.
        unsafe { s.store(to.add(i), f.apply(s, s.load(x.add(i)), s.load(y.add(i)))) }
    }
    let rest = len - whole;
    if rest > 0 {
        // SAFETY: `rest` elements follow `whole`.
        unsafe {
            let v = f.apply(s, s.load_first(x.add(whole), rest), s.load_first(y.add(whole), rest));
            s.store_first(to.add(whole), v, rest);
        }
    }
}

/// `Σ x · y`, in four sums of lanes.
#[inline(always)]
pub fn dot<S: Simd>(s: S, x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    let mut sums = [s.splat(0.0); 4];
    let width = 4 * S::LANES;
    let whole = x.len() / width * width;
    for i in (0..whole).step_by(width) {
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: i + width ≤ both lengths.
            unsafe {
                let at = i + j * S::LANES;
                *sum = s.mul_add(s.load(x.as_ptr().add(at)), s.load(y.as_ptr().add(at)), *sum);
            }
        }
    }
    let mut total = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    for (&x, &y) in x[whole..].iter().zip(&y[whole..]) {
        total += x * y;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::simd::for_isa;

    for_isa! {
        fn exps(values: &mut [f32], of_softmax: bool) = exps_with
    }

    #[inline(always)]
    fn exps_with<S: Simd>(s: S, values: &mut [f32], of_softmax: bool) {
        struct Exp {
            of_softmax: bool,
        }
        impl<S: Simd> Map2<S> for Exp {
            #[inline(always)]
            fn apply(&self, s: S, a: S::V, _: S::V) -> S::V {
                if self.of_softmax { softmax_exp(s, a) } else { exp(s, a) }
            }
        }
        let zeros = vec![0.0; values.len()];
        map2_in_place(s, values, &zeros, Exp { of_softmax });
    }

    #[test]
    fn exp_is_within_2e_7_everywhere_and_saturates_at_the_ends() {
        let arguments: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0 + 1e-5).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut values = arguments.clone();
            exps(isa, &mut values, false);
            for (&x, &v) in arguments.iter().zip(&values) {
                let expected = f64::from(x).exp();
                assert!((f64::from(v) - expected).abs() < 2e-7 * expected, "{isa:?}: e^{x} = {v}");
            }
            let mut ends = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY];
            exps(isa, &mut ends, false);
            assert!(ends[0] < 2e-38 && ends[1] < 2e-38 && ends[2] > 1e38 && ends[3].is_finite(), "{ends:?}");
        }
    }

    #[test]
    fn small_terms_of_a_softmax_are_zero() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut terms = [0.0, -29.0, -47.0, f32::NEG_INFINITY];
            exps(isa, &mut terms, true);
            assert_eq!((terms[0], &terms[2..]), (1.0, &[0.0; 2][..]), "{isa:?}");
            assert!((f64::from(terms[1]) - (-29f64).exp()).abs() < 1e-19, "{isa:?}: {}", terms[1]);
        }
    }
}
