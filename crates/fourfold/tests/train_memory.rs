//! The memory of `fourfold train`: what is predicted is what is taken, and a run that will not fit does not begin.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::train::{sources, train};
use common::{config, folder, fourfold};
use serde_json::{Value, json};

/// Writes a configuration with these changes beside the others.
fn changed(place: &Path, changes: Value) -> PathBuf {
    let mut config = config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let file = place.join("changed.json");
    fs::write(&file, config.to_string()).unwrap();
    file
}

/// Arguments of a run of the configuration in `file`.
fn arguments(place: &Path, file: &Path, output: &str, more: &[&str]) -> Vec<String> {
    let mut arguments = train(place, output, more);
    let at = arguments.iter().position(|a| a == "--model-config").unwrap();
    arguments[at + 1] = file.display().to_string();
    arguments
}

/// 7.2 M parameters, large beside what the program itself takes, and a tokenizer of usual size.
#[test]
fn the_predicted_peak_is_the_measured_one_within_a_tenth() {
    let place = folder();
    let size = json!({
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "max_position_embeddings": 128,
    });
    let file = changed(place.path(), size);
    for preset in ["baseline", "quarter"] {
        let few = ["--preset", preset, "--steps", "2", "--batch-size", "8", "--save-every", "0"];
        let mut arguments = arguments(place.path(), &file, preset, &few);
        let at = arguments.iter().position(|a| a == "--tokenizer").unwrap();
        arguments[at + 1] = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tokenizer.json").to_owned();
        let report = fourfold(arguments).json();
        let [predicted, measured] =
            ["predicted_memory", "peak_memory"].map(|name| report[name].as_u64().unwrap() as f64);
        assert!((predicted / measured - 1.0).abs() < 0.1, "{preset}: predicted {predicted}, measured {measured}");
    }
}

