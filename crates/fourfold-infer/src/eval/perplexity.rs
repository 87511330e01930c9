//! Perplexity: the exponential of the mean negative log-probability of the tokens that came.

use serde::Serialize;

/// Sums over the tokens scored so far.
#[derive(Clone, Debug, Default)]
pub struct Perplexity {
    tokens: usize,
    weight: f64,
    sum: f64,
    sum_of_squares: f64,
    right: usize,
}

/// The figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PerplexityReport {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean negative log-likelihood, in nats a token.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Standard error of the perplexity, as llama.cpp computes it: the standard error of the loss times the perplexity.
    pub standard_error: f64,
    /// Share of tokens that were the model's first choice.
    pub top1_accuracy: f64,
}

impl Perplexity {
    /// One more token: its negative log-probability, what it counts, and whether it was the model's first choice.
    pub fn add(&mut self, nll: f64, weight: f64, right: bool) {
        self.tokens += 1;
        self.weight += weight;
        self.sum += nll * weight;
        self.sum_of_squares += nll * nll * weight;
        self.right += usize::from(right);
    }

    /// The figures so far; NaN before the first token.
    pub fn report(&self) -> PerplexityReport {
        let loss = self.sum / self.weight;
        let variance = (self.sum_of_squares / self.weight - loss * loss).max(0.0);
        let perplexity = loss.exp();
        PerplexityReport {
            tokens: self.tokens,
            loss,
            perplexity,
            standard_error: perplexity * (variance / (self.weight - 1.0).max(1.0)).sqrt(),
            top1_accuracy: self.right as f64 / self.tokens as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Probabilities 1/2, 1/4, 1/8: perplexity is the inverse of their geometric mean, 4.
        let mut p = Perplexity::default();
        for probability in [0.5_f64, 0.25, 0.125] {
            p.add(-probability.ln(), 1.0, probability > 0.4);
        }
        let report = p.report();
        assert!((report.perplexity - 4.0).abs() < 1e-12);
        // Losses are ln2 · (1, 2, 3): variance 2/3 · ln2², over two degrees of freedom.
        let error = 4.0 * (2.0_f64 / 3.0 / 2.0).sqrt() * 2.0_f64.ln();
        assert!((report.standard_error - error).abs() < 1e-12, "{report:?}");
        assert!((report.top1_accuracy - 1.0 / 3.0).abs() < 1e-12);
    }
}
