//! How far one model's predictions lie from another's: the figure that says what a compression cost, on any text.

use serde::Serialize;

use super::softmax::LogSum;

/// What one position says of two models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Kullback–Leibler divergence `Σ p_base · ln(p_base / p)`, in nats.
    pub kld: f64,
    /// Whether both have the same first choice.
    pub same_top: bool,
    /// Probability of the token that came, minus what the base model gave it.
    pub delta_p: f64,
}

/// Compares two rows of logits. `base` is the original's.
pub(crate) fn compare(base: &[f32], b: LogSum, logits: &[f32], m: LogSum, target: u32) -> Comparison {
    let shift = (b.log_sum - m.log_sum) as f32;
    let base_sum = b.log_sum as f32;
    let mut kld = 0.0_f64;
    for (base, logits) in base.chunks(1024).zip(logits.chunks(1024)) {
        // ln p_base − ln p = (base − logit) − (log_sum_base − log_sum).
        let block = base.iter().zip(logits).map(|(&x, &y)| {
            let p = (x - base_sum).exp();
            if p > 0.0 { p * (x - y - shift) } else { 0.0 }
        });
        kld += f64::from(block.sum::<f32>());
    }
    let probability = |row: &[f32], s: LogSum| (f64::from(row[target as usize]) - s.log_sum).exp();
    Comparison { kld, same_top: b.best == m.best, delta_p: probability(logits, m) - probability(base, b) }
}

/// Sums over the positions compared so far.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    klds: Vec<f32>,
    sum: f64,
    sum_of_squares: f64,
    same_top: usize,
    delta: f64,
    delta_squared: f64,
}

/// The figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DivergenceReport {
    /// Positions compared.
    pub tokens: usize,
    /// Mean Kullback–Leibler divergence from the original, in nats a token.
    pub mean_kld: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// Median.
    pub median_kld: f64,
    /// 99th percentile.
    pub p99_kld: f64,
    /// Largest.
    pub max_kld: f64,
    /// Share of positions where both models have the same first choice.
    pub top1_agreement: f64,
    /// Mean change of the probability given to the token that came.
    pub mean_delta_p: f64,
    /// Root mean square of that change.
    pub rms_delta_p: f64,
}

impl Divergence {
    /// One more position.
    pub fn add(&mut self, c: Comparison) {
        self.klds.push(c.kld as f32);
        self.sum += c.kld;
        self.sum_of_squares += c.kld * c.kld;
        self.same_top += usize::from(c.same_top);
        self.delta += c.delta_p;
        self.delta_squared += c.delta_p * c.delta_p;
    }

    /// The figures so far; NaN before the first position.
    pub fn report(&self) -> DivergenceReport {
        let n = self.klds.len() as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        let mut sorted = self.klds.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let quantile = |q: f64| {
            let at = (q * (n - 1.0)).round().max(0.0) as usize;
            sorted.get(at).map_or(f64::NAN, |&v| f64::from(v))
        };
        DivergenceReport {
            tokens: self.klds.len(),
            mean_kld: mean,
            standard_error: (variance / (n - 1.0).max(1.0)).sqrt(),
            median_kld: quantile(0.5),
            p99_kld: quantile(0.99),
            max_kld: quantile(1.0),
            top1_agreement: self.same_top as f64 / n,
            mean_delta_p: self.delta / n,
            rms_delta_p: (self.delta_squared / n).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::softmax::log_sum;

    fn compare_rows(base: &[f32], logits: &[f32], target: u32) -> Comparison {
        compare(base, log_sum(base), logits, log_sum(logits), target)
    }

    #[test]
    fn by_hand() {
        // p_base = (1/2, 1/2), p = (1/4, 3/4).
        let base = [0.0_f32, 0.0];
        let model = [0.25_f32.ln(), 0.75_f32.ln()];
        let c = compare_rows(&base, &model, 1);
        let kld = 0.5 * (0.5_f64 / 0.25).ln() + 0.5 * (0.5_f64 / 0.75).ln();
        assert!((c.kld - kld).abs() < 1e-6, "{c:?}");
        assert!((c.delta_p - 0.25).abs() < 1e-6);
        assert!(!c.same_top, "the first of two equal logits against the second");
    }

    #[test]
    fn zero_from_itself_and_blind_to_a_constant_but_not_to_noise() {
        let logits: Vec<f32> = (0..3000).map(|i| ((i * 7919) % 613) as f32 * 0.01).collect();
        let c = compare_rows(&logits, &logits, 5);
        assert_eq!((c.kld, c.same_top, c.delta_p), (0.0, true, 0.0));
        let shifted: Vec<f32> = logits.iter().map(|l| l + 3.0).collect();
        assert!(compare_rows(&logits, &shifted, 5).kld.abs() < 1e-5);
        let noisy: Vec<f32> = logits.iter().enumerate().map(|(i, l)| l + ((i % 3) as f32 - 1.0) * 0.3).collect();
        assert!(compare_rows(&logits, &noisy, 5).kld > 0.02);
    }

    #[test]
    fn mean_error_and_quantiles() {
        let mut d = Divergence::default();
        for kld in [0.1, 0.3, 0.2, 0.4, 0.5] {
            d.add(Comparison { kld, same_top: kld < 0.35, delta_p: -kld });
        }
        let r = d.report();
        assert!((r.mean_kld - 0.3).abs() < 1e-12 && (r.mean_delta_p + 0.3).abs() < 1e-12);
        assert!((r.standard_error - (0.02_f64 / 4.0).sqrt()).abs() < 1e-9);
        assert!((r.median_kld - 0.3).abs() < 1e-6 && (r.max_kld - 0.5).abs() < 1e-6);
        assert!((r.top1_agreement - 0.6).abs() < 1e-12);
    }
}
