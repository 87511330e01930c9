//! Which of an architecture's metadata keys are read, which change no result, and which ask for something that is not computed:
//! llama.cpp reads these keys, and a model read without them would be another one.

use super::GgufError;
use super::arch::Arch;
use super::config::Keys;
use super::metadata::{Number, Value};

/// Read for every architecture.
const READ: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "nextn_predict_layers",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
];

/// Read for `deepseek2`.
const DEEPSEEK: &[&str] = &[
    "attention.key_length_mla",
    "attention.kv_lora_rank",
    "attention.q_lora_rank",
    "attention.value_length_mla",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_shared_count",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "leading_dense_block_count",
    "rope.scaling.yarn_log_multiplier",
];

/// Descriptions, and what pools the outputs of embedding models.
const INERT: &[&str] = &[
    "attention.layer_norm_epsilon",
    "classifier.output_labels",
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
];

/// Read only with a value that changes nothing: one of these numbers (a truth value counts as 0 or 1).
const LIMITED: &[(&str, &[f64])] = &[
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.output_scale", &[0.0, 1.0]),
    ("attention.scale", &[0.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("attention.sliding_window", &[0.0]),
    ("attention.temperature_length", &[0.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("expert_group_scale", &[0.0, 1.0]),
    ("expert_shared_feed_forward_length", &[0.0]),
    ("expert_used_count", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("interleave_moe_layer_step", &[0.0, 1.0]),
    ("leading_dense_block_count", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("moe_every_n_layers", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("rope.scale_linear", &[0.0, 1.0]),
    ("rope.scaling.alpha", &[0.0]),
    ("rope.scaling.yarn_attn_factor", &[1.0]),
    ("rope.scaling.yarn_ext_factor", &[-1.0, 1.0]),
    ("router_logit_softcapping", &[0.0]),
    ("swiglu_clamp_exp", &[0.0]),
    ("swiglu_clamp_shexp", &[0.0]),
    ("use_parallel_residual", &[0.0]),
];

/// Refuses a file that holds no model, and a key of the architecture that results may depend on.
///
/// # Errors
/// The key, its value, and what is read.
pub fn check(keys: &Keys) -> Result<(), GgufError> {
    if let Some(kind) = keys.metadata.string("general.type")?
        && kind != "model"
    {
        return Err(GgufError::BadValue {
            key: "general.type".to_owned(),
            found: format!("{kind:?}"),
            expected: "\"model\": the file holds something else",
        });
    }
    let context = keys.metadata.count(&keys.key("context_length"))?;
    let prefix = format!("{}.", keys.arch.name());
    for (key, value) in &keys.metadata.values {
        let Some(part) = key.strip_prefix(&prefix) else { continue };
        let read = READ.contains(&part) || (keys.arch == Arch::DeepSeek2 && DEEPSEEK.contains(&part));
        if read || INERT.contains(&part) {
            continue;
        }
        let Some((_, neutral)) = LIMITED.iter().find(|(limited, _)| *limited == part) else {
            return Err(GgufError::UnknownKey { key: key.clone(), found: value.describe() });
        };
        let number = match value {
            Value::Number(Number::Unsigned(v)) => Some(*v as f64),
            Value::Number(Number::Negative(v)) => Some(*v as f64),
            Value::Number(Number::Float(v)) => Some(*v),
            Value::Number(Number::Bool(v)) => Some(f64::from(u8::from(*v))),
            Value::String(_) | Value::Numbers(..) | Value::Strings(_) | Value::Arrays(_) => None,
        };
        // A window as long as the context hides nothing.
        let whole = part == "attention.sliding_window" && number.zip(context).is_some_and(|(n, c)| n >= c as f64);
        if !whole && number.is_none_or(|n| !neutral.contains(&n)) {
            let values = neutral.iter().map(f64::to_string).collect::<Vec<_>>().join(" or ");
            return Err(GgufError::LimitedKey { key: key.clone(), found: value.describe(), values });
        }
    }
    Ok(())
}
