//! Qwen2 and Qwen2.5 (Yang et al. 2024): llama with biases on query, key and value; also DeepSeek-R1-Distill-Qwen.

use super::dense::{Variant, read as read_dense};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config) -> Result<ModelSpec, ModelError> {
    read_dense(config, Variant { qkv_bias: true, windows: true, ..Variant::default() })
}
