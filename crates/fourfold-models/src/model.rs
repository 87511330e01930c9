//! A model ready to run.

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::{Backend, KernelError, KvDtype, Tensor};
use fourfold_tensor::WeightSource;

use crate::layers::{Block, Embedding, Head};
use crate::loader::Loader;
use crate::{Cache, ModelError, ModelSpec, NoObserver, Segment, Sequence};

/// A language model in memory: embedding, blocks, head.
pub struct Model {
    spec: ModelSpec,
    backend: Arc<dyn Backend>,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
}

impl Model {
    /// Reads every tensor of `spec` from `source` into the layout of `backend`, packed weights packed. `progress` is told
    /// what comes next.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or cannot be taken by the backend.
    pub fn load(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        backend: Arc<dyn Backend>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Self, ModelError> {
        if spec.classes.is_some() {
            return Err(ModelError::Inconsistent(
                "a sequence classifier predicts no text: see `fourfold eval`".to_owned(),
            ));
        }
        progress("embedding");
        let embedding = Embedding::load(spec, source, &backend)?;
        let loader = Loader::new(source, &*backend);
        let mut blocks = Vec::with_capacity(spec.blocks.len());
        for block in &spec.blocks {
            progress(&format!("block {} of {}", block.index + 1, spec.blocks.len()));
            blocks.push(Block::load_with(block, &loader, &backend)?);
        }
        progress("head");
        let head = Head::load_sharing(spec, source, &backend, &embedding)?;
        Ok(Self { spec: spec.clone(), backend, embedding, blocks, head })
    }

    /// Where the model runs: what reads its hidden rows and logits.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// What the model is made of.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Empty caches for one sequence.
    pub fn new_cache(&self, dtype: KvDtype) -> Cache {
        self.spec.new_cache(dtype)
    }

    /// Runs `ids` after the tokens in `cache`, and adds them to it: hidden rows after the final norm, `[ids.len(), hidden]`.
    ///
    /// # Panics
    /// When an id is not below the vocabulary's size: callers check what a tokenizer gave them.
    pub fn hidden(&self, ids: &[u32], cache: &mut Cache) -> Tensor {
        self.hidden_batch(&mut [Sequence { ids, cache }])
    }

    /// As [`Model::hidden`], for several sequences at once: their rows one below the other, in order.
    ///
    /// # Panics
    /// As [`Model::hidden`].
    pub fn hidden_batch(&self, sequences: &mut [Sequence]) -> Tensor {
        let ids: Vec<u32> = sequences.iter().flat_map(|sequence| sequence.ids).copied().collect();
        let mut x = self.embedding.forward(&ids);
        for (index, block) in self.blocks.iter().enumerate() {
            let mut segments: Vec<Segment> = sequences
                .iter_mut()
                .map(|sequence| Segment { rows: sequence.ids.len(), cache: &mut sequence.cache.blocks[index] })
                .collect();
            x = block.forward_batch(x, &mut segments, &mut NoObserver);
        }
        self.head.norm(&x)
    }

    /// Scores of every token of the vocabulary, `[rows, vocab]`, for rows of [`Model::hidden`]. Callers bound the rows.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.head.logits(hidden)
    }

    /// Values of [`Model::logits`] of the rows `range` of `hidden`, row-major.
    ///
    /// # Errors
    /// The device that the model runs on failed.
    pub fn logits_of(&self, hidden: &Tensor, range: Range<usize>) -> Result<Vec<f32>, KernelError> {
        let logits = if range == (0..hidden.rows()) {
            self.logits(hidden)
        } else {
            self.logits(&self.backend.gather_rows(hidden, &range.collect::<Vec<_>>()))
        };
        self.backend.take(logits)
    }

    /// Bytes of all weights in memory; a tied matrix counts once.
    pub fn weight_bytes(&self) -> usize {
        self.embedding.byte_len() + self.blocks.iter().map(Block::byte_len).sum::<usize>() + self.head.byte_len()
    }
}
