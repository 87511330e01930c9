//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod targets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use config::AdapterConfig;
use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSource};
use serde_json::Value;
use thiserror::Error;

use super::source::HfSource;
use crate::quantization::QuantizationConfig;
use crate::safetensors::Store;
use crate::{Access, Checkpoint, FormatError};

/// The weights of an adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// What they mean.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The weights of an adapter as PEFT wrote them before safetensors: a pickle.
const ADAPTER_PICKLE: &str = "adapter_model.bin";

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";
/// The end of the name of a layer's own weight under an adapter.
const BASE_LAYER: &str = ".base_layer.weight";
/// The two factors: `q_proj.weight` becomes `q_proj.weight + scaling · B · A`.
const LORA_A: &str = ".lora_A.weight";
const LORA_B: &str = ".lora_B.weight";
/// The scaling, a tensor `[1]` here: the layers know no adapter's configuration.
const LORA_SCALING: &str = ".lora_scaling";

/// Ends of names that belong to kinds of adapters that are not applied, and what they are.
const OTHERS: &[(&str, &str)] = &[
    (".lora_embedding_A", "an adapter of an embedding"),
    (".lora_embedding_B", "an adapter of an embedding"),
    (".lora_magnitude_vector", "DoRA"),
    (".lora_B.bias", "a trained bias of the adapter (lora_bias)"),
    (".bias", "a trained bias"),
    (".token_adapter.trainable_tokens_delta", "trained tokens (trainable_token_indices)"),
    (".default.weight", "PEFT's name of an adapter in memory; save_pretrained leaves it out"),
];

/// What is wrong with an adapter: one variant a fault.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AdapterError {
    /// A key whose value is not obeyed, or means nothing.
    #[error("{key} = {value}: {reason}")]
    Key {
        /// The key.
        key: String,
        /// Its value as JSON, shortened.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key that is none of PEFT's.
    #[error("{key} = {value}: this program does not know the key, and what it changes")]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value as JSON, shortened.
        value: String,
    },
    /// A pickle in place of safetensors.
    #[error(
        "is a PyTorch pickle, which this program does not read; load the adapter with PEFT and save it again \
         (save_pretrained writes {ADAPTER_WEIGHTS})"
    )]
    Pickle,
    /// A file without tensors.
    #[error("holds no tensors: the adapter was saved empty")]
    Empty,
    /// A tensor that changes no layer of the model.
    #[error("tensor {tensor} {shape:?} {reason}")]
    Unused {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Why.
        reason: String,
    },
    /// A factor of another shape than the layer and the configuration say.
    #[error("tensor {tensor} has shape {found:?}, {expected:?} was expected: {reason}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// What it should be.
        expected: Vec<usize>,
        /// What says so.
        reason: String,
    },
    /// A factor or a layer's pair that is absent.
    #[error("tensor {tensor} is missing: {reason}")]
    Missing {
        /// The tensor.
        tensor: String,
        /// Why it should be there.
        reason: String,
    },
    /// A number that is no number.
    #[error("tensor {tensor}: row {row} holds {value}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
        /// The number.
        value: String,
    },
    /// A tensor under two names.
    #[error("tensor {tensor} is there with and without {PREFIX}")]
    Twice {
        /// The tensor.
        tensor: String,
    },
}

/// What of a model an adapter may change.
#[derive(Clone, Debug, Default)]
pub struct Adaptable {
    /// Linear layers: names without `.weight`, and the weights' shapes.
    pub layers: HashMap<String, [usize; 2]>,
    /// Tensors that an adapter may hold whole, with their shapes.
    pub tensors: HashMap<String, Vec<usize>>,
}

/// A checkpoint's weights with the tensors of an adapter among them.
struct Adapted {
    base: Box<dyn WeightSource>,
    adapter: HfSource,
    /// Name in the adapter's file, by the model's.
    names: HashMap<String, String>,
    scalings: HashMap<String, f32>,
    infos: Vec<TensorInfo>,
    path: PathBuf,
}

