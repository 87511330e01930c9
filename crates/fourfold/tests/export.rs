//! `export`, and `compress` into GGUF: what is written is read back as the same model.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{config, folder, fourfold, model, text, tokenizer, weights};
use fourfold_formats::open;
use fourfold_models::{AttentionKind, ModelSpec, spec_from_config};
use fourfold_tensor::BlockType;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fourfold-models/tests/golden").join(name)
}

/// A tiny model whose rows divide by 256.
fn wide(dir: &Path) -> Value {
    let mut config = config();
    config["hidden_size"] = json!(256);
    config["intermediate_size"] = json!(512);
    config["head_dim"] = json!(64);
    model(dir);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), weights(&config)).unwrap();
    config
}

/// A specification without what an f32 of the metadata rounds.
fn rounded(mut spec: ModelSpec) -> ModelSpec {
    for block in &mut spec.blocks {
        if let AttentionKind::Mla(mla) = &mut block.attention {
            mla.scale = (mla.scale * 1e5).round();
        }
    }
    spec
}

#[test]
fn every_architecture_is_the_same_model_in_gguf() {
    let names = [
        "llama_gqa_tied",
        "llama_bias_linear",
        "llama_rope_llama3",
        "qwen2",
        "qwen3",
        "deepseek_v2_moe",
        "deepseek_v2_dense_qlora",
        "deepseek_v3_dense",
    ];
    for name in names {
        let dir = folder();
        let out = dir.path().join("out.gguf");
        fourfold(args!["export", golden(name), &out, "--type", "f32", "--quiet"]).succeeded();
        let (before, after) = (open(&golden(name)).unwrap(), open(&out).unwrap());
        let spec = spec_from_config(&before.config).unwrap();
        let found = spec_from_config(&after.config).unwrap();
        if name == "llama_rope_llama3" {
            // The file holds factors, of which a context of 16 tokens is not guessed again.
            let pairs = |spec: &ModelSpec| spec.blocks[0].rotary().frequencies();
            for (a, b) in pairs(&spec).iter().zip(pairs(&found)) {
                assert!((a - b).abs() <= 1e-6 * a, "{a} {b}");
            }
        } else {
            assert_eq!(rounded(found), rounded(spec.clone()), "{name}");
        }
        for weight in spec.weights() {
            let values = |source: &fourfold_formats::Checkpoint| source.weights.load(&weight.name).unwrap().to_f32();
            assert!(values(&before) == values(&after), "{name}: {}", weight.name);
        }
    }
}

#[test]
fn what_llama_cpp_does_not_compute_is_refused_by_name() {
    let dir = folder();
    let out = dir.path().join("out.gguf");
    for (name, words) in
        [("qwen2_window_yarn", "sliding window"), ("deepseek_v3_bias", "attention_bias"), ("deepseek_v3_moe", "mscale")]
    {
        let run = fourfold(args!["export", golden(name), &out]);
        assert!(run.error().contains(words), "{}", run.error());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    let run = fourfold(args!["export", golden("qwen2"), dir.path().join("out")]);
    assert!(run.error().contains("ends in .gguf"), "{}", run.error());
}

#[test]
fn a_tokenizer_that_has_no_name_is_an_error() {
    let dir = folder();
    let (source, out) = (dir.path().join("model"), dir.path().join("out.gguf"));
    model(&source);
    for (change, words) in [
        (json!({"pre_tokenizer": {"type": "Whitespace"}}), "Whitespace"),
        (json!({"normalizer": {"type": "Lowercase"}}), "no known name"),
        (json!({"model": {"type": "Unigram", "vocab": []}}), "Unigram"),
    ] {
        let mut changed = tokenizer();
        for (key, value) in change.as_object().unwrap() {
            changed[key] = value.clone();
        }
        fs::write(source.join("tokenizer.json"), changed.to_string()).unwrap();
        let run = fourfold(args!["export", &source, &out]);
        assert!(run.error().contains(words), "{}", run.error());
        assert!(!out.exists());
    }
}

#[test]
fn text_template_and_splits_survive() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    model(&source);
    fourfold(args!["export", &source, at("whole.gguf"), "--modelfile", "--quiet"]).succeeded();
    fourfold(args!["export", &source, at("parts.gguf"), "--split-size", "50KB", "--quiet"]).succeeded();
    let parts: Vec<PathBuf> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    let first = parts.iter().find(|p| p.to_string_lossy().contains("parts-00001-of-")).unwrap();
    assert!(parts.iter().filter(|p| p.to_string_lossy().contains("parts-")).count() > 2);
    let said = |model: &Path| {
        let words = args!["generate", model, "-p", "the quick", "-n", "24", "--temperature", "0", "--quiet"];
        fourfold(words).succeeded().stdout.clone()
    };
    let expected = said(&source);
    assert_eq!(said(&at("whole.gguf")), expected);
    assert_eq!(said(first), expected);
    let template = |path: &Path| open(path).unwrap().chat_template;
    assert_eq!(template(&at("whole.gguf")), template(&source));
    let modelfile = fs::read_to_string(at("whole.Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./whole.gguf\n") && modelfile.contains("stop \"</s>\""), "{modelfile}");
    let again = fourfold(args!["export", &source, at("whole.gguf")]);
    assert!(again.error().contains("--overwrite"), "{}", again.error());
    // From GGUF to GGUF, everything stays as it is.
    fourfold(args!["export", at("whole.gguf"), at("second.gguf"), "--quiet"]).succeeded();
    assert_eq!(said(&at("second.gguf")), expected);
    fourfold(args!["export", &source, at("whole.gguf"), "--overwrite", "--quiet"]).succeeded();
}

