//! A model's shape in GGUF's words, as llama.cpp's own converter writes them; what llama.cpp would compute otherwise is refused by name.

use anyhow::{Result, bail};
use fourfold_formats::gguf::Arch;
use fourfold_formats::gguf::write::{GgufModel, MetaValue};
use fourfold_models::layers::{GqaSpec, MlaSpec, MoeSpec, RotaryScaling, RotarySpec, Selection};
use fourfold_models::{AttentionKind, FeedForward, ModelSpec};

/// A described model, and what llama.cpp does a little differently.
pub struct Described {
    pub model: GgufModel,
    pub remarks: Vec<String>,
}

struct Writer {
    arch: Arch,
    model: GgufModel,
    remarks: Vec<String>,
}

/// GGUF's architecture of a model.
///
/// # Errors
/// It has none.
pub fn architecture(spec: &ModelSpec) -> Result<Arch> {
    Ok(match spec.architecture.as_str() {
        "llama" => Arch::Llama,
        "qwen2" => Arch::Qwen2,
        "qwen3" => Arch::Qwen3,
        "deepseek_v2" | "deepseek_v3" => Arch::DeepSeek2,
        other => bail!(
            "model_type {other:?} cannot be written as GGUF; llama, qwen2, qwen3, deepseek_v2 and deepseek_v3 can"
        ),
    })
}

/// Describes a model.
///
/// # Errors
/// An architecture that GGUF does not have, or something that llama.cpp does not compute.
pub fn describe(spec: &ModelSpec, name: &str, file_type: u32) -> Result<Described> {
    let arch = architecture(spec)?;
    if spec.classes.is_some() {
        bail!("a sequence classifier cannot be written as GGUF");
    }
    let mut writer = Writer { arch, model: GgufModel { arch, ..GgufModel::default() }, remarks: Vec::new() };
    let text = |v: &str| MetaValue::String(v.to_owned());
    writer.put_whole("general.architecture", text(arch.name()));
    writer.put_whole("general.type", text("model"));
    writer.put_whole("general.name", text(name));
    writer.put_whole("general.file_type", MetaValue::U32(file_type));
    writer.count("block_count", spec.blocks.len());
    writer.count("context_length", spec.max_positions);
    writer.count("embedding_length", spec.hidden_size);
    writer.count("vocab_size", spec.vocab_size);
    writer.float("attention.layer_norm_rms_epsilon", spec.norm_eps);
    let Some(first) = spec.blocks.first() else { bail!("a model without blocks cannot be written as GGUF") };
    let windows = spec.blocks.iter().any(|block| match &block.attention {
        AttentionKind::Gqa(gqa) => gqa.window.is_some_and(|window| window < spec.max_positions),
        AttentionKind::Mla(_) => false,
    });
    if windows {
        bail!("a sliding window: llama.cpp's {} has none", arch.name());
    }
    if spec.blocks.iter().any(|b| b.attention != first.attention || b.norm_eps != spec.norm_eps) {
        bail!("blocks whose attention differs cannot be written as GGUF");
    }
    match &first.attention {
        AttentionKind::Gqa(gqa) => writer.gqa(gqa, spec)?,
        AttentionKind::Mla(mla) => writer.mla(mla, spec)?,
    }
    Ok(Described { model: writer.model, remarks: writer.remarks })
}

impl Writer {
    fn put_whole(&mut self, key: &str, value: MetaValue) {
        self.model.metadata.push((key.to_owned(), value));
    }

    fn put(&mut self, part: &str, value: MetaValue) {
        let key = format!("{}.{part}", self.arch.name());
        self.put_whole(&key, value);
    }

    fn count(&mut self, part: &str, value: usize) {
        self.put(part, MetaValue::U32(value as u32));
    }

    fn float(&mut self, part: &str, value: f32) {
        self.put(part, MetaValue::F32(value));
    }

    fn gqa(&mut self, gqa: &GqaSpec, spec: &ModelSpec) -> Result<()> {
        let name = self.arch.name();
        if gqa.output_bias && self.arch != Arch::Llama {
            bail!("a bias on the attention's output: llama.cpp's {name} has none");
        }
        let mut width = 0;
        for block in &spec.blocks {
            let FeedForward::Mlp(mlp) = &block.feed_forward else { bail!("a mixture of experts in {name}") };
            if mlp.bias && self.arch != Arch::Llama {
                bail!("biases in the feed-forward: llama.cpp's {name} has none");
            }
            if width != 0 && width != mlp.intermediate {
                bail!("feed-forwards of several widths cannot be written as GGUF");
            }
            width = mlp.intermediate;
        }
        self.count("feed_forward_length", width);
        self.count("attention.head_count", gqa.heads);
        self.count("attention.head_count_kv", gqa.kv_heads);
        self.count("attention.key_length", gqa.head_dim);
        self.count("attention.value_length", gqa.head_dim);
        self.count("rope.dimension_count", gqa.rotary.dim);
        (self.model.heads, self.model.kv_heads) = (gqa.heads, gqa.kv_heads);
        self.rotation(&gqa.rotary, None)
    }

