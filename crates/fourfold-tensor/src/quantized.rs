//! The integer storage form: b-bit codes packed without gaps, with scales per group of columns.
//!
//! Element (r, c) of group g = `group_of(c)` stands for
//!
//! ```text
//! uniform grid:  w[r, c] = scale[r, g] · code[r, c] − min[r, g]      (min = scale · zero point)
//! codebook:      w[r, c] = scale[r, g] · codebook[code[r, c]]
//! ```
//!
//! Codes are unsigned, `0 .. 2^bits`. The symmetric grid's zero point is `2^(bits−1)`.
//! The packing is that of compressed-tensors' `pack-quantized`: element i of a row begins at bit `i · bits` of the row's
//! 32-bit words, least significant bit first; each row begins at a new word.

use half::f16;
use thiserror::Error;

use crate::{Buffer, Double, FloatBuffer};

/// The scales of a quantized matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// One float for each row and group, row-major `[rows, groups]`; or a single one for the whole tensor (per-tensor).
    Float(FloatBuffer),
    /// One byte a group, a float for a run of groups.
    Double(Double),
}

/// What is subtracted from `scale · code` on a uniform grid.
#[derive(Clone, Debug, PartialEq)]
pub enum Offsets {
    /// The zero point is `2^(bits−1)` everywhere; nothing is stored.
    Symmetric,
    /// Integer zero points `[rows, groups]` (or one), in the codes' range: `min = scale · zero`.
    ZeroPoint(Buffer<u8>),
    /// Real offsets `[rows, groups]`, as GGUF's `Q4_1` stores them: `min` itself.
    Min(FloatBuffer),
    /// Real offsets as GGUF's K-quants store them: one byte a group, a float for a run of groups.
    Double(Double),
}

/// A matrix of b-bit codes with group scales. See the module's text for what it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale; `cols` for per-channel. The last group of a row may be short.
    pub group_size: usize,
    /// `[rows, packed_words_per_row(cols, bits)]`.
    pub packed: Buffer<u32>,
    /// The scales.
    pub scales: Scales,
    /// The offsets. [`Offsets::Symmetric`] where there is a codebook (which then decides alone).
    pub offsets: Offsets,
    /// Values of the codes on a non-uniform grid, `2^bits` of them, `bits` at most 4.
    pub codebook: Option<Vec<i8>>,
    /// Group of each column, `[cols]`, where it is not `column / group_size` (GPTQ act-order).
    pub g_idx: Option<Buffer<u32>>,
}

/// Why the parts of a quantized matrix do not fit together.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum QuantizedError {
    /// A width that has no kernel.
    #[error("{0} bits: codes have 2 to 8 bits")]
    Bits(u8),
    /// A group of no columns.
    #[error("group size 0")]
    GroupSize,
    /// A part has the wrong number of elements.
    #[error("{part} has {found} elements, [{rows}, {cols}] in groups of {group_size} needs {expected}")]
    Length {
        /// Which part.
        part: &'static str,
        /// Elements found.
        found: usize,
        /// Elements needed.
        expected: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Columns a scale covers.
        group_size: usize,
    },
    /// Runs of groups of no length, or of one that has no kernel.
    #[error("a float for each {span} of {groups} groups: the run is no power of two, nor the whole row")]
    Span {
        /// Groups that share a float.
        span: usize,
        /// Groups of a row.
        groups: usize,
    },
    /// A codebook on a grid that cannot have one.
    #[error("a codebook needs at most 4 bits and no offsets")]
    Codebook,
    /// A column assigned to a group that does not exist.
    #[error("g_idx[{column}] = {group}, of {groups} groups")]
    GroupIndex {
        /// The column.
        column: usize,
        /// Its group.
        group: u32,
        /// Groups there are.
        groups: usize,
    },
}

/// 32-bit words a row of `cols` codes takes.
pub const fn packed_words_per_row(cols: usize, bits: u8) -> usize {
    (cols * bits as usize).div_ceil(32)
}

