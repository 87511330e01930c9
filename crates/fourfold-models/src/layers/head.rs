//! The end of the stack: final norm, and the projection to the vocabulary or, in a sequence classifier, to the classes.

use std::sync::Arc;

use fourfold_kernels::backward::IGNORE;
use fourfold_kernels::{Backend, Tensor};

use super::embedding::EMBEDDING;
use super::{Embedding, Gradients, Linear, LinearSpec, Norm, NormSpec, Pass, TrainPass};
use crate::loader::{Loader, Weights};
use crate::{ModelError, ModelSpec, NoObserver, Observer, Role, WeightSpec};

const LM_HEAD: &str = "lm_head";
/// A sequence classifier's projection, as transformers' `*ForSequenceClassification` name it. The last token of a text is
/// scored: the one token that has seen all of it.
const SCORE: &str = "score";

/// Final norm and output projection; the projection may be the embedding matrix itself (tied).
pub struct Head {
    backend: Arc<dyn Backend>,
    norm: Norm,
    lm_head: Linear,
    tied: bool,
}

impl Head {
    /// Its tensors: the norm, and the projection where it is not tied.
    pub fn weights(spec: &ModelSpec) -> Vec<WeightSpec> {
        let mut weights = vec![norm_spec(spec).weight()];
        if !spec.tied {
            weights.extend(lm_head_spec(spec).weights());
        }
        weights
    }

    /// Reads norm and projection; a tied projection is read from the embedding tensor.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or cannot be taken by the backend.
    pub fn load<'a>(
        spec: &ModelSpec,
        source: impl Into<Weights<'a>>,
        backend: &Arc<dyn Backend>,
    ) -> Result<Self, ModelError> {
        let loader = Loader::new(source, &**backend);
        let lm_head = if spec.tied {
            Linear::shared(EMBEDDING.to_owned(), loader.matrix(EMBEDDING, spec.vocab_size, spec.hidden_size)?)
        } else {
            Linear::load(&lm_head_spec(spec), &loader)?
        };
        Ok(Self {
            backend: Arc::clone(backend),
            norm: Norm::load(&norm_spec(spec), &loader)?,
            lm_head,
            tied: spec.tied,
        })
    }

    /// As [`Head::load`]; a tied projection shares `embedding`'s memory.
    ///
    /// # Errors
    /// As [`Head::load`].
    pub fn load_sharing<'a>(
        spec: &ModelSpec,
        source: impl Into<Weights<'a>>,
        backend: &Arc<dyn Backend>,
        embedding: &Embedding,
    ) -> Result<Self, ModelError> {
        if !spec.tied {
            return Self::load(spec, source, backend);
        }
        let loader = Loader::new(source, &**backend);
        Ok(Self {
            backend: Arc::clone(backend),
            norm: Norm::load(&norm_spec(spec), &loader)?,
            lm_head: Linear::shared(EMBEDDING.to_owned(), embedding.shared_weight()),
            tied: true,
        })
    }

    /// The final norm: x `[tokens, hidden]` to the same shape.
    pub fn norm(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x, &Pass { backend: &*self.backend, observer: &mut NoObserver })
    }

    /// Scores of every token of the vocabulary, `[rows, vocab]`, from normed hidden rows `[rows, hidden]`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        self.logits_observed(x, &mut NoObserver)
    }

    /// As [`Head::logits`], with the projection's input shown to `observer`.
    pub fn logits_observed(&self, x: &Tensor, observer: &mut dyn Observer) -> Tensor {
        self.lm_head.forward(x, &mut Pass { backend: &*self.backend, observer })
    }

    /// Cross-entropy of x `[tokens, hidden]` (before the final norm) against `targets`
    /// ([`fourfold_kernels::backward::IGNORE`] for tokens not scored): each token's loss in nats, and the gradient of
    /// `factor · Σ losses` with respect to x. Holds the logits of `chunk` tokens at a time.
    pub fn loss_backward(
        &self,
        x: &Tensor,
        targets: &[u32],
        factor: f32,
        chunk: usize,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> (Vec<f32>, Tensor) {
        let mut d_normed = Tensor::zeros(x.rows(), x.cols());
        let losses = self.chunked_loss(x, targets, factor, chunk, pass, &mut |rows, part, d_logits| {
            let d_part = self.lm_head.backward(part, d_logits, pass, gradients);
            pass.backend.scatter_add_rows(&mut d_normed, &d_part, rows, &vec![1.0; rows.len()]);
        });
        let dx = self.norm.backward(x, &d_normed, pass, gradients);
        (losses, dx)
    }

    /// The losses of [`Head::loss_backward`] alone, and how many of the scored tokens have their target as the first of the
    /// highest outputs.
    pub fn loss(&self, x: &Tensor, targets: &[u32], chunk: usize, pass: &TrainPass) -> (Vec<f32>, usize) {
        let mut correct = 0;
        let scored: Vec<usize> = (0..targets.len()).filter(|&i| targets[i] != IGNORE).collect();
        let targets: Vec<u32> = scored.iter().map(|&i| targets[i]).collect();
        let x = pass.backend.gather_rows(x, &scored);
        let losses = self.chunked_loss(&x, &targets, 1.0, chunk, pass, &mut |rows, _, d_logits| {
            // Of `softmax − onehot` the target's element alone is negative; it is the highest output where the softmax has
            // nothing higher.
            correct += rows.iter().enumerate().filter(|&(i, &row)| is_highest(d_logits.row(i), targets[row])).count();
        });
        (losses, correct)
    }

    /// Each token's loss; `visit` is given the rows, normed inputs and logits' gradient of each chunk.
    fn chunked_loss(
        &self,
        x: &Tensor,
        targets: &[u32],
        factor: f32,
        chunk: usize,
        pass: &TrainPass,
        visit: &mut dyn FnMut(&[usize], &Tensor, &Tensor),
    ) -> Vec<f32> {
        let normed = self.norm(x);
        let chunk = chunk.clamp(1, x.rows().max(1));
        let mut losses = Vec::with_capacity(targets.len());
        for first in (0..x.rows()).step_by(chunk) {
            let rows: Vec<usize> = (first..x.rows().min(first + chunk)).collect();
            let part = pass.backend.gather_rows(&normed, &rows);
            let [mut logits] = Linear::train_forward_shared([&self.lm_head], &part, pass);
            losses.extend(pass.backend.cross_entropy(&mut logits, &targets[first..first + rows.len()], factor));
            visit(&rows, &part, &logits);
        }
        losses
    }

    /// Bytes in memory; a tied projection is the embedding's and not counted.
    pub fn byte_len(&self) -> usize {
        self.norm.byte_len() + if self.tied { 0 } else { self.lm_head.byte_len() }
    }
}

/// Whether no output is higher than the target's, given the gradient `softmax − onehot`.
fn is_highest(gradient: &[f32], target: u32) -> bool {
    let Some(own) = gradient.get(target as usize).map(|d| d + 1.0) else { return false };
    gradient.iter().enumerate().all(|(i, &other)| i == target as usize || other <= own)
}

fn norm_spec(spec: &ModelSpec) -> NormSpec {
    NormSpec { name: "model.norm".to_owned(), size: spec.hidden_size, eps: spec.norm_eps }
}

fn lm_head_spec(spec: &ModelSpec) -> LinearSpec {
    LinearSpec {
        name: if spec.classes.is_some() { SCORE } else { LM_HEAD }.to_owned(),
        outputs: spec.outputs(),
        inputs: spec.hidden_size,
        bias: false,
        role: Role::LmHead,
    }
}
