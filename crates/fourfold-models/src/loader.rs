//! Taking tensors out of a checkpoint, their shapes checked first.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use fourfold_kernels::{Backend, DeviceWeight, Tensor};
use fourfold_tensor::{Weight, WeightSource};

use crate::ModelError;
use crate::layers::{LORA_A, Rotary, RotarySpec};

/// Matrices that stay as they are while layers over them are built again and again: the frozen weights under an adapter, which
/// would be read and laid out anew for every block of every step. They are kept in the backend's layout, packed ones packed.
pub struct Frozen {
    trained: HashSet<String>,
    matrices: Mutex<HashMap<String, Arc<DeviceWeight>>>,
}

impl Frozen {
    /// Everything is frozen but the tensors named.
    pub fn new(trained: HashSet<String>) -> Self {
        Self { trained, matrices: Mutex::default() }
    }

    /// What is not frozen.
    pub fn trained(&self) -> &HashSet<String> {
        &self.trained
    }

    /// Bytes kept.
    pub fn byte_len(&self) -> usize {
        self.lock().values().map(|weight| weight.byte_len()).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<DeviceWeight>>> {
        self.matrices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the layers of a training step come from.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// Every tensor.
    pub source: &'a dyn WeightSource,
    /// What is kept of it from one step to the next; `None` where all of it is trained.
    pub frozen: Option<&'a Frozen>,
}

impl<'a> From<&'a dyn WeightSource> for Weights<'a> {
    fn from(source: &'a dyn WeightSource) -> Self {
        Self { source, frozen: None }
    }
}

impl<'a, S: WeightSource> From<&'a S> for Weights<'a> {
    fn from(source: &'a S) -> Self {
        Self { source, frozen: None }
    }
}

/// A checkpoint and the backend its weights go to, while layers are built.
pub(crate) struct Loader<'a> {
    weights: Weights<'a>,
    backend: &'a dyn Backend,
    rotaries: Mutex<Vec<Arc<Rotary>>>,
    /// Whether the source has adapters at all: most have none, and every linear layer asks.
    has_adapters: bool,
}

impl<'a> Loader<'a> {
    pub fn new<'w: 'a>(weights: impl Into<Weights<'w>>, backend: &'a dyn Backend) -> Self {
        let weights: Weights<'a> = weights.into();
        let has_adapters = weights.source.tensors().iter().any(|tensor| tensor.name.ends_with(LORA_A));
        Self { weights, backend, rotaries: Mutex::new(Vec::new()), has_adapters }
    }

    /// A weight matrix `[rows, cols]` in the backend's layout, packed as it was stored.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Arc<DeviceWeight>, ModelError> {
        let frozen = self.weights.frozen.filter(|frozen| !frozen.trained.contains(name));
        if let Some(known) = frozen.and_then(|frozen| frozen.lock().get(name).cloned()) {
            return Ok(known);
        }
        let weight = self.upload(name, self.read(name, &[&[rows, cols]])?)?;
        if let Some(frozen) = frozen {
            frozen.lock().insert(name.to_owned(), Arc::clone(&weight));
        }
        Ok(weight)
    }

    /// Rows of the adapter's matrix A of that name, where there is one.
    pub fn adapter_rank(&self, name: &str) -> Option<usize> {
        if !self.has_adapters {
            return None;
        }
        self.weights.source.info(name)?.shape.first().copied()
    }

    /// A convolution's weight of PyTorch's `shape`, or stored as the matrix of as many rows.
    pub fn convolution(&self, name: &str, shape: &[usize]) -> Result<Arc<DeviceWeight>, ModelError> {
        let matrix = [shape[0], shape[1..].iter().product()];
        let weight = self.read(name, &[shape, &matrix])?;
        self.upload(name, weight)
    }

    /// A weight matrix `[rows, cols]` widened to f32: routers, whose choices must not move.
    pub fn matrix_f32(&self, name: &str, rows: usize, cols: usize) -> Result<Arc<DeviceWeight>, ModelError> {
        let weight = self.read(name, &[&[rows, cols]])?;
        let wide = fourfold_tensor::Dense::from_f32(vec![rows, cols], weight.to_f32());
        self.upload(name, wide.into())
    }

    /// A vector of `len` elements as a `[1, len]` tensor: norm weights and biases. A quantized one is stored as one row.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor, ModelError> {
        Ok(self.backend.tensor(1, len, self.values(name, len)?))
    }

    /// As [`Loader::vector`], for what is computed with outside the kernels.
    pub fn values(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(self.read(name, &[&[len], &[1, len]])?.to_f32())
    }

    /// Rotation tables; layers with equal ones share them.
    pub fn rotary(&self, spec: &RotarySpec) -> Arc<Rotary> {
        let mut known = self.rotaries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rotary) = known.iter().find(|rotary| rotary.spec() == spec) {
            return Arc::clone(rotary);
        }
        let rotary = Arc::new(Rotary::new(spec.clone()));
        known.push(Arc::clone(&rotary));
        rotary
    }

    fn upload(&self, name: &str, weight: Weight) -> Result<Arc<DeviceWeight>, ModelError> {
        let uploaded =
            self.backend.upload(weight).map_err(|source| ModelError::Kernel { tensor: name.to_owned(), source })?;
        Ok(Arc::new(uploaded))
    }

    /// Reads a tensor of one of these shapes, the first being the usual one: checked before its bytes are touched, and again as
    /// read.
    fn read(&self, name: &str, expected: &[&[usize]]) -> Result<Weight, ModelError> {
        let check = |found: &[usize]| {
            if expected.contains(&found) {
                Ok(())
            } else {
                let (expected, found) = (expected[0].to_vec(), found.to_vec());
                Err(ModelError::Shape { tensor: name.to_owned(), expected, found })
            }
        };
        if let Some(info) = self.weights.source.info(name) {
            check(&info.shape)?;
        }
        let weight = self.weights.source.load(name)?;
        check(&weight.shape())?;
        Ok(weight)
    }
}
