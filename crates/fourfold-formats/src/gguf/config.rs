//! The `config.json` of Hugging Face that a GGUF file's metadata stand for.

use serde_json::{Map, Value, json};

use super::arch::Arch;
use super::metadata::Metadata;
use super::source::Table;
use super::{GgufError, rope};

/// Most experts of a layer: each becomes a tensor of its own, so a damaged count must not be believed.
const MAX_EXPERTS: u64 = 16_384;

/// Metadata seen through an architecture's prefix.
pub struct Keys<'a> {
    /// The architecture.
    pub arch: Arch,
    /// All metadata.
    pub metadata: &'a Metadata,
}

impl Keys<'_> {
    /// The whole key of a part: `llama.block_count`.
    pub fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.arch.name())
    }

    /// An error that names a missing feature.
    pub fn unsupported(&self, feature: String) -> GgufError {
        GgufError::Feature { architecture: self.arch.name(), feature }
    }

    /// The factor of position scaling.
    pub fn factor(&self) -> Result<Option<f64>, GgufError> {
        self.metadata.float(&self.key("rope.scaling.factor"))
    }

    /// The base of the rotary frequencies.
    pub fn rope_base(&self) -> Result<f64, GgufError> {
        Ok(self.metadata.float(&self.key("rope.freq_base"))?.unwrap_or(10_000.0))
    }

    /// A count that must be there and above 0.
    fn need(&self, part: &str) -> Result<u64, GgufError> {
        let key = self.key(part);
        match self.metadata.need_count(&key)? {
            0 => Err(GgufError::BadValue { key, found: "0".to_owned(), expected: "a count above 0" }),
            count => Ok(count),
        }
    }

    /// A count that may be absent.
    fn count(&self, part: &str) -> Result<Option<u64>, GgufError> {
        self.metadata.count(&self.key(part))
    }
}

/// The sizes that placing tensors needs.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Layers, those that predict further tokens apart.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Experts of a layer, 0 where there are none.
    pub experts: u64,
    /// Elements of an MLA key head without position.
    pub nope_dim: u64,
    /// Elements of a value head.
    pub value_dim: u64,
    /// Elements of a query head.
    pub key_dim: u64,
}

impl Sizes {
    /// Reads them.
    ///
    /// # Errors
    /// One is missing or contradicts another.
    pub fn read(keys: &Keys) -> Result<Self, GgufError> {
        let hidden = keys.need("embedding_length")?;
        let heads = keys.need("attention.head_count")?;
        let blocks = keys.need("block_count")?;
        let further = keys.count("nextn_predict_layers")?.unwrap_or(0);
        let layers = blocks.checked_sub(further).filter(|&l| l > 0).ok_or_else(|| GgufError::BadValue {
            key: keys.key("nextn_predict_layers"),
            found: further.to_string(),
            expected: "fewer than block_count",
        })?;
        let kv_heads = keys.count("attention.head_count_kv")?.unwrap_or(heads);
        let rotary = keys.count("rope.dimension_count")?;
        let (key, value) = ("attention.key_length", "attention.value_length");
        let (key_dim, value_dim, nope_dim) = if keys.arch == Arch::DeepSeek2 {
            // Files for the absorbed form of MLA describe it as one wide head, and keep the real sizes beside that.
            let key_dim = keys.count("attention.key_length_mla")?.map_or_else(|| keys.need(key), Ok)?;
            let value_dim = keys.count("attention.value_length_mla")?.map_or_else(|| keys.need(value), Ok)?;
            let rotary = keys.need("rope.dimension_count")?;
            let nope_dim = key_dim.checked_sub(rotary).filter(|&d| d > 0).ok_or_else(|| {
                keys.unsupported(format!("key heads of {key_dim} elements with {rotary} rotary ones"))
            })?;
            (key_dim, value_dim, nope_dim)
        } else {
            let dim = keys.count(key)?.unwrap_or(hidden / heads);
            if keys.count(value)?.unwrap_or(dim) != dim {
                return Err(keys.unsupported("value heads of another size than key heads".to_owned()));
            }
            if rotary.is_some_and(|r| r != dim) {
                return Err(keys.unsupported("rotation of a part of each head".to_owned()));
            }
            (dim, dim, 0)
        };
        let kv_heads = if keys.arch == Arch::DeepSeek2 { heads } else { kv_heads };
        if kv_heads == 0 || heads % kv_heads != 0 || key_dim == 0 || (key_dim - nope_dim) % 2 != 0 {
            return Err(keys.unsupported(format!("{heads} query heads of {key_dim} over {kv_heads} key heads")));
        }
        let experts = keys.count("expert_count")?.unwrap_or(0);
        if experts > 0 && keys.arch != Arch::DeepSeek2 {
            return Err(keys.unsupported("a mixture of experts".to_owned()));
        }
        if experts > MAX_EXPERTS {
            return Err(keys.unsupported(format!("{experts} experts")));
        }
        Ok(Self { layers, heads, kv_heads, experts, nope_dim, value_dim, key_dim })
    }
}

