//! Multi-head latent attention (DeepSeek-V2, section 2.1).
//!
//! A token leaves one latent of `kv_lora_rank` elements and one rotary key of `qk_rope_head_dim` in the cache, for all heads
//! together. Two forms give the same result:
//!
//! - decompressed: `kv_b_proj` turns latents into keys and values of every head, then ordinary attention. Per query, key and
//!   head it costs `nope + rope + value` multiplications, but it needs all keys and values at once: used when a prompt begins.
//! - absorbed: the key half of `kv_b_proj` moves to the query, `(W_uk c)·q = c·(W_ukᵀ q)`, and the value half behind the
//!   attention, so that the cached latents themselves are keys and values. Costs `2 · kv_lora_rank + rope`, and nothing is
//!   ever decompressed: used for decoding.

use std::sync::Arc;

use fourfold_kernels::backward::{AttentionOutput, SelfAttention};
use fourfold_kernels::{AttentionSpec, Input, KvCache, KvDtype, RopeSpec, Tensor, Values};

use super::{Gradients, Linear, LinearSpec, Norm, NormSpec, Pass, Rotary, RotarySpec, TrainPass};
use crate::batch::each_sequence;
use crate::loader::Loader;
use crate::{BlockCache, ModelError, Role, Segment, WeightSpec};

/// The shape of a multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct MlaSpec {
    /// Features of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Rank of the query's own compression, where it has one.
    pub q_lora_rank: Option<usize>,
    /// Elements of the cached latent.
    pub kv_lora_rank: usize,
    /// Elements of a query or key head that are not rotated.
    pub nope_dim: usize,
    /// Elements that are.
    pub rope_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Biases on the compressing projections and the output.
    pub bias: bool,
    /// Epsilon of the norms of the two latents.
    pub eps: f32,
    /// The rotation, of `rope_dim` elements.
    pub rotary: RotarySpec,
    /// Whether rotated pairs are neighbours.
    pub interleaved: bool,
    /// Factor of the scores.
    pub scale: f32,
}

/// The query's way: straight, or through a latent of its own.
struct QuerySpecs {
    /// `q_proj`, or `q_a_proj`.
    first: LinearSpec,
    /// `q_a_layernorm` and `q_b_proj`.
    compressed: Option<(NormSpec, LinearSpec)>,
}

impl MlaSpec {
    /// Elements of a query or key head.
    pub fn key_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    fn linear(&self, prefix: &str, part: &str, outputs: usize, inputs: usize, bias: bool) -> LinearSpec {
        LinearSpec { name: format!("{prefix}.{part}"), outputs, inputs, bias, role: Role::Attention }
    }

    fn query(&self, prefix: &str) -> QuerySpecs {
        let queries = self.heads * self.key_dim();
        match self.q_lora_rank {
            None => QuerySpecs { first: self.linear(prefix, "q_proj", queries, self.hidden, false), compressed: None },
            Some(rank) => QuerySpecs {
                first: self.linear(prefix, "q_a_proj", rank, self.hidden, self.bias),
                compressed: Some((
                    NormSpec { name: format!("{prefix}.q_a_layernorm"), size: rank, eps: self.eps },
                    self.linear(prefix, "q_b_proj", queries, rank, false),
                )),
            },
        }
    }

    fn kv_a(&self, prefix: &str) -> LinearSpec {
        self.linear(prefix, "kv_a_proj_with_mqa", self.kv_lora_rank + self.rope_dim, self.hidden, self.bias)
    }

    fn kv_norm(&self, prefix: &str) -> NormSpec {
        NormSpec { name: format!("{prefix}.kv_a_layernorm"), size: self.kv_lora_rank, eps: self.eps }
    }

    fn kv_b(&self, prefix: &str) -> LinearSpec {
        let outputs = self.heads * (self.nope_dim + self.value_dim);
        self.linear(prefix, "kv_b_proj", outputs, self.kv_lora_rank, false)
    }

    fn output(&self, prefix: &str) -> LinearSpec {
        self.linear(prefix, "o_proj", self.hidden, self.heads * self.value_dim, self.bias)
    }

    /// Its tensors below `prefix`.
    pub fn weights(&self, prefix: &str) -> Vec<WeightSpec> {
        let QuerySpecs { first, compressed } = self.query(prefix);
        let mut weights: Vec<WeightSpec> = first.weights().collect();
        if let Some((norm, second)) = compressed {
            weights.push(norm.weight());
            weights.extend(second.weights());
        }
        weights.extend(self.kv_a(prefix).weights());
        weights.push(self.kv_norm(prefix).weight());
        weights.extend(self.kv_b(prefix).weights());
        weights.extend(self.output(prefix).weights());
        weights
    }

