//! `fourfold train` as a process: killed, interrupted, resumed.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::train::{sources, train, train_on};
use common::{command, folder, fourfold, model, until_stopped};

/// Kills a run again and again, each time after a longer part of the time that it takes, until it comes to its end.
fn killed_ends_as_uninterrupted(arguments: &dyn Fn(&Path, &str) -> Vec<String>, weights: &str) {
    let place = folder();
    let at = |run: &str| place.path().join(run);
    let to_the_whole = arguments(place.path(), "whole");
    let begun = Instant::now();
    let report = fourfold(to_the_whole).json();
    let whole = begun.elapsed();
    assert!(report["peak_memory"].as_u64() > Some(0) && report["predicted_memory"].as_u64() > Some(0));
    let mut arguments = arguments(place.path(), "killed");
    arguments.push("--resume".into());
    until_stopped(|attempt| {
        let _ = fs::remove_dir_all(at("killed"));
        let (mut kills, mut with_checkpoints) = (0, 0);
        for round in 1.. {
            let mut child = command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(whole * round / (5 + attempt));
            // SIGKILL: the program has no say. Nothing happens to one that has ended.
            child.kill().unwrap();
            let status = child.wait().unwrap();
            if status.success() {
                break;
            }
            assert_eq!(status.code(), None, "a run failed by itself after {kills} kills");
            kills += 1;
            let begins = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("checkpoint-");
            let saved = fs::read_dir(at("killed")).is_ok_and(|entries| entries.flatten().any(|e| begins(&e)));
            with_checkpoints += u32::from(saved);
        }
        for file in [&format!("final/{weights}"), &format!("best/{weights}"), "checkpoint-24/optimizer.safetensors"] {
            let of = |run: &str| fs::read(at(run).join(file)).unwrap();
            assert!(of("whole") == of("killed"), "{file} differs after {kills} kills");
        }
        with_checkpoints > 0
    });
}

#[test]
fn killed_and_resumed_ends_with_the_bytes_of_an_uninterrupted_run() {
    killed_ends_as_uninterrupted(&|place, output| train(place, output, &["--preset", "quarter"]), "model.safetensors");
}

#[test]
fn killed_and_resumed_with_int8_weights_and_accumulation() {
    let recipe = ["--preset", "eighth", "--weights", "int8", "--gradient-accumulation", "2"];
    killed_ends_as_uninterrupted(&|place, output| train(place, output, &recipe), "model.safetensors");
}

#[test]
fn killed_and_resumed_adapters_of_a_packed_model() {
    let of = |place: &Path, output: &str| {
        let (base, packed) = (place.join("base"), place.join("packed"));
        if !packed.exists() {
            model(&base);
            fourfold(args!["compress", &base, &packed, "--bits", "4", "--method", "rtn", "--json"]).json();
        }
        train_on(place, &packed, output, &["--lora-rank", "4", "--lora-dropout", "0.25"])
    };
    killed_ends_as_uninterrupted(&of, "adapter_model.safetensors");
}

#[test]
fn killed_and_resumed_scales_of_a_packed_model_under_a_teacher() {
    let of = |place: &Path, output: &str| {
        let (base, packed) = packed_model(place);
        let teacher = base.display().to_string();
        train_on(place, &packed, output, &["--trainable", "scales", "--teacher", &teacher])
    };
    killed_ends_as_uninterrupted(&of, "model.safetensors");
}

/// A model, and the same in three bits.
fn packed_model(place: &Path) -> (PathBuf, PathBuf) {
    let (base, packed) = (place.join("base"), place.join("packed"));
    if !packed.exists() {
        model(&base);
        fourfold(args!["compress", &base, &packed, "--bits", "3", "--method", "rtn", "--json"]).json();
    }
    (base, packed)
}

