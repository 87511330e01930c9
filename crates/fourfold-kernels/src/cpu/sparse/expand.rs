//! Kept values back to the columns they stand in, a vector at a time: AVX512 has an instruction for it, AVX2 a permutation whose
//! indices come from a table.

use crate::cpu::simd::{Element, Portable, Simd};

/// An instruction set that spreads lanes.
pub trait Expand: Simd {
    /// Lane i becomes the next unused lane of `v` where bit i of `mask` is set, and 0 elsewhere.
    fn expand(self, v: Self::V, mask: u32) -> Self::V;
}

impl Expand for Portable {
    #[inline(always)]
    fn expand(self, v: Self::V, mask: u32) -> Self::V {
        let mut next = 0;
        std::array::from_fn(|i| {
            let kept = (mask >> i & 1) as usize;
            next += kept;
            if kept == 1 { v[next - 1] } else { 0.0 }
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Expand;
    use crate::cpu::simd::{Avx2, Avx512};

    impl<const BF16: bool> Expand for Avx512<BF16> {
        #[inline(always)]
        fn expand(self, v: Self::V, mask: u32) -> Self::V {
            // SAFETY: the token proves AVX512F.
            unsafe { _mm512_maskz_expand_ps(mask as u16, v) }
        }
    }

    /// For each mask of eight lanes the source of each lane, one a byte.
    static SOURCES: [u64; 256] = sources();

    const fn sources() -> [u64; 256] {
        let mut table = [0; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut next) = (0, 0u64);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    table[mask] |= next << (8 * lane);
                    next += 1;
                }
                lane += 1;
            }
            mask += 1;
        }
        table
    }

    impl Expand for Avx2 {
        #[inline(always)]
        fn expand(self, v: Self::V, mask: u32) -> Self::V {
            let sources = SOURCES[(mask & 0xff) as usize] as i64;
            // SAFETY: the token proves AVX2.
            unsafe {
                let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask as i32), lanes), lanes);
                let spread = _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(sources)));
                _mm256_and_ps(spread, _mm256_castsi256_ps(kept))
            }
        }
    }
}

/// One row of a sparse matrix: its mask, and all kept values from its first on (those of later rows may follow).
#[derive(Clone, Copy)]
pub struct Row<'a, E> {
    /// The mask.
    pub mask: &'a [u64],
    /// The values.
    pub values: &'a [E],
    /// A factor for each word of the mask; none where values are as they are.
    pub scales: Option<&'a [f32]>,
}

/// Calls `step(column, vector)` for each vector of the row with kept values spread over their columns.
#[inline(always)]
fn each_vector<S: Expand, E: Element>(s: S, row: Row<E>, mut step: impl FnMut(usize, S::V)) {
    let mut at = 0;
    for (w, &word) in row.mask.iter().enumerate() {
        let scale = row.scales.map(|scales| s.splat(scales[w]));
        let whole = at + 64 <= row.values.len();
        for part in 0..64 / S::LANES {
            let mask = (word >> (part * S::LANES)) as u32 & ((1u64 << S::LANES) - 1) as u32;
            let rest = &row.values[at..];
            // SAFETY: a word keeps at most 64 values, and so many are there; else no more are read than there are.
            let packed = unsafe {
                if whole { E::load(s, rest.as_ptr()) } else { s.load_first(rest.as_ptr(), rest.len().min(S::LANES)) }
            };
            let mut v = s.expand(packed, mask);
            if let Some(scale) = scale {
                v = s.mul(v, scale);
            }
            step(w * 64 + part * S::LANES, v);
            at += mask.count_ones() as usize;
        }
    }
}

/// `out[t] = Σ_c row[c] · x[t][c]` for `T` tokens, which are `stride` apart and padded with zeros to whole words.
#[inline(always)]
pub fn row_dots<S: Expand, E: Element, const T: usize>(s: S, row: Row<E>, x: &[f32], stride: usize, out: &mut [f32]) {
    assert!(x.len() >= (T - 1) * stride + row.mask.len() * 64);
    let mut acc = [s.splat(0.0); T];
    each_vector(s, row, |c, v| {
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as asserted; c + LANES ≤ 64 · words.
            *acc = s.mul_add(v, unsafe { s.load(x.as_ptr().add(t * stride + c)) }, *acc);
        }
    });
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = s.sum(acc);
    }
}

/// The row as f32, zeros included, into `out` of whole words.
#[inline(always)]
pub fn row_to_f32<S: Expand, E: Element>(s: S, row: Row<E>, out: &mut [f32]) {
    assert!(out.len() >= row.mask.len() * 64);
    // SAFETY: as asserted; c + LANES ≤ 64 · words.
    each_vector(s, row, |c, v| unsafe { s.store(out.as_mut_ptr().add(c), v) });
}
