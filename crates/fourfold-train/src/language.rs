//! A language model as a [`Network`]: next-token prediction over packed documents. A sequence classifier is one whose head
//! gives classes and whose batches score the last token of each text alone ([`crate::labelled`]).

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::backward::{Backward, IGNORE};
use fourfold_kernels::{Backend, Bf16Tensor, Tensor};
use fourfold_models::layers::{BlockSaved, Gradients, TrainPass};
use fourfold_models::{Block, Embedding, Head, ModelError, ModelSpec, WeightSpec};

use crate::balance::Balance;
use crate::batch::Batch;
use crate::distill::{Taught, Teacher};
use crate::memory::make_room;
use crate::network::{Apply, BatchError, Examples, Network, Run, Score};
use crate::store::ParameterStore;
use crate::trainer::TrainError;
use crate::waiting::Waiting;

/// A decoder with its vocabulary's cross-entropy, or its divergence from a teacher.
pub struct LanguageModel {
    spec: ModelSpec,
    balance: Balance,
    teacher: Option<Teacher>,
}

/// What the forward kept of a block.
enum Kept {
    /// Everything its gradient needs, and the block.
    All(Box<(Block, BlockSaved)>),
    /// Each part's input, rounded to bf16.
    Inputs(Vec<Bf16Tensor>),
}

impl LanguageModel {
    /// The model that `spec` describes, the biases of its routers left as they are.
    pub fn new(spec: ModelSpec) -> Self {
        Self { spec, balance: Balance::default(), teacher: None }
    }

    /// With experts balanced by their routers' biases, where they have them.
    #[must_use]
    pub fn balanced(self, rate: f32) -> Self {
        Self { balance: Balance::new(rate), ..self }
    }

    /// With the distribution of a teacher to learn.
    #[must_use]
    pub fn taught(self, teacher: Option<Teacher>) -> Self {
        Self { teacher, ..self }
    }

    fn teach(&self, batch: &Batch, run: &Run) -> Result<Option<Taught>, ModelError> {
        self.teacher.as_ref().map(|teacher| teacher.run(batch, run)).transpose()
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

    fn prepare(&self, store: &ParameterStore, backend: &Arc<dyn Backward>) -> Result<(), ModelError> {
        if let Some(teacher) = &self.teacher {
            teacher.prepare(backend)?;
        }
        keep_frozen(&self.spec, store, backend)
    }

    fn check(&self, batch: &Batch) -> Result<(), BatchError> {
        let vocabulary = self.spec.vocab_size;
        if let Some(&id) = batch.ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(BatchError::Token { id, vocabulary });
        }
        let outputs = self.spec.outputs();
        if let Some(&class) = batch.targets.iter().find(|&&t| t != IGNORE && t as usize >= outputs) {
            return Err(BatchError::Class { class, outputs });
        }
        if let Some(teacher) = &self.teacher {
            teacher.check(&self.spec)?;
        }
        if batch.scored() == 0 { Err(BatchError::Empty) } else { Ok(()) }
    }

