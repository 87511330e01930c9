//! What can be wrong with files: each is one clear line with the place, exit code 1, and nothing under the output's name.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Folder, config, folder, fourfold, killed_at, model, text, tokenizer, until_stopped, weights};
use serde_json::{Value, json};

/// A good model whose files `spoil` then changes.
fn spoiled(spoil: impl FnOnce(&Path)) -> (Folder, PathBuf) {
    let dir = folder();
    let source = dir.path().join("model");
    model(&source);
    spoil(&source);
    (dir, source)
}

/// The model cannot be generated from nor compressed, both errors have these words, and no output appears.
fn refused(spoil: impl FnOnce(&Path), words: &[&str]) {
    let (dir, source) = spoiled(spoil);
    let out = dir.path().join("out");
    let runs = [
        fourfold(args!["generate", &source, "-p", "the", "-n", "3"]),
        fourfold(args!["compress", &source, &out, "--bits", "4"]),
    ];
    for run in &runs {
        for word in words {
            assert!(run.error().contains(word), "{word:?} is not in: {}", run.stderr);
        }
    }
    assert!(!out.exists() && !dir.path().join("out.partial").exists());
}

/// Changes the JSON of a safetensors header, data untouched.
fn change_header(change: impl FnOnce(&mut Value)) -> impl FnOnce(&Path) {
    change_file(WEIGHTS, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let text = header.to_string().into_bytes();
        let data = bytes.split_off(8 + length);
        *bytes = [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat();
    })
}

fn change_file(name: &str, change: impl FnOnce(&mut Vec<u8>)) -> impl FnOnce(&Path) {
    move |dir| {
        let file = dir.join(name);
        let mut bytes = fs::read(&file).unwrap();
        change(&mut bytes);
        fs::write(file, bytes).unwrap();
    }
}

const WEIGHTS: &str = "model.safetensors";

#[test]
fn nothing_there() {
    let dir = folder();
    let missing = dir.path().join("missing");
    assert!(fourfold(args!["inspect", &missing]).error().contains("missing"));
    assert!(fourfold(args!["inspect", dir.path()]).error().contains(&dir.path().display().to_string()));
}

#[test]
fn truncated() {
    refused(change_file(WEIGHTS, |b| b.truncate(b.len() - 10)), &[WEIGHTS]);
    refused(change_file(WEIGHTS, |b| b.truncate(100)), &[WEIGHTS]);
    refused(change_file(WEIGHTS, Vec::clear), &[WEIGHTS]);
}

#[test]
fn flipped_and_oversized_headers() {
    refused(change_file(WEIGHTS, |b| b[7] = 0x7f), &[WEIGHTS]);
    refused(change_file(WEIGHTS, |b| b[8] ^= 0x80), &[WEIGHTS]);
    refused(change_file(WEIGHTS, |b| b[0] ^= 0x08), &[WEIGHTS]);
}

#[test]
fn every_flipped_bit_of_the_header_ends_cleanly() {
    // Some flips are harmless (a letter of an unread name's metadata); none may crash. `inspect` reads what all commands read first.
    let (_dir, source) = spoiled(|_| {});
    let good = fs::read(source.join(WEIGHTS)).unwrap();
    for i in (0..400).step_by(13) {
        let mut bytes = good.clone();
        bytes[i] ^= 1 << (i % 8);
        fs::write(source.join(WEIGHTS), bytes).unwrap();
        let run = fourfold(args!["generate", &source, "-p", "the", "-n", "1", "--quiet"]);
        assert!(matches!(run.code, Some(0 | 1)), "byte {i}: {:?} {}", run.code, run.stderr);
    }
}

#[test]
fn missing_and_misshapen_tensors() {
    let other = |key: &'static str, value: u64| {
        move |dir: &Path| {
            let mut config = config();
            config[key] = json!(value);
            fs::write(dir.join(WEIGHTS), weights(&config)).unwrap();
        }
    };
    refused(other("num_hidden_layers", 1), &["model.layers.1."]);
    refused(other("intermediate_size", 96), &["mlp", "96", "128"]);
}

