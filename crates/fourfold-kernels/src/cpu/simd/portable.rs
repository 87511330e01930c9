//! Eight lanes in plain Rust, for the compiler to map to what the machine has.

use half::{bf16, f16};

use super::{Kernel, MAX_LANES, Simd};

/// Plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

const N: usize = 8;

impl Portable {
    #[inline(always)]
    fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
        std::array::from_fn(|i| f(a[i], b[i]))
    }
}

impl Simd for Portable {
    type V = [f32; N];
    const LANES: usize = N;
    const TILE_ROWS: usize = 2;

    #[inline(never)]
    fn call<K: Kernel<Self>>(self, kernel: K) {
        kernel.run(self);
    }
    #[inline(always)]
    fn splat(self, v: f32) -> Self::V {
        [v; N]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller promises N elements; an array of f32 has f32's alignment.
        unsafe { *from.cast() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller promises N elements.
        let values: [f16; N] = unsafe { *from.cast() };
        values.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller promises N elements.
        let values: [bf16; N] = unsafe { *from.cast() };
        values.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller promises N elements.
        unsafe { *to.cast() = v }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `f32::mul_add`: without the instruction that is a function call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        // Adding and subtracting 1.5 · 2^23 leaves no room for a fraction; good for |v| < 2^22.
        v.map(|v| (v + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn pow2(self, v: Self::V) -> Self::V {
        v.map(|v| f32::from_bits(((v as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn transpose(self, square: &mut [Self::V; MAX_LANES]) {
        let rows = *square;
        for (i, row) in square.iter_mut().enumerate().take(N) {
            *row = std::array::from_fn(|j| rows[j][i]);
        }
    }
}