    fn evaluate(&self, store: &ParameterStore, batch: &Batch, run: &Run) -> Result<Score, BatchError> {
        let backend: Arc<dyn Backend> = run.backend.clone();
        let pass = TrainPass {
            backend: &*run.backend,
            documents: &batch.documents,
            positions: &batch.positions,
            dropout: run.dropout.map(|dropout| dropout.part(0)),
        };
        let taught = self.teach(batch, run)?;
        let embedding = Embedding::load(&self.spec, store.weights(), &backend)?;
        let x = forward(&self.spec, store, &embedding, batch, run)?;
        let head = Head::load_sharing(&self.spec, store.weights(), &backend, &embedding)?;
        let goals = Taught::goals(taught.as_ref(), &batch.targets);
        let sums = head.loss(&x, &goals, run.recipe.loss_chunk, &pass);
        let cross_entropy = taught.is_some().then_some(sums.cross_entropy);
        Ok(Score { loss: sums.loss, scored: batch.scored(), cross_entropy, correct: Some(sums.correct) })
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
        let pass = TrainPass {
            backend: &*run.backend,
            documents: &batch.documents,
            positions: &batch.positions,
            dropout: run.dropout.map(|dropout| dropout.part(0)),
        };
        let recompute = run.recipe.recompute;
        let parts = parts(&batch.documents, if recompute { run.recipe.block_tokens } else { usize::MAX });
        let trained = &*run.backend;
        let taught = self.teach(batch, run)?;
        let embedding = Embedding::load(&self.spec, store.weights(), &backend)?;
        // The rows of a part stay a tensor of their own from block to block.
        let mut rows = embed(&embedding, batch, &parts);
        let blocks = self.spec.blocks.len();
        let mut kept = Vec::with_capacity(blocks);
        if recompute {
            // Side by side before anything that is freed again: holes between them would fit no other buffer.
            let input = |x: &Tensor| Bf16Tensor::zeros(x.rows(), x.cols());
            kept.extend((0..blocks).map(|_| Kept::Inputs(rows.iter().map(input).collect())));
        }
        for i in 0..blocks {
            let block = Block::load(&self.spec, i, store.weights(), &backend)?;
            if let Some(Kept::Inputs(inputs)) = kept.get_mut(i) {
                for ((part, x), input) in parts.iter().zip(&mut rows).zip(inputs) {
                    trained.write_bf16(x, input);
                    *x = block.train_forward(take(x), &part.pass(batch, run)).0;
                }
            } else {
                let (y, saved) = block.train_forward(whole(rows, trained), &pass);
                rows = vec![y];
                kept.push(Kept::All(Box::new((block, saved))));
            }
        }

        let chunk = run.recipe.loss_chunk;
        // The parts lie where the last block left room. Together they leave what is between them to the head's larger buffers.
        let x = whole(rows, trained);
        make_room(chunk.min(x.rows()) * self.spec.outputs());
        let head = Head::load_sharing(&self.spec, store.weights(), &backend, &embedding)?;
        let mut gradients = Gradients::new(store.trained()).masked(store.masks()).tuned(store.tunings());
        let goals = Taught::goals(taught.as_ref(), &batch.targets);
        let (losses, dx) = head.loss_backward(x, &goals, factor, chunk, &pass, &mut gradients);
        drop((head, taught));
        let loss = sum(&losses);
        if !loss.is_finite() {
            return Ok(loss);
        }
        // A tied projection's gradient waits for the embedding's share.
        let tied = self.spec.tied.then(|| gradients.take("model.embed_tokens.weight")).flatten();
        let tied = tied.map(|share| match run.recipe.narrows_waiting() {
            true => Tied::Narrow(Waiting::new(share)),
            false => Tied::Whole(share),
        });
        apply(store, &mut gradients)?;

        let mut rows = cut(dx, &parts, trained);
        for i in (0..blocks).rev() {
            match kept.pop() {
                Some(Kept::All(both)) => {
                    let (block, saved) = *both;
                    rows = vec![block.backward(saved, whole(rows, trained), &pass, &mut gradients)];
                }
                Some(Kept::Inputs(inputs)) => {
                    let block = Block::load(&self.spec, i, store.weights(), &backend)?;
                    for ((part, dx), input) in parts.iter().zip(&mut rows).zip(inputs) {
                        let pass = part.pass(batch, run);
                        let saved = block.recompute(trained.rows_of_bf16(&input, 0..input.rows()), &pass);
                        *dx = block.backward(saved, take(dx), &pass, &mut gradients);
                    }
                }
                None => unreachable!("one for each block"),
            }
            rows.iter_mut().for_each(|dx| run.narrow(dx));
            apply(store, &mut gradients)?;
        }
        if let Some(share) = tied {
            let whole = || match share {
                Tied::Narrow(waiting) => waiting.widen(),
                Tied::Whole(share) => share,
            };
            gradients.add("model.embed_tokens.weight", whole, |_| unreachable!("taken out above"));
        }
        for (part, dx) in parts.iter().zip(rows) {
            embedding.backward(&batch.ids[part.rows.clone()], &dx, &pass, &mut gradients);
        }
        drop(embedding);
        apply(store, &mut gradients)?;
        if run.counts {
            self.balance.count(gradients.take_loads());
        }
        Ok(loss)
    }

    fn step_done(&self, store: &mut ParameterStore, applied: bool) {
        self.balance.step_done(store, applied);
    }

    fn expert_imbalance(&self) -> Option<f64> {
        self.balance.imbalance()
    }
}

/// A tied projection's share of the embedding's gradient.
enum Tied {
    Whole(Tensor),
    Narrow(Waiting),
}

/// Builds every layer once, so that the matrices of a frozen base are kept from then on.
pub(crate) fn keep_frozen(
    spec: &ModelSpec,
    store: &ParameterStore,
    backend: &Arc<dyn Backward>,
) -> Result<(), ModelError> {
    if !store.has_frozen_base() {
        return Ok(());
    }
    let backend: Arc<dyn Backend> = backend.clone();
    let embedding = Embedding::load(spec, store.weights(), &backend)?;
    Head::load_sharing(spec, store.weights(), &backend, &embedding)?;
    (0..spec.blocks.len()).try_for_each(|i| Block::load(spec, i, store.weights(), &backend).map(drop))
}

