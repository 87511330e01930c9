//! The commands on a tiny model: what a user does, in order.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

use common::{command, config, folder, fourfold, fourfold_with_input, model, text, weights};
use serde_json::json;

#[test]
fn inspect_adds_up() {
    let dir = folder();
    model(dir.path());
    let report = fourfold(args!["inspect", dir.path(), "--json", "--context", "100", "--batch", "3"]).json();
    assert_eq!(report["architecture"], "llama");
    // Embedding, two blocks of q, k, v, o, three MLP matrices and two norms, the final norm.
    let block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64;
    let parameters = 260 * 64 + 2 * block + 64;
    assert_eq!(report["parameters"], parameters);
    assert_eq!(report["weight_bytes"], parameters * 2);
    assert_eq!(report["bits_per_parameter"], 16.0);
    for groups in ["by_storage", "by_role", "by_layer"] {
        let sum: u64 = report[groups].as_array().unwrap().iter().map(|g| g["bytes"].as_u64().unwrap()).sum();
        assert_eq!(sum, parameters * 2, "{groups}");
    }
    // Keys and values of two heads of 16, f16, two blocks.
    assert_eq!(report["kv_bytes_per_token"], 2 * 32 * 2 * 2);
    assert_eq!(report["run"]["kv_cache"], 256 * 100 * 3);
    let train = report["train"].as_array().unwrap();
    assert!(train[1]["total"].as_u64() < train[0]["total"].as_u64());
    // A configuration alone says the same of its bytes, and what running takes is no less than what it takes.
    let described = fourfold(args!["inspect", dir.path().join("config.json"), "--json"]).json();
    assert_eq!((&described["weight_bytes"], &described["by_role"]), (&report["weight_bytes"], &report["by_role"]));
    let run = fourfold(args!["generate", dir.path(), "-p", "the", "-n", "8", "-c", "100", "--json"]).json();
    let planned = described["run"]["total"].as_f64().unwrap();
    assert!(run["peak_memory"].as_f64().is_none_or(|peak| planned > 0.98 * peak), "{planned} {run}");
    let words = fourfold(args!["inspect", dir.path(), "--tensors"]);
    assert!(words.stdout.contains("model.layers.1.mlp.down_proj.weight") && words.stdout.contains("blocks 0–1, each"));
}

#[test]
fn a_quarter_of_the_bytes_runs_and_is_measured() {
    let dir = folder();
    let (source, out) = (dir.path().join("source"), dir.path().join("small"));
    model(&source);
    let (calibration, test) = (text(dir.path(), 3000), text(dir.path(), 2000));
    let done = fourfold(args![
        "compress",
        &source,
        &out,
        "--ratio",
        "3.5",
        "--calibration",
        &calibration,
        "--calibration-length",
        "64",
        "--calibration-samples",
        "16",
        "--json"
    ])
    .json();
    assert!(done["ratio"].as_f64().unwrap() >= 3.5, "{done}");
    let files: u64 = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"))
        .map(|e| e.metadata().unwrap().len())
        .sum();
    let source_file = fs::metadata(source.join("model.safetensors")).unwrap().len();
    assert!(files as f64 <= source_file as f64 / 3.5, "{files} of {source_file} bytes");
    assert!(out.join("tokenizer.json").is_file() && out.join("config.json").is_file());

    let eval = ["--context", "64", "--json"];
    let original = fourfold(args!["eval", &source, "--text", &test].iter().chain(&eval.map(Into::into))).json();
    let itself =
        fourfold(args!["eval", &source, "--against", &source, "--text", &test].iter().chain(&eval.map(Into::into)))
            .json();
    assert_eq!(itself["divergence"]["mean_kld"], 0.0);
    assert_eq!(itself["divergence"]["top1_agreement"], 1.0);
    let small =
        fourfold(args!["eval", &out, "--against", &source, "--text", &test].iter().chain(&eval.map(Into::into))).json();
    let kld = small["divergence"]["mean_kld"].as_f64().unwrap();
    assert!(kld > 1e-5 && kld < 1.0, "{kld}");
    assert_eq!(small["original"]["perplexity"], original["perplexity"]);

    // The control: two bits, nothing minimised. The evaluation must tell.
    let rough = dir.path().join("rough");
    fourfold(args![
        "compress",
        &source,
        &rough,
        "--bits",
        "2",
        "--group-size",
        "channel",
        "--scale-rule",
        "absmax",
        "--json"
    ])
    .json();
    let worse =
        fourfold(args!["eval", &rough, "--against", &source, "--text", &test].iter().chain(&eval.map(Into::into)))
            .json();
    assert!(worse["divergence"]["mean_kld"].as_f64().unwrap() > 3.0 * kld, "{worse} {kld}");

    let said = fourfold(args!["generate", &out, "-p", "the", "-n", "5", "--temp", "0", "--json"]).json();
    assert_eq!(said["prompt_tokens"], 2, "BOS and \"the\"");
    assert!(said["tokens"].as_u64().unwrap() <= 5);
}