#[test]
fn every_type_is_written_and_more_bits_lose_less() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    let config = wide(&source);
    let original = open(&source).unwrap();
    let spec = spec_from_config(&config).unwrap();
    let matrix = "model.layers.0.mlp.down_proj.weight";
    let values = original.weights.load(matrix).unwrap().to_f32();
    let energy: f32 = values.iter().map(|v| v * v).sum();
    let mut errors = Vec::new();
    for kind in BlockType::all() {
        let out = at(&format!("{}.gguf", kind.name()));
        fourfold(args!["export", &source, &out, "--type", kind.name().to_lowercase(), "--quiet"]).succeeded();
        let written = open(&out).unwrap();
        for weight in spec.weights() {
            let info = written.weights.info(&weight.name).unwrap();
            let expected = if weight.shape.len() == 2 { kind.name() } else { "F32" };
            assert_eq!(info.storage, expected, "{}", weight.name);
        }
        let stored = written.weights.load(matrix).unwrap().to_f32();
        let error: f32 = values.iter().zip(&stored).map(|(a, b)| (a - b) * (a - b)).sum();
        errors.push((kind, error / energy));
        // Written out once more the blocks are the same bytes.
        let again = at("again.gguf");
        fourfold(args!["export", &out, &again, "--overwrite", "--quiet"]).succeeded();
        assert!(open(&again).unwrap().weights.load(matrix).unwrap() == written.weights.load(matrix).unwrap());
    }
    let error = |kind: BlockType| errors.iter().find(|(k, _)| *k == kind).unwrap().1;
    // The squared error falls by about four with each bit.
    for (kind, most) in [
        (BlockType::Q2_K, 0.12),
        (BlockType::Q3_K, 0.03),
        (BlockType::Q4_0, 0.009),
        (BlockType::Q4_1, 0.008),
        (BlockType::IQ4_NL, 0.007),
        (BlockType::IQ4_XS, 0.007),
        (BlockType::Q4_K, 0.007),
        (BlockType::Q5_0, 0.0022),
        (BlockType::Q5_1, 0.0020),
        (BlockType::Q5_K, 0.0017),
        (BlockType::Q6_K, 0.0005),
        (BlockType::Q8_0, 0.00005),
    ] {
        let found = error(kind);
        assert!(found > 0.0 && found < most, "{kind:?}: {found}");
    }
    assert!(error(BlockType::Q4_K) < error(BlockType::Q3_K) && error(BlockType::Q6_K) < error(BlockType::Q5_K));
}

