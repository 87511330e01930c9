//! Log-probabilities of a row of logits.

/// What turns a logit into a log-probability, and the row's most likely token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LogSum {
    /// `ln Σ exp(logit)`.
    pub log_sum: f64,
    /// The first of the largest logits.
    pub best: u32,
}

/// Reads one row. The largest logit is subtracted before exponentiating; sums are in f64.
pub(crate) fn log_sum(logits: &[f32]) -> LogSum {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[best] {
            best = i;
        }
    }
    let max = logits.get(best).copied().unwrap_or(f32::NEG_INFINITY);
    let mut sum = 0.0_f64;
    for block in logits.chunks(1024) {
        sum += f64::from(block.iter().map(|&l| (l - max).exp()).sum::<f32>());
    }
    LogSum { log_sum: f64::from(max) + sum.ln(), best: best as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_definition_and_survives_large_logits() {
        let logits = [1.0_f32, 2.0, 0.5];
        let by_hand = (1.0_f64.exp() + 2.0_f64.exp() + 0.5_f64.exp()).ln();
        let row = log_sum(&logits);
        assert!((row.log_sum - by_hand).abs() < 1e-6 && row.best == 1);
        let large = log_sum(&[1000.0, 1000.0]);
        assert!((large.log_sum - (1000.0 + 2.0_f64.ln())).abs() < 1e-9 && large.best == 0);
    }
}