#[test]
fn predictions_saved_and_dumped() {
    let dir = folder();
    model(dir.path());
    let test = text(dir.path(), 600);
    let (saved, dumped) = (dir.path().join("saved"), dir.path().join("dump.safetensors"));
    let eval = |more: &[std::ffi::OsString]| {
        let mut all = args!["eval", dir.path(), "--text", &test, "--context", "32", "--chunks", "4", "--json"].to_vec();
        all.extend_from_slice(more);
        fourfold(all)
    };
    eval(&args!["--save-logits", &saved]).json();
    let loaded = eval(&args!["--load-logits", &saved]).json();
    assert!(loaded["divergence"]["mean_kld"].as_f64().unwrap().abs() < 1e-6, "{loaded}");
    assert_eq!(loaded["divergence"]["tokens"], 4 * 15);
    let other = eval(&args!["--load-logits", &saved, "--stride", "16"]);
    assert!(other.error().contains("cannot compare"), "{}", other.stderr);

    assert_eq!(eval(&args!["--dump-logits", &dumped]).code, Some(0));
    let bytes = fs::read(&dumped).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("logits").unwrap().shape(), [4, 32, 260]);

    let sliding = eval(&args!["--stride", "16"]).json();
    assert_eq!(sliding["tokens"], 31 + 3 * 16);
}

#[test]
fn generation_repeats_itself_for_a_seed() {
    let dir = folder();
    model(dir.path());
    let run = |more: &[&str]| {
        let mut all = args!["generate", dir.path(), "-p", "the quick", "-n", "12", "--ignore-eos"].to_vec();
        // Random weights are very sure of themselves.
        all.extend(args!["--temp", "30", "--top-p", "1", "--min-p", "0"]);
        all.extend(more.iter().map(Into::into));
        fourfold(all)
    };
    let (a, b, c) = (run(&["--seed", "1"]), run(&["--seed", "1"]), run(&["--seed", "2"]));
    assert_eq!(a.code, Some(0), "{}", a.stderr);
    assert!(a.stdout.starts_with("the quick"));
    assert_eq!(a.stdout, b.stdout);
    assert_ne!(a.stdout, c.stdout);
    let report = run(&["--seed", "1", "--json"]).json();
    assert_eq!(report["sampling"]["top_k"], 20, "from generation_config.json");
    assert_eq!(report["tokens"], 12);
    assert_eq!(format!("the quick{}\n", report["text"].as_str().unwrap()), a.stdout);
    let quiet = run(&["--quiet"]);
    assert!(quiet.stderr.is_empty(), "{}", quiet.stderr);
}

