//! However a sequence is cut into calls, the result is the same.

mod support;

use fourfold_kernels::KvDtype;
use fourfold_models::{Cache, Model, spec_from_config, testing::RandomWeights};
use support::{Case, backends, cases, distance};

/// Hidden rows of `ids`, given `step` at a time.
fn in_steps(model: &Model, ids: &[u32], step: usize, cache: &mut Cache) -> Vec<f32> {
    ids.chunks(step).flat_map(|chunk| model.hidden(chunk, cache).into_host()).collect()
}

/// The golden models, and one with sliding windows in its later layers.
fn models() -> Vec<(String, Model, Vec<u32>)> {
    let mut models = Vec::new();
    for backend in backends() {
        let cases = cases();
        for case in &cases {
            let name = format!("{} on {}", case.name, backend.name());
            models.push((name, case.model(backend.clone()), case.ids.clone()));
        }
        let qwen: &Case = cases.iter().find(|case| case.name == "qwen2").unwrap();
        let mut config = qwen.config("config.json");
        config["use_sliding_window"] = true.into();
        config["sliding_window"] = 5.into();
        config["max_window_layers"] = 1.into();
        let spec = spec_from_config(&config).unwrap();
        let model = Model::load(&spec, &RandomWeights::new(&spec, 1), backend.clone(), &mut |_| ()).unwrap();
        models.push((format!("qwen2 with windows on {}", backend.name()), model, qwen.ids.clone()));
    }
    models
}

#[test]
fn decoding_and_chunked_prefill_equal_one_prefill() {
    for (name, model, ids) in models() {
        let mut cache = model.new_cache(KvDtype::F32);
        let whole = in_steps(&model, &ids, ids.len(), &mut cache);
        assert_eq!(cache.len(), ids.len());
        for step in [1, 2, 7] {
            let mut stepped = model.new_cache(KvDtype::F32);
            let error = distance(&in_steps(&model, &ids, step, &mut stepped), &whole);
            assert!(error <= 1e-4, "{name}, {step} at a time: {error}");
            assert_eq!(stepped.byte_len() > 0, cache.byte_len() > 0);
        }
    }
}

#[test]
fn a_truncated_cache_continues_as_if_nothing_had_followed() {
    for (name, model, ids) in models() {
        let mut cache = model.new_cache(KvDtype::F32);
        let whole = in_steps(&model, &ids, ids.len(), &mut cache);
        let kept = 10;
        cache.truncate(kept);
        // Another continuation, taken back too.
        let other: Vec<u32> = ids.iter().rev().copied().collect();
        in_steps(&model, &other, 3, &mut cache);
        cache.truncate(kept);
        assert_eq!(cache.len(), kept);
        let redone = in_steps(&model, &ids[kept..], 1, &mut cache);
        let hidden = model.spec().hidden_size;
        let error = distance(&redone, &whole[kept * hidden..]);
        assert!(error <= 1e-4, "{name}: {error}");
    }
}

/// Negative control: what was said before matters, and the cache is what carries it.
#[test]
fn another_beginning_gives_another_end() {
    for (name, model, ids) in models() {
        let (mut cache, mut other) = (model.new_cache(KvDtype::F32), model.new_cache(KvDtype::F32));
        model.hidden(&ids[..20], &mut cache);
        let mut changed = ids[..20].to_vec();
        changed[17] = (changed[17] + 1) % 64;
        model.hidden(&changed, &mut other);
        let end = model.hidden(&ids[20..], &mut cache);
        let changed_end = model.hidden(&ids[20..], &mut other);
        assert!(distance(end.host(), changed_end.host()) > 1e-3, "{name}");
    }
}

#[test]
fn half_precision_caches_are_close_and_half_as_large() {
    for (name, model, ids) in models() {
        let mut exact = model.new_cache(KvDtype::F32);
        let expected = in_steps(&model, &ids, 1, &mut exact);
        for dtype in [KvDtype::F16, KvDtype::Bf16] {
            let mut cache = model.new_cache(dtype);
            cache.reserve(ids.len());
            let error = distance(&in_steps(&model, &ids, 1, &mut cache), &expected);
            // Random routers amplify: a token may go to another expert.
            assert!(error <= 0.5, "{name} {dtype:?}: {error}");
            assert_eq!(cache.byte_len(), ids.len() * model.spec().kv_bytes_per_token(dtype), "{name}");
            assert_eq!(2 * model.spec().kv_bytes_per_token(dtype), model.spec().kv_bytes_per_token(KvDtype::F32));
        }
    }
}

/// DeepSeek's cache holds the latent and the rotary key, once for all heads.
#[test]
fn the_latent_is_what_is_cached() {
    let case = cases().into_iter().find(|case| case.name == "deepseek_v3_moe").unwrap();
    // Three layers of 16 + 8 elements; decompressed it would be 4 heads x (20 + 10).
    assert_eq!(case.spec().kv_bytes_per_token(KvDtype::F16), 3 * (16 + 8) * 2);
}
