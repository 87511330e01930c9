//! Choosing a group's scale and offset: the textbook rule, or the least weighted squared error.
//!
//! The search tries scales over a range that suits the group's peak-to-mean ratio, scores each by the error that remains after
//! the scale is refitted to the codes it gave (least squares), and tries more of them around the best. [`super::sweep`] scores
//! all candidates at once.

use super::grid::{ScaleRule, ZeroKind};
use super::lattice::{Group, Lattice, round_small};
use super::sweep::{CANDIDATES, energy, project, range, regress};
use crate::vector::vectorized;

/// Regressions that follow one another where offsets are real.
const MIN_ROUNDS: usize = 2;

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
    pub(crate) fn fit(&self, x: &[f32], h: &[f32]) -> Group {
        let (low, high) = vectorized!(range(x));
        let largest = high.max(-low);
        match (self.rule, self.zero) {
            (ScaleRule::Absmax, ZeroKind::Symmetric) => {
                let levels = fourfold_tensor::Quantized::symmetric_max(self.bits) as f32;
                return Group { scale: largest / levels, zero: self.middle(), ..Group::default() };
            }
            (ScaleRule::Absmax, _) => return self.over_range(low, high),
            (ScaleRule::Search, _) => {}
        }
        // Squares of such values leave f32's range: the textbook rule forms none.
        if !(1e-15..1e15).contains(&largest) {
            return match self.zero {
                ZeroKind::Symmetric => Group { scale: largest / self.reach(), zero: self.middle(), ..Group::default() },
                ZeroKind::ZeroPoint | ZeroKind::Min => self.over_range(low, high),
            };
        }
        // Weights of zero alone say nothing: then every element counts the same.
        let h = if h.iter().any(|&h| h > 0.0) { h } else { &[] };
        match self.zero {
            ZeroKind::Symmetric => self.fit_symmetric(x, h, if high > -low { high } else { low }),
            ZeroKind::ZeroPoint => self.fit_zero_point(x, h, low, high),
            ZeroKind::Min => self.fit_min(x, h, low, high),
        }
    }

    /// The uniform grid over the range `low..high` and zero.
    fn over_range(&self, low: f32, high: f32) -> Group {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let top = ((1u32 << self.bits) - 1) as f32;
        let scale = (high - low) / top;
        match self.zero {
            ZeroKind::Min => Group { scale, min: -low, ..Group::default() },
            ZeroKind::Symmetric | ZeroKind::ZeroPoint => {
                let zero = if scale > 0.0 { round_small((-low / scale).clamp(0.0, top)) } else { 0.0 };
                Group { scale, zero, ..Group::default() }
            }
        }
    }

    fn fit_symmetric(&self, x: &[f32], h: &[f32], extreme: f32) -> Group {
        let zero = self.middle();
        let (square, weight) = vectorized!(energy(x, h));
        let rms = (square / weight).sqrt().max(extreme.abs() * 1e-3);
        let reach = self.reach();
        // A negative scale maps a positive extreme to the lowest level, of which a symmetric integer grid has one more.
        let sign =
            if self.signed && extreme > 0.0 && matches!(self.lattice, Lattice::Uniform { .. }) { -1.0 } else { 1.0 };
        let unit = sign * reach / extreme.abs();
        // A ratio is the level that the extreme would have, in units of the last level there is.
        let lowest = 0.8f32;
        let highest = (extreme.abs() / (rms * best_clip(self.bits)) * 1.25).clamp(1.15, 8.0);
        // Roots instead of powers: sixteenths of the range, and eighths of a step; rounded alike on every machine.
        let root = |x: f32, halvings: u32| (0..halvings).fold(x, |x, _| x.sqrt());
        let coarse = root(highest / lowest, CANDIDATES.ilog2());
        let (mut most, mut scale, mut centre) = (0.0, 0.0, lowest);
        // From one coarse step below the best to one above.
        let fine = root(coarse, (CANDIDATES / 2).ilog2());
        for sweep in [false, true] {
            let (mut ratio, step) = if sweep { (centre / coarse * fine, fine) } else { (lowest, coarse) };
            let mut ratios = [0.0; CANDIDATES];
            let mut inverses = [0.0; CANDIDATES];
            for (slot, inverse) in ratios.iter_mut().zip(&mut inverses) {
                (*slot, *inverse) = (ratio, unit * ratio);
                ratio *= step;
            }
            let sums = project(&self.lattice, x, h, &inverses, &[zero; CANDIDATES]);
            let (k, share) = sums.best();
            if share > most {
                (most, scale, centre) = (share, sums.scale(k), ratios[k]);
            }
        }
        Group { scale, zero, ..Group::default() }
    }

    fn fit_zero_point(&self, x: &[f32], h: &[f32], low: f32, high: f32) -> Group {
        let full = self.over_range(low, high);
        if full.scale == 0.0 {
            return Group { zero: self.middle(), ..Group::default() };
        }
        let top = ((1u32 << self.bits) - 1) as f32;
        let shrink = if self.bits <= 3 { 0.5 } else { 0.35 };
        // The range as it is at first, then drawn together about its middle.
        let (mut inverses, mut centres) = ([0.0f32; CANDIDATES], [0.0f32; CANDIDATES]);
        for (i, (inverse, centre)) in inverses.iter_mut().zip(&mut centres).enumerate() {
            let share = 1.04 - shrink * i as f32 / (CANDIDATES - 1) as f32;
            *inverse = 1.0 / (full.scale * share);
            *centre = round_small(full.zero + (1.0 / share - 1.0) * (full.zero - top / 2.0));
        }
        let (mut most, mut group) = (0.0, full);
        for shift in [0.0, -1.0, 1.0] {
            let mut zeros = centres;
            for zero in &mut zeros {
                *zero = (*zero + shift).clamp(0.0, top);
            }
            let sums = project(&self.lattice, x, h, &inverses, &zeros);
            let (k, share) = sums.best();
            if share > most {
                most = share;
                group = Group { scale: sums.scale(k), zero: zeros[k], ..Group::default() };
            }
        }
        group
    }

    /// Least squares in scale and offset: the codes of `x + min` give the next pair, as in a linear regression.
    fn fit_min(&self, x: &[f32], h: &[f32], low: f32, high: f32) -> Group {
        let top = ((1u32 << self.bits) - 1) as f32;
        if low == high {
            // One value: any scale will do, and the offset is the value.
            return Group { scale: 0.0, zero: 0.0, min: -low, code: 0 };
        }
        let middle = (low + high) / 2.0;
        let mut groups: [Group; CANDIDATES] = std::array::from_fn(|i| {
            let share = 1.04 - 0.4 * i as f32 / (CANDIDATES - 1) as f32;
            Group { scale: (high - low) * share / top, min: -(middle - (middle - low) * share), ..Group::default() }
        });
        let mut best = (f64::INFINITY, groups[0]);
        for round in 0..=MIN_ROUNDS {
            let moments = regress(top, x, h, &groups);
            for (group, m) in groups.iter_mut().zip(&moments) {
                // What the codes leave with the scale and offset that gave them.
                let error = m.residual(f64::from(group.scale), f64::from(group.min));
                if error < best.0 {
                    best = (error, *group);
                }
                if let (true, Some((scale, min))) = (round < MIN_ROUNDS, m.line()) {
                    *group = Group { scale: scale as f32, min: min as f32, ..Group::default() };
                }
            }
        }
        best.1
    }
}
