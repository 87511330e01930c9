//! Configurations and checkpoints that cannot be used: each is refused by name, before anything is allocated.

mod support;

use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_models::{Model, ModelError, spec_from_config, testing::RandomWeights};
use serde_json::{Value, json};
use support::cases;

/// The golden configuration `case` with `change` made to it.
fn config(case: &str, change: &[(&str, Value)]) -> Value {
    let mut config = cases().into_iter().find(|c| c.name == case).unwrap().config("config.json");
    for (path, value) in change {
        let mut place = &mut config;
        for key in path.split('.') {
            place = &mut place[key];
        }
        *place = value.clone();
    }
    config
}

#[test]
fn bad_values_are_named() {
    let table = [
        ("llama_gqa_tied", "hidden_size", json!(0)),
        ("llama_gqa_tied", "hidden_size", json!(-48)),
        ("llama_gqa_tied", "hidden_size", json!(1u64 << 40)),
        ("llama_gqa_tied", "hidden_size", json!("48")),
        ("llama_gqa_tied", "hidden_size", json!(48.5)),
        ("llama_gqa_tied", "num_hidden_layers", json!(u64::MAX)),
        ("llama_gqa_tied", "num_attention_heads", json!(0)),
        ("llama_gqa_tied", "num_attention_heads", json!(7)),
        ("llama_gqa_tied", "num_key_value_heads", json!(4)),
        ("llama_gqa_tied", "head_dim", json!(7)),
        ("llama_gqa_tied", "head_dim", json!(1 << 20)),
        ("llama_gqa_tied", "partial_rotary_factor", json!(0.1)),
        ("llama_gqa_tied", "partial_rotary_factor", json!(2.0)),
        ("llama_gqa_tied", "vocab_size", json!(0)),
        ("llama_gqa_tied", "rms_norm_eps", json!("tiny")),
        ("llama_gqa_tied", "rope_theta", json!(0.0)),
        ("llama_gqa_tied", "hidden_act", json!("gelu")),
        ("llama_gqa_tied", "tie_word_embeddings", json!("yes")),
        ("llama_gqa_tied", "attention_bias", json!(1)),
        ("llama_gqa_tied", "architectures", json!(["LlamaForTokenClassification"])),
        ("llama_rope_llama3", "rope_scaling", json!("llama3")),
        ("llama_rope_llama3", "rope_scaling.rope_type", json!("dynamic")),
        ("llama_rope_llama3", "rope_scaling.rope_type", json!("longrope")),
        ("llama_rope_llama3", "rope_scaling.factor", json!(0)),
        ("llama_rope_llama3", "rope_scaling.high_freq_factor", json!(0.5)),
        ("qwen2", "layer_types", json!(["full_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "linear_attention"])),
        ("deepseek_v3_moe", "n_group", json!(3)),
        ("deepseek_v3_moe", "topk_group", json!(5)),
        ("deepseek_v3_moe", "num_experts_per_tok", json!(9)),
        ("deepseek_v3_moe", "num_experts_per_tok", json!(5)),
        ("deepseek_v3_moe", "n_routed_experts", json!(1 << 13)),
        ("deepseek_v3_moe", "n_shared_experts", json!(1 << 30)),
        ("deepseek_v3_moe", "scoring_func", json!("softmax")),
        ("deepseek_v3_moe", "topk_method", json!("greedy")),
        ("deepseek_v3_moe", "moe_layer_freq", json!(0)),
        ("deepseek_v3_moe", "kv_lora_rank", json!(0)),
        ("deepseek_v3_moe", "qk_rope_head_dim", json!(7)),
        ("deepseek_v3_moe", "routed_scaling_factor", json!(-1)),
        ("deepseek_v2_moe", "topk_method", json!("noaux_tc")),
    ];
    for (case, path, value) in table {
        let key = path.rsplit('.').next().unwrap();
        match spec_from_config(&config(case, &[(path, value.clone())])) {
            Err(error @ ModelError::Value { .. }) => {
                let text = error.to_string();
                assert!(text.contains(key), "{path} = {value}: {text}");
            }
            other => panic!("{path} = {value}: {other:?}"),
        }
    }
}

#[test]
fn absent_keys_are_named() {
    for (case, key) in [
        ("llama_gqa_tied", "vocab_size"),
        ("llama_gqa_tied", "hidden_size"),
        ("deepseek_v3_moe", "kv_lora_rank"),
        ("deepseek_v3_moe", "moe_intermediate_size"),
        ("deepseek_v3_moe", "first_k_dense_replace"),
        ("deepseek_v3_moe", "n_group"),
        ("deepseek_v3_moe", "topk_group"),
        ("deepseek_v3_moe", "routed_scaling_factor"),
        ("deepseek_v2_moe", "topk_group"),
        ("llama_rope_llama3", "rope_scaling.factor"),
    ] {
        match spec_from_config(&config(case, &[(key, Value::Null)])) {
            Err(ModelError::MissingKey { key: found }) => assert_eq!(found, key),
            other => panic!("{key}: {other:?}"),
        }
    }
}

#[test]
fn unknown_architectures_are_named() {
    let found = spec_from_config(&config("qwen2", &[("model_type", json!("mamba"))]));
    let text = found.unwrap_err().to_string();
    assert!(text.contains("\"mamba\"") && text.contains("deepseek_v3"), "{text}");
    assert!(spec_from_config(&json!([1, 2])).is_err());
    assert!(spec_from_config(&json!({})).is_err());
}

/// The largest numbers each key allows, all at once: refused, not allocated.
#[test]
fn huge_models_are_refused_before_anything_is_made() {
    let huge = config(
        "deepseek_v3_moe",
        &[
            ("hidden_size", json!(1 << 20)),
            ("moe_intermediate_size", json!(1 << 20)),
            ("num_hidden_layers", json!(1 << 12)),
            ("n_routed_experts", json!(1 << 12)),
        ],
    );
    let error = spec_from_config(&huge).unwrap_err();
    assert!(matches!(error, ModelError::Inconsistent(_)), "{error}");
    let huge = config("llama_gqa_tied", &[("vocab_size", json!(1 << 28)), ("hidden_size", json!(3 << 18))]);
    let spec = spec_from_config(&huge);
    assert!(spec.is_ok(), "large and possible: listing takes no memory worth mention");
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let spec = spec_from_config(&config("deepseek_v3_moe", &[])).unwrap();
    let load = |source: &RandomWeights| Model::load(&spec, source, Arc::new(Reference), &mut |_| ());
    assert!(load(&RandomWeights::new(&spec, 0)).is_ok());
    for name in [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.norm.weight",
        "lm_head.weight",
    ] {
        let error = load(&RandomWeights::new(&spec, 0).without(name)).err().unwrap();
        assert!(matches!(error, ModelError::Source(_)), "{error}");
        assert!(error.to_string().contains(name), "{error}");
        let error = load(&RandomWeights::new(&spec, 0).with(name, &[3, 5])).err().unwrap();
        let ModelError::Shape { tensor, expected, found } = &error else { panic!("{error}") };
        assert_eq!((tensor.as_str(), found.as_slice()), (name, [3, 5].as_slice()));
        assert_ne!(expected, found);
    }
}

#[test]
fn tensors_of_no_use_are_listed_and_harmless() {
    let spec = spec_from_config(&config("deepseek_v3_moe", &[])).unwrap();
    let extra = ["model.layers.3.embed_tokens.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"];
    let source = extra.iter().fold(RandomWeights::new(&spec, 0), |source, name| source.with(name, &[4]));
    assert_eq!(spec.unused(&source), extra);
    assert!(Model::load(&spec, &source, Arc::new(Reference), &mut |_| ()).is_ok());
}
