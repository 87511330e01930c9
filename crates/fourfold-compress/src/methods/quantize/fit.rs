//! Choosing a group's scale and offset: the textbook rule, or the least weighted squared error.
//!
//! The search tries scales over a range that suits the group's peak-to-mean ratio, scores each by the error that remains after
//! the scale is refitted to the codes it gave (least squares), and halves its step around the best twice.

use super::grid::{ScaleRule, ZeroKind};
use super::lattice::{Group, Lattice};
use crate::vector::{LANES, dot};

/// Candidates of the first, coarse sweep.
const COARSE: usize = 12;
/// Halvings of the step afterwards.
const HALVINGS: usize = 2;

/// How to fit groups of one grid.
#[derive(Clone, Debug)]
pub(crate) struct Fitter {
    pub lattice: Lattice,
    pub bits: u8,
    pub zero: ZeroKind,
    pub rule: ScaleRule,
    /// Whether the stored scale may be negative, which gives a symmetric integer grid its lowest level on either side.
    pub signed: bool,
}

/// Buffers of a thread.
#[derive(Default)]
pub(crate) struct Scratch {
    x: Vec<f32>,
    h: Vec<f32>,
}

/// Clipping point, in standard deviations, that is best for a Gaussian at so many bits (Max 1960, table II, rounded).
fn best_clip(bits: u8) -> f32 {
    match bits {
        0..=2 => 1.5,
        3 => 2.05,
        4 => 2.6,
        5 => 3.1,
        6 => 3.6,
        7 => 4.1,
        8.. => 4.6,
    }
}

impl Fitter {
    /// The zero of a symmetric grid's codes; 0 for a codebook.
    fn middle(&self) -> f32 {
        match self.lattice {
            Lattice::Uniform { .. } => (1u32 << (self.bits - 1)) as f32,
            Lattice::Codebook { .. } => 0.0,
        }
    }

    /// The largest magnitude of a level.
    fn reach(&self) -> f32 {
        match &self.lattice {
            Lattice::Uniform { .. } => self.middle(),
            Lattice::Codebook { levels, .. } => levels.iter().fold(0.0f32, |m, v| m.max(v.abs())),
        }
    }

    /// Scale and offset for values `x` with weights `h` (all 1 where empty). Not yet rounded to their storage.
    #[inline(always)]
    pub(crate) fn fit(&self, x: &[f32], h: &[f32], scratch: &mut Scratch) -> Group {
        match (self.rule, self.zero) {
            (ScaleRule::Absmax, ZeroKind::Symmetric) => {
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let levels = fourfold_tensor::Quantized::symmetric_max(self.bits) as f32;
                return Group { scale: largest / levels, zero: self.middle(), ..Group::default() };
            }
            (ScaleRule::Absmax, _) => return self.range(x, 1.0),
            (ScaleRule::Search, _) => {}
        }
        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // Squares of such values leave f32's range: the textbook rule forms none.
        if !(1e-15..1e15).contains(&largest) {
            return match self.zero {
                ZeroKind::Symmetric => Group { scale: largest / self.reach(), zero: self.middle(), ..Group::default() },
                ZeroKind::ZeroPoint | ZeroKind::Min => self.range(x, 1.0),
            };
        }
        let padded = x.len().next_multiple_of(LANES);
        scratch.x.clear();
        scratch.x.extend_from_slice(x);
        scratch.x.resize(padded, 0.0);
        scratch.h.clear();
        // Weights of zero alone say nothing: then every element counts the same.
        if h.iter().any(|&h| h > 0.0) {
            scratch.h.extend_from_slice(h);
        } else {
            scratch.h.resize(x.len(), 1.0);
        }
        scratch.h.resize(padded, 0.0);
        match self.zero {
            ZeroKind::Symmetric => self.fit_symmetric(&scratch.x, &scratch.h),
            ZeroKind::ZeroPoint => self.fit_zero_point(x, &scratch.x, &scratch.h),
            ZeroKind::Min => self.fit_min(x, &scratch.x, &scratch.h),
        }
    }

    /// The uniform grid over `share` of the range of `x` and zero.
    fn range(&self, x: &[f32], share: f32) -> Group {
        let low = x.iter().fold(0.0f32, |m, &v| m.min(v)) * share;
        let high = x.iter().fold(0.0f32, |m, &v| m.max(v)) * share;
        let top = ((1u32 << self.bits) - 1) as f32;
        let scale = (high - low) / top;
        match self.zero {
            ZeroKind::Min => Group { scale, min: -low, ..Group::default() },
            ZeroKind::Symmetric | ZeroKind::ZeroPoint => {
                let zero = if scale > 0.0 { (-low / scale).round_ties_even().clamp(0.0, top) } else { 0.0 };
                Group { scale, zero, ..Group::default() }
            }
        }
    }

