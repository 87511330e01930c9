//! All trained tensors with their moments. Layers read them through [`WeightSource`], a block at a time, so that a block's
//! working copy lives only while the block runs.

use std::collections::HashMap;
use std::f32::consts::TAU;
use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_models::layers::{LORA_SCALING, Masks};
use fourfold_models::{ModelSpec, Role, WeightSpec};
use fourfold_tensor::{
    DType, Dense, FloatBuffer, Form, Mask, SourceError, Sparse, SparseError, SparseForm, SparseValues,
    SparseValuesForm, TensorInfo, Tuning, Weight, WeightSource,
};

use crate::optim::adamw::Step;
use crate::optim::parameter::Parameter;
use crate::optim::{OptimError, Optimizer, OptimizerState};
use crate::random::Stream;
use crate::recipe::Recipe;

mod frozen;

use frozen::FrozenBase;
pub use frozen::Tune;

/// A trained tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its elements; of a pruned tensor those that are kept.
    pub parameter: Parameter,
    /// Which are kept of a pruned tensor. It stays as it is.
    pub mask: Option<Arc<Mask>>,
    /// What of a packed tensor is trained, where that is not all of it: its elements are those numbers then.
    pub tuning: Option<Arc<Tuning>>,
    /// Its optimizer state.
    pub state: OptimizerState,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decays: bool,
}

/// The trained tensors of a model, in the order of the stack.
pub struct ParameterStore {
    infos: Vec<TensorInfo>,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    compute: DType,
    frozen: Option<FrozenBase>,
}

/// Which part of a tensor is held where that is not all of it.
enum Held {
    /// What a mask keeps.
    Kept(Arc<Mask>),
    /// The numbers of a tuning.
    Tuned(Arc<Tuning>),
}

/// How new tensors are filled: see [`ParameterStore::initialize`].
#[derive(Clone, Copy, Debug)]
pub struct Initialization {
    /// Deviation of matrices.
    pub deviation: f32,
    /// Seed of the run.
    pub seed: u64,
}

impl Initialization {
    /// Adds `weight`, number `tensor` of the model.
    fn push(self, store: &mut ParameterStore, spec: &ModelSpec, tensor: usize, weight: &WeightSpec, recipe: &Recipe) {
        let stream = Stream::new(self.seed, 0, tensor as u64);
        let writes_residual = weight.name.ends_with("o_proj.weight") || weight.name.ends_with("down_proj.weight");
        let residual = self.deviation / (2.0 * spec.blocks.len().max(1) as f32).sqrt();
        let deviation = if writes_residual { residual } else { self.deviation };
        let constant = |value: f32| move |_: usize, out: &mut [f32]| out.fill(value);
        match weight.role {
            Role::Norm | Role::RunningVariance => store.push(weight, recipe, constant(1.0)),
            Role::Bias | Role::RunningMean => store.push(weight, recipe, constant(0.0)),
            Role::Router if weight.shape.len() == 1 => store.push(weight, recipe, constant(0.0)),
            Role::Embedding
            | Role::LmHead
            | Role::Attention
            | Role::Mlp
            | Role::SharedExpert
            | Role::RoutedExpert
            | Role::Router
            | Role::Convolution => store.push(weight, recipe, |first, out: &mut [f32]| {
                out.iter_mut().enumerate().for_each(|(i, o)| *o = deviation * normal(stream, first + i));
            }),
        }
    }
}

