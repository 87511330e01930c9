//! Optimizer states in 8 or 4 bits: each block of elements is divided by its largest magnitude and each quotient replaced by
//! the nearest of 256 (or 16) code values.
//!
//! The code values are those of dynamic (tree) quantization, dense near zero and near one: Dettmers et al. 2022, "8-bit
//! Optimizers via Block-wise Quantization", section 2 and figure 2. Second moments are never negative and use the unsigned
//! code. In 4 bits a second moment that rounds to zero would make an update explode, so its code is linear and has no zero: Li
//! et al. 2023, "Memory Efficient Optimizers with 4-bit States", section 4.1.

use std::sync::OnceLock;

/// Elements that share a scale, 8-bit states.
pub const BLOCK8: usize = 256;
/// Elements that share a scale, 4-bit states.
pub const BLOCK4: usize = 128;

/// Bits of 2⁻²⁵: what is nearer to zero has the code of zero (or of the smallest value, where there is no zero).
const SMALLEST: u32 = 0x3300_0000;
/// Cells of the table of a sign: exponents from −25 to 0, with 7 bits of mantissa.
const CELLS: usize = 1 << 12;

/// A code: sorted values in [−1, 1], and the nearest code for each cell of a number's sign, exponent and upper mantissa: 8 KB,
/// which stay in the first cache.
pub struct Code {
    /// The values, then copies of the last: a code needs no check to be looked up.
    values: Box<[f32; 256]>,
    len: usize,
    nearest: Box<[u8; 2 * CELLS]>,
}

impl Code {
    /// Signed dynamic code of 8 bits, for first moments.
    pub fn signed8() -> &'static Self {
        static CODE: OnceLock<Code> = OnceLock::new();
        CODE.get_or_init(|| Self::new(dynamic_map(8, true)))
    }

    /// Unsigned dynamic code of 8 bits, for second moments.
    pub fn unsigned8() -> &'static Self {
        static CODE: OnceLock<Code> = OnceLock::new();
        CODE.get_or_init(|| Self::new(dynamic_map(8, false)))
    }

    /// Signed dynamic code of 4 bits, for first moments.
    pub fn signed4() -> &'static Self {
        static CODE: OnceLock<Code> = OnceLock::new();
        CODE.get_or_init(|| Self::new(dynamic_map(4, true)))
    }

    /// Linear code of 4 bits without zero, for second moments: 1/16, 2/16, … 1.
    pub fn linear4() -> &'static Self {
        static CODE: OnceLock<Code> = OnceLock::new();
        CODE.get_or_init(|| Self::new((1..=16).map(|i| i as f32 / 16.0).collect()))
    }

    fn new(values: Vec<f32>) -> Self {
        // The middle of a table's cell decides, which is the exact nearest code but for quotients within 0.4 % of a boundary,
        // where either neighbour is as good.
        let mut nearest = Box::new([0; 2 * CELLS]);
        for (i, nearest) in nearest.iter_mut().enumerate() {
            let magnitude = f32::from_bits(SMALLEST + ((i % CELLS) << 16 | 0x8000) as u32).min(1.0);
            let x = if i < CELLS { magnitude } else { -magnitude };
            let after = values.partition_point(|&v| v < x);
            let code = match after {
                0 => 0,
                n if n == values.len() => n - 1,
                n if x - values[n - 1] <= values[n] - x => n - 1,
                n => n,
            };
            *nearest = code as u8;
        }
        let mut padded = Box::new([values[values.len() - 1]; 256]);
        padded[..values.len()].copy_from_slice(&values);
        Self { values: padded, len: values.len(), nearest }
    }

    /// The code values, ascending.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.len]
    }

    /// The value of a code.
    #[inline(always)]
    pub fn decode(&self, code: u8) -> f32 {
        self.values[code as usize]
    }

    /// The code nearest to `x`, |x| ≤ 1.
    #[inline(always)]
    pub fn encode(&self, x: f32) -> u8 {
        self.nearest[cell(x) as usize % (2 * CELLS)]
    }

    /// The codes nearest to `values · factor`, at most [`BLOCK8`] of them.
    #[inline(always)]
    fn encode_all(&self, values: &[f32], factor: f32, codes: &mut [u8]) {
        // The cells first, in a loop that is vectorised; the table is looked up one by one.
        let mut cells = [0u16; BLOCK8];
        for (cell_of, &v) in cells.iter_mut().zip(values) {
            *cell_of = cell(v * factor);
        }
        for (code, &cell) in codes.iter_mut().zip(&cells) {
            *code = self.nearest[cell as usize % (2 * CELLS)];
        }
    }
}

