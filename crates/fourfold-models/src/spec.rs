//! What a model is made of, as data: read from a configuration, checked, nothing allocated yet.

use fourfold_kernels::KvDtype;
use fourfold_tensor::WeightSource;

use crate::layers::{Embedding, GqaSpec, Head, MlaSpec, MlpSpec, MoeSpec, NormSpec, RotarySpec};
use crate::{BlockCache, Cache};

/// What a tensor is for. Compression plans choose by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embeddings (and the output projection, where tied).
    Embedding,
    /// The output projection.
    LmHead,
    /// An attention's projections.
    Attention,
    /// A dense block's feed-forward.
    Mlp,
    /// A shared expert's feed-forward.
    SharedExpert,
    /// A routed expert's feed-forward.
    RoutedExpert,
    /// What chooses experts.
    Router,
    /// A normalisation's factors.
    Norm,
    /// What is added to a linear layer's output.
    Bias,
    /// A convolution.
    Convolution,
    /// A batch normalisation's running mean: counted, not trained.
    RunningMean,
    /// A batch normalisation's running variance.
    RunningVariance,
}

/// A tensor that the architecture reads.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSpec {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// The block it belongs to; `None` for embeddings, final norm and head.
    pub block: Option<usize>,
}

impl WeightSpec {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// A block's attention.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionKind {
    /// Grouped-query attention (multi-head and multi-query are its ends).
    Gqa(GqaSpec),
    /// Multi-head latent attention.
    Mla(MlaSpec),
}

/// A block's feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// Every token through the same one.
    Mlp(MlpSpec),
    /// A mixture of experts.
    Moe(MoeSpec),
}

/// One block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Its number.
    pub index: usize,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Epsilon of its two norms.
    pub norm_eps: f32,
    /// Mixes tokens.
    pub attention: AttentionKind,
    /// Mixes features.
    pub feed_forward: FeedForward,
}

impl BlockSpec {
    /// What its tensors' names begin with: `model.layers.3`.
    pub fn prefix(&self) -> String {
        format!("model.layers.{}", self.index)
    }

    pub(crate) fn attention_prefix(&self) -> String {
        format!("{}.self_attn", self.prefix())
    }

    pub(crate) fn mlp_prefix(&self) -> String {
        format!("{}.mlp", self.prefix())
    }

    /// The norms before attention and feed-forward.
    pub(crate) fn norms(&self) -> [NormSpec; 2] {
        ["input_layernorm", "post_attention_layernorm"].map(|part| NormSpec {
            name: format!("{}.{part}", self.prefix()),
            size: self.hidden,
            eps: self.norm_eps,
        })
    }

    /// Its tensors.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let [input_norm, post_norm] = self.norms();
        let mut weights = vec![input_norm.weight()];
        weights.extend(match &self.attention {
            AttentionKind::Gqa(gqa) => gqa.weights(&self.attention_prefix()),
            AttentionKind::Mla(mla) => mla.weights(&self.attention_prefix()),
        });
        weights.push(post_norm.weight());
        match &self.feed_forward {
            FeedForward::Mlp(mlp) => weights.extend(mlp.weights(&self.mlp_prefix())),
            FeedForward::Moe(moe) => weights.extend(moe.weights(&self.mlp_prefix())),
        }
        for weight in &mut weights {
            weight.block = Some(self.index);
        }
        weights
    }

    /// Elements a token leaves in the block's cache.
    pub fn cache_width(&self) -> usize {
        match &self.attention {
            AttentionKind::Gqa(gqa) => gqa.cache_width(),
            AttentionKind::Mla(mla) => mla.cache_width(),
        }
    }

    /// The rotation of its heads.
    pub fn rotary(&self) -> &RotarySpec {
        match &self.attention {
            AttentionKind::Gqa(gqa) => &gqa.rotary,
            AttentionKind::Mla(mla) => &mla.rotary,
        }
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self, dtype: KvDtype) -> BlockCache {
        match &self.attention {
            AttentionKind::Gqa(gqa) => gqa.new_cache(dtype),
            AttentionKind::Mla(mla) => mla.new_cache(dtype),
        }
    }

    /// f32 elements that training keeps of the forward over `tokens` where nothing is recomputed: the block's input, the
    /// residual stream between its halves, and what attention and feed-forward save.
    pub fn saved_elements(&self, tokens: u64) -> u64 {
        let attention = match &self.attention {
            AttentionKind::Gqa(gqa) => gqa.saved_elements(tokens),
            AttentionKind::Mla(mla) => mla.saved_elements(tokens),
        };
        let feed_forward = match &self.feed_forward {
            FeedForward::Mlp(mlp) => mlp.saved_elements(tokens),
            FeedForward::Moe(moe) => moe.saved_elements(tokens),
        };
        2 * tokens * self.hidden as u64 + attention + feed_forward
    }

    /// f32 elements alive at the peak of the forward over `tokens`: residual stream, normed input, and the hungrier half.
    pub fn scratch_elements(&self, tokens: u64) -> u64 {
        let attention = match &self.attention {
            AttentionKind::Gqa(gqa) => gqa.scratch_elements(tokens),
            AttentionKind::Mla(mla) => mla.scratch_elements(tokens),
        };
        let feed_forward = match &self.feed_forward {
            FeedForward::Mlp(mlp) => mlp.scratch_elements(tokens),
            FeedForward::Moe(moe) => moe.scratch_elements(tokens),
        };
        3 * tokens * self.hidden as u64 + attention.max(feed_forward)
    }
}

