//! `quantization_config` of config.json: which method, and for compressed-tensors which scheme a module has.

use fancy_regex::Regex;
use fourfold_tensor::{OffsetsForm, QuantizedForm, ScalesForm};
use serde_json::Value;
use thiserror::Error;

use super::composite::{Composite, composites};
use super::keys::{check_fp8, check_groups};

/// What config.json says of quantized weights.
#[derive(Clone, Debug)]
pub enum QuantizationConfig {
    /// Nothing: the weights are plain.
    None,
    /// DeepSeek's FP8: E4M3 weights with one `weight_scale_inv` for each block.
    Fp8Blocks {
        /// Output features of a block.
        rows: usize,
        /// Input features of a block.
        cols: usize,
    },
    /// FP8 with one scale for each tensor (`quant_method: fp8` without block size).
    Fp8,
    /// compressed-tensors, or this program's own superset of it: schemes for modules.
    Groups {
        /// Schemes, in the file's order.
        groups: Vec<Group>,
        /// Modules that have none.
        ignore: Vec<Target>,
        /// Weights in parts of their own forms.
        composites: Vec<Composite>,
    },
}

/// A scheme and what it is for.
#[derive(Clone, Debug)]
pub struct Group {
    /// The modules.
    pub targets: Vec<Target>,
    /// Their scheme.
    pub scheme: Scheme,
}

/// How the weights of a group are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Bits of a code.
    pub bits: u8,
    /// Whether codes are floats (FP8) instead of integers.
    pub float: bool,
    /// Whether zero points are not stored.
    pub symmetric: bool,
    /// What shares a scale.
    pub strategy: Strategy,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The whole tensor.
    Tensor,
    /// A row.
    Channel,
    /// So many columns of a row.
    Group(usize),
    /// A block of rows and columns.
    Block(usize, usize),
}

/// A word of `targets` or `ignore`.
#[derive(Clone, Debug)]
pub enum Target {
    /// A module's full name, or the name of a class of modules (`Linear`, `Embedding`).
    Name(String),
    /// `re:`, matched from the name's begin.
    Pattern(Regex),
}

/// What is wrong with a `quantization_config`.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A method of others that this program does not read.
    #[error(
        "quantization_config.quant_method is {method:?}; this program reads compressed-tensors and fp8 (start from the \
         unquantized checkpoint, or a GGUF file)"
    )]
    Method {
        /// Its name.
        method: String,
    },
    /// A compressed-tensors format that this program does not read.
    #[error(
        "quantization_config.format is {format:?}; this program reads pack-quantized, int-quantized, naive-quantized, \
         float-quantized and dense"
    )]
    Format {
        /// Its name.
        format: String,
    },
    /// A sparse layout of compressed-tensors, none of which this program reads.
    #[error(
        "quantization_config.sparsity_config.format is {format:?}; this program reads dense (save the model decompressed)"
    )]
    Sparsity {
        /// Its name.
        format: String,
    },
    /// A member that is missing or has a value that means nothing.
    #[error("quantization_config.{member}: {reason}")]
    Member {
        /// Where.
        member: String,
        /// What is wrong.
        reason: String,
    },
}

/// Methods and formats read.
const FORMATS: &[&str] =
    &["pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense", "mixed-precision"];

/// Steps a pattern may backtrack: patterns come with the checkpoint, and must not hang its reader.
const BACKTRACK_LIMIT: usize = 100_000;

