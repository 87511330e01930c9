//! A convolutional classifier, loaded to be run.

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Tensor};
use fourfold_tensor::WeightSource;

use crate::layers::Stack;
use crate::loader::Loader;
use crate::{ConvNetSpec, ModelError, NoObserver, Observer};

/// A convolutional classifier with its weights.
pub struct ConvNet {
    stack: Stack,
    backend: Arc<dyn Backward>,
}

impl ConvNet {
    /// Loads every tensor, in whatever form it is stored.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or cannot be taken by the backend.
    pub fn load(spec: &ConvNetSpec, source: &dyn WeightSource, backend: Arc<dyn Backward>) -> Result<Self, ModelError> {
        let stack = Self::load_part(spec, 0..spec.layers.len(), source, &backend)?;
        Ok(Self { stack, backend })
    }

    /// Some layers of the stack alone ([`ConvNetSpec::parts`]).
    ///
    /// # Errors
    /// As [`ConvNet::load`].
    pub fn load_part(
        spec: &ConvNetSpec,
        layers: Range<usize>,
        source: &dyn WeightSource,
        backend: &Arc<dyn Backward>,
    ) -> Result<Stack, ModelError> {
        let backend: Arc<dyn Backend> = backend.clone();
        Stack::load(&spec.layers[layers], &Loader::new(source, &*backend))
    }

    /// Images `[images · height · width, channels]`, normalised, to logits `[images, classes]`.
    pub fn logits(&self, images: Tensor) -> Tensor {
        self.logits_observed(images, &mut NoObserver)
    }

    /// As [`ConvNet::logits`]; the observer sees the patches that convolutions multiply.
    pub fn logits_observed(&self, images: Tensor, observer: &mut dyn Observer) -> Tensor {
        self.stack.forward(images, &*self.backend, observer)
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> usize {
        self.stack.byte_len()
    }
}
