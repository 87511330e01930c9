//! Taking tensors out of a checkpoint, their shapes checked first.

use std::sync::{Arc, Mutex};

use fourfold_kernels::{Backend, DeviceWeight, Tensor};
use fourfold_tensor::{Weight, WeightSource};

use crate::ModelError;
use crate::layers::{Rotary, RotarySpec};

/// A checkpoint and the backend its weights go to, while layers are built.
pub(crate) struct Loader<'a> {
    source: &'a dyn WeightSource,
    backend: &'a dyn Backend,
    rotaries: Mutex<Vec<Arc<Rotary>>>,
}

impl<'a> Loader<'a> {
    pub fn new(source: &'a dyn WeightSource, backend: &'a dyn Backend) -> Self {
        Self { source, backend, rotaries: Mutex::new(Vec::new()) }
    }

    /// A weight matrix `[rows, cols]` in the backend's layout, packed as it was stored.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Arc<DeviceWeight>, ModelError> {
        let weight = self.read(name, &[&[rows, cols]])?;
        self.upload(name, weight)
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
        Ok(Tensor::new(1, len, self.read(name, &[&[len], &[1, len]])?.to_f32()))
    }

    /// Rotation tables; layers with equal ones share them.
    pub fn rotary(&self, spec: &RotarySpec) -> Arc<Rotary> {
        let mut known = self.rotaries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
        if let Some(info) = self.source.info(name) {
            check(&info.shape)?;
        }
        let weight = self.source.load(name)?;
        check(&weight.shape())?;
        Ok(weight)
    }
}
