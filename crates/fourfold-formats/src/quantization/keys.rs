//! Which keys of a `quantization_config` are read, which change no result, and which ask for something that is not computed.

use serde_json::{Map, Value};

use super::config::{ConfigError, member};

/// What an object of the section may hold.
struct Section {
    read: &'static [&'static str],
    /// Descriptions, and how weights were found.
    inert: &'static [&'static str],
    /// Keys that must be absent, `null` or empty, and what they ask for.
    limited: &'static [(&'static str, &'static str)],
}

/// compressed-tensors, and this program's superset of it.
const GROUPS: Section = Section {
    // `sparsity_config` describes tensors that are looked for by their own names.
    read: &["quant_method", "format", "config_groups", "ignore", "forms", "sparsity_config", "kv_cache_scheme"],
    inert: &[
        "quantization_status",
        "global_compression_ratio",
        "version",
        "run_compressed",
        "dequantize",
        "use_optimized_inference",
        "quantization_config",
    ],
    limited: &[
        ("transform_config", "transforms of activations that are computed as the model runs (QuIP, SpinQuant)"),
        ("moe_sparsity_config", "experts that are left out"),
    ],
};

const GROUP: Section = Section {
    read: &["targets", "weights", "format", "input_activations"],
    inert: &[],
    limited: &[("output_activations", "rounded outputs of layers")],
};

const WEIGHTS: Section = Section {
    read: &["num_bits", "type", "symmetric", "group_size", "strategy", "block_structure"],
    inert: &["actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"],
    limited: &[],
};

/// DeepSeek's FP8.
const FP8: Section = Section {
    read: &["quant_method", "weight_block_size", "fmt", "activation_scheme", "expert_dtype"],
    // Scales are read as the tensors hold them; modules by whether they have scales.
    inert: &["scale_fmt", "modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize"],
    limited: &[],
};

impl Section {
    fn check(&self, object: &Map<String, Value>, at: &str) -> Result<(), ConfigError> {
        let name = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
        for (key, _) in object.iter().filter(|(_, value)| !is_empty(value)) {
            if let Some((_, asks_for)) = self.limited.iter().find(|(limited, _)| limited == key) {
                return Err(member(&name(key), format!("it asks for {asks_for}, which is not supported")));
            }
            if !self.read.contains(&key.as_str()) && !self.inert.contains(&key.as_str()) {
                return Err(member(&name(key), "this key is not known, and results could depend on it"));
            }
        }
        Ok(())
    }
}

/// `null`, `{}` or `[]`.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(object) => object.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>, ConfigError> {
    value.as_object().ok_or_else(|| member(at, "an object is expected"))
}

/// Checks the keys of compressed-tensors' section, its groups and their weights.
pub(super) fn check_groups(section: &Value) -> Result<(), ConfigError> {
    GROUPS.check(object(section, "quantization_config")?, "")?;
    for key in ["format", "quant_method"] {
        if section.get(key).is_some_and(|value| !value.is_null() && !value.is_string()) {
            return Err(member(key, "a string is expected"));
        }
    }
    let groups = section.get("config_groups").and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let at = format!("config_groups.{name}");
        GROUP.check(object(group, &at)?, &at)?;
        let Some(weights) = group.get("weights").filter(|w| !w.is_null()) else { continue };
        let at = format!("{at}.weights");
        let weights = object(weights, &at)?;
        // Weights that are rounded anew at each step are stored as floats.
        let rest: Map<String, Value> =
            weights.iter().filter(|(key, _)| *key != "dynamic").map(|(k, v)| (k.clone(), v.clone())).collect();
        if weights.get("dynamic").is_some_and(|v| !v.is_null() && v != &Value::Bool(false)) {
            return Err(member(&format!("{at}.dynamic"), "weights whose scales are not stored are not supported"));
        }
        WEIGHTS.check(&rest, &at)?;
    }
    Ok(())
}

/// Checks the keys of an FP8 section.
pub(super) fn check_fp8(section: &Value) -> Result<(), ConfigError> {
    FP8.check(object(section, "quantization_config")?, "")?;
    let one_of = |key: &str, values: &[&str]| match section.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_str().is_some_and(|v| values.contains(&v)) => Ok(()),
        Some(value) => Err(member(key, format!("{value} is not supported; {} is read", values.join(" or ")))),
    };
    one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
    one_of("activation_scheme", &["dynamic", "static"])?;
    one_of("expert_dtype", &["fp8"])
}

/// Sentences on what a `quantization_config` asks for beside its weights and this program leaves out: rounded activations and
/// rounded keys and values, which it keeps in more bits.
pub fn quantization_remarks(config: &Value) -> Vec<String> {
    let section = ["quantization_config", "compression_config"].iter().find_map(|key| config.get(key));
    let Some(section) = section else { return Vec::new() };
    let groups = section.get("config_groups").and_then(Value::as_object);
    let rounded = |group: &Value| group.get("input_activations").is_some_and(|value| !is_empty(value));
    let count = groups.into_iter().flatten().filter(|(_, group)| rounded(group)).count();
    let mut remarks = Vec::new();
    if count > 0 {
        let groups = if count == 1 { "1 group".to_owned() } else { format!("{count} groups") };
        remarks
            .push(format!("quantization_config.input_activations of {groups} is left out: activations keep more bits"));
    }
    if section.get("kv_cache_scheme").is_some_and(|value| !is_empty(value)) {
        remarks.push("quantization_config.kv_cache_scheme is left out: --kv-dtype says how keys are kept".to_owned());
    }
    remarks
}
