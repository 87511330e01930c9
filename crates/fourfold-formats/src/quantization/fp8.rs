//! FP8: weights stored as E4M3 codes, most often with a scale for each block. Matrices stay so in memory ([`Fp8`]).

use fourfold_tensor::{Buffer, DType, Dense, E4M3, FloatBuffer, Fp8, Weight};
use half::bf16;

use crate::TensorError;
use crate::error::Failure;
use crate::safetensors::{DataFile, Entry};

/// What a code of the scale type E8M0 stands for: 2^(code − 127); 255 is NaN.
pub fn e8m0(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // 2^−127 is an f32 subnormal.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// An E4M3 tensor without a scale. A matrix stays as it is, others become BF16, which holds them exactly.
pub(crate) fn load_plain(file: &DataFile, entry: &Entry) -> Result<Weight, Failure> {
    let codes: Buffer<u8> = file.read(entry)?;
    if let &[rows, cols] = entry.shape.as_slice()
        && !codes.is_empty()
    {
        let scale = FloatBuffer::F32(vec![1.0].into());
        let whole = (usize::MAX, usize::MAX);
        return Ok(Fp8::new(rows, cols, codes, whole, scale).map_err(TensorError::from)?.into());
    }
    let values: Vec<bf16> = codes.iter().map(|&code| bf16::from_f32(E4M3[usize::from(code)])).collect();
    Ok(Dense::new(entry.shape.clone(), FloatBuffer::Bf16(values.into())).into())
}

/// An E4M3 matrix `[N, K]` times `scales` `[ceil(N/rows), ceil(K/cols)]` of `block` (rows, cols).
pub(crate) fn load_blocks(
    file: &DataFile,
    entry: &Entry,
    scales: (&DataFile, &Entry),
    block: (usize, usize),
) -> Result<Weight, Failure> {
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
    Ok(Fp8::new(rows, cols, file.read(entry)?, block, scales).map_err(TensorError::from)?.into())
}

/// Scales of any float type; E8M0 becomes F32.
fn read_scales(file: &DataFile, entry: &Entry) -> Result<FloatBuffer, Failure> {
    Ok(match entry.dtype {
        DType::F32 => FloatBuffer::F32(file.read(entry)?),
        DType::F16 => FloatBuffer::F16(file.read(entry)?),
        DType::Bf16 => FloatBuffer::Bf16(file.read(entry)?),
        DType::F8E8M0 => FloatBuffer::F32(file.read::<u8>(entry)?.iter().map(|&c| e8m0(c)).collect::<Vec<_>>().into()),
        found => {
            let (part, expected) = (entry.name.clone(), "F32, F16, BF16 or F8_E8M0");
            return Err(TensorError::PartDtype { part, expected, found }.into());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e8m0_is_a_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0(code)), 2f64.powi(i32::from(code) - 127), "{code}");
        }
        assert!(e8m0(255).is_nan());
    }
}
