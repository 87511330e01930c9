//! A model that stays as it is under what is trained: LoRA's adapters ([`ParameterStore::adapt`]), or what is little of a packed model
//! ([`ParameterStore::tune`]).

use std::collections::HashSet;
use std::sync::Arc;

use fourfold_models::layers::{LORA_A, LoraSpec, Trained, Tunings};
use fourfold_models::{Frozen, ModelSpec, Role, WeightSpec, Weights};
use fourfold_tensor::{SourceError, Tuning, Weight, WeightSource};

use super::{Held, ParameterStore, checked};
use crate::optim::parameter::Parameter;
use crate::random::Stream;
use crate::recipe::{MomentPrecision, Recipe, Storage, is_small};

/// What [`ParameterStore::tune`] trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tune {
    /// Scales and offsets of packed matrices, norms and biases.
    Scales,
    /// Norms and biases.
    Norms,
}

/// A model that stays as it is under what is trained.
pub(super) struct FrozenBase {
    pub(super) source: Arc<dyn WeightSource>,
    pub(super) kept: Frozen,
    /// Factor of every adapter's product.
    pub(super) scaling: f32,
}

impl ParameterStore {
    /// Adapters over a model that stays as it is, packed where it is packed: A uniform in ±1/√inputs, B zero, as PEFT begins
    /// (Kaiming's uniform distribution with a = √5). They are stored in f32 with f32 moments: they are little.
    pub fn adapt(spec: &ModelSpec, base: Arc<dyn WeightSource>, lora: &LoraSpec, seed: u64, recipe: &Recipe) -> Self {
        let mut store = Self::empty(recipe);
        let recipe = Recipe { storage: Storage::F32, moments: MomentPrecision::F32, ..*recipe };
        for (tensor, weight) in lora.weights(spec).into_iter().enumerate() {
            let stream = Stream::new(seed, 0, tensor as u64);
            let bound = match weight.name.ends_with(LORA_A) {
                true => 1.0 / (weight.shape[1] as f32).sqrt(),
                false => 0.0,
            };
            store.push(&weight, &recipe, |first, out| {
                out.iter_mut().enumerate().for_each(|(i, o)| *o = bound * (2.0 * stream.unit(first + i) - 1.0));
            });
        }
        let trained = store.index.keys().cloned().collect();
        store.frozen = Some(FrozenBase { source: base, kept: Frozen::new(trained), scaling: lora.scaling() });
        store
    }

    /// What is little of a model that stays as it is, packed where it is packed: norms and biases, and with [`Tune::Scales`] the
    /// scales and offsets of packed matrices ([`Tuning`]). Held in f32 with f32 moments; the layers read what would be stored.
    ///
    /// # Errors
    /// A tensor is missing or cannot be read.
    pub fn tune(
        spec: &ModelSpec,
        base: Arc<dyn WeightSource>,
        tune: Tune,
        recipe: &Recipe,
    ) -> Result<Self, SourceError> {
        let mut store = Self::empty(recipe);
        for weight in spec.weights() {
            let is_matrix = !is_small(&weight);
            let tunable = matches!(weight.role, Role::Norm | Role::Bias) || (is_matrix && tune == Tune::Scales);
            let is_vector = weight.shape.len() == 1;
            let loaded = if tunable { Some(base.load(&weight.name)?) } else { None };
            loaded.iter().try_for_each(|loaded| checked(&weight, loaded))?;
            let loaded = loaded.filter(|loaded| is_vector == matches!(loaded, Weight::Dense(_)));
            if let Some(tuning) = loaded.and_then(Tuning::of) {
                let numbers = Parameter::F32(tuning.initial().into());
                let precise = Recipe { moments: MomentPrecision::F32, ..*recipe };
                store.push_entry(&weight, &precise, numbers, Some(Held::Tuned(Arc::new(tuning))));
            }
        }
        let trained = store.index.keys().cloned().collect();
        store.frozen = Some(FrozenBase { source: base, kept: Frozen::new(trained), scaling: 1.0 });
        Ok(store)
    }

    /// Whether numbers of packed tensors are trained ([`ParameterStore::tune`]).
    pub fn is_tuned(&self) -> bool {
        self.entries.iter().any(|entry| entry.tuning.is_some())
    }

    /// What has numbers that are learned of `spec`'s packed tensors; its shape is how many they are.
    pub fn tuned_numbers(&self, spec: &ModelSpec) -> Vec<WeightSpec> {
        let numbers = |weight: WeightSpec| {
            let entry = &self.entries[*self.index.get(&weight.name)?];
            Some(WeightSpec { shape: vec![entry.parameter.len()], ..weight })
        };
        spec.weights().into_iter().filter_map(numbers).collect()
    }

    /// Bytes of the model that stays as it is, as it is stored.
    pub fn base_bytes(&self) -> u64 {
        self.base().map_or(0, |base| base.tensors().iter().map(|tensor| tensor.bytes).sum())
    }

    /// The model that stays as it is, where there is one.
    pub fn base(&self) -> Option<&dyn WeightSource> {
        self.frozen.as_ref().map(|base| &*base.source)
    }

    /// A whole model to run and not to train: nothing of it is held here.
    pub fn frozen(base: Arc<dyn WeightSource>, recipe: &Recipe) -> Self {
        let mut store = Self::empty(recipe);
        store.frozen = Some(FrozenBase { source: base, kept: Frozen::new(HashSet::new()), scaling: 1.0 });
        store
    }

    /// Whether what is trained stands over a model that stays as it is.
    pub fn has_frozen_base(&self) -> bool {
        self.frozen.is_some()
    }

    /// Bytes of the frozen model's matrices, as far as they have been used.
    pub fn frozen_bytes(&self) -> usize {
        self.frozen.as_ref().map_or(0, |base| base.kept.byte_len())
    }

    /// Where layers read.
    pub fn weights(&self) -> Weights<'_> {
        Weights { source: self, frozen: self.frozen.as_ref().map(|base| &base.kept) }
    }

    /// What gets a gradient.
    pub fn trained(&self) -> Trained {
        self.frozen.as_ref().map_or(Trained::All, |base| Trained::Only(base.kept.trained().clone()))
    }

    /// What is trained of packed tensors.
    pub fn tunings(&self) -> Tunings {
        let named = self.entries().filter_map(|(info, entry)| Some((info.name.clone(), entry.tuning.clone()?)));
        Arc::new(named.collect())
    }
}
