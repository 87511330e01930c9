//! `adapter_config.json`: every key of PEFT's `LoraConfig` is read, known to be without effect on a trained adapter, or
//! refused unless its value is the one that changes nothing.

use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::AdapterError;
use super::targets::Targets;
use crate::{FormatError, json};

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    /// It is obeyed.
    Read,
    /// It says where an adapter comes from, or how it was trained.
    WithoutEffect,
    /// It must be absent, null, false or empty.
    Refused,
}

/// Every key of PEFT 0.21's `LoraConfig`, and two of its first versions (`enable_lora`, `merge_weights`).
/// `fan_in_fan_out` is for layers that are stored transposed (GPT-2's); PEFT sets it to false for the linear layers of
/// all architectures here.
const KEYS: &[(&str, Key)] = &[
    ("peft_type", Key::Read),
    ("r", Key::Read),
    ("lora_alpha", Key::Read),
    ("use_rslora", Key::Read),
    ("rank_pattern", Key::Read),
    ("alpha_pattern", Key::Read),
    ("target_modules", Key::Read),
    ("exclude_modules", Key::Read),
    ("layers_to_transform", Key::Read),
    ("layers_pattern", Key::Read),
    ("modules_to_save", Key::Read),
    ("init_lora_weights", Key::Read),
    ("bias", Key::Read),
    ("task_type", Key::WithoutEffect),
    ("auto_mapping", Key::WithoutEffect),
    ("peft_version", Key::WithoutEffect),
    ("base_model_name_or_path", Key::WithoutEffect),
    ("revision", Key::WithoutEffect),
    ("inference_mode", Key::WithoutEffect),
    ("lora_dropout", Key::WithoutEffect),
    ("fan_in_fan_out", Key::WithoutEffect),
    ("loftq_config", Key::WithoutEffect),
    ("eva_config", Key::WithoutEffect),
    ("corda_config", Key::WithoutEffect),
    ("lora_ga_config", Key::WithoutEffect),
    ("megatron_core", Key::WithoutEffect),
    ("qalora_group_size", Key::WithoutEffect),
    ("runtime_config", Key::WithoutEffect),
    ("merge_weights", Key::WithoutEffect),
    ("use_dora", Key::Refused),
    ("lora_bias", Key::Refused),
    ("alora_invocation_tokens", Key::Refused),
    ("megatron_config", Key::Refused),
    ("trainable_token_indices", Key::Refused),
    ("layer_replication", Key::Refused),
    ("target_parameters", Key::Refused),
    ("use_qalora", Key::Refused),
    ("use_bdlora", Key::Refused),
    ("arrow_config", Key::Refused),
    ("kasa_config", Key::Refused),
    ("monteclora_config", Key::Refused),
    ("velora_config", Key::Refused),
    ("ensure_weight_tying", Key::Refused),
    ("enable_lora", Key::Refused),
];

/// Values of `init_lora_weights` that leave the model's own weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ,
/// LoRA-GA) take something out of them, which the adapter's file does not hold.
const PLAIN_STARTS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// What a configuration says of the tensors.
#[derive(Debug)]
pub(super) struct AdapterConfig {
    rank: u64,
    alpha: f64,
    use_rslora: bool,
    ranks: Vec<(Regex, u64)>,
    alphas: Vec<(Regex, f64)>,
    pub(super) targets: Targets,
}

impl AdapterConfig {
    pub(super) fn read(path: &Path) -> Result<Self, FormatError> {
        let config: Map<String, Value> = json::read(path, json::CONFIG_LIMIT)?;
        Self::parse(&config)
            .map_err(|problem| FormatError::Adapter { file: path.to_owned(), problem: Box::new(problem) })
    }

