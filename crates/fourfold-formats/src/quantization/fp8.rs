//! FP8: the E4M3 codes of weights, and weights stored as such codes times a scale for each block.
//!
//! E4M3 ("FP8 Formats for Deep Learning", Micikevicius et al. 2022, section 3): sign, 4 exponent bits of bias 7, 3 mantissa bits;
//! no infinities, the all-ones code of either sign is NaN, the largest magnitude is 448.

use fourfold_tensor::{Buffer, DType, Dense, FloatBuffer};
use half::bf16;

use crate::error::Failure;
use crate::safetensors::{DataFile, Entry};
use crate::{FormatError, Fp8Decode, TensorError};

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

/// What a code of the scale type E8M0 stands for: 2^(code − 127); 255 is NaN.
pub fn e8m0(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // 2^−127 is an f32 subnormal.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Codes read at a time: the decoded tensor is the only large thing in memory.
const CHUNK: usize = 1 << 20;

/// An E4M3 tensor without a scale. BF16 holds it exactly.
pub(crate) fn decode_plain(file: &DataFile, entry: &Entry, fp8: Fp8Decode) -> Result<Dense, FormatError> {
    let cols = entry.shape.last().copied().unwrap_or(1);
    let rows = entry.shape.iter().product::<usize>().checked_div(cols).unwrap_or(0);
    let data = decode(file, entry, (rows, cols), fp8, |_, _| 1.0)?;
    Ok(Dense::new(entry.shape.clone(), data))
}

/// An E4M3 matrix `[N, K]` times `scales` `[ceil(N/rows), ceil(K/cols)]` of `block` (rows, cols).
///
/// Each product is rounded once to f32, and where `fp8` says so once more to BF16: what DeepSeek's own conversion to BF16 does.
pub(crate) fn decode_blocks(
    file: &DataFile,
    entry: &Entry,
    scales: (&DataFile, &Entry),
    block: (usize, usize),
    fp8: Fp8Decode,
) -> Result<Dense, Failure> {
    let &[rows, cols] = entry.shape.as_slice() else {
        return Err(TensorError::NotMatrix { shape: entry.shape.clone() }.into());
    };
    let (block_rows, block_cols) = (block.0.clamp(1, rows.max(1)), block.1.clamp(1, cols.max(1)));
    let (down, across) = (rows.div_ceil(block_rows), cols.div_ceil(block_cols));
    let found = &scales.1.shape;
    // [N] is seen for [N, 1], and [] for [1, 1].
    if found.iter().product::<usize>() != down * across || (found.len() == 2 && *found != [down, across]) {
        let (part, expected) = (scales.1.name.clone(), vec![down, across]);
        return Err(TensorError::PartShape { part, expected, found: found.clone() }.into());
    }
    let scales = read_scales(scales.0, scales.1)?;
    let data = decode(file, entry, (rows, cols), fp8, |r, c| scales[r / block_rows * across + c / block_cols])?;
    Ok(Dense::new(entry.shape.clone(), data))
}

/// Scales of any float type, or E8M0.
fn read_scales(file: &DataFile, entry: &Entry) -> Result<Vec<f32>, Failure> {
    Ok(match entry.dtype {
        DType::F32 => file.read::<f32>(entry)?.to_vec(),
        DType::F16 => FloatBuffer::F16(file.read(entry)?).to_f32(),
        DType::Bf16 => FloatBuffer::Bf16(file.read(entry)?).to_f32(),
        DType::F8E8M0 => file.read::<u8>(entry)?.iter().map(|&c| e8m0(c)).collect(),
        found => {
            let (part, expected) = (entry.name.clone(), "F32, F16, BF16 or F8_E8M0");
            return Err(TensorError::PartDtype { part, expected, found }.into());
        }
    })
}

/// Reads codes by the chunk and writes code times scale.
fn decode(
    file: &DataFile,
    entry: &Entry,
    (rows, cols): (usize, usize),
    fp8: Fp8Decode,
    scale: impl Fn(usize, usize) -> f32,
) -> Result<FloatBuffer, FormatError> {
    let count = rows * cols;
    let mut codes = vec![0; CHUNK.min(count)];
    let (mut wide, mut narrow) = match fp8 {
        Fp8Decode::F32 => (Vec::with_capacity(count), Vec::new()),
        Fp8Decode::Bf16 => (Vec::new(), Vec::with_capacity(count)),
    };
    let (mut r, mut c) = (0, 0);
    for from in (0..count).step_by(CHUNK) {
        let codes = &mut codes[..CHUNK.min(count - from)];
        file.read_bytes(entry, from as u64, codes)?;
        for &code in &*codes {
            let value = E4M3[code as usize] * scale(r, c);
            match fp8 {
                Fp8Decode::F32 => wide.push(value),
                Fp8Decode::Bf16 => narrow.push(bf16::from_f32(value)),
            }
            c += 1;
            if c == cols {
                (r, c) = (r + 1, 0);
            }
        }
    }
    Ok(match fp8 {
        Fp8Decode::F32 => FloatBuffer::F32(Buffer::Owned(wide)),
        Fp8Decode::Bf16 => FloatBuffer::Bf16(Buffer::Owned(narrow)),
    })
}

#[cfg(test)]
mod tests {
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
    fn e8m0_is_a_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0(code)), 2f64.powi(i32::from(code) - 127), "{code}");
        }
        assert!(e8m0(255).is_nan());
    }
}
