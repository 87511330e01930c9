//! All trained tensors with their moments. Layers read them through [`WeightSource`], a block at a time, so that a block's
//! working copy lives only while the block runs.

use std::collections::HashMap;
use std::f32::consts::TAU;

use fourfold_kernels::Tensor;
use fourfold_models::{ModelSpec, Role, WeightSpec};
use fourfold_tensor::{DType, Dense, FloatBuffer, SourceError, TensorInfo, Weight, WeightSource};
use half::bf16;

use crate::optim::OptimError;
use crate::optim::adamw::{AdamW, Moments, Step};
use crate::optim::parameter::Parameter;
use crate::random::Stream;
use crate::recipe::{MomentPrecision, Recipe, Storage};
use crate::rounding::split_bf16_residual;

/// A trained tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its elements.
    pub parameter: Parameter,
    /// Its optimizer state.
    pub moments: Moments,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decays: bool,
}

/// The trained tensors of a model, in the order of the stack.
pub struct ParameterStore {
    infos: Vec<TensorInfo>,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    compute: DType,
}

/// Rate, step number and randomness of one step, for all tensors.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Number of the step, counted from 1.
    pub number: u64,
    /// Learning rate.
    pub lr: f32,
    /// Factor of every gradient.
    pub gradient_factor: f32,
    /// Seed of the run.
    pub seed: u64,
}

impl ParameterStore {
    /// Reads every tensor of `weights` from a checkpoint, one at a time.
    ///
    /// # Errors
    /// A tensor is missing or cannot be read.
    pub fn load(weights: &[WeightSpec], source: &dyn WeightSource, recipe: &Recipe) -> Result<Self, SourceError> {
        let mut store = Self::empty(recipe);
        for weight in weights {
            let values = source.load(&weight.name)?.to_f32();
            store.push(weight, values, recipe);
        }
        Ok(store)
    }

    /// A new model: matrices normal with deviation `deviation` (0.02 in most published configurations; the projections that
    /// write to the residual stream divided by √(2 · blocks), as in GPT-2, section 2.3), norms one, biases zero.
    pub fn initialize(spec: &ModelSpec, deviation: f32, seed: u64, recipe: &Recipe) -> Self {
        let mut store = Self::empty(recipe);
        let residual = deviation / (2.0 * spec.blocks.len().max(1) as f32).sqrt();
        for (tensor, weight) in spec.weights().into_iter().enumerate() {
            let len = weight.elements() as usize;
            let stream = Stream::new(seed, 0, tensor as u64);
            let writes_residual = weight.name.ends_with("o_proj.weight") || weight.name.ends_with("down_proj.weight");
            let deviation = if writes_residual { residual } else { deviation };
            let values = match weight.role {
                Role::Norm => vec![1.0; len],
                Role::Bias => vec![0.0; len],
                Role::Router if weight.shape.len() == 1 => vec![0.0; len],
                Role::Embedding
                | Role::LmHead
                | Role::Attention
                | Role::Mlp
                | Role::SharedExpert
                | Role::RoutedExpert
                | Role::Router => (0..len).map(|i| deviation * normal(stream, i)).collect(),
            };
            store.push(&weight, values, recipe);
        }
        store
    }

    fn empty(recipe: &Recipe) -> Self {
        Self { infos: Vec::new(), entries: Vec::new(), index: HashMap::new(), compute: recipe.compute }
    }

    fn push(&mut self, weight: &WeightSpec, values: Vec<f32>, recipe: &Recipe) {
        let len = values.len();
        let is_small = matches!(weight.role, Role::Norm | Role::Bias | Role::Router);
        let storage = if is_small { Storage::F32 } else { recipe.storage };
        let precision = if is_small { MomentPrecision::F32 } else { recipe.moments };
        let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>().into();
        let parameter = match storage {
            Storage::F32 => Parameter::F32(values.into()),
            Storage::Bf16 => Parameter::Bf16(rounded(values)),
            Storage::Bf16Nearest => Parameter::Bf16Nearest(rounded(values)),
            Storage::Bf16Residual => {
                let (high, low): (Vec<_>, _) = values.into_iter().map(split_bf16_residual).unzip();
                Parameter::Bf16Residual { high: high.into(), low }
            }
        };
        let moments = match precision {
            MomentPrecision::F32 => Moments::f32(len),
            MomentPrecision::Bits8 => Moments::bits8(len),
            MomentPrecision::Bits4 => Moments::bits4(len),
        };
        self.index.insert(weight.name.clone(), self.entries.len());
        self.infos.push(TensorInfo {
            name: weight.name.clone(),
            shape: weight.shape.clone(),
            storage: "trained".to_owned(),
            bytes: parameter.byte_len() as u64,
        });
        self.entries.push(Entry { parameter, moments, decays: weight.shape.len() > 1 });
    }

    /// Tensors with their names and shapes.
    pub fn entries(&self) -> impl Iterator<Item = (&TensorInfo, &Entry)> {
        self.infos.iter().zip(&self.entries)
    }

    /// As [`ParameterStore::entries`], to restore a checkpoint into.
    pub fn entries_mut(&mut self) -> impl Iterator<Item = (&TensorInfo, &mut Entry)> {
        self.infos.iter().zip(&mut self.entries)
    }

    /// Bytes of all weights, and of all moments.
    pub fn byte_len(&self) -> (usize, usize) {
        let sum = |f: fn(&Entry) -> usize| self.entries.iter().map(f).sum();
        (sum(|e| e.parameter.byte_len()), sum(|e| e.moments.byte_len()))
    }

    /// Applies a gradient to the tensor named `name`.
    ///
    /// # Errors
    /// The gradient has another length or is not finite: the tensor has not changed then.
    ///
    /// # Panics
    /// When there is no such tensor: gradients come from layers that were loaded from this store.
    pub fn update(&mut self, name: &str, gradient: &Tensor, adam: &AdamW, update: &Update) -> Result<(), OptimError> {
        let i = self.index[name];
        let entry = &mut self.entries[i];
        let adam = AdamW { weight_decay: if entry.decays { adam.weight_decay } else { 0.0 }, ..*adam };
        let step = Step {
            number: update.number,
            lr: update.lr,
            gradient_factor: update.gradient_factor,
            stream: Stream::new(update.seed, update.number, i as u64),
        };
        adam.update(name, &mut entry.parameter, &mut entry.moments, gradient.host(), &step)
    }
}

impl WeightSource for ParameterStore {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.infos[i])
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "the model in training".into(), tensor: name.to_owned() };
        let i = *self.index.get(name).ok_or_else(missing)?;
        let data = match &self.entries[i].parameter {
            Parameter::F32(w) if self.compute == DType::Bf16 && self.entries[i].decays => {
                FloatBuffer::from_f32(w.to_vec(), DType::Bf16)
            }
            Parameter::F32(w) => FloatBuffer::F32(w.share()),
            Parameter::Bf16(w) | Parameter::Bf16Nearest(w) => FloatBuffer::Bf16(w.share()),
            Parameter::Bf16Residual { high, .. } => FloatBuffer::Bf16(high.share()),
        };
        Ok(Dense::new(self.infos[i].shape.clone(), data).into())
    }
}

/// A standard normal number (Box & Muller 1958).
fn normal(stream: Stream, index: usize) -> f32 {
    let radius = (-2.0 * (1.0 - stream.unit(2 * index)).ln()).sqrt();
    radius * (TAU * stream.unit(2 * index + 1)).cos()
}
