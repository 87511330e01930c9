//! Adapters are applied as PEFT applies them, or refused by name: by every command that takes one.
//! `scripts/golden_adapters.py` makes the cases.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Folder, folder, fourfold};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
/// What the script ran the models on.
const TEXT: &str = "a merged adapter is it";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden_adapters")
}

fn floats(file: &Path, tensor: &str) -> Vec<f32> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(tensor).unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

/// Logits of the text.
fn logits(place: &Path, model: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let (text, out) = (place.join("text.txt"), place.join("logits.safetensors"));
    fs::write(&text, TEXT).unwrap();
    let context = TEXT.len().to_string();
    let mut arguments =
        args!["eval", model, "--text", &text, "--context", &context, "--dump-logits", &out, "--kv-dtype", "f32"]
            .to_vec();
    if let Some(adapter) = adapter {
        arguments.extend(args!["--adapter", adapter]);
    }
    fourfold(arguments).succeeded();
    floats(&out, "logits")
}

#[test]
fn logits_are_those_of_peft_and_merging_keeps_them() {
    let mut dirs: Vec<PathBuf> = fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.retain(|dir| dir.file_name().unwrap() != "base");
    dirs.sort();
    assert_eq!(dirs.len(), 14, "golden cases are part of every checkout");
    let (place, base) = (folder(), golden().join("base"));
    let without = logits(place.path(), &base, None);
    for dir in dirs {
        let expected = floats(&dir.join("logits.safetensors"), "logits");
        let adapted = logits(place.path(), &base, Some(&dir));
        let error = distance(&adapted, &expected);
        assert!(error < 1e-3, "{}: logits differ by {error}", dir.display());
        assert!(distance(&without, &expected) > 1.0, "{}: the adapter changes nothing", dir.display());
        let merged = place.path().join(dir.file_name().unwrap());
        fourfold(args!["merge", &base, &dir, &merged]).succeeded();
        let error = distance(&logits(place.path(), &merged, None), &expected);
        assert!(error < 1e-3, "{}: merged, logits differ by {error}", dir.display());
    }
}

/// The plain adapter with changes to it.
fn changed(change: impl FnOnce(&Path)) -> (Folder, PathBuf) {
    let place = folder();
    let dir = place.path().join("adapter");
    fs::create_dir(&dir).unwrap();
    for file in [CONFIG, WEIGHTS] {
        fs::copy(golden().join("plain").join(file), dir.join(file)).unwrap();
    }
    change(&dir);
    (place, dir)
}

fn set(key: &'static str, value: Value) -> impl FnOnce(&Path) {
    move |dir| {
        let file = dir.join(CONFIG);
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        config[key] = value;
        fs::write(file, config.to_string()).unwrap();
    }
}

/// A tensor on its way through a change: name, shape, values.
type Tensor = (String, Vec<usize>, Vec<f32>);

