//! A model of which there is a config.json alone.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use fourfold_formats::regular;
use fourfold_models::{ModelSpec, Role, WeightSpec, config_remarks, spec_from_config};
use fourfold_tensor::TensorInfo;
use serde_json::Value;

use crate::context::Context;
use crate::limits;

/// What a configuration says of a model's tensors.
pub struct Described {
    pub spec: ModelSpec,
    /// As they would be stored: bf16, and linear layers in DeepSeek's FP8 where the configuration says so.
    pub tensors: Vec<TensorInfo>,
}

impl Described {
    /// Reads MODEL if its name ends in `.json`.
    pub fn read(name: &str, context: &Context) -> Result<Option<Self>> {
        let path = PathBuf::from(name);
        if path.extension().is_none_or(|e| e != "json") {
            return Ok(None);
        }
        let text = regular::read_text(&path, limits::MOST_BYTES).with_context(|| name.to_owned())?;
        let config: Value = serde_json::from_str(&text).with_context(|| name.to_owned())?;
        let spec = spec_from_config(&config).with_context(|| name.to_owned())?;
        for remark in config_remarks(&config).with_context(|| name.to_owned())? {
            context.remark(&format!("{name}: {remark}"));
        }
        let blocks = fp8_blocks(&config);
        let tensors = spec.weights().into_iter().map(|weight| info(weight, blocks)).collect();
        Ok(Some(Self { spec, tensors }))
    }
}

/// Rows and columns that share a scale.
fn fp8_blocks(config: &Value) -> Option<(u64, u64)> {
    let section = &config["quantization_config"];
    let block = |i: usize| section["weight_block_size"][i].as_u64().filter(|&size| size > 0);
    match (section["quant_method"] == "fp8", block(0), block(1)) {
        (true, Some(rows), Some(cols)) => Some((rows, cols)),
        _ => None,
    }
}

fn info(weight: WeightSpec, blocks: Option<(u64, u64)>) -> TensorInfo {
    let is_linear = match weight.role {
        Role::Attention | Role::Mlp | Role::SharedExpert | Role::RoutedExpert => true,
        Role::Embedding
        | Role::LmHead
        | Role::Router
        | Role::Norm
        | Role::Bias
        | Role::Convolution
        | Role::RunningMean
        | Role::RunningVariance => false,
    };
    let (storage, bytes) = match (blocks, is_linear, weight.shape.as_slice()) {
        (Some(block), true, &[rows, cols]) => {
            let scales = (rows as u64).div_ceil(block.0) * (cols as u64).div_ceil(block.1);
            ("FP8", weight.elements() + 4 * scales)
        }
        _ => ("BF16", 2 * weight.elements()),
    };
    TensorInfo { name: weight.name, shape: weight.shape, storage: storage.to_owned(), bytes }
}
