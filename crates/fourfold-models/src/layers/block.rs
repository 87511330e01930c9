//! One block of the stack: attention and feed-forward, each behind a norm and added to the residual stream.

use std::sync::Arc;

use fourfold_kernels::{Backend, KvDtype, Prepared, Tensor};

use super::gqa::GqaSaved;
use super::mla::MlaSaved;
use super::mlp::MlpSaved;
use super::moe::MoeSaved;
use super::{Gqa, Gradients, Mla, Mlp, Moe, Norm, Pass, TrainPass};
use crate::loader::{Loader, Weights};
use crate::spec::{AttentionKind, BlockSpec, FeedForward};
use crate::{BlockCache, ModelError, ModelSpec, Observer, Segment};

enum Attention {
    Gqa(Gqa),
    Mla(Mla),
}

enum FeedForwardLayer {
    Mlp(Box<Mlp>),
    Moe(Box<Moe>),
}

/// `x += attention(norm(x)); x += feed_forward(norm(x))`.
pub struct Block {
    spec: BlockSpec,
    backend: Arc<dyn Backend>,
    input_norm: Norm,
    attention: Attention,
    post_norm: Norm,
    feed_forward: FeedForwardLayer,
}

impl Block {
    /// Reads block `index`'s tensors.
    ///
    /// # Errors
    /// There is no such block, or a tensor is missing, has another shape, or cannot be taken by the backend.
    pub fn load<'a>(
        spec: &ModelSpec,
        index: usize,
        source: impl Into<Weights<'a>>,
        backend: &Arc<dyn Backend>,
    ) -> Result<Self, ModelError> {
        let block = spec.blocks.get(index).ok_or(ModelError::NoBlock { index, blocks: spec.blocks.len() })?;
        Self::load_with(block, &Loader::new(source, &**backend), backend)
    }

    pub(crate) fn load_with(spec: &BlockSpec, loader: &Loader, backend: &Arc<dyn Backend>) -> Result<Self, ModelError> {
        let [input_norm, post_norm] = spec.norms();
        Ok(Self {
            backend: Arc::clone(backend),
            input_norm: Norm::load(&input_norm, loader)?,
            attention: match &spec.attention {
                AttentionKind::Gqa(gqa) => Attention::Gqa(Gqa::load(gqa, &spec.attention_prefix(), loader)?),
                AttentionKind::Mla(mla) => Attention::Mla(Mla::load(mla, &spec.attention_prefix(), loader)?),
            },
            post_norm: Norm::load(&post_norm, loader)?,
            feed_forward: match &spec.feed_forward {
                FeedForward::Mlp(mlp) => FeedForwardLayer::Mlp(Box::new(Mlp::load(mlp, &spec.mlp_prefix(), loader)?)),
                FeedForward::Moe(moe) => FeedForwardLayer::Moe(Box::new(Moe::load(moe, &spec.mlp_prefix(), loader)?)),
            },
            spec: spec.clone(),
        })
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self, dtype: KvDtype) -> BlockCache {
        self.spec.new_cache(dtype)
    }

    /// x `[tokens, hidden]` to the same shape; the tokens follow those in the cache and are added to it. `observer` is told
    /// of every linear layer's input.
    pub fn forward(&self, x: Tensor, cache: &mut BlockCache, observer: &mut dyn Observer) -> Tensor {
        let rows = x.rows();
        self.forward_batch(x, &mut [Segment { rows, cache }], observer)
    }

    /// As [`Block::forward`], for the rows of several sequences: `segments` says whose they are, in order.
    pub fn forward_batch(&self, mut x: Tensor, segments: &mut [Segment], observer: &mut dyn Observer) -> Tensor {
        let mut pass = Pass { backend: &*self.backend, observer, dropout: None };
        let normed = self.input_norm.forward(&x, &pass);
        match &self.attention {
            Attention::Gqa(gqa) => gqa.forward_add(&normed, segments, &mut x, &mut pass),
            Attention::Mla(mla) => mla.forward_add(&normed, segments, &mut x, &mut pass),
        }
        drop(normed);
        let normed = self.post_norm.forward(&x, &pass);
        match &self.feed_forward {
            FeedForwardLayer::Mlp(mlp) => mlp.forward_add(&normed, &mut x, &mut pass),
            FeedForwardLayer::Moe(moe) => {
                let fed = moe.forward(&normed, &mut pass);
                pass.backend.add(&mut x, &fed);
            }
        }
        x
    }

    /// Bytes of its weights in memory.
    pub fn byte_len(&self) -> usize {
        let attention = match &self.attention {
            Attention::Gqa(gqa) => gqa.byte_len(),
            Attention::Mla(mla) => mla.byte_len(),
        };
        let feed_forward = match &self.feed_forward {
            FeedForwardLayer::Mlp(mlp) => mlp.byte_len(),
            FeedForwardLayer::Moe(moe) => moe.byte_len(),
        };
        self.input_norm.byte_len() + self.post_norm.byte_len() + attention + feed_forward
    }

    /// As [`Block::forward`] for a packed batch without a cache, and what [`Block::backward`] needs.
    pub fn train_forward(&self, x: Tensor, pass: &TrainPass) -> (Tensor, BlockSaved) {
        let (middle, attention) = self.attend(&x, pass);
        let normed = self.fed(&middle, pass);
        let (fed, feed_forward) = match &self.feed_forward {
            FeedForwardLayer::Mlp(mlp) => {
                let (y, saved) = mlp.train_forward(normed.input(), pass);
                (y, FeedForwardSaved::Mlp(saved))
            }
            FeedForwardLayer::Moe(moe) => {
                let (y, saved) = moe.train_forward(normed.input().tensor(), pass);
                (y, FeedForwardSaved::Moe(saved))
            }
        };
        let y = pass.backend.sum(&middle, &fed);
        (y, BlockSaved { x, middle, attention, feed_forward })
    }

    /// What [`Block::train_forward`] saves, computed anew from the block's input: without the output, and so without the
    /// feed-forward's last products.
    pub fn recompute(&self, x: Tensor, pass: &TrainPass) -> BlockSaved {
        let (middle, attention) = self.attend(&x, pass);
        let normed = self.fed(&middle, pass);
        let feed_forward = match &self.feed_forward {
            FeedForwardLayer::Mlp(mlp) => FeedForwardSaved::Mlp(mlp.recompute(normed.input(), pass)),
            FeedForwardLayer::Moe(moe) => FeedForwardSaved::Moe(moe.recompute(normed.input().tensor(), pass)),
        };
        BlockSaved { x, middle, attention, feed_forward }
    }

    /// The input of attention.
    fn attended(&self, x: &Tensor, pass: &TrainPass) -> Prepared {
        let rounded = match &self.attention {
            Attention::Gqa(gqa) => gqa.rounds_input(pass),
            Attention::Mla(mla) => mla.rounds_input(pass),
        };
        self.input_norm.for_products(x, rounded, pass)
    }

    /// The input of the feed-forward. A router's is not rounded.
    fn fed(&self, middle: &Tensor, pass: &TrainPass) -> Prepared {
        let rounded = match &self.feed_forward {
            FeedForwardLayer::Mlp(mlp) => mlp.rounds_input(pass),
            FeedForwardLayer::Moe(_) => false,
        };
        self.post_norm.for_products(middle, rounded, pass)
    }

    /// The residual stream after attention.
    fn attend(&self, x: &Tensor, pass: &TrainPass) -> (Tensor, AttentionSaved) {
        let normed = self.attended(x, pass);
        let (mixed, attention) = match &self.attention {
            Attention::Gqa(gqa) => {
                let (y, saved) = gqa.train_forward(normed.input(), pass);
                (y, AttentionSaved::Gqa(saved))
            }
            Attention::Mla(mla) => {
                let (y, saved) = mla.train_forward(normed.input(), pass);
                (y, AttentionSaved::Mla(saved))
            }
        };
        drop(normed);
        (pass.backend.sum(x, &mixed), attention)
    }

    /// The gradient of the block's input from that of its output. The norms are computed anew.
    pub fn backward(&self, saved: BlockSaved, mut dy: Tensor, pass: &TrainPass, gradients: &mut Gradients) -> Tensor {
        let BlockSaved { x, middle, attention, feed_forward } = saved;
        let normed = self.fed(&middle, pass);
        let d_normed = match (&self.feed_forward, feed_forward) {
            (FeedForwardLayer::Mlp(mlp), FeedForwardSaved::Mlp(saved)) => {
                mlp.backward(normed.input(), saved, &dy, pass, gradients)
            }
            (FeedForwardLayer::Moe(moe), FeedForwardSaved::Moe(saved)) => {
                moe.backward(normed.input().tensor(), saved, &dy, pass, gradients)
            }
            (FeedForwardLayer::Mlp(_) | FeedForwardLayer::Moe(_), _) => {
                unreachable!("saved by this block's train_forward")
            }
        };
        drop(normed);
        pass.backend.add(&mut dy, &self.post_norm.backward(&middle, &d_normed, pass, gradients));
        drop((middle, d_normed));

        let normed = self.attended(&x, pass);
        let d_normed = match (&self.attention, attention) {
            (Attention::Gqa(gqa), AttentionSaved::Gqa(saved)) => {
                gqa.backward(normed.input(), saved, &dy, pass, gradients)
            }
            (Attention::Mla(mla), AttentionSaved::Mla(saved)) => {
                mla.backward(normed.input(), saved, &dy, pass, gradients)
            }
            (Attention::Gqa(_) | Attention::Mla(_), _) => unreachable!("saved by this block's train_forward"),
        };
        drop(normed);
        pass.backend.add(&mut dy, &self.input_norm.backward(&x, &d_normed, pass, gradients));
        dy
    }
}

enum AttentionSaved {
    Gqa(GqaSaved),
    Mla(MlaSaved),
}

enum FeedForwardSaved {
    Mlp(MlpSaved),
    Moe(MoeSaved),
}

/// What [`Block::backward`] needs of the forward.
pub struct BlockSaved {
    x: Tensor,
    /// The residual stream after attention.
    middle: Tensor,
    attention: AttentionSaved,
    feed_forward: FeedForwardSaved,
}