fn tensors(change: impl FnOnce(&mut Vec<Tensor>)) -> impl FnOnce(&Path) {
    move |dir| {
        let bytes = fs::read(dir.join(WEIGHTS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut all: Vec<Tensor> =
            file.tensors().into_iter().map(|(name, t)| (name, t.shape().to_vec(), floats(t.data()))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        change(&mut all);
        let data: Vec<(String, Vec<usize>, Vec<u8>)> =
            all.into_iter().map(|(n, s, v)| (n, s, v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
        let views = data.iter().map(|(n, s, d)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
        fs::write(dir.join(WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// Every command that takes an adapter refuses it with these words, and nothing is written.
fn refused(change: impl FnOnce(&Path), words: &[&str]) {
    let (place, dir) = changed(change);
    let (base, text, out) = (golden().join("base"), place.path().join("text.txt"), place.path().join("out"));
    fs::write(&text, TEXT).unwrap();
    for run in [
        fourfold(args!["eval", &base, "--adapter", &dir, "--text", &text, "--context", "8"]),
        fourfold(args!["generate", &base, "--adapter", &dir, "-p", "the", "-n", "2"]),
        fourfold(args!["chat", &base, "--adapter", &dir, "-p", "the", "-n", "2"]),
        fourfold(args!["merge", &base, &dir, &out]),
    ] {
        for word in words {
            assert!(run.error().contains(word), "{word:?} is not in: {}", run.stderr);
        }
    }
    assert!(!out.exists());
}

#[test]
fn configurations_that_are_not_applied_are_refused_by_name() {
    for (key, value) in [
        ("init_lora_weights", json!("pissa")),
        ("alora_invocation_tokens", json!([36, 37])),
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("unheard_of", json!(7)),
        ("peft_type", json!("ADALORA")),
    ] {
        let shown = value.to_string();
        refused(set(key, value), &[CONFIG, key, &shown]);
    }
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_refused() {
    refused(set("r", json!(8)), &[WEIGHTS, "lora_A", "[4, 16]", "[8, 16]", "rank"]);
    refused(set("rank_pattern", json!({"v_proj": 2})), &["v_proj.lora_A", "[2, 16]"]);
    refused(set("target_modules", json!(["v_proj"])), &["q_proj", "target_modules"]);
    refused(set("target_modules", json!(["q_proj", "v_proj", "k_proj"])), &["k_proj", "missing"]);
    refused(set("layers_to_transform", json!([1])), &["layers.0", "leaves out"]);
    refused(tensors(|all| all.clear()), &[WEIGHTS, "no tensors"]);
    refused(tensors(|all| drop(all.remove(0))), &["lora_A.weight is missing"]);
    refused(tensors(|all| all.retain(|(name, ..)| !name.contains("layers.1."))), &["layers.1.", "missing"]);
    refused(tensors(|all| all[3].2[5] = f32::NAN), &["lora_B.weight", "row 1", "NaN"]);
    refused(tensors(|all| all[0].2[0] = f32::INFINITY), &["lora_A.weight", "row 0", "inf"]);
    refused(tensors(|all| all[0].1.reverse()), &["lora_A.weight", "[16, 4]", "[4, 16]"]);
    let extra = |name: &'static str, shape: Vec<usize>| {
        tensors(move |all| {
            let values = vec![0.5; shape.iter().product()];
            all.push((format!("base_model.model.{name}"), shape, values));
        })
    };
    refused(extra("model.layers.2.self_attn.q_proj.lora_A.weight", vec![4, 16]), &["layers.2.self_attn.q_proj"]);
    refused(extra("model.embed_tokens.lora_embedding_A", vec![4, 256]), &["lora_embedding_A", "embedding"]);
    refused(extra("model.layers.0.self_attn.q_proj.lora_magnitude_vector", vec![16]), &["DoRA"]);
    refused(extra("model.layers.0.self_attn.q_proj.base_layer.bias", vec![16]), &["bias"]);
    refused(extra("model.layers.0.self_attn.q_proj.weight", vec![16, 16]), &["q_proj.weight", "modules_to_save"]);
    refused(extra("lm_head.weight", vec![257, 16]), &["lm_head.weight", "[257, 16]", "[256, 16]"]);
}

#[test]
fn files_that_are_no_adapter_say_what_they_are() {
    refused(|dir| fs::rename(dir.join(WEIGHTS), dir.join("adapter_model.bin")).unwrap(), &["pickle", "PEFT"]);
    refused(|dir| fs::remove_file(dir.join(WEIGHTS)).unwrap(), &[WEIGHTS]);
    refused(|dir| fs::remove_file(dir.join(CONFIG)).unwrap(), &[CONFIG]);
    let run = fourfold(args!["generate", golden().join("plain"), "-p", "the", "-n", "2"]);
    assert!(run.error().contains("holds an adapter") && run.stderr.contains("--adapter"), "{}", run.stderr);
}

#[test]
fn what_says_nothing_of_the_tensors_may_differ() {
    let place = folder();
    let expected = floats(&golden().join("plain/logits.safetensors"), "logits");
    for change in [set("base_model_name_or_path", json!("somewhere/else")), set("task_type", json!(null))] {
        let (_place, dir) = changed(change);
        assert!(distance(&logits(place.path(), &golden().join("base"), Some(&dir)), &expected) < 1e-3);
    }
}

/// A tied projection is the embedding: an adapter that changes one of them alone has no place in such a model.
#[test]
fn a_tied_model_takes_neither_of_its_shared_matrices_from_an_adapter() {
    let (place, base) = (folder(), golden().join("base"));
    let tied = place.path().join("tied");
    fs::create_dir(&tied).unwrap();
    fs::copy(base.join("tokenizer.json"), tied.join("tokenizer.json")).unwrap();
    let mut config: Value = serde_json::from_str(&fs::read_to_string(base.join("config.json")).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(true);
    fs::write(tied.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(base.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let views = file.tensors().into_iter().filter(|(name, _)| name != "lm_head.weight");
    fs::write(tied.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    for (case, tensor) in [("head", "lm_head"), ("modules_to_save", "")] {
        let run = fourfold(args!["generate", &tied, "--adapter", golden().join(case), "-p", "the", "-n", "2"]);
        assert!(run.error().contains(tensor) && run.stderr.contains("tied"), "{case}: {}", run.stderr);
    }
}
