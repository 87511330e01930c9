//! What llama, qwen2 and qwen3 share: grouped-query attention and a gated feed-forward in every block.

use super::{Common, common, model};
use crate::config::{COUNTS, Config, LENGTHS, WIDTHS};
use crate::layers::{GqaSpec, MlpSpec};
use crate::rope::Rope;
use crate::{AttentionKind, BlockSpec, FeedForward, ModelError, ModelSpec, Role};

/// In which the dense architectures differ.
#[derive(Clone, Copy, Default)]
pub(super) struct Variant {
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    /// Whether the configuration may ask for a sliding window.
    pub windows: bool,
    /// Elements of a head where the configuration does not say; else the hidden size divided among the heads.
    pub head_dim: Option<usize>,
}

pub(super) fn read(config: &Config, variant: Variant) -> Result<ModelSpec, ModelError> {
    let common = common(config)?;
    let kv_heads = config.size_or("num_key_value_heads", common.heads, COUNTS)?;
    if !common.heads.is_multiple_of(kv_heads) {
        return Err(config
            .bad("num_key_value_heads", format!("a divisor of num_attention_heads ({}) is expected", common.heads)));
    }
    let head_dim = head_dim(config, &common, variant.head_dim)?;
    let rotary = Rope::read(config)?.spec(head_dim)?;
    let blocks = (0..common.layers)
        .map(|index| {
            Ok(BlockSpec {
                index,
                hidden: common.hidden,
                norm_eps: common.norm_eps,
                attention: AttentionKind::Gqa(GqaSpec {
                    hidden: common.hidden,
                    heads: common.heads,
                    kv_heads,
                    head_dim,
                    qkv_bias: variant.qkv_bias,
                    output_bias: variant.output_bias,
                    qk_norm: variant.qk_norm.then_some(common.norm_eps),
                    rotary: rotary.clone(),
                    window: if variant.windows { window(config, &common, index)? } else { None },
                }),
                feed_forward: FeedForward::Mlp(MlpSpec {
                    hidden: common.hidden,
                    intermediate: common.intermediate,
                    bias: variant.mlp_bias,
                    role: Role::Mlp,
                }),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    model(config, &common, false, blocks)
}

fn head_dim(config: &Config, common: &Common, default: Option<usize>) -> Result<usize, ModelError> {
    let key = if config.get("head_dim").is_some() { "head_dim" } else { "num_attention_heads" };
    let head_dim = match config.optional_size("head_dim", WIDTHS)?.or(default) {
        Some(head_dim) => head_dim,
        None if common.hidden.is_multiple_of(common.heads) => common.hidden / common.heads,
        None => {
            let reason = format!("a divisor of hidden_size ({}) is expected where head_dim is absent", common.hidden);
            return Err(config.bad("num_attention_heads", reason));
        }
    };
    if head_dim * common.heads > *WIDTHS.end() {
        return Err(config.bad(key, format!("{} heads of {head_dim} elements are more than supported", common.heads)));
    }
    if !head_dim.is_multiple_of(2) {
        return Err(
            config.bad(key, format!("heads of {head_dim} elements cannot be rotated: an even number is expected"))
        );
    }
    Ok(head_dim)
}

/// The window where the configuration asks for windows and does not say how wide they are.
const DEFAULT_WINDOW: usize = 4096;

/// The window of block `index`: as `layer_types` lists, else from `max_window_layers` on.
fn window(config: &Config, common: &Common, index: usize) -> Result<Option<usize>, ModelError> {
    let window = match config.flag("use_sliding_window", false)? {
        true if !config.has("sliding_window") => Some(DEFAULT_WINDOW),
        true => config.optional_size("sliding_window", LENGTHS)?,
        false => None,
    };
    if let Some(types) = config.get("layer_types") {
        let types = types.as_array().filter(|types| types.len() == common.layers);
        let types = types.ok_or_else(|| config.bad("layer_types", "an entry for each layer is expected"))?;
        return match types[index].as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => match window {
                Some(window) => Ok(Some(window)),
                None => Err(config.bad("layer_types", "sliding_attention needs use_sliding_window and sliding_window")),
            },
            _ => Err(config.bad("layer_types", "only full_attention and sliding_attention are supported")),
        };
    }
    let first = config.size_or("max_window_layers", 28, 0..=*LENGTHS.end())?;
    Ok(window.filter(|_| index >= first))
}