impl QuantizationConfig {
    /// Reads `quantization_config` (or its older name `compression_config`) out of a config.json.
    ///
    /// # Errors
    /// A method or format that is not read, or a member that is malformed.
    pub fn from_config(config: &Value) -> Result<Self, ConfigError> {
        let given = |key| config.get(key).filter(|section| !section.is_null());
        let section = match (given("quantization_config"), given("compression_config")) {
            (Some(new), Some(old)) if new != old => {
                return Err(member("quant_method", "compression_config stands beside it and says something else"));
            }
            (new, old) => new.or(old),
        };
        let Some(section) = section else { return Ok(Self::None) };
        let Some(object) = section.as_object() else { return Err(member("quant_method", "no object holds it")) };
        // Weights that are stored as a bitmask and the values it keeps, under names of their own.
        let sparsity = section.get("sparsity_config").and_then(|sparsity| sparsity.get("format"));
        if let Some(format) = sparsity.and_then(Value::as_str).filter(|&format| format != "dense") {
            return Err(ConfigError::Sparsity { format: format.to_owned() });
        }
        let method = match object.get("quant_method") {
            None | Some(Value::Null) => None,
            Some(Value::String(method)) => Some(method.as_str()),
            Some(other) => return Err(member("quant_method", format!("{other} is no string"))),
        };
        match method {
            Some("fp8") => Self::fp8(section),
            Some("compressed-tensors" | "fourfold") | None if section.get("config_groups").is_some() => {
                Self::groups(section)
            }
            Some("compressed-tensors" | "fourfold") | None => Err(member("config_groups", "missing")),
            Some(method) => Err(ConfigError::Method { method: method.to_owned() }),
        }
    }

    fn fp8(section: &Value) -> Result<Self, ConfigError> {
        check_fp8(section)?;
        match section.get("weight_block_size") {
            None | Some(Value::Null) => Ok(Self::Fp8),
            Some(size) => {
                let (rows, cols) = block(size, "weight_block_size")?;
                Ok(Self::Fp8Blocks { rows, cols })
            }
        }
    }

    fn groups(section: &Value) -> Result<Self, ConfigError> {
        let check_format = |format: Option<&Value>| match format.and_then(Value::as_str) {
            Some(format) if !FORMATS.contains(&format) => Err(ConfigError::Format { format: format.to_owned() }),
            _ => Ok(()),
        };
        check_format(section.get("format"))?;
        check_groups(section)?;
        let Some(entries) = section.get("config_groups").and_then(Value::as_object) else {
            return Err(member("config_groups", "no object"));
        };
        let mut groups = Vec::new();
        for (name, entry) in entries {
            let at = format!("config_groups.{name}");
            check_format(entry.get("format"))?;
            let targets = targets(entry.get("targets"), &format!("{at}.targets"))?;
            // A group may quantize activations alone; its weights are then plain.
            if let Some(weights) = entry.get("weights").filter(|w| !w.is_null()) {
                groups.push(Group { targets, scheme: scheme(weights, &format!("{at}.weights"))? });
            }
        }
        let ignore = match section.get("ignore") {
            None | Some(Value::Null) => Vec::new(),
            some => targets(some, "ignore")?,
        };
        Ok(Self::Groups { groups, ignore, composites: composites(section)? })
    }

    /// Weights in parts of their own forms.
    pub fn composites(&self) -> &[Composite] {
        match self {
            Self::Groups { composites, .. } => composites,
            Self::None | Self::Fp8 | Self::Fp8Blocks { .. } => &[],
        }
    }

    /// The scheme of a tensor: as compressed-tensors chooses it, by the module's full name, else by a pattern, else by the
    /// module's class. A tensor that is not called `weight` is looked up by its own name.
    pub fn scheme_of(&self, tensor: &str) -> Option<Scheme> {
        let Self::Groups { groups, ignore, .. } = self else { return None };
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let class = if is_embedding(module) { "Embedding" } else { "Linear" };
        let matches = |target: &Target| target.is_name(module) || target.is_pattern_of(module) || target.is_name(class);
        if ignore.iter().any(matches) {
            return None;
        }
        let find = |test: &dyn Fn(&Target) -> bool| groups.iter().find(|g| g.targets.iter().any(test));
        find(&|t| t.is_name(module))
            .or_else(|| find(&|t| t.is_pattern_of(module)))
            .or_else(|| find(&|t| t.is_name(class)))
            .map(|g| g.scheme)
    }
}

impl Scheme {
    /// The scheme that describes a form.
    pub fn of(form: &QuantizedForm) -> Self {
        // One scale beside offsets or column indices for each group still needs the groups said.
        let is_one = matches!(form.scales, ScalesForm::PerTensor(_))
            && matches!(form.offsets, OffsetsForm::Symmetric | OffsetsForm::ZeroPointPerTensor)
            && !form.g_idx;
        let strategy = match form.group_size {
            _ if is_one => Strategy::Tensor,
            size if size >= form.cols => Strategy::Channel,
            size => Strategy::Group(size),
        };
        let symmetric = !matches!(form.offsets, OffsetsForm::ZeroPoint | OffsetsForm::ZeroPointPerTensor);
        Self { bits: form.bits, float: false, symmetric, strategy }
    }
}