#[test]
fn a_size_in_gguf_is_kept_and_calibration_loses_less() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    wide(&source);
    let calibration = text(dir.path(), 3000);
    let common = |out: &str| args!["compress", &source, at(out), "--bits", "4.6", "--quiet", "--json", "--no-gate"];
    let words = args!["--calibration", &calibration, "--calibration-samples", "4", "--calibration-length", "64"];
    let with_text = fourfold(common("text.gguf").into_iter().chain(words)).json();
    let without = fourfold(common("plain.gguf").into_iter().chain(args!["--method", "rtn"])).json();
    for report in [&with_text, &without] {
        assert!(report["bits_per_parameter"].as_f64().unwrap() <= 4.6, "{report}");
    }
    let bytes = |name: &str| fs::metadata(at(name)).unwrap().len();
    assert!(bytes("text.gguf").abs_diff(bytes("plain.gguf")) < bytes("plain.gguf") / 20);
    let lost = |name: &str| {
        let words = args!["eval", at(name), "--text", &calibration, "--against", &source, "--context", "64", "--json"];
        fourfold(words.into_iter().chain(args!["--chunks", "8", "--quiet"])).json()["divergence"]["mean_kld"].as_f64()
    };
    let (less, more) = (lost("text.gguf").unwrap(), lost("plain.gguf").unwrap());
    assert!(less < more, "{less} with text, {more} without");
    for (words, reason) in [
        (vec!["--bits", "4"], "--bits 4.0"),
        (vec!["--method", "prune:0.5"], "no type for pruned"),
        (vec!["--ratio", "30"], "smallest plan"),
    ] {
        let run =
            fourfold(args!["compress", &source, at("no.gguf")].into_iter().chain(words.iter().map(|w| (*w).into())));
        assert!(run.error().contains(reason), "{}", run.error());
        assert!(!at("no.gguf").exists());
    }
}

#[test]
fn an_importance_matrix_stands_in_for_text() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    wide(&source);
    let calibration = text(dir.path(), 3000);
    for name in ["im.gguf", "im.dat"] {
        let words = args!["imatrix", &source, at(name), "--text", &calibration, "--context", "64", "--chunks", "8"];
        let report = fourfold(words.into_iter().chain(args!["--json", "--quiet"])).json();
        assert_eq!((report["entries"].as_u64(), report["tokens"].as_u64()), (Some(14), Some(512)));
    }
    let imatrix = |name: &str| fourfold_formats::gguf::imatrix::Imatrix::read(&at(name)).unwrap();
    let (new, old) = (imatrix("im.gguf"), imatrix("im.dat"));
    for (name, entry) in &new.entries {
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs();
        assert!(entry.means.iter().zip(&old.entries[name].means).all(close), "{name}");
    }
    // Inputs that are weak count less: the error weighted by their squares falls.
    let matrix = "model.layers.1.mlp.down_proj.weight";
    let squares = &new.entries["blk.1.ffn_down.weight"].means;
    let values = open(&source).unwrap().weights.load(matrix).unwrap().to_f32();
    let lost = |file: &str| -> f32 {
        let stored = open(&at(file)).unwrap().weights.load(matrix).unwrap().to_f32();
        values.iter().zip(&stored).enumerate().map(|(i, (a, b))| squares[i % 512] * (a - b) * (a - b)).sum()
    };
    fourfold(args!["export", &source, at("plain.gguf"), "--type", "q3_k", "--quiet"]).succeeded();
    let words = args!["export", &source, at("with.gguf"), "--type", "q3_k", "--quiet", "--imatrix", at("im.gguf")];
    fourfold(words).succeeded();
    assert!(lost("with.gguf") < lost("plain.gguf"), "{} {}", lost("with.gguf"), lost("plain.gguf"));
    let words = args!["compress", &source, at("mix.gguf"), "--bits", "4.6", "--quiet", "--imatrix", at("im.dat")];
    fourfold(words).succeeded();
    let other = at("other");
    model(&other);
    let run = fourfold(args!["export", &other, at("x.gguf"), "--type", "q4_0", "--imatrix", at("im.gguf")]);
    assert!(run.error().contains("another width"), "{}", run.error());
    fs::write(at("no.dat"), "no imatrix").unwrap();
    let run = fourfold(args!["export", &source, at("x.gguf"), "--type", "q3_k", "--imatrix", at("no.dat")]);
    assert!(run.error().contains("imatrix"), "{}", run.error());
}

