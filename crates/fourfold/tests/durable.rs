//! What is left of runs: changed inputs, foreign directories, two runs at once, interrupted publications, checksums.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::train::{train, train_on};
use common::{command, config, folder, fourfold, killed_at, model, text, until_stopped, weights};
use serde_json::json;

/// The files right inside a directory.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.is_file())
        .map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap()))
        .collect()
}

fn large_model(dir: &Path) {
    model(dir);
    let mut large = config();
    large["num_hidden_layers"] = json!(40);
    fs::write(dir.join("config.json"), large.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), weights(&large)).unwrap();
}

/// Changes a byte of a file's end.
fn change(file: &Path) {
    let mut data = fs::read(file).unwrap();
    let at = data.len() - 3;
    data[at] ^= 1;
    fs::write(file, data).unwrap();
}

#[test]
fn a_compression_goes_on_only_with_the_same_settings_and_inputs() {
    let dir = folder();
    let (source, out, calibration) = (dir.path().join("source"), dir.path().join("out"), text(dir.path(), 3000));
    large_model(&source);
    let compress = |more: &[&str]| {
        let words =
            ["--bits", "4", "--calibration-samples", "4", "--calibration-length", "64", "--quiet", "--calibration"];
        let mut list = args!["compress", &source, &out].to_vec();
        list.extend(words.iter().chain(&[calibration.to_str().unwrap()]).chain(more).map(Into::into));
        list
    };
    until_stopped(|_| {
        let _ = fs::remove_dir_all(&out);
        killed_at(20, compress(&[]), &out)
    });
    let partial = dir.path().join("out.partial");
    // The lock is each run's own, and what a killed one left of a line goes.
    let done =
        || files(&partial).into_iter().filter(|(name, _)| name.extension().is_some_and(|end| end == "safetensors"));
    let before: Vec<_> = done().collect();
    assert_eq!(before.len(), 1);
    let refused = |more: &[&str], words: &str| {
        let run = fourfold(compress(more));
        assert!(run.error().contains(words), "{words}: {}", run.stderr);
        assert!(done().eq(before.iter().cloned()), "{words}: what was done is not as it was");
    };
    refused(&["--seed", "7"], "--seed is 7, was 0");
    refused(&["--group-size", "32"], "--group-size is Group(32)");
    refused(&["--scale-rule", "absmax"], "--scale-rule is Absmax, was Search");
    refused(&["--isa", "portable", "--float-products", "f32"], "the kernels (--isa");
    for (file, name) in [
        (source.join("model.safetensors"), "MODEL/model.safetensors has another content"),
        (source.join("tokenizer.json"), "MODEL/tokenizer.json has another content"),
        (source.join("config.json"), "MODEL/config.json has another content"),
        (calibration.clone(), "--calibration text3000.txt has another content"),
    ] {
        let whole = fs::read(&file).unwrap();
        match file.extension().is_some_and(|end| end == "json") {
            true => fs::write(&file, [&whole[..], b" "].concat()).unwrap(),
            false => change(&file),
        }
        refused(&[], name);
        fs::write(&file, whole).unwrap();
    }
    // A flipped byte in a shard's header, and one in a finished tensor's data, are seen and mended.
    let shard = partial.join("model.safetensors");
    let mut data = fs::read(&shard).unwrap();
    data[40] ^= 1;
    let header = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize + 8;
    data[header..header + 4000].iter_mut().step_by(400).for_each(|byte| *byte ^= 4);
    fs::write(&shard, data).unwrap();
    fourfold(compress(&[])).succeeded();
    let whole = dir.path().join("whole");
    fs::rename(&out, &whole).unwrap();
    fourfold(compress(&[])).succeeded();
    assert!(files(&out) == files(&whole), "not the bytes of an uninterrupted run");
    assert!(!partial.exists() && !out.join("fourfold-journal.jsonl").exists());
    fourfold(args!["verify", &out]).succeeded();
}

#[test]
fn what_fourfold_did_not_make_stays() {
    let dir = folder();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    model(&source);
    let compress = |out: &Path| fourfold(args!["compress", &source, out, "--bits", "4", "--overwrite"]);
    let foreign = dir.path().join("out.partial");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    assert!(compress(&out).error().contains("is not of fourfold's making"));
    assert_eq!(fs::read_to_string(foreign.join("letter")).unwrap(), "dear");
    fs::rename(&foreign, dir.path().join("elsewhere")).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("elsewhere", &foreign).unwrap();
        assert!(compress(&out).error().contains("is not of fourfold's making"));
        assert_eq!(fs::read_to_string(foreign.join("letter")).unwrap(), "dear");
        fs::remove_file(&foreign).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
        assert!(compress(&dir.path().join("dangling")).error().contains("is a link to nowhere"));
        std::os::unix::fs::symlink("source", dir.path().join("link")).unwrap();
        assert!(compress(&dir.path().join("link")).error().contains("is MODEL"));
    }
    let before = files(&source);
    assert!(compress(&source).error().contains("is MODEL"));
    assert!(compress(&source.join("new")).error().contains("lies inside MODEL"));
    assert!(compress(dir.path()).error().contains("holds MODEL"));
    let report = source.join("config.json");
    let text = text(dir.path(), 300);
    for option in ["--dump-logits", "--save-logits"] {
        let run = fourfold(args!["eval", &source, "--text", &text, option, &report]);
        assert!(run.error().contains("is MODEL or a part of it"), "{}", run.stderr);
    }
    assert!(files(&source) == before);
    // A training run: foreign models under the names that it writes.
    let best = dir.path().join("run/best");
    fs::create_dir_all(&best).unwrap();
    fs::write(best.join("letter"), "dear").unwrap();
    let run = fourfold(train(dir.path(), "run", &[]));
    assert!(run.error().contains("holds what fourfold did not write"), "{}", run.stderr);
    let run = fourfold(train_on(dir.path(), &source, "source/tuned", &[]));
    assert!(run.error().contains("lies inside --model"), "{}", run.stderr);
    assert_eq!(fs::read_to_string(best.join("letter")).unwrap(), "dear");
}