impl Scheme {
    /// In a few words: `int4 g64`.
    pub fn describe(&self, cols: usize) -> String {
        match self.strategy {
            Strategy::Tensor => format!("int{} per-tensor", self.bits),
            Strategy::Group(size) if size < cols => format!("int{} g{size}", self.bits),
            Strategy::Channel | Strategy::Group(_) | Strategy::Block(..) => format!("int{} per-channel", self.bits),
        }
    }
}

impl Target {
    fn is_name(&self, name: &str) -> bool {
        matches!(self, Self::Name(n) if n == name)
    }

    fn is_pattern_of(&self, name: &str) -> bool {
        // A pattern that backtracks beyond its limit matches nothing: the tensor then has no scheme, which is an error that
        // names it.
        matches!(self, Self::Pattern(p) if p.is_match(name).unwrap_or(false))
    }
}

/// Whether a module is an embedding, by its name: files do not say.
pub(super) fn is_embedding(module: &str) -> bool {
    ["embed_tokens", "wte", "word_embeddings", "tok_embeddings"].contains(&module.rsplit('.').next().unwrap_or(module))
}

pub(super) fn member(member: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Member { member: member.to_owned(), reason: reason.into() }
}

fn targets(value: Option<&Value>, at: &str) -> Result<Vec<Target>, ConfigError> {
    let Some(list) = value.and_then(Value::as_array) else { return Err(member(at, "no list")) };
    list.iter()
        .map(|word| {
            let Some(word) = word.as_str() else { return Err(member(at, format!("{word} is no string"))) };
            let Some(pattern) = word.strip_prefix("re:") else { return Ok(Target::Name(word.to_owned())) };
            // Python's re.match anchors at the begin.
            fancy_regex::RegexBuilder::new(&format!("^(?:{pattern})"))
                .backtrack_limit(BACKTRACK_LIMIT)
                .build()
                .map(Target::Pattern)
                .map_err(|e| member(at, format!("pattern {pattern:?}: {e}")))
        })
        .collect()
}

fn scheme(weights: &Value, at: &str) -> Result<Scheme, ConfigError> {
    let bits = match weights.get("num_bits") {
        None | Some(Value::Null) => 8,
        Some(bits) => bits
            .as_u64()
            .and_then(|b| u8::try_from(b).ok())
            .filter(|b| (2..=8).contains(b))
            .ok_or_else(|| member(&format!("{at}.num_bits"), format!("{bits} is none of 2 to 8")))?,
    };
    let float = match weights.get("type").and_then(Value::as_str) {
        None | Some("int") => false,
        Some("float") if bits == 8 => true,
        Some(other) => return Err(member(&format!("{at}.type"), format!("{other:?} of {bits} bits is not read"))),
    };
    let symmetric = weights.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
    let group_size = weights.get("group_size").and_then(Value::as_i64);
    let sized = || match group_size.and_then(|g| usize::try_from(g).ok()).filter(|&g| g > 0) {
        Some(size) => Ok(Strategy::Group(size)),
        None => Err(member(&format!("{at}.group_size"), "strategy \"group\" needs a positive one")),
    };
    let strategy = match weights.get("strategy").and_then(Value::as_str) {
        Some("tensor") => Strategy::Tensor,
        Some("channel") => Strategy::Channel,
        Some("group") => sized()?,
        Some("block") => {
            let at = format!("{at}.block_structure");
            let (rows, cols) = block(weights.get("block_structure").unwrap_or(&Value::Null), &at)?;
            Strategy::Block(rows, cols)
        }
        Some(other) => return Err(member(&format!("{at}.strategy"), format!("{other:?} is not read"))),
        // Unsaid, the group size says it.
        None => match group_size {
            None => Strategy::Tensor,
            Some(-1) => Strategy::Channel,
            Some(_) => sized()?,
        },
    };
    Ok(Scheme { bits, float, symmetric, strategy })
}