#[test]
fn overlapping_offsets() {
    let (first, second) = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight");
    let overlap = |header: &mut Value| header[second]["data_offsets"] = header[first]["data_offsets"].clone();
    refused(change_header(overlap), &[WEIGHTS, "up_proj"]);
    let outside = |header: &mut Value| header[second]["data_offsets"] = json!([1u64 << 60, (1u64 << 60) + 16384]);
    refused(change_header(outside), &[WEIGHTS, second]);
}

#[test]
fn wrong_dtypes() {
    let tensor = "model.layers.0.mlp.up_proj.weight";
    for dtype in ["I32", "I16", "Q9"] {
        refused(change_header(|header| header[tensor]["dtype"] = json!(dtype)), &[WEIGHTS]);
    }
    // Of the right size, but no weights.
    refused(change_header(|header| header[tensor]["dtype"] = json!("I16")), &[WEIGHTS, tensor, "I16"]);
}

#[test]
fn a_missing_tensor() {
    let tensor = "model.layers.1.mlp.up_proj.weight";
    let spoil = |dir: &Path| {
        let good = weights(&config());
        let tensors = safetensors::SafeTensors::deserialize(&good).unwrap();
        let kept = tensors.tensors().into_iter().filter(|(name, _)| name != tensor);
        fs::write(dir.join(WEIGHTS), safetensors::serialize(kept, None).unwrap()).unwrap();
    };
    refused(spoil, &["model", tensor]);
}