#[test]
fn a_run_that_will_not_fit_is_refused_before_anything_is_allocated() {
    let place = folder();
    let size = json!({ "hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 64 });
    let file = changed(place.path(), size);
    let run = fourfold(arguments(place.path(), &file, "output", &["--preset", "baseline"]));
    for part in ["the run would take", "TB", "of memory are available", "no preset fits", "--no-memory-check"] {
        assert!(run.error().contains(part), "{part}: {}", run.stderr);
    }
    assert!(!place.path().join("output").exists());
}

#[test]
fn plan_knows_adapters() {
    let place = folder();
    let [config, ..] = sources(place.path());
    let plan = |more: &[&str]| {
        let mut arguments = vec!["plan".to_owned(), config.display().to_string(), "--json".to_owned()];
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        fourfold(arguments)
    };
    let quarter = |report: &Value| -> Value {
        report["rows"].as_array().unwrap().iter().find(|r| r["preset"] == "quarter").unwrap().clone()
    };
    let (all, some) =
        (plan(&["--lora-rank", "4"]).json(), plan(&["--lora-rank", "4", "--lora-targets", "q_proj"]).json());
    // 2 blocks of q_proj [64, 64]: A and B of 256 elements each, two f32 moments an element.
    assert_eq!(quarter(&some)["optimizer"], 2 * 512 * 8);
    assert!(quarter(&all)["optimizer"].as_u64() > quarter(&some)["optimizer"].as_u64());
    assert!(quarter(&all)["optimizer"].as_u64() < quarter(&plan(&[]).json())["optimizer"].as_u64());
    assert!(plan(&["--lora-rank", "4", "--lora-targets", "nothing"]).error().contains("no such layer"));
}

/// Writes `count` images of 28 x 28 pixels of ten classes as idx files.
fn images(place: &Path, count: u32) -> PathBuf {
    let folder = place.join("images");
    fs::create_dir(&folder).unwrap();
    let idx = |sizes: &[u32], bytes: Vec<u8>| {
        let mut file = vec![0, 0, 8, sizes.len() as u8];
        sizes.iter().for_each(|size| file.extend(size.to_be_bytes()));
        file.extend(bytes);
        file
    };
    let pixels = (0..count * 784).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(folder.join("train-images-idx3-ubyte"), idx(&[count, 28, 28], pixels)).unwrap();
    let labels = (0..count).map(|i| (i % 10) as u8).collect();
    fs::write(folder.join("train-labels-idx1-ubyte"), idx(&[count], labels)).unwrap();
    folder
}

#[test]
fn the_peak_of_a_convolutional_network_is_predicted_too() {
    let place = folder();
    let images = images(place.path(), 400).display().to_string();
    let network = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/fashion-mnist-wide.json");
    let plan_of = |network: &str| fourfold(["plan", network, "--batch-size", "128", "--json"]).json();
    let plan = plan_of(network);
    assert!(plan["context"].is_null());
    let residual = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/fashion-mnist.json");
    for (network, plan) in [(network, &plan), (residual, &plan_of(residual))] {
        for preset in ["baseline", "quarter", "eighth"] {
            let output = place.path().join("run");
            let begin = ["train", "--model-config", network, "--data", &images, "--output", output.to_str().unwrap()];
            let few = ["--preset", preset, "--steps", "2", "--batch-size", "128", "--save-every", "0", "--json"];
            let report = fourfold(begin.iter().chain(&few)).json();
            fs::remove_dir_all(&output).unwrap();
            let number = |name: &str| report[name].as_u64().unwrap();
            let [predicted, measured] = ["predicted_memory", "peak_memory"].map(|name| number(name) as f64);
            let of = predicted / measured;
            assert!((of - 1.0).abs() < 0.07, "{network}, {preset}: predicted {predicted}, measured {measured}");
            let row = plan["rows"].as_array().unwrap().iter().find(|row| row["preset"] == preset).unwrap();
            assert_eq!((&row["weights"], &row["optimizer"]), (&report["weight_bytes"], &report["optimizer_bytes"]));
        }
    }
    for option in ["--batch-size", "--gradient-accumulation"] {
        let run = fourfold(["plan", network, option, "18446744073709551615"]);
        assert!(run.code == Some(2) && run.stderr.contains("from 1 to 65536 is expected"), "{}", run.stderr);
    }
    // The largest batch that fits, and no larger one.
    let choice = |memory: u64| {
        let (memory, most) = (memory.to_string(), "4096");
        fourfold(["plan", network, "--memory", &memory, "--batch-size", most, "--json"]).json()["choice"].clone()
    };
    let of_128 = plan["rows"][0]["total"].as_u64().unwrap();
    assert_eq!((choice(of_128)[0].as_str(), choice(of_128)[1].as_u64()), (Some("baseline"), Some(128)));
    assert_ne!(choice(of_128 - 1)[1], 128);
    assert!(fourfold(["plan", network, "--memory", "20MB"]).error().contains("`eighth` with one image takes"));
}

#[test]
fn a_convolutional_network_that_will_not_fit_is_refused() {
    let place = folder();
    let images = images(place.path(), 400).display().to_string();
    let wide = json!({ "type": "conv2d", "out_channels": 65535, "kernel_size": 3, "padding": 1 });
    let network = |convolutions: &[&Value]| {
        let head = [
            json!({ "type": "adaptive_avg_pool", "output_size": 1 }),
            json!({ "type": "flatten" }),
            json!({ "type": "linear", "out_features": 10 }),
        ];
        let layers: Vec<&Value> = convolutions.iter().copied().chain(&head).collect();
        json!({ "architectures": ["ConvNet"], "model_type": "convnet", "image_size": [1, 28, 28], "layers": layers })
    };
    let (file, output) = (place.path().join("wide.json"), place.path().join("run"));
    // One feature map of 300 images takes 62 GB; the weight between two takes 155 GB, and is not made.
    for (layers, batch, advice) in [(vec![&wide], "300", "--batch-size"), (vec![&wide, &wide], "1", "no preset fits")] {
        fs::write(&file, network(&layers).to_string()).unwrap();
        let [network, output] = [&file, &output].map(|path| path.to_str().unwrap());
        let begin = ["train", "--model-config", network, "--data", &images, "--output", output, "--preset", "baseline"];
        let run = fourfold(begin.iter().chain(&["--batch-size", batch, "--steps", "1"]));
        for part in ["the run would take", "of memory are available", advice, "--no-memory-check"] {
            assert!(run.error().contains(part), "{part}: {}", run.stderr);
        }
        assert!(!place.path().join("run").exists());
    }
}
