//! Grouped-query attention (Ainslie et al. 2023), with the variants of llama, qwen2 and qwen3.

use std::sync::Arc;

use fourfold_kernels::backward::{AttentionOutput, SelfAttention};
use fourfold_kernels::{AttentionSpec, Input, KvDtype, RopeSpec, Tensor, Values};

use super::{Gradients, Linear, LinearSpec, Norm, NormSpec, Pass, Rotary, RotarySpec, TrainPass};
use crate::batch::each_sequence;
use crate::loader::Loader;
use crate::{BlockCache, ModelError, Role, Segment, WeightSpec};

/// The shape of a grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct GqaSpec {
    /// Features of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the output projection.
    pub output_bias: bool,
    /// RMS norm over each query and key head before rotation, with this epsilon (qwen3).
    pub qk_norm: Option<f32>,
    /// The rotation; its `dim` may be less than `head_dim`.
    pub rotary: RotarySpec,
    /// Positions a query sees, itself included; all where `None`.
    pub window: Option<usize>,
}

impl GqaSpec {
    fn linears(&self, prefix: &str) -> [LinearSpec; 4] {
        let linear = |part: &str, outputs, inputs, bias| LinearSpec {
            name: format!("{prefix}.{part}"),
            outputs,
            inputs,
            bias,
            role: Role::Attention,
        };
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            linear("q_proj", queries, self.hidden, self.qkv_bias),
            linear("k_proj", keys, self.hidden, self.qkv_bias),
            linear("v_proj", keys, self.hidden, self.qkv_bias),
            linear("o_proj", self.hidden, queries, self.output_bias),
        ]
    }

    fn head_norms(&self, prefix: &str) -> Option<[NormSpec; 2]> {
        let norm = |part: &str, eps| NormSpec { name: format!("{prefix}.{part}"), size: self.head_dim, eps };
        self.qk_norm.map(|eps| [norm("q_norm", eps), norm("k_norm", eps)])
    }

    /// Its tensors below `prefix`.
    pub fn weights(&self, prefix: &str) -> Vec<WeightSpec> {
        let linears = self.linears(prefix).into_iter().flat_map(|l| l.weights().collect::<Vec<_>>());
        let norms = self.head_norms(prefix).into_iter().flatten().map(|n| n.weight());
        linears.chain(norms).collect()
    }

    /// Elements a token leaves in the cache: keys and values.
    pub fn cache_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }

    /// An empty cache.
    pub fn new_cache(&self, dtype: KvDtype) -> BlockCache {
        let width = self.kv_heads * self.head_dim;
        BlockCache::keys_and_values(width, width, dtype)
    }

    /// f32 elements that training keeps of the forward over `tokens` ([`GqaSaved`]).
    pub fn saved_elements(&self, tokens: u64) -> u64 {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let unnormed = if self.qk_norm.is_some() { queries + keys } else { 0 };
        tokens * (2 * queries + 2 * keys + self.heads + unnormed) as u64
    }

    /// f32 elements alive at the peak of the forward over `tokens`, input not counted: queries, keys, values and the
    /// attention's output.
    pub fn scratch_elements(&self, tokens: u64) -> u64 {
        tokens * 2 * ((self.heads + self.kv_heads) * self.head_dim) as u64
    }
}

/// Grouped-query attention.
pub struct Gqa {
    spec: GqaSpec,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    head_norms: Option<[Norm; 2]>,
    rotary: Arc<Rotary>,
}

impl Gqa {
    pub(crate) fn load(spec: &GqaSpec, prefix: &str, loader: &Loader) -> Result<Self, ModelError> {
        let [q, k, v, o] = spec.linears(prefix);
        let head_norms = match spec.head_norms(prefix) {
            Some([q, k]) => Some([Norm::load(&q, loader)?, Norm::load(&k, loader)?]),
            None => None,
        };
        Ok(Self {
            spec: spec.clone(),
            q: Linear::load(&q, loader)?,
            k: Linear::load(&k, loader)?,
            v: Linear::load(&v, loader)?,
            o: Linear::load(&o, loader)?,
            head_norms,
            rotary: loader.rotary(&spec.rotary),
        })
    }

