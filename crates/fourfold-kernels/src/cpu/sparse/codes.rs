//! The fast product of kept codes and activations rounded to int8. Codes of any width come out of the stream, go to their columns and
//! are multiplied in registers: nothing but mask, codes and scales is read. AVX512-VBMI has the two steps of unpacking (bytes to places,
//! then eight shifts in each 64 bits), VBMI2 the spreading, VNNI the product.

use std::arch::x86_64::*;

/// Columns of a word of the mask.
const WORD: usize = 64;

/// Kept codes of one row.
#[derive(Clone, Copy)]
pub struct CodeRow<'a> {
    /// The row's mask.
    pub mask: &'a [u64],
    /// The matrix's stream of codes.
    pub packed: &'a [u8],
    /// Place of the row's first code in it.
    pub first: usize,
    /// How they lie there.
    pub layout: &'a Layout,
    /// A scale for each 32 columns, followed by zeros to a multiple of 16.
    pub scales: &'a [f32],
}

/// Tokens rounded to int8.
pub struct Int8Tokens {
    /// `[tokens, stride]`: integers, padded with zeros to whole words.
    values: Vec<i8>,
    /// `[tokens, stride / 64]`: the factor of each word's integers.
    scales: Vec<f32>,
    /// `[tokens, halves]`: the factor times the integers' sum for each 32 columns, padded with zeros to a multiple of 16.
    sums: Vec<f32>,
    words: usize,
}

/// Scales of a row with so many words of mask, with their padding.
pub fn padded_halves(words: usize) -> usize {
    (words * 2).next_multiple_of(16)
}

impl Int8Tokens {
    /// Rounds tokens of `cols` columns, word by word: the largest magnitude of a word becomes 127.
    pub fn new<'a>(tokens: impl ExactSizeIterator<Item = &'a [f32]>, cols: usize) -> Self {
        let words = cols.div_ceil(WORD);
        let mut values = vec![0i8; words * WORD * tokens.len()];
        let mut scales = vec![0.0f32; words * tokens.len()];
        let mut sums = vec![0.0f32; padded_halves(words) * tokens.len()];
        for (t, token) in tokens.enumerate() {
            for (w, x) in token.chunks(WORD).enumerate() {
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                if largest == 0.0 {
                    continue;
                }
                let scale = largest / 127.0;
                let inverse = 127.0 / largest;
                let at = (t * words + w) * WORD;
                let values = &mut values[at..at + WORD];
                values.iter_mut().zip(x).for_each(|(q, v)| *q = (v * inverse).round_ties_even() as i8);
                scales[t * words + w] = scale;
                for (half, values) in values.chunks(WORD / 2).enumerate() {
                    let sum: i32 = values.iter().map(|&v| i32::from(v)).sum();
                    sums[t * padded_halves(words) + 2 * w + half] = scale * sum as f32;
                }
            }
        }
        Self { values, scales, sums, words }
    }
}

/// Whether this machine has the instructions, and those of [`super::packed`].
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vbmi2")
}

/// Where the codes of a stream lie.
#[derive(Clone)]
pub struct Layout {
    bits: usize,
    /// Eight codes are `bits` bytes: for each 64 bits of a result the bytes that its codes lie in.
    bytes: [u8; WORD],
    /// For each byte of a result where its code begins in those, when the first code begins at bit 0.
    shifts: [u8; WORD],
}

impl Layout {
    /// Of codes of 2 to 8 bits.
    pub fn new(bits: u8) -> Self {
        let bits = usize::from(bits);
        Self {
            bits,
            bytes: std::array::from_fn(|i| (i / 8 * bits + i % 8).min(WORD - 1) as u8),
            shifts: std::array::from_fn(|i| (i % 8 * bits) as u8),
        }
    }

    /// The code that stands for 0.
    fn zero_point(&self) -> u8 {
        1 << (self.bits - 1)
    }

    #[inline]
    #[target_feature(
        enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
    )]
    fn unpacker(&self) -> Unpacker {
        // SAFETY: arrays of 64 bytes.
        let (bytes, shifts) = unsafe {
            (_mm512_loadu_si512(self.bytes.as_ptr().cast()), _mm512_loadu_si512(self.shifts.as_ptr().cast()))
        };
        Unpacker { bits: self.bits, bytes, shifts, low_bits: _mm512_set1_epi8(((1u16 << self.bits) - 1) as i8) }
    }
}

/// A [`Layout`] in registers: takes 64 codes from any place of a stream.
#[derive(Clone, Copy)]
struct Unpacker {
    bits: usize,
    bytes: __m512i,
    shifts: __m512i,
    low_bits: __m512i,
}

