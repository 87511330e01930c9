//! The vector operations that the kernels are written in: 64 bytes, or 16 integers, or 16 floats at a time, whatever the
//! machine's registers hold. One implementation an instruction set; the kernels are written once.
//!
//! Every function is `#[inline(always)]`, so that it is compiled into a caller with the instruction set's
//! `#[target_feature]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use portable::Portable;

/// Lanes of a vector: rows of a strip.
pub(super) const LANES: usize = 16;

/// See the module's text.
///
/// # Safety
/// Functions may be called only where the instruction set is available; pointers must be valid for what is read or written,
/// at any alignment.
pub(super) trait Simd: Copy {
    /// 64 bytes, or 16 lanes of i32.
    type Int: Copy;
    /// 16 lanes of f32.
    type Float: Copy;

    /// 64 bytes.
    unsafe fn load_int(from: *const u8) -> Self::Int;
    /// `value` in each lane.
    unsafe fn splat_int(value: i32) -> Self::Int;
    /// `a & b`.
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a | b`.
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Each lane shifted right, zeros coming in. `by` is a constant after inlining.
    unsafe fn shr(a: Self::Int, by: u32) -> Self::Int;
    /// Each lane shifted left.
    unsafe fn shl(a: Self::Int, by: u32) -> Self::Int;
    /// 16 bytes as a table for [`Simd::lookup`].
    unsafe fn load_table(from: &[u8; 16]) -> Self::Int;
    /// Each byte of `codes` (below 16) replaced by that entry of the table.
    unsafe fn lookup(table: Self::Int, codes: Self::Int) -> Self::Int;
    /// In each lane, `acc + Σ codes[i] · four[i]` over the lane's four unsigned bytes and the four signed bytes of `four`.
    /// Codes above 127 are allowed only where `WIDE`.
    unsafe fn dot<const WIDE: bool>(acc: Self::Int, codes: Self::Int, four: i32) -> Self::Int;
    /// Byte `i` (a constant after inlining) of each lane, unsigned, as a float.
    unsafe fn byte_to_float(a: Self::Int, i: u32) -> Self::Float;
    /// Each lane as a float.
    unsafe fn to_float(a: Self::Int) -> Self::Float;

    /// `value` in each lane.
    unsafe fn splat(value: f32) -> Self::Float;
    /// 16 floats.
    unsafe fn load(from: *const f32) -> Self::Float;
    /// 16 IEEE half floats.
    unsafe fn load_f16(from: *const u16) -> Self::Float;
    /// 16 bfloat16.
    unsafe fn load_bf16(from: *const u16) -> Self::Float;
    /// 16 numbers of 4 bits: the low halves of 8 bytes, then the high halves.
    unsafe fn load_nibbles(from: *const u8) -> Self::Float;
    /// 16 unsigned bytes.
    unsafe fn load_u8(from: *const u8) -> Self::Float;
    /// 16 signed bytes.
    unsafe fn load_i8(from: *const i8) -> Self::Float;
    /// Writes 16 floats.
    unsafe fn store(to: *mut f32, a: Self::Float);
    /// `a · b`.
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a + b`.
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a − b`.
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · b + c`, rounded once where the machine can.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// The sum of the lanes.
    unsafe fn sum(a: Self::Float) -> f32;
}
