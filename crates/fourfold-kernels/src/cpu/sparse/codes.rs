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
    /// The scale of each group, followed by 16 numbers of any value.
    pub scales: &'a [f32],
}

/// A word's columns, on a cache line.
#[derive(Clone)]
#[repr(align(64))]
struct Line([i8; WORD]);

/// How the scales of a row lie over its columns. A unit is as many columns as have one scale in any case: a word's, or half of one.
pub struct Units {
    /// Columns of a unit: 64 or 32.
    columns: usize,
    /// For each 16 units the group of the first one, and the groups of all, counted from it.
    groups: Vec<(usize, [i32; 16])>,
}

impl Units {
    /// Units of `columns` columns in rows of `cols`, in groups of `group_size`, which are whole units or the whole row.
    pub fn new(columns: usize, cols: usize, group_size: usize) -> Self {
        assert!(columns == WORD || columns == WORD / 2, "units of {columns} columns");
        let of_group = group_size.div_ceil(columns).max(1);
        let last = (cols.div_ceil(group_size.max(1))).saturating_sub(1);
        let group = |unit: usize| (unit / of_group).min(last);
        let vectors = (cols.div_ceil(WORD) * WORD / columns).div_ceil(16);
        let groups = (0..vectors)
            .map(|v| (group(v * 16), std::array::from_fn(|i| (group(v * 16 + i) - group(v * 16)) as i32)))
            .collect();
        Self { columns, groups }
    }

    /// How many, padded to a multiple of 16.
    pub fn len(&self) -> usize {
        self.groups.len() * 16
    }
}

/// Tokens rounded to int8.
pub struct Int8Tokens {
    /// `[tokens, words]`: integers, padded with zeros to whole words.
    values: Vec<Line>,
    /// `[tokens, units]`: the factor of each unit's integers, padded with zeros to a multiple of 16.
    scales: Vec<f32>,
    /// `[tokens, units]`: minus the zero point, times the factor, times the sum of the unit's integers.
    offsets: Vec<f32>,
    words: usize,
    units: Units,
}

impl Int8Tokens {
    /// Rounds tokens of `cols` columns, word by word: the largest magnitude of a word becomes 127. They are to be multiplied with codes
    /// of `layout` whose scales lie in `units`.
    pub fn new<'a>(
        tokens: impl ExactSizeIterator<Item = &'a [f32]>,
        cols: usize,
        units: Units,
        layout: &Layout,
    ) -> Self {
        let words = cols.div_ceil(WORD);
        let (unit, count) = (units.columns, units.len());
        let mut values = vec![Line([0; WORD]); words * tokens.len()];
        let (mut scales, mut offsets) = (vec![0.0f32; count * tokens.len()], vec![0.0f32; count * tokens.len()]);
        let minus_zero = -f32::from(layout.zero_point());
        for (t, token) in tokens.enumerate() {
            for (w, x) in token.chunks(WORD).enumerate() {
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                if largest == 0.0 {
                    continue;
                }
                let scale = largest / 127.0;
                let inverse = 127.0 / largest;
                let values = &mut values[t * words + w].0;
                values.iter_mut().zip(x).for_each(|(q, v)| *q = (v * inverse).round_ties_even() as i8);
                for (i, values) in values.chunks(unit).enumerate() {
                    let sum: i32 = values.iter().map(|&v| i32::from(v)).sum();
                    let at = t * count + w * (WORD / unit) + i;
                    (scales[at], offsets[at]) = (scale, minus_zero * scale * sum as f32);
                }
            }
        }
        Self { values, scales, offsets, words, units }
    }

    /// Room that [`code_dots`] needs for so many tokens.
    pub fn factors(&self, tokens: usize) -> usize {
        tokens * self.units.len()
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
    /// For each byte of a result where its code begins in those, when the first code begins at so many bits.
    shifts: [[u8; WORD]; 8],
}

impl Layout {
    /// Of codes of 2 to 8 bits.
    pub fn new(bits: u8) -> Self {
        let bits = usize::from(bits);
        Self {
            bits,
            bytes: std::array::from_fn(|i| (i / 8 * bits + i % 8).min(WORD - 1) as u8),
            shifts: std::array::from_fn(|bit| std::array::from_fn(|i| (i % 8 * bits + bit) as u8)),
        }
    }

    /// The code that stands for 0.
    fn zero_point(&self) -> u8 {
        1 << (self.bits - 1)
    }

    #[inline]
    #[target_feature(
        enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
    )]
    fn unpacker(&self) -> Unpacker<'_> {
        // SAFETY: an array of 64 bytes.
        let bytes = unsafe { _mm512_loadu_si512(self.bytes.as_ptr().cast()) };
        let low_bits = _mm512_set1_epi8(((1u16 << self.bits) - 1) as i8);
        Unpacker { bits: self.bits, bytes, shifts: &self.shifts, low_bits }
    }
}

/// A [`Layout`] in registers: takes 64 codes from any place of a stream.
#[derive(Clone, Copy)]
struct Unpacker<'a> {
    bits: usize,
    bytes: __m512i,
    shifts: &'a [[u8; WORD]; 8],
    low_bits: __m512i,
}

