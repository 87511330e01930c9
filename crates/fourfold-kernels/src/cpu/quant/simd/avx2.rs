//! AVX2: two registers a vector. There is no `vpdpbusd`: `vpmaddubsw` adds neighbouring products in 16 bits, which codes up to
//! 127 cannot overflow; wider codes are split into even and odd bytes and multiplied in 16 bits.

use std::arch::x86_64::*;

use super::Simd;

/// See [`crate::cpu::Isa::Avx2`].
#[derive(Clone, Copy)]
pub(in crate::cpu::quant) struct Avx2;

// SAFETY (of every block below): the caller promises the instruction set, and that pointers are valid.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type Int = [__m256i; 2];
    type Float = [__m256; 2];

    #[inline(always)]
    unsafe fn load_int(from: *const u8) -> Self::Int {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Int {
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int {
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shr(a: Self::Int, by: u32) -> Self::Int {
        unsafe {
            let by = _mm_cvtsi32_si128(by as i32);
            [_mm256_srl_epi32(a[0], by), _mm256_srl_epi32(a[1], by)]
        }
    }
    #[inline(always)]
    unsafe fn shl(a: Self::Int, by: u32) -> Self::Int {
        unsafe {
            let by = _mm_cvtsi32_si128(by as i32);
            [_mm256_sll_epi32(a[0], by), _mm256_sll_epi32(a[1], by)]
        }
    }
    #[inline(always)]
    unsafe fn load_table(from: &[u8; 16]) -> Self::Int {
        unsafe { [_mm256_broadcastsi128_si256(_mm_loadu_si128(from.as_ptr().cast())); 2] }
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::Int, codes: Self::Int) -> Self::Int {
        unsafe { [_mm256_shuffle_epi8(table[0], codes[0]), _mm256_shuffle_epi8(table[1], codes[1])] }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: Self::Int, codes: Self::Int, four: i32) -> Self::Int {
        unsafe {
            let four = _mm256_set1_epi32(four);
            [dot_half::<WIDE>(acc[0], codes[0], four), dot_half::<WIDE>(acc[1], codes[1], four)]
        }
    }
    #[inline(always)]
    unsafe fn byte_to_float(a: Self::Int, i: u32) -> Self::Float {
        unsafe { Self::to_float(Self::and(Self::shr(a, 8 * i), Self::splat_int(255))) }
    }
    #[inline(always)]
    unsafe fn to_float(a: Self::Int) -> Self::Float {
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Float {
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Float {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::Float {
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::Float {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> Self::Float {
        unsafe {
            let low = _mm_loadl_epi64(from.cast());
            let (low, high) = (_mm_and_si128(low, _mm_set1_epi8(15)), _mm_srli_epi16::<4>(low));
            let high = _mm_and_si128(high, _mm_set1_epi8(15));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Float {
        unsafe {
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::Float {
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, a: Self::Float) {
        unsafe {
            _mm256_storeu_ps(to, a[0]);
            _mm256_storeu_ps(to.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::Float) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}

/// [`Simd::dot`] for 8 lanes. No closure: only `#[inline(always)]` functions are sure to end up in a caller that has AVX2.
#[inline(always)]
unsafe fn dot_half<const WIDE: bool>(acc: __m256i, codes: __m256i, four: __m256i) -> __m256i {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let products = if WIDE {
            let even = _mm256_madd_epi16(
                _mm256_and_si256(codes, _mm256_set1_epi16(255)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(four)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), _mm256_srai_epi16::<8>(four));
            _mm256_add_epi32(even, odd)
        } else {
            _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), _mm256_set1_epi16(1))
        };
        _mm256_add_epi32(acc, products)
    }
}