/// Rate, step number and randomness of one step, for all tensors.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Number of the step, counted from 1.
    pub number: u64,
    /// Updates applied before: what the moments' bias correction goes by.
    pub applied: u64,
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
    /// A tensor is missing, has another shape, or cannot be read.
    pub fn load(weights: &[WeightSpec], source: &dyn WeightSource, recipe: &Recipe) -> Result<Self, SourceError> {
        let mut store = Self::empty(recipe);
        for weight in weights {
            store.read(weight, source, recipe)?;
        }
        Ok(store)
    }

    fn read(&mut self, weight: &WeightSpec, source: &dyn WeightSource, recipe: &Recipe) -> Result<(), SourceError> {
        let loaded = source.load(&weight.name)?;
        checked(weight, &loaded)?;
        match loaded {
            Weight::Dense(values) => self.push(weight, recipe, |first, out| values.data().read_f32(first, out)),
            Weight::Sparse(pruned) => self.push_pruned(weight, &pruned, recipe),
            packed @ (Weight::Quantized(_) | Weight::Fp8(_) | Weight::LowRank(_) | Weight::Sum(_)) => {
                let values = packed.to_f32();
                self.push(weight, recipe, |first, out| out.copy_from_slice(&values[first..first + out.len()]));
            }
        }
        Ok(())
    }

    /// A new model: matrices normal with deviation `deviation` (0.02 in most published configurations; the projections that
    /// write to the residual stream divided by √(2 · blocks), as in GPT-2, section 2.3), norms one, biases zero.
    pub fn initialize(spec: &ModelSpec, deviation: f32, seed: u64, recipe: &Recipe) -> Self {
        let mut store = Self::empty(recipe);
        let initialization = Initialization { deviation, seed };
        for (tensor, weight) in spec.weights().into_iter().enumerate() {
            initialization.push(&mut store, spec, tensor, &weight, recipe);
        }
        store
    }

    /// A new model whose tensors begin with `values(number of the tensor, tensor)`.
    pub fn new(
        weights: &[WeightSpec],
        recipe: &Recipe,
        mut values: impl FnMut(usize, &WeightSpec) -> Vec<f32>,
    ) -> Self {
        let mut store = Self::empty(recipe);
        for (i, weight) in weights.iter().enumerate() {
            let values = values(i, weight);
            store.push(weight, recipe, |first, out: &mut [f32]| out.copy_from_slice(&values[first..first + out.len()]));
        }
        store
    }

    /// As [`ParameterStore::load`], with new values for what the checkpoint is not `known` to hold.
    ///
    /// # Errors
    /// As [`ParameterStore::load`].
    pub fn load_or_initialize(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        known: &dyn Fn(&WeightSpec) -> bool,
        initialization: Initialization,
        recipe: &Recipe,
    ) -> Result<Self, SourceError> {
        let mut store = Self::empty(recipe);
        for (tensor, weight) in spec.weights().into_iter().enumerate() {
            match known(&weight) {
                true => store.read(&weight, source, recipe)?,
                false => initialization.push(&mut store, spec, tensor, &weight, recipe),
            }
        }
        Ok(store)
    }

    fn empty(recipe: &Recipe) -> Self {
        let compute = recipe.compute;
        Self { infos: Vec::new(), entries: Vec::new(), index: HashMap::new(), compute, frozen: None }
    }

    /// Adds a tensor whose elements `fill(first, out)` gives, some at a time.
    fn push(&mut self, weight: &WeightSpec, recipe: &Recipe, fill: impl Fn(usize, &mut [f32]) + Sync) {
        let len = weight.elements() as usize;
        let cols = len / weight.shape.first().copied().unwrap_or(1).max(1);
        let parameter = Parameter::new(recipe.storage_of(weight), len, cols, fill);
        self.push_entry(weight, recipe, parameter, None);
    }

    /// Adds a pruned tensor, of which what is kept is held and nothing else. Codes of 8 bits would need scales for columns that come
    /// and go from row to row: kept values are bf16 then.
    fn push_pruned(&mut self, weight: &WeightSpec, pruned: &Sparse, recipe: &Recipe) {
        let mask = pruned.mask();
        let mut row = vec![0.0; mask.cols()];
        let mut values = Vec::with_capacity(mask.kept());
        for r in 0..mask.rows() {
            pruned.read_row(r, &mut row);
            values.extend(mask.columns(r).map(|c| row[c]));
        }
        let fill = |first: usize, out: &mut [f32]| out.copy_from_slice(&values[first..first + out.len()]);
        let parameter = Parameter::new(recipe.storage_of(weight), values.len(), 1, fill);
        self.push_entry(weight, recipe, parameter, Some(Held::Kept(Arc::clone(mask))));
    }

    fn push_entry(&mut self, weight: &WeightSpec, recipe: &Recipe, parameter: Parameter, held: Option<Held>) {
        let (mask, tuning) = match held {
            None => (None, None),
            Some(Held::Kept(mask)) => (Some(mask), None),
            Some(Held::Tuned(tuning)) => (None, Some(tuning)),
        };
        let is_counted = matches!(weight.role, Role::RunningMean | Role::RunningVariance);
        let (precision, len) = (recipe.moments_of(weight), parameter.len());
        self.index.insert(weight.name.clone(), self.entries.len());
        self.infos.push(TensorInfo {
            name: weight.name.clone(),
            shape: weight.shape.clone(),
            storage: "trained".to_owned(),
            bytes: parameter.byte_len() as u64,
        });
        let state = OptimizerState::zeros(recipe.optimizer, if is_counted { 0 } else { len }, precision);
        // Numbers relative to what was stored are not to shrink.
        let decays = weight.shape.len() > 1 && tuning.is_none();
        self.entries.push(Entry { parameter, mask, tuning, state, decays });
    }

    /// Tensors with their names and shapes.
    pub fn entries(&self) -> impl Iterator<Item = (&TensorInfo, &Entry)> {
        self.infos.iter().zip(&self.entries)
    }

    /// As [`ParameterStore::entries`], to restore a checkpoint into.
    pub fn entries_mut(&mut self) -> impl Iterator<Item = (&TensorInfo, &mut Entry)> {
        self.infos.iter().zip(&mut self.entries)
    }

    /// The masks of pruned tensors.
    pub fn masks(&self) -> Masks {
        let named = self.entries().filter_map(|(info, entry)| Some((info.name.clone(), entry.mask.clone()?)));
        Arc::new(named.collect())
    }

    /// Elements that are trained.
    pub fn trained_elements(&self) -> u64 {
        self.entries.iter().map(|entry| entry.parameter.len() as u64).sum()
    }

    /// The forms in which pruned tensors are written.
    pub fn pruned_forms(&self) -> Vec<(String, Form)> {
        let form = |(info, entry): (&TensorInfo, &Entry)| {
            let mask = entry.mask.as_ref()?;
            let dtype = match &entry.parameter {
                Parameter::F32(_) => DType::F32,
                Parameter::Bf16(_)
                | Parameter::Bf16Nearest(_)
                | Parameter::Bf16Residual { .. }
                | Parameter::Int8(_) => DType::Bf16,
            };
            let values = SparseValuesForm::Float(dtype);
            let form = SparseForm { rows: mask.rows(), cols: mask.cols(), kept: mask.kept(), values };
            Some((info.name.clone(), Form::Sparse(form)))
        };
        self.entries().filter_map(form).collect()
    }

    /// Bytes of all weights, and of all optimizer states.
    pub fn byte_len(&self) -> (usize, usize) {
        let sum = |f: fn(&Entry) -> usize| self.entries.iter().map(f).sum();
        let masks: usize = self.entries.iter().filter_map(|e| Some(e.mask.as_ref()?.byte_len())).sum();
        (masks + sum(|e| e.parameter.byte_len()), sum(|e| e.state.byte_len()))
    }

    /// The elements of a tensor that is held here in f32 (norms, biases and routers are in every recipe).
    pub fn values(&self, name: &str) -> Option<Vec<f32>> {
        match &self.entries[*self.index.get(name)?].parameter {
            Parameter::F32(values) => Some(values.to_vec()),
            Parameter::Bf16(_) | Parameter::Bf16Nearest(_) | Parameter::Bf16Residual { .. } | Parameter::Int8(_) => {
                None
            }
        }
    }

    /// Changes a tensor that is counted rather than trained (running statistics, routers' biases), f32 in every recipe.
    ///
    /// # Panics
    /// When there is no such tensor.
    pub fn count(&mut self, name: &str, after: impl Fn(&[f32]) -> Vec<f32>) {
        let parameter = &mut self.entries[self.index[name]].parameter;
        let mut before = vec![0.0; parameter.len()];
        for mut block in parameter.blocks(before.len().next_multiple_of(128).max(128)) {
            block.read(&mut before);
            block.write(&after(&before), None, 0);
        }
    }

    /// Applies a gradient to the tensor named `name`.
    ///
    /// # Errors
    /// The gradient has another length or is not finite: the tensor has not changed then.
    ///
    /// # Panics
    /// When there is no such tensor: gradients come from layers that were loaded from this store.
    pub fn update(
        &mut self,
        name: &str,
        gradient: &Tensor,
        optimizer: &Optimizer,
        update: &Update,
    ) -> Result<(), OptimError> {
        let i = self.index[name];
        let entry = &mut self.entries[i];
        let optimizer = if entry.decays { *optimizer } else { optimizer.without_decay() };
        let step = Step {
            number: update.applied + 1,
            lr: update.lr,
            gradient_factor: update.gradient_factor,
            stream: Stream::new(update.seed, update.number, i as u64),
        };
        optimizer.update(name, &mut entry.parameter, &mut entry.state, gradient.host(), &step)
    }
}

