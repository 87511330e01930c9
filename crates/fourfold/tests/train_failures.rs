//! `fourfold train` when something goes wrong: damaged checkpoints, a full disk, broken weights, data that is not what it should be.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::train::{train, train_on};
use common::{Run, folder, fourfold, model};
use serde_json::Value;

/// Every file below a directory, by path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

fn copy(from: &Path, to: &Path) {
    for (path, data) in files(from) {
        let path = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
}

fn flip_a_bit_of_the_last_byte(file: &Path) {
    let mut data = fs::read(file).unwrap();
    *data.last_mut().unwrap() ^= 1;
    fs::write(file, data).unwrap();
}

fn resumed(mut arguments: Vec<String>) -> Vec<String> {
    arguments.push("--resume".into());
    arguments
}

#[test]
fn a_damaged_checkpoint_is_named_and_an_older_one_gone_on_from() {
    let place = folder();
    let whole = place.path().join("whole");
    fourfold(train(place.path(), "whole", &[])).json();
    for (run, file, damage) in [
        ("flipped", "optimizer.safetensors", flip_a_bit_of_the_last_byte as fn(&Path)),
        ("short", "model.safetensors", |file| {
            fs::File::options().write(true).open(file).unwrap().set_len(999).unwrap()
        }),
        ("gone", "trainer_state.json", |file| fs::remove_file(file).unwrap()),
    ] {
        let output = place.path().join(run);
        copy(&whole, &output);
        fs::remove_dir_all(output.join("final")).unwrap();
        damage(&output.join("checkpoint-24").join(file));
        let again = fourfold(resumed(train(place.path(), run, &[])));
        again.json();
        assert!(
            again.stderr.contains(&format!("checkpoint-24/{file}")) && again.stderr.contains("warning"),
            "{}",
            again.stderr
        );
        for file in ["final/model.safetensors", "checkpoint-24/optimizer.safetensors"] {
            assert!(fs::read(output.join(file)).unwrap() == fs::read(whole.join(file)).unwrap(), "{run}: {file}");
        }
        // Both: there is nothing to go on from, and nothing is touched.
        damage(&output.join("checkpoint-24").join(file));
        damage(&output.join("checkpoint-21").join(file));
        let before = files(&output);
        let again = fourfold(resumed(train(place.path(), run, &[])));
        assert!(again.error().contains(&format!("checkpoint-24/{file}")), "{}", again.stderr);
        assert!(before == files(&output));
    }
    // Resuming needs the same recipe: that is no damage.
    let again = fourfold(resumed(train(place.path(), "whole", &["--preset", "eighth"])));
    assert!(again.error().contains("made with preset quarter, --seed 0"), "{}", again.stderr);
    assert!(whole.join("checkpoint-24").exists());
}

/// Runs the program where no file may grow beyond so many blocks of 512 bytes: to it, a full disk.
fn with_little_room(blocks: u32, arguments: &[String]) -> Run {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\" --threads 2");
    let program = env!("CARGO_BIN_EXE_fourfold");
    Run::of(&Command::new("sh").args(["-c", &script, program]).args(arguments).output().unwrap())
}

#[test]
#[cfg(unix)]
fn a_full_disk_leaves_what_was_there_and_says_how_to_go_on() {
    let place = folder();
    let (whole, output) = (place.path().join("whole"), place.path().join("output"));
    fourfold(train(place.path(), "whole", &[])).json();
    let arguments = resumed(train(place.path(), "output", &[]));
    let directories = |output: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        files(output).into_iter().filter(|(path, _)| path.parent() != Some(output)).collect()
    };

    // At a checkpoint.
    copy(&whole, &output);
    for gone in ["final", "checkpoint-24"] {
        fs::remove_dir_all(output.join(gone)).unwrap();
    }
    let before = directories(&output);
    let run = with_little_room(200, &arguments);
    assert!(run.error().contains("File too large") && run.error().contains("with --resume"), "{}", run.stderr);
    assert!(directories(&output) == before, "something else than before is there");

    // At the very end: the trained weights are in the checkpoint.
    fs::remove_dir_all(&output).unwrap();
    copy(&whole, &output);
    fs::remove_dir_all(output.join("final")).unwrap();
    let before = directories(&output);
    let run = with_little_room(200, &arguments);
    assert!(
        run.error().contains("the trained weights are in") && run.error().contains("checkpoint-24"),
        "{}",
        run.stderr
    );
    assert!(directories(&output) == before);
    // With room again.
    fourfold(&arguments).json();
    let weights = "final/model.safetensors";
    assert!(fs::read(output.join(weights)).unwrap() == fs::read(whole.join(weights)).unwrap());
}

