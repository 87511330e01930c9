//! What each GGUF tensor is to Hugging Face, for every architecture that is read: one table a part of the model.

use super::GgufError;

/// An architecture, by GGUF's name for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arch {
    #[default]
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

/// Where a Hugging Face tensor goes in a GGUF file: the inverse of [`Place`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The tensor of that name, as it is.
    Tensor(String),
    /// Rows reordered within each query head.
    QueryRows(String),
    /// Rows reordered within each key head.
    KeyRows(String),
    /// One of the matrices that are stacked under a name.
    Expert(String, u64),
    /// MLA's `kv_b_proj`: its key half, transposed within each head, and its value half.
    KeyValueUp {
        /// `attn_k_b`.
        keys: String,
        /// `attn_v_b`.
        values: String,
    },
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

    /// Where a tensor of Hugging Face's name goes; `None` where the architecture has none of that name.
    pub fn target(self, name: &str) -> Option<Target> {
        if let Some((gguf, _)) = OUTSIDE.iter().find(|(_, hf)| *hf == name) {
            return Some(Target::Tensor((*gguf).to_owned()));
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: u64 = layer.parse().ok()?;
        let own = |part: &str| format!("blk.{layer}.{part}");
        if self == Self::DeepSeek2 {
            if part == "mlp.gate.e_score_correction_bias" {
                return Some(Target::Tensor(own("exp_probs_b.bias")));
            }
            if part == "self_attn.kv_b_proj.weight" {
                return Some(Target::KeyValueUp { keys: own("attn_k_b.weight"), values: own("attn_v_b.weight") });
            }
            if let Some(expert) = part.strip_prefix("mlp.experts.") {
                let at = expert.find('.')?;
                let (gguf, _) = EXPERTS.iter().find(|(_, suffix)| *suffix == &expert[at..])?;
                return Some(Target::Expert(own(&format!("{gguf}.weight")), expert[..at].parse().ok()?));
            }
        }
        let (stem, kind) = part.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
        let (gguf, _) = self.parts().iter().copied().flatten().find(|(_, hf)| *hf == stem)?;
        let full = own(&format!("{gguf}.{kind}"));
        Some(match (self, *gguf) {
            (Self::Llama, "attn_q") => Target::QueryRows(full),
            (Self::Llama, "attn_k") => Target::KeyRows(full),
            _ => Target::Tensor(full),
        })
    }

    /// The tables of a layer's parts.
    fn parts(self) -> &'static [&'static [(&'static str, &'static str)]] {
        match self {
            Self::Llama | Self::Qwen2 => &[COMMON, ATTENTION],
            Self::Qwen3 => &[COMMON, ATTENTION, HEAD_NORMS],
            Self::DeepSeek2 => &[COMMON, DEEPSEEK],
        }
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
        let (_, hf) = self.parts().iter().copied().flatten().find(|(gguf, _)| *gguf == stem)?;
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
    fn targets_are_the_inverse_of_places() {
        for (arch, name) in [
            (Arch::Llama, "model.embed_tokens.weight"),
            (Arch::Llama, "model.layers.1.self_attn.q_proj.weight"),
            (Arch::Llama, "model.layers.1.self_attn.k_proj.bias"),
            (Arch::Qwen2, "model.layers.0.self_attn.q_proj.bias"),
            (Arch::Qwen3, "model.layers.0.self_attn.k_norm.weight"),
            (Arch::DeepSeek2, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"),
            (Arch::DeepSeek2, "model.layers.1.mlp.gate.weight"),
            (Arch::DeepSeek2, "model.layers.1.mlp.gate.e_score_correction_bias"),
            (Arch::DeepSeek2, "model.layers.1.mlp.shared_experts.down_proj.weight"),
            (Arch::DeepSeek2, "lm_head.weight"),
        ] {
            let gguf = match arch.target(name) {
                Some(Target::Tensor(gguf) | Target::QueryRows(gguf) | Target::KeyRows(gguf)) => gguf,
                other => panic!("{name}: {other:?}"),
            };
            let back = match arch.place(&gguf, 2).unwrap() {
                Place::Tensor(hf) | Place::QueryRows(hf) | Place::KeyRows(hf) => hf,
                other => panic!("{gguf}: {other:?}"),
            };
            assert_eq!(back, name);
        }
        let expert = Arch::DeepSeek2.target("model.layers.1.mlp.experts.12.down_proj.weight");
        assert_eq!(expert, Some(Target::Expert("blk.1.ffn_down_exps.weight".into(), 12)));
        assert_eq!(Arch::Llama.target("model.layers.1.mlp.experts.0.up_proj.weight"), None);
        assert_eq!(Arch::Llama.target("model.layers.1.self_attn.rotary_emb.inv_freq"), None);
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
