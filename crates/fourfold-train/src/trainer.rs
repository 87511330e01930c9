//! One training step: forward, loss, backward, update.
//!
//! With gradient release (Lv et al. 2023, LOMO, section 3.1) a part's gradients are applied as soon as the part's backward is
//! done, so that one part's gradients are alive at a time. What needs all gradients before any is applied, clipping by
//! global norm above all, then takes a second backward pass.

use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_models::ModelError;
use fourfold_models::layers::Gradients;
use thiserror::Error;

use crate::network::{BatchError, Examples, Network, Run, Score};
use crate::optim::adamw::AdamW;
use crate::optim::{OptimError, sum_of_squares};
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
    /// A batch that the model cannot run.
    #[error("step {step}: {source}")]
    Batch {
        /// The step, counted from 1.
        step: u64,
        /// What does not fit.
        source: BatchError,
    },
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Mean loss of the scored places before the update, nats.
    pub loss: f64,
    /// Tokens or images run.
    pub units: usize,
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
pub struct Trainer<N> {
    network: N,
    store: ParameterStore,
    backend: Arc<dyn Backward>,
    recipe: Recipe,
    hyper: Hyperparameters,
    steps_done: u64,
}

impl<N: Network> Trainer<N> {
    /// A trainer that has done `steps_done` steps.
    pub fn new(
        network: N,
        store: ParameterStore,
        backend: Arc<dyn Backward>,
        recipe: Recipe,
        hyper: Hyperparameters,
        steps_done: u64,
    ) -> Self {
        Self { network, store, backend, recipe, hyper, steps_done }
    }

    /// The trained tensors.
    pub fn store(&self) -> &ParameterStore {
        &self.store
    }

    /// As [`Trainer::store`], to restore a checkpoint into.
    pub fn store_mut(&mut self) -> &mut ParameterStore {
        &mut self.store
    }

    /// What is trained.
    pub fn network(&self) -> &N {
        &self.network
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.steps_done
    }

    /// Losses of a batch, without learning.
    ///
    /// # Errors
    /// As [`Trainer::step`], but for the optimizer's.
    pub fn evaluate(&self, batch: &N::Batch) -> Result<Score, TrainError> {
        self.check(batch)?;
        let run = Run { backend: self.backend.clone(), recipe: &self.recipe };
        self.network.evaluate(&self.store, batch, &run).map_err(|source| self.refused(source))
    }

    fn check(&self, batch: &N::Batch) -> Result<(), TrainError> {
        self.network.check(batch).map_err(|source| self.refused(source))
    }

    fn refused(&self, source: BatchError) -> TrainError {
        TrainError::Batch { step: self.steps_done + 1, source }
    }

    /// Learns from one batch.
    ///
    /// # Errors
    /// A batch without a scored place or that does not fit the model: nothing has changed then.
    pub fn step(&mut self, batch: &N::Batch) -> Result<StepReport, TrainError> {
        self.check(batch)?;
        let number = self.steps_done + 1;
        let lr = self.hyper.lr * self.hyper.schedule.factor(self.steps_done);
        let mut report =
            StepReport { step: number, loss: 0.0, units: batch.units(), lr, gradient_norm: 0.0, skipped: false };
        let mut update = Update { number, lr: lr as f32, gradient_factor: 1.0, seed: self.hyper.seed };
        let adam = self.hyper.adam;
        let failed = |source| TrainError::Optim { step: number, source };

        let gathers = !self.recipe.release;
        if gathers || self.hyper.max_gradient_norm.is_some() {
            // All gradients first: kept, or only their norm.
            let mut kept = Vec::new();
            let mut squares = 0.0;
            report.loss = self.backward(batch, &mut |_, gradients| {
                for (name, gradient) in gradients.take_all() {
                    squares += sum_of_squares(gradient.host());
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
            for (name, gradient) in kept {
                self.store.update(&name, &gradient, &adam, &update).map_err(failed)?;
            }
        }
        if !gathers {
            let (mut squares, mut refused) = (0.0, false);
            report.loss = self.backward(batch, &mut |store, gradients| {
                for (name, gradient) in gradients.take_all() {
                    squares += sum_of_squares(gradient.host());
                    match store.update(&name, &gradient, &adam, &update) {
                        Ok(()) => {}
                        // The tensor stays as it is; what was applied before it was finite.
                        Err(OptimError::NotFinite { .. }) => refused = true,
                        Err(source) => return Err(failed(source)),
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

    /// Mean loss of the batch, with each part's gradients given to `apply`.
    fn backward(
        &mut self,
        batch: &N::Batch,
        apply: &mut dyn FnMut(&mut ParameterStore, &mut Gradients) -> Result<(), TrainError>,
    ) -> Result<f64, TrainError> {
        let run = Run { backend: self.backend.clone(), recipe: &self.recipe };
        let scored = batch.scored().max(1);
        let sum = self.network.backward(&mut self.store, batch, 1.0 / scored as f32, &run, apply)?;
        Ok(sum / scored as f64)
    }
}
