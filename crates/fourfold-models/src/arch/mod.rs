//! Architectures: each reads its configuration into a [`ModelSpec`].

mod convnet;
mod convnet_config;
mod deepseek;
mod dense;
mod llama;
mod qwen2;
mod qwen3;

pub use convnet::ConvNetSpec;
use serde_json::Value;

use crate::config::{COUNTS, Config, LENGTHS, WIDTHS};
use crate::{BlockSpec, FeedForward, ModelError, ModelSpec};

/// Reads a checked configuration.
type Reader = fn(&Config) -> Result<ModelSpec, ModelError>;

/// Every architecture: its `model_type`, what its classes in `architectures` begin with, its reader.
const ARCHITECTURES: &[(&str, &str, Reader)] = &[
    ("llama", "Llama", llama::read),
    ("qwen2", "Qwen2", qwen2::read),
    ("qwen3", "Qwen3", qwen3::read),
    ("deepseek_v2", "DeepseekV2", deepseek::read_v2),
    ("deepseek_v3", "DeepseekV3", deepseek::read_v3),
];

/// What the class of a language model ends with.
const LANGUAGE_MODEL: &str = "ForCausalLM";
/// What the class of a sequence classifier ends with.
const CLASSIFIER: &str = "ForSequenceClassification";

/// Tensors a model may have: enough for the largest mixtures published, few enough to list.
const MOST_TENSORS: usize = 1 << 19;

/// The names of the supported architectures (`model_type`).
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(name, ..)| *name)
}

/// Reads a Hugging Face `config.json` in published or transformers v5 style.
///
/// # Errors
/// An unknown architecture; a key that is missing, out of range, or asks for something not supported: the error names key
/// and value.
pub fn spec_from_config(config: &Value) -> Result<ModelSpec, ModelError> {
    let config = Config::new(config)?;
    let class = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let found = match config.text("model_type")? {
        Some(model_type) => model_type,
        None => class.ok_or_else(|| config.missing("model_type"))?,
    };
    let family = |class: &str| {
        let family = class.strip_suffix(LANGUAGE_MODEL).or_else(|| class.strip_suffix(CLASSIFIER))?;
        Some(family.to_owned())
    };
    let known =
        ARCHITECTURES.iter().find(|(name, known, _)| found == *name || family(found).is_some_and(|f| f == *known));
    let Some((name, expected, read)) = known else {
        let supported = architectures().collect::<Vec<_>>().join(", ");
        return Err(ModelError::UnknownArchitecture { found: found.to_owned(), supported });
    };
    if class.is_some_and(|class| family(class).is_none_or(|f| f != *expected)) {
        let reason = format!("model_type {name} goes with {expected}{LANGUAGE_MODEL} or {expected}{CLASSIFIER}");
        return Err(config.bad("architectures", reason));
    }
    let mut spec = read(&config)?;
    if class.is_some_and(|class| class.ends_with(CLASSIFIER)) {
        spec.classes = Some(classes(&config)?);
        spec.tied = false;
    }
    check_size(&spec)?;
    Ok(spec)
}

/// As many as `id2label` names, or `num_labels`, or 2.
fn classes(config: &Config) -> Result<usize, ModelError> {
    match config.get("id2label").map(|labels| labels.as_object().map(serde_json::Map::len)) {
        Some(Some(labels)) if labels > 0 => Ok(labels),
        Some(_) => Err(config.bad("id2label", "an object with a name for each class is expected")),
        None => config.size_or("num_labels", 2, COUNTS),
    }
}

/// Refuses numbers whose product nobody could hold, before anything is made by them.
fn check_size(spec: &ModelSpec) -> Result<(), ModelError> {
    let tensors: usize = spec
        .blocks
        .iter()
        .map(|block| match &block.feed_forward {
            FeedForward::Mlp(_) => 16,
            FeedForward::Moe(moe) => 16 + 6 * moe.router.experts,
        })
        .sum();
    if tensors > MOST_TENSORS {
        return Err(ModelError::Inconsistent(format!("{tensors} tensors are more than a model can have")));
    }
    // Widths are at most 2^20 and vocabularies 2^28, so that no tensor overflows; their sum still might.
    let parameters = spec.weights().iter().try_fold(0u64, |sum, w| sum.checked_add(w.elements()));
    match parameters {
        Some(parameters) if parameters < 1 << 50 => Ok(()),
        _ => Err(ModelError::Inconsistent("the tensors have more than 2^50 elements".to_owned())),
    }
}

/// What every architecture reads alike.
struct Common {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    norm_eps: f32,
    max_positions: usize,
}

fn common(config: &Config) -> Result<Common, ModelError> {
    config.only("hidden_act", &["silu", "swish"])?;
    Ok(Common {
        hidden: config.size("hidden_size", WIDTHS)?,
        intermediate: config.size("intermediate_size", WIDTHS)?,
        layers: config.size("num_hidden_layers", COUNTS)?,
        heads: config.size("num_attention_heads", COUNTS)?,
        norm_eps: config.positive_or("rms_norm_eps", 1e-6)? as f32,
        max_positions: config.size_or("max_position_embeddings", 2048, LENGTHS)?,
    })
}

fn model(config: &Config, common: &Common, tied: bool, blocks: Vec<BlockSpec>) -> Result<ModelSpec, ModelError> {
    Ok(ModelSpec {
        architecture: config.text("model_type")?.unwrap_or_default().to_owned(),
        vocab_size: config.size("vocab_size", LENGTHS)?,
        hidden_size: common.hidden,
        max_positions: common.max_positions,
        tied: config.flag("tie_word_embeddings", tied)?,
        classes: None,
        norm_eps: common.norm_eps,
        blocks,
    })
}
