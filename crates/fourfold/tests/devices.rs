//! `--device`: what is listed, what runs where, and what is said where it cannot.

mod common;

use common::{folder, fourfold, model};

#[test]
fn the_processor_is_listed_first_and_cards_say_what_they_run() {
    let report = fourfold(args!["devices", "--json"]).json();
    let devices = report["devices"].as_array().unwrap();
    assert_eq!((&devices[0]["device"], &devices[0]["commands"][0]), (&"cpu".into(), &"all".into()));
    for (i, device) in devices[1..].iter().enumerate() {
        assert_eq!(device["device"], format!("gpu:{i}"));
        assert!(device["name"].is_string() && device["driver"].is_string() && device["missing"].is_array());
    }
    let words = fourfold(args!["devices"]);
    assert!(words.stdout.contains("cpu"), "{}", words.stdout);
}

#[test]
fn what_computes_on_the_cpu_refuses_a_card_and_a_card_that_is_not_there_is_named() {
    let dir = folder();
    model(dir.path());
    let out = dir.path().join("out");
    let refused = fourfold(args!["compress", dir.path(), &out, "--ratio", "4", "--device", "gpu"]);
    assert!(refused.stderr.contains("compress computes on the CPU"), "{}", refused.stderr);
    assert!(!out.exists());
    let absent = fourfold(args!["generate", dir.path(), "-p", "a", "-n", "1", "--device", "gpu:99"]);
    assert!(absent.stderr.contains("there is no gpu:99"), "{}", absent.stderr);
    let unknown = fourfold(args!["generate", dir.path(), "-p", "a", "-n", "1", "--device", "cuda"]);
    assert!(unknown.stderr.contains("auto, cpu, gpu or gpu:NUMBER"), "{}", unknown.stderr);
}

/// Greedy text and perplexity on the device are the processor's. Skipped, and said, where there is none.
#[test]
fn a_card_gives_the_processors_text_and_perplexity() {
    let devices = fourfold(args!["devices", "--json"]).json();
    let there = devices["devices"].as_array().unwrap().len() > 1;
    if !there {
        assert!(std::env::var("FOURFOLD_GPU").as_deref() != Ok("required"), "no device");
        eprintln!("skipped: no device");
        return;
    }
    let dir = folder();
    model(dir.path());
    let text = common::text(dir.path(), 1500);
    let generate = |device: &str| {
        let all = args![
            "generate",
            dir.path(),
            "--json",
            "-p",
            "the thin",
            "-n",
            "40",
            "--temp",
            "0",
            "--ignore-eos",
            "--activations",
            "f32",
            "--device",
            device
        ];
        fourfold(all).json()
    };
    let (cpu, gpu) = (generate("cpu"), generate("gpu"));
    assert_eq!(cpu["text"], gpu["text"]);
    assert!(cpu.get("device").is_none());
    let (peak, weights) = (gpu["device"]["peak_memory"].as_u64().unwrap(), gpu["weight_bytes"].as_u64().unwrap());
    assert!(peak >= weights && peak <= weights + gpu["kv_bytes"].as_u64().unwrap() + (64 << 20), "{gpu}");
    let eval = |device: &str| {
        let all = args![
            "eval",
            dir.path(),
            "--text",
            &text,
            "--context",
            "64",
            "--chunks",
            "4",
            "--json",
            "--activations",
            "f32",
            "--device",
            device
        ];
        fourfold(all).json()["perplexity"].as_f64().unwrap()
    };
    let (on_cpu, on_gpu) = (eval("cpu"), eval("gpu"));
    assert!((on_cpu / on_gpu - 1.0).abs() < 1e-4, "{on_cpu} and {on_gpu}");
    let small =
        fourfold(args!["generate", dir.path(), "-p", "a", "-n", "1", "--device", "gpu", "--device-memory", "100kB"]);
    assert!(small.stderr.contains("out of memory on"), "{}", small.stderr);
}
