//! What each GGUF tensor is to Hugging Face, for every architecture that is read: one table a part of the model.

use super::GgufError;

/// An architecture, by GGUF's name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `llama`: also SmolLM and the Llama distillations of DeepSeek-R1.
    Llama,
    /// `qwen2`: also the Qwen distillations of DeepSeek-R1.
    Qwen2,
    /// `qwen3`.
    Qwen3,
    /// `deepseek2`: DeepSeek-V2 and V3, R1 among them.
    DeepSeek2,
}

/// Where a GGUF tensor's elements belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A tensor of that name, as it is.
    Tensor(String),
    /// A tensor of that name whose rows are reordered within each query head.
    QueryRows(String),
    /// A tensor of that name whose rows are reordered within each key head.
    KeyRows(String),
    /// Matrices of all experts of a layer: expert e is `{prefix}{e}{suffix}`.
    Experts {
        /// Name up to the expert's number.
        prefix: String,
        /// Name after it.
        suffix: &'static str,
    },
    /// The key half of MLA's `kv_b_proj`, transposed within each head; the name is that of the whole.
    KeyUp(String),
    /// The value half.
    ValueUp(String),
    /// Factors of the rotary frequencies: they are a part of `config.json`.
    RopeFactors,
    /// Nothing a model needs: layers that predict further tokens, precomputed tables.
    Nothing,
}

