//! Whole models on the device beside the CPU's, of every architecture; and what a decoded token costs, counted.

mod common;

use std::sync::Arc;

use common::gpu;
use fourfold_gpu::Gpu;
use fourfold_kernels::{Activations, Backend, Cpu, CpuOptions, DeviceUsage, KvDtype, Memory};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, ModelSpec, spec_from_config};
use serde_json::{Value, json};

const VOCAB: usize = 300;

fn llama(layers: usize) -> Value {
    json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true
    })
}

fn deepseek(layers: usize, dense: usize, q_lora: Value) -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160,
        "moe_intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": true, "first_k_dense_replace": dense, "moe_layer_freq": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": q_lora, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0
    })
}

fn configs() -> Vec<(&'static str, Value)> {
    let mut qwen3 = llama(2);
    qwen3["model_type"] = "qwen3".into();
    qwen3["head_dim"] = 24.into();
    let mut qwen2 = llama(3);
    qwen2["model_type"] = "qwen2".into();
    qwen2["use_sliding_window"] = true.into();
    qwen2["sliding_window"] = 5.into();
    qwen2["max_window_layers"] = 1.into();
    vec![
        ("llama", llama(2)),
        ("qwen2 with windows", qwen2),
        ("qwen3", qwen3),
        ("deepseek_v3 dense", deepseek(2, 2, Value::Null)),
        ("deepseek_v3", deepseek(2, 1, 24.into())),
    ]
}

fn model(config: &Value, backend: Arc<dyn Backend>) -> Model {
    let spec: ModelSpec = spec_from_config(config).unwrap();
    Model::load(&spec, &RandomWeights::new(&spec, 7), backend, &mut |_| ()).unwrap()
}

fn exact_cpu() -> Arc<dyn Backend> {
    let options = CpuOptions { threads: 1, activations: Activations::F32, ..CpuOptions::default() };
    Arc::new(Cpu::new(options).unwrap())
}

/// Logits of a prompt in two pieces and of some tokens one at a time.
fn logits(model: &Model, kv: KvDtype) -> Vec<f32> {
    let ids: Vec<u32> = (0..45).map(|i| (i * 37 + 5) % VOCAB as u32).collect();
    let mut cache = model.new_cache(kv);
    let mut all = Vec::new();
    for piece in [&ids[..23], &ids[23..40]].into_iter().chain(ids[40..].chunks(1)) {
        let hidden = model.hidden(piece, &mut cache);
        all.extend(model.logits_of(&hidden, 0..piece.len()).unwrap());
    }
    all
}

#[test]
fn every_architecture_gives_the_cpus_logits() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let (on_gpu, on_cpu) = (model(&config, Arc::new((*gpu).clone())), model(&config, exact_cpu()));
        for kv in [KvDtype::F32, KvDtype::F16] {
            let (found, expected) = (logits(&on_gpu, kv), logits(&on_cpu, kv));
            let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Of a cache in f16 a value may round the other way.
            let bound = if kv == KvDtype::F32 { 2e-5 } else { 2e-3 };
            assert!(far <= bound * size, "{name} {kv:?}: {far} of {size}");
            assert!(expected.iter().any(|v| v.abs() > 0.05 * size) && found.iter().all(|v| v.is_finite()));
        }
    }
}

/// What the device counts for one token after some others.
fn one_token(config: &Value, gpu: &Gpu) -> DeviceUsage {
    let model = model(config, Arc::new(gpu.clone()));
    let mut cache = model.new_cache(KvDtype::F16);
    model.hidden(&[1, 2, 3], &mut cache);
    let decode = |cache: &mut fourfold_models::Cache, id| {
        let hidden = model.hidden(&[id], cache);
        model.logits_of(&hidden, 0..1).unwrap()
    };
    decode(&mut cache, 4);
    let before = gpu.device_usage().unwrap();
    decode(&mut cache, 5);
    let after = gpu.device_usage().unwrap();
    DeviceUsage {
        live_bytes: after.live_bytes - before.live_bytes,
        peak_bytes: after.peak_bytes,
        launches: after.launches - before.launches,
        downloads: after.downloads - before.downloads,
        downloaded_bytes: after.downloaded_bytes - before.downloaded_bytes,
        uploads: after.uploads - before.uploads,
        uploaded_bytes: after.uploaded_bytes - before.uploaded_bytes,
    }
}

#[test]
fn a_decoded_token_costs_so_many_launches_and_transfers() {
    let Some(gpu) = gpu() else { return };
    let (two, three) = (one_token(&llama(2), &gpu), one_token(&llama(3), &gpu));
    assert_eq!(three.launches - two.launches, LAUNCHES_PER_LAYER, "launches of a layer");
    // Embedding, final norm, head.
    assert_eq!(two.launches - 2 * LAUNCHES_PER_LAYER, 3, "launches of the rest");
    for usage in [two, three] {
        // The token's id goes there, its logits come back, and nothing is allocated.
        assert_eq!((usage.uploads, usage.uploaded_bytes), (1, 4));
        assert_eq!((usage.downloads, usage.downloaded_bytes), (1, VOCAB as u64 * 4));
        assert_eq!(usage.live_bytes, 0, "bytes that a token leaves");
    }
}

/// Two norms, three projections, two rotations, two appends, attention, its output with the residual stream, gate and up, their product,
/// and the way down with the residual stream.
const LAUNCHES_PER_LAYER: u64 = 15;

#[test]
fn generating_takes_the_packed_weights_and_little_more() {
    let Some(gpu) = gpu() else { return };
    let model = model(&llama(2), Arc::new((*gpu).clone()));
    let before = gpu.device_usage().unwrap();
    let mut cache = model.new_cache(KvDtype::F16);
    for id in 0..100 {
        let hidden = model.hidden(&[id], &mut cache);
        model.logits_of(&hidden, 0..1).unwrap();
    }
    let (bytes, peak) = ((model.weight_bytes() + cache.byte_len()) as u64, gpu.device_usage().unwrap().peak_bytes);
    assert!(peak <= bytes + (64 << 20), "{peak} bytes for {bytes} of weights and cache");
    assert!(peak >= bytes && before.peak_bytes >= model.weight_bytes() as u64 / 2, "{peak}, {before:?}");
}
