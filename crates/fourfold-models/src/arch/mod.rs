//! Architectures: each reads its configuration into a [`ModelSpec`].

mod convnet;
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

/// Every architecture: its `model_type`, its class in `architectures`, its reader.
const ARCHITECTURES: &[(&str, &str, Reader)] = &[
    ("llama", "LlamaForCausalLM", llama::read),
    ("qwen2", "Qwen2ForCausalLM", qwen2::read),
    ("qwen3", "Qwen3ForCausalLM", qwen3::read),
    ("deepseek_v2", "DeepseekV2ForCausalLM", deepseek::read_v2),
    ("deepseek_v3", "DeepseekV3ForCausalLM", deepseek::read_v3),
];

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
    let known = ARCHITECTURES.iter().find(|(name, class, _)| found == *name || found == *class);
    let Some((name, expected_class, read)) = known else {
        let supported = architectures().collect::<Vec<_>>().join(", ");
        return Err(ModelError::UnknownArchitecture { found: found.to_owned(), supported });
    };
    if class.is_some_and(|class| class != *expected_class) {
        return Err(config.bad("architectures", format!("model_type {name} goes with {expected_class}")));
    }
    let spec = read(&config)?;
    check_size(&spec)?;
    Ok(spec)
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
        norm_eps: common.norm_eps,
        blocks,
    })
}
