//! `compress` for a size: the plan, its gate and report, the same bytes again, and what it refuses.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use common::{config, folder, fourfold, killed_at, model, text, until_stopped, weights};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";
const REPORT: &str = "compression_report.json";

fn calibrated(dir: &Path) -> Vec<OsString> {
    let calibration = text(dir, 3000);
    args!["--calibration", calibration, "--calibration-samples", "4", "--calibration-length", "64"].into()
}

fn compress(source: &Path, out: &Path, words: &[&str], more: &[OsString]) -> Vec<OsString> {
    let args = args!["compress", source, out, "--quiet", "--json"];
    args.into_iter().chain(words.iter().map(OsString::from)).chain(more.iter().cloned()).collect()
}

fn files(dir: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn a_plan_has_a_gate_a_report_and_the_same_bytes_again() {
    let dir = folder();
    let (source, text) = (dir.path().join("model"), calibrated(dir.path()));
    model(&source);
    let at = |name: &str| dir.path().join(name);
    let first = fourfold(compress(&source, &at("first"), &["--bits", "7.0", "--isa", "avx2"], &text)).json();
    let parameters = 8.0 * first["output_bytes"].as_f64().unwrap() / first["bits_per_parameter"].as_f64().unwrap();
    assert!(first["output_bytes"].as_f64().unwrap() <= 7.0 * parameters / 8.0);
    let gate = &first["gate"];
    assert!(gate["tokens"].as_u64().unwrap() >= 64 && gate["uniform"].as_f64().unwrap() > 0.0, "{gate}");
    assert_eq!(gate["passed"], json!(gate["planned"].as_f64() < gate["uniform"].as_f64()), "{gate}");

    let report: Value = serde_json::from_slice(&fs::read(at("first").join(REPORT)).unwrap()).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    let sum: u64 = tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, report["tensor_bytes"].as_u64().unwrap());
    let projection = tensors.iter().find(|t| t["name"].as_str().unwrap().contains("up_proj")).unwrap();
    assert!(projection["error"].as_f64().unwrap() > 0.0 && projection["measured_error"].as_f64().unwrap() > 0.0);
    for lost in projection["lost"].as_array().unwrap() {
        assert!(lost["bytes"].as_u64() <= projection["bytes"].as_u64(), "{lost}");
    }
    let kinds = |part: &str| -> Vec<String> {
        let probe = report["probes"].as_array().unwrap().iter().find(|p| p["part"] == part).unwrap();
        probe["candidates"].as_array().unwrap().iter().map(|c| c["kind"].as_str().unwrap().to_owned()).collect()
    };
    for kind in ["learned", "symmetric", "affine", "sparse", "low-rank", "corrected", "low-rank-sparse"] {
        assert!(kinds("up_proj").iter().any(|k| k == kind), "{kind} was not tried");
    }
    assert_eq!(report["blocks"].as_array().unwrap().len(), 2);

    let plan = at("plan.json");
    let written = args!["compress", &source, "--write-plan", &plan, "--bits", "7.0", "--isa", "avx2", "--threads", "1"];
    assert_eq!(common::Run::of(&program(written.into_iter().chain(text.clone()))).code, Some(0));
    for threads in ["1", "3"] {
        let again = at(&format!("again{threads}"));
        let args =
            args!["compress", &source, &again, "--plan", &plan, "--isa", "avx2", "--threads", threads, "--quiet"];
        assert_eq!(common::Run::of(&program(args.into_iter().chain(text.clone()))).code, Some(0));
        assert!(files(&again)[&OsString::from(WEIGHTS)] == files(&at("first"))[&OsString::from(WEIGHTS)], "{threads}");
    }
}

/// Runs the program on as many threads as its arguments say.
fn program(args: impl IntoIterator<Item = OsString>) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_fourfold")).args(args).output().unwrap()
}

/// Killed while a planned output is written: the same command ends with the same bytes, report included.
#[cfg(unix)]
#[test]
fn a_killed_plan_goes_on_to_the_same_bytes() {
    let dir = folder();
    let (source, text) = (dir.path().join("model"), calibrated(dir.path()));
    model(&source);
    let mut large = config();
    large["num_hidden_layers"] = json!(6);
    fs::write(source.join("config.json"), large.to_string()).unwrap();
    fs::write(source.join(WEIGHTS), weights(&large)).unwrap();
    let words = ["--bits", "6.5", "--no-gate", "--only", "symmetric", "learned"];
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    fourfold(compress(&source, &whole, &words, &text)).succeeded();
    until_stopped(|_| {
        let _ = fs::remove_dir_all(&out);
        let in_its_middle = killed_at(8, compress(&source, &out, &words, &text), &out);
        // Whole, or absent and gone on with.
        if !out.exists() {
            fourfold(compress(&source, &out, &words, &text)).succeeded();
        }
        assert!(files(&out) == files(&whole));
        in_its_middle
    });
}

