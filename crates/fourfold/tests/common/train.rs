//! Arguments of training runs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{config, tokenizer};

/// Configuration, tokenizer and a text of different lines.
pub fn sources(place: &Path) -> [PathBuf; 3] {
    let files = ["model.json", "tokenizer.json", "text.jsonl"].map(|name| place.join(name));
    let text: String = (0..60)
        .map(|i| format!("{}\n", json!({ "text": format!("line {i} of the text, {} and {}", i * i % 97, i * 7 % 31) })))
        .collect();
    fs::write(&files[0], config().to_string()).unwrap();
    fs::write(&files[1], tokenizer().to_string()).unwrap();
    fs::write(&files[2], text).unwrap();
    files
}

/// Arguments of a run of 24 steps of a new model into `output`.
pub fn train(place: &Path, output: &str, more: &[&str]) -> Vec<String> {
    let [config, tokenizer, _] = sources(place).map(|file| file.display().to_string());
    arguments(place, output, &["--model-config", &config, "--tokenizer", &tokenizer], more)
}

/// As [`train`], of the model in `base`.
pub fn train_on(place: &Path, base: &Path, output: &str, more: &[&str]) -> Vec<String> {
    arguments(place, output, &["--model", &base.display().to_string()], more)
}

fn arguments(place: &Path, output: &str, what: &[&str], more: &[&str]) -> Vec<String> {
    let data = sources(place)[2].display().to_string();
    let output = place.join(output).display().to_string();
    let mut list = vec!["train", "--data", &data, "--output", &output, "--context", "32", "--json"];
    list.extend(what);
    // What `more` says goes before.
    for pair in [["--batch-size", "2"], ["--steps", "24"], ["--save-every", "3"], ["--eval-every", "7"]] {
        if !more.contains(&pair[0]) {
            list.extend(pair);
        }
    }
    list.extend(more);
    list.into_iter().map(str::to_owned).collect()
}