#[test]
fn a_conversation_keeps_its_cache() {
    let dir = folder();
    model(dir.path());
    let chat = args!["chat", dir.path(), "-n", "4", "--temp", "0", "--system-prompt", "be brief"];
    let run = fourfold_with_input(chat.iter().chain(&args!["--json"]), "hello\nand again\n/quit\nunread\n");
    let report = run.json();
    let roles: Vec<&str> = report["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    let turns = report["turns"].as_array().unwrap();
    assert_eq!(turns[0]["reused_tokens"], 0);
    let reused = turns[1]["reused_tokens"].as_u64().unwrap();
    assert!(reused >= turns[0]["prompt_tokens"].as_u64().unwrap(), "{report}");
    let words = fourfold_with_input(&chat, "hello\n");
    assert_eq!((words.code, words.stdout.is_empty()), (Some(0), false));
}

#[test]
fn bench_reports_medians_and_bandwidth() {
    let dir = folder();
    model(dir.path());
    let report = fourfold(args!["bench", dir.path(), "-p", "16", "-n", "8", "-r", "2", "--json"]).json();
    let names: Vec<&str> = report["tests"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp16", "tg8"]);
    let stored = fourfold(args!["inspect", dir.path(), "--json"]).json();
    assert_eq!(report["bytes_per_token"], stored["weight_bytes"], "a dense tied model reads all it has");
    assert!(report["decode_share_of_bandwidth"].as_f64().unwrap() > 0.0);
}

#[test]
fn quantized_biases_are_stored_small_and_read_back() {
    let dir = folder();
    let source = dir.path().join("source");
    model(&source);
    let mut qwen = config();
    qwen["model_type"] = "qwen2".into();
    qwen["architectures"] = serde_json::json!(["Qwen2ForCausalLM"]);
    fs::write(source.join("config.json"), qwen.to_string()).unwrap();
    fs::write(source.join("model.safetensors"), weights(&qwen)).unwrap();
    let test = text(dir.path(), 2000);
    let measured = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let options = args!["compress", &source, &out, "--bits", "8", "--quiet", "--json"];
        let done = fourfold(options.into_iter().chain(more.iter().map(Into::into))).json();
        let names: Vec<String> = {
            let bytes = fs::read(out.join("model.safetensors")).unwrap();
            safetensors::SafeTensors::deserialize(&bytes).unwrap().names().into_iter().map(str::to_owned).collect()
        };
        let eval = args!["eval", &out, "--against", &source, "--text", &test, "--context", "64", "--json"];
        let kld = fourfold(eval).json()["divergence"]["mean_kld"].as_f64().unwrap();
        assert_eq!(fourfold(args!["generate", &out, "-p", "the", "-n", "2", "--quiet"]).code, Some(0));
        (done["output_bytes"].as_u64().unwrap(), names, kld)
    };
    let packed = "model.layers.0.self_attn.q_proj.bias_packed".to_owned();
    let (plain, names, without) = measured("plain", &[]);
    assert!(!names.contains(&packed));
    let (small, names, with) = measured("small", &["--quantize-biases"]);
    assert!(names.contains(&packed) && !names.contains(&"model.layers.0.self_attn.q_proj.bias".to_owned()));
    assert!(small < plain, "{small} and {plain} bytes");
    // The negative control: two bits are felt.
    let (smaller, _, coarse) = measured("smaller", &["--quantize-biases=2"]);
    assert!(smaller < small, "{smaller} and {small} bytes");
    assert!(with < 2.0 * without + 1e-4 && coarse > 2.0 * with, "divergences {without}, {with}, {coarse}");
    // What Python reads has no such biases.
    let out = dir.path().join("interchange");
    let options = ["--bits", "8", "--quantize-biases", "--format", "compressed-tensors"].map(Into::into);
    let refused = fourfold(args!["compress", &source, &out].into_iter().chain(options));
    assert!(refused.error().contains("q_proj.bias") && !out.exists(), "{}", refused.stderr);
}

#[test]
fn an_interchange_output_keeps_its_embedding_dense() {
    let dir = folder();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    model(&source);
    let options = ["--bits", "4", "--group-size", "32", "--format", "compressed-tensors"].map(Into::into);
    let run = fourfold(args!["compress", &source, &out].into_iter().chain(options));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("--calibration"), "{}", run.stderr);
    let written: serde_json::Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let quantization = &written["quantization_config"];
    assert_eq!(quantization["quant_method"], "compressed-tensors");
    assert_eq!(quantization["config_groups"]["group_0"]["targets"], serde_json::json!(["Linear"]));
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert!(tensors.tensor("model.embed_tokens.weight").is_ok());
    assert!(tensors.tensor("model.layers.0.mlp.up_proj.weight_packed").is_ok());
    // Groups that leave a rest have no words there.
    let (again, options) = (dir.path().join("again"), ["--bits", "4", "--group-size", "48"].map(Into::into));
    let refused =
        fourfold(args!["compress", &source, &again, "--format", "compressed-tensors"].into_iter().chain(options));
    assert!(refused.error().contains("groups that divide the row") && !again.exists(), "{}", refused.stderr);
}