    /// Elements a token leaves in the cache: the latent and the rotary key.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.rope_dim
    }

    /// An empty cache.
    pub fn new_cache(&self, dtype: KvDtype) -> BlockCache {
        BlockCache::Latent(KvCache::new(self.cache_width(), dtype))
    }

    /// f32 elements that training keeps of the forward over `tokens` ([`MlaSaved`]).
    pub fn saved_elements(&self, tokens: u64) -> u64 {
        let attention = self.heads * (2 * self.key_dim() + 2 * self.value_dim + 1);
        tokens * (attention + self.kv_lora_rank + self.q_lora_rank.unwrap_or(0)) as u64
    }

    /// f32 elements alive at the peak of the forward over `tokens`, input not counted: queries, the cached rows, and the
    /// larger of the two forms' own needs.
    pub fn scratch_elements(&self, tokens: u64) -> u64 {
        let queries = self.heads * self.key_dim();
        let decompressed = self.heads * (2 * self.key_dim() + self.nope_dim + 3 * self.value_dim);
        let absorbed = self.heads * (self.cache_width() + self.kv_lora_rank + self.value_dim);
        tokens * (queries + self.cache_width() + decompressed.max(absorbed)) as u64
    }
}

/// Multi-head latent attention.
pub struct Mla {
    spec: MlaSpec,
    q_first: Linear,
    q_compressed: Option<(Norm, Linear)>,
    kv_a: Linear,
    kv_norm: Norm,
    kv_b: Linear,
    o: Linear,
    rotary: Arc<Rotary>,
}

impl Mla {
    pub(crate) fn load(spec: &MlaSpec, prefix: &str, loader: &Loader) -> Result<Self, ModelError> {
        let QuerySpecs { first, compressed } = spec.query(prefix);
        let q_compressed = match compressed {
            Some((norm, second)) => Some((Norm::load(&norm, loader)?, Linear::load(&second, loader)?)),
            None => None,
        };
        Ok(Self {
            spec: spec.clone(),
            q_first: Linear::load(&first, loader)?,
            q_compressed,
            kv_a: Linear::load(&spec.kv_a(prefix), loader)?,
            kv_norm: Norm::load(&spec.kv_norm(prefix), loader)?,
            kv_b: Linear::load(&spec.kv_b(prefix), loader)?,
            o: Linear::load(&spec.output(prefix), loader)?,
            rotary: loader.rotary(&spec.rotary),
        })
    }

    /// Adds to `sum` `[tokens, hidden]` what it makes of x, of the same shape; each segment's tokens follow those in its cache and are
    /// added to it.
    pub fn forward_add(&self, x: &Tensor, segments: &mut [Segment], sum: &mut Tensor, pass: &mut Pass) {
        let [q, kv] = Linear::forward_shared([&self.q_first, &self.kv_a], x, pass);
        let q = match &self.q_compressed {
            Some((norm, second)) => second.forward(&norm.forward(&q, pass), pass),
            None => q,
        };
        let (tokens, heads) = (q.rows(), self.spec.heads);
        let q = q.reshape(tokens * heads, self.spec.key_dim());
        let q = each_sequence(pass.backend, segments, [q], |[mut q], cache| {
            self.rotate(&mut q, heads, self.spec.nope_dim, cache.len(), pass);
            q
        });
        let rank = self.spec.kv_lora_rank;
        let latent = self.kv_norm.forward(&pass.backend.columns(&kv, 0..rank), pass);
        let rotary_key = pass.backend.columns(&kv, rank..kv.cols());
        drop(kv);
        let rotary_key = each_sequence(pass.backend, segments, [rotary_key], |[mut key], cache| {
            self.rotate(&mut key, 1, 0, cache.len(), pass);
            key
        });

        let mixed = match segments {
            // A prompt from its beginning.
            [only] if only.cache.is_empty() && tokens > 1 => {
                latents(only.cache).append(&pass.backend.concat_columns(&latent, &rotary_key));
                self.decompressed(q, &latent, &rotary_key, pass)
            }
            _ => {
                // The same multiplication in another order: calibration sees the same input.
                pass.observer.linear_input(self.kv_b.name(), &latent);
                self.absorbed(&q, pass.backend.concat_columns(&latent, &rotary_key), segments, pass)
            }
        };
        self.o.forward_add(&mixed, sum, pass);
    }

    fn rotate(&self, x: &mut Tensor, heads: usize, start: usize, first_position: usize, pass: &Pass) {
        let rope = RopeSpec { head_dim: x.cols(), heads, start, interleaved: self.spec.interleaved, first_position };
        self.rotary.apply(x, &rope, pass);
    }

