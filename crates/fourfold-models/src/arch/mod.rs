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
use crate::keys::{self, Keys};
use crate::rope::Rope;
use crate::{BlockSpec, FeedForward, ModelError, ModelSpec};

/// Reads a checked configuration.
type Reader = fn(&Config) -> Result<ModelSpec, ModelError>;

/// An architecture.
struct Architecture {
    /// Its `model_type`.
    name: &'static str,
    /// What its classes in `architectures` begin with.
    class: &'static str,
    /// What it does with the keys of its configuration.
    keys: Keys,
    read: Reader,
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", class: "Llama", keys: keys::LLAMA, read: llama::read },
    Architecture { name: "qwen2", class: "Qwen2", keys: keys::QWEN2, read: qwen2::read },
    Architecture { name: "qwen3", class: "Qwen3", keys: keys::QWEN3, read: qwen3::read },
    Architecture { name: "deepseek_v2", class: "DeepseekV2", keys: keys::DEEPSEEK_V2, read: deepseek::read_v2 },
    Architecture { name: "deepseek_v3", class: "DeepseekV3", keys: keys::DEEPSEEK_V3, read: deepseek::read_v3 },
];

/// DeepSeek's later models: `model_type`, what their classes begin with, what they need that is not here.
const LATER: &[(&str, &str, &str)] = &[
    (
        "deepseek_v32",
        "DeepseekV32",
        "DeepSeek-V3.2's sparse attention needs its indexer (index_n_heads, index_head_dim, index_topk), which is not here; \
         read as DeepSeek-V3 it would give other results",
    ),
    (
        "deepseek_v4",
        "DeepseekV4",
        "DeepSeek-V4's compressed sparse attention with its indexer, hyper-connections and hash routing are not here",
    ),
];

/// What the class of a language model ends with.
const LANGUAGE_MODEL: &str = "ForCausalLM";
/// What the class of a sequence classifier ends with.
const CLASSIFIER: &str = "ForSequenceClassification";

/// Tensors a model may have: enough for the largest mixtures published, few enough to list.
const MOST_TENSORS: usize = 1 << 19;

/// The names of the supported architectures (`model_type`).
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|architecture| architecture.name)
}

/// Reads a Hugging Face `config.json` in published or transformers v5 style.
///
/// # Errors
/// An unknown architecture; a key that is missing, out of range, or asks for something not supported: the error names key
/// and value.
pub fn spec_from_config(config: &Value) -> Result<ModelSpec, ModelError> {
    let config = Config::new(config)?;
    let class = class(&config)?;
    let architecture = architecture(&config)?;
    architecture.keys.check(&config)?;
    let mut spec = (architecture.read)(&config)?;
    if class.is_some_and(|class| class.ends_with(CLASSIFIER)) {
        config.only("problem_type", &["single_label_classification"])?;
        spec.classes = Some(classes(&config)?);
        spec.tied = false;
    }
    check_size(&spec)?;
    Ok(spec)
}

/// What a reader of a configuration should be told beside its [`ModelSpec`]: keys that the architecture does not know, keys
/// that have no effect where they stand, and keys that transformers takes otherwise. Sentences without the file's name.
///
/// # Errors
/// Those of [`spec_from_config`].
pub fn config_remarks(config: &Value) -> Result<Vec<String>, ModelError> {
    let config = Config::new(config)?;
    let architecture = architecture(&config)?;
    let rope = Rope::read(&config)?;
    let mut remarks = Vec::new();
    let unknown: Vec<&str> =
        config.keys().filter(|key| config.get(key).is_some() && !architecture.keys.knows(key)).collect();
    if !unknown.is_empty() {
        let keys = some_of(&unknown);
        remarks.push(format!("{} does not know and leaves out {keys}", architecture.name));
    }
    let mla = architecture.name.starts_with("deepseek");
    let idle = rope.without_effect(mla);
    if !idle.is_empty() {
        let idle: Vec<&str> = idle.iter().map(String::as_str).collect();
        remarks.push(format!("without effect with rope type {:?}: {}", rope.kind(), some_of(&idle)));
    }
    if rope.both {
        remarks.push("rope_scaling goes before rope_parameters".to_owned());
    }
    if let Some(factor) = rope.attn_factor()? {
        remarks.push(format!("YaRN's attn_factor {factor} is obeyed, as vLLM does; transformers leaves it out"));
    }
    if architecture.name == "deepseek_v2" && config.flag("norm_topk_prob", false)? {
        remarks.push("norm_topk_prob is obeyed, as DeepSeek-V2's own code does; transformers leaves it out".to_owned());
    }
    Ok(remarks)
}

