//! The gate: text that nothing was fitted to, run through a model compressed by a plan and by the best uniform choice of no more bytes.
//! A plan that is no better is not used.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use fourfold_kernels::{Backend, Tensor};
use fourfold_models::{Block, Head, ModelSpec, NoObserver, Role};
use fourfold_tensor::{SourceError, Weight, WeightSink, WeightSource};
use serde::Serialize;

use crate::CompressError;
use crate::calibrate::{Hidden, Overlay};
use crate::hessian::Hessian;
use crate::outcome::log_sum;
use crate::pipeline::{CompressJob, Run};
use crate::plan::Plan;
use crate::planner::stats;
use crate::progress::Progress;

/// Rows whose logits are held at a time.
const ROWS: usize = 64;
/// Bytes of compressed blocks that are kept for the output itself, so that they need not be made twice.
const MOST_KEPT: u64 = 1 << 30;

/// What was found on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gate {
    /// Tokens whose predictions were compared.
    pub tokens: usize,
    /// The planned mix: mean Kullback–Leibler divergence from the original, in nats a token.
    pub planned: f64,
    /// Where a plan had more than quantization in it: its divergence, and that of the best mix of quantized formats alone. The better of them
    /// is the planned one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_all_kinds: Option<f64>,
    /// See [`Gate::of_all_kinds`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_quantized: Option<f64>,
    /// The best uniform choice: the same.
    pub uniform: f64,
    /// Bytes of the uniform choice's tensors.
    pub uniform_bytes: u64,
    /// The uniform choice's format of the layers, and of embeddings and head.
    pub uniform_formats: Vec<String>,
    /// Whether the mix is used.
    pub passed: bool,
}

/// Held-out sequences at one depth of the original and of the compressed model.
pub(crate) struct HeldOut {
    original: Hidden,
    compressed: Hidden,
}

impl HeldOut {
    fn new(
        spec: &ModelSpec,
        original: &dyn WeightSource,
        compressed: &dyn WeightSource,
        backend: &Arc<dyn Backend>,
        sequences: &[Vec<u32>],
    ) -> Result<Self, CompressError> {
        Ok(Self {
            original: Hidden::embed(spec, original, backend, sequences)?,
            compressed: Hidden::embed(spec, compressed, backend, sequences)?,
        })
    }

    /// Through a block of each.
    pub fn forward(&mut self, spec: &ModelSpec, index: usize, original: &Block, compressed: &Block) {
        self.original.forward(spec, index, original, &mut NoObserver, true);
        self.compressed.forward(spec, index, compressed, &mut NoObserver, true);
    }

    /// The mean divergence over all tokens, and how many there are.
    fn divergence(&self, original: &Head, compressed: &Head) -> (f64, usize) {
        mean_divergence(&self.original, original, &self.compressed, compressed)
    }
}

/// The mean over all tokens of the Kullback–Leibler divergence, in nats, of what a head makes of `other` states from what one makes of the
/// `original`'s, and how many tokens there are.
pub(crate) fn mean_divergence(
    original: &Hidden,
    original_head: &Head,
    other: &Hidden,
    other_head: &Head,
) -> (f64, usize) {
    let (mut sum, mut tokens) = (0.0, 0);
    for i in 0..original.len() {
        let (p, q) = (original_head.norm(&original.states(i)), other_head.norm(&other.states(i)));
        for from in (0..p.rows()).step_by(ROWS) {
            let to = (from + ROWS).min(p.rows());
            sum += divergence(&original_head.logits(&rows(&p, from, to)), &other_head.logits(&rows(&q, from, to)));
        }
        tokens += p.rows();
    }
    (sum / tokens.max(1) as f64, tokens)
}

fn rows(x: &Tensor, from: usize, to: usize) -> Tensor {
    let cols = x.cols();
    Tensor::new(to - from, cols, x.host()[from * cols..to * cols].to_vec())
}