/// A whole language model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Its `model_type`: `llama`, `deepseek_v3`.
    pub architecture: String,
    /// Rows of the embedding matrix.
    pub vocab_size: usize,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Longest context the configuration allows.
    pub max_positions: usize,
    /// Whether the output projection is the embedding matrix.
    pub tied: bool,
    /// Classes of a sequence classifier, whose `score` stands in the output projection's place; `None` for a language model.
    pub classes: Option<usize>,
    /// Epsilon of the final norm.
    pub norm_eps: f32,
    /// The stack.
    pub blocks: Vec<BlockSpec>,
}

impl ModelSpec {
    /// Every tensor the architecture reads, in the order of the stack.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let mut weights = vec![Embedding::weight_spec(self)];
        weights.extend(self.blocks.iter().flat_map(BlockSpec::weights));
        weights.extend(Head::weights(self));
        weights
    }

    /// Outputs of the head: classes, or the vocabulary.
    pub fn outputs(&self) -> usize {
        self.classes.unwrap_or(self.vocab_size)
    }

    /// Elements of all tensors; a tied matrix counts once.
    pub fn parameters(&self) -> u64 {
        self.weights().iter().map(WeightSpec::elements).sum()
    }

    /// Elements that one token is multiplied with: of the routed experts only those it goes to, and of the embedding only
    /// what the output projection reads.
    pub fn active_parameters(&self) -> u64 {
        let blocks: u64 = self
            .blocks
            .iter()
            .map(|block| {
                let (all, routed) = block.weights().iter().fold((0, 0), |(all, routed), w| {
                    let is_routed = if w.role == Role::RoutedExpert { w.elements() } else { 0 };
                    (all + w.elements(), routed + is_routed)
                });
                match &block.feed_forward {
                    FeedForward::Mlp(_) => all,
                    FeedForward::Moe(moe) => {
                        all - routed + routed / moe.router.experts as u64 * moe.router.per_token as u64
                    }
                }
            })
            .sum();
        let head = self.outputs() as u64 * self.hidden_size as u64;
        blocks + head + self.hidden_size as u64
    }

    /// Bytes a token leaves in the caches of all blocks.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> usize {
        let element = match dtype {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
        };
        self.blocks.iter().map(BlockSpec::cache_width).sum::<usize>() * element
    }

    /// Empty caches for one sequence.
    pub fn new_cache(&self, dtype: KvDtype) -> Cache {
        Cache { blocks: self.blocks.iter().map(|block| block.new_cache(dtype)).collect() }
    }

    /// Names of the tensors that a checkpoint holds and the architecture does not read: multi-token-prediction layers, stored
    /// rotary frequencies, a tied model's second copy of its embedding.
    pub fn unused(&self, source: &dyn WeightSource) -> Vec<String> {
        let weights = self.weights();
        let known: std::collections::HashSet<&str> = weights.iter().map(|w| w.name.as_str()).collect();
        source.tensors().iter().filter(|t| !known.contains(t.name.as_str())).map(|t| t.name.clone()).collect()
    }
}
