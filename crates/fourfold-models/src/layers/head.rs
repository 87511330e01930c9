//! The end of the stack: final norm, and the projection to the vocabulary or, in a sequence classifier, to the classes.

use std::sync::Arc;

use fourfold_kernels::backward::{IGNORE, SoftTargets};
use fourfold_kernels::{Backend, Bf16Tensor, Tensor};

use super::embedding::EMBEDDING;
use super::{Embedding, Gradients, Linear, LinearSpec, Norm, NormSpec, Pass, TrainPass};
use crate::loader::{Loader, Weights};
use crate::{ModelError, ModelSpec, NoObserver, Observer, Role, WeightSpec};

const LM_HEAD: &str = "lm_head";
/// Name of an own output projection's tensor.
pub(crate) const LM_HEAD_WEIGHT: &str = "lm_head.weight";
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
        self.norm.forward(x, &Pass { backend: &*self.backend, observer: &mut NoObserver, dropout: None })
    }

    /// Scores of every token of the vocabulary, `[rows, vocab]`, from normed hidden rows `[rows, hidden]`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        self.logits_observed(x, &mut NoObserver)
    }

    /// As [`Head::logits`], with the projection's input shown to `observer`.
    pub fn logits_observed(&self, x: &Tensor, observer: &mut dyn Observer) -> Tensor {
        self.lm_head.forward(x, &mut Pass { backend: &*self.backend, observer, dropout: None })
    }

    /// Loss of x `[tokens, hidden]` (before the final norm) against `goals`: each token's loss in nats, and the gradient of
    /// `factor · Σ losses` with respect to x, in x's memory. Holds the normed rows and the logits of `chunk` tokens at a time, and the
    /// teacher's.
    pub fn loss_backward(
        &self,
        mut x: Tensor,
        goals: &Goals,
        factor: f32,
        chunk: usize,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> (Vec<f32>, Tensor) {
        let mut losses = Vec::with_capacity(x.rows());
        let rounded = self.lm_head.rounds_input(pass);
        let chunk = chunk.clamp(1, x.rows().max(1));
        for start in (0..x.rows()).step_by(chunk) {
            let end = x.rows().min(start + chunk);
            let part = pass.backend.rows(&x, start..end);
            let normed = self.norm.for_products(&part, rounded, pass);
            let [mut logits] = Linear::train_forward_shared([&self.lm_head], normed.input(), pass);
            let rows: Vec<usize> = (start..end).collect();
            losses.extend(goals.losses(&rows, &mut logits, factor, pass));
            let d_normed = self.lm_head.backward(normed.input(), &logits, pass, gradients);
            drop((normed, logits));
            let dx = self.norm.backward(&part, &d_normed, pass, gradients);
            pass.backend.set_rows(&mut x, start, &dx);
        }
        (losses, x)
    }

    /// The losses of [`Head::loss_backward`] alone, over the scored tokens.
    pub fn loss(&self, x: &Tensor, goals: &Goals, chunk: usize, pass: &TrainPass) -> HeadLoss {
        let scored: Vec<usize> = (0..goals.targets.len()).filter(|&i| goals.targets[i] != IGNORE).collect();
        let normed = self.norm(&pass.backend.gather_rows(x, &scored));
        let mut sum = HeadLoss::default();
        let places: Vec<usize> = (0..scored.len()).collect();
        for (places, rows) in places.chunks(chunk.max(1)).zip(scored.chunks(chunk.max(1))) {
            let part = pass.backend.gather_rows(&normed, places);
            let [mut logits] = Linear::train_forward_shared([&self.lm_head], &part, pass);
            if goals.teacher.is_some() {
                let losses = goals.losses(rows, &mut logits.clone(), 1.0, pass);
                sum.loss += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
            }
            let targets: Vec<u32> = rows.iter().map(|&r| goals.targets[r]).collect();
            let losses = pass.backend.cross_entropy(&mut logits, &targets, 1.0);
            sum.cross_entropy += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
            // Of `softmax − onehot` the target's element alone is negative; it is the highest output where the softmax has
            // nothing higher.
            sum.correct += targets.iter().enumerate().filter(|&(i, &target)| is_highest(logits.row(i), target)).count();
        }
        if goals.teacher.is_none() {
            sum.loss = sum.cross_entropy;
        }
        sum
    }

    /// Bytes in memory; a tied projection is the embedding's and not counted.
    pub fn byte_len(&self) -> usize {
        self.norm.byte_len() + if self.tied { 0 } else { self.lm_head.byte_len() }
    }
}

/// What the outputs of a batch are compared with.
#[derive(Clone, Copy)]
pub struct Goals<'a> {
    /// The right output of each row; [`IGNORE`] for rows that are not scored.
    pub targets: &'a [u32],
    /// Whose distribution is to be learned.
    pub teacher: Option<TeacherOutput<'a>>,
}

/// A teacher's outputs, of which `[tokens, vocabulary]` logits are never held.
#[derive(Clone, Copy)]
pub struct TeacherOutput<'a> {
    /// Its head.
    pub head: &'a Head,
    /// Its hidden rows after the final norm.
    pub normed: &'a Bf16Tensor,
    /// How they are learned.
    pub soft: SoftTargets,
}

/// Sums over the scored tokens of a batch, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadLoss {
    /// The loss that is learned from.
    pub loss: f64,
    /// Cross-entropy against the targets.
    pub cross_entropy: f64,
    /// How many have their target as the first of the highest outputs.
    pub correct: usize,
}

impl<'a> Goals<'a> {
    /// Targets alone.
    pub fn targets(targets: &'a [u32]) -> Self {
        Self { targets, teacher: None }
    }

    /// Losses of `rows`, whose `logits` become their gradient.
    fn losses(&self, rows: &[usize], logits: &mut Tensor, factor: f32, pass: &TrainPass) -> Vec<f32> {
        let targets: Vec<u32> = rows.iter().map(|&r| self.targets[r]).collect();
        match &self.teacher {
            None => pass.backend.cross_entropy(logits, &targets, factor),
            Some(teacher) => {
                let normed = pass.backend.gather_rows_of_bf16(teacher.normed, rows);
                let of_teacher = teacher.head.logits(&normed);
                pass.backend.distillation(logits, of_teacher, &targets, teacher.soft, factor)
            }
        }
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
