//! What killed runs and earlier versions left, and inputs that changed meanwhile: restored, cleaned up or refused by name, never mixed.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::train::{train, train_on};
use common::{command, config, folder, fourfold, killed_at, model, until_stopped, weights};
use serde_json::json;

/// The files right inside a directory.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.is_file());
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

/// Changes a byte of a file's end.
fn change(file: &Path) {
    let mut data = fs::read(file).unwrap();
    let at = data.len() - 3;
    data[at] ^= 1;
    fs::write(file, data).unwrap();
}

#[test]
fn a_merge_goes_on_only_with_the_same_inputs() {
    let dir = folder();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    model(&source);
    let mut large = config();
    large["num_hidden_layers"] = json!(40);
    fs::write(source.join("config.json"), large.to_string()).unwrap();
    fs::write(source.join("model.safetensors"), weights(&large)).unwrap();
    let lora = ["--lora-rank", "2", "--steps", "1", "--batch-size", "1", "--eval-every", "0"];
    fourfold(train_on(dir.path(), &source, "lora", &lora)).json();
    let adapter = dir.path().join("lora/final");
    let merge = || args!["merge", &source, &adapter, &out];
    until_stopped(|_| {
        let _ = fs::remove_dir_all(&out);
        killed_at(20, merge(), &out)
    });
    for file in [
        adapter.join("adapter_model.safetensors"),
        adapter.join("adapter_config.json"),
        source.join("model.safetensors"),
    ] {
        let whole = fs::read(&file).unwrap();
        match file.extension().is_some_and(|end| end == "json") {
            true => fs::write(&file, [&whole[..], b" "].concat()).unwrap(),
            false => change(&file),
        }
        let run = fourfold(merge());
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(run.error().contains(&format!("{name} has another content")), "{name}: {}", run.stderr);
        fs::write(&file, whole).unwrap();
    }
    fourfold(merge()).succeeded();
    let whole = dir.path().join("whole");
    fs::rename(&out, &whole).unwrap();
    fourfold(merge()).succeeded();
    assert!(files(&out) == files(&whole), "not the bytes of an uninterrupted merge");
}

#[test]
fn training_goes_on_only_from_the_same_base_and_teacher() {
    let dir = folder();
    let [base, teacher] = ["base", "teacher"].map(|name| dir.path().join(name));
    model(&base);
    model(&teacher);
    let mut deeper = config();
    deeper["num_hidden_layers"] = json!(3);
    fs::write(teacher.join("config.json"), deeper.to_string()).unwrap();
    fs::write(teacher.join("model.safetensors"), weights(&deeper)).unwrap();
    let teacher_name = teacher.display().to_string();
    for (output, more, changed) in [
        ("tuned", vec![], &base),
        ("lora", vec!["--lora-rank", "2"], &base),
        ("taught", vec!["--teacher", &teacher_name], &teacher),
    ] {
        let more = [&more[..], &["--steps", "4"]].concat();
        fourfold(train_on(dir.path(), &base, output, &more)).json();
        let resumed = || {
            let mut list = train_on(
                dir.path(),
                &base,
                output,
                &[&more[..2 * usize::from(more.len() > 2)], &["--steps", "6"]].concat(),
            );
            list.push("--resume".into());
            fourfold(list)
        };
        let file = changed.join("model.safetensors");
        let whole = fs::read(&file).unwrap();
        change(&file);
        let run = resumed();
        assert!(run.error().contains("has another content"), "{output}: {}", run.stderr);
        fs::write(&file, whole).unwrap();
        assert_eq!(resumed().json()["steps"], 6, "{output}");
    }
}

/// Versions before wrote and replaced beside the output.
#[test]
fn what_earlier_versions_left_is_restored_or_goes() {
    let dir = folder();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    model(&source);
    let compress = |more: &[&str]| {
        let mut list = args!["compress", &source, &out, "--bits", "4"].to_vec();
        list.extend(more.iter().map(OsString::from));
        fourfold(list)
    };
    compress(&[]).succeeded();
    let before = files(&out);
    // Killed while it replaced OUT: the old one comes back.
    let aside = dir.path().join("out.replaced-4711");
    fs::rename(&out, &aside).unwrap();
    assert!(compress(&[]).error().contains("exists"));
    assert!(files(&out) == before && !aside.exists());
    // Killed after that: the old one goes. A journal in OUT goes too.
    fs::create_dir(&aside).unwrap();
    for (name, bytes) in &before {
        fs::write(aside.join(name), bytes).unwrap();
    }
    fs::write(out.join("fourfold-journal.jsonl"), "{\"plan\": \"0\"}\n").unwrap();
    compress(&["--overwrite"]).succeeded();
    assert!(files(&out) == before && !aside.exists());
    // What holds anything else stays.
    fs::create_dir(&aside).unwrap();
    fs::write(aside.join("letter"), "dear").unwrap();
    compress(&["--overwrite"]).succeeded();
    assert_eq!(fs::read_to_string(aside.join("letter")).unwrap(), "dear");

    let run = dir.path().join("run");
    fourfold(train(dir.path(), "run", &["--steps", "6"])).json();
    let unfinished = run.join("checkpoint-9.tmp");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("model.safetensors"), "begun").unwrap();
    // Half of it was deleted when the run was killed.
    let half = run.join("checkpoint-30");
    fs::create_dir(&half).unwrap();
    fs::copy(run.join("checkpoint-6/trainer_state.json"), half.join("trainer_state.json")).unwrap();
    let mut list = train(dir.path(), "run", &["--steps", "8"]);
    list.push("--resume".into());
    let report = fourfold(list);
    assert_eq!(report.json()["steps"], 8);
    assert!(report.stderr.contains("checkpoint-30"), "{}", report.stderr);
    assert!(!unfinished.exists() && !half.exists() && run.join("checkpoint-30.damaged").is_dir());
}

/// The second Ctrl-C ends a run at once, also where an evaluation is owed. What the run that goes on writes is what an undisturbed one writes,
/// to the last bit of the best loss.
#[cfg(unix)]
#[test]
fn two_interrupts_lose_no_evaluation() {
    let dir = folder();
    let steps = ["--steps", "24", "--eval-every", "2"];
    fourfold(train(dir.path(), "whole", &steps)).json();
    let whole = dir.path().join("whole");
    for lines in [4, 6, 9, 12] {
        let run = dir.path().join("run");
        let _ = fs::remove_dir_all(&run);
        let mut child =
            command(train(dir.path(), "run", &steps)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let written = || fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        let begun = Instant::now();
        while written() < lines && begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        for _ in 0..2 {
            let _ =
                Command::new("kill").args(["-INT", &child.id().to_string()]).stderr(Stdio::null()).status().unwrap();
        }
        child.wait().unwrap();
        let mut list = train(dir.path(), "run", &steps);
        list.push("--resume".into());
        fourfold(list).json();
        for name in ["best", "final", "checkpoint-24"] {
            let (found, expected) = (files(&run.join(name)), files(&whole.join(name)));
            for (file, bytes) in &expected {
                assert!(found.get(file) == Some(bytes), "{lines} lines: {name}/{} differs", file.display());
            }
        }
    }
}
