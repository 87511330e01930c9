//! `fourfold train` as a process: killed, resumed, given files that are not what they should be.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::{command, config, folder, fourfold, tokenizer};
use serde_json::json;

/// Configuration, tokenizer and a text of different lines.
fn sources(place: &Path) -> [PathBuf; 3] {
    let files = ["model.json", "tokenizer.json", "text.jsonl"].map(|name| place.join(name));
    let text: String = (0..60)
        .map(|i| format!("{}\n", json!({ "text": format!("line {i} of the text, {} and {}", i * i % 97, i * 7 % 31) })))
        .collect();
    fs::write(&files[0], config().to_string()).unwrap();
    fs::write(&files[1], tokenizer().to_string()).unwrap();
    fs::write(&files[2], text).unwrap();
    files
}

/// Arguments of a run of 24 steps into `output`.
fn train(place: &Path, output: &str, more: &[&str]) -> Vec<String> {
    let [config, tokenizer, data] = sources(place).map(|file| file.display().to_string());
    let output = place.join(output).display().to_string();
    let run = ["--model-config", &config, "--tokenizer", &tokenizer, "--data", &data, "--output", &output];
    let size =
        ["--context", "32", "--batch-size", "2", "--steps", "24", "--save-every", "3", "--eval-every", "7", "--json"];
    ["train"].iter().chain(&run).chain(&size).chain(more).map(ToString::to_string).collect()
}

/// Kills a run again and again, each time after a longer while, until it comes to its end.
fn killed_ends_as_uninterrupted(recipe: &[&str]) {
    let place = folder();
    let report = fourfold(train(place.path(), "whole", recipe)).json();
    assert!(report["peak_memory"].as_u64() > Some(0) && report["predicted_memory"].as_u64() > Some(0));
    let mut arguments = train(place.path(), "killed", recipe);
    arguments.push("--resume".into());
    let mut kills = 0;
    for round in 1.. {
        let mut child = command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(70 * round));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "a run failed by itself after {kills} kills");
            break;
        }
        // SIGKILL: the program has no say.
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
        kills += 1;
    }
    assert!(kills > 0);
    for file in ["final/model.safetensors", "best/model.safetensors", "checkpoint-24/optimizer.safetensors"] {
        let of = |run: &str| fs::read(place.path().join(run).join(file)).unwrap();
        assert!(of("whole") == of("killed"), "{file} differs after {kills} kills");
    }
}

#[test]
fn killed_and_resumed_ends_with_the_bytes_of_an_uninterrupted_run() {
    killed_ends_as_uninterrupted(&["--preset", "quarter"]);
}

#[test]
fn killed_and_resumed_with_int8_weights_and_accumulation() {
    killed_ends_as_uninterrupted(&["--preset", "eighth", "--weights", "int8", "--gradient-accumulation", "2"]);
}

#[test]
fn data_that_is_not_what_it_should_be_is_named_by_line() {
    let place = folder();
    let arguments = train(place.path(), "out", &[]);
    let data = place.path().join("text.jsonl");
    for (text, expected) in [
        ("{\"text\": \"good\"}\n{\"text\": 3}\n", "text.jsonl:2"),
        ("{\"text\": \"good\"}\n\n{\"text\": \n", "text.jsonl:3"),
        ("", "text.jsonl"),
    ] {
        fs::write(&data, text).unwrap();
        let run = fourfold(&arguments);
        assert!(run.error().contains(expected), "{}", run.stderr);
    }
}

#[test]
fn plans_are_made_of_a_configuration_alone() {
    let place = folder();
    let [config, ..] = sources(place.path()).map(|file| file.display().to_string());
    let report = fourfold(["plan", &config, "--memory", "100MB", "--json"]).json();
    let totals: Vec<u64> =
        report["rows"].as_array().unwrap().iter().map(|row| row["total"].as_u64().unwrap()).collect();
    assert!(totals.len() > 3 && totals[0] > totals[totals.len() - 1], "{totals:?}");
    assert_eq!(report["choice"][0], "baseline");
    let run = fourfold(["plan", &config, "--memory", "1MB"]);
    assert!(run.error().contains("nothing fits into 1.0 MB"), "{}", run.stderr);
}