    #[inline(always)]
    fn fit_symmetric(&self, x: &[f32], h: &[f32]) -> Group {
        let zero = self.middle();
        let mut extreme = 0.0f32;
        let mut square = 0.0f32;
        let mut weight = 0.0f32;
        for (&x, &h) in x.iter().zip(h) {
            if x.abs() > extreme.abs() {
                extreme = x;
            }
            square += h * x * x;
            weight += h;
        }
        if extreme == 0.0 {
            return Group { zero, ..Group::default() };
        }
        let rms = (square / weight).sqrt().max(extreme.abs() * 1e-3);
        let reach = self.reach();
        // A negative scale maps a positive extreme to the lowest level, of which a symmetric integer grid has one more.
        let sign =
            if self.signed && extreme > 0.0 && matches!(self.lattice, Lattice::Uniform { .. }) { -1.0 } else { 1.0 };
        let unit = sign * reach / extreme.abs();
        // `ratio` is the level that the extreme would have, in units of the last level there is.
        let lowest = 0.8f32;
        let highest = (extreme.abs() / (rms * best_clip(self.bits)) * 1.25).clamp(1.15, 8.0);
        // One loop for the sweep and the refinement, so that the projection below is compiled once, for vectors: a closure here
        // would be compiled for the baseline processor.
        let mut step = (highest / lowest).powf(1.0 / (COARSE - 1) as f32);
        let mut best = (0.0f32, 0.0f32, lowest);
        let mut centre = lowest;
        for i in 0..COARSE + 2 * HALVINGS {
            let ratio = if i < COARSE {
                lowest * step.powi(i as i32)
            } else if (i - COARSE).is_multiple_of(2) {
                step = step.sqrt();
                centre = best.2;
                centre / step
            } else {
                centre * step
            };
            let (xv, vv) = self.lattice.project(x, h, unit * ratio, zero);
            if vv > 0.0 && xv / vv * xv > best.0 {
                best = (xv / vv * xv, xv / vv, ratio);
            }
        }
        Group { scale: best.1, zero, ..Group::default() }
    }

    #[inline(always)]
    fn fit_zero_point(&self, raw: &[f32], x: &[f32], h: &[f32]) -> Group {
        let full = self.range(raw, 1.0);
        if full.scale == 0.0 {
            return Group { zero: self.middle(), ..Group::default() };
        }
        let top = ((1u32 << self.bits) - 1) as f32;
        let mut best = (0.0f32, full);
        let mut shares = [0.0f32; COARSE];
        let shrink = if self.bits <= 3 { 0.5 } else { 0.35 };
        for (i, share) in shares.iter_mut().enumerate() {
            *share = 1.04 - shrink * i as f32 / (COARSE - 1) as f32;
        }
        for share in shares {
            let scale = full.scale * share;
            let centre = (full.zero + (1.0 / share - 1.0) * (full.zero - top / 2.0)).round_ties_even();
            for shift in [0.0, -1.0, 1.0] {
                let zero = (centre + shift).clamp(0.0, top);
                let (xv, vv) = self.lattice.project(x, h, 1.0 / scale, zero);
                let score = if vv > 0.0 { xv / vv * xv } else { 0.0 };
                if score > best.0 {
                    best = (score, Group { scale: xv / vv, zero, ..Group::default() });
                }
            }
        }
        best.1
    }

    /// Least squares in scale and offset: the codes of `x + min` give the next pair, as in a linear regression.
    #[inline(always)]
    fn fit_min(&self, raw: &[f32], x: &[f32], h: &[f32]) -> Group {
        let full = self.range(raw, 1.0);
        let low = raw.iter().fold(f32::INFINITY, |m, &v| m.min(v));
        let high = raw.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        let top = ((1u32 << self.bits) - 1) as f32;
        if low == high {
            // One value: any scale will do, and the offset is the value.
            return Group { scale: 0.0, zero: 0.0, min: -low, code: 0 };
        }
        let weight: f32 = h.iter().sum();
        let hx = dot(h, x);
        let mut best = (f32::INFINITY, full);
        for i in 0..COARSE {
            let share = 1.04 - 0.4 * i as f32 / (COARSE - 1) as f32;
            let middle = (low + high) / 2.0;
            let mut group = Group {
                scale: (high - low) * share / top,
                min: -(middle - (middle - low) * share),
                ..Group::default()
            };
            for _ in 0..2 {
                let (mut hv, mut hvv, mut hxv) = (0.0f32, 0.0f32, 0.0f32);
                for (&x, &h) in x.iter().zip(h) {
                    let v = f32::from(self.lattice.encode(x, &group));
                    hv += h * v;
                    hvv += h * v * v;
                    hxv += h * x * v;
                }
                let determinant = weight * hvv - hv * hv;
                if determinant <= 0.0 {
                    break;
                }
                let scale = (weight * hxv - hx * hv) / determinant;
                let min = (hv * hxv - hvv * hx) / determinant;
                if scale <= 0.0 {
                    break;
                }
                group = Group { scale, min, ..Group::default() };
            }
            let error: f32 = x
                .iter()
                .zip(h)
                .map(|(&x, &h)| {
                    let d = x - self.lattice.value(self.lattice.encode(x, &group), &group);
                    h * d * d
                })
                .sum();
            if error < best.0 {
                best = (error, group);
            }
        }
        best.1
    }
}