/// Where a number stands in the table of [`Code`].
#[inline(always)]
fn cell(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = (bits & 0x7fff_ffff).clamp(SMALLEST, 0x3f80_ffff) - SMALLEST;
    (magnitude >> 16 | bits >> 31 << 12) as u16
}

/// The values of the dynamic tree code of `bits` bits: decades 10⁰, 10⁻¹, …, with twice as many values in each higher one, each
/// the middle of an equal part of [0.1, 1] times the decade; and 0 and 1 themselves.
fn dynamic_map(bits: u32, signed: bool) -> Vec<f32> {
    let decades = bits - 1;
    let mut values = vec![0.0f32, 1.0];
    for decade in 0..decades {
        let parts = if signed { 1usize << decade } else { 2usize << decade };
        let factor = 10f64.powi(decade as i32 + 1 - decades as i32);
        for part in 0..parts {
            let middle = 0.1 + 0.9 * (part as f64 + 0.5) / parts as f64;
            let value = (factor * middle) as f32;
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// A state vector in 8 bits: a code an element, an f32 scale a block of [`BLOCK8`].
#[derive(Clone, Debug, PartialEq)]
pub struct State8 {
    /// Codes, one an element.
    pub codes: Vec<u8>,
    /// Largest magnitude of each block.
    pub scales: Vec<f32>,
}

impl State8 {
    /// Zeros, in `code`.
    pub fn zeros(len: usize, code: &Code) -> Self {
        Self { codes: vec![code.encode(0.0); len], scales: vec![0.0; len.div_ceil(BLOCK8)] }
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }
}

/// A state vector in 4 bits: two codes a byte (the even element in the low half), an f32 scale a block of [`BLOCK4`].
#[derive(Clone, Debug, PartialEq)]
pub struct State4 {
    /// Codes, two a byte.
    pub codes: Vec<u8>,
    /// Largest magnitude of each block.
    pub scales: Vec<f32>,
}

impl State4 {
    /// Zeros, in `code`. Blocks that begin with a scale of 0 decode to 0 whatever the code.
    pub fn zeros(len: usize, code: &Code) -> Self {
        let zero = code.encode(0.0);
        Self { codes: vec![zero | zero << 4; len.div_ceil(2)], scales: vec![0.0; len.div_ceil(BLOCK4)] }
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }
}

/// Decodes one block of 8-bit codes.
#[inline(always)]
pub fn decode8(codes: &[u8], scale: f32, code: &Code, out: &mut [f32]) {
    for (o, &c) in out.iter_mut().zip(codes) {
        *o = code.decode(c) * scale;
    }
}

/// Encodes one block, and returns its scale.
#[inline(always)]
pub fn encode8(values: &[f32], code: &Code, codes: &mut [u8]) -> f32 {
    let scale = largest(values);
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    code.encode_all(values, inverse, codes);
    scale
}

/// Decodes one block of 4-bit codes.
#[inline(always)]
pub fn decode4(codes: &[u8], scale: f32, code: &Code, out: &mut [f32]) {
    let mut pairs = out.chunks_exact_mut(2);
    for (pair, &byte) in (&mut pairs).zip(codes) {
        pair[0] = code.decode(byte & 15) * scale;
        pair[1] = code.decode(byte >> 4) * scale;
    }
    if let ([last], Some(&byte)) = (pairs.into_remainder(), codes.last()) {
        *last = code.decode(byte & 15) * scale;
    }
}

/// Encodes one block, at most [`BLOCK4`] elements, and returns its scale. The last half byte of an odd number of them is 0.
#[inline(always)]
pub fn encode4(values: &[f32], code: &Code, codes: &mut [u8]) -> f32 {
    let scale = largest(values);
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    let mut whole = [0; BLOCK4];
    code.encode_all(values, inverse, &mut whole[..values.len()]);
    for (byte, pair) in codes.iter_mut().zip(whole.chunks_exact(2)) {
        *byte = pair[0] | pair[1] << 4;
    }
    scale
}

/// The largest magnitude. Magnitudes are ordered as their bits are, whose comparison is vectorised.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut most = 0;
    for v in values {
        most = v.abs().to_bits().max(most);
    }
    f32::from_bits(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn codes_have_the_published_shape() {
        let signed = Code::signed8().values();
        assert_eq!(signed.len(), 256);
        assert_eq!((signed[0], signed[255]), (-0.992_968_75, 1.0));
        assert!(signed.contains(&0.0) && signed.contains(&5.5e-7));
        let unsigned = Code::unsigned8().values();
        assert_eq!((unsigned.len(), unsigned[0], unsigned[255]), (256, 0.0, 1.0));
        assert_eq!(Code::signed4().values().len(), 16);
        assert!(Code::linear4().values()[0] > 0.0);
        for code in [Code::signed8(), Code::unsigned8(), Code::signed4(), Code::linear4()] {
            assert!(code.values().is_sorted_by(|a, b| a < b));
            // Every code value is its own nearest code, or its immediate neighbour's where the two are within 0.4 %.
            for (i, &v) in code.values().iter().enumerate() {
                assert!((code.encode(v) as usize).abs_diff(i) <= usize::from(v.abs() < 1e-5), "{i}: {v}");
            }
        }
    }

    #[test]
    fn round_trip_error_is_small_and_a_linear_code_is_worse() {
        // Second moments span many orders of magnitude inside a block: squares of a heavy-tailed variable.
        let stream = Stream::new(5, 0, 0);
        let values: Vec<f32> = (0..BLOCK8).map(|i| (stream.unit(i) * 12.0 - 12.0).exp2()).collect();
        let mut codes = vec![0; BLOCK8];
        let scale = encode8(&values, Code::unsigned8(), &mut codes);
        let mut back = vec![0.0; BLOCK8];
        decode8(&codes, scale, Code::unsigned8(), &mut back);
        let relative = |found: &[f32]| {
            values.iter().zip(found).map(|(v, f)| f64::from(((v - f) / v).abs())).sum::<f64>() / BLOCK8 as f64
        };
        let dynamic = relative(&back);
        let linear: Vec<f32> = values.iter().map(|v| (v / scale * 255.0).round() / 255.0 * scale).collect();
        assert!(dynamic < 0.03, "{dynamic}");
        assert!(relative(&linear) > 3.0 * dynamic, "linear {}, dynamic {dynamic}", relative(&linear));
    }

    #[test]
    fn four_bits_round_trip_odd_lengths_and_zeros() {
        let values = [0.5f32, -0.25, 0.0, 1.0, -1.0];
        let mut codes = [0u8; 3];
        let scale = encode4(&values, Code::signed4(), &mut codes);
        let mut back = [0.0; 5];
        decode4(&codes, scale, Code::signed4(), &mut back);
        assert!(values.iter().zip(&back).all(|(v, b)| (v - b).abs() < 0.12), "{back:?}");
        let zeros = [0.0f32; 5];
        let scale = encode4(&zeros, Code::linear4(), &mut codes);
        decode4(&codes, scale, Code::linear4(), &mut back);
        assert_eq!(back, zeros);
    }
}
