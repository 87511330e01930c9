//! Token embeddings.

use std::sync::Arc;

use fourfold_kernels::{Backend, DeviceWeight, Tensor};

use super::{Gradients, TrainPass};
use crate::loader::{Loader, Weights};
use crate::{ModelError, ModelSpec, Role, WeightSpec};

/// Name of the embedding tensor in every architecture here.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A row of a `[vocab, hidden]` matrix for each token. The matrix stays packed; only the rows asked for are read.
pub struct Embedding {
    backend: Arc<dyn Backend>,
    weight: Arc<DeviceWeight>,
}

impl Embedding {
    /// Its tensor.
    pub fn weight_spec(spec: &ModelSpec) -> WeightSpec {
        WeightSpec {
            name: EMBEDDING.to_owned(),
            shape: vec![spec.vocab_size, spec.hidden_size],
            role: Role::Embedding,
            block: None,
        }
    }

    /// Reads the matrix.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or cannot be taken by the backend.
    pub fn load<'a>(
        spec: &ModelSpec,
        source: impl Into<Weights<'a>>,
        backend: &Arc<dyn Backend>,
    ) -> Result<Self, ModelError> {
        let loader = Loader::new(source, &**backend);
        let weight = loader.matrix(EMBEDDING, spec.vocab_size, spec.hidden_size)?;
        Ok(Self { backend: Arc::clone(backend), weight })
    }

    /// `[ids.len(), hidden]`.
    ///
    /// # Panics
    /// When an id is not below the vocabulary's size: callers check what a tokenizer gave them.
    pub fn forward(&self, ids: &[u32]) -> Tensor {
        self.backend.embedding(&self.weight, ids)
    }

    /// The matrix, for an output head tied to it.
    pub(crate) fn shared_weight(&self) -> Arc<DeviceWeight> {
        Arc::clone(&self.weight)
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.weight.byte_len()
    }

    /// Adds the gradient of the rows that `ids` took; dy `[ids.len(), hidden]`.
    pub fn backward(&self, ids: &[u32], dy: &Tensor, pass: &TrainPass, gradients: &mut Gradients) {
        gradients.add_rows(EMBEDDING, [self.weight.rows(), self.weight.cols()], ids, dy, pass.backend);
    }
}
