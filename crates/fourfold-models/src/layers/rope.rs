//! Rotary position embedding (RoPE, Su et al. 2021) and its extensions to longer contexts.

use std::f64::consts::PI;
use std::sync::{Arc, Mutex, PoisonError};

use fourfold_kernels::{Backend, RopeSpec, Tensor};

use super::{Pass, TrainPass};

/// How the angles are stretched for contexts longer than the model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    Default,
    /// All angles divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are short.
        high_freq_factor: f64,
        /// The context trained on.
        original_positions: f64,
    },
    /// YaRN (Peng et al. 2023, section 3): angles blended by dimension, cos and sin multiplied by `attention_factor`.
    Yarn {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Rotations over the original context above which an angle is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// The context trained on.
        original_positions: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
        /// Whether the blend's ends are rounded to whole dimensions (they are, unless the configuration says no).
        truncate: bool,
    },
    /// The angle of each pair divided by its own factor; cos and sin multiplied by `attention_factor`.
    Factors {
        /// Divisors, one a pair.
        factors: Vec<f64>,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

/// The rotation of a model's query and key heads.
#[derive(Clone, Debug, PartialEq)]
pub struct RotarySpec {
    /// Rotated elements of a head; even.
    pub dim: usize,
    /// Base of the wavelengths.
    pub theta: f64,
    /// Context extension.
    pub scaling: RotaryScaling,
}

impl RotarySpec {
    /// Radians a position for each of the `dim / 2` pairs, in f32 as the models were trained.
    pub fn frequencies(&self) -> Vec<f32> {
        let pairs = self.dim / 2;
        let base: Vec<f64> = (0..pairs).map(|i| 1.0 / self.theta.powf((2 * i) as f64 / self.dim as f64)).collect();
        let scaled = |frequency: f64, pair: usize| match &self.scaling {
            RotaryScaling::Default => frequency,
            RotaryScaling::Linear { factor } => frequency / factor,
            RotaryScaling::Factors { factors, .. } => frequency / factors.get(pair).copied().unwrap_or(1.0),
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let wavelength = 2.0 * PI / frequency;
                if wavelength > original_positions / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_positions / high_freq_factor {
                    frequency
                } else {
                    let smooth =
                        (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
            RotaryScaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, .. } => {
                let dimension_of = |rotations: f64| {
                    self.dim as f64 * (original_positions / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension_of(*beta_fast), dimension_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * divided + frequency * (1.0 - divided)
            }
        };
        base.into_iter().enumerate().map(|(pair, frequency)| scaled(frequency, pair) as f32).collect()
    }

    /// Factor of cos and sin.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RotaryScaling::Yarn { attention_factor, .. } | RotaryScaling::Factors { attention_factor, .. } => {
                attention_factor
            }
            RotaryScaling::Default | RotaryScaling::Linear { .. } | RotaryScaling::Llama3 { .. } => 1.0,
        }
    }

    /// Bytes of the tables once `positions` have been seen.
    pub fn table_bytes(&self, positions: u64) -> u64 {
        Rotary::table_positions(positions as usize) as u64 * self.dim as u64 * size_of::<f32>() as u64
    }
}

/// YaRN's growth of the attention logits with the stretch, `0.1 · mscale · ln(factor) + 1`; 1 where nothing is stretched.
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// cos and sin, `[positions, dim / 2]` each.
struct Tables {
    cos: Tensor,
    sin: Tensor,
}

/// Tables of rotations, computed for the positions reached so far and shared by the layers that rotate alike. They lie where the
/// backend that asks for them first computes.
pub struct Rotary {
    spec: RotarySpec,
    frequencies: Vec<f32>,
    tables: Mutex<Option<Arc<Tables>>>,
}

impl Rotary {
    /// Tables for no position yet.
    pub fn new(spec: RotarySpec) -> Self {
        let frequencies = spec.frequencies();
        Self { spec, frequencies, tables: Mutex::new(None) }
    }

    /// What the tables are made for.
    pub fn spec(&self) -> &RotarySpec {
        &self.spec
    }

    /// Rotates part of each head of `x`, see [`RopeSpec`].
    pub fn apply(&self, x: &mut Tensor, rope: &RopeSpec, pass: &Pass) {
        let tokens = x.rows() / rope.heads;
        let tables = self.tables(rope.first_position + tokens, pass.backend);
        pass.backend.rope(x, &tables.cos, &tables.sin, rope);
    }

    /// Rotates in training: row t of `x` is at `pass.positions[t]`; `rope.first_position` is not used.
    pub(crate) fn train_apply(&self, x: &mut Tensor, rope: &RopeSpec, pass: &TrainPass) {
        let Tables { cos, sin } = self.packed(pass);
        pass.backend.rope(x, &cos, &sin, &RopeSpec { first_position: 0, ..*rope });
    }

    /// The gradient of [`Rotary::train_apply`], in place.
    pub(crate) fn backward(&self, dx: &mut Tensor, rope: &RopeSpec, pass: &TrainPass) {
        let Tables { cos, sin } = self.packed(pass);
        pass.backend.rope_backward(dx, &cos, &sin, &RopeSpec { first_position: 0, ..*rope });
    }

    /// A row of the tables for each row of the batch.
    fn packed(&self, pass: &TrainPass) -> Tables {
        let last = pass.positions.iter().copied().max().unwrap_or(0);
        let tables = self.tables(last + 1, pass.backend);
        let rows = |table: &Tensor| pass.backend.gather_rows(table, pass.positions);
        Tables { cos: rows(&tables.cos), sin: rows(&tables.sin) }
    }

    fn tables(&self, positions: usize, backend: &dyn Backend) -> Arc<Tables> {
        let mut held = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some(tables) if tables.cos.rows() >= positions => Arc::clone(tables),
            Some(_) | None => {
                let positions = Self::table_positions(positions);
                let made = Arc::new(tables(&self.frequencies, self.spec.attention_factor(), positions, backend));
                *held = Some(Arc::clone(&made));
                made
            }
        }
    }

    /// Positions the tables are made for when `positions` are asked for: doubling keeps the work linear.
    fn table_positions(positions: usize) -> usize {
        positions.next_power_of_two().max(256)
    }
}

