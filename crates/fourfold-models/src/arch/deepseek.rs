//! DeepSeek-V2 (2024) and DeepSeek-V3 (2024; also R1): multi-head latent attention and mixtures of experts. They differ in
//! how the router scores and selects.

use super::{Common, common, model};
use crate::config::{COUNTS, Config, WIDTHS};
use crate::layers::{MlaSpec, MlpSpec, MoeSpec, RouterScores, RouterSpec, Selection};
use crate::rope::Rope;
use crate::{AttentionKind, BlockSpec, FeedForward, ModelError, ModelSpec, Role};

/// Epsilon of the latents' norms, which is no part of the configuration.
const LATENT_EPS: f32 = 1e-6;

pub(super) fn read_v2(config: &Config) -> Result<ModelSpec, ModelError> {
    config.only("scoring_func", &["softmax"])?;
    let selection = |config: &Config, experts: usize| match config.text("topk_method")?.unwrap_or("greedy") {
        "greedy" => Ok(Selection::Greedy),
        "group_limited_greedy" => {
            let (groups, kept) = groups(config, experts)?;
            Ok(Selection::GroupMax { groups, kept })
        }
        _ => Err(config.bad("topk_method", "only greedy and group_limited_greedy are supported")),
    };
    read(config, RouterScores::Softmax, &selection, true)
}

pub(super) fn read_v3(config: &Config) -> Result<ModelSpec, ModelError> {
    config.only("scoring_func", &["sigmoid"])?;
    config.only("topk_method", &["noaux_tc"])?;
    let selection = |config: &Config, experts: usize| {
        let (groups, kept) = groups(config, experts)?;
        Ok(Selection::BiasedGroupTopTwo { groups, kept })
    };
    read(config, RouterScores::Sigmoid, &selection, config.truth("rope_interleave", true)?)
}

type ReadSelection<'a> = &'a dyn Fn(&Config, usize) -> Result<Selection, ModelError>;

fn read(
    config: &Config,
    scores: RouterScores,
    selection: ReadSelection,
    interleaved: bool,
) -> Result<ModelSpec, ModelError> {
    let common = common(config)?;
    let attention = attention(config, &common, interleaved)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    // Routed experts have no biases.
    let mlp = |intermediate, role| {
        let bias = mlp_bias && role != Role::RoutedExpert;
        MlpSpec { hidden: common.hidden, intermediate, bias, role }
    };
    let moe = match config.optional_size("n_routed_experts", COUNTS)? {
        Some(experts) => Some(mixture(config, &common, experts, scores, selection, &mlp)?),
        None => None,
    };
    // A guess at what a published model left out would be another model, silently.
    let dense_first = if moe.is_some() { config.size("first_k_dense_replace", 0..=*COUNTS.end())? } else { 0 };
    let frequency = config.size_or("moe_layer_freq", 1, COUNTS)?;
    let blocks = (0..common.layers)
        .map(|index| BlockSpec {
            index,
            hidden: common.hidden,
            norm_eps: common.norm_eps,
            attention: AttentionKind::Mla(attention.clone()),
            feed_forward: match &moe {
                Some(moe) if index >= dense_first && index.is_multiple_of(frequency) => FeedForward::Moe(moe.clone()),
                _ => FeedForward::Mlp(mlp(common.intermediate, Role::Mlp)),
            },
        })
        .collect();
    model(config, &common, false, blocks)
}

fn attention(config: &Config, common: &Common, interleaved: bool) -> Result<MlaSpec, ModelError> {
    let rope_dim = config.size("qk_rope_head_dim", WIDTHS)?;
    if !rope_dim.is_multiple_of(2) {
        return Err(config.bad("qk_rope_head_dim", "an even number is expected"));
    }
    let nope_dim = config.size("qk_nope_head_dim", WIDTHS)?;
    let value_dim = config.size("v_head_dim", WIDTHS)?;
    if (nope_dim + rope_dim + value_dim) * common.heads > *WIDTHS.end() {
        return Err(config.bad("num_attention_heads", "too many for their size"));
    }
    let rope = Rope::read(config)?;
    let key_dim = (nope_dim + rope_dim) as f64;
    Ok(MlaSpec {
        hidden: common.hidden,
        heads: common.heads,
        q_lora_rank: config.optional_size("q_lora_rank", WIDTHS)?,
        kv_lora_rank: config.size("kv_lora_rank", WIDTHS)?,
        nope_dim,
        rope_dim,
        value_dim,
        bias: config.flag("attention_bias", false)?,
        eps: LATENT_EPS,
        rotary: rope.spec(rope_dim)?,
        interleaved,
        scale: (rope.score_factor()? / key_dim.sqrt()) as f32,
    })
}

fn mixture(
    config: &Config,
    common: &Common,
    experts: usize,
    scores: RouterScores,
    selection: ReadSelection,
    mlp: &dyn Fn(usize, Role) -> MlpSpec,
) -> Result<MoeSpec, ModelError> {
    let selection = selection(config, experts)?;
    let per_token = config.size("num_experts_per_tok", 1..=experts)?;
    let open = match selection {
        Selection::Greedy => experts,
        Selection::GroupMax { groups, kept } | Selection::BiasedGroupTopTwo { groups, kept } => experts / groups * kept,
    };
    if per_token > open {
        return Err(config.bad("num_experts_per_tok", format!("topk_group leaves {open} experts to choose from")));
    }
    let intermediate = config.size("moe_intermediate_size", WIDTHS)?;
    // A guess here would leave tensors out, or ask for some that are not there.
    let shared = match config.optional_size("n_shared_experts", 0..=*COUNTS.end())? {
        Some(shared) => shared,
        None if config.is_null("n_shared_experts") => 0,
        None => return Err(config.missing("n_shared_experts")),
    };
    let shared_width = intermediate * shared;
    if shared_width > *WIDTHS.end() {
        return Err(config.bad("n_shared_experts", format!("too many for experts of {intermediate}")));
    }
    let normalize = config.truth("norm_topk_prob", scores == RouterScores::Sigmoid)?;
    let (normalize, scale) = match scores {
        RouterScores::Sigmoid => (normalize, config.positive("routed_scaling_factor")?),
        // As DeepSeek-V2's own modelling code: the chosen scores are either normalised or scaled.
        RouterScores::Softmax => {
            let scale = config.positive_or("routed_scaling_factor", 1.0)?;
            if normalize && per_token > 1 { (true, 1.0) } else { (false, scale) }
        }
    };
    Ok(MoeSpec {
        router: RouterSpec {
            hidden: common.hidden,
            experts,
            per_token,
            scores,
            selection,
            normalize,
            scale: scale as f32,
        },
        expert: mlp(intermediate, Role::RoutedExpert),
        shared: (shared > 0).then(|| mlp(shared_width, Role::SharedExpert)),
    })
}

/// `n_group` and `topk_group`; groups of equal size.
fn groups(config: &Config, experts: usize) -> Result<(usize, usize), ModelError> {
    let groups = config.size("n_group", 1..=experts)?;
    if !experts.is_multiple_of(groups) {
        return Err(config.bad("n_group", format!("a divisor of n_routed_experts ({experts}) is expected")));
    }
    Ok((groups, config.size("topk_group", 1..=groups)?))
}