#[test]
#[cfg(unix)]
fn a_disk_too_full_for_the_tokens_is_named_and_nothing_stays() {
    let place = folder();
    let run = with_little_room(1, &train(place.path(), "output", &[]));
    assert!(run.error().contains("output (a file of tokens): File too large"), "{}", run.stderr);
    assert!(!place.path().join("output").exists());
}

/// Writes `value` in place of the first number of a bf16 tensor.
fn overwrite(file: &Path, tensor: &str, value: [u8; 2]) {
    let mut data = fs::read(file).unwrap();
    let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&data[8..8 + length]).unwrap();
    let begin = 8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    data[begin..begin + 2].copy_from_slice(&value);
    fs::write(file, data).unwrap();
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let place = folder();
    let base = place.path().join("base");
    model(&base);
    fourfold(train_on(place.path(), &base, "good", &["--steps", "1"])).json();
    let tensor = "model.layers.1.mlp.up_proj.weight";
    for (name, value) in [("NaN", [0xc0, 0x7f]), ("-inf", [0x80, 0xff])] {
        overwrite(&base.join("model.safetensors"), tensor, value);
        for more in [&["--steps", "1"][..], &["--steps", "1", "--lora-rank", "2"]] {
            let run = fourfold(train_on(place.path(), &base, "bad", more));
            let expected = format!("base/model.safetensors: tensor {tensor}: element [0, ");
            assert!(run.error().contains(&expected) && run.error().contains(&format!("] is {name}")), "{}", run.stderr);
            assert!(!place.path().join("bad/final").exists());
        }
    }
}

#[test]
fn an_exploding_loss_ends_with_the_last_good_checkpoint() {
    let place = folder();
    fourfold(train(place.path(), "out", &[])).json();
    let output = place.path().join("out");
    let before = files(&output.join("checkpoint-24"));
    let more = ["--learning-rate", "1000", "--steps", "80", "--schedule", "constant"];
    // Another rate is another run: it begins from the model, in a place of its own.
    let refused = fourfold(resumed(train(place.path(), "out", &more)));
    assert!(refused.error().contains("--learning-rate is 1000, was 0.001"), "{}", refused.stderr);
    let run = fourfold(train_on(place.path(), &output.join("checkpoint-24"), "on", &more));
    let error = run.error();
    assert!(error.contains("diverged") && error.contains("--learning-rate than 1000"), "{error}");
    assert!(files(&output.join("checkpoint-24")) == before);
    assert!(!place.path().join("on/final").exists(), "an exploded model was kept");
}

/// A model whose embeddings are zero: what the last layers get is finite, and each norm multiplies the gradient by a huge number, so that it
/// overflows on its way to the first. The loss is finite throughout.
#[test]
fn a_gradient_that_overflows_after_other_layers_were_updated() {
    let place = folder();
    let mut config = common::config();
    config["rms_norm_eps"] = 1e-37.into();
    config["num_hidden_layers"] = 4.into();
    config["tie_word_embeddings"] = false.into();
    let base = place.path().join("base");
    model(&base);
    fs::write(base.join("config.json"), config.to_string()).unwrap();
    let file = base.join("model.safetensors");
    fs::write(&file, common::weights(&config)).unwrap();
    let mut data = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&data[8..8 + length]).unwrap();
    let offsets = &header["model.embed_tokens.weight"]["data_offsets"];
    let [begin, end] = [0, 1].map(|i| 8 + length + offsets[i].as_u64().unwrap() as usize);
    data[begin..end].fill(0);
    fs::write(&file, data).unwrap();
    let arguments = |output: &str, more: &[&str]| train_on(place.path(), &base, output, more);
    // Blocks are updated one after the other: by the time it is met, the last ones have been. There is no checkpoint to go back to.
    let run = fourfold(arguments("torn", &["--preset", "quarter"]));
    let error = run.error();
    assert!(error.contains("step 1") && error.contains("not finite") && error.contains("--max-grad-norm"), "{error}");
    let left = fs::read_dir(place.path().join("torn")).unwrap();
    assert!(left.map(|e| e.unwrap().path()).all(|path| path.is_file()), "a model was written");
    // Looked at first, as without gradient release: every step is left out whole, until the run gives up.
    for more in [&["--preset", "quarter", "--max-grad-norm", "1"][..], &["--preset", "baseline"]] {
        let run = fourfold(arguments(more[1], more));
        assert!(run.error().contains("the training diverged"), "{}", run.stderr);
        let left = fs::read_dir(place.path().join(more[1])).unwrap().map(|e| e.unwrap().file_name());
        let kept = left.filter(|name| name == "final" || name.to_string_lossy().starts_with("checkpoint"));
        assert_eq!(kept.count(), 0, "a model of bad steps was written");
    }
}

