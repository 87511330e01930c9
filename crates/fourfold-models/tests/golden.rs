//! Logits of Hugging Face transformers, in f32, on tiny random models of every architecture.

mod support;

use fourfold_kernels::KvDtype;
use fourfold_models::spec_from_config;
use support::{backends, cases, distance};

#[test]
fn logits_agree_with_transformers() {
    for case in cases() {
        for backend in backends() {
            let name = backend.name();
            let model = case.model(backend);
            let hidden = model.hidden(&case.ids, &mut model.new_cache(KvDtype::F32));
            let logits = model.logits(&hidden);
            let error = distance(logits.host(), &case.logits);
            println!("{} on {name}: {error:e}", case.name);
            assert!(error <= 1e-4, "{} on {name}: logits differ by {error}", case.name);
        }
    }
}

#[test]
fn both_styles_of_configuration_are_one_model() {
    for case in cases() {
        let alternative = spec_from_config(&case.config("config.alt.json")).unwrap();
        assert_eq!(case.spec(), alternative, "{}", case.name);
    }
}

#[test]
fn the_spec_lists_exactly_the_tensors_of_the_checkpoint() {
    use fourfold_tensor::WeightSource;
    for case in cases() {
        let spec = case.spec();
        assert_eq!(spec.unused(&case.weights), Vec::<String>::new(), "{}", case.name);
        for weight in spec.weights() {
            let info = case.weights.info(&weight.name).unwrap_or_else(|| panic!("{}: {}", case.name, weight.name));
            assert_eq!(info.shape, weight.shape, "{}: {}", case.name, weight.name);
        }
        let stored: u64 = case.weights.tensors().iter().map(|t| t.elements()).sum();
        assert_eq!(spec.parameters(), stored, "{}", case.name);
    }
}

/// Negative control: the comparison sees a wrong rotation, a dropped scale and a wrong routing.
#[test]
fn a_changed_configuration_is_seen() {
    let changes = [
        ("llama_rope_llama3", "rope_theta", serde_json::json!(10_000.0)),
        ("llama_gqa_tied", "rms_norm_eps", serde_json::json!(1e-2)),
        ("deepseek_v3_moe", "routed_scaling_factor", serde_json::json!(1.0)),
        ("deepseek_v3_moe", "topk_group", serde_json::json!(4)),
        ("deepseek_v3_moe", "rope_interleave", serde_json::json!(false)),
        ("deepseek_v2_moe", "topk_method", serde_json::json!("greedy")),
    ];
    let cases = cases();
    for (name, key, value) in changes {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let mut config = case.config("config.json");
        config[key] = value;
        let spec = spec_from_config(&config).unwrap();
        let model = fourfold_models::Model::load(&spec, &case.weights, support::cpu(1), &mut |_| ()).unwrap();
        let hidden = model.hidden(&case.ids, &mut model.new_cache(KvDtype::F32));
        let error = distance(model.logits(&hidden).host(), &case.logits);
        assert!(error > 1e-3, "{name} with another {key} still agrees: {error}");
    }
}
