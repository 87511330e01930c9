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

    #[inline(always)]
    fn zip_bits(a: [f32; N], b: [f32; N], f: impl Fn(i32, i32) -> i32) -> [f32; N] {
        Self::zip(a, b, |a, b| f32::from_bits(f(a.to_bits() as i32, b.to_bits() as i32) as u32))
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
        // SAFETY: the caller promises N elements.
        unsafe { from.cast::<[f32; N]>().read_unaligned() }
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
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V {
        // SAFETY: the caller promises N bytes.
        let codes: [u8; N] = unsafe { *from.cast() };
        codes.map(|code| {
            let code = u32::from(code);
            let normal = ((code & 0x7f) << 20) + ((127 - 15) << 23);
            let subnormal = ((code & 7) as f32 * (1.0 / 131_072.0)).to_bits();
            let magnitude = if code & 0x78 == 0 { subnormal } else { normal };
            f32::from_bits(magnitude | (code & 0x80) << 24)
        })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller promises N elements.
        unsafe { to.cast::<[f32; N]>().write_unaligned(v) }
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
    #[inline(always)]
    fn dot_ints(self, acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        Self::zip_bits(
            acc,
            Self::zip_bits(a, b, |a, b| (a as i16 as i32 * b as i16 as i32).wrapping_add((a >> 16) * (b >> 16))),
            i32::wrapping_add,
        )
    }
    #[inline(always)]
    fn of_ints(self, v: Self::V) -> Self::V {
        v.map(|v| v.to_bits() as i32 as f32)
    }
    #[inline(always)]
    fn int_pairs(self, first: Self::V, second: Self::V) -> Self::V {
        std::array::from_fn(|i| pair(first[i], second[i]))
    }
    #[inline(always)]
    fn int_neighbours(self, first: Self::V, second: Self::V) -> Self::V {
        std::array::from_fn(|i| {
            let (from, at) = if i < N / 2 { (&first, 2 * i) } else { (&second, 2 * i - N) };
            pair(from[at], from[at + 1])
        })
    }
    #[inline(always)]
    fn largest_magnitudes(self, largest: Self::V, v: Self::V) -> Self::V {
        Self::zip_bits(largest, v, |largest, v| largest.max(v & i32::MAX))
    }
    #[inline(always)]
    fn largest_bits(self, v: Self::V) -> f32 {
        f32::from_bits(v.into_iter().map(f32::to_bits).fold(0, u32::max))
    }
}

/// Two numbers rounded to 16-bit integers, the first one below.
#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    let [first, second] = [first, second].map(|v| v.round_ties_even() as i16 as u16);
    f32::from_bits(u32::from(first) | u32::from(second) << 16)
}
