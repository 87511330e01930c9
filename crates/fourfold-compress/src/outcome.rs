//! What a compression cost: text that nothing was fitted to, run through the original and through what was written, block by block.

use std::sync::Arc;

use fourfold_kernels::{Backend, Tensor};
use fourfold_models::{Block, Head, ModelSpec, NoObserver};
use fourfold_tensor::WeightSource;
use serde::Serialize;

use crate::CompressError;
use crate::calibrate::Hidden;
use crate::progress::Progress;

/// Rows whose logits are held at a time.
const ROWS: usize = 64;

/// A model against its original on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Tokens whose predictions were compared.
    pub tokens: usize,
    /// Mean Kullback–Leibler divergence of the compressed model's predictions from the original's, in nats a token.
    pub mean_kld: f64,
    /// Share of the tokens where both have the same first choice.
    pub top1_agreement: f64,
    /// Perplexity of the original.
    pub original_perplexity: f64,
    /// Perplexity of the compressed model.
    pub perplexity: f64,
}

/// Sums over tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    kld: f64,
    agreed: usize,
    predicted: usize,
    original_loss: f64,
    loss: f64,
}

/// Runs `sequences` through both models, one block of each in memory at a time.
///
/// # Errors
/// A tensor that cannot be loaded.
pub fn outcome(
    spec: &ModelSpec,
    original: &dyn WeightSource,
    compressed: &dyn WeightSource,
    backend: &Arc<dyn Backend>,
    sequences: &[Vec<u32>],
    progress: &mut dyn Progress,
) -> Result<Outcome, CompressError> {
    let total = spec.blocks.len() as u64 + 1;
    let mut p = Hidden::embed(spec, original, backend, sequences)?;
    let mut q = Hidden::embed(spec, compressed, backend, sequences)?;
    for index in 0..spec.blocks.len() {
        progress.update("held-out text", index as u64, total);
        p.forward(spec, index, &Block::load(spec, index, original, backend)?, &mut NoObserver, true);
        q.forward(spec, index, &Block::load(spec, index, compressed, backend)?, &mut NoObserver, true);
    }
    progress.update("held-out text", total - 1, total);
    let (head_p, head_q) = (Head::load(spec, original, backend)?, Head::load(spec, compressed, backend)?);
    let mut sums = Sums::default();
    for (i, ids) in sequences.iter().enumerate() {
        let (p, q) = (head_p.norm(&p.states(i)), head_q.norm(&q.states(i)));
        for from in (0..p.rows()).step_by(ROWS) {
            let to = (from + ROWS).min(p.rows());
            let (p, q) = (head_p.logits(&rows(&p, from, to)), head_q.logits(&rows(&q, from, to)));
            for at in from..to {
                sums.add(p.row(at - from), q.row(at - from), ids.get(at + 1).copied());
            }
        }
    }
    progress.update("held-out text", total, total);
    Ok(sums.outcome())
}

fn rows(x: &Tensor, from: usize, to: usize) -> Tensor {
    let cols = x.cols();
    Tensor::new(to - from, cols, x.host()[from * cols..to * cols].to_vec())
}

impl Sums {
    /// A token's logits from both models, and the token that follows it in the text, if any.
    fn add(&mut self, p: &[f32], q: &[f32], next: Option<u32>) {
        let (sum_p, sum_q) = (log_sum(p), log_sum(q));
        let term = |(&p, &q): (&f32, &f32)| {
            let (p, q) = (f64::from(p) - sum_p, f64::from(q) - sum_q);
            p.exp() * (p - q)
        };
        self.tokens += 1;
        self.kld += p.iter().zip(q).map(term).sum::<f64>();
        self.agreed += usize::from(first_choice(p) == first_choice(q));
        let next = next.map(|id| id as usize).and_then(|id| Some((*p.get(id)?, *q.get(id)?)));
        if let Some((p, q)) = next {
            self.predicted += 1;
            self.original_loss += sum_p - f64::from(p);
            self.loss += sum_q - f64::from(q);
        }
    }

    fn outcome(&self) -> Outcome {
        let (tokens, predicted) = (self.tokens.max(1) as f64, self.predicted.max(1) as f64);
        Outcome {
            tokens: self.tokens,
            mean_kld: self.kld / tokens,
            top1_agreement: self.agreed as f64 / tokens,
            original_perplexity: (self.original_loss / predicted).exp(),
            perplexity: (self.loss / predicted).exp(),
        }
    }
}

/// The logarithm of a row's summed exponentials.
pub(crate) fn log_sum(row: &[f32]) -> f64 {
    let largest = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let sum: f64 = row.iter().map(|&v| f64::from((v - largest).exp())).sum();
    f64::from(largest) + sum.ln()
}

fn first_choice(row: &[f32]) -> usize {
    let larger = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_coins_differ_by_what_is_known() {
        let mut sums = Sums::default();
        // Fair; and three heads in four.
        sums.add(&[0.0, 0.0], &[3.0f32.ln(), 0.0], Some(1));
        let found = sums.outcome();
        let kld = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((found.mean_kld - kld).abs() < 1e-6, "{found:?}");
        assert!((found.original_perplexity - 2.0).abs() < 1e-6 && (found.perplexity - 4.0).abs() < 1e-5, "{found:?}");
        assert_eq!((found.tokens, found.top1_agreement), (1, 1.0));
        // The last token of a text has no next one; another first choice is counted.
        sums.add(&[0.0, 1.0], &[1.0, 0.0], None);
        let found = sums.outcome();
        assert_eq!((found.tokens, found.top1_agreement), (2, 0.5));
        assert!((found.perplexity - 4.0).abs() < 1e-5, "{found:?}");
    }
}