#[test]
fn kinds_can_be_forced_and_kept_out() {
    let dir = folder();
    let (source, text) = (dir.path().join("model"), calibrated(dir.path()));
    model(&source);
    let kinds = |words: &[&str]| -> BTreeMap<String, String> {
        let out = dir.path().join("out");
        let words: Vec<&str> = words.iter().chain(&["--no-gate", "--overwrite"]).copied().collect();
        fourfold(compress(&source, &out, &words, &text)).succeeded();
        let report: Value = serde_json::from_slice(&fs::read(out.join(REPORT)).unwrap()).unwrap();
        let tensor = |t: &Value| (t["name"].as_str().unwrap().to_owned(), t["kind"].as_str().unwrap().to_owned());
        report["tensors"].as_array().unwrap().iter().map(tensor).collect()
    };
    let sparse = kinds(&["--bits", "7.0", "--only", "sparse"]);
    let of = |all: &BTreeMap<String, String>, kind: &str| all.values().filter(|k| *k == kind).count();
    assert!(of(&sparse, "sparse") > 0 && of(&sparse, "low-rank") == 0);
    assert!(sparse.iter().all(|(name, kind)| !name.contains("_proj") || kind == "sparse" || kind == "keep"));
    let without = kinds(&["--bytes", "60kB", "--exclude", "learned"]);
    assert!(of(&without, "learned") == 0 && of(&without, "symmetric") > 0, "{without:?}");
}

#[test]
fn refusals_of_sizes_recipes_and_texts() {
    let dir = folder();
    let (source, text) = (dir.path().join("model"), calibrated(dir.path()));
    model(&source);
    let out = dir.path().join("out");
    let refused = |words: &[&str], more: &[OsString], wanted: &str| {
        let run = fourfold(compress(&source, &out, words, more));
        assert!(run.error().contains(wanted), "{wanted:?} is not in: {}", run.stderr);
        assert!(!out.exists() && !dir.path().join("out.partial").exists());
    };
    // The least that can be had is said, in bytes, and can indeed be had.
    let run = fourfold(compress(&source, &out, &["--bytes", "1kB"], &text));
    let words = run.error().to_owned();
    let least = words.split("takes ").nth(1).and_then(|w| w.split(' ').next()).unwrap_or_else(|| panic!("{words}"));
    let with_least = compress(&source, &out, &["--bytes", least, "--no-gate"], &text);
    fourfold(with_least).succeeded();
    fs::remove_dir_all(&out).unwrap();
    refused(&["--bits", "0.5"], &text, "the smallest plan takes");
    refused(&["--method", "svd:65"], &text, "rank 65: a [64, 64] matrix has 1 to 64");
    let short = args!["--calibration", common::text(dir.path(), 10), "--calibration-length", "200"];
    refused(&["--ratio", "2"], &short, "fewer than one sequence of 200");
    for words in [&["--bits", "9.x"][..], &["--bits", "99.0"], &["--method", "prune:1.5"], &["--only", "magic"]] {
        let run = fourfold(compress(&source, &out, words, &text));
        assert_eq!(run.code, Some(2), "{words:?}: {}", run.stderr);
    }
}

/// Rewrites some values of one tensor of the model, bf16 as they are.
fn spoil(source: &Path, name: &str, change: impl Fn(&mut [u8])) {
    let file = source.join(WEIGHTS);
    let mut bytes = fs::read(&file).unwrap();
    let data = SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec();
    let at = bytes.windows(data.len()).position(|w| w == data).unwrap();
    change(&mut bytes[at..at + data.len()]);
    fs::write(&file, bytes).unwrap();
}

#[test]
fn weights_that_are_not_finite_are_named_and_zeros_are_no_case() {
    let dir = folder();
    let text = calibrated(dir.path());
    let (source, out) = (dir.path().join("model"), dir.path().join("out"));
    for (name, value) in [
        ("model.layers.1.mlp.up_proj.weight", [0xc0, 0x7f]),
        ("model.layers.0.self_attn.k_proj.weight", [0x80, 0xff]),
        ("model.norm.weight", [0xc0, 0x7f]),
    ] {
        model(&source);
        spoil(&source, name, |data| data[10..12].copy_from_slice(&value));
        for words in [&["--bits", "7.0"][..], &["--bits", "4"], &["--method", "prune:2:4"]] {
            let run = fourfold(compress(&source, &out, words, &text));
            assert!(run.error().contains(&format!("tensor {name}: element [0, 5] is")), "{words:?}: {}", run.stderr);
        }
    }
    model(&source);
    spoil(&source, "model.layers.1.mlp.down_proj.weight", |data| data.fill(0));
    // One row again and again: rank 1.
    spoil(&source, "model.layers.0.mlp.up_proj.weight", |data| {
        let row = data[..128].to_vec();
        data.chunks_mut(128).for_each(|r| r.copy_from_slice(&row));
    });
    for words in [&["--bits", "6.5"][..], &["--bits", "7.0", "--only", "low-rank", "corrected", "low-rank-sparse"]] {
        let run = fourfold(compress(&source, &out, &[words, &["--overwrite"]].concat(), &text));
        assert!(run.json()["gate"]["planned"].as_f64().unwrap().is_finite());
    }
}