/// What is written has the form and the bytes of what was read, and is nearer to the teacher; other vocabularies, tokenizers and
/// objectives are refused.
#[test]
fn recovered_scales_are_nearer_to_the_teacher_in_the_same_bytes() {
    let place = folder();
    let (base, packed) = packed_model(place.path());
    let text = common::text(place.path(), 600);
    let teacher = base.display().to_string();
    let mut arguments =
        train_on(place.path(), &packed, "out", &["--trainable", "scales", "--teacher", &teacher, "--steps", "150"]);
    // Of the same kind as the text it is measured on.
    arguments.extend(["--learning-rate", "3e-3", "--data"].map(Into::into));
    arguments.push(common::text(place.path(), 4000).display().to_string());
    let report = fourfold(arguments.clone()).json();
    assert!(report["loss"].as_str().unwrap().starts_with("KL"), "{report}");
    assert!(report["held_out_cross_entropy"].as_f64() > report["held_out_loss"].as_f64());
    let done = place.path().join("out/final");
    let divergence = |model: &Path| {
        let report =
            fourfold(args!["eval", model, "--text", &text, "--context", "64", "--against", &base, "--json"]).json();
        report["divergence"]["mean_kld"].as_f64().unwrap()
    };
    let (before, after) = (divergence(&packed), divergence(&done));
    assert!(after < 0.9 * before, "{before} to {after}");
    let bytes = |dir: &Path| fourfold(args!["inspect", dir, "--json"]).json()["weight_bytes"].as_u64().unwrap();
    assert_eq!(bytes(&packed), bytes(&done));
    let config = |dir: &Path| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(config(&packed), config(&done));
    assert!(!done.join("packed").exists() && !done.join("tuning.safetensors").exists());
    let metrics = fs::read_to_string(place.path().join("out/metrics.jsonl")).unwrap();
    assert!(metrics.contains("eval/cross_entropy") && metrics.contains("KL(teacher || model)"), "{metrics}");

    // Another objective does not go on from here.
    let other = train_on(place.path(), &packed, "out", &["--trainable", "scales", "--resume"]);
    let refused = fourfold(other);
    let error = refused.error();
    assert!(error.contains("teacher") && error.contains("scales and norms of model"), "{error}");
    // A teacher whose tokenizer numbers tokens otherwise.
    let foreign = place.path().join("foreign");
    model(&foreign);
    let tokenizer = fs::read_to_string(foreign.join("tokenizer.json")).unwrap();
    fs::write(foreign.join("tokenizer.json"), tokenizer.replace("\"the\"", "\"tha\"").replace("th e", "th a")).unwrap();
    let with = |teacher: &Path| {
        let teacher = teacher.display().to_string();
        let more = ["--trainable", "scales", "--teacher", &teacher];
        fourfold(train_on(place.path(), &packed, "other", &more)).error().to_owned()
    };
    let error = with(&foreign);
    assert!(error.contains("tokenizer") && error.contains("\"tha\""), "{error}");
    let refused = fourfold(train_on(place.path(), &base, "other", &["--trainable", "scales"]));
    let error = refused.error();
    assert!(error.contains("no quantized weights"), "{error}");
}

/// Interrupted runs end with 130, in the middle of evaluations and saves too, and go on to what an uninterrupted run gives.
#[test]
fn ctrl_c_at_any_moment_loses_nothing() {
    let place = folder();
    let often = ["--eval-every", "1", "--save-every", "1", "--held-out", "0.5"];
    fourfold(train(place.path(), "whole", &often)).json();
    let mut arguments = train(place.path(), "stopped", &often);
    arguments.push("--resume".into());
    until_stopped(|_| {
        let _ = fs::remove_dir_all(place.path().join("stopped"));
        let mut stops = 0;
        for round in 0.. {
            let mut child = command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // Once the run has begun, some further milliseconds each time.
            let metrics = place.path().join("stopped/metrics.jsonl");
            let written = || fs::metadata(&metrics).map_or(0, |m| m.len());
            let before = written();
            while written() <= before && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(round % 9));
            std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
            let code = child.wait().unwrap().code();
            stops += usize::from(code == Some(130));
            assert!(code == Some(130) || code == Some(0), "{code:?}");
            let names = fs::read_dir(place.path().join("stopped")).unwrap().map(|e| e.unwrap().file_name());
            let unfinished =
                names.filter(|n| [".tmp", ".new", ".old"].iter().any(|e| n.to_string_lossy().ends_with(e)));
            assert_eq!(unfinished.count(), 0);
            if code == Some(0) {
                break;
            }
        }
        for file in ["final/model.safetensors", "best/model.safetensors", "checkpoint-24/optimizer.safetensors"] {
            let of = |run: &str| fs::read(place.path().join(run).join(file)).unwrap();
            assert!(of("whole") == of("stopped"), "{file} differs after {stops} interruptions");
        }
        stops > 2
    });
}