    fn mla(&mut self, mla: &MlaSpec, spec: &ModelSpec) -> Result<()> {
        if mla.bias {
            bail!("attention_bias: llama.cpp's deepseek2 has no biases");
        }
        if !mla.interleaved {
            bail!("rope_interleave = false: llama.cpp's deepseek2 rotates neighbours");
        }
        let layers = spec.blocks.len();
        let lite = layers == 26 || layers == 27 || (layers == 48 && spec.vocab_size == 128_256);
        if lite && mla.q_lora_rank.is_some() {
            bail!("q_lora_rank in a model of {layers} layers: llama.cpp takes such a model for one without");
        }
        if mla.eps != spec.norm_eps {
            self.remarks.push(format!(
                "the latents' norms have epsilon {:e} and the others {:e}; llama.cpp uses the latter for all",
                mla.eps, spec.norm_eps
            ));
        }
        let mut dense = 0;
        let (mut width, mut moe): (usize, Option<&MoeSpec>) = (0, None);
        for (i, block) in spec.blocks.iter().enumerate() {
            match &block.feed_forward {
                FeedForward::Mlp(mlp) if mlp.bias => bail!("mlp_bias: llama.cpp's deepseek2 has no biases"),
                FeedForward::Mlp(mlp) if moe.is_none() => {
                    dense = i + 1;
                    width = mlp.intermediate;
                }
                FeedForward::Mlp(_) => {
                    bail!("moe_layer_freq: llama.cpp's deepseek2 has dense layers at the front alone")
                }
                FeedForward::Moe(other) if moe.is_none_or(|moe| moe == other) => moe = Some(other),
                FeedForward::Moe(_) => {
                    bail!("mixtures of experts that differ between layers cannot be written as GGUF")
                }
            }
        }
        self.count("feed_forward_length", if width > 0 { width } else { moe.map_or(0, |m| m.expert.intermediate) });
        self.count("leading_dense_block_count", dense);
        self.count("attention.head_count", mla.heads);
        // One latent serves all heads: the form in which llama.cpp computes.
        self.count("attention.head_count_kv", 1);
        // llama.cpp reads this key in all models but those it knows to have no such rank.
        if !lite {
            self.count("attention.q_lora_rank", mla.q_lora_rank.unwrap_or(0));
        }
        self.count("attention.kv_lora_rank", mla.kv_lora_rank);
        self.count("attention.key_length", mla.kv_lora_rank + mla.rope_dim);
        self.count("attention.value_length", mla.kv_lora_rank);
        self.count("attention.key_length_mla", mla.key_dim());
        self.count("attention.value_length_mla", mla.value_dim);
        self.count("rope.dimension_count", mla.rope_dim);
        (self.model.heads, self.model.kv_heads) = (mla.heads, mla.heads);
        (self.model.nope_dim, self.model.value_dim) = (mla.nope_dim, mla.value_dim);
        // Also where no layer has experts: it tells V3 from V2.
        let sigmoid = spec.architecture == "deepseek_v3";
        self.put("expert_gating_func", MetaValue::U32(if sigmoid { 2 } else { 1 }));
        match moe {
            Some(moe) => self.experts(moe)?,
            None => {
                self.count("expert_feed_forward_length", width);
                self.count("expert_shared_count", 0);
            }
        }
        let score = f64::from(mla.scale) * (mla.key_dim() as f64).sqrt();
        self.rotation(&mla.rotary, Some(score))
    }

