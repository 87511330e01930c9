//! Predictions from shapes against what is there.

mod support;

use std::sync::Arc;

use fourfold_kernels::{KvDtype, Reference};
use fourfold_models::spec_from_config;
use fourfold_tensor::WeightSource;
use serde_json::json;
use support::cases;

#[test]
fn weights_take_what_the_checkpoint_takes() {
    for case in cases() {
        let model = case.model(Arc::new(Reference));
        let stored: u64 = case.weights.tensors().iter().map(|t| t.bytes).sum();
        assert_eq!(model.weight_bytes() as u64, stored, "{}", case.name);
    }
}

/// DeepSeek-V3 as published: 671 billion parameters, 37 of them active (the report's abstract).
#[test]
fn deepseek_v3_has_its_published_size() {
    let config = json!({
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "tie_word_embeddings": false, "attention_bias": false,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    });
    let spec = spec_from_config(&config).unwrap();
    assert_eq!(spec.parameters() / 1_000_000_000, 671);
    assert_eq!((spec.active_parameters() + 500_000_000) / 1_000_000_000, 37);
    // 61 latents of 512 + 64 elements.
    assert_eq!(spec.kv_bytes_per_token(KvDtype::Bf16), 61 * 576 * 2);
    let at_4096 = spec.run_memory(spec.parameters() / 2, 4096, 512, KvDtype::Bf16);
    assert_eq!(at_4096.kv_cache, 4096 * 61 * 576 * 2);
    assert!(at_4096.activations > 0 && at_4096.activations < 1 << 31, "{at_4096:?}");
}

#[test]
fn longer_contexts_and_chunks_take_more() {
    for case in cases() {
        let spec = case.spec();
        let small = spec.run_memory(1000, 32, 8, KvDtype::F16);
        let long = spec.run_memory(1000, 64, 8, KvDtype::F16);
        let wide = spec.run_memory(1000, 32, 16, KvDtype::F16);
        assert_eq!(long.kv_cache, 2 * small.kv_cache);
        assert_eq!(wide.activations, 2 * small.activations);
        assert_eq!(
            small.total(),
            small.weights + small.kv_cache + small.activations + small.rotary_tables + small.logits
        );
    }
}
