//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::{Path, PathBuf};

use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSource};
use serde::Deserialize;
use serde_json::Value;

use super::source::HfSource;
use crate::quantization::QuantizationConfig;
use crate::safetensors::Store;
use crate::{Access, Checkpoint, FormatError, Fp8Decode, json};

/// The weights of an adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// What they mean.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";
/// The two factors: `q_proj.weight` becomes `q_proj.weight + scaling · B · A`.
const LORA_A: &str = ".lora_A.weight";
const LORA_B: &str = ".lora_B.weight";
/// The scaling, a tensor `[1]` here: the layers know no adapter's configuration.
const LORA_SCALING: &str = ".lora_scaling";

/// The keys of `adapter_config.json` that change what the tensors mean.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    r: f64,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: Value,
    #[serde(default)]
    alpha_pattern: Value,
}

impl Config {
    /// What this program does not apply.
    fn unsupported(&self) -> Option<&'static str> {
        let is_empty = |pattern: &Value| pattern.is_null() || pattern.as_object().is_some_and(|p| p.is_empty());
        let checks = [
            (self.peft_type != "LORA", "a peft_type other than LORA"),
            (self.use_dora, "use_dora"),
            (self.lora_bias, "lora_bias"),
            (self.fan_in_fan_out, "fan_in_fan_out"),
            (self.bias.as_deref().is_some_and(|bias| bias != "none"), "trained biases"),
            (!is_empty(&self.rank_pattern), "rank_pattern"),
            (!is_empty(&self.alpha_pattern), "alpha_pattern"),
        ];
        checks.into_iter().find(|(is_set, _)| *is_set).map(|(_, what)| what)
    }

    fn scaling(&self) -> f64 {
        self.lora_alpha / if self.use_rslora { self.r.sqrt() } else { self.r }
    }
}

/// A checkpoint's weights with the tensors of an adapter among them.
struct Adapted {
    base: Box<dyn WeightSource>,
    adapter: HfSource,
    scaling: f32,
    infos: Vec<TensorInfo>,
    path: PathBuf,
}

/// Adds the adapter in the directory `dir` to a checkpoint: linear layers find its tensors by name, beside their weights.
///
/// # Errors
/// A file that is missing or malformed, settings that are not supported, or a tensor that adapts nothing in the checkpoint.
pub fn with_adapter(checkpoint: Checkpoint, dir: &Path) -> Result<Checkpoint, FormatError> {
    let config_path = dir.join(ADAPTER_CONFIG);
    let config: Config = json::read(&config_path, json::CONFIG_LIMIT)?;
    let refuse = |reason: String| FormatError::Json { file: config_path.clone(), reason };
    if let Some(what) = config.unsupported() {
        return Err(refuse(format!("{what} is not supported")));
    }
    let scaling = config.scaling() as f32;
    if !(config.r >= 1.0 && scaling.is_finite()) {
        return Err(refuse(format!("r = {} and lora_alpha = {} give no scaling", config.r, config.lora_alpha)));
    }
    let path = dir.join(ADAPTER_WEIGHTS);
    let store = Store::single(&path, Access::Read)?;
    let plain = QuantizationConfig::from_config(&Value::Object(serde_json::Map::new()))
        .map_err(|problem| FormatError::Quantization { file: config_path.clone(), problem })?;
    let adapter = HfSource::new(&path, store, &plain, Fp8Decode::default())?;
    let mut infos = checkpoint.weights.tensors().to_vec();
    for info in adapter.tensors() {
        let name = info.name.strip_prefix(PREFIX).unwrap_or(&info.name);
        let stem = name.strip_suffix(LORA_A).or_else(|| name.strip_suffix(LORA_B));
        let is_known = stem.is_some_and(|stem| checkpoint.weights.info(&format!("{stem}.weight")).is_some());
        if !is_known {
            let reason = format!("tensor {} adapts no weight of {}", info.name, checkpoint.path.display());
            return Err(FormatError::NotACheckpoint { path, reason });
        }
        infos.push(TensorInfo { name: name.to_owned(), ..info.clone() });
    }
    let weight_bytes = checkpoint.weight_bytes + adapter.data_bytes();
    let weights = Box::new(Adapted { base: checkpoint.weights, adapter, scaling, infos, path });
    Ok(Checkpoint { weights, weight_bytes, ..checkpoint })
}

impl Adapted {
    fn adapter_name(&self, name: &str) -> Option<String> {
        let is_adapter = name.ends_with(LORA_A) || name.ends_with(LORA_B);
        [format!("{PREFIX}{name}"), name.to_owned()]
            .into_iter()
            .find(|name| is_adapter && self.adapter.info(name).is_some())
    }
}

impl WeightSource for Adapted {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self.adapter_name(name) {
            Some(name) => self.adapter.info(&name),
            None => self.base.info(name),
        }
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        if let Some(stem) = name.strip_suffix(LORA_SCALING) {
            return match self.adapter_name(&format!("{stem}{LORA_A}")) {
                Some(_) => Ok(Dense::from_f32(vec![1], vec![self.scaling]).into()),
                None => Err(SourceError::Missing { file: self.path.clone(), tensor: name.to_owned() }),
            };
        }
        match self.adapter_name(name) {
            Some(name) => self.adapter.load(&name),
            None => self.base.load(name),
        }
    }
}
