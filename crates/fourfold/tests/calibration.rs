//! `compress` without a word about text: what it calibrates on, what it says of the outcome, and what it advises.

mod common;

use std::fs;
use std::path::Path;

use common::{config, folder, fourfold, model, weights};
use serde_json::{Value, json};

fn compress(source: &Path, out: &Path, words: &[&str]) -> common::Run {
    fourfold(args!["compress", source, out].into_iter().chain(words.iter().map(Into::into)))
}

#[test]
fn text_that_comes_with_fourfold_is_calibrated_on() {
    let dir = folder();
    let source = dir.path().join("model");
    model(&source);
    let of = |name: &str, words: &[&str]| {
        let run = compress(&source, &dir.path().join(name), &[&["--bits", "3", "--json"], words].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        (run.json(), run.stderr)
    };
    let (by_default, said) = of("default", &[]);
    let tokens = by_default["calibration_tokens"].as_u64().unwrap();
    assert!(
        tokens > 3000 && said.contains(&format!("calibrating on {tokens} tokens of the text that comes")),
        "{said}"
    );
    let (nearest, said) = of("nearest", &["--method", "rtn"]);
    assert!(nearest["calibration_tokens"] == 0 && !said.contains("calibrating"), "{said}");
    // What it cost is always said, and the plain method is the control.
    let kld = |report: &Value| report["outcome"]["mean_kld"].as_f64().unwrap();
    assert!(kld(&by_default) > 0.0 && kld(&by_default) < kld(&nearest), "{by_default} {nearest}");
    for figure in ["top1_agreement", "original_perplexity", "perplexity"] {
        assert!(by_default["outcome"][figure].as_f64().unwrap() > 0.0, "{figure}");
    }
    // The same bytes again, and others with another seed.
    let bytes = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    of("again", &[]);
    of("other", &["--seed", "1"]);
    assert!(bytes("default") == bytes("again") && bytes("default") != bytes("other"));
}

#[test]
fn a_model_without_a_tokenizer_is_rounded_to_nearest_and_says_so() {
    let dir = folder();
    let (source, out) = (dir.path().join("model"), dir.path().join("out"));
    model(&source);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(source.join(file)).unwrap();
    }
    let refused = compress(&source, &out, &["--bits", "4", "--method", "gptq"]);
    assert!(refused.error().contains("--calibration FILE, and a tokenizer") && !out.exists(), "{}", refused.stderr);
    let run = compress(&source, &out, &["--bits", "4", "--json"]);
    assert!(run.stderr.contains("no tokenizer") && run.stderr.contains("rounded to nearest"), "{}", run.stderr);
    assert!(run.json()["outcome"].is_null());
}

#[test]
fn what_is_possible_is_said_and_is_possible() {
    let dir = folder();
    let (source, out) = (dir.path().join("model"), dir.path().join("out"));
    model(&source);
    let refused = compress(&source, &out, &["--ratio", "50", "--method", "rtn"]);
    let error = refused.error();
    let advised = error.split("--ratio ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().to_owned();
    assert!(advised.parse::<f64>().is_ok_and(|ratio| ratio > 2.0), "{error}");
    compress(&source, &out, &["--ratio", &advised, "--method", "rtn"]).succeeded();
    // A source that has lost something already.
    let again = dir.path().join("again");
    let run = compress(&out, &again, &["--bits", "8", "--method", "rtn"]);
    assert!(run.stderr.contains("is already quantized"), "{}", run.stderr);
    assert!(
        !compress(&source, &dir.path().join("dense"), &["--bits", "8", "--method", "rtn"]).stderr.contains("already")
    );
}

#[test]
fn a_broken_model_is_called_broken() {
    let dir = folder();
    let source = dir.path().join("model");
    model(&source);
    let of = |bits: &str| {
        let words = ["--bits", bits, "--method", "rtn", "--group-size", "tensor", "--scale-rule", "absmax"];
        let run = compress(&source, &dir.path().join(bits), &words);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.stdout
    };
    let (coarse, fine) = (of("2"), of("8"));
    assert!(coarse.contains("warning: so large a divergence") && coarse.contains("next: fourfold chat"), "{coarse}");
    assert!(!fine.contains("warning:") && fine.contains("held-out tokens: KL divergence"), "{fine}");
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_loaded() {
    let dir = folder();
    let mut config = config();
    // Half a terabyte of keys and values.
    config["max_position_embeddings"] = json!(1 << 24);
    config["num_hidden_layers"] = json!(64);
    config["num_key_value_heads"] = json!(4);
    model(dir.path());
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), weights(&config)).unwrap();
    let generate = |context: &str| {
        fourfold(args!["generate", dir.path(), "-p", "the", "-n", "1", "-c", context, "--kv-dtype", "f32"])
    };
    let refused = generate("16777216");
    for part in ["KV cache of 16777216 tokens", "of memory are available", "--no-memory-check"] {
        assert!(refused.error().contains(part), "{part}: {}", refused.stderr);
    }
    generate("64").succeeded();
}

#[test]
fn effort_decides_how_much_is_tried() {
    let dir = folder();
    let source = dir.path().join("model");
    model(&source);
    let of = |effort: &str| {
        let out = dir.path().join(effort);
        let run =
            compress(&source, &out, &["--bits", "6.0", "--effort", effort, "--calibration-length", "64", "--json"]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let report = fs::read(out.join("compression_report.json")).unwrap();
        let probes = serde_json::from_slice::<Value>(&report).unwrap()["probes"].clone();
        let kinds = probes.to_string();
        (run.json(), ["sparse", "low-rank"].map(|kind| kinds.contains(kind)))
    };
    let ((none, _), (little, few), (more, all)) = (of("0"), of("1"), of("2"));
    let tokens = |report: &Value| report["calibration_tokens"].as_u64().unwrap();
    assert_eq!((tokens(&none), tokens(&little), tokens(&more)), (0, 16 * 64, 32 * 64));
    assert!(none["gate"].is_null() && little["gate"].is_null() && more["gate"].is_object());
    assert_eq!((few, all), ([false, false], [true, true]));
    let refused = compress(&source, &dir.path().join("4"), &["--effort", "4"]);
    assert_eq!(refused.code, Some(2));
}