/// Adds the adapter in the directory `dir` to a checkpoint: linear layers find its tensors by name, beside their
/// weights. A tensor that the adapter holds whole (`modules_to_save`) stands in the place of the model's.
///
/// # Errors
/// A file that is missing or malformed, settings that are not applied, tensors that are missing, that change nothing,
/// that have other shapes than layer and configuration say, or that are not finite.
pub fn with_adapter(checkpoint: Checkpoint, dir: &Path, adaptable: &Adaptable) -> Result<Checkpoint, FormatError> {
    let config_path = dir.join(ADAPTER_CONFIG);
    let config = AdapterConfig::read(&config_path)?;
    let path = dir.join(ADAPTER_WEIGHTS);
    let pickle = dir.join(ADAPTER_PICKLE);
    if !path.exists() && pickle.exists() {
        return Err(FormatError::Adapter { file: pickle, problem: Box::new(AdapterError::Pickle) });
    }
    let store = Store::single(&path, Access::Read)?;
    let plain = QuantizationConfig::from_config(&Value::Object(serde_json::Map::new()))
        .map_err(|problem| FormatError::Quantization { file: config_path.clone(), problem })?;
    let adapter = HfSource::new(&path, store, &plain)?;
    let wrong = |problem| FormatError::Adapter { file: path.clone(), problem: Box::new(problem) };
    if adapter.tensors().is_empty() {
        return Err(wrong(AdapterError::Empty));
    }
    let mut names = HashMap::new();
    for info in adapter.tensors() {
        let name = info.name.strip_prefix(PREFIX).unwrap_or(&info.name);
        // A whole matrix under an adapter of its own.
        let name = name.strip_suffix(BASE_LAYER).map_or(name.to_owned(), |layer| format!("{layer}.weight"));
        check_tensor(info, &name, &config, adaptable).map_err(wrong)?;
        if names.insert(name.clone(), info.name.clone()).is_some() {
            return Err(wrong(AdapterError::Twice { tensor: name }));
        }
    }
    check_complete(&names, &config, adaptable).map_err(wrong)?;
    for info in adapter.tensors() {
        check_finite(&adapter, info, &path)?;
    }
    let of_model = names.iter().map(|(name, stored)| (stored.as_str(), name.as_str())).collect::<HashMap<_, _>>();
    let scalings = names.keys().filter_map(|name| name.strip_suffix(LORA_A));
    let scalings = scalings.map(|layer| (layer.to_owned(), config.scaling_of(layer))).collect();
    let base = checkpoint.weights.tensors().iter().filter(|info| !names.contains_key(&info.name)).cloned();
    let own = adapter.tensors().iter().map(|info| {
        let name = of_model.get(info.name.as_str()).copied().unwrap_or(&info.name).to_owned();
        TensorInfo { name, ..info.clone() }
    });
    let infos = base.chain(own).collect();
    let weight_bytes = checkpoint.weight_bytes + adapter.data_bytes();
    let weights = Box::new(Adapted { base: checkpoint.weights, adapter, names, scalings, infos, path });
    Ok(Checkpoint { weights, weight_bytes, ..checkpoint })
}

