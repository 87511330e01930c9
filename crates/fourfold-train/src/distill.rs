//! Distillation (Hinton et al. 2015): a model learns the distribution of another one, its teacher, at every place that is scored. After
//! compression the teacher is the original.
//!
//! The teacher is read as it is stored, a block at a time: a dense one from its mapped file, of a packed one the kernels' layout is
//! kept. Of its pass the normed hidden rows `[tokens, hidden]` are kept, in bf16, as the products read them; its logits are made for
//! some tokens at a time beside the student's.

use std::sync::Arc;

use fourfold_kernels::backward::{Backward, SoftTargets};
use fourfold_kernels::{Backend, Bf16Tensor};
use fourfold_models::layers::{Goals, TeacherOutput};
use fourfold_models::{Embedding, Head, ModelError, ModelSpec};
use fourfold_tensor::WeightSource;

use crate::batch::Batch;
use crate::language::{forward, keep_frozen};
use crate::network::{BatchError, Run};
use crate::recipe::Recipe;
use crate::store::ParameterStore;

/// A model that is learned from and stays as it is.
pub struct Teacher {
    spec: ModelSpec,
    weights: ParameterStore,
    soft: SoftTargets,
}

impl Teacher {
    /// The model of `spec` with the weights of `source`.
    pub fn new(spec: ModelSpec, source: Arc<dyn WeightSource>, soft: SoftTargets) -> Self {
        Self { spec, weights: ParameterStore::frozen(source, &Recipe::QUARTER), soft }
    }

    /// What it is made of.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of its weights as they are stored.
    pub fn stored_bytes(&self) -> u64 {
        self.weights.base_bytes()
    }

    /// Whether a student of `spec` can learn from it.
    ///
    /// # Errors
    /// Heads of other sizes.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), BatchError> {
        let (teacher, model) = (self.spec.outputs(), spec.outputs());
        if teacher == model { Ok(()) } else { Err(BatchError::Teacher { teacher, model }) }
    }

    /// Brings its weights into memory.
    ///
    /// # Errors
    /// A layer cannot be built.
    pub(crate) fn prepare(&self, backend: &Arc<dyn Backward>) -> Result<(), ModelError> {
        keep_frozen(&self.spec, &self.weights, backend)
    }

    /// Its outputs for a batch.
    ///
    /// # Errors
    /// A layer cannot be built.
    pub(crate) fn run(&self, batch: &Batch, run: &Run) -> Result<Taught, ModelError> {
        let backend: Arc<dyn Backend> = run.backend.clone();
        let embedding = Embedding::load(&self.spec, self.weights.weights(), &backend)?;
        let x = forward(&self.spec, &self.weights, &embedding, batch, run)?;
        let head = Head::load_sharing(&self.spec, self.weights.weights(), &backend, &embedding)?;
        let normed = run.backend.to_bf16(&head.norm(&x));
        Ok(Taught { head, normed, soft: self.soft })
    }
}

/// What a teacher says of a batch.
pub(crate) struct Taught {
    head: Head,
    normed: Bf16Tensor,
    soft: SoftTargets,
}

impl Taught {
    /// What the outputs of a batch of `targets` are compared with, with or without a teacher.
    pub fn goals<'a>(taught: Option<&'a Self>, targets: &'a [u32]) -> Goals<'a> {
        let output = |taught: &'a Self| TeacherOutput { head: &taught.head, normed: &taught.normed, soft: taught.soft };
        Goals { targets, teacher: taught.map(output) }
    }
}
