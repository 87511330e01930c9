//! One training step: forward, loss, backward, update.
//!
//! With gradient release (Lv et al. 2023, LOMO, section 3.1) a block's gradients are applied as soon as the block's backward is
//! done, so that one block's gradients are alive at a time. What needs all gradients before any is applied, clipping by
//! global norm above all, then takes a second backward pass.

use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Tensor};
use fourfold_models::layers::{BlockSaved, Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, ModelError, ModelSpec};
use half::bf16;
use thiserror::Error;

use crate::batch::Batch;
use crate::optim::OptimError;
use crate::optim::adamw::AdamW;
use crate::recipe::Recipe;
use crate::schedule::Schedule;
use crate::store::{ParameterStore, Update};

/// Why a step failed.
#[derive(Debug, Error)]
pub enum TrainError {
    /// A layer could not be built.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A gradient could not be applied.
    #[error("step {step}: {source}")]
    Optim {
        /// The step, counted from 1.
        step: u64,
        /// What the optimizer refused.
        source: OptimError,
    },
    /// A token that the model does not know.
    #[error("step {step}: token {id}, the vocabulary has {vocabulary}")]
    Token {
        /// The step, counted from 1.
        step: u64,
        /// The token.
        id: u32,
        /// Size of the model's vocabulary.
        vocabulary: usize,
    },
    /// Nothing to learn from.
    #[error("step {step}: no token of the batch is scored")]
    Empty {
        /// The step, counted from 1.
        step: u64,
    },
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Mean loss of the scored tokens before the update, nats.
    pub loss: f64,
    /// Tokens run.
    pub tokens: usize,
    /// Learning rate.
    pub lr: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Whether the update was left out because loss or gradients were not finite.
    pub skipped: bool,
}

/// How a run learns.
#[derive(Clone, Copy, Debug)]
pub struct Hyperparameters {
    /// The optimizer.
    pub adam: AdamW,
    /// Peak learning rate.
    pub lr: f64,
    /// Its course.
    pub schedule: Schedule,
    /// Largest norm of all gradients together; larger ones are scaled down to it. Exact: with gradient release it costs a
    /// second backward pass.
    pub max_gradient_norm: Option<f64>,
    /// Seed of the stochastic rounding.
    pub seed: u64,
}

/// A model in training.
pub struct Trainer {
    spec: ModelSpec,
    store: ParameterStore,
    backend: Arc<dyn Backward>,
    recipe: Recipe,
    hyper: Hyperparameters,
    steps_done: u64,
}

/// What the forward kept of a block.
enum Kept {
    /// Everything its gradient needs, and the block.
    All(Box<(Block, BlockSaved)>),
    /// Its input, rounded to bf16.
    Input(Vec<bf16>),
}

impl Trainer {
    /// A trainer that has done `steps_done` steps.
    pub fn new(
        spec: ModelSpec,
        store: ParameterStore,
        backend: Arc<dyn Backward>,
        recipe: Recipe,
        hyper: Hyperparameters,
        steps_done: u64,
    ) -> Self {
        Self { spec, store, backend, recipe, hyper, steps_done }
    }

    /// The trained tensors.
    pub fn store(&self) -> &ParameterStore {
        &self.store
    }

    /// As [`Trainer::store`], to restore a checkpoint into.
    pub fn store_mut(&mut self) -> &mut ParameterStore {
        &mut self.store
    }