/// Whether one tensor is what the configuration promises, for a layer of the model.
fn check_tensor(
    info: &TensorInfo,
    name: &str,
    config: &AdapterConfig,
    adaptable: &Adaptable,
) -> Result<(), AdapterError> {
    let (tensor, shape) = (info.name.clone(), info.shape.clone());
    let unused = |reason: String| AdapterError::Unused { tensor: tensor.clone(), shape: shape.clone(), reason };
    let factor = name.strip_suffix(LORA_A).map(|layer| (layer, true));
    let Some((layer, is_a)) = factor.or_else(|| name.strip_suffix(LORA_B).map(|layer| (layer, false))) else {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let is_table = ["embed_tokens", "lm_head"].iter().any(|table| module.ends_with(table));
        if let Some(expected) = adaptable.tensors.get(name).filter(|_| config.targets.saves(module) || is_table) {
            return match shape == *expected {
                true => Ok(()),
                false => Err(AdapterError::Shape {
                    tensor,
                    found: shape,
                    expected: expected.clone(),
                    reason: "the model's tensor, in whose place it stands, has that shape".to_owned(),
                }),
            };
        }
        let kind = OTHERS.iter().find(|(end, _)| name.ends_with(end)).map(|(_, kind)| *kind);
        return Err(unused(match kind {
            Some(kind) => format!("is not applied: {kind}"),
            None if adaptable.tensors.contains_key(name) => {
                "is one of the model's own, which the configuration does not name (modules_to_save)".to_owned()
            }
            None => "adapts no weight of the model (of tied matrices, an adapter may hold neither)".to_owned(),
        }));
    };
    let Some([outputs, inputs]) = adaptable.layers.get(layer) else {
        return Err(unused(format!("adapts no linear layer of the model: it has no {layer}")));
    };
    if config.targets.adapts(layer) == Some(false) {
        return Err(unused(format!("adapts {layer}, which the configuration leaves out (target_modules)")));
    }
    let rank = usize::try_from(config.rank_of(layer)).unwrap_or(usize::MAX);
    let expected = if is_a { vec![rank, *inputs] } else { vec![*outputs, rank] };
    match shape == expected {
        true => Ok(()),
        false => Err(AdapterError::Shape {
            tensor,
            found: shape,
            expected,
            reason: format!("rank {rank} by the configuration (r, rank_pattern), for a layer [{outputs}, {inputs}]"),
        }),
    }
}

/// Whether every pair is whole, and every layer that is named has one. Of experts PEFT sees none where they are stored
/// together.
fn check_complete(
    names: &HashMap<String, String>,
    config: &AdapterConfig,
    adaptable: &Adaptable,
) -> Result<(), AdapterError> {
    let missing = |tensor: String, reason: &str| Err(AdapterError::Missing { tensor, reason: reason.to_owned() });
    let mut layers: Vec<&String> = adaptable.layers.keys().collect();
    layers.sort_unstable();
    for layer in layers {
        let [a, b] = [LORA_A, LORA_B].map(|part| format!("{layer}{part}"));
        match (names.contains_key(&a), names.contains_key(&b)) {
            (true, true) => {}
            (true, false) => return missing(b, "the other factor is there"),
            (false, true) => return missing(a, "the other factor is there"),
            (false, false) => {
                let is_named = config.targets.are_exact() && config.targets.adapts(layer) == Some(true);
                if is_named && !layer.contains(".experts.") {
                    return missing(a, "the configuration names its layer (target_modules)");
                }
            }
        }
    }
    Ok(())
}

/// Refuses infinities and NaN.
fn check_finite(adapter: &HfSource, info: &TensorInfo, path: &Path) -> Result<(), FormatError> {
    let weight = adapter.read_named(&info.name)?;
    let mut row = vec![0.0; weight.cols()];
    for r in 0..weight.rows() {
        weight.read_row(r, &mut row);
        if let Some(value) = row.iter().find(|value| !value.is_finite()) {
            let (tensor, value) = (info.name.clone(), value.to_string());
            let problem = Box::new(AdapterError::NotFinite { tensor, row: r, value });
            return Err(FormatError::Adapter { file: path.to_owned(), problem });
        }
    }
    Ok(())
}

impl WeightSource for Adapted {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self.names.get(name) {
            Some(stored) => self.adapter.info(stored),
            None => self.base.info(name),
        }
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        if let Some(layer) = name.strip_suffix(LORA_SCALING) {
            return match self.scalings.get(layer) {
                Some(&scaling) => Ok(Dense::from_f32(vec![1], vec![scaling]).into()),
                None => Err(SourceError::Missing { file: self.path.clone(), tensor: name.to_owned() }),
            };
        }
        match self.names.get(name) {
            Some(stored) => self.adapter.load(stored),
            None => self.base.load(name),
        }
    }
}
