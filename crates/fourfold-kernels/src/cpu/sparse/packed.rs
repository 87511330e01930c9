//! The fast product of bf16 values and activations rounded to bf16: AVX512-VBMI2 spreads 16-bit lanes.

use std::arch::x86_64::*;

use half::bf16;

/// `out[t] = Σ_c row[c] · x[t][c]`: kept values of a row in `values`, followed by at least 64 more elements or by nothing that the
/// last vectors need; tokens as bf16, `stride` apart, padded with zeros to whole words.
///
/// Needs AVX512 as [`crate::Isa::Avx512`] has it, BF16 and VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn bf16_dots<const T: usize>(mask: &[u64], values: &[bf16], x: &[bf16], stride: usize, out: &mut [f32]) {
    assert!(x.len() >= (T - 1) * stride + mask.len() * 64);
    // Two chains of sums a token: one would wait for each product's end.
    let mut acc = [[_mm512_setzero_ps(); 2]; T];
    let mut tail = [bf16::ZERO; 96];
    let mut at = 0;
    for (w, &word) in mask.iter().enumerate() {
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
                acc[0] = _mm512_dpbf16_ps(acc[0], as_bf16(first), as_bf16(x0));
                acc[1] = _mm512_dpbf16_ps(acc[1], as_bf16(next), as_bf16(x1));
            }
        }
        at += word.count_ones() as usize;
    }
    for (out, [first, next]) in out.iter_mut().zip(acc) {
        *out = _mm512_reduce_add_ps(_mm512_add_ps(first, next));
    }
}

#[target_feature(enable = "avx512f")]
fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of anything.
    unsafe { std::mem::transmute(v) }
}
