//! A matrix of 8-bit floats with a scale for each block of rows and columns: DeepSeek-V3's weights have one for 128 × 128 elements
//! ("DeepSeek-V3 Technical Report", section 3.3.2), others one a row or one for all.
//!
//! E4M3 ("FP8 Formats for Deep Learning", Micikevicius et al. 2022, section 3): sign, 4 exponent bits of bias 7, 3 mantissa bits; no
//! infinities, the all-ones code of either sign is NaN, the largest magnitude is 448.
//!
//! ```text
//! w[r, c] = E4M3[code[r, c]] · scale[r / block_rows, c / block_cols]
//! ```

use thiserror::Error;

use crate::{Buffer, FloatBuffer};

/// The largest magnitude of a code.
const LARGEST: f32 = 448.0;

/// What each E4M3 code stands for. Every value is exact in BF16 too: 4 significant bits, exponents −9 to 8.
pub const E4M3: [f32; 256] = e4m3_table();

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3(code as u8);
        code += 1;
    }
    table
}

/// One code, by moving its fields to where an f32 has them.
const fn e4m3(code: u8) -> f32 {
    let sign = ((code >> 7) as u32) << 31;
    let (exponent, mantissa) = ((code >> 3) & 15, (code & 7) as u32);
    if exponent == 15 && mantissa == 7 {
        f32::NAN
    } else if exponent == 0 {
        // Subnormal: mantissa · 2^−9.
        let magnitude = mantissa as f32 * (1.0 / 512.0);
        if sign == 0 { magnitude } else { -magnitude }
    } else {
        f32::from_bits(sign | ((exponent as u32 + 127 - 7) << 23) | (mantissa << 20))
    }
}

/// A matrix of E4M3 codes with block scales. See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8 {
    rows: usize,
    cols: usize,
    codes: Buffer<u8>,
    block: (usize, usize),
    scales: FloatBuffer,
}

/// Why the parts of an FP8 matrix do not fit together.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Fp8Error {
    /// More or fewer codes than elements.
    #[error("{found} codes for [{rows}, {cols}]")]
    Codes {
        /// Codes found.
        found: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// More or fewer scales than blocks.
    #[error("{found} scales for {expected} blocks")]
    Scales {
        /// Scales found.
        found: usize,
        /// Blocks.
        expected: usize,
    },
    /// A scale that makes infinities of codes, or is no number.
    #[error("scale {index} is {value}: the largest code times this is no number")]
    Scale {
        /// Its place.
        index: usize,
        /// What it is.
        value: String,
    },
    /// A code that is no number.
    #[error("element [{row}, {col}] is NaN: a model with infinities or NaN gives no results")]
    NotANumber {
        /// The row.
        row: usize,
        /// The column.
        col: usize,
    },
}

impl Fp8 {
    /// A matrix `[rows, cols]` of `codes`, row after row, with a scale for each block of (rows, columns), row of blocks after row of blocks.
    /// A block larger than the matrix is the whole matrix.
    ///
    /// # Errors
    /// Parts of other sizes, scales with which a weight could be infinite, and codes that are no numbers.
    pub fn new(
        rows: usize,
        cols: usize,
        codes: Buffer<u8>,
        block: (usize, usize),
        scales: FloatBuffer,
    ) -> Result<Self, Fp8Error> {
        let block = (block.0.clamp(1, rows.max(1)), block.1.clamp(1, cols.max(1)));
        if rows.checked_mul(cols) != Some(codes.len()) {
            return Err(Fp8Error::Codes { found: codes.len(), rows, cols });
        }
        let expected = rows.div_ceil(block.0) * cols.div_ceil(block.1);
        if scales.len() != expected {
            return Err(Fp8Error::Scales { found: scales.len(), expected });
        }
        let is_sound = |scale: f32| (scale * LARGEST).is_finite();
        if let Some(index) = (0..scales.len()).find(|&i| !is_sound(scales.get(i))) {
            return Err(Fp8Error::Scale { index, value: scales.get(index).to_string() });
        }
        if let Some(at) = first_nan(&codes) {
            return Err(Fp8Error::NotANumber { row: at / cols, col: at % cols });
        }
        Ok(Self { rows, cols, codes, block, scales })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows and columns that share a scale: at most all of them.
    pub fn block(&self) -> (usize, usize) {
        self.block
    }

    /// The codes, row after row.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales, row of blocks after row of blocks.
    pub fn scales(&self) -> &FloatBuffer {
        &self.scales
    }

    /// Scales of a row of blocks.
    pub fn blocks_across(&self) -> usize {
        self.cols.div_ceil(self.block.1)
    }

    /// Bytes stored: codes and scales.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + self.scales.byte_len()
    }