/// A pair of positive numbers.
fn block(value: &Value, at: &str) -> Result<(usize, usize), ConfigError> {
    let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    match value.as_array().map(Vec::as_slice) {
        Some([rows, cols]) => size(rows).zip(size(cols)),
        _ => None,
    }
    .ok_or_else(|| member(at, format!("{value} is no pair of positive numbers")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ct(groups: Value, ignore: Value) -> Value {
        json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": groups, "ignore": ignore}})
    }

    #[test]
    fn the_most_exact_target_decides() {
        let weights = |bits| json!({"num_bits": bits, "type": "int", "symmetric": true, "strategy": "channel"});
        let config = QuantizationConfig::from_config(&ct(
            json!({
                "group_0": {"targets": ["Linear"], "weights": weights(4)},
                "group_1": {"targets": ["re:.*layers\\.[0-3]\\.(?!mlp).*"], "weights": weights(6)},
                "group_2": {"targets": ["model.layers.2.self_attn.q_proj", "Embedding"], "weights": weights(8)},
            }),
            json!(["lm_head", "re:.*\\.gate$"]),
        ))
        .unwrap();
        for (tensor, bits) in [
            ("model.layers.7.self_attn.q_proj.weight", Some(4)),
            ("model.layers.2.mlp.up_proj.weight", Some(4)),
            ("model.layers.1.self_attn.q_proj.weight", Some(6)),
            ("model.layers.2.self_attn.q_proj.weight", Some(8)),
            ("model.embed_tokens.weight", Some(8)),
            ("lm_head.weight", None),
            ("model.layers.2.mlp.gate.weight", None),
            // Patterns are anchored at the begin alone.
            ("x.model.layers.2.self_attn.q_proj.weight", Some(6)),
        ] {
            assert_eq!(config.scheme_of(tensor).map(|s| s.bits), bits, "{tensor}");
        }
    }

    #[test]
    fn strategies_are_said_or_follow_from_the_group_size() {
        let scheme = |weights: Value| {
            let groups = json!({"g": {"targets": ["Linear"], "weights": weights}});
            QuantizationConfig::from_config(&ct(groups, json!([]))).map(|c| c.scheme_of("x.weight").unwrap().strategy)
        };
        assert_eq!(scheme(json!({"num_bits": 4, "group_size": 64})).unwrap(), Strategy::Group(64));
        assert_eq!(scheme(json!({"num_bits": 4, "group_size": -1})).unwrap(), Strategy::Channel);
        assert_eq!(scheme(json!({"num_bits": 4})).unwrap(), Strategy::Tensor);
        let block = json!({"type": "float", "strategy": "block", "block_structure": [128, 64]});
        assert_eq!(scheme(block).unwrap(), Strategy::Block(128, 64));
        for bad in [
            json!({"num_bits": 1}),
            json!({"num_bits": 9}),
            json!({"num_bits": "4"}),
            json!({"num_bits": 4, "type": "float"}),
            json!({"num_bits": 4, "strategy": "group"}),
            json!({"num_bits": 4, "strategy": "group", "group_size": 0}),
            json!({"num_bits": 4, "strategy": "token"}),
            json!({"strategy": "block", "block_structure": [0, 1]}),
        ] {
            assert!(matches!(scheme(bad.clone()), Err(ConfigError::Member { .. })), "{bad}");
        }
    }

    #[test]
    fn methods_of_others_are_refused_by_name() {
        for method in ["bitsandbytes", "awq", "gptq", "quip"] {
            let error = QuantizationConfig::from_config(&json!({"quantization_config": {"quant_method": method}}));
            assert_eq!(error.unwrap_err(), ConfigError::Method { method: method.to_owned() });
        }
        let marlin = json!({"compression_config": {"format": "marlin-24", "config_groups": {}}});
        let error = QuantizationConfig::from_config(&marlin).unwrap_err();
        assert_eq!(error, ConfigError::Format { format: "marlin-24".to_owned() });
        let sparse = json!({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {},
            "sparsity_config": {"format": "sparse-bitmask"}}});
        let error = QuantizationConfig::from_config(&sparse).unwrap_err();
        assert_eq!(error, ConfigError::Sparsity { format: "sparse-bitmask".to_owned() });
        let fp8 = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}});
        let config = QuantizationConfig::from_config(&fp8).unwrap();
        assert!(matches!(config, QuantizationConfig::Fp8Blocks { rows: 128, cols: 64 }));
        assert!(matches!(QuantizationConfig::from_config(&json!({})), Ok(QuantizationConfig::None)));
    }

    #[test]
    fn keys_that_results_depend_on_are_refused_by_name() {
        let weights =
            json!({"num_bits": 4, "type": "int", "strategy": "channel", "dynamic": false, "observer": "minmax"});
        let base = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
            "config_groups": {"g": {"targets": ["Linear"], "weights": weights, "input_activations": null}},
            "transform_config": {}, "sparsity_config": {}, "version": "0.20.0", "kv_cache_scheme": null});
        let read = |path: &[&str], value: Value| {
            let mut section = base.clone();
            let mut place = &mut section;
            for key in path {
                place = &mut place[*key];
            }
            *place = value;
            QuantizationConfig::from_config(&json!({"quantization_config": section}))
        };
        assert!(read(&["version"], json!("0.1")).is_ok());
        assert!(read(&["config_groups", "g", "weights", "actorder"], json!("group")).is_ok());
        for (path, value) in [
            (vec!["transform_config"], json!({"config_groups": {"u": {"type": "hadamard"}}})),
            (vec!["moe_sparsity_config"], json!({"keep": 4})),
            (vec!["rotation"], json!(true)),
            (vec!["quant_method"], json!(5)),
            (vec!["format"], json!(["pack-quantized"])),
            (vec!["config_groups", "g", "output_activations"], json!({"num_bits": 8})),
            (vec!["config_groups", "g", "transforms"], json!("hadamard")),
            (vec!["config_groups", "g", "weights", "dynamic"], json!(true)),
            (vec!["config_groups", "g", "weights", "codebook"], json!("nf4")),
        ] {
            let error = read(&path, value).unwrap_err();
            assert!(matches!(error, ConfigError::Member { .. }), "{error}");
            assert!(error.to_string().contains(path.last().unwrap()), "{path:?}: {error}");
        }
        let fp8 = |key: &str, value: Value| {
            let mut section = json!({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3",
                "activation_scheme": "dynamic"});
            section[key] = value;
            QuantizationConfig::from_config(&json!({"quantization_config": section}))
        };
        assert!(fp8("scale_fmt", json!("ue8m0")).is_ok());
        for (key, value) in [("fmt", json!("e5m2")), ("expert_dtype", json!("fp4")), ("hadamard", json!(true))] {
            assert!(fp8(key, value).unwrap_err().to_string().contains(key), "{key}");
        }
        assert!(QuantizationConfig::from_config(&json!({"quantization_config": "fp8"})).is_err());
        assert!(QuantizationConfig::from_config(&json!({"quantization_config": null})).is_ok());
        let two = json!({"quantization_config": base, "compression_config": {"format": "dense", "config_groups": {}}});
        assert!(QuantizationConfig::from_config(&two).is_err());
    }

    #[test]
    fn rounded_activations_are_left_out_and_said() {
        use super::super::quantization_remarks;
        let config = json!({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}, "config_groups":
            {"g": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}, "h": {"input_activations": null}}}});
        let remarks = quantization_remarks(&config);
        assert_eq!(remarks.len(), 2, "{remarks:?}");
        assert!(remarks[0].contains("input_activations of 1 group"), "{remarks:?}");
        assert!(quantization_remarks(&json!({"model_type": "llama"})).is_empty());
    }

    #[test]
    fn a_pattern_cannot_hang_its_reader() {
        let groups = json!({"g": {"targets": ["re:(a|a|b)*(?=c)d"], "weights": {"num_bits": 4}}});
        let config = QuantizationConfig::from_config(&ct(groups, json!([]))).unwrap();
        assert!(config.scheme_of(&"a".repeat(5000)).is_none());
        let groups = json!({"g": {"targets": ["re:("], "weights": {"num_bits": 4}}});
        assert!(matches!(QuantizationConfig::from_config(&ct(groups, json!([]))), Err(ConfigError::Member { .. })));
    }
}
