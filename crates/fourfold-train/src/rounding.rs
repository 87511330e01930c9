//! Rounding f32 to bf16.
//!
//! Nearest rounding loses every update smaller than half a bf16 step (2⁻⁹ of the weight), and training in pure bf16 stalls.
//! Stochastic rounding goes up with the probability of the part cut off, so that its expectation is the exact value and small
//! updates add up (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.1; Zamirai et al. 2020).

use half::bf16;

/// Rounds up or down with probabilities that make the expectation exact. `random`: 16 uniform bits (the low half is used).
/// Infinities stay; NaN stays NaN; a finite value never becomes infinite.
#[inline(always)]
pub fn stochastic_bf16(value: f32, random: u32) -> bf16 {
    // Without a branch, so that loops are vectorised.
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(random & 0xffff) >> 16;
    // The largest finite bf16 must not carry into the exponent of infinity; infinity and NaN (which stays one: its upper half
    // is given a quiet bit) are cut off as well.
    let quiet = if bits & 0x7fff_ffff > 0x7f80_0000 { 0x40 } else { 0 };
    let cut = (bits >> 16) | quiet;
    bf16::from_bits(if rounded & 0x7fff >= 0x7f80 { cut } else { rounded } as u16)
}

/// bf16 with 8 more bits of the exact value beside it: 24 of f32's 32 bits, 3 bytes a weight. The residual is the upper half
/// of the 16 bits that bf16 cuts off, rounded to nearest.
#[inline(always)]
pub fn split_bf16_residual(value: f32) -> (bf16, u8) {
    if !value.is_finite() {
        return (bf16::from_f32(value), 0);
    }
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x80);
    let rounded = if (rounded >> 16) & 0x7fff >= 0x7f80 { bits } else { rounded };
    (bf16::from_bits((rounded >> 16) as u16), (rounded >> 8) as u8)
}

/// The value that [`split_bf16_residual`] stored.
#[inline(always)]
pub fn join_bf16_residual(high: bf16, residual: u8) -> f32 {
    f32::from_bits(u32::from(high.to_bits()) << 16 | u32::from(residual) << 8)
}

/// Rounds a group to 8-bit codes, `scale · (code − 128)` with the largest magnitude at 127, and returns the scale. Each of
/// `random` divided by 2³² is the part of a step that is added before the rest is cut off: uniform words make the
/// expectation exact, as in [`stochastic_bf16`].
#[inline(always)]
pub fn quantize_int8(values: &[f32], random: &[u32], codes: &mut [u8]) -> f32 {
    const STEPS: f32 = 127.0;
    // Magnitudes are ordered as their bits are, whose comparison is vectorised.
    let mut largest = 0;
    for v in values {
        largest = v.abs().to_bits().max(largest);
    }
    let scale = f32::from_bits(largest) / STEPS;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    for ((code, &value), &word) in codes.iter_mut().zip(values).zip(random) {
        let part = (word >> 8) as f32 * (1.0 / (1 << 24) as f32);
        let step = (value * inverse + part).floor().clamp(-STEPS, STEPS);
        // A whole number below 2²³ is the lower bits of its sum with 2²³: a cast would not be vectorised.
        *code = (step + 128.0 + (1 << 23) as f32).to_bits() as u8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    /// Adds `update` to 1.0 a thousand times, rounding after each.
    fn drift(update: f32, round: impl Fn(f32, usize) -> bf16) -> f32 {
        let mut weight = bf16::ONE;
        (0..1000).for_each(|i| weight = round(weight.to_f32() + update, i));
        weight.to_f32()
    }

    #[test]
    fn small_updates_add_up_and_nearest_rounding_loses_them() {
        let update = 1e-3; // an eighth of the step of bf16 above 1
        let n = 200;
        let mean: f32 = (0..n)
            .map(|seed| {
                let stream = Stream::new(seed, 0, 0);
                drift(update, |v, i| stochastic_bf16(v, stream.word(i)))
            })
            .sum::<f32>()
            / n as f32;
        assert!((mean - 2.0).abs() < 0.02, "{mean}, 2 expected");
        // The control: the same updates vanish without a trace.
        assert_eq!(drift(update, |v, _| bf16::from_f32(v)), 1.0);
    }

    #[test]
    fn exact_values_and_extremes_stay() {
        for value in [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY, bf16::MAX.to_f32(), bf16::MIN.to_f32()] {
            assert_eq!(stochastic_bf16(value, 0xffff).to_f32().to_bits(), value.to_bits());
        }
        assert!(stochastic_bf16(f32::NAN, 0xffff).is_nan());
        assert!(stochastic_bf16(f32::MAX, 0xffff).is_finite());
        assert!(split_bf16_residual(f32::MAX).0.is_finite());
    }

    #[test]
    fn residual_keeps_sixteen_bits_of_mantissa() {
        let stream = Stream::new(3, 1, 4);
        for i in 0..10_000 {
            let value = (stream.unit(i) - 0.5) * 8.0;
            let (high, residual) = split_bf16_residual(value);
            let error = (join_bf16_residual(high, residual) - value).abs();
            assert!(error <= value.abs() * 2f32.powi(-16), "{value}: {error}");
        }
    }
}