    pub(super) fn parse(config: &Map<String, Value>) -> Result<Self, AdapterError> {
        check_keys(config)?;
        let bad = |key: &str, reason: &str| bad(config, key, reason);
        let number =
            |key: &str| config.get(key).and_then(Value::as_f64).ok_or_else(|| bad(key, "a number is expected"));
        let rank = config.get("r").and_then(Value::as_u64).filter(|&r| r > 0);
        let ranks = patterns(config, "rank_pattern", |value| value.as_u64().filter(|&r| r > 0))?;
        let config = Self {
            rank: rank.ok_or_else(|| bad("r", "a positive whole number is expected"))?,
            alpha: number("lora_alpha")?,
            use_rslora: config.get("use_rslora").is_some_and(|value| value == &Value::Bool(true)),
            ranks,
            alphas: patterns(config, "alpha_pattern", Value::as_f64)?,
            targets: Targets::parse(config)?,
        };
        match config.alpha.is_finite() {
            true => Ok(config),
            false => Err(bad("lora_alpha", "a finite number is expected")),
        }
    }

    /// The rank of a layer's factors (`rank_pattern`, else `r`).
    pub(super) fn rank_of(&self, layer: &str) -> u64 {
        first_match(&self.ranks, layer).unwrap_or(self.rank)
    }

    /// The factor of a layer's `B · A`: `alpha / r`, or with rsLoRA `alpha / √r` (Kalajdzievski 2023, section 3).
    pub(super) fn scaling_of(&self, layer: &str) -> f32 {
        let (alpha, rank) = (first_match(&self.alphas, layer).unwrap_or(self.alpha), self.rank_of(layer) as f64);
        (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// Refuses what is not applied, by name.
fn check_keys(config: &Map<String, Value>) -> Result<(), AdapterError> {
    for (name, value) in config {
        let is_neutral = match value {
            Value::Null => true,
            Value::Bool(value) => !value,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Number(_) | Value::String(_) => false,
        };
        match KEYS.iter().find(|(known, _)| known == name) {
            Some((_, Key::Read | Key::WithoutEffect)) => {}
            _ if is_neutral => {}
            Some((_, Key::Refused)) => return Err(bad(config, name, "this program does not apply it")),
            None => return Err(AdapterError::UnknownKey { key: name.clone(), value: shown(value) }),
        }
    }
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    if text("peft_type") != Some("LORA") {
        return Err(bad(config, "peft_type", "adapters of type LORA are read"));
    }
    if !matches!(text("bias"), None | Some("none")) {
        return Err(bad(config, "bias", "trained biases are not applied"));
    }
    match config.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(start)) if PLAIN_STARTS.contains(&start.to_lowercase().as_str()) => Ok(()),
        Some(_) => Err(bad(
            config,
            "init_lora_weights",
            "such an adapter belongs to a model whose own weights were changed when it was made; save it as a plain LoRA \
             (PEFT's save_pretrained with path_initial_model_for_weight_conversion), or merge it with PEFT",
        )),
    }
}

/// Regular expressions for layers' names, with a value each, in the file's order.
fn patterns<T>(
    config: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Regex, T)>, AdapterError> {
    let entries = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(_) => return Err(bad(config, key, "an object is expected")),
    };
    let entry = |(pattern, value): (&String, &Value)| {
        let value = read(value).ok_or_else(|| bad(config, key, "numbers above zero are expected"))?;
        Ok((regex(config, key, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, value))
    };
    entries.iter().map(entry).collect()
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], layer: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(layer).unwrap_or(false)).map(|(_, value)| *value)
}

/// A pattern of the configuration; the steps it may backtrack are bounded.
pub(super) fn regex(config: &Map<String, Value>, key: &str, pattern: &str) -> Result<Regex, AdapterError> {
    const BACKTRACK_LIMIT: usize = 100_000;
    let built = fancy_regex::RegexBuilder::new(pattern).backtrack_limit(BACKTRACK_LIMIT).build();
    built.map_err(|error| bad(config, key, &format!("pattern {pattern:?}: {error}")))
}

/// What is wrong with the value of a key.
pub(super) fn bad(config: &Map<String, Value>, key: &str, reason: &str) -> AdapterError {
    let value = config.get(key).map_or_else(|| "nothing".to_owned(), shown);
    AdapterError::Key { key: key.to_owned(), value, reason: reason.to_owned() }
}

