//! One training step: forward, loss, backward, update.
//!
//! With gradient release (Lv et al. 2023, LOMO, section 3.1) a part's gradients are applied as soon as the part's backward is
//! done, so that one part's gradients are alive at a time. What needs all gradients before any is applied, clipping by
//! global norm above all, then takes a second backward pass. So does a scaled loss: an overflow must leave the whole step out.
//! With an unscaled loss a gradient that is not finite is rare: where one is met after other tensors have been updated, the step
//! fails as [`TrainError::Torn`], and [`crate::run`] takes it back.

use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;
use fourfold_models::ModelError;
use fourfold_models::layers::Dropout;
use fourfold_tensor::DType;
use thiserror::Error;

use crate::accumulate::Sums;
use crate::checkpoint::State;
use crate::loss_scale::LossScaler;
use crate::network::{BatchError, Examples, Network, Run, Score};
use crate::optim::{OptimError, Optimizer, sum_of_squares};
use crate::random::Stream;
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
    /// A gradient was not finite when other tensors had been updated: the store is in no state to go on from.
    #[error("step {}: {source}, when other tensors had been updated", report.step)]
    Torn {
        /// The step as one that was left out, which it is once the store is what it was.
        report: Box<StepReport>,
        /// The gradient.
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
    /// Whether the update was left out because loss or gradients were not finite: nothing has changed then.
    pub skipped: bool,
    /// Factor of the loss, where it is scaled.
    pub loss_scale: Option<f32>,
    /// How far the busiest expert was above the mean, as a part of it; `None` without experts.
    pub expert_imbalance: Option<f64>,
}

/// How a run learns.
#[derive(Clone, Copy, Debug)]
pub struct Hyperparameters {
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Peak learning rate.
    pub lr: f64,
    /// Its course.
    pub schedule: Schedule,
    /// Largest norm of all gradients together; larger ones are scaled down to it. Exact: with gradient release it costs a
    /// second backward pass.
    pub max_gradient_norm: Option<f64>,
    /// Seed of the stochastic rounding, and of dropout.
    pub seed: u64,
    /// Share of the elements of adapters' inputs that are dropped: at least 0 and below 1.
    pub lora_dropout: f32,
}