/// Tensors outside the layers.
const OUTSIDE: &[(&str, &str)] = &[
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Parts of a layer that every architecture has.
const COMMON: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Grouped-query attention.
const ATTENTION: &[(&str, &str)] =
    &[("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj")];

/// Qwen 3 normalizes queries and keys.
const HEAD_NORMS: &[(&str, &str)] = &[("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];

/// Multi-head latent attention, and a mixture of experts.
const DEEPSEEK: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
];

/// Stacked experts.
const EXPERTS: &[(&str, &str)] = &[
    ("ffn_gate_exps", ".gate_proj.weight"),
    ("ffn_up_exps", ".up_proj.weight"),
    ("ffn_down_exps", ".down_proj.weight"),
];

impl Arch {
    /// The architecture of `general.architecture`.
    ///
    /// # Errors
    /// One that is not read.
    pub fn from_name(name: &str) -> Result<Self, GgufError> {
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::DeepSeek2]
            .into_iter()
            .find(|arch| arch.name() == name)
            .ok_or_else(|| GgufError::Architecture(name.to_owned()))
    }

    /// GGUF's name, which begins the keys of its metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::DeepSeek2 => "deepseek2",
        }
    }

    /// Where tensor `name` belongs in a model of `layers` layers. Layers from `layers` on predict further tokens (MTP).
    ///
    /// # Errors
    /// [`GgufError::UnknownTensor`].
    pub fn place(self, name: &str, layers: u64) -> Result<Place, GgufError> {
        if let Some((_, hf)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == name) {
            return Ok(Place::Tensor((*hf).to_owned()));
        }
        if name == "rope_freqs.weight" {
            return Ok(Place::RopeFactors);
        }
        let unknown = || GgufError::UnknownTensor { tensor: name.to_owned(), architecture: self.name() };
        let (layer, part) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let layer: u64 = layer.parse().map_err(|_| unknown())?;
        if layer >= layers || part == "attn_rot_embd.weight" {
            return Ok(Place::Nothing);
        }
        self.in_layer(layer, part).ok_or_else(unknown)
    }

    /// Where `part` of a layer belongs.
    fn in_layer(self, layer: u64, part: &str) -> Option<Place> {
        let (stem, kind) = part.rsplit_once('.')?;
        let prefix = format!("model.layers.{layer}.");
        if self == Self::DeepSeek2 {
            match part {
                "exp_probs_b.bias" => return Some(Place::Tensor(format!("{prefix}mlp.gate.e_score_correction_bias"))),
                "attn_k_b.weight" => return Some(Place::KeyUp(format!("{prefix}self_attn.kv_b_proj.weight"))),
                "attn_v_b.weight" => return Some(Place::ValueUp(format!("{prefix}self_attn.kv_b_proj.weight"))),
                _ => {}
            }
            if let Some((_, suffix)) = EXPERTS.iter().find(|(gguf, _)| *gguf == stem && kind == "weight") {
                return Some(Place::Experts { prefix: format!("{prefix}mlp.experts."), suffix });
            }
        }
        let own: &[&[(&str, &str)]] = match self {
            Self::Llama | Self::Qwen2 => &[COMMON, ATTENTION],
            Self::Qwen3 => &[COMMON, ATTENTION, HEAD_NORMS],
            Self::DeepSeek2 => &[COMMON, DEEPSEEK],
        };
        let (_, hf) = own.iter().copied().flatten().find(|(gguf, _)| *gguf == stem)?;
        if !matches!(kind, "weight" | "bias") {
            return None;
        }
        let full = format!("{prefix}{hf}.{kind}");
        // Llama's converter interleaves the two halves of each head, so that rotated pairs are neighbours.
        Some(match (self, stem) {
            (Self::Llama, "attn_q") => Place::QueryRows(full),
            (Self::Llama, "attn_k") => Place::KeyRows(full),
            _ => Place::Tensor(full),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_hugging_faces() {
        let place = |arch: Arch, name: &str| arch.place(name, 2).unwrap();
        let tensor = |name: &str| Place::Tensor(name.to_owned());
        for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::DeepSeek2] {
            assert_eq!(Arch::from_name(arch.name()).unwrap(), arch);
            assert_eq!(place(arch, "output.weight"), tensor("lm_head.weight"));
            assert_eq!(place(arch, "blk.1.ffn_norm.weight"), tensor("model.layers.1.post_attention_layernorm.weight"));
            assert_eq!(place(arch, "blk.2.ffn_norm.weight"), Place::Nothing);
            assert_eq!(place(arch, "rope_freqs.weight"), Place::RopeFactors);
        }
        let q = "model.layers.0.self_attn.q_proj.weight".to_owned();
        assert_eq!(place(Arch::Llama, "blk.0.attn_q.weight"), Place::QueryRows(q.clone()));
        assert_eq!(place(Arch::Qwen2, "blk.0.attn_q.weight"), Place::Tensor(q.clone()));
        assert_eq!(place(Arch::DeepSeek2, "blk.0.attn_q.weight"), Place::Tensor(q));
        assert_eq!(place(Arch::Qwen2, "blk.0.attn_k.bias"), tensor("model.layers.0.self_attn.k_proj.bias"));
        assert_eq!(place(Arch::Qwen3, "blk.0.attn_k_norm.weight"), tensor("model.layers.0.self_attn.k_norm.weight"));
        let d = |name: &str| place(Arch::DeepSeek2, name);
        assert_eq!(d("blk.1.exp_probs_b.bias"), tensor("model.layers.1.mlp.gate.e_score_correction_bias"));
        assert_eq!(d("blk.1.ffn_gate_inp.weight"), tensor("model.layers.1.mlp.gate.weight"));
        assert_eq!(
            d("blk.1.ffn_down_exps.weight"),
            Place::Experts { prefix: "model.layers.1.mlp.experts.".into(), suffix: ".down_proj.weight" }
        );
        assert_eq!(d("blk.1.attn_k_b.weight"), Place::KeyUp("model.layers.1.self_attn.kv_b_proj.weight".into()));
    }

    #[test]
    fn what_has_no_place_is_refused() {
        assert!(matches!(Arch::from_name("mamba"), Err(GgufError::Architecture(_))));
        for name in
            ["blk.0.ssm_a.weight", "blk.x.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q.scale", "v.w"]
        {
            assert!(matches!(Arch::Llama.place(name, 2), Err(GgufError::UnknownTensor { .. })), "{name}");
        }
        assert!(Arch::Llama.place("blk.0.ffn_gate_exps.weight", 2).is_err());
    }
}