#[test]
fn a_missing_shard() {
    let spoil = |dir: &Path| {
        fs::rename(dir.join(WEIGHTS), dir.join("model-00001-of-00002.safetensors")).unwrap();
        let map = json!({"model.embed_tokens.weight": "model-00001-of-00002.safetensors",
                         "model.norm.weight": "model-00002-of-00002.safetensors"});
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    refused(spoil, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn configurations() {
    let with = |key: &'static str, value: serde_json::Value| {
        move |dir: &Path| {
            let mut config = config();
            config[key] = value;
            fs::write(dir.join("config.json"), config.to_string()).unwrap();
        }
    };
    refused(with("model_type", json!("perceptron")), &["config.json", "perceptron"]);
    refused(with("hidden_size", json!("wide")), &["config.json", "hidden_size"]);
    refused(with("num_attention_heads", json!(0)), &["config.json"]);
    refused(change_file("config.json", |b| b.truncate(20)), &["config.json"]);
}

#[test]
fn a_wrong_tokenizer() {
    let spoil = |dir: &Path| {
        let mut tokenizer = tokenizer();
        let mut extra = tokenizer["added_tokens"][0].clone();
        (extra["id"], extra["content"]) = (json!(300), json!("[EXTRA]"));
        tokenizer["added_tokens"].as_array_mut().unwrap().push(extra);
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    };
    let (_dir, source) = spoiled(spoil);
    // A token beyond the model's rows is an error once a text has it, and a remark before.
    let run = fourfold(args!["generate", &source, "-p", "the[EXTRA]"]);
    assert!(run.error().contains("\"[EXTRA]\"") && run.error().contains("no row"), "{}", run.stderr);
    let run = fourfold(args!["generate", &source, "-p", "the", "-n", "2", "--json"]);
    assert!(run.json()["text"].is_string() && run.stderr.contains("[EXTRA]"), "{}", run.stderr);
    let (_dir, source) = spoiled(change_file("tokenizer.json", |b| b.truncate(50)));
    assert!(fourfold(args!["generate", &source, "-p", "the"]).error().contains("tokenizer.json"));
    let (_dir, source) = spoiled(|dir| fs::remove_file(dir.join("tokenizer.json")).unwrap());
    assert!(fourfold(args!["generate", &source, "-p", "the"]).error().contains("tokenizer"));
}

#[test]
fn texts_and_options_that_do_not_fit() {
    let (dir, source) = spoiled(|_| {});
    let short = text(dir.path(), 10);
    assert!(fourfold(args!["eval", &source, "--text", &short, "--context", "512"]).error().contains("positions"));
    // By default a window has the model's positions.
    assert!(fourfold(args!["eval", &source, "--text", &short]).error().contains("tokens"));
    assert!(fourfold(args!["eval", &source, "--text", &short, "--context", "200"]).error().contains("tokens"));
    assert!(fourfold(args!["eval", &source, "--text", "/nonexistent.txt"]).error().contains("/nonexistent.txt"));
    let long = "the ".repeat(400);
    assert!(fourfold(args!["generate", &source, "-p", &long]).error().contains("context"));
    assert!(fourfold(args!["generate", &source, "-p", "the", "--isa", "portable", "-n", "0"]).code == Some(0));
    let out = dir.path().join("out");
    assert!(fourfold(args!["compress", &source, &out, "--ratio", "50"]).error().contains("bytes"));
    assert!(fourfold(args!["compress", &source, &out, "--plan", &short]).error().contains("text10.txt"));
    assert!(!out.exists());
}

#[test]
fn outputs_that_cannot_be_written() {
    let (dir, source) = spoiled(|_| {});
    let file = dir.path().join("a file");
    fs::write(&file, "x").unwrap();
    let below = file.join("out");
    assert!(fourfold(args!["compress", &source, &below, "--bits", "4"]).error().contains("a file"));
    let existing = dir.path().join("existing");
    model(&existing);
    assert!(fourfold(args!["compress", &source, &existing, "--bits", "4"]).error().contains("existing"));
    assert!(fourfold(args!["compress", &source, &source, "--bits", "4", "--overwrite"]).error().contains("model"));
    assert!(source.join(WEIGHTS).exists());
    let dump = fourfold(args![
        "eval",
        &source,
        "--text",
        text(dir.path(), 600),
        "--context",
        "64",
        "--dump-logits",
        "/dev/full"
    ]);
    if Path::new("/dev/full").exists() {
        assert!(dump.error().contains("/dev/full"), "{}", dump.stderr);
    }
}

/// A limit on file sizes stands in for a full disk: writes fail half way through.
#[cfg(unix)]
#[test]
fn a_full_disk() {
    let (dir, source) = spoiled(|_| {});
    let out = dir.path().join("out");
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$@\"";
    let run = Command::new("bash")
        .args(["-c", script, "limited", env!("CARGO_BIN_EXE_fourfold"), "compress"])
        .args([&source, &out])
        .args(["--bits", "4"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    let error = stderr.lines().last().unwrap_or_default();
    assert!(error.starts_with("error: ") && error.contains("out") && error.contains("no room"), "{stderr}");
    assert!(!out.exists());
    let again = fourfold(args!["compress", &source, &out, "--bits", "4"]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
}

/// Killed while it writes: nothing under the final name, and the same command again ends with the bytes of a run that was not.
#[cfg(unix)]
#[test]
fn killed_in_the_middle() {
    let dir = folder();
    let source = dir.path().join("source");
    model(&source);
    let mut large = config();
    large["num_hidden_layers"] = json!(40);
    fs::write(source.join("config.json"), large.to_string()).unwrap();
    fs::write(source.join(WEIGHTS), weights(&large)).unwrap();
    let calibration = text(dir.path(), 3000);
    let with_text = args!["--calibration", calibration, "--calibration-samples", "4", "--calibration-length", "64"];
    for (name, more) in [("nearest", &[][..]), ("gptq", &with_text[..])] {
        let compress = |out: &Path| {
            let args = args!["compress", &source, out, "--bits", "4", "--quiet"];
            args.into_iter().chain(more.iter().cloned()).collect::<Vec<_>>()
        };
        let files = |dir: &Path| {
            let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
            entries.map(|e| (e.file_name(), fs::read(e.path()).unwrap())).collect::<BTreeMap<_, _>>()
        };
        let (whole, out) = (dir.path().join(format!("{name}-whole")), dir.path().join(name));
        assert_eq!(fourfold(compress(&whole)).code, Some(0));
        let partial = dir.path().join(format!("{name}.partial"));
        until_stopped(|_| {
            let _ = fs::remove_dir_all(&out);
            let in_its_middle = killed_at(20, compress(&out), &out);
            // Under the final name is all or nothing.
            if !out.exists() {
                let again = fourfold(compress(&out));
                assert_eq!(again.code, Some(0), "{}", again.stderr);
            }
            assert!(!partial.exists());
            assert!(files(&out) == files(&whole), "{name}: not the bytes of an uninterrupted run");
            in_its_middle
        });
    }
}