impl Unpacker {
    /// Codes `first .. first + 64` of `packed`, one a byte; 0 from its end on.
    #[inline]
    #[target_feature(
        enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
    )]
    fn codes(&self, packed: &[u8], first: usize) -> __m512i {
        let bit = first * self.bits;
        let left = &packed[bit / 8..];
        // SAFETY: 64 bytes are there, or no more than there are are read.
        let raw = unsafe {
            if left.len() >= WORD {
                _mm512_loadu_si512(left.as_ptr().cast())
            } else {
                _mm512_maskz_loadu_epi8((1u64 << left.len()) - 1, left.as_ptr().cast())
            }
        };
        let shifts = _mm512_add_epi8(self.shifts, _mm512_set1_epi8((bit % 8) as i8));
        let codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(self.bytes, raw));
        _mm512_and_si512(codes, self.low_bits)
    }
}

/// `out[t] = Σ_c row[c] · x[t][c]` for the tokens from `token` on.
///
/// The codes of columns that are not kept are set to the zero point z, so that with all codes c
/// `Σ scale · (c − z) · x = Σ scale · c · x − z · Σ scale · Σ x`, of which the last sum is the token's.
///
/// Needs AVX512 as [`crate::Isa::Avx512`] has it, and [`is_available`].
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
)]
pub fn code_dots<const T: usize>(row: CodeRow, x: &Int8Tokens, token: usize, out: &mut [f32]) {
    let (words, halves) = (x.words, padded_halves(x.words));
    assert!(row.mask.len() == words && row.scales.len() >= halves);
    assert!(x.values.len() >= (token + T) * words * WORD && x.sums.len() >= (token + T) * halves);
    let unpacker = row.layout.unpacker();
    let zero_point = row.layout.zero_point();
    let zeros = _mm512_set1_epi8(zero_point as i8);
    let mut acc = [_mm512_setzero_ps(); T];
    let mut at = row.first;
    for (w, &word) in row.mask.iter().enumerate() {
        let codes = _mm512_mask_expand_epi8(zeros, word, unpacker.codes(row.packed, at));
        let scales =
            _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(row.scales[2 * w]), _mm512_set1_ps(row.scales[2 * w + 1]));
        for (t, acc) in acc.iter_mut().enumerate() {
            let place = (token + t) * words + w;
            // SAFETY: as asserted.
            let x_values = unsafe { _mm512_loadu_si512(x.values.as_ptr().add(place * WORD).cast()) };
            let sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x_values));
            *acc = _mm512_fmadd_ps(_mm512_mul_ps(sums, _mm512_set1_ps(x.scales[place])), scales, *acc);
        }
        at += word.count_ones() as usize;
    }
    let minus_zero = _mm512_set1_ps(-f32::from(zero_point));
    for (t, (out, mut acc)) in out.iter_mut().zip(acc).enumerate() {
        let sums = &x.sums[(token + t) * halves..(token + t + 1) * halves];
        for (scales, sums) in row.scales.chunks_exact(16).zip(sums.chunks_exact(16)) {
            // SAFETY: 16 numbers each.
            let (scales, sums) = unsafe { (_mm512_loadu_ps(scales.as_ptr()), _mm512_loadu_ps(sums.as_ptr())) };
            acc = _mm512_fmadd_ps(_mm512_mul_ps(scales, minus_zero), sums, acc);
        }
        *out = _mm512_reduce_add_ps(acc);
    }
}

/// Codes `first .. first + out.len()` of a stream of codes of `bits`, one a byte.
///
/// Needs what [`code_dots`] needs.
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
)]
pub fn unpack(packed: &[u8], bits: u8, first: usize, out: &mut [u8]) {
    let unpacker = Layout::new(bits).unpacker();
    for (i, out) in out.chunks_mut(WORD).enumerate() {
        let codes = unpacker.codes(packed, first + i * WORD);
        let some = if out.len() == WORD { u64::MAX } else { (1u64 << out.len()) - 1 };
        // SAFETY: as many bytes as there are.
        unsafe { _mm512_mask_storeu_epi8(out.as_mut_ptr().cast(), some, codes) };
    }
}

#[cfg(test)]
mod tests {
    use fourfold_tensor::{pack_row, packed_words_per_row};

    use super::*;

    #[test]
    fn codes_of_every_width_come_out_from_any_place() {
        if !is_available() || !crate::Isa::Avx512.is_available() {
            return eprintln!("skipped: no AVX512-VBMI");
        }
        for bits in 2..=8u8 {
            let all: Vec<u8> = (0..500u32).map(|i| ((i * 37 + i / 7) % (1 << bits)) as u8).collect();
            let mut words = vec![0u32; packed_words_per_row(all.len(), bits)];
            pack_row(&all, bits, &mut words);
            let packed: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            for (first, count) in [(0, 0), (0, 500), (1, 1), (1, 499), (7, 130), (12, 64), (5, 63), (437, 63)] {
                let mut out = vec![0; count];
                // SAFETY: the instructions are there.
                unsafe { unpack(&packed, bits, first, &mut out) };
                assert_eq!(out, all[first..first + count], "{bits} bits, {count} from {first}");
            }
        }
    }
}