/// The hidden rows `[tokens, hidden]` before the final norm; nothing of the blocks is kept.
pub(crate) fn forward(
    spec: &ModelSpec,
    store: &ParameterStore,
    embedding: &Embedding,
    batch: &Batch,
    run: &Run,
) -> Result<Tensor, ModelError> {
    let backend: Arc<dyn Backend> = run.backend.clone();
    let parts = parts(&batch.documents, run.recipe.block_tokens);
    let mut rows = embed(embedding, batch, &parts);
    for i in 0..spec.blocks.len() {
        let block = Block::load(spec, i, store.weights(), &backend)?;
        for (part, x) in parts.iter().zip(&mut rows) {
            *x = block.train_forward(take(x), &part.pass(batch, run)).0;
        }
    }
    Ok(whole(rows, &*run.backend))
}

/// Each part's embedded tokens.
fn embed(embedding: &Embedding, batch: &Batch, parts: &[Part]) -> Vec<Tensor> {
    parts.iter().map(|part| embedding.forward(&batch.ids[part.rows.clone()])).collect()
}

/// The tensor itself, nothing left in its place.
fn take(x: &mut Tensor) -> Tensor {
    std::mem::replace(x, Tensor::zeros(0, 0))
}

/// The rows of all parts, one below the other.
fn whole(mut parts: Vec<Tensor>, backend: &dyn Backward) -> Tensor {
    match parts.pop() {
        Some(only) if parts.is_empty() => only,
        last => {
            let cols = last.as_ref().map_or(0, Tensor::cols);
            parts.extend(last);
            let mut rows = Tensor::zeros(parts.iter().map(Tensor::rows).sum(), cols);
            let mut first = 0;
            for part in parts {
                backend.set_rows(&mut rows, first, &part);
                first += part.rows();
            }
            rows
        }
    }
}

/// Each part's rows, as tensors of their own.
fn cut(x: Tensor, parts: &[Part], backend: &dyn Backward) -> Vec<Tensor> {
    match parts {
        [_] => vec![x],
        parts => parts.iter().map(|part| backend.rows(&x, part.rows.clone())).collect(),
    }
}

/// Documents that are run through a block together.
struct Part {
    /// Rows of the batch.
    rows: Range<usize>,
    /// The documents, counted from the part's first row.
    documents: Vec<Range<usize>>,
}

impl Part {
    fn pass<'a>(&'a self, batch: &'a Batch, run: &'a Run) -> TrainPass<'a> {
        TrainPass {
            backend: &*run.backend,
            documents: &self.documents,
            positions: &batch.positions[self.rows.clone()],
            dropout: run.dropout.map(|dropout| dropout.part(self.rows.start)),
        }
    }
}

/// Whole documents, at most `most` tokens together unless one alone has more.
fn parts(documents: &[Range<usize>], most: usize) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for document in documents {
        match parts.last_mut() {
            Some(part) if document.end - part.rows.start <= most => {
                part.documents.push(document.start - part.rows.start..document.end - part.rows.start);
                part.rows.end = document.end;
            }
            _ => parts.push(Part { rows: document.clone(), documents: std::iter::once(0..document.len()).collect() }),
        }
    }
    parts
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&l| f64::from(l)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Extent;

    #[test]
    fn parts_are_whole_documents_and_all_of_them() {
        let documents = [0..3, 3..5, 5..12, 12..13, 13..14];
        let parts_of_5 = parts(&documents, 5);
        assert_eq!(parts_of_5.iter().map(|p| p.rows.clone()).collect::<Vec<_>>(), [0..5, 5..12, 12..14]);
        assert_eq!(parts_of_5[0].documents, [0..3, 3..5]);
        assert_eq!(parts_of_5[2].documents, [0..1, 1..2]);
        for most in [1, 3, 5, 8, usize::MAX] {
            let largest = parts(&documents, most).iter().map(|p| p.rows.len()).max().unwrap();
            assert_eq!(Extent::of(documents.iter().map(Range::len), most), Extent { tokens: 14, part: largest });
        }
        assert_eq!(parts(&documents, usize::MAX).len(), 1);
        assert!(parts(&[], 5).is_empty());
    }
}
