//! Dynamic loss scaling for fp16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).
//!
//! Gradients below 2⁻²⁴ vanish in fp16. The loss is multiplied by a scale before the backward pass and the gradients are
//! divided by it before the update. The scale grows while all goes well; a step whose gradients are not finite is skipped
//! whole and the scale shrinks. The defaults are those of PyTorch's `GradScaler`.

/// The scale and how it moves.
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    scale: f32,
    growth: f32,
    backoff: f32,
    growth_interval: u32,
    good_steps: u32,
}

/// What to do with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its gradients are finite.
    Apply,
    /// Some gradient is infinite or NaN: nothing of the step may be applied.
    Skip,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self { scale: 65536.0, growth: 2.0, backoff: 0.5, growth_interval: 2000, good_steps: 0 }
    }
}

impl LossScaler {
    /// A scaler that resumes where another stopped.
    pub fn resume(scale: f32, good_steps: u32) -> Self {
        Self { scale, good_steps, ..Self::default() }
    }

    /// The factor of the loss.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Good steps since the scale last moved.
    pub fn good_steps(&self) -> u32 {
        self.good_steps
    }

    /// Moves the scale after a step whose gradients were all finite, or not.
    pub fn update(&mut self, finite: bool) -> Verdict {
        if !finite {
            // Never to zero: a scale of 0 would make every later gradient vanish.
            self.scale = (self.scale * self.backoff).max(f32::MIN_POSITIVE);
            self.good_steps = 0;
            return Verdict::Skip;
        }
        self.good_steps += 1;
        if self.good_steps == self.growth_interval {
            let grown = self.scale * self.growth;
            if grown.is_finite() {
                self.scale = grown;
            }
            self.good_steps = 0;
        }
        Verdict::Apply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_after_two_thousand_good_steps_and_halves_at_once() {
        let mut scaler = LossScaler::default();
        (0..1999).for_each(|_| assert_eq!(scaler.update(true), Verdict::Apply));
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(true);
        assert_eq!(scaler.scale(), 131_072.0);
        assert_eq!(scaler.update(false), Verdict::Skip);
        assert_eq!((scaler.scale(), scaler.good_steps()), (65536.0, 0));
        // A bad step in between starts the count anew.
        (0..1999).for_each(|_| assert_eq!(scaler.update(true), Verdict::Apply));
        scaler.update(false);
        (0..1999).for_each(|_| assert_eq!(scaler.update(true), Verdict::Apply));
        assert_eq!(scaler.scale(), 32768.0);
    }

    #[test]
    fn never_reaches_zero_or_infinity() {
        let mut scaler = LossScaler::default();
        (0..400).for_each(|_| assert_eq!(scaler.update(false), Verdict::Skip));
        assert!(scaler.scale() > 0.0);
        let mut scaler = LossScaler::resume(f32::MAX / 1.5, 0);
        (0..4000).for_each(|_| assert_eq!(scaler.update(true), Verdict::Apply));
        assert!(scaler.scale().is_finite());
    }
}