    /// Attention of the first tokens over themselves. q `[tokens · heads, key_dim]` to `[tokens, heads · value_dim]`.
    fn decompressed(&self, q: Tensor, latent: &Tensor, rotary_key: &Tensor, pass: &mut Pass) -> Tensor {
        let MlaSpec { heads, nope_dim, value_dim, .. } = self.spec;
        let (tokens, key_dim) = (latent.rows(), self.spec.key_dim());
        let kv = self.kv_b.forward(latent, pass).reshape(tokens * heads, nope_dim + value_dim);
        let backend = pass.backend;
        let [keys, values] = backend.split_heads(&kv, rotary_key, heads, nope_dim);
        let (keys, values) = (keys.reshape(tokens, heads * key_dim), values.reshape(tokens, heads * value_dim));
        drop(kv);
        let (mut key_cache, mut value_cache) =
            (KvCache::new(keys.cols(), KvDtype::F32), KvCache::new(values.cols(), KvDtype::F32));
        key_cache.append(&keys);
        value_cache.append(&values);
        drop((keys, values));
        let spec = AttentionSpec {
            heads,
            kv_heads: heads,
            key_dim,
            value_dim,
            scale: self.spec.scale,
            first_position: 0,
            window: None,
        };
        backend.attention(&q.reshape(tokens, heads * key_dim), &key_cache, Values::Cache(&value_cache), &spec)
    }

    /// Attention over the cached latents, to which `cached` `[tokens, cache_width]` is added. q `[tokens · heads, key_dim]` to
    /// `[tokens, heads · value_dim]`.
    fn absorbed(&self, q: &Tensor, cached: Tensor, segments: &mut [Segment], pass: &Pass) -> Tensor {
        let MlaSpec { heads, nope_dim, value_dim, kv_lora_rank, .. } = self.spec;
        let (tokens, width, backend) = (q.rows() / heads, self.spec.cache_width(), pass.backend);
        let head_rows = |head: usize| -> Vec<usize> { (0..tokens).map(|t| t * heads + head).collect() };
        let ones = vec![1.0; tokens];

        let mut query = backend.zeros(tokens * heads, width);
        for head in 0..heads {
            let rows = head_rows(head);
            let part = backend.gather_rows(q, &rows);
            let first = head * (nope_dim + value_dim);
            let nope = self.kv_b.transposed(&backend.columns(&part, 0..nope_dim), first..first + nope_dim, backend);
            let rotary = backend.columns(&part, nope_dim..part.cols());
            backend.scatter_add_rows(&mut query, &backend.concat_columns(&nope, &rotary), &rows, &ones);
        }
        let query = query.reshape(tokens, heads * width);
        let mixed = each_sequence(backend, segments, [query, cached], |[query, cached], cache| {
            let spec = AttentionSpec {
                heads,
                kv_heads: 1,
                key_dim: width,
                value_dim: kv_lora_rank,
                scale: self.spec.scale,
                first_position: cache.len(),
                window: None,
            };
            let cache = latents(cache);
            cache.append(&cached);
            backend.attention(&query, cache, Values::PrefixOfKeys, &spec)
        });
        let mixed = mixed.reshape(tokens * heads, kv_lora_rank);
        let mut output = backend.zeros(tokens * heads, value_dim);
        for head in 0..heads {
            let rows = head_rows(head);
            let first = head * (nope_dim + value_dim) + nope_dim;
            let values = self.kv_b.rows(&backend.gather_rows(&mixed, &rows), first..first + value_dim, backend);
            backend.scatter_add_rows(&mut output, &values, &rows, &ones);
        }
        output.reshape(tokens, heads * value_dim)
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        let query = self.q_compressed.as_ref().map_or(0, |(norm, second)| norm.byte_len() + second.byte_len());
        let linears = [&self.q_first, &self.kv_a, &self.kv_b, &self.o];
        linears.into_iter().map(Linear::byte_len).sum::<usize>() + query + self.kv_norm.byte_len()
    }