#[test]
fn a_training_run_goes_on_only_as_itself() {
    let dir = folder();
    fourfold(train(dir.path(), "run", &[])).json();
    let resumed = |more: &[&str]| {
        let mut list = train(dir.path(), "run", more);
        list.push("--resume".into());
        list
    };
    let before = files(&dir.path().join("run/checkpoint-24"));
    for (more, words) in [
        (&["--learning-rate", "0.01"][..], "--learning-rate is 0.01, was 0.001"),
        (&["--batch-size", "3"], "--batch-size is 3, was 2"),
        (&["--context", "16"], "--context is 16, was 32"),
        (&["--held-out", "0.2"], "--held-out is 0.2, was 0.05"),
        (&["--gradient-accumulation", "2"], "--gradient-accumulation is 2, was 1"),
        (&["--seed", "5"], "--seed 0"),
    ] {
        let mut arguments = resumed(more);
        // A flag stands once.
        if more[0] == "--context" {
            let first = arguments.iter().position(|word| word == "--context").unwrap();
            arguments.drain(first..first + 2);
        }
        let run = fourfold(arguments);
        assert!(run.error().contains(words), "{words}: {}", run.stderr);
    }
    // Fewer steps: it is finished. More: it goes on, and says so.
    let report = fourfold(resumed(&["--steps", "12"]));
    assert_eq!(report.json()["complete"], true);
    assert!(report.stderr.contains("the run of 12 steps is finished: 24 steps are done"), "{}", report.stderr);
    let report = fourfold(resumed(&["--steps", "26", "--save-every", "2"]));
    assert_eq!(report.json()["steps"], 26);
    assert!(report.stderr.contains("--steps is 26, was 24") && report.stderr.contains("--save-every is 2, was 3"));
    assert!(!before.is_empty());
    // Another text, another tokenizer, another order of files.
    let arguments = resumed(&["--steps", "26"]);
    for (file, words) in [("text.jsonl", "--data text.jsonl has another content"), ("model.json", "--model-config")] {
        let path = dir.path().join(file);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, [&whole[..], b"\n"].concat()).unwrap();
        let run = fourfold(&arguments);
        assert!(run.error().contains(words), "{}", run.stderr);
        fs::write(&path, whole).unwrap();
    }
    fourfold(&arguments).json();
}

#[test]
fn two_runs_do_not_share_an_output() {
    let dir = folder();
    let many = ["--steps", "100000", "--save-every", "100000", "--eval-every", "100000"];
    let mut first = command(train(dir.path(), "run", &many)).stdout(std::process::Stdio::null()).spawn().unwrap();
    let metrics = dir.path().join("run/metrics.jsonl");
    while fs::metadata(&metrics).map_or(0, |meta| meta.len()) == 0 && first.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let second = fourfold(train(dir.path(), "run", &many));
    let told = second.stderr.contains(&format!("another run (process {}) is writing here", first.id()));
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(second.code == Some(1) && told, "{}", second.stderr);
    // Killed, it holds nothing any more, and what it left is gone with the next one.
    let mut arguments = train(dir.path(), "run", &["--steps", "2"]);
    arguments.push("--resume".into());
    fourfold(&arguments).json();
    assert!(!dir.path().join("run/.fourfold").exists());
}

#[test]
fn outputs_are_verified_file_by_file() {
    let dir = folder();
    let run = dir.path().join("run");
    fourfold(train(dir.path(), "run", &["--steps", "4"])).json();
    let report = fourfold(args!["verify", &run, "--json"]).json();
    assert_eq!((&report["intact"], report["directories"].as_array().unwrap().len()), (&json!(true), 4), "{report}");
    change(&run.join("final/model.safetensors"));
    fs::remove_file(run.join("final/config.json")).unwrap();
    fs::write(run.join("final/more"), "").unwrap();
    let verified = fourfold(args!["verify", &run.join("final")]);
    assert!(verified.error().contains("3 files are not as written"), "{}", verified.stderr);
    for words in ["model.safetensors: differs", "config.json: is missing", "more: was not written"] {
        assert!(verified.stdout.contains(words), "{}", verified.stdout);
    }
    change(&run.join("checkpoint-4/optimizer.safetensors"));
    let verified = fourfold(args!["verify", &run.join("checkpoint-4")]);
    assert!(verified.stdout.contains("optimizer.safetensors: differs"), "{}", verified.stdout);
    assert_eq!(verified.code, Some(1));
    assert!(fourfold(args!["verify", dir.path().join("nowhere")]).error().contains("nowhere"));
}
