//! Plain Rust; the compiler vectorises what it can.

use half::f16;

use super::{LANES, Simd};

/// Any machine.
#[derive(Clone, Copy)]
pub(in crate::cpu::quant) struct Portable;

fn each<A: Copy, B: Copy + Default>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for (o, a) in out.iter_mut().zip(a) {
        *o = f(a);
    }
    out
}

fn both<A: Copy, B: Copy + Default>(a: [A; LANES], b: [A; LANES], f: impl Fn(A, A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

// SAFETY (of every block below): the caller promises that the pointer is valid for the elements read or written.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Portable {
    type Int = [u32; LANES];
    type Float = [f32; LANES];

    #[inline(always)]
    unsafe fn load_int(from: *const u8) -> Self::Int {
        unsafe { from.cast::<Self::Int>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Int {
        [value as u32; LANES]
    }
    #[inline(always)]
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int {
        both(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int {
        both(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn shr(a: Self::Int, by: u32) -> Self::Int {
        each(a, |a| a >> by)
    }
    #[inline(always)]
    unsafe fn shl(a: Self::Int, by: u32) -> Self::Int {
        each(a, |a| a << by)
    }
    #[inline(always)]
    unsafe fn load_table(from: &[u8; 16]) -> Self::Int {
        let mut table = [0; LANES];
        for (entry, &byte) in table.iter_mut().zip(from) {
            *entry = u32::from(byte);
        }
        table
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::Int, codes: Self::Int) -> Self::Int {
        each(codes, |c| u32::from_ne_bytes(c.to_ne_bytes().map(|byte| table[usize::from(byte & 15)] as u8)))
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: Self::Int, codes: Self::Int, four: i32) -> Self::Int {
        let four = four.to_le_bytes().map(|b| i32::from(b as i8));
        both(acc, codes, |acc, c| {
            let c = c.to_le_bytes().map(i32::from);
            (acc as i32 + c[0] * four[0] + c[1] * four[1] + c[2] * four[2] + c[3] * four[3]) as u32
        })
    }
    #[inline(always)]
    unsafe fn byte_to_float(a: Self::Int, i: u32) -> Self::Float {
        each(a, |a| ((a >> (8 * i)) & 255) as f32)
    }
    #[inline(always)]
    unsafe fn to_float(a: Self::Int) -> Self::Float {
        each(a, |a| a as i32 as f32)
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Float {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Float {
        unsafe { from.cast::<Self::Float>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::Float {
        each(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }, |bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::Float {
        each(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }, |bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> Self::Float {
        let bytes = unsafe { from.cast::<[u8; 8]>().read_unaligned() };
        let mut out = [0.0; LANES];
        for (i, byte) in bytes.into_iter().enumerate() {
            out[i] = f32::from(byte & 15);
            out[i + 8] = f32::from(byte >> 4);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Float {
        each(unsafe { from.cast::<[u8; LANES]>().read_unaligned() }, f32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::Float {
        each(unsafe { from.cast::<[i8; LANES]>().read_unaligned() }, f32::from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, a: Self::Float) {
        unsafe { to.cast::<Self::Float>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::Float) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        both(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        both(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float {
        both(a, b, |a, b| a - b)
    }
    // Rounded twice: without the instruction a fused product is a slow library call.
    #[inline(always)]
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        let mut out = c;
        for i in 0..LANES {
            out[i] += a[i] * b[i];
        }
        out
    }
}
