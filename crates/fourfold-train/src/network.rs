//! What can be trained: a model with a loss, whose parts are run forward and backward one at a time.
//!
//! The trainer knows steps, clipping and updates; a network knows its layers. A new kind of model is one file that implements
//! [`Network`].

use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;
use fourfold_models::layers::{Dropout, Gradients};
use fourfold_models::{ModelError, WeightSpec};
use fourfold_tensor::DType;
use half::f16;
use rayon::prelude::*;
use thiserror::Error;

use crate::recipe::Recipe;
use crate::store::ParameterStore;
use crate::trainer::TrainError;

/// Examples of one step.
pub trait Examples {
    /// Tokens, or images: what a rate counts.
    fn units(&self) -> usize;

    /// Places whose loss counts.
    fn scored(&self) -> usize;
}

/// A source of batches by number: the same number gives the same batch, so that a resumed run sees what it would have seen.
pub trait BatchSource<B> {
    /// Batch `number`, counted from 0.
    ///
    /// # Errors
    /// What is wrong with the data, by file and line.
    fn get(&mut self, number: u64) -> Result<B, crate::data::DataError>;
}

/// Batches to measure on: the same ones each time, read when they are needed.
pub trait HeldOut<B> {
    /// How many there are.
    fn count(&self) -> usize;

    /// Batch `i`, counted from 0.
    ///
    /// # Errors
    /// It cannot be read.
    fn batch(&self, i: usize) -> Result<B, crate::data::DataError>;
}

impl<B: Clone> HeldOut<B> for Vec<B> {
    fn count(&self) -> usize {
        self.len()
    }

    fn batch(&self, i: usize) -> Result<B, crate::data::DataError> {
        Ok(self[i].clone())
    }
}

/// What a network makes of a batch without learning.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of the losses, nats.
    pub loss: f64,
    /// Places scored.
    pub scored: usize,
    /// Sum of the cross-entropies against the targets, where the loss is another one.
    pub cross_entropy: Option<f64>,
    /// Places where the most likely answer was right; `None` where a network does not say.
    pub correct: Option<usize>,
}

impl Score {
    /// Mean loss, nats.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.scored.max(1) as f64
    }

    /// Share of right answers.
    pub fn accuracy(&self) -> Option<f64> {
        self.correct.map(|correct| correct as f64 / self.scored.max(1) as f64)
    }

    /// Mean cross-entropy against the targets, nats: the loss itself where it is no other.
    pub fn mean_cross_entropy(&self) -> f64 {
        self.cross_entropy.unwrap_or(self.loss) / self.scored.max(1) as f64
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let correct = self.joined(&other, self.correct, other.correct);
        let cross_entropy = self.joined(&other, self.cross_entropy, other.cross_entropy);
        Self { loss: self.loss + other.loss, scored: self.scored + other.scored, cross_entropy, correct }
    }

    /// What both say together; one that scored nothing has no say.
    fn joined<T: std::ops::Add<Output = T>>(&self, other: &Self, a: Option<T>, b: Option<T>) -> Option<T> {
        match (a, b) {
            (Some(a), Some(b)) => Some(a + b),
            (one, None) if other.scored == 0 => one,
            (None, one) if self.scored == 0 => one,
            _ => None,
        }
    }
}

/// Why a batch cannot be run.
#[derive(Debug, Error)]
pub enum BatchError {
    /// A layer could not be built.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A token that the model does not know.
    #[error("token {id}, the vocabulary has {vocabulary}")]
    Token {
        /// The token.
        id: u32,
        /// Size of the model's vocabulary.
        vocabulary: usize,
    },
    /// A class that the model does not know.
    #[error("image {image}: class {label}, the model tells {classes} apart")]
    Label {
        /// The image, counted from 0 in its batch.
        image: usize,
        /// Its class.
        label: u32,
        /// Classes of the model.
        classes: usize,
    },
    /// Images of another size.
    #[error("images of {found} bytes, the model's have {expected}")]
    Image {
        /// Channels · height · width of the model's images.
        expected: usize,
        /// Bytes of the batch by its number of labels.
        found: usize,
    },
    /// A target that the model has no output for.
    #[error("target {class}, the model has {outputs} outputs")]
    Class {
        /// The target.
        class: u32,
        /// Outputs of the model's head.
        outputs: usize,
    },
    /// A teacher of another vocabulary.
    #[error("the teacher's head has {teacher} outputs, the model's {model}")]
    Teacher {
        /// Outputs of the teacher's head.
        teacher: usize,
        /// Outputs of the model's head.
        model: usize,
    },
    /// Nothing to learn from.
    #[error("nothing in the batch is scored")]
    Empty,
}

/// How a batch is run.
#[derive(Clone)]
pub struct Run<'a> {
    /// Runs the operations.
    pub backend: Arc<dyn Backward>,
    /// What is kept and what is computed anew.
    pub recipe: &'a Recipe,
    /// Whether this pass counts: a batch that is run twice in a step is counted once in running statistics.
    pub counts: bool,
    /// Dropout of adapters' inputs, where there is any.
    pub dropout: Option<Dropout>,
}

impl Run<'_> {
    /// Rounds a gradient that goes from one part to the next as the recipe's products would give it: to fp16 where they are
    /// fp16, which overflows to infinity above 65504 and vanishes below 2⁻²⁴. What loss scaling is for.
    pub fn narrow(&self, gradient: &mut Tensor) {
        if self.recipe.compute == DType::F16 {
            gradient.host_mut().par_iter_mut().for_each(|g| *g = f16::from_f32(*g).to_f32());
        }
    }
}

/// Is given each part's gradients as soon as they are complete. May change the store: the part does not read it any more.
pub type Apply<'a> = &'a mut dyn FnMut(&mut ParameterStore, &mut Gradients) -> Result<(), TrainError>;

/// A model with a loss.
pub trait Network {
    /// What it learns from.
    type Batch: Examples;

    /// Its trained tensors, in the order of the stack.
    fn weights(&self) -> Vec<WeightSpec>;

    /// Brings what stays as it is into memory before anything else is there: in a first step it would lie between what the step frees.
    ///
    /// # Errors
    /// A layer cannot be built.
    fn prepare(&self, _store: &ParameterStore, _backend: &Arc<dyn Backward>) -> Result<(), ModelError> {
        Ok(())
    }

    /// Whether the model can run the batch.
    ///
    /// # Errors
    /// What does not fit.
    fn check(&self, batch: &Self::Batch) -> Result<(), BatchError>;

    /// Losses without learning.
    ///
    /// # Errors
    /// A layer cannot be built.
    fn evaluate(&self, store: &ParameterStore, batch: &Self::Batch, run: &Run) -> Result<Score, BatchError>;

    /// Forward and backward of `factor · Σ losses`. `apply` is given gradients part by part, unless the loss is not finite.
    /// Returns Σ losses.
    ///
    /// # Errors
    /// A layer cannot be built, or what `apply` says.
    fn backward(
        &self,
        store: &mut ParameterStore,
        batch: &Self::Batch,
        factor: f32,
        run: &Run,
        apply: Apply,
    ) -> Result<f64, TrainError>;

    /// Called once after each step: what is counted and not trained (running statistics) is stored here where the step was
    /// `applied`, and forgotten where it was skipped.
    fn step_done(&self, _store: &mut ParameterStore, _applied: bool) {}

    /// How far the busiest expert of the last step was above the mean, as a part of it: see [`crate::balance`].
    fn expert_imbalance(&self) -> Option<f64> {
        None
    }
}