/// A merged model predicts as the model with its adapter on it, whether dense or packed; the model alone does not.
#[test]
fn a_merged_adapter_is_the_adapter() {
    let place = folder();
    let (base, packed) = (place.path().join("base"), place.path().join("packed"));
    model(&base);
    fourfold(args!["compress", &base, &packed, "--bits", "4", "--method", "rtn", "--json"]).json();
    let text = common::text(place.path(), 600);
    let loss = |model: &Path, more: &[&str]| {
        let mut arguments = args!["eval", model, "--text", &text, "--context", "64", "--json"].to_vec();
        arguments.extend(more.iter().map(|word| word.into()));
        fourfold(arguments).json()["perplexity"].as_f64().unwrap().ln()
    };
    // What a merge may change, as a part of what the adapter changes.
    for (name, base, how, part) in
        [("dense", &base, "sum", 0.1), ("sum", &packed, "sum", 0.1), ("rounded", &packed, "requantize", 1.0)]
    {
        let output = format!("adapter-{name}");
        fourfold(train_on(place.path(), base, &output, &["--lora-rank", "4", "--learning-rate", "0.02"])).json();
        let (adapter, out) = (place.path().join(output).join("final"), place.path().join(name));
        let report = fourfold(args!["merge", base, &adapter, &out, "--packed", how, "--json"]).json();
        assert_eq!(report["merged"], 14);
        assert_eq!(report["requantized"], if how == "requantize" { 14 } else { 0 });
        let with_adapter = loss(base, &["--adapter", &adapter.display().to_string()]);
        let (alone, merged) = (loss(base, &[]), loss(&out, &[]));
        let (effect, change) = ((alone - with_adapter).abs(), (merged - with_adapter).abs());
        assert!(
            effect > 0.01 && change < part * effect,
            "{name}: {merged}, with the adapter {with_adapter}, {alone} without"
        );
        let again = fourfold(args!["merge", base, &adapter, &out]);
        assert!(again.error().contains(name), "{}", again.stderr);
    }
}

#[test]
fn dropout_of_adapters_is_part_of_the_run() {
    let place = folder();
    let base = place.path().join("base");
    model(&base);
    let run = |output: &str, more: &[&str]| {
        fourfold(train_on(place.path(), &base, output, &[&["--steps", "3", "--lora-rank", "4"], more].concat()))
    };
    let weights = |output: &str| fs::read(place.path().join(output).join("final/adapter_model.safetensors")).unwrap();
    run("none", &[]).json();
    run("zero", &["--lora-dropout", "0"]).json();
    run("some", &["--lora-dropout", "0.3"]).json();
    assert!(weights("none") == weights("zero") && weights("none") != weights("some"));
    let config = fs::read_to_string(place.path().join("some/final/adapter_config.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&config).unwrap()["lora_dropout"], 0.3);
    let other = run("some", &["--lora-dropout", "0.1", "--resume"]);
    assert!(other.error().contains("--lora-dropout"), "{}", other.stderr);
    assert_eq!(run("wrong", &["--lora-dropout", "1"]).code, Some(2));
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
    // Running it, from as it is down: the smaller the weights, the less of all.
    let run = report["run"].as_array().unwrap();
    let of = |size: &serde_json::Value, part: &str| size[part].as_u64().unwrap();
    assert!(run.len() > 5 && run[0]["bits"].is_null());
    for pair in run.windows(2) {
        assert!(["weights", "total"].iter().all(|part| of(&pair[0], part) > of(&pair[1], part)), "{pair:?}");
    }
    assert!(run.iter().all(|size| of(size, "weights") + of(size, "kv_cache") + of(size, "rest") == of(size, "total")));
    // What is advised fits: here as it is, and in less only when it has been made smaller.
    let advised = |memory: u64| {
        let report = fourfold(["plan", &config, "--memory", &format!("{memory}B"), "--json"]).json();
        for advice in report["advice"].as_array().unwrap() {
            assert!(of(advice, "total") <= memory, "{advice}");
        }
        report["advice"][0]["commands"].clone()
    };
    assert_eq!(advised(100_000_000).as_array().unwrap().len(), 1);
    assert_eq!(advised(of(&run[0], "total")).as_array().unwrap().len(), 1);
    let made = advised(of(&run[0], "total") - 1);
    assert!(made[0].as_str().unwrap().starts_with("fourfold compress MODEL OUT --bits 8.0"), "{made}");
    let asked = fourfold(["plan", &config, "--ratio", "4", "--json"]).json();
    assert_eq!(of(&asked["run"][1], "weights"), of(&run[0], "weights") / 4);
    let run = fourfold(["plan", &config, "--memory", "1MB"]);
    assert!(run.error().contains("running it at 2.0 bits"), "{}", run.stderr);
    assert!(run.error().contains("nothing fits into 1.0 MB"), "{}", run.stderr);
}