    /// Self-attention of a packed batch x `[tokens, hidden]` in the decompressed form, and what [`Mla::backward`] needs besides
    /// `x`.
    pub fn train_forward<'a>(&self, x: impl Into<Input<'a>>, pass: &TrainPass) -> (Tensor, MlaSaved) {
        let x = x.into();
        let MlaSpec { heads, nope_dim, value_dim, kv_lora_rank: rank, .. } = self.spec;
        let (tokens, key_dim, backend) = (x.rows(), self.spec.key_dim(), pass.backend);
        let [q_first, kv] = Linear::train_forward_shared([&self.q_first, &self.kv_a], x, pass);
        let (q, q_latent) = match &self.q_compressed {
            Some((norm, second)) => {
                let normed = norm.for_products(&q_first, second.rounds_input(pass), pass);
                let [q] = Linear::train_forward_shared([second], normed.input(), pass);
                (q, Some(q_first))
            }
            None => (q_first, None),
        };
        let mut q = q.reshape(tokens * heads, key_dim);
        self.rotary.train_apply(&mut q, &self.rope(heads, nope_dim, key_dim), pass);

        let kv_latent = backend.columns(&kv, 0..rank);
        let mut rotary_key = backend.columns(&kv, rank..kv.cols());
        drop(kv);
        self.rotary.train_apply(&mut rotary_key, &self.rope(1, 0, self.spec.rope_dim), pass);
        let normed = self.kv_norm.for_products(&kv_latent, self.kv_b.rounds_input(pass), pass);
        let [kv] = Linear::train_forward_shared([&self.kv_b], normed.input(), pass);
        let kv = kv.reshape(tokens * heads, nope_dim + value_dim);
        let [k, v] = backend.split_heads(&kv, &rotary_key, heads, nope_dim);
        drop(kv);
        let v = v.reshape(tokens, heads * value_dim);
        let (q, k) = (q.reshape(tokens, heads * key_dim), k.reshape(tokens, heads * key_dim));
        let output = backend.attention_forward(&q, &k, &v, &self.self_attention(pass));
        let [y] = Linear::train_forward_shared([&self.o], &output.y, pass);
        (y, MlaSaved { q_latent, kv_latent, q, k, v, output })
    }

    /// Whether its input may be rounded in training.
    pub(crate) fn rounds_input(&self, pass: &TrainPass) -> bool {
        self.q_first.rounds_input(pass) && self.kv_a.rounds_input(pass)
    }

    /// The gradient of `x`. The norms of the two latents are computed anew.
    pub fn backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        saved: MlaSaved,
        dy: &Tensor,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let MlaSaved { q_latent, kv_latent, q, k, v, output } = saved;
        let MlaSpec { heads, nope_dim, value_dim, rope_dim, .. } = self.spec;
        let (tokens, key_dim, backend) = (dy.rows(), self.spec.key_dim(), pass.backend);
        let d_output = self.o.backward(&output.y, dy, pass, gradients);
        let d = backend.attention_backward(&q, &k, &v, &output, &d_output, &self.self_attention(pass));
        drop((q, k, v, output, d_output));

        // Every head read the one rotary key: its gradient is their sum.
        let dk = d.dk.reshape(tokens * heads, key_dim);
        let dv = d.dv.reshape(tokens * heads, value_dim);
        let [d_kv, mut d_rotary] = backend.split_heads_backward(&dk, &dv, heads, nope_dim);
        drop((dk, dv));
        self.rotary.backward(&mut d_rotary, &self.rope(1, 0, rope_dim), pass);
        let d_kv = d_kv.reshape(tokens, heads * (nope_dim + value_dim));
        let normed = self.kv_norm.for_products(&kv_latent, self.kv_b.rounds_input(pass), pass);
        let d_normed = self.kv_b.backward(normed.input(), &d_kv, pass, gradients);
        let d_latent = self.kv_norm.backward(&kv_latent, &d_normed, pass, gradients);
        let d_kv_a = backend.concat_columns(&d_latent, &d_rotary);

        let mut dq = d.dq.reshape(tokens * heads, key_dim);
        self.rotary.backward(&mut dq, &self.rope(heads, nope_dim, key_dim), pass);
        let mut dq = dq.reshape(tokens, heads * key_dim);
        if let (Some((norm, second)), Some(q_latent)) = (&self.q_compressed, q_latent) {
            let normed = norm.for_products(&q_latent, second.rounds_input(pass), pass);
            let d_normed = second.backward(normed.input(), &dq, pass, gradients);
            dq = norm.backward(&q_latent, &d_normed, pass, gradients);
        }
        Linear::backward_shared([(&self.q_first, (&dq).into()), (&self.kv_a, (&d_kv_a).into())], x, pass, gradients)
    }

    fn rope(&self, heads: usize, start: usize, head_dim: usize) -> RopeSpec {
        RopeSpec { head_dim, heads, start, interleaved: self.spec.interleaved, first_position: 0 }
    }

    fn self_attention<'a>(&self, pass: &TrainPass<'a>) -> SelfAttention<'a> {
        SelfAttention {
            heads: self.spec.heads,
            kv_heads: self.spec.heads,
            key_dim: self.spec.key_dim(),
            value_dim: self.spec.value_dim,
            scale: self.spec.scale,
            window: None,
            documents: pass.documents,
        }
    }
}

/// The cache that [`MlaSpec::new_cache`] makes.
fn latents(cache: &mut BlockCache) -> &mut KvCache {
    match cache {
        BlockCache::Latent(latents) => latents,
        BlockCache::KeysAndValues { .. } => unreachable!("the cache was made by this block's new_cache"),
    }
}

/// What [`Mla::backward`] needs of the forward.
pub struct MlaSaved {
    /// The query's latent before its norm, where it has one.
    q_latent: Option<Tensor>,
    /// The latent of keys and values before its norm.
    kv_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: AttentionOutput,
}