/// A model in training.
pub struct Trainer<N> {
    network: N,
    store: ParameterStore,
    backend: Arc<dyn Backward>,
    recipe: Recipe,
    hyper: Hyperparameters,
    steps_done: u64,
    /// Steps of these that were left out.
    skipped: u64,
    scaler: Option<LossScaler>,
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
        let scaler = (recipe.compute == DType::F16).then(LossScaler::default);
        Self { network, store, backend, recipe, hyper, steps_done, skipped: 0, scaler }
    }

    /// Goes on from where `state` was written, whose tensors the store holds.
    pub fn resume(&mut self, state: &State) {
        (self.steps_done, self.skipped) = (state.step, state.skipped);
        if let (Some(scaler), Some((scale, good_steps))) = (&mut self.scaler, state.loss_scale) {
            *scaler = LossScaler::resume(scale, good_steps);
        }
    }

    /// Adds to `state` what a resumed run needs of the trainer, besides the store.
    pub fn record(&self, state: &mut State) {
        (state.step, state.skipped) = (self.steps_done, self.skipped);
        state.loss_scale = self.scaler.as_ref().map(|s| (s.scale(), s.good_steps()));
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

    /// Whether the loss is scaled, so that a step with an infinite gradient is nothing unusual.
    pub fn scales_loss(&self) -> bool {
        self.scaler.is_some()
    }

    /// Losses of a batch, without learning.
    ///
    /// # Errors
    /// As [`Trainer::step`], but for the optimizer's.
    pub fn evaluate(&self, batch: &N::Batch) -> Result<Score, TrainError> {
        self.check(batch)?;
        let run = Run { backend: self.backend.clone(), recipe: &self.recipe, counts: false, dropout: None };
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
    /// A batch without a scored place or that does not fit the model: nothing has changed then. [`TrainError::Torn`], with gradient
    /// release alone.
    pub fn step(&mut self, batch: &N::Batch) -> Result<StepReport, TrainError> {
        self.step_accumulated(std::slice::from_ref(batch))
    }

    /// Learns from several batches as from one that holds them all: each place counts the same, in whichever batch it is.
    ///
    /// # Errors
    /// As [`Trainer::step`], and [`TrainError::Torn`].
    pub fn step_accumulated(&mut self, batches: &[N::Batch]) -> Result<StepReport, TrainError> {
        batches.iter().try_for_each(|batch| self.check(batch))?;
        let number = self.steps_done + 1;
        let lr = self.hyper.lr * self.hyper.schedule.factor(self.steps_done);
        let units = batches.iter().map(Examples::units).sum();
        let loss_scale = self.scaler.as_ref().map(LossScaler::scale);
        let mut report = StepReport {
            step: number,
            loss: 0.0,
            units,
            lr,
            gradient_norm: 0.0,
            skipped: false,
            loss_scale,
            expert_imbalance: None,
        };
        let learned = self.learn(batches, &mut report);
        self.network.step_done(&mut self.store, matches!(learned, Ok(true)));
        let applied = learned?;
        report.skipped = !applied;
        report.expert_imbalance = self.network.expert_imbalance();
        if let Some(scaler) = &mut self.scaler {
            scaler.update(applied);
        }
        self.skipped += u64::from(!applied);
        self.steps_done = number;
        Ok(report)
    }

    /// Counts the step that `report` is of as done and leaves its update out.
    pub fn leave_out(&mut self, report: &StepReport) -> StepReport {
        (self.steps_done, self.skipped) = (report.step, self.skipped + 1);
        *report
    }

    /// The step itself; whether its update was applied.
    fn learn(&mut self, batches: &[N::Batch], report: &mut StepReport) -> Result<bool, TrainError> {
        let Some((last, before)) = batches.split_last() else { return Err(self.refused(BatchError::Empty)) };
        let scored = batches.iter().map(Examples::scored).sum::<usize>().max(1);
        let scale = report.loss_scale.unwrap_or(1.0);
        let factor = scale / scored as f32;
        let gathers = !self.recipe.release;
        let mut sums = Sums::new(!gathers, self.hyper.seed, report.step);
        let mut loss = 0.0;
        // Each batch of a step drops others; the last one, where it is run twice, the same ones.
        let key = |batch: usize| Stream::new(self.hyper.seed, report.step, batch as u64).key();
        let of_last = key(before.len());
        let keys: Vec<u64> = (0..batches.len()).map(key).collect();
        for (batch, key) in before.iter().chain(gathers.then_some(last)).zip(keys) {
            loss += self.backward(batch, factor, true, key, &mut |_, name, gradient| {
                sums.add(name, gradient);
                Ok(())
            })?;
            if !f64::is_finite(loss) {
                report.loss = loss;
                return Ok(false);
            }
        }

        let mut update = Update {
            number: report.step,
            applied: report.step - 1 - self.skipped,
            lr: report.lr as f32,
            gradient_factor: 1.0 / scale,
            seed: self.hyper.seed,
        };
        let optimizer = self.hyper.optimizer;
        let step = report.step;
        let failed = move |source| TrainError::Optim { step, source };
        let mut squares = 0.0;
        if gathers {
            report.loss = loss / scored as f64;
            let kept: Vec<(String, Tensor)> = sums.take_all().collect();
            squares = kept.iter().map(|(_, gradient)| sum_of_squares(gradient.host())).sum();
            if !self.clip(squares, scale, &mut update, report) {
                return Ok(false);
            }
            for (name, gradient) in kept {
                self.store.update(&name, &gradient, &optimizer, &update).map_err(failed)?;
            }
            return Ok(true);
        }
        if self.hyper.max_gradient_norm.is_some() || self.scaler.is_some() {
            // All gradients once, for their norm alone.
            report.loss = loss
                + self.backward(last, factor, false, of_last, &mut |_, name, mut gradient| {
                    sums.add_to(&name, &mut gradient);
                    squares += sum_of_squares(gradient.host());
                    Ok(())
                })?;
            report.loss /= scored as f64;
            if !self.clip(squares, scale, &mut update, report) {
                return Ok(false);
            }
            squares = 0.0;
        }
        let mut refused = None;
        let mut updated = false;
        loss += self.backward(last, factor, true, of_last, &mut |store, name, mut gradient| {
            sums.add_to(&name, &mut gradient);
            sums.release(&name);
            squares += sum_of_squares(gradient.host());
            if refused.is_none() {
                match store.update(&name, &gradient, &optimizer, &update) {
                    Ok(()) => updated = true,
                    Err(source @ OptimError::NotFinite { .. }) => refused = Some(source),
                    Err(source) => return Err(failed(source)),
                }
            }
            Ok(())
        })?;
        report.loss = loss / scored as f64;
        report.gradient_norm = squares.sqrt() / f64::from(scale);
        match refused {
            None => Ok(report.loss.is_finite()),
            Some(_) if !updated => Ok(false),
            Some(source) => {
                let report = Box::new(StepReport { skipped: true, ..*report });
                Err(TrainError::Torn { report, source })
            }
        }
    }

    /// Takes the norm of all gradients into the report and, by clipping, into the update; whether all is finite.
    fn clip(&self, squares: f64, scale: f32, update: &mut Update, report: &mut StepReport) -> bool {
        report.gradient_norm = squares.sqrt() / f64::from(scale);
        if let Some(most) = self.hyper.max_gradient_norm {
            // PyTorch's clip_grad_norm_.
            update.gradient_factor *= (most / (report.gradient_norm + 1e-6)).min(1.0) as f32;
        }
        // Second moments hold squares.
        report.loss.is_finite() && (report.gradient_norm as f32).powi(2).is_finite()
    }

    /// Sum of the batch's losses, with each tensor's gradient of `factor` times the sum given to `apply`. `counts`: see [`Run`]; `key`
    /// decides what is dropped.
    fn backward(
        &mut self,
        batch: &N::Batch,
        factor: f32,
        counts: bool,
        key: u64,
        apply: &mut dyn FnMut(&mut ParameterStore, String, Tensor) -> Result<(), TrainError>,
    ) -> Result<f64, TrainError> {
        let dropout = Dropout::new(self.hyper.lora_dropout, key);
        let run = Run { backend: self.backend.clone(), recipe: &self.recipe, counts, dropout };
        self.network.backward(&mut self.store, batch, factor, &run, &mut |store, gradients| {
            gradients.take_all().into_iter().try_for_each(|(name, mut gradient)| {
                run.narrow(&mut gradient);
                apply(store, name, gradient)
            })
        })
    }
}
