//! Llama (Touvron et al. 2023): also SmolLM2 and DeepSeek-R1-Distill-Llama.

use super::dense::{Variant, read as read_dense};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config) -> Result<ModelSpec, ModelError> {
    let bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    read_dense(config, Variant { qkv_bias: bias, output_bias: bias, mlp_bias, ..Variant::default() })
}