fn tables(frequencies: &[f32], factor: f64, positions: usize, backend: &dyn Backend) -> Tables {
    let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
    let (sin, cos) = angles.map(|a| ((a.sin() * factor) as f32, (a.cos() * factor) as f32)).unzip();
    let tensor = |values| backend.tensor(positions, frequencies.len(), values);
    Tables { cos: tensor(cos), sin: tensor(sin) }
}

#[cfg(test)]
mod tests {
    use fourfold_kernels::Reference;

    use super::*;

    fn frequencies(dim: usize, theta: f64, scaling: RotaryScaling) -> Vec<f32> {
        RotarySpec { dim, theta, scaling }.frequencies()
    }

    #[test]
    fn wavelengths_grow_geometrically() {
        assert_eq!(frequencies(4, 100.0, RotaryScaling::Default), [1.0, 0.1]);
        assert_eq!(frequencies(4, 100.0, RotaryScaling::Linear { factor: 4.0 }), [0.25, 0.025]);
        let factors = RotaryScaling::Factors { factors: vec![2.0, 5.0], attention_factor: 1.0 };
        assert_eq!(frequencies(4, 100.0, factors), [0.5, 0.02]);
    }

    /// Short wavelengths are kept, long ones divided, in both blends.
    #[test]
    fn extensions_keep_the_fast_and_divide_the_slow() {
        let plain = frequencies(64, 10_000.0, RotaryScaling::Default);
        let original_positions = 4096.0;
        for scaling in [
            RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions },
            RotaryScaling::Yarn {
                factor: 8.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_positions,
                attention_factor: 1.0,
                truncate: true,
            },
        ] {
            let stretched = frequencies(64, 10_000.0, scaling);
            let ratios: Vec<f32> = plain.iter().zip(&stretched).map(|(p, s)| p / s).collect();
            assert_eq!(ratios[0], 1.0);
            assert!((ratios[31] - 8.0).abs() < 1e-3, "{ratios:?}");
            assert!(ratios.is_sorted_by(|a, b| *a <= b + 1e-4), "{ratios:?}");
            assert!(ratios.iter().any(|r| (1.5..7.5).contains(r)), "{ratios:?}");
        }
    }

    #[test]
    fn tables_grow_and_agree_with_themselves() {
        let rotary = Rotary::new(RotarySpec { dim: 4, theta: 100.0, scaling: RotaryScaling::Default });
        let early = rotary.tables(3, &Reference);
        let late = rotary.tables(1000, &Reference);
        assert!(early.cos.rows() >= 3 && late.cos.rows() >= 1000);
        assert_eq!(early.sin.row(2), late.sin.row(2));
        assert_eq!(late.cos.row(10), [10f32.cos(), 1f32.cos()]);
        assert_eq!(rotary.spec().table_bytes(1000), (2 * late.cos.host().len() * 4) as u64);
    }
}
