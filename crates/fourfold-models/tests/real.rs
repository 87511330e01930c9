//! Trained models against transformers' results, where they are at hand: `FOURFOLD_PEERS` names a directory with
//! `golden/*.safetensors` and `smollm2/`, `FOURFOLD_DATA` one with `stories260k/`. Skipped, visibly, where they are not.

mod support;

use std::path::PathBuf;

use fourfold_kernels::KvDtype;
use fourfold_models::{Model, spec_from_config};
use support::{File, cpu, distance};

/// The directory named by an environment variable, if it is there.
fn directory(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_dir());
    if found.is_none() {
        eprintln!("skipped: {variable} names no directory");
    }
    found
}

fn load(directory: &std::path::Path) -> Model {
    let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
    let spec = spec_from_config(&serde_json::from_str(&config).unwrap()).unwrap();
    Model::load(&spec, &File::read(&directory.join("model.safetensors")), cpu(2), &mut |_| ()).unwrap()
}

fn largest(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}

#[test]
fn stories260k_tells_the_same_story() {
    let (Some(peers), Some(data)) = (directory("FOURFOLD_PEERS"), directory("FOURFOLD_DATA")) else { return };
    let golden = File::read(&peers.join("golden/stories260k.safetensors"));
    let model = load(&data.join("stories260k"));
    let ids = golden.ids("input_ids");
    let logits = model.logits(&model.hidden(&ids, &mut model.new_cache(KvDtype::F32)));
    let error = distance(logits.host(), &golden.f32("logits"));
    println!("stories260K: logits differ by at most {error:e}");
    assert!(error <= 1e-3, "{error}");

    let story = golden.ids("greedy");
    let (mut told, mut cache) = (story[..8].to_vec(), model.new_cache(KvDtype::F16));
    let mut next = told.clone();
    while told.len() < story.len() {
        let hidden = model.hidden(&next, &mut cache);
        let logits = model.logits(&hidden);
        next = vec![largest(logits.row(logits.rows() - 1))];
        told.extend(&next);
    }
    assert_eq!(told, story);
}

#[test]
fn smollm2_agrees() {
    let Some(peers) = directory("FOURFOLD_PEERS") else { return };
    let golden = File::read(&peers.join("golden/smollm2.safetensors"));
    let model = load(&peers.join("smollm2"));
    assert_eq!(model.spec().parameters(), 134_515_008);
    let logits = model.logits(&model.hidden(&golden.ids("input_ids"), &mut model.new_cache(KvDtype::F32)));
    let best: Vec<u32> = (0..logits.rows()).map(|row| largest(logits.row(row))).collect();
    assert_eq!(best, golden.ids("argmax"));
    let last = logits.row(logits.rows() - 1);
    let top: Vec<f32> = golden.ids("top_ids").iter().map(|&id| last[id as usize]).collect();
    let error = distance(&top, &golden.f32("top_logits"));
    println!("SmolLM2: the last position's best 200 logits differ by at most {error:e}");
    assert!(error <= 1e-3, "{error}");
    for (row, expected) in golden.f32("logsumexp").into_iter().enumerate() {
        let sum: f64 = logits.row(row).iter().map(|&l| f64::from(l).exp()).sum();
        assert!((sum.ln() as f32 - expected).abs() <= 1e-3, "row {row}");
    }
}

/// Billions of parameters, all and active, as their reports give them.
#[test]
fn published_configurations_have_published_sizes() {
    let Some(data) = directory("FOURFOLD_DATA") else { return };
    for (name, all, active) in [
        ("DeepSeek-R1", 671.0, 37.0),
        ("DeepSeek-V2-Lite", 15.7, 2.4),
        ("DeepSeek-V2.5", 236.0, 21.0),
        ("DeepSeek-R1-Distill-Qwen-7B", 7.6, 7.1),
    ] {
        let text = std::fs::read_to_string(data.join(format!("configs/{name}.config.json"))).unwrap();
        let spec = spec_from_config(&serde_json::from_str(&text).unwrap()).unwrap();
        let (found, found_active) = (spec.parameters() as f64 / 1e9, spec.active_parameters() as f64 / 1e9);
        println!("{name}: {found:.1} billion parameters, {found_active:.1} active");
        assert!((found - all).abs() <= 0.02 * all, "{name}: {found}");
        assert!((found_active - active).abs() <= 0.1 * active, "{name}: {found_active}");
    }
}
