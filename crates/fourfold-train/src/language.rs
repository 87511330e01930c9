//! A language model as a [`Network`]: next-token prediction over packed documents.

use std::sync::Arc;

use fourfold_kernels::{Backend, Tensor};
use fourfold_models::layers::{BlockSaved, Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, ModelSpec, WeightSpec};
use half::bf16;

use crate::batch::Batch;
use crate::network::{Apply, BatchError, Examples, Network, Run, Score};
use crate::store::ParameterStore;
use crate::trainer::TrainError;

/// A decoder with its vocabulary's cross-entropy.
pub struct LanguageModel {
    spec: ModelSpec,
}

/// What the forward kept of a block.
enum Kept {
    /// Everything its gradient needs, and the block.
    All(Box<(Block, BlockSaved)>),
    /// Its input, rounded to bf16.
    Input(Vec<bf16>),
}

impl LanguageModel {
    /// The model that `spec` describes.
    pub fn new(spec: ModelSpec) -> Self {
        Self { spec }
    }

    /// What it is made of.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

impl Examples for Batch {
    fn units(&self) -> usize {
        self.ids.len()
    }

    fn scored(&self) -> usize {
        Self::scored(self)
    }
}

impl Network for LanguageModel {
    type Batch = Batch;

    fn weights(&self) -> Vec<WeightSpec> {
        self.spec.weights()
    }

    fn check(&self, batch: &Batch) -> Result<(), BatchError> {
        let vocabulary = self.spec.vocab_size;
        if let Some(&id) = batch.ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(BatchError::Token { id, vocabulary });
        }
        if batch.scored() == 0 { Err(BatchError::Empty) } else { Ok(()) }
    }

    fn evaluate(&self, store: &ParameterStore, batch: &Batch, run: &Run) -> Result<Score, BatchError> {
        let backend: Arc<dyn Backend> = run.backend.clone();
        let pass = TrainPass { backend: &*run.backend, documents: &batch.documents, positions: &batch.positions };
        let embedding = Embedding::load(&self.spec, store, &backend)?;
        let mut x = embedding.forward(&batch.ids);
        for i in 0..self.spec.blocks.len() {
            x = Block::load(&self.spec, i, store, &backend)?.train_forward(x, &pass).0;
        }
        let head = Head::load_sharing(&self.spec, store, &backend, &embedding)?;
        let losses = head.loss(&x, &batch.targets, run.recipe.loss_chunk, &pass);
        Ok(Score { loss: sum(&losses), scored: batch.scored(), correct: None })
    }

    fn backward(
        &self,
        store: &mut ParameterStore,
        batch: &Batch,
        factor: f32,
        run: &Run,
        apply: Apply,
    ) -> Result<f64, TrainError> {
        let backend: Arc<dyn Backend> = run.backend.clone();
        let pass = TrainPass { backend: &*run.backend, documents: &batch.documents, positions: &batch.positions };
        let (rows, hidden) = (batch.ids.len(), self.spec.hidden_size);
        let embedding = Embedding::load(&self.spec, store, &backend)?;
        let mut x = embedding.forward(&batch.ids);
        let mut kept = Vec::with_capacity(self.spec.blocks.len());
        for i in 0..self.spec.blocks.len() {
            let block = Block::load(&self.spec, i, store, &backend)?;
            if run.recipe.recompute {
                let input = x.host().iter().map(|&v| bf16::from_f32(v)).collect();
                x = block.train_forward(x, &pass).0;
                kept.push(Kept::Input(input));
            } else {
                let (y, saved) = block.train_forward(x, &pass);
                x = y;
                kept.push(Kept::All(Box::new((block, saved))));
            }
        }

        let head = Head::load_sharing(&self.spec, store, &backend, &embedding)?;
        let mut gradients = Gradients::new(Trained::All);
        let chunk = run.recipe.loss_chunk;
        let (losses, mut dx) = head.loss_backward(&x, &batch.targets, factor, chunk, &pass, &mut gradients);
        drop((x, head));
        let loss = sum(&losses);
        if !loss.is_finite() {
            return Ok(loss);
        }
        // A tied projection's gradient waits for the embedding's share.
        let mut tied = self.spec.tied.then(|| gradients.take("model.embed_tokens.weight")).flatten();
        apply(store, &mut gradients)?;

        for i in (0..self.spec.blocks.len()).rev() {
            let (block, saved) = match kept.pop() {
                Some(Kept::All(both)) => *both,
                Some(Kept::Input(input)) => {
                    let block = Block::load(&self.spec, i, store, &backend)?;
                    let x = Tensor::new(rows, hidden, input.iter().map(|v| v.to_f32()).collect());
                    drop(input);
                    let saved = block.train_forward(x, &pass).1;
                    (block, saved)
                }
                None => unreachable!("one for each block"),
            };
            dx = block.backward(saved, dx, &pass, &mut gradients);
            drop(block);
            apply(store, &mut gradients)?;
        }
        embedding.backward(&batch.ids, &dx, &pass, &mut gradients);
        drop(embedding);
        if let (Some(share), Some(sum)) =
            (tied.take(), gradients.of("model.embed_tokens.weight", self.spec.vocab_size, hidden))
        {
            run.backend.add(sum, &share);
        }
        apply(store, &mut gradients)?;
        Ok(loss)
    }
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&l| f64::from(l)).sum()
}
