//! The fast products of AVX512-VBMI2, which spreads 16-bit and 8-bit lanes: bf16 values times activations rounded to bf16, and codes
//! times activations rounded to int8.

use std::arch::x86_64::*;

use half::bf16;

/// Whether this machine has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512vbmi2")
}

/// `out[t] = Σ_c row[c] · x[t][c]`: kept values of a row in `values`, followed by at least 64 more elements or by nothing that the
/// last vectors need; tokens as bf16, `stride` apart, padded with zeros to whole words.
///
/// Needs AVX512 as [`crate::Isa::Avx512`] has it, and VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn bf16_dots<const T: usize>(mask: &[u64], values: &[bf16], x: &[bf16], stride: usize, out: &mut [f32]) {
    assert!(x.len() >= (T - 1) * stride + mask.len() * 64);
    let mut acc = [_mm512_setzero_ps(); T];
    let mut at = 0;
    for (w, &word) in mask.iter().enumerate() {
        let mut tail = [bf16::ZERO; 96];
        let from = if at + 64 <= values.len() {
            values[at..].as_ptr()
        } else {
            tail[..values.len() - at].copy_from_slice(&values[at..]);
            tail.as_ptr()
        };
        let low = word as u32;
        let second = low.count_ones() as usize;
        // SAFETY: from `from` on 64 elements are readable, of which the second vector begins at most 32 in; x is as asserted.
        unsafe {
            let first = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(from.cast()));
            let next = _mm512_maskz_expand_epi16((word >> 32) as u32, _mm512_loadu_si512(from.add(second).cast()));
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = x.as_ptr().add(t * stride + w * 64);
                let (x0, x1) = (_mm512_loadu_si512(x.cast()), _mm512_loadu_si512(x.add(32).cast()));
                *acc = _mm512_dpbf16_ps(*acc, as_bf16(first), as_bf16(x0));
                *acc = _mm512_dpbf16_ps(*acc, as_bf16(next), as_bf16(x1));
            }
        }
        at += word.count_ones() as usize;
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = _mm512_reduce_add_ps(acc);
    }
}

#[target_feature(enable = "avx512f")]
fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of anything.
    unsafe { std::mem::transmute(v) }
}

/// A row of codes against one token.
pub struct CodeRow<'a> {
    /// The mask.
    pub mask: &'a [u64],
    /// The row's codes, one a byte, followed by 64 bytes of anything.
    pub codes: &'a [u8],
    /// Scale of each word of the mask.
    pub scales: &'a [f32],
    /// The code that stands for 0.
    pub zero: u8,
}

/// A token rounded to int8, in whole words.
#[derive(Clone, Copy)]
pub struct Int8Token<'a> {
    /// The integers.
    pub values: &'a [i8],
    /// Factor of each word of 64.
    pub scales: &'a [f32],
}

/// `Σ_c row[c] · x[c]`.
///
/// Needs what [`bf16_dots`] needs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn code_dot(row: &CodeRow, x: Int8Token) -> f32 {
    let words = row.mask.len();
    let kept: usize = row.mask.iter().map(|word| word.count_ones() as usize).sum();
    assert!(row.codes.len() >= kept + 64 && x.values.len() >= words * 64);
    assert!(row.scales.len() >= words && x.scales.len() >= words);
    let (mut acc, mut at) = (_mm512_setzero_ps(), 0);
    let zero = _mm512_set1_epi8(row.zero as i8);
    for (w, &word) in row.mask.iter().enumerate() {
        // SAFETY: as asserted.
        let (codes, x_values) = unsafe {
            (
                _mm512_loadu_si512(row.codes.as_ptr().add(at).cast()),
                _mm512_loadu_si512(x.values.as_ptr().add(w * 64).cast()),
            )
        };
        let codes = _mm512_maskz_expand_epi8(word, codes);
        // Σ code · x − zero · Σ x, both over what is kept.
        let products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x_values);
        let offsets = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_maskz_mov_epi8(word, zero), x_values);
        let sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(products, offsets));
        acc = _mm512_fmadd_ps(sums, _mm512_set1_ps(row.scales[w] * x.scales[w]), acc);
        at += word.count_ones() as usize;
    }
    _mm512_reduce_add_ps(acc)
}

/// Codes `first .. first + out.len()` of a stream of 4-bit codes, one a byte.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn unpack_nibbles(packed: &[u8], first: usize, out: &mut [u8]) {
    let mut from = first / 2;
    let mut to = 0;
    if first % 2 == 1 && !out.is_empty() {
        out[0] = packed[from] >> 4;
        (from, to) = (from + 1, 1);
    }
    let order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    let low_half = _mm512_set1_epi8(15);
    while to + 64 <= out.len() {
        // SAFETY: 64 codes are 32 bytes, which `packed` has, since it has all codes of `out`.
        unsafe {
            assert!(from + 32 <= packed.len());
            // Each 8 bytes of the source to the lower half of a 128-bit lane, so that low and high nibbles interleave in place.
            let bytes = _mm512_zextsi256_si512(_mm256_loadu_si256(packed.as_ptr().add(from).cast()));
            let spread = _mm512_permutexvar_epi64(order, bytes);
            let low = _mm512_and_si512(spread, low_half);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(spread), low_half);
            _mm512_storeu_si512(out.as_mut_ptr().add(to).cast(), _mm512_unpacklo_epi8(low, high));
        }
        (from, to) = (from + 32, to + 64);
    }
    for (i, code) in out[to..].iter_mut().enumerate() {
        *code = packed[from + i / 2] >> (4 * (i % 2)) & 15;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_come_out_in_order_from_any_place() {
        if !is_available() || !crate::Isa::Avx512.is_available() {
            return eprintln!("skipped: no AVX512-VBMI2");
        }
        let packed: Vec<u8> = (0..200u32).map(|i| (i * 37 + 11) as u8).collect();
        for (first, count) in [(0, 0), (0, 400), (1, 1), (1, 399), (7, 130), (12, 64), (5, 63)] {
            let mut out = vec![0; count];
            // SAFETY: the instructions are there.
            unsafe { unpack_nibbles(&packed, first, &mut out) };
            let expected: Vec<u8> = (first..first + count).map(|i| packed[i / 2] >> (4 * (i % 2)) & 15).collect();
            assert_eq!(out, expected, "{count} from {first}");
        }
    }
}
