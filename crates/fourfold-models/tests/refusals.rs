//! Configurations and checkpoints that cannot be used: each is refused by name, before anything is allocated.

mod support;

use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_models::{FeedForward, Model, ModelError, config_remarks, spec_from_config, testing::RandomWeights};
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
        ("llama_gqa_tied", "partial_rotary_factor", json!(0.5)),
        ("llama_gqa_tied", "partial_rotary_factor", json!("1")),
        ("llama_gqa_tied", "rope_theta", json!(null)),
        ("llama_gqa_tied", "rope_theta", json!("10000")),
        ("llama_gqa_tied", "rope_parameters", json!({"partial_rotary_factor": 0.5})),
        ("llama_gqa_tied", "rope_parameters", json!({"full_attention": {"rope_theta": 1e4}})),
        ("llama_gqa_tied", "rope_parameters", json!([1])),
        ("llama_gqa_tied", "is_causal", json!(false)),
        // Python takes it for false.
        ("llama_gqa_tied", "is_causal", json!(null)),
        ("llama_gqa_tied", "is_encoder_decoder", json!(true)),
        ("llama_gqa_tied", "sliding_window", json!(16)),
        ("llama_gqa_tied", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("llama_gqa_tied", "text_config", json!({"model_type": "llama"})),
        ("llama_gqa_tied", "vision_config", json!({"hidden_size": 8})),
        ("llama_gqa_tied", "per_layer_config", json!({"0": {"head_dim": 4}})),
        ("llama_gqa_tied", "architectures", json!("LlamaForCausalLM")),
        ("llama_gqa_tied", "vocab_size", json!(0)),
        ("llama_gqa_tied", "rms_norm_eps", json!("tiny")),
        ("llama_gqa_tied", "rope_theta", json!(0.0)),
        ("llama_gqa_tied", "hidden_act", json!("gelu")),
        ("llama_gqa_tied", "tie_word_embeddings", json!("yes")),
        ("llama_gqa_tied", "attention_bias", json!(1)),
        ("llama_gqa_tied", "architectures", json!(["LlamaForTokenClassification"])),
        ("llama_rope_llama3", "rope_scaling", json!("llama3")),
        ("llama_rope_llama3", "rope_scaling.rope_type", json!("dynamic")),
        ("llama_rope_llama3", "rope_scaling.rope_type", json!("proportional")),
        ("llama_rope_llama3", "rope_scaling.rope_type", json!(3)),
        ("llama_rope_llama3", "rope_scaling.partial_rotary_factor", json!(0.5)),
        ("llama_rope_llama3", "rope_scaling.new_factor", json!(2.0)),
        ("llama_rope_llama3", "rope_scaling.extrapolation_factor", json!(0.5)),
        ("llama_rope_llama3", "rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6})),
        ("llama_rope_llama3", "original_max_position_embeddings", json!("16")),
        ("llama_rope_llama3", "rope_scaling.factor", json!(0)),
        ("llama_rope_llama3", "rope_scaling.high_freq_factor", json!(0.5)),
        ("qwen2", "layer_types", json!(["full_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "linear_attention"])),
        ("deepseek_v3_moe", "head_dim", json!(128)),
        ("deepseek_v3_moe", "num_local_experts", json!(4)),
        ("deepseek_v3_moe", "mlp_bias", json!(true)),
        ("deepseek_v3_moe", "index_topk", json!(2048)),
        ("deepseek_v3_moe", "hc_mult", json!(4)),
        ("deepseek_v2_moe", "num_experts", json!(4)),
        ("deepseek_v2_moe", "rope_scaling.mscale_all_dim", json!("1")),
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
        ("deepseek_v3_moe", "n_shared_experts"),
        ("deepseek_v3_moe", "n_group"),
        ("deepseek_v3_moe", "topk_group"),
        ("deepseek_v3_moe", "routed_scaling_factor"),
        ("deepseek_v2_moe", "topk_group"),
        ("llama_rope_llama3", "rope_scaling.factor"),
        ("deepseek_v2_moe", "rope_scaling.factor"),
    ] {
        let mut config = config(case, &[(key, Value::Null)]);
        if key == "n_shared_experts" {
            // Here null says that there are none.
            config.as_object_mut().unwrap().remove(key);
        }
        match spec_from_config(&config) {
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

/// DeepSeek's later models share much with V3, and would give other results if they were read as V3.
#[test]
fn later_models_of_deepseek_are_refused_by_what_they_need() {
    let classes = |name: &str| json!([format!("{name}ForCausalLM")]);
    for (change, word) in [
        (vec![("model_type", json!("deepseek_v32"))], "indexer"),
        (vec![("model_type", json!("deepseek_v4"))], "indexer"),
        (vec![("architectures", classes("DeepseekV32"))], "indexer"),
        (vec![("model_type", json!("deepseek_v4")), ("architectures", classes("DeepseekV4"))], "hash routing"),
        (vec![("model_type", Value::Null), ("architectures", classes("DeepseekV32"))], "index_topk"),
    ] {
        let error = spec_from_config(&config("deepseek_v3_moe", &change)).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    let native = json!({"vocab_size": 64, "dim": 32, "inter_dim": 40, "n_activated_experts": 2});
    assert!(spec_from_config(&native).unwrap_err().to_string().contains("own inference code"));
}

/// What is left out or taken otherwise than by transformers is said.
#[test]
fn remarks_name_keys_and_decisions() {
    let remarks = |case: &str, change: &[(&str, Value)]| config_remarks(&config(case, change)).unwrap();
    for case in cases() {
        assert_eq!(config_remarks(&case.config("config.json")).unwrap(), Vec::<String>::new(), "{}", case.name);
        assert_eq!(config_remarks(&case.config("config.alt.json")).unwrap(), Vec::<String>::new(), "{}", case.name);
    }
    let unknown = [("factor", json!(4)), ("final_logit_softcapping", json!(30.0)), ("logit_scale", Value::Null)];
    let found = remarks("llama_gqa_tied", &unknown);
    assert_eq!(found, ["llama does not know and leaves out 2 keys: factor, final_logit_softcapping"]);
    let idle = remarks("llama_gqa_tied", &[("rope_scaling", json!({"beta_fast": 32, "factor": 4.0}))]);
    assert_eq!(
        idle,
        ["without effect with rope type \"default\": 2 keys: rope_scaling.beta_fast, rope_scaling.factor"]
    );
    let both = remarks("qwen2_window_yarn", &[("rope_parameters", json!({"rope_theta": 1e6}))]);
    assert_eq!(both, ["rope_scaling goes before rope_parameters"]);
    let factor = remarks("qwen2_window_yarn", &[("rope_scaling.attn_factor", json!(0.5))]);
    assert!(factor[0].contains("attn_factor 0.5"), "{factor:?}");
    let normed = remarks("deepseek_v2_moe", &[("norm_topk_prob", json!(true))]);
    assert!(normed[0].contains("norm_topk_prob"), "{normed:?}");
}

/// DeepSeek-R1-0528-Qwen3-8B's `attn_factor` is one over YaRN's own factor: cos and sin are not scaled.
#[test]
fn attn_factor_multiplies_the_attention_factor() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.878_248_856_286_941_9});
    let mut without = yarn.clone();
    without.as_object_mut().unwrap().remove("attn_factor");
    let factor = |rope: &Value| {
        let mut config = config("qwen3", &[]);
        let parameters = config["rope_parameters"].clone();
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_scaling"] = rope.clone();
        config["rope_theta"] = parameters["rope_theta"].clone();
        spec_from_config(&config).unwrap().blocks[0].rotary().attention_factor()
    };
    assert!((factor(&yarn) - 1.0).abs() < 1e-12);
    assert!((factor(&without) - (1.0 + 0.1 * 4f64.ln())).abs() < 1e-12);
}

/// LongRoPE is read where one list of factors serves every length.
#[test]
fn longrope_with_one_list_is_read() {
    let read = |short: Value, long: Value| {
        let rope = json!({"rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 32});
        spec_from_config(&config("llama_gqa_tied", &[("rope_scaling", rope)]))
    };
    let (one, other) = (json!([1.0, 1.5, 2.0, 4.0]), json!([1.0, 1.5, 2.0, 8.0]));
    let spec = read(one.clone(), one.clone()).unwrap();
    let plain = spec_from_config(&config("llama_gqa_tied", &[])).unwrap();
    let ratios: Vec<f32> = plain.blocks[0].rotary().frequencies();
    let ratios: Vec<f32> = ratios.iter().zip(spec.blocks[0].rotary().frequencies()).map(|(p, f)| p / f).collect();
    assert!(ratios.iter().zip([1.0, 1.5, 2.0, 4.0]).all(|(r, f)| (r - f).abs() < 1e-5), "{ratios:?}");
    // 64 positions over 32: sqrt(1 + ln 2 / ln 32).
    assert!((spec.blocks[0].rotary().attention_factor() - 1.2f64.sqrt()).abs() < 1e-12);
    for (short, long) in [(one.clone(), other), (json!([1.0]), json!([1.0])), (json!("x"), one)] {
        assert!(matches!(read(short, long), Err(ModelError::Value { .. })));
    }
}

/// `null` of these keys is false, as Python takes it.
#[test]
fn null_is_false_where_python_takes_it_for_false() {
    let read = |key: &str, value: Value| spec_from_config(&config("deepseek_v3_moe", &[(key, value)])).unwrap();
    for key in ["rope_interleave", "norm_topk_prob"] {
        assert_eq!(read(key, Value::Null), read(key, json!(false)), "{key}");
        assert_ne!(read(key, Value::Null), read(key, json!(true)), "{key}");
    }
}

/// DeepSeek-V2's own code either normalises the chosen scores or scales them.
#[test]
fn deepseek_v2_normalises_or_scales() {
    let router = |change: &[(&str, Value)]| {
        let spec = spec_from_config(&config("deepseek_v2_moe", change)).unwrap();
        let FeedForward::Moe(moe) = spec.blocks[1].feed_forward.clone() else { panic!("a mixture") };
        (moe.router.normalize, moe.router.scale)
    };
    assert_eq!(router(&[]), (false, 1.5));
    assert_eq!(router(&[("norm_topk_prob", json!(true))]), (true, 1.0));
    assert_eq!(router(&[("norm_topk_prob", json!(true)), ("num_experts_per_tok", json!(1))]), (false, 1.5));
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