/// What one who trains by a configuration should be told beside [`config_remarks`]: dropout, which transformers applies in training and
/// which is not here.
///
/// # Errors
/// Those of [`spec_from_config`].
pub fn training_remarks(config: &Value) -> Result<Vec<String>, ModelError> {
    let config = Config::new(config)?;
    let dropped = |key: &&str| config.get(key).and_then(Value::as_f64).is_some_and(|share| share > 0.0);
    let named = ["attention_dropout", "hidden_dropout", "classifier_dropout"].into_iter().filter(dropped);
    Ok(named.map(|key| format!("{key} is left out: trained without dropout, where transformers applies it")).collect())
}

/// The first of some names, and how many there are.
fn some_of(names: &[&str]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    let shown: String = shown.chars().take(400).collect();
    match names.len() {
        1 => format!("1 key: {shown}"),
        count if count > SHOWN => format!("{count} keys: {shown}, ..."),
        count => format!("{count} keys: {shown}"),
    }
}

/// Whether an architecture (`model_type`) declares what it does with a key of `config.json`; `false` for an unknown one.
pub fn knows_key(architecture: &str, key: &str) -> bool {
    ARCHITECTURES.iter().any(|known| known.name == architecture && known.keys.knows(key))
}

/// The first class of `architectures`.
fn class<'a>(config: &Config<'a>) -> Result<Option<&'a str>, ModelError> {
    match config.get("architectures") {
        None => Ok(None),
        Some(Value::Array(list)) if list.iter().all(Value::is_string) => Ok(list.first().and_then(Value::as_str)),
        Some(_) => Err(config.bad("architectures", "a list of names is expected")),
    }
}

/// Finds the architecture by `model_type`, else by class; where both stand they must agree.
fn architecture(config: &Config) -> Result<&'static Architecture, ModelError> {
    let class = class(config)?;
    let found = match config.text("model_type")? {
        Some(model_type) => model_type,
        None if config.has("n_activated_experts") || config.has("inter_dim") => {
            return Err(config.bad("model_type", NATIVE));
        }
        None => class.ok_or_else(|| config.missing("model_type"))?,
    };
    let family = |class: &str| {
        let family = class.strip_suffix(LANGUAGE_MODEL).or_else(|| class.strip_suffix(CLASSIFIER))?;
        Some(family.to_owned())
    };
    for (name, later, missing) in LATER {
        let is_later = |class: &str| family(class).is_some_and(|f| f == *later);
        if found == *name || is_later(found) || class.is_some_and(is_later) {
            return Err(ModelError::Unsupported { found: found.to_owned(), missing });
        }
    }
    let known = ARCHITECTURES.iter().find(|a| found == a.name || family(found).is_some_and(|f| f == a.class));
    let Some(architecture) = known else {
        let supported = architectures().collect::<Vec<_>>().join(", ");
        return Err(ModelError::UnknownArchitecture { found: found.to_owned(), supported });
    };
    let (name, expected) = (architecture.name, architecture.class);
    if class.is_some_and(|class| family(class).is_none_or(|f| f != expected)) {
        let reason = format!("model_type {name} goes with {expected}{LANGUAGE_MODEL} or {expected}{CLASSIFIER}");
        return Err(config.bad("architectures", reason));
    }
    Ok(architecture)
}

/// DeepSeek's repositories have a second kind of file for their own inference code.
const NATIVE: &str = "this is a configuration of DeepSeek's own inference code; Hugging Face's config.json is expected";

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