/// The whole `config.json`. `rope_factors` is the tensor `rope_freqs.weight`.
///
/// # Errors
/// A key that is missing or has a value the architecture does not allow.
pub fn synthesise(
    keys: &Keys,
    sizes: &Sizes,
    table: &Table,
    rope_factors: Option<&[f32]>,
) -> Result<Map<String, Value>, GgufError> {
    let vocab = table.shape("token_embd.weight").and_then(|s| s.first().copied());
    let vocab = vocab.ok_or_else(|| GgufError::MissingTensor("token_embd.weight".to_owned()))?;
    let (name, model_type) = match keys.arch {
        Arch::Llama => ("LlamaForCausalLM", "llama"),
        Arch::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Arch::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Arch::DeepSeek2 if sigmoid_scores(keys, table)? => ("DeepseekV3ForCausalLM", "deepseek_v3"),
        Arch::DeepSeek2 => ("DeepseekV2ForCausalLM", "deepseek_v2"),
    };
    let epsilon = keys.key("attention.layer_norm_rms_epsilon");
    let mut config = object(json!({
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": keys.need("embedding_length")?,
        "intermediate_size": keys.need("feed_forward_length")?,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": keys.need("context_length")?,
        "rms_norm_eps": keys.metadata.float(&epsilon)?.ok_or(GgufError::MissingKey(epsilon))?,
        "rope_theta": keys.rope_base()?,
        "rope_scaling": rope::scaling(keys, rope_factors)?,
        "tie_word_embeddings": table.shape("output.weight").is_none(),
        "vocab_size": vocab,
        "attention_bias": table.shape("blk.0.attn_output.bias").is_some(),
    }));
    for (id, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(v) = keys.metadata.count(&format!("tokenizer.ggml.{key}_token_id"))? {
            config.insert(id.to_owned(), json!(v));
        }
    }
    match keys.arch {
        Arch::Llama => {
            config.insert("head_dim".to_owned(), json!(sizes.key_dim));
            let bias = |tensor: &str| table.shape(tensor).is_some();
            config.insert("attention_bias".to_owned(), json!(bias("blk.0.attn_q.bias")));
            config.insert("mlp_bias".to_owned(), json!(bias("blk.0.ffn_gate.bias")));
        }
        Arch::Qwen2 => {
            if sizes.key_dim * sizes.heads != keys.need("embedding_length")? {
                config.insert("head_dim".to_owned(), json!(sizes.key_dim));
            }
            config.insert("use_sliding_window".to_owned(), json!(false));
        }
        Arch::Qwen3 => {
            config.insert("head_dim".to_owned(), json!(sizes.key_dim));
            config.insert("use_sliding_window".to_owned(), json!(false));
        }
        Arch::DeepSeek2 => deepseek(keys, sizes, table, &mut config)?,
    }
    Ok(config)
}

/// Whether experts are scored by a sigmoid: what tells V3 from V2, which share GGUF's architecture name.
fn sigmoid_scores(keys: &Keys, table: &Table) -> Result<bool, GgufError> {
    match keys.count("expert_gating_func")? {
        Some(2) => Ok(true),
        Some(1) => Ok(false),
        // Files older than the key: only V3 corrects its scores.
        None | Some(0) => Ok(table.any(|name| name.ends_with(".exp_probs_b.bias"))),
        Some(other) => Err(keys.unsupported(format!("expert gating function {other}"))),
    }
}

/// MLA's ranks and the mixture of experts.
fn deepseek(keys: &Keys, sizes: &Sizes, table: &Table, config: &mut Map<String, Value>) -> Result<(), GgufError> {
    config.extend(object(json!({
        "q_lora_rank": keys.count("attention.q_lora_rank")?.filter(|&r| r > 0),
        "kv_lora_rank": keys.need("attention.kv_lora_rank")?,
        "qk_nope_head_dim": sizes.nope_dim,
        "qk_rope_head_dim": sizes.key_dim - sizes.nope_dim,
        "v_head_dim": sizes.value_dim,
    })));
    let dense = keys.count("leading_dense_block_count")?.unwrap_or(0).min(sizes.layers);
    if sizes.experts == 0 {
        config.insert("first_k_dense_replace".to_owned(), json!(sizes.layers));
        return Ok(());
    }
    let sigmoid = sigmoid_scores(keys, table)?;
    let (groups, used_groups) = expert_groups(keys, sizes.experts, sigmoid)?;
    let method = match (sigmoid, groups) {
        (true, _) => "noaux_tc",
        (false, 1) => "greedy",
        (false, _) => "group_limited_greedy",
    };
    let norm = keys.metadata.bool(&keys.key("expert_weights_norm"))?.unwrap_or(false);
    let scale = keys.metadata.float(&keys.key("expert_weights_scale"))?.unwrap_or(1.0);
    if norm && !sigmoid && scale != 1.0 {
        // DeepSeek-V2's own code does either; llama.cpp would do both.
        return Err(keys.unsupported("softmax scores of experts that are normalised and scaled".to_owned()));
    }
    config.extend(object(json!({
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_intermediate_size": keys.need("expert_feed_forward_length")?,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": keys.count("expert_shared_count")?.filter(|&n| n > 0),
        "num_experts_per_tok": keys.need("expert_used_count")?,
        "n_group": groups,
        "topk_group": used_groups,
        "topk_method": method,
        "scoring_func": if sigmoid { "sigmoid" } else { "softmax" },
        "norm_topk_prob": norm,
        "routed_scaling_factor": scale,
    })));
    Ok(())
}

/// Groups of experts, and how many of them a token may use. Files older than the keys do not say; then they are those of
/// the released models with as many experts.
fn expert_groups(keys: &Keys, experts: u64, sigmoid: bool) -> Result<(u64, u64), GgufError> {
    if let Some(groups) = keys.count("expert_group_count")?.filter(|&g| g > 0) {
        return Ok((groups, keys.count("expert_group_used_count")?.unwrap_or(groups)));
    }
    Ok(match (sigmoid, experts) {
        (true, 256) => (8, 4),
        (false, 160) => (8, 3),
        _ => (1, 1),
    })
}

/// The map inside a `json!` object.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