#[test]
fn data_that_is_not_what_it_should_be_is_named_by_line() {
    let place = folder();
    let arguments = train(place.path(), "out", &[]);
    let data = place.path().join("text.jsonl");
    for (text, expected) in [
        ("{\"text\": \"good\"}\n{\"text\": 3}\n", "text.jsonl:2"),
        ("{\"text\": \"good\"}\n\n{\"text\": \n", "text.jsonl:3"),
        ("{\"text\": \"good\"}\n[1]\n", "text.jsonl:2: a list where a JSON object is expected"),
        ("", "text.jsonl: no row has an answer to learn"),
        ("\n   \n\t\n", "text.jsonl: no row has an answer to learn"),
        ("{\"text\": \"\"}\n", "text.jsonl: no row has an answer to learn"),
        ("{\"prompt\": \"a\", \"completion\": \"\"}\n", "text.jsonl: no row has an answer to learn"),
    ] {
        fs::write(&data, text).unwrap();
        let run = fourfold(&arguments);
        assert!(run.error().contains(expected), "{}", run.stderr);
    }
    // Bytes that are no text.
    fs::write(&data, [b'{', 0xff, b'}', b'\n']).unwrap();
    assert!(fourfold(&arguments).error().contains("text.jsonl:1"));
    // A document of many contexts is cut, not refused.
    fs::write(&data, format!("{{\"text\": \"{}\"}}\n", "the fox jumps ".repeat(200))).unwrap();
    let report = fourfold(&arguments).json();
    assert!(report["tokens"].as_u64() > Some(24 * 32), "{report}");
}

#[test]
fn classes_that_are_not_there_are_named_by_line() {
    let place = folder();
    let (base, data) = (place.path().join("base"), place.path().join("classes.tsv"));
    model(&base);
    let lines: String = (0..40).map(|i| format!("the fox number {i}\t{}\n", ["bad", "good"][i % 2])).collect();
    fs::write(&data, &lines).unwrap();
    let arguments = |from: &Path, output: &str| -> Vec<String> {
        let mut list = train_on(place.path(), from, output, &["--task", "classification", "--steps", "3"]);
        let text = place.path().join("text.jsonl").display().to_string();
        list.iter_mut().filter(|word| **word == text).for_each(|word| *word = data.display().to_string());
        list
    };
    fourfold(arguments(&base, "classifier")).json();
    let classifier = place.path().join("classifier/final");
    let report = fourfold(args!["eval", &classifier, "--data", &data, "--json"]).json();
    assert_eq!((report["texts"].as_u64(), report["classes"].as_u64()), (Some(40), Some(2)));
    let right = report["accuracy"].as_f64().unwrap() * 40.0;
    assert!((right - right.round()).abs() < 1e-9 && report["loss"].as_f64() > Some(0.0), "{report}");
    let refused = fourfold(args!["eval", &base, "--data", &data]);
    assert!(refused.error().contains("no sequence classifier"), "{}", refused.stderr);

    for (line, expected) in [
        ("the fox\tugly", "classes.tsv: line 41: the model has no class named ugly"),
        ("the fox\t2", "classes.tsv: line 41: class 2, the model has 2"),
        ("the fox", "classes.tsv:41: 1 values between tabs"),
    ] {
        fs::write(&data, format!("{lines}{line}\n")).unwrap();
        for run in [fourfold(arguments(&classifier, "more")), fourfold(args!["eval", &classifier, "--data", &data])] {
            assert!(run.error().contains(expected), "{}", run.stderr);
        }
    }
}