impl WeightSource for ParameterStore {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self.index.get(name) {
            Some(&i) => Some(&self.infos[i]),
            None => self.frozen.as_ref()?.source.info(name),
        }
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let i = match (self.index.get(name), &self.frozen) {
            (Some(&i), _) => i,
            (None, Some(base)) if name.ends_with(LORA_SCALING) && !self.entries.is_empty() => {
                return Ok(Dense::from_f32(vec![1], vec![base.scaling]).into());
            }
            (None, Some(base)) => return base.source.load(name),
            (None, None) => {
                let (file, tensor) = ("the model in training".into(), name.to_owned());
                return Err(SourceError::Missing { file, tensor });
            }
        };
        if let (Some(tuning), Parameter::F32(numbers)) = (&self.entries[i].tuning, &self.entries[i].parameter) {
            return Ok(tuning.with(numbers));
        }
        let data = match &self.entries[i].parameter {
            Parameter::F32(w) if self.compute != DType::F32 && self.entries[i].decays => {
                FloatBuffer::from_f32(w.to_vec(), self.compute)
            }
            Parameter::F32(w) => FloatBuffer::F32(w.share()),
            Parameter::Bf16(w) | Parameter::Bf16Nearest(w) => FloatBuffer::Bf16(w.share()),
            Parameter::Bf16Residual { high, .. } => FloatBuffer::Bf16(high.share()),
            Parameter::Int8(int8) => {
                let rows = self.infos[i].shape[0];
                return Ok(int8.share(rows, int8.len() / rows.max(1)).into());
            }
        };
        match &self.entries[i].mask {
            None => Ok(Dense::new(self.infos[i].shape.clone(), data).into()),
            Some(mask) => {
                let pruned = Sparse::of(Arc::clone(mask), SparseValues::Float(data));
                let wrong = |reason: SparseError| SourceError::Tensor {
                    file: "the model in training".into(),
                    tensor: name.to_owned(),
                    reason: reason.into(),
                };
                Ok(pruned.map_err(wrong)?.into())
            }
        }
    }
}

/// Refuses a tensor of another shape than the model's.
fn checked(weight: &WeightSpec, loaded: &Weight) -> Result<(), SourceError> {
    weight.check_shape(&loaded.shape()).map_err(|error| SourceError::Tensor {
        file: "the checkpoint".into(),
        tensor: weight.name.clone(),
        reason: error.into(),
    })
}

/// A standard normal number (Box & Muller 1958).
fn normal(stream: Stream, index: usize) -> f32 {
    let radius = (-2.0 * (1.0 - stream.unit(2 * index)).ln()).sqrt();
    radius * (TAU * stream.unit(2 * index + 1)).cos()
}