    fn experts(&mut self, moe: &MoeSpec) -> Result<()> {
        let router = &moe.router;
        let Some(shared) = &moe.shared else {
            bail!("n_shared_experts = 0: llama.cpp's deepseek2 needs a shared expert")
        };
        self.model.experts = router.experts;
        self.count("expert_count", router.experts);
        self.count("expert_used_count", router.per_token);
        self.count("expert_feed_forward_length", moe.expert.intermediate);
        self.count("expert_shared_count", shared.intermediate / moe.expert.intermediate);
        self.float("expert_weights_scale", router.scale);
        self.put("expert_weights_norm", MetaValue::Bool(router.normalize));
        match router.selection {
            Selection::Greedy => {}
            Selection::GroupMax { groups, kept } => {
                self.count("expert_group_count", groups);
                self.count("expert_group_used_count", kept);
                if groups > 1 && kept < groups {
                    self.remarks.push(
                        "groups of experts are ranked by their best expert; llama.cpp ranks them by the sum of their best two".to_owned(),
                    );
                }
            }
            Selection::BiasedGroupTopTwo { groups, kept } => {
                if groups > 1 && kept < groups && router.experts / groups < 2 {
                    bail!("groups of one expert: llama.cpp ranks groups by their best two");
                }
                self.count("expert_group_count", groups);
                self.count("expert_group_used_count", kept);
            }
        }
        Ok(())
    }

    /// `score` is a factor of the attention's scores beside `1/√d`, where the architecture has one.
    fn rotation(&mut self, rotary: &RotarySpec, score: Option<f64>) -> Result<()> {
        let text = |v: &str| MetaValue::String(v.to_owned());
        self.float("rope.freq_base", rotary.theta as f32);
        let plain_scores = score.is_none_or(|score| (score - 1.0).abs() < 1e-6);
        if !plain_scores && !matches!(rotary.scaling, RotaryScaling::Yarn { .. }) {
            bail!("mscale_all_dim without YaRN: llama.cpp has no factor for the scores then");
        }
        match &rotary.scaling {
            RotaryScaling::Default => {}
            RotaryScaling::Linear { factor } => {
                self.put("rope.scaling.type", text("linear"));
                self.float("rope.scaling.factor", *factor as f32);
            }
            RotaryScaling::Yarn { factor, beta_fast, beta_slow, original_positions, attention_factor, truncate } => {
                if !truncate {
                    bail!("YaRN with truncate = false: llama.cpp rounds the ends of the blend");
                }
                self.put("rope.scaling.type", text("yarn"));
                self.float("rope.scaling.factor", *factor as f32);
                self.count("rope.scaling.original_context_length", *original_positions as usize);
                self.float("rope.scaling.yarn_beta_fast", *beta_fast as f32);
                self.float("rope.scaling.yarn_beta_slow", *beta_slow as f32);
                match score {
                    Some(score) => self.yarn_of_deepseek(*factor, *attention_factor, score)?,
                    None => {
                        let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                        if (attention_factor / usual - 1.0).abs() > 1e-6 {
                            self.float("rope.scaling.attn_factor", (attention_factor / usual) as f32);
                        }
                    }
                }
            }
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let divisors = RotarySpec { scaling: RotaryScaling::Default, ..rotary.clone() };
                let _ = (factor, low_freq_factor, high_freq_factor, original_positions);
                let table = divisors.frequencies().iter().zip(rotary.frequencies()).map(|(a, b)| a / b).collect();
                self.factors(table)?;
            }
            RotaryScaling::Factors { factors, attention_factor } => {
                if (attention_factor - 1.0).abs() > 1e-6 {
                    bail!(
                        "rotary factors with an attention factor of {attention_factor}: GGUF files made here have none"
                    );
                }
                self.factors(factors.iter().map(|&f| f as f32).collect())?;
            }
        }
        Ok(())
    }

    /// llama.cpp scales queries and keys of `deepseek2` by `mscale_all_dim` alone.
    fn yarn_of_deepseek(&mut self, factor: f64, attention_factor: f64, score: f64) -> Result<()> {
        if (attention_factor - 1.0).abs() > 1e-6 || factor <= 1.0 || score <= 1.0 {
            bail!(
                "YaRN whose mscale is not its mscale_all_dim (or is 0): llama.cpp's deepseek2 computes with equal ones alone"
            );
        }
        let all = (score.sqrt() - 1.0) / (0.1 * factor.ln());
        // As a person wrote it, to six digits: it went through an f32.
        let all = (all * 1e5).round() / 1e5;
        self.float("rope.scaling.yarn_log_multiplier", (0.1 * all) as f32);
        Ok(())
    }

    fn factors(&mut self, table: Vec<f32>) -> Result<()> {
        if self.arch != Arch::Llama {
            bail!("rotary factors by frequency: llama.cpp's {} has none", self.arch.name());
        }
        self.model.extra.push(("rope_freqs.weight".to_owned(), table));
        Ok(())
    }
}
