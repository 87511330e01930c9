//! Qwen3 (Yang et al. 2025): llama with a norm over each query and key head.

use super::dense::{Variant, read as read_dense};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config) -> Result<ModelSpec, ModelError> {
    let bias = config.flag("attention_bias", false)?;
    read_dense(
        config,
        Variant {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: true,
            windows: true,
            head_dim: Some(128),
            ..Variant::default()
        },
    )
}