impl Unpacker<'_> {
    /// Codes `first .. first + 64` of `packed`, one a byte; 0 from its end on. `BYTES`: codes are bytes.
    #[inline]
    #[target_feature(
        enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
    )]
    fn codes<const BYTES: bool>(&self, packed: &[u8], first: usize) -> __m512i {
        let bit = if BYTES { first * 8 } else { first * self.bits };
        let left = &packed[bit / 8..];
        // SAFETY: 64 bytes are there, or no more than there are are read.
        let raw = unsafe {
            if left.len() >= WORD {
                _mm512_loadu_si512(left.as_ptr().cast())
            } else {
                _mm512_maskz_loadu_epi8((1u64 << left.len()) - 1, left.as_ptr().cast())
            }
        };
        if BYTES {
            return raw;
        }
        // SAFETY: an array of 64 bytes.
        let shifts = unsafe { _mm512_loadu_si512(self.shifts[bit % 8].as_ptr().cast()) };
        let codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(self.bytes, raw));
        _mm512_and_si512(codes, self.low_bits)
    }
}

/// `out[t] = Σ_c row[c] · x[t][c]` for the tokens from `token` on; `factors` is room for the tokens' units.
///
/// The codes of columns that are not kept are set to the zero point z, so that with all codes c
/// `Σ scale · (c − z) · x = Σ scale · c · x − z · Σ scale · Σ x`, of which the last sum is the token's.
///
/// Needs AVX512 as [`crate::Isa::Avx512`] has it, and [`is_available`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn code_dots<const T: usize>(row: CodeRow, x: &Int8Tokens, token: usize, factors: &mut [f32], out: &mut [f32]) {
    match (x.units.columns == WORD, row.layout.bits == 8) {
        (true, true) => dots::<T, true, true>(row, x, token, factors, out),
        (true, false) => dots::<T, true, false>(row, x, token, factors, out),
        (false, true) => dots::<T, false, true>(row, x, token, factors, out),
        (false, false) => dots::<T, false, false>(row, x, token, factors, out),
    }
}

/// `WORDS`: a word's columns have one scale; `BYTES`: codes are bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
fn dots<const T: usize, const WORDS: bool, const BYTES: bool>(
    row: CodeRow,
    x: &Int8Tokens,
    token: usize,
    factors: &mut [f32],
    out: &mut [f32],
) {
    let (words, units) = (x.words, x.units.len());
    assert!(row.mask.len() == words && factors.len() >= T * units);
    assert!(x.units.groups.iter().all(|(first, _)| first + 16 <= row.scales.len()));
    assert!(x.values.len() >= (token + T) * words && x.scales.len() >= (token + T) * units);
    let mut acc = [_mm512_setzero_ps(); T];
    for (v, (first, groups)) in x.units.groups.iter().enumerate() {
        // SAFETY: as asserted; 16 numbers each.
        let scales = unsafe {
            let groups = _mm512_loadu_si512(groups.as_ptr().cast());
            _mm512_permutexvar_ps(groups, _mm512_loadu_ps(row.scales.as_ptr().add(*first)))
        };
        for (t, acc) in acc.iter_mut().enumerate() {
            let of_token = (token + t) * units + v * 16;
            // SAFETY: as asserted; there are as many offsets as scales.
            unsafe {
                let both = _mm512_mul_ps(scales, _mm512_loadu_ps(x.scales.as_ptr().add(of_token)));
                _mm512_storeu_ps(factors.as_mut_ptr().add(t * units + v * 16), both);
                *acc = _mm512_fmadd_ps(scales, _mm512_loadu_ps(x.offsets.as_ptr().add(of_token)), *acc);
            }
        }
    }
    let unpacker = row.layout.unpacker();
    let zeros = _mm512_set1_epi8(row.layout.zero_point() as i8);
    let mut at = row.first;
    for (w, &word) in row.mask.iter().enumerate() {
        let codes = _mm512_mask_expand_epi8(zeros, word, unpacker.codes::<BYTES>(row.packed, at));
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as asserted.
            let (x_values, factors) = unsafe {
                let x_values = x.values.as_ptr().add((token + t) * words + w);
                (_mm512_load_si512(x_values.cast()), factors.as_ptr().add(t * units))
            };
            let sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x_values));
            // SAFETY: a factor for each unit of each word.
            let factor = unsafe {
                if WORDS {
                    _mm512_set1_ps(*factors.add(w))
                } else {
                    let (low, high) = (*factors.add(2 * w), *factors.add(2 * w + 1));
                    _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high))
                }
            };
            *acc = _mm512_fmadd_ps(sums, factor, *acc);
        }
        at += word.count_ones() as usize;
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = _mm512_reduce_add_ps(acc);
    }
}

/// Codes `first .. first + out.len()` of a stream of codes of `bits`, one a byte.
///
/// Needs what [`code_dots`] needs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub fn unpack(packed: &[u8], bits: u8, first: usize, out: &mut [u8]) {
    let layout = Layout::new(bits);
    let unpacker = layout.unpacker();
    for (i, out) in out.chunks_mut(WORD).enumerate() {
        let codes = unpacker.codes::<false>(packed, first + i * WORD);
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