    /// Adds to `sum` `[tokens, hidden]` what it makes of x, of the same shape; each segment's tokens follow those in its cache and are
    /// added to it.
    pub fn forward_add(&self, x: &Tensor, segments: &mut [Segment], sum: &mut Tensor, pass: &mut Pass) {
        let [mut q, mut k, v] = Linear::forward_shared([&self.q, &self.k, &self.v], x, pass);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            q = q_norm.forward_heads(q, pass);
            k = k_norm.forward_heads(k, pass);
        }
        let mixed = each_sequence(pass.backend, segments, [q, k, v], |qkv, cache| self.attend(qkv, cache, pass));
        self.o.forward_add(&mixed, sum, pass);
    }

    /// Attention of one sequence: queries, keys and values of its new tokens, not rotated yet, to `[tokens, heads · head_dim]`.
    fn attend(&self, [q, k, v]: [Tensor; 3], cache: &mut BlockCache, pass: &Pass) -> Tensor {
        let first_position = cache.len();
        let BlockCache::KeysAndValues { keys, values } = cache else {
            unreachable!("the cache was made by this block's new_cache");
        };
        let q = self.rotate(q, self.spec.heads, first_position, pass);
        let k = self.rotate(k, self.spec.kv_heads, first_position, pass);
        keys.append(&k);
        values.append(&v);
        drop((k, v));
        let attention = AttentionSpec {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            key_dim: self.spec.head_dim,
            value_dim: self.spec.head_dim,
            scale: (1.0 / (self.spec.head_dim as f64).sqrt()) as f32,
            first_position,
            window: self.spec.window,
        };
        pass.backend.attention(&q, keys, Values::Cache(values), &attention)
    }

    fn rotate(&self, x: Tensor, heads: usize, first_position: usize, pass: &Pass) -> Tensor {
        let (tokens, head_dim) = (x.rows(), self.spec.head_dim);
        let mut parts = x.reshape(tokens * heads, head_dim);
        let rope = RopeSpec { head_dim, heads, start: 0, interleaved: false, first_position };
        self.rotary.apply(&mut parts, &rope, pass);
        parts.reshape(tokens, heads * head_dim)
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        let norms: usize = self.head_norms.iter().flatten().map(Norm::byte_len).sum();
        [&self.q, &self.k, &self.v, &self.o].into_iter().map(Linear::byte_len).sum::<usize>() + norms
    }

    /// Self-attention of a packed batch x `[tokens, hidden]`, and what [`Gqa::backward`] needs besides `x`.
    pub fn train_forward<'a>(&self, x: impl Into<Input<'a>>, pass: &TrainPass) -> (Tensor, GqaSaved) {
        let [q, k, v] = Linear::train_forward_shared([&self.q, &self.k, &self.v], x, pass);
        let (q, k, unnormed) = match &self.head_norms {
            Some([q_norm, k_norm]) => pass.run(|p| {
                (q_norm.forward_heads(q.clone(), p), k_norm.forward_heads(k.clone(), p), Some([q.clone(), k.clone()]))
            }),
            None => (q, k, None),
        };
        let q = self.train_rotate(q, self.spec.heads, pass);
        let k = self.train_rotate(k, self.spec.kv_heads, pass);
        let output = pass.backend.attention_forward(&q, &k, &v, &self.self_attention(pass));
        let [y] = Linear::train_forward_shared([&self.o], &output.y, pass);
        (y, GqaSaved { unnormed, q, k, v, output })
    }

    /// Whether its input may be rounded in training.
    pub(crate) fn rounds_input(&self, pass: &TrainPass) -> bool {
        [&self.q, &self.k, &self.v].into_iter().all(|layer| layer.rounds_input(pass))
    }

    /// The gradient of `x`.
    pub fn backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        saved: GqaSaved,
        dy: &Tensor,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let GqaSaved { unnormed, q, k, v, output } = saved;
        let d_output = self.o.backward(&output.y, dy, pass, gradients);
        let d = pass.backend.attention_backward(&q, &k, &v, &output, &d_output, &self.self_attention(pass));
        drop((q, k, v, output, d_output));
        let mut dq = self.rotate_backward(d.dq, self.spec.heads, pass);
        let mut dk = self.rotate_backward(d.dk, self.spec.kv_heads, pass);
        if let (Some([q_norm, k_norm]), Some([q, k])) = (&self.head_norms, unnormed) {
            dq = q_norm.backward_heads(&q, dq, pass, gradients);
            dk = k_norm.backward_heads(&k, dk, pass, gradients);
        }
        let layers = [(&self.q, (&dq).into()), (&self.k, (&dk).into()), (&self.v, (&d.dv).into())];
        Linear::backward_shared(layers, x, pass, gradients)
    }

    fn self_attention<'a>(&self, pass: &TrainPass<'a>) -> SelfAttention<'a> {
        SelfAttention {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            key_dim: self.spec.head_dim,
            value_dim: self.spec.head_dim,
            scale: (1.0 / (self.spec.head_dim as f64).sqrt()) as f32,
            window: self.spec.window,
            documents: pass.documents,
        }
    }

    fn train_rotate(&self, x: Tensor, heads: usize, pass: &TrainPass) -> Tensor {
        let (tokens, cols, head_dim) = (x.rows(), x.cols(), self.spec.head_dim);
        let mut parts = x.reshape(tokens * heads, head_dim);
        let rope = RopeSpec { head_dim, heads, start: 0, interleaved: false, first_position: 0 };
        self.rotary.train_apply(&mut parts, &rope, pass);
        parts.reshape(tokens, cols)
    }

    fn rotate_backward(&self, dx: Tensor, heads: usize, pass: &TrainPass) -> Tensor {
        let (tokens, cols, head_dim) = (dx.rows(), dx.cols(), self.spec.head_dim);
        let mut parts = dx.reshape(tokens * heads, head_dim);
        let rope = RopeSpec { head_dim, heads, start: 0, interleaved: false, first_position: 0 };
        self.rotary.backward(&mut parts, &rope, pass);
        parts.reshape(tokens, cols)
    }
}

/// What [`Gqa::backward`] needs of the forward.
pub struct GqaSaved {
    /// Queries and keys before their norms, where they have some.
    unnormed: Option<[Tensor; 2]>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: AttentionOutput,
}
