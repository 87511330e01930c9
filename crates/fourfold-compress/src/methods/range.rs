//! Numbers that are stored as f16: below 2⁻¹⁴ it holds them ever more coarsely, below 2⁻²⁵ as zero, and beyond 65,504
//! not at all.

use half::f16;

use crate::MethodError;

/// The least largest scale of a tensor that f16 holds to 3 %.
const LEAST_SCALE: f32 = 1.0 / (1 << 20) as f32;
/// The same of scales that 8-bit codes multiply (double quantization): the codes make up for what rounding them loses,
/// to 13 %.
const LEAST_ROW_SCALE: f32 = 1.0 / (1 << 22) as f32;

/// What is stored as f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// A scale for each group.
    Scales,
    /// A scale for each row of double quantization.
    RowScales,
    /// A scale for each group of a pruned tensor's codes, for which there is no other type.
    CodeScales,
    /// Offsets of groups.
    Offsets,
    /// The values themselves.
    Values,
    /// Scales of ggml's blocks, before the small integers of their groups.
    Blocks,
}

/// Refuses a tensor whose `values`, as rounded to f16, are too small or too large for it. Zeros alone are no fault; nor
/// are small values beside large ones, for which they do not count.
///
/// # Errors
/// [`MethodError::BeyondF16`].
pub(crate) fn check_f16(values: &[f32], stored: Stored) -> Result<(), MethodError> {
    let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let least = match stored {
        Stored::RowScales | Stored::Blocks => LEAST_ROW_SCALE,
        Stored::Scales | Stored::CodeScales | Stored::Offsets | Stored::Values => LEAST_SCALE,
    };
    if largest == 0.0 || (least..f16::MAX.to_f32()).contains(&largest) {
        return Ok(());
    }
    let (what, remedy) = match stored {
        Stored::Scales => ("scales", "give it \"scales\": \"bf16\" or \"f32\" in a plan (--write-plan, then --plan)"),
        Stored::RowScales => {
            ("row scales", "give it \"scales\": \"bf16\" or \"f32\" in a plan (--write-plan, then --plan)")
        }
        Stored::CodeScales => ("scales", "keep its values as bf16 or f32 instead of codes"),
        Stored::Offsets => ("offsets", "give it \"zero\": \"zero_point\" in a plan (--write-plan, then --plan)"),
        Stored::Values => ("values", "store it as bf16"),
        Stored::Blocks => ("block scales", "store it as bf16 or f32"),
    };
    Err(MethodError::BeyondF16 { what, largest, remedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_f16_spoils_is_refused() {
        for (values, stored, is_held) in [
            (&[0.0, 0.0][..], Stored::Scales, true),
            (&[1e-8, 0.01], Stored::Scales, true),
            (&[1e-8, 5e-7], Stored::Scales, false),
            (&[5e-7], Stored::RowScales, true),
            (&[6e-8], Stored::RowScales, false),
            (&[-0.3], Stored::Offsets, true),
            (&[65504.0], Stored::Scales, false),
            (&[f32::INFINITY], Stored::Values, false),
        ] {
            assert_eq!(check_f16(values, stored).is_ok(), is_held, "{values:?} {stored:?}");
        }
    }
}