/// Packs one row of codes (each below `2^bits`) into `words`, which it overwrites.
pub fn pack_row(codes: &[u8], bits: u8, words: &mut [u32]) {
    if 32 % bits == 0 {
        // No code crosses a word.
        let per_word = (32 / bits) as usize;
        let full = codes.len().div_ceil(per_word);
        for (word, codes) in words.iter_mut().zip(codes.chunks(per_word)) {
            *word = match <[u8; 8]>::try_from(codes) {
                Ok(codes) if bits == 4 => nibbles(u64::from_le_bytes(codes)),
                _ => codes.iter().rev().fold(0, |word, &code| (word << bits) | u32::from(code)),
            };
        }
        words[full..].fill(0);
        return;
    }
    let (mut wide, mut filled, mut full) = (0u64, 0u32, 0);
    for &code in codes {
        wide |= u64::from(code) << filled;
        filled += u32::from(bits);
        if filled >= 32 {
            words[full] = wide as u32;
            full += 1;
            wide >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words[full] = wide as u32;
        full += 1;
    }
    words[full..].fill(0);
}

/// The low halves of eight bytes, side by side.
fn nibbles(bytes: u64) -> u32 {
    let pairs = (bytes | bytes >> 4) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    (fours | fours >> 16) as u32
}

/// Unpacks the first `codes.len()` codes of a row.
pub fn unpack_row(words: &[u32], bits: u8, codes: &mut [u8]) {
    let bits = bits as usize;
    let mask = (1u64 << bits) - 1;
    for (i, code) in codes.iter_mut().enumerate() {
        let bit = i * bits;
        let mut wide = u64::from(words[bit / 32]);
        if bit % 32 + bits > 32 {
            wide |= u64::from(words[bit / 32 + 1]) << 32;
        }
        *code = ((wide >> (bit % 32)) & mask) as u8;
    }
}

impl Quantized {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_size)
    }

    /// Group of column `c`.
    pub fn group_of(&self, c: usize) -> usize {
        match &self.g_idx {
            Some(g_idx) => g_idx[c] as usize,
            None => c / self.group_size,
        }
    }

    /// Whether one scale serves the whole tensor.
    pub fn is_per_tensor(&self) -> bool {
        matches!(&self.scales, Scales::Float(s) if s.len() == 1) && self.rows * self.groups() != 1
    }

    /// Scale of row `r`, group `g`.
    pub fn scale(&self, r: usize, g: usize) -> f32 {
        match &self.scales {
            Scales::Float(s) if s.len() == 1 => s.get(0),
            Scales::Float(s) => s.get(r * self.groups() + g),
            Scales::Double(double) => double.get(r, g, self.groups()),
        }
    }

    /// What is subtracted in row `r`, group `g`, of a uniform grid; 0 on a codebook.
    pub fn min(&self, r: usize, g: usize) -> f32 {
        if self.codebook.is_some() {
            return 0.0;
        }
        match &self.offsets {
            Offsets::Symmetric => self.scale(r, g) * (1u32 << (self.bits - 1)) as f32,
            Offsets::ZeroPoint(z) if z.len() == 1 => self.scale(r, g) * f32::from(z[0]),
            Offsets::ZeroPoint(z) => self.scale(r, g) * f32::from(z[r * self.groups() + g]),
            Offsets::Min(m) => m.get(r * self.groups() + g),
            Offsets::Double(double) => double.get(r, g, self.groups()),
        }
    }

    /// The codes of row `r`, into `codes` of length `cols`.
    pub fn row_codes(&self, r: usize, codes: &mut [u8]) {
        let words = packed_words_per_row(self.cols, self.bits);
        unpack_row(&self.packed[r * words..(r + 1) * words], self.bits, &mut codes[..self.cols]);
    }

    /// Row `r` as f32, into `out` of length `cols`. The definition of the form: kernels are checked against it.
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        let mut codes = vec![0u8; self.cols];
        self.row_codes(r, &mut codes);
        for (c, (value, &code)) in out.iter_mut().zip(&codes).enumerate() {
            let g = self.group_of(c);
            *value = match &self.codebook {
                Some(codebook) => self.scale(r, g) * f32::from(codebook[code as usize]),
                None => match &self.offsets {
                    // One rounding where the file's own definition has one: scale · (code − zero).
                    Offsets::Symmetric => self.scale(r, g) * (f32::from(code) - (1u32 << (self.bits - 1)) as f32),
                    Offsets::ZeroPoint(z) => {
                        let zero = if z.len() == 1 { z[0] } else { z[r * self.groups() + g] };
                        self.scale(r, g) * (f32::from(code) - f32::from(zero))
                    }
                    Offsets::Min(_) | Offsets::Double(_) => self.scale(r, g) * f32::from(code) - self.min(r, g),
                },
            };
        }
    }

    /// Bytes all parts take.
    pub fn byte_len(&self) -> usize {
        let scales = match &self.scales {
            Scales::Float(s) => s.byte_len(),
            Scales::Double(double) => double.byte_len(),
        };
        let offsets = match &self.offsets {
            Offsets::Symmetric => 0,
            // Stored packed, `bits` each, along the rows.
            Offsets::ZeroPoint(z) => (z.len() * self.bits as usize).div_ceil(8),
            Offsets::Min(m) => m.byte_len(),
            Offsets::Double(double) => double.byte_len(),
        };
        self.packed.byte_len()
            + scales
            + offsets
            + self.codebook.as_ref().map_or(0, Vec::len)
            + self.g_idx.as_ref().map_or(0, Buffer::byte_len)
    }

    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// The first part that does not.
    pub fn validate(&self) -> Result<(), QuantizedError> {
        if !(2..=8).contains(&self.bits) {
            return Err(QuantizedError::Bits(self.bits));
        }
        if self.group_size == 0 {
            return Err(QuantizedError::GroupSize);
        }
        let length = |part, found, expected| {
            if found == expected {
                Ok(())
            } else {
                let (rows, cols, group_size) = (self.rows, self.cols, self.group_size);
                Err(QuantizedError::Length { part, found, expected, rows, cols, group_size })
            }
        };
        let check_span = |span| {
            let groups = self.groups();
            if Double::is_span(span, groups) { Ok(()) } else { Err(QuantizedError::Span { span, groups }) }
        };
        let per_group = self.rows * self.groups();
        length("packed", self.packed.len(), self.rows * packed_words_per_row(self.cols, self.bits))?;
        match &self.scales {
            Scales::Float(s) if s.len() == 1 => {}
            Scales::Float(s) => length("scales", s.len(), per_group)?,
            Scales::Double(double) => {
                check_span(double.span)?;
                length("run scales", double.floats.len(), self.rows * double.spans(self.groups()))?;
                length("scale codes", double.codes.len(), per_group)?;
            }
        }
        match &self.offsets {
            Offsets::Symmetric => {}
            Offsets::ZeroPoint(z) if z.len() == 1 => {}
            Offsets::ZeroPoint(z) => length("zero points", z.len(), per_group)?,
            Offsets::Min(m) => length("mins", m.len(), per_group)?,
            Offsets::Double(double) => {
                check_span(double.span)?;
                length("run mins", double.floats.len(), self.rows * double.spans(self.groups()))?;
                length("min codes", double.codes.len(), per_group)?;
            }
        }
        if let Some(codebook) = &self.codebook {
            if self.bits > 4 || self.offsets != Offsets::Symmetric {
                return Err(QuantizedError::Codebook);
            }
            length("codebook", codebook.len(), 1 << self.bits)?;
        }
        if let Some(g_idx) = &self.g_idx {
            length("g_idx", g_idx.len(), self.cols)?;
            let groups = self.groups();
            if let Some((column, &group)) = g_idx.iter().enumerate().find(|&(_, &g)| g as usize >= groups) {
                return Err(QuantizedError::GroupIndex { column, group, groups });
            }
        }
        Ok(())
    }

    /// Largest magnitude a symmetric grid of `bits` reaches, `2^(bits−1) − 1`: the divisor of the textbook absmax scale.
    pub const fn symmetric_max(bits: u8) -> i32 {
        (1 << (bits - 1)) - 1
    }

    /// `scale` rounded to f16, never to zero or infinity where `scale` is neither.
    pub fn f16_scale(scale: f32) -> f16 {
        let rounded = f16::from_f32(scale);
        if scale != 0.0 && rounded == f16::ZERO {
            f16::MIN_POSITIVE_SUBNORMAL
        } else if scale.is_finite() && rounded.is_infinite() {
            f16::MAX
        } else {
            rounded
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn packing_is_inverse_for_every_width() {
        for bits in 2..=8u8 {
            for cols in [1, 7, 31, 32, 33, 64, 101] {
                let codes: Vec<u8> = (0..cols).map(|i| ((i * 37 + 11) % (1 << bits)) as u8).collect();
                let mut words = vec![u32::MAX; packed_words_per_row(cols, bits)];
                pack_row(&codes, bits, &mut words);
                let mut back = vec![0; cols];
                unpack_row(&words, bits, &mut back);
                assert_eq!(codes, back, "{bits} bits, {cols} columns");
            }
        }
    }

    #[test]
    fn element_i_begins_at_bit_i_times_b() {
        let mut words = [0u32; 2];
        pack_row(&[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7, 5], 3, &mut words);
        // Element 10 (7) takes bits 30..33: two in the first word, one in the second; element 11 (5) bits 33..36.
        assert_eq!(words[0] >> 30, 3);
        assert_eq!(words[1], 1 | (5 << 1));
    }

    #[test]
    fn symmetric_and_zero_point_agree_where_they_must() {
        let codes = [0u8, 8, 15, 3, 9];
        let mut packed = vec![0; 1];
        pack_row(&codes, 4, &mut packed);
        let mut q = Quantized {
            rows: 1,
            cols: 5,
            bits: 4,
            group_size: 4,
            packed: packed.into(),
            scales: Scales::Float(FloatBuffer::from_f32(vec![0.5, 2.0], DType::F16)),
            offsets: Offsets::Symmetric,
            codebook: None,
            g_idx: None,
        };
        q.validate().unwrap();
        let mut out = [0.0; 5];
        q.dequantize_row(0, &mut out);
        assert_eq!(out, [-4.0, 0.0, 3.5, -2.5, 2.0]);
        q.offsets = Offsets::ZeroPoint(vec![8, 8].into());
        let mut same = [0.0; 5];
        q.dequantize_row(0, &mut same);
        assert_eq!(out, same);
        q.g_idx = Some(vec![0, 0, 0, 0, 2].into());
        assert!(matches!(q.validate(), Err(QuantizedError::GroupIndex { column: 4, group: 2, groups: 2 })));
    }
}