#[test]
fn a_plan_is_written_edited_and_followed() {
    let dir = folder();
    let [source, plan, out] = ["source", "plan.json", "out"].map(|name| dir.path().join(name));
    model(&source);
    let written = fourfold(args!["compress", &source, "--ratio", "3", "--write-plan", &plan]);
    assert_eq!(written.code, Some(0), "{}", written.stderr);
    let mut edited: serde_json::Value = serde_json::from_slice(&fs::read(&plan).unwrap()).unwrap();
    for entry in edited["tensors"].as_array_mut().unwrap() {
        if entry["name"] == "model.layers.0.mlp.up_proj.weight" {
            *entry = serde_json::json!({"name": entry["name"], "method": "keep"});
        }
    }
    fs::write(&plan, edited.to_string()).unwrap();
    fourfold(args!["compress", &source, &out, "--plan", &plan, "--json"]).json();
    let report = fourfold(args!["inspect", &out, "--tensors", "--json"]).json();
    let tensors = report["tensors"].as_array().unwrap();
    let stored = |name: &str| tensors.iter().find(|t| t["name"] == name).unwrap()["storage"].clone();
    assert_eq!(stored("model.layers.0.mlp.up_proj.weight"), "BF16");
    assert_ne!(stored("model.layers.1.mlp.up_proj.weight"), "BF16");
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let dir = folder();
    model(dir.path());
    // It has left before the program starts, so that there is no race.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command(args!["generate", dir.path(), "-p", "the", "-n", "200", "--ignore-eos"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_130_after_what_was_said() {
    let dir = folder();
    model(dir.path());
    let mut child = command(args!["chat", dir.path(), "-p", "hello"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Once an answer has begun the handler is set.
    let mut answer = BufReader::new(child.stdout.take().unwrap());
    answer.fill_buf().unwrap();
    let process = child.id().to_string();
    let interrupt = || std::process::Command::new("kill").args(["-INT", &process]).status().unwrap();
    interrupt();
    // The answer is stopped and the program waits for the next line; another Ctrl-C leaves. Two that come at once may be one to it.
    let code = loop {
        std::thread::sleep(std::time::Duration::from_millis(300));
        interrupt();
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
    };
    assert_eq!(code, Some(130));
    answer.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn usage_errors_are_two() {
    for wrong in
        [&["frobnicate"][..], &["eval"], &["compress", "a", "b", "--bits", "9"], &["generate", "m", "--top-p", "2"]]
    {
        let run = fourfold(wrong);
        assert_eq!(run.code, Some(2), "{wrong:?}");
    }
    for help in [&["--help"][..], &["compress", "--help"], &["--version"]] {
        assert_eq!(fourfold(help).code, Some(0));
    }
}

/// `--activations f32` holds for a classifier too: weights in bf16 compute as the same numbers in f32.
#[test]
fn a_classifier_in_bf16_is_evaluated_in_f32_when_told_to() {
    let place = folder();
    let (narrow, wide, data) = (place.path().join("bf16"), place.path().join("f32"), place.path().join("data.tsv"));
    let lines: String = (0..24).map(|i| format!("the fox number {i} jumps over\t{}\n", i % 3)).collect();
    fs::write(&data, lines).unwrap();
    let mut config = common::config();
    config["architectures"] = json!(["LlamaForSequenceClassification"]);
    config["id2label"] = json!({"0": "0", "1": "1", "2": "2"});
    config["pad_token_id"] = json!(0);
    let stored = common::weights(&config);
    let file = safetensors::SafeTensors::deserialize(&stored).unwrap();
    let widened: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            // The upper half of an f32.
            let bytes = view.data().chunks_exact(2).flat_map(|pair| [0, 0, pair[0], pair[1]]).collect();
            (name.to_owned(), view.shape().to_vec(), bytes)
        })
        .collect();
    let views = widened.iter().map(|(name, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    let widened = safetensors::serialize(views, None).unwrap();
    for (dir, weights) in [(&narrow, &stored), (&wide, &widened)] {
        common::model(dir);
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        fs::write(dir.join("model.safetensors"), weights).unwrap();
    }
    let loss = |model: &Path, more: &[&str]| {
        let mut arguments = args!["eval", model, "--data", &data, "--json"].to_vec();
        arguments.extend(more.iter().map(|word| word.into()));
        fourfold(arguments).json()["loss"].as_f64().unwrap()
    };
    let exact = loss(&wide, &["--activations", "f32"]);
    for isa in ["portable", "avx2", "avx512"] {
        let mut arguments =
            args!["eval", &narrow, "--data", &data, "--json", "--activations", "f32", "--isa", isa].to_vec();
        arguments.extend(args!["-q"]);
        let run = fourfold(arguments);
        if run.code == Some(0) {
            let error = (run.json()["loss"].as_f64().unwrap() - exact).abs();
            assert!(error < 1e-6, "{isa}: the loss differs by {error}");
        } else {
            assert!(run.stderr.contains(isa), "{}", run.stderr);
        }
    }
    let rounded = fourfold(args!["eval", &narrow, "--data", &data, "--json", "--float-products", "int16"]);
    if rounded.code == Some(0) {
        let error = (rounded.json()["loss"].as_f64().unwrap() - exact).abs();
        assert!(error > 0.0, "rounded activations give the same bits");
    }
}
