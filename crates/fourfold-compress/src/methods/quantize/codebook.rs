//! Levels that suit a tensor: Lloyd's algorithm (1982) on its own groups, each divided by its own best scale.

use fourfold_tensor::Weight;

use super::fit::Fitter;
use super::grid::{GridSpec, ScaleRule, ZeroKind};
use super::lattice::Lattice;
use super::store::read_finite;
use crate::MethodError;
use crate::vector::vectorized;

/// Weights that are looked at: enough for the levels to settle to within an 8-bit step.
const SAMPLE: usize = 1 << 14;
/// Rounds of fitting scales and moving levels.
const ROUNDS: usize = 6;

/// Levels of the least-error quantizer of a Gaussian, positive half (Max 1960, table I).
fn gaussian(bits: u8) -> &'static [f32] {
    match bits {
        2 => &[0.4528, 1.510],
        3 => &[0.2451, 0.7560, 1.344, 2.152],
        _ => &[0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    }
}

/// Levels as 8-bit integers, the largest at 127.
fn to_i8(levels: &[f32]) -> Vec<i8> {
    let largest = levels.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    levels.iter().map(|v| (v / largest * 127.0).round() as i8).collect()
}

/// The Gaussian's levels, ascending, the largest at 127.
pub(crate) fn start(bits: u8) -> Vec<f32> {
    let half = gaussian(bits);
    let largest = half[half.len() - 1];
    let negative = half.iter().rev().map(|v| -v / largest * 127.0);
    negative.chain(half.iter().map(|v| v / largest * 127.0)).collect()
}

/// Learns levels for `weight` on the grid `spec`, each column's error weighted by `h` (all equal where empty).
///
/// # Errors
/// A sampled value that is not finite.
pub(crate) fn learn(weight: &Weight, spec: &GridSpec, h: &[f32]) -> Result<Vec<i8>, MethodError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let size = spec.group_size(cols);
    let mut levels = start(spec.bits);
    if rows == 0 || cols == 0 {
        return Ok(to_i8(&levels));
    }
    let wanted = (SAMPLE / cols).clamp(1, rows);
    let mut sample = vec![0.0f32; wanted * cols];
    for (i, row) in sample.chunks_exact_mut(cols).enumerate() {
        read_finite(weight, i * rows / wanted, row)?;
    }
    for _ in 0..ROUNDS {
        let fitter = Fitter {
            lattice: Lattice::codebook(levels.clone()),
            bits: spec.bits,
            zero: ZeroKind::Symmetric,
            rule: ScaleRule::Search,
            signed: false,
        };
        // For each level: Σ h s x and Σ h s², whose quotient is the level with the least error.
        let mut sums = vec![(0.0f64, 0.0f64); levels.len()];
        vectorized!({
            for row in sample.chunks_exact(cols) {
                for (g, x) in row.chunks(size).enumerate() {
                    let h = if h.is_empty() { h } else { &h[g * size..g * size + x.len()] };
                    let group = fitter.fit(x, h);
                    for (c, &value) in x.iter().enumerate() {
                        let weight = if h.is_empty() { 1.0 } else { h[c] };
                        let code = fitter.lattice.encode(value, &group);
                        let sum = &mut sums[code as usize];
                        sum.0 += f64::from(weight * group.scale * value);
                        sum.1 += f64::from(weight * group.scale * group.scale);
                    }
                }
            }
        });
        for (level, (up, down)) in levels.iter_mut().zip(&sums) {
            if *down > 0.0 {
                *level = (up / down) as f32;
            }
        }
        levels.sort_by(f32::total_cmp);
        let largest = levels.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        if largest == 0.0 {
            return Ok(to_i8(&start(spec.bits)));
        }
        levels.iter_mut().for_each(|v| *v *= 127.0 / largest);
    }
    Ok(to_i8(&levels))
}