/// `Σ p·ln(p/q)` over all rows, for the distributions that two matrices of logits stand for.
fn divergence(p: &Tensor, q: &Tensor) -> f64 {
    let row = |r: usize| {
        let (p, q) = (p.row(r), q.row(r));
        let (sum_p, sum_q) = (log_sum(p), log_sum(q));
        let terms = p.iter().zip(q).map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - sum_p, f64::from(q) - sum_q);
            p.exp() * (p - q)
        });
        terms.sum::<f64>()
    };
    (0..p.rows()).map(row).sum()
}

/// What a trial compression leaves.
#[derive(Default)]
pub(crate) struct Trial {
    /// Mean divergence on held-out text.
    pub divergence: f64,
    /// Tokens compared.
    pub tokens: usize,
    /// Compressed tensors of blocks.
    pub prepared: HashMap<String, Weight>,
    /// Measured errors, by tensor.
    pub errors: HashMap<String, f64>,
    /// Calibration tokens that reached each expert's weights.
    pub coverage: BTreeMap<String, u64>,
}

/// Keeps what is written, up to a size.
struct Shelf<'a> {
    kept: &'a mut HashMap<String, Weight>,
    room: u64,
}

impl WeightSink for Shelf<'_> {
    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError> {
        let bytes = weight.byte_len() as u64;
        if bytes <= self.room {
            self.room -= bytes;
            self.kept.insert(name.to_owned(), weight.clone());
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

impl CompressJob<'_> {
    /// Compresses by a plan in memory, and runs the held-out text through the result. The embedding, which is compressed last because its
    /// Hessian comes last, is compressed first here with that of the original model (`head`).
    pub(crate) fn trial(
        &self,
        stage: &'static str,
        plan: &Plan,
        head: &Hessian,
        backend: &Arc<dyn Backend>,
        keep: bool,
        progress: &mut dyn Progress,
    ) -> Result<Trial, CompressError> {
        let (spec, source) = (self.spec, self.source);
        let mut plan = plan.clone();
        let mut trial = Trial::default();
        let mut tables = Overlay { base: source, replaced: HashMap::new() };
        for weight in spec.weights().iter().filter(|w| w.block.is_none()) {
            let Some(entry) = plan.tensors.iter_mut().find(|e| e.name == weight.name) else { continue };
            let reads_states = weight.role == Role::LmHead || (weight.role == Role::Embedding && spec.tied);
            let hessian = reads_states.then_some(head);
            let moments = hessian.map(Hessian::diagonal);
            let original = source.load(&weight.name)?;
            let done = entry.method()?.compress(&original, stats(hessian, &moments)).map_err(|e| e.of(&weight.name))?;
            tables.replaced.insert(weight.name.clone(), done.weight);
        }
        let held = HeldOut::new(spec, source, &tables, backend, self.held_out)?;
        let mut shelf = Shelf { kept: &mut trial.prepared, room: if keep { MOST_KEPT } else { 0 } };
        let mut run = Run::new(self, &mut shelf, &mut plan, stage);
        run.held = Some(held);
        run.blocks(backend, progress)?;
        let held = run.held.take();
        trial.coverage = std::mem::take(&mut run.coverage);
        drop(run);
        if let Some(held) = held {
            let (original, compressed) = (Head::load(spec, source, backend)?, Head::load(spec, &tables, backend)?);
            (trial.divergence, trial.tokens) = held.divergence(&original, &compressed);
        }
        let errors = plan.tensors.iter().filter_map(|e| e.error.map(|error| (e.name.clone(), error)));
        trial.errors = errors.collect();
        Ok(trial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_none_between_equals_and_known_between_two_coins() {
        let p = Tensor::new(1, 2, vec![0.0, 0.0]);
        assert!(divergence(&p, &Tensor::new(1, 2, vec![7.0, 7.0])).abs() < 1e-12);
        let q = Tensor::new(1, 2, vec![3.0f32.ln(), 0.0]);
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
    }
}
