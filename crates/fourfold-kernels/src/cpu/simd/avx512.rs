//! Sixteen lanes: AVX512 F, BW, DQ, VL and VNNI, with or without BF16.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, MAX_LANES, PairDot, Simd};

/// AVX512 F, BW, DQ, VL and VNNI, and BF16 where that is said.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// The token.
    ///
    /// # Safety
    /// The machine has these instructions.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Self(())
    }
}

// SAFETY (every block below): the token proves that the instructions are there; pointers are the caller's promise.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 14;

    fn call<K: Kernel<Self>>(self, kernel: K) {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn compiled<S: Simd, K: Kernel<S>>(s: S, kernel: K) {
            kernel.run(s);
        }
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
        fn compiled_with_bf16<S: Simd, K: Kernel<S>>(s: S, kernel: K) {
            kernel.run(s);
        }
        unsafe { if BF16 { compiled_with_bf16(self, kernel) } else { compiled(self, kernel) } }
    }
    #[inline(always)]
    fn prefetch<T>(self, line: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    #[inline(always)]
    fn splat(self, v: f32) -> Self::V {
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V {
        unsafe {
            // The sign is at bits 7 to 15, and after the shift at 14 and 15: one too many.
            let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(!(1 << 14))))
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    fn pow2(self, v: Self::V) -> Self::V {
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), v) }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    fn four_sums(self, v: [Self::V; 4]) -> [f32; 4] {
        unsafe {
            // Within each 128-bit quarter first, as a transposition of four: then the quarters.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
            let low = _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd);
            let quarters = _mm512_add_ps(low, _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd));
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(quarters)));
            let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), high);
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    fn transpose(self, square: &mut [Self::V; MAX_LANES]) {
        unsafe {
            // Within the 128-bit quarters first (4x4 blocks), then the quarters themselves.
            let r = *square;
            let mut pairs = r;
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut fours = pairs;
            for i in 0..4 {
                for j in 0..2 {
                    let (a, b) = (pairs[4 * i + j], pairs[4 * i + 2 + j]);
                    fours[4 * i + 2 * j] = _mm512_shuffle_ps::<0b01_00_01_00>(a, b);
                    fours[4 * i + 2 * j + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, b);
                }
            }
            for j in 0..4 {
                let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
                let (ab_even, ab_odd) =
                    (_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
                let (cd_even, cd_odd) =
                    (_mm512_shuffle_f32x4::<0b10_00_10_00>(c, d), _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d));
                square[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even);
                square[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even);
                square[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd);
                square[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd);
            }
        }
    }
    #[inline(always)]
    fn dot_ints(self, acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        unsafe { dpwssd(acc, a, b) }
    }

    #[inline(always)]
    fn of_ints(self, v: Self::V) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(v)) }
    }

    #[inline(always)]
    fn int_pairs(self, first: Self::V, second: Self::V) -> Self::V {
        unsafe {
            let high = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(second));
            _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAA_AAAA, _mm512_cvtps_epi32(first), high))
        }
    }

    #[inline(always)]
    fn int_neighbours(self, first: Self::V, second: Self::V) -> Self::V {
        unsafe {
            // Packed within each 128-bit quarter: those of `first` lie at even places.
            let quarters = _mm512_packs_epi32(_mm512_cvtps_epi32(first), _mm512_cvtps_epi32(second));
            _mm512_castsi512_ps(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), quarters))
        }
    }

    #[inline(always)]
    fn largest_magnitudes(self, largest: Self::V, v: Self::V) -> Self::V {
        unsafe {
            let magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), magnitude))
        }
    }

    #[inline(always)]
    fn largest_bits(self, v: Self::V) -> f32 {
        unsafe { f32::from_bits(_mm512_reduce_max_epi32(_mm512_castps_si512(v)) as u32) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl PairDot for Avx512<true> {
    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions; the casts keep the bits.
        unsafe {
            _mm512_dpbf16_ps(
                acc,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }

    #[inline(always)]
    fn round_neighbours(self, first: Self::V, second: Self::V) -> Self::V {
        unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
    }

    #[inline(always)]
    fn round_pairs(self, first: Self::V, second: Self::V) -> Self::V {
        unsafe {
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(of_halves(), halves))
        }
    }

    #[inline(always)]
    unsafe fn pairs_of_bf16(self, first: *const bf16, second: *const bf16) -> Self::V {
        unsafe {
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
            let halves = _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(second.cast()));
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(of_halves(), halves))
        }
    }
}

/// Where the 16-bit elements of pairs come from: one half's, and the other half's.
///
/// # Safety
/// The machine has AVX512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn of_halves() -> __m512i {
    const OF_HALVES: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        places
    };
    // SAFETY: as many bytes as are read.
    unsafe { _mm512_loadu_si512(OF_HALVES.as_ptr().cast()) }
}

/// `vpdpwssd`, as an instruction: LLVM makes two of the intrinsic, `vpmaddwd` and `vpaddd`, in loops it deems bound by latency.
///
/// # Safety
/// The machine has AVX512-VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dpwssd(acc: __m512, a: __m512, b: __m512) -> __m512 {
    let mut sum = acc;
    // SAFETY: registers alone, and the instruction is there.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}