    /// The codes of row `r`.
    pub fn row_codes(&self, r: usize) -> &[u8] {
        &self.codes[r * self.cols..(r + 1) * self.cols]
    }

    /// The scale of the element at row `r`, column `c`.
    pub fn scale(&self, r: usize, c: usize) -> f32 {
        self.scales.get(r / self.block.0 * self.blocks_across() + c / self.block.1)
    }

    /// Row `r` as f32, each product of code and scale rounded once, into `out` of length `cols`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let blocks = self.row_codes(r).chunks(self.block.1).zip(out.chunks_mut(self.block.1));
        for (i, (codes, out)) in blocks.enumerate() {
            let scale = self.scale(r, i * self.block.1);
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = E4M3[usize::from(code)] * scale);
        }
    }
}

/// The first code that is no number. Runs are looked at as a whole, for which there are vectors.
fn first_nan(codes: &[u8]) -> Option<usize> {
    const RUN: usize = 4096;
    let is_nan = |code: u8| code & 0x7f == 0x7f;
    let holds = |run: &[u8]| run.iter().fold(false, |any, &code| any | is_nan(code));
    let run = codes.chunks(RUN).position(holds)? * RUN;
    codes[run..].iter().position(|&code| is_nan(code)).map(|at| run + at)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// All 256 codes by the definition's formula in f64, and landmarks of the paper's table 1.
    #[test]
    fn e4m3_is_its_definition() {
        for code in 0..=255u8 {
            let (s, e, m) = (code >> 7, i32::from((code >> 3) & 15), f64::from(code & 7));
            let value = E4M3[code as usize];
            if e == 15 && m == 7.0 {
                assert!(value.is_nan(), "{code:#04x}");
                continue;
            }
            let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
            let expected = if s == 1 { -magnitude } else { magnitude };
            assert_eq!(f64::from(value), expected, "{code:#04x}");
            assert_eq!(value.is_sign_negative(), s == 1, "{code:#04x}");
            assert_eq!(bf16::from_f32(value).to_f32(), value, "exact in BF16: {code:#04x}");
        }
        assert_eq!(E4M3[0x7e], 448.0);
        assert_eq!(E4M3[0x08], 0.015625);
        assert_eq!(E4M3[0x01], 0.001953125);
        assert_eq!(E4M3[0x38], 1.0);
    }

    #[test]
    fn blocks_have_their_scales_and_parts_must_fit() {
        let codes: Vec<u8> = (0..15).map(|i| 0x38 + i).collect();
        let scales = vec![1.0, 2.0, 4.0, 8.0];
        let floats = |scales: &[f32]| FloatBuffer::F32(scales.to_vec().into());
        let w = Fp8::new(3, 5, codes.clone().into(), (2, 3), floats(&scales)).unwrap();
        let (mut row, at) = (vec![0.0; 5], |i: usize| E4M3[0x38 + i]);
        w.read_row(1, &mut row);
        assert_eq!(row, [at(5), at(6), at(7), 2.0 * at(8), 2.0 * at(9)]);
        w.read_row(2, &mut row);
        assert_eq!(row, [4.0 * at(10), 4.0 * at(11), 4.0 * at(12), 8.0 * at(13), 8.0 * at(14)]);
        assert_eq!(w.byte_len(), 15 + 16);
        let new = |codes: Vec<u8>, scales: &[f32]| Fp8::new(3, 5, codes.into(), (2, 3), floats(scales));
        assert_eq!(new(codes[1..].to_vec(), &scales), Err(Fp8Error::Codes { found: 14, rows: 3, cols: 5 }));
        assert_eq!(new(codes.clone(), &scales[1..]), Err(Fp8Error::Scales { found: 3, expected: 4 }));
        for (scale, value) in
            [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (1e36, "1000000000000000000000000000000000000")]
        {
            let error = Fp8Error::Scale { index: 2, value: value.to_owned() };
            assert_eq!(new(codes.clone(), &[1.0, -2.0, scale, 1.0]), Err(error));
        }
        let mut broken = codes;
        broken[7] = 0xff;
        assert_eq!(new(broken, &scales), Err(Fp8Error::NotANumber { row: 1, col: 2 }));
    }
}
