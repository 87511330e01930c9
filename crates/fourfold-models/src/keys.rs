//! What each architecture does with the keys of its `config.json`: which it reads, which change no result, and which ask for
//! something that this program does not compute. The lists cover every key that transformers 5 reads for these architectures
//! (`scripts/golden_config_keys.py` collects them from its sources), and those of DeepSeek's own modelling code.

use serde_json::Value;

use crate::ModelError;
use crate::config::Config;

/// The keys of one architecture.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    /// Read, beside [`READ`].
    pub read: &'static [&'static str],
    /// Without effect on any result, beside [`INERT`].
    pub inert: &'static [&'static str],
    /// Read only with a value that changes nothing, beside [`LIMITED`].
    pub limited: &'static [Limited],
}

/// A key that asks for something that is not computed, unless it has a value that changes nothing. `null` is
/// one, but for a flag that must be true.
pub(crate) struct Limited {
    pub key: &'static str,
    /// The values that change nothing.
    pub neutral: Neutral,
    /// What another value asks for.
    pub asks_for: &'static str,
}

/// Values that change nothing.
pub(crate) enum Neutral {
    /// None but `null`.
    Null,
    /// An empty object or list.
    Empty,
    /// A truth value.
    Flag(bool),
    /// A number.
    Number(f64),
    /// A number of at least `max_position_embeddings`.
    WholeContext,
    /// A list of this word alone.
    All(&'static str),
    /// What another key says.
    SameAs(&'static str),
}

const fn limited(key: &'static str, neutral: Neutral, asks_for: &'static str) -> Limited {
    Limited { key, neutral, asks_for }
}

/// Read for every architecture, some of them outside this crate: token numbers, quantization, initialization, classes.
const READ: &[&str] = &[
    "architectures",
    "bos_token_id",
    "compression_config",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_labels",
    "original_max_position_embeddings",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// Descriptions, choices of implementation, what training alone uses, and defaults of generation (which transformers drops from
/// a model's configuration).
const INERT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "_note",
    "add_cross_attention",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "device_map",
    "distributed_config",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "experts_implementation",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "init_std",
    "initializer_factor",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "token_classification_bias",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "transformers_weights",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

const INDEXER: &str = "DeepSeek-V3.2's sparse attention, whose indexer chooses the keys that a query sees";
const V4: &str = "DeepSeek-V4's compressed attention and hyper-connections";
const NESTED: &str = "a model inside another one";
const WINDOW: &str = "an attention that sees a part of the context";

/// Keys that would make any of the architectures another one.
const LIMITED: &[Limited] = &[
    limited("audio_config", Neutral::Empty, NESTED),
    limited("encoder", Neutral::Empty, NESTED),
    limited("decoder", Neutral::Empty, NESTED),
    limited("generator", Neutral::Empty, NESTED),
    limited("language_config", Neutral::Empty, NESTED),
    limited("llm_config", Neutral::Empty, NESTED),
    limited("text_config", Neutral::Empty, NESTED),
    limited("text_encoder", Neutral::Empty, NESTED),
    limited("thinker_config", Neutral::Empty, NESTED),
    limited("vision_config", Neutral::Empty, NESTED),
    limited("is_causal", Neutral::Flag(true), "an attention that sees later tokens"),
    limited("is_encoder_decoder", Neutral::Flag(false), "an encoder and a decoder"),
    limited("partial_rotary_factor", Neutral::Number(1.0), ROTARY_PART),
    limited("per_layer_config", Neutral::Empty, "layers that differ from each other"),
    limited("pruned_heads", Neutral::Empty, "heads that are left out"),
    limited("fusion_config", Neutral::Empty, "fused modules"),
    limited("kv_sharing_modes", Neutral::Empty, "layers that share keys and values"),
    limited("attention_chunk_size", Neutral::Null, WINDOW),
    limited("index_head_dim", Neutral::Null, INDEXER),
    limited("index_n_heads", Neutral::Null, INDEXER),
    limited("index_topk", Neutral::Null, INDEXER),
    limited("compress_ratios", Neutral::Null, V4),
    limited("hc_mult", Neutral::Null, V4),
    limited("num_hash_layers", Neutral::Null, V4),
    limited("o_groups", Neutral::Null, V4),
    limited("o_lora_rank", Neutral::Null, V4),
];

/// Peers disagree: transformers rotates whole heads with the default type and fails with the others, vLLM rotates a part.
pub(crate) const ROTARY_PART: &str = "a rotation of a part of each head";

/// For architectures whose attention sees everything.
const SEES_ALL: [Limited; 2] = [
    limited("layer_types", Neutral::All("full_attention"), WINDOW),
    limited("sliding_window", Neutral::WholeContext, WINDOW),
];

pub(crate) const LLAMA: Keys =
    Keys { read: &["attention_bias", "head_dim", "mlp_bias", "num_key_value_heads"], inert: &[], limited: &SEES_ALL };

/// Its biases are fixed: `attention_bias` is not asked.
pub(crate) const QWEN2: Keys = Keys {
    read: &[
        "head_dim",
        "layer_types",
        "max_window_layers",
        "num_key_value_heads",
        "sliding_window",
        "use_sliding_window",
    ],
    inert: &["attention_bias"],
    limited: &[],
};

pub(crate) const QWEN3: Keys = Keys {
    read: &[
        "attention_bias",
        "head_dim",
        "layer_types",
        "max_window_layers",
        "num_key_value_heads",
        "sliding_window",
        "use_sliding_window",
    ],
    inert: &[],
    limited: &[],
};

/// Heads of keys are as many as heads of queries, and their size follows from its parts.
pub(crate) const DEEPSEEK_V2: Keys = Keys {
    read: &[
        "attention_bias",
        "first_k_dense_replace",
        "kv_lora_rank",
        "mlp_bias",
        "moe_intermediate_size",
        "moe_layer_freq",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "routed_scaling_factor",
        "scoring_func",
        "topk_group",
        "topk_method",
        "v_head_dim",
    ],
    inert: &[
        "aux_loss_alpha",
        "ep_size",
        "head_dim",
        "num_key_value_heads",
        "num_nextn_predict_layers",
        "output_router_logits",
        "qk_head_dim",
        "router_aux_loss_coef",
        "seq_aux",
    ],
    limited: &[
        limited("layer_types", Neutral::All("full_attention"), WINDOW),
        limited("sliding_window", Neutral::WholeContext, WINDOW),
        limited("num_experts", Neutral::SameAs("n_routed_experts"), "another number of experts"),
    ],
};

pub(crate) const DEEPSEEK_V3: Keys = Keys {
    read: &[
        "attention_bias",
        "first_k_dense_replace",
        "kv_lora_rank",
        "moe_intermediate_size",
        "moe_layer_freq",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "rope_interleave",
        "routed_scaling_factor",
        "scoring_func",
        "topk_group",
        "topk_method",
        "v_head_dim",
    ],
    inert: &[
        "aux_loss_alpha",
        "ep_size",
        "num_key_value_heads",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_router_logits",
        "qk_head_dim",
        "router_aux_loss_coef",
        "seq_aux",
    ],
    limited: &[
        limited("layer_types", Neutral::All("full_attention"), WINDOW),
        limited("sliding_window", Neutral::WholeContext, WINDOW),
        limited("head_dim", Neutral::SameAs("qk_rope_head_dim"), "a rotation of another size"),
        limited("num_local_experts", Neutral::SameAs("n_routed_experts"), "another number of experts"),
        limited("mlp_bias", Neutral::Flag(false), "biases that the architecture does not have"),
    ],
};

impl Keys {
    /// Refuses a value of a [`Limited`] key that asks for something.
    pub fn check(&self, config: &Config) -> Result<(), ModelError> {
        for limited in self.limited.iter().chain(LIMITED) {
            // Python takes null for false.
            let falsy = matches!(limited.neutral, Neutral::Flag(true)) && config.is_null(limited.key);
            let value = config.get(limited.key);
            if falsy || value.is_some_and(|value| !limited.neutral.holds(value, config)) {
                let values = limited.neutral.describe();
                let reason = format!("{} is not supported; {values} is read", limited.asks_for);
                return Err(config.bad(limited.key, reason));
            }
        }
        Ok(())
    }

    /// Whether a key is declared.
    pub fn knows(&self, key: &str) -> bool {
        [READ, INERT, self.read, self.inert].iter().any(|keys| keys.contains(&key))
            || self.limited.iter().chain(LIMITED).any(|limited| limited.key == key)
    }
}

impl Neutral {
    fn holds(&self, value: &Value, config: &Config) -> bool {
        match self {
            Self::Null => false,
            Self::Empty => match value {
                Value::Object(object) => object.is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            },
            Self::Flag(flag) => value == &Value::Bool(*flag),
            Self::Number(number) => value.as_f64() == Some(*number),
            Self::WholeContext => {
                let positions = config.get("max_position_embeddings").and_then(Value::as_u64);
                value.as_u64().zip(positions).is_some_and(|(window, positions)| window >= positions)
            }
            Self::All(word) => value.as_array().is_some_and(|list| list.iter().all(|w| w.as_str() == Some(*word))),
            Self::SameAs(key) => config.get(key) == Some(value),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Empty => "null or {}".to_owned(),
            Self::Flag(flag) => format!("{flag}"),
            Self::Number(number) => format!("{number}"),
            Self::WholeContext => "null, or at least max_position_embeddings,".to_owned(),
            Self::All(word) => format!("{word} for every layer"),
            Self::SameAs(key) => format!("the value of {key}"),
        }
    }
}