#[test]
fn experts_of_a_layer_get_one_type() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    model(&source);
    let mut config: Value =
        serde_json::from_slice(&fs::read(golden("deepseek_v3_moe").join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("vocab_size", 260),
        ("hidden_size", 256),
        ("intermediate_size", 256),
        ("moe_intermediate_size", 256),
        ("kv_lora_rank", 64),
        ("qk_nope_head_dim", 32),
        ("qk_rope_head_dim", 32),
        ("v_head_dim", 64),
        ("q_lora_rank", 64),
        ("max_position_embeddings", 128),
    ] {
        config[key] = json!(value);
    }
    for key in ["rope_scaling", "rope_parameters"] {
        if config[key].is_object() {
            config[key]["mscale"] = json!(0.707);
            config[key]["mscale_all_dim"] = json!(0.707);
        }
    }
    fs::write(source.join("config.json"), config.to_string()).unwrap();
    fs::write(source.join("model.safetensors"), weights(&config)).unwrap();
    fourfold(args!["export", &source, at("exact.gguf"), "--type", "f32", "--quiet"]).succeeded();
    let (spec, exact) = (spec_from_config(&config).unwrap(), open(&at("exact.gguf")).unwrap());
    assert_eq!(rounded(spec_from_config(&exact.config).unwrap()), rounded(spec.clone()));
    let original = open(&source).unwrap();
    for weight in spec.weights() {
        let values = |source: &fourfold_formats::Checkpoint| source.weights.load(&weight.name).unwrap().to_f32();
        assert!(values(&original) == values(&exact), "{}", weight.name);
    }
    let calibration = text(dir.path(), 3000);
    let words = args![
        "compress",
        &source,
        at("out.gguf"),
        "--bits",
        "4.8",
        "--quiet",
        "--no-gate",
        "--calibration",
        &calibration
    ];
    let more = args!["--calibration-samples", "2", "--calibration-length", "64"];
    fourfold(words.into_iter().chain(more)).succeeded();
    let written = open(&at("out.gguf")).unwrap();
    let storage = |name: &str| written.weights.info(name).unwrap().storage.clone();
    for layer in [1, 2] {
        for part in ["gate_proj", "up_proj", "down_proj"] {
            let of = |e: usize| storage(&format!("model.layers.{layer}.mlp.experts.{e}.{part}.weight"));
            assert!((1..8).all(|e| of(e) == of(0)));
        }
    }
    let words =
        args!["eval", at("out.gguf"), "--text", &calibration, "--against", &source, "--context", "64", "--json"];
    let report = fourfold(words.into_iter().chain(args!["--chunks", "4", "--quiet"])).json();
    assert!(report["divergence"]["mean_kld"].as_f64().unwrap() < 0.1, "{report}");
}

#[test]
fn a_plain_checkpoint_has_every_side_file() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    let source = at("model");
    model(&source);
    fourfold(args!["compress", &source, at("small"), "--bits", "4", "--quiet"]).succeeded();
    let words =
        args!["export", at("small"), at("plain"), "--format", "safetensors", "--max-shard-size", "60KB", "--quiet"];
    fourfold(words).succeeded();
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ] {
        assert!(at("plain").join(name).is_file(), "{name}");
    }
    let config: Value = serde_json::from_slice(&fs::read(at("plain").join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none(), "{config}");
    let (small, plain) = (open(&at("small")).unwrap(), open(&at("plain")).unwrap());
    for info in plain.weights.tensors() {
        assert_eq!(info.storage, "BF16", "{}", info.name);
        let (a, b) =
            (small.weights.load(&info.name).unwrap().to_f32(), plain.weights.load(&info.name).unwrap().to_f32());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= a.abs() / 256.0), "{}", info.name);
    }
    let wrong = fourfold(args!["export", &source, at("x"), "--format", "safetensors", "--type", "q8_0"]);
    assert!(wrong.error().contains("--format gguf"), "{}", wrong.error());
}
