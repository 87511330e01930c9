//! Loops for the machine's vector width, and sums over slices in a fixed number of lanes: the compiler may use any vector width and the result stays the same. Inlined into
//! callers that run under [`pulp`]'s dispatch.

/// Evaluates an expression in code compiled for the machine's vectors (AVX2 on x86), where the functions it calls are inlined.
///
/// Each branch has a closure of its own: a closure that is called from two places, as by [`pulp::Arch::dispatch`], may be compiled
/// out of line, and is then compiled for the baseline processor, at a quarter of the speed.
macro_rules! vectorized {
    ($body:expr) => {{
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        let result = match pulp::x86::V3::try_new() {
            Some(simd) => simd.vectorize(|| $body),
            None => $body,
        };
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
        let result = $body;
        result
    }};
}
pub(crate) use vectorized;

/// Lanes of every sum.
pub(crate) const LANES: usize = 16;

/// The sum of a row of lanes, pairwise.
#[inline(always)]
pub(crate) fn sum(lanes: &[f32; LANES]) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `y += a · x`.
#[inline(always)]
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// `Σ a b` in [`LANES`] lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (i, (&a, &b)) in a_chunks.remainder().iter().zip(b_chunks.remainder()).enumerate() {
        lanes[i] = a * b;
    }
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    sum(&lanes)
}
