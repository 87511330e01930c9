//! How the learning rate moves: a linear warmup from zero, then one of the usual courses, as factors of the peak rate.

use std::f64::consts::PI;

/// The course after the warmup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decay {
    /// The peak rate to the end.
    Constant,
    /// A straight line to the floor.
    Linear,
    /// Half a cosine to the floor (Loshchilov & Hutter 2017, section 3, without restarts).
    Cosine,
    /// The peak rate, then a straight line to the floor over the last `decay_steps` (WSD; Hu et al. 2024, MiniCPM, section 4).
    WarmupStableDecay {
        /// Steps of the final line.
        decay_steps: u64,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Steps of the linear warmup; step 0 already has `1 / warmup_steps` of the peak.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The course after the warmup.
    pub decay: Decay,
    /// The floor, as a factor of the peak.
    pub floor: f64,
}

impl Schedule {
    /// The factor of the peak rate at `step`, counted from 0. From `total_steps` on it is the last step's.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let fall = |begin: u64| {
            let length = self.total_steps.saturating_sub(begin).max(1);
            (step.saturating_sub(begin) as f64 / length as f64).min(1.0)
        };
        let above_floor = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - fall(self.warmup_steps),
            Decay::Cosine => 0.5 * (1.0 + (PI * fall(self.warmup_steps)).cos()),
            Decay::WarmupStableDecay { decay_steps } => {
                1.0 - fall(self.total_steps.saturating_sub(decay_steps).max(self.warmup_steps))
            }
        };
        self.floor + (1.0 - self.floor) * above_floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule { warmup_steps: 10, total_steps: 110, decay, floor: 0.1 }
    }

    #[test]
    fn courses_pass_through_their_points() {
        let close = |decay: Decay, step: u64, expected: f64| {
            let found = schedule(decay).factor(step);
            assert!((found - expected).abs() < 1e-12, "{decay:?} at {step}: {found}, {expected} expected");
        };
        let wsd = Decay::WarmupStableDecay { decay_steps: 20 };
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine, wsd] {
            close(decay, 0, 0.1);
            close(decay, 9, 1.0);
            close(decay, 10, 1.0);
        }
        close(Decay::Constant, 1000, 1.0);
        close(Decay::Linear, 60, 0.55);
        close(Decay::Linear, 110, 0.1);
        close(Decay::Cosine, 60, 0.55);
        close(Decay::Cosine, 35, 0.1 + 0.9 * 0.5 * (1.0 + (PI / 4.0).cos()));
        close(Decay::Cosine, 500, 0.1);
        close(wsd, 90, 1.0);
        close(wsd, 100, 0.55);
        close(wsd, 110, 0.1);
    }

    #[test]
    fn degenerate_lengths_do_not_divide_by_zero() {
        let s = Schedule { warmup_steps: 0, total_steps: 0, decay: Decay::Cosine, floor: 0.0 };
        assert!((0..3).all(|step| s.factor(step).is_finite()));
    }
}