    /// What the model is made of.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.steps_done
    }

    /// Mean loss of the scored tokens, without learning.
    ///
    /// # Errors
    /// As [`Trainer::step`], but for the optimizer's.
    pub fn evaluate(&self, batch: &Batch) -> Result<f64, TrainError> {
        let backend: Arc<dyn Backend> = self.backend.clone();
        let pass = self.pass(batch)?;
        let embedding = Embedding::load(&self.spec, &self.store, &backend)?;
        let mut x = embedding.forward(&batch.ids);
        for i in 0..self.spec.blocks.len() {
            x = Block::load(&self.spec, i, &self.store, &backend)?.train_forward(x, &pass).0;
        }
        let head = Head::load_sharing(&self.spec, &self.store, &backend, &embedding)?;
        let losses = head.loss(&x, &batch.targets, self.recipe.loss_chunk, &pass);
        Ok(mean(&losses, batch.scored()))
    }

    /// Learns from one batch.
    ///
    /// # Errors
    /// A batch without a scored token or with an unknown one: nothing has changed then.
    pub fn step(&mut self, batch: &Batch) -> Result<StepReport, TrainError> {
        let number = self.steps_done + 1;
        let lr = self.hyper.lr * self.hyper.schedule.factor(self.steps_done);
        let mut report =
            StepReport { step: number, loss: 0.0, tokens: batch.ids.len(), lr, gradient_norm: 0.0, skipped: false };
        let mut update = Update { number, lr: lr as f32, gradient_factor: 1.0, seed: self.hyper.seed };

        let gathers = !self.recipe.release;
        let needs_norm = self.hyper.max_gradient_norm.is_some();
        if gathers || needs_norm {
            // All gradients first: kept, or only their norm.
            let mut kept = Vec::new();
            let mut squares = 0.0;
            report.loss = self.backward(batch, &mut |_, gradients| {
                for (name, gradient) in gradients.take_all() {
                    squares += gradient.host().iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
                    if gathers {
                        kept.push((name, gradient));
                    }
                }
                Ok(())
            })?;
            report.gradient_norm = squares.sqrt();
            if !report.loss.is_finite() || !report.gradient_norm.is_finite() {
                report.skipped = true;
                self.steps_done = number;
                return Ok(report);
            }
            if let Some(most) = self.hyper.max_gradient_norm {
                // PyTorch's clip_grad_norm_.
                update.gradient_factor = (most / (report.gradient_norm + 1e-6)).min(1.0) as f32;
            }
            let adam = self.hyper.adam;
            for (name, gradient) in kept {
                self.store
                    .update(&name, &gradient, &adam, &update)
                    .map_err(|source| TrainError::Optim { step: number, source })?;
            }
        }
        if !gathers {
            let adam = self.hyper.adam;
            let (mut squares, mut refused) = (0.0, false);
            report.loss = self.backward(batch, &mut |store, gradients| {
                for (name, gradient) in gradients.take_all() {
                    squares += gradient.host().iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
                    match store.update(&name, &gradient, &adam, &update) {
                        Ok(()) => {}
                        // The tensor stays as it is; what was applied before it was finite.
                        Err(OptimError::NotFinite { .. }) => refused = true,
                        Err(source) => return Err(TrainError::Optim { step: number, source }),
                    }
                }
                Ok(())
            })?;
            report.gradient_norm = squares.sqrt();
            report.skipped = refused || !report.loss.is_finite();
        }
        self.steps_done = number;
        Ok(report)
    }

    fn pass<'a>(&'a self, batch: &'a Batch) -> Result<TrainPass<'a>, TrainError> {
        let step = self.steps_done + 1;
        let vocabulary = self.spec.vocab_size;
        if let Some(&id) = batch.ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(TrainError::Token { step, id, vocabulary });
        }
        if batch.scored() == 0 {
            return Err(TrainError::Empty { step });
        }
        Ok(TrainPass { backend: &*self.backend, documents: &batch.documents, positions: &batch.positions })
    }

    /// Forward and backward. `apply` is given each part's gradients as soon as they are complete, unless the loss is not
    /// finite. Returns the loss.
    fn backward(
        &mut self,
        batch: &Batch,
        apply: &mut dyn FnMut(&mut ParameterStore, &mut Gradients) -> Result<(), TrainError>,
    ) -> Result<f64, TrainError> {
        let backend: Arc<dyn Backend> = self.backend.clone();
        let trained = self.backend.clone();
        self.pass(batch)?;
        let pass = TrainPass { backend: &*trained, documents: &batch.documents, positions: &batch.positions };
        let (rows, hidden) = (batch.ids.len(), self.spec.hidden_size);
        let embedding = Embedding::load(&self.spec, &self.store, &backend)?;
        let mut x = embedding.forward(&batch.ids);
        let mut kept = Vec::with_capacity(self.spec.blocks.len());
        for i in 0..self.spec.blocks.len() {
            let block = Block::load(&self.spec, i, &self.store, &backend)?;
            if self.recipe.recompute {
                let input = x.host().iter().map(|&v| bf16::from_f32(v)).collect();
                x = block.train_forward(x, &pass).0;
                kept.push(Kept::Input(input));
            } else {
                let (y, saved) = block.train_forward(x, &pass);
                x = y;
                kept.push(Kept::All(Box::new((block, saved))));
            }
        }

        let head = Head::load_sharing(&self.spec, &self.store, &backend, &embedding)?;
        let mut gradients = Gradients::new(Trained::All);
        let scored = batch.scored();
        let factor = 1.0 / scored as f32;
        let chunk = self.recipe.loss_chunk;
        let (losses, mut dx) = head.loss_backward(&x, &batch.targets, factor, chunk, &pass, &mut gradients);
        drop((x, head));
        let loss = mean(&losses, scored);
        if !loss.is_finite() {
            return Ok(loss);
        }
        // A tied projection's gradient waits for the embedding's share.
        let mut tied = self.spec.tied.then(|| gradients.take("model.embed_tokens.weight")).flatten();
        apply(&mut self.store, &mut gradients)?;

        for i in (0..self.spec.blocks.len()).rev() {
            let (block, saved) = match kept.pop() {
                Some(Kept::All(both)) => *both,
                Some(Kept::Input(input)) => {
                    let block = Block::load(&self.spec, i, &self.store, &backend)?;
                    let x = Tensor::new(rows, hidden, input.iter().map(|v| v.to_f32()).collect());
                    drop(input);
                    let saved = block.train_forward(x, &pass).1;
                    (block, saved)
                }
                None => unreachable!("one for each block"),
            };
            dx = block.backward(saved, dx, &pass, &mut gradients);
            drop(block);
            apply(&mut self.store, &mut gradients)?;
        }
        embedding.backward(&batch.ids, &dx, &pass, &mut gradients);
        drop(embedding);
        if let (Some(share), Some(sum)) =
            (tied.take(), gradients.of("model.embed_tokens.weight", self.spec.vocab_size, hidden))
        {
            trained.add(sum, &share);
        }
        apply(&mut self.store, &mut gradients)?;
        Ok(loss)
    }
}

fn mean(losses: &[f32], scored: usize) -> f64 {
    losses.iter().map(|&l| f64::from(l)).sum::<f64>() / scored.max(1) as f64
}
