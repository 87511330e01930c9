//! What fine-tuning computes, against Python: adapters as `peft` runs and differentiates them, sequence classifiers as transformers does.
//! `scripts/golden_finetune.py` writes the cases, which stand on the checkpoints of `tests/golden`.

mod support;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use fourfold_kernels::backward::IGNORE;
use fourfold_models::layers::{LORA_A, LORA_SCALING, Trained};
use fourfold_models::spec_from_config;
use fourfold_tensor::WeightSource;
use serde_json::Value;
use support::{Case, File, With, check_gradients, distance, next_tokens, train_step};

/// The cases below `tests/<folder>`: a directory each, and the checkpoint it stands on.
fn cases(folder: &str) -> Vec<(PathBuf, Case)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut dirs: Vec<PathBuf> = fs::read_dir(root.join(folder)).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    assert_eq!(dirs.len(), 2, "golden cases are part of every checkout");
    dirs.into_iter().map(|dir| (dir.clone(), Case::open(root.join("golden").join(dir.file_name().unwrap())))).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn adapters_are_those_of_peft() {
    for (dir, case) in cases("golden_lora") {
        let config = json(&dir.join("adapter_config.json"));
        let scaling = (config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap()) as f32;
        let adapter = File::read(&dir.join("adapter_model.safetensors"));
        let source = |scaling: f32| {
            let mut source = With::new(&case.weights);
            for info in adapter.tensors() {
                let name = info.name.strip_prefix("base_model.model.").unwrap();
                source.set(name, &info.shape, adapter.f32(&info.name));
                if let Some(stem) = name.strip_suffix(LORA_A) {
                    source.set(&format!("{stem}{LORA_SCALING}"), &[1], vec![scaling]);
                }
            }
            source
        };
        let (targets, whole) = (next_tokens(&case.ids), [Range { start: 0, end: case.ids.len() }]);
        let adapted = source(scaling);
        let factors = adapted.tensors().iter().map(|t| t.name.clone()).filter(|name| !name.ends_with(LORA_SCALING));
        let trained = Trained::Only(factors.collect());
        let run = |source: &With| train_step(&case.spec(), source, (&case.ids, &targets), &whole, trained.clone());
        let mut step = run(&adapted);
        let expected = File::read(&dir.join("golden.safetensors")).f32("logits");
        let error = distance(step.logits.host(), &expected);
        assert!(error <= 1e-4, "{}: logits differ by {error}", case.name);
        check_gradients(&case.name, &adapted, &mut step, &json(&dir.join("grads.json")));
        // Negative controls: another scaling, and no adapter.
        assert!(distance(run(&source(0.9 * scaling)).logits.host(), &expected) > 1e-3, "{}", case.name);
        assert!(distance(&case.logits, &expected) > 1e-2, "{}", case.name);
    }
}

#[test]
fn classifiers_are_those_of_transformers() {
    for (dir, case) in cases("golden_classifier") {
        let golden = File::read(&dir.join("golden.safetensors"));
        let mut source = With::new(&case.weights);
        let shape = golden.tensors().iter().find(|t| t.name == "score.weight").unwrap().shape.clone();
        source.set("score.weight", &shape, golden.f32("score.weight"));
        let spec = spec_from_config(&json(&dir.join("config.json"))).unwrap();
        assert_eq!(spec.classes, Some(shape[0]), "{}", case.name);
        // Texts of different lengths, packed here and padded there.
        let (ids, lengths, labels) = (golden.ids("input_ids"), golden.ids("lengths"), golden.ids("labels"));
        let (mut documents, mut targets) = (Vec::new(), vec![IGNORE; ids.len()]);
        let mut begin = 0;
        for (&length, &label) in lengths.iter().zip(&labels) {
            let end = begin + length as usize;
            documents.push(begin..end);
            targets[end - 1] = label;
            begin = end;
        }
        let mut step = train_step(&spec, &source, (&ids, &targets), &documents, Trained::All);
        let at_ends: Vec<f32> = documents.iter().flat_map(|text| step.logits.row(text.end - 1).to_vec()).collect();
        let expected = golden.f32("logits");
        let error = distance(&at_ends, &expected);
        assert!(error <= 1e-4, "{}: logits differ by {error}", case.name);
        check_gradients(&case.name, &source, &mut step, &json(&dir.join("grads.json")));
        // Negative control: the token before the last gives something else.
        let before: Vec<f32> = documents.iter().flat_map(|text| step.logits.row(text.end - 2).to_vec()).collect();
        assert!(distance(&before, &expected) > 1e-2, "{}", case.name);
    }
}