/// A value, shortened.
fn shown(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(key: &str, value: Value) -> Map<String, Value> {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
        config[key] = value;
        config.as_object().unwrap().clone()
    }

    /// PEFT's own list of keys, with the values that a new configuration has.
    const PEFT: &str = include_str!("../../../tests/golden/peft_lora_config.json");

    #[test]
    fn every_key_of_peft_is_declared() {
        let config: Map<String, Value> = serde_json::from_str(PEFT).unwrap();
        assert!(config.len() > 40);
        for (key, value) in &config {
            assert!(KEYS.iter().any(|(known, _)| known == key), "{key} is not declared");
            let changes_nothing = ["peft_type", "r", "lora_alpha", "target_modules"].contains(&key.as_str())
                || AdapterConfig::parse(&with(key, value.clone())).is_ok();
            assert!(changes_nothing, "PEFT's own value of {key} is refused: {value}");
        }
    }

    #[test]
    fn what_is_not_applied_is_refused_by_name() {
        for (key, value) in [
            ("use_dora", json!(true)),
            ("lora_bias", json!(true)),
            ("alora_invocation_tokens", json!([36, 37])),
            ("megatron_config", json!({"hidden": 1})),
            ("trainable_token_indices", json!([1])),
            ("layer_replication", json!([[0, 2]])),
            ("target_parameters", json!(["mlp.experts"])),
            ("use_qalora", json!(true)),
            ("use_bdlora", json!({"nblocks": 2})),
            ("arrow_config", json!({"top_k": 3})),
            ("kasa_config", json!({"beta": 1})),
            ("monteclora_config", json!({"num_samples": 1})),
            ("velora_config", json!({"num_groups": 1})),
            ("ensure_weight_tying", json!(true)),
            ("enable_lora", json!([true])),
            ("bias", json!("all")),
            ("bias", json!("lora_only")),
            ("peft_type", json!("IA3")),
            ("init_lora_weights", json!("pissa")),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("corda")),
            ("init_lora_weights", json!("loftq")),
            ("init_lora_weights", json!("lora_ga")),
            ("r", json!(0)),
            ("r", json!(1.5)),
            ("r", json!("4")),
            ("lora_alpha", json!("8")),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!({"(": 2})),
            ("alpha_pattern", json!({"q_proj": "2"})),
            ("a_key_of_tomorrow", json!(1)),
        ] {
            let error = AdapterConfig::parse(&with(key, value.clone())).unwrap_err().to_string();
            assert!(error.contains(key), "{key} {value}: {error}");
        }
    }

    #[test]
    fn what_changes_nothing_is_read() {
        for (key, value) in [
            ("use_dora", json!(false)),
            ("fan_in_fan_out", json!(true)),
            ("init_lora_weights", json!("eva")),
            ("init_lora_weights", json!(false)),
            ("bias", json!("none")),
            ("loftq_config", json!({"loftq_bits": 4})),
            ("base_model_name_or_path", json!("elsewhere/else")),
            ("a_key_of_tomorrow", json!(null)),
        ] {
            assert!(AdapterConfig::parse(&with(key, value.clone())).is_ok(), "{key} {value}");
        }
    }

    #[test]
    fn ranks_and_scalings_go_by_the_first_pattern() {
        let mut config = with("rank_pattern", json!({"layers.1.self_attn.q_proj": 16, "q_proj": 2, "proj": 9}));
        config.insert("alpha_pattern".to_owned(), json!({"layers\\.[0-3]\\..*q_proj": 3}));
        let plain = AdapterConfig::parse(&config).unwrap();
        let of = |config: &AdapterConfig, layer: &str| (config.rank_of(layer), config.scaling_of(layer));
        assert_eq!(of(&plain, "model.layers.1.self_attn.q_proj"), (16, 3.0 / 16.0));
        assert_eq!(of(&plain, "model.layers.2.self_attn.q_proj"), (2, 1.5));
        assert_eq!(of(&plain, "model.layers.7.self_attn.q_proj"), (2, 4.0));
        // A pattern is matched from a dot on, not inside a name.
        assert_eq!(of(&plain, "model.layers.1.self_attn.k_proj"), (4, 2.0));
        config.insert("use_rslora".to_owned(), json!(true));
        let stabilized = AdapterConfig::parse(&config).unwrap();
        assert_eq!(of(&stabilized, "model.layers.1.self_attn.q_proj"), (16, 0.75));
    }
}
