//! Models in 8-bit floats: kept so in memory, and read as the product of code and scale in f32.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Folder, folder, fourfold, tokenizer};
use fourfold_kernels::{Cpu, CpuOptions};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, Role, WeightSpec, spec_from_config};
use fourfold_tensor::{DType, Dense, E4M3, FloatBuffer, Fp8, Weight, WeightSource};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// A model of latent attention and experts, small enough for a test. No size is a whole number of blocks.
fn deepseek() -> Value {
    json!({
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 260, "hidden_size": 72,
        "intermediate_size": 104, "moe_intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 36, "q_lora_rank": 48, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
        "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": true, "scoring_func": "sigmoid", "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "attention_bias": false, "eos_token_id": 1, "bos_token_id": 0
    })
}

fn llama() -> Value {
    let mut config = common::config();
    config["tie_word_embeddings"] = json!(false);
    config
}

/// A way to store FP8.
struct Scheme {
    name: &'static str,
    section: Value,
    /// Rows and columns that share a scale.
    block: (usize, usize),
    suffix: &'static str,
    scales: DType,
    /// The scales' shape, of rows and columns of blocks.
    shape: fn(usize, usize) -> Vec<usize>,
}

const ALL: usize = usize::MAX;

fn compressed_tensors(strategy: &str, more: &Value) -> Value {
    let mut weights =
        json!({"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true, "dynamic": false});
    weights.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
           "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
}

fn schemes() -> Vec<Scheme> {
    let two = |down, across| vec![down, across];
    vec![
        Scheme {
            name: "deepseek",
            section: json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [16, 32]}),
            block: (16, 32),
            suffix: "_scale_inv",
            scales: DType::F32,
            shape: two,
        },
        Scheme {
            name: "tensor",
            section: compressed_tensors("tensor", &json!({})),
            block: (ALL, ALL),
            suffix: "_scale",
            scales: DType::F32,
            shape: |_, _| vec![1],
        },
        Scheme {
            name: "channel",
            section: compressed_tensors("channel", &json!({})),
            block: (1, ALL),
            suffix: "_scale",
            scales: DType::Bf16,
            shape: two,
        },
        Scheme {
            name: "block",
            section: compressed_tensors("block", &json!({"block_structure": [16, 16]})),
            block: (16, 16),
            suffix: "_scale",
            scales: DType::Bf16,
            shape: two,
        },
    ]
}

/// What a checkpoint holds of one tensor.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn floats(name: &str, shape: &[usize], values: Vec<f32>, dtype: DType) -> Stored {
    let kind = match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        other => panic!("{other}"),
    };
    (name.to_owned(), kind, shape.to_vec(), FloatBuffer::from_f32(values, dtype).as_bytes().to_vec())
}

fn is_linear(weight: &WeightSpec) -> bool {
    matches!(weight.role, Role::Attention | Role::Mlp | Role::SharedExpert | Role::RoutedExpert)
        && weight.shape.len() == 2
}

/// A matrix in FP8: the greatest magnitude of a block becomes 448.
fn packed(values: &[f32], rows: usize, cols: usize, scheme: &Scheme) -> Fp8 {
    let (down, across) = (scheme.block.0.min(rows), scheme.block.1.min(cols));
    let at = |r: usize, c: usize| r / down * cols.div_ceil(across) + c / across;
    let mut scales = vec![0.0f32; rows.div_ceil(down) * cols.div_ceil(across)];
    for (i, value) in values.iter().enumerate() {
        let scale = &mut scales[at(i / cols, i % cols)];
        *scale = scale.max(value.abs() / 448.0);
    }
    let scales = FloatBuffer::from_f32(scales, scheme.scales);
    let code = |i: usize| {
        let value = values[i] / scales.get(at(i / cols, i % cols));
        let far = |code: &u8| (E4M3[usize::from(*code)] - value).abs();
        let codes = (0..=255u8).filter(|code| code & 0x7f != 0x7f);
        codes.min_by(|a, b| far(a).total_cmp(&far(b))).unwrap()
    };
    let codes: Vec<u8> = (0..values.len()).map(code).collect();
    Fp8::new(rows, cols, codes.into(), (down, across), scales).unwrap()
}

fn write(dir: &Path, config: &Value, section: Option<&Value>, tensors: &[Stored]) {
    fs::create_dir_all(dir).unwrap();
    let mut config = config.clone();
    if let Some(section) = section {
        config["quantization_config"] = section.clone();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A model in FP8, the same with its products in f32, and with those rounded to BF16.
struct Models {
    place: Folder,
    fp8: PathBuf,
    wide: PathBuf,
    rounded: PathBuf,
}

fn models(config: &Value, scheme: &Scheme) -> Models {
    let spec = spec_from_config(config).unwrap();
    let source = RandomWeights::new(&spec, 11);
    let (mut fp8, mut wide, mut rounded) = (Vec::new(), Vec::new(), Vec::new());
    for weight in spec.weights() {
        let (name, shape) = (weight.name.as_str(), weight.shape.as_slice());
        let values = source.load(name).unwrap().to_f32();
        if !is_linear(&weight) {
            for all in [&mut fp8, &mut wide, &mut rounded] {
                all.push(floats(name, shape, values.clone(), DType::Bf16));
            }
            continue;
        }
        let matrix = packed(&values, shape[0], shape[1], scheme);
        let (down, across) = (shape[0].div_ceil(matrix.block().0), matrix.blocks_across());
        fp8.push((name.to_owned(), Dtype::F8_E4M3, shape.to_vec(), matrix.codes().to_vec()));
        let scales = (scheme.shape)(down, across);
        fp8.push(floats(&format!("{name}{}", scheme.suffix), &scales, matrix.scales().to_f32(), scheme.scales));
        let values = Weight::from(matrix).to_f32();
        wide.push(floats(name, shape, values.clone(), DType::F32));
        rounded.push(floats(name, shape, values, DType::Bf16));
    }
    let place = folder();
    let at = |name: &str| place.path().join(name);
    let (in_fp8, in_f32, in_bf16) = (at("fp8"), at("wide"), at("rounded"));
    write(&in_fp8, config, Some(&scheme.section), &fp8);
    write(&in_f32, config, None, &wide);
    write(&in_bf16, config, None, &rounded);
    Models { place, fp8: in_fp8, wide: in_f32, rounded: in_bf16 }
}

/// Logits of a text in f32, computed by so many tokens at once.
fn logits(models: &Models, model: &Path, context: usize, more: &[&str]) -> Vec<f32> {
    let (text, out) = (models.place.path().join("text.txt"), models.place.path().join("logits.safetensors"));
    fs::write(&text, "eight bits of floats, and a scale for each block of them").unwrap();
    let context = context.to_string();
    let mut arguments = args![
        "eval",
        model,
        "--text",
        &text,
        "--context",
        &context,
        "--dump-logits",
        &out,
        "--kv-dtype",
        "f32",
        "--activations",
        "f32"
    ]
    .to_vec();
    arguments.extend(more.iter().map(|word| word.into()));
    fourfold(arguments).succeeded();
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor("logits").unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert!(a.len() == b.len() && !a.is_empty());
    a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

/// Few tokens at once and many, whose kernels differ.
#[test]
fn logits_are_those_of_the_products_in_f32() {
    for (config, scheme) in
        schemes().iter().map(|scheme| (deepseek(), scheme)).chain([(llama(), &schemes()[0]), (llama(), &schemes()[2])])
    {
        let models = models(&config, scheme);
        for context in [8, 48] {
            let [fp8, wide, rounded] =
                [&models.fp8, &models.wide, &models.rounded].map(|m| logits(&models, m, context, &[]));
            let (error, control) = (distance(&fp8, &wide), distance(&rounded, &wide));
            assert!(error < 2e-5, "{} {}: {error}", config["model_type"], scheme.name);
            assert!(control > 100.0 * error && control > 2e-3, "{}: rounding changes {control}", scheme.name);
        }
    }
}

/// What a loaded model takes is what the file holds, and what is said of it.
#[test]
fn a_weight_takes_a_byte_and_its_scales() {
    for scheme in &schemes() {
        let models = models(&deepseek(), scheme);
        let checkpoint = fourfold_formats::open(&models.fp8).unwrap();
        let spec = spec_from_config(&checkpoint.config).unwrap();
        let mut matrices = 0;
        for weight in spec.weights().iter().filter(|weight| is_linear(weight)) {
            let stored = checkpoint.weights.load(&weight.name).unwrap();
            assert!(matches!(&stored, Weight::Fp8(w) if w.codes().len() as u64 == weight.elements()));
            assert_eq!(stored.byte_len() as u64, checkpoint.weights.info(&weight.name).unwrap().bytes);
            matrices += weight.elements();
        }
        let backend = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap());
        let model = Model::load(&spec, &*checkpoint.weights, backend, &mut |_| {}).unwrap();
        // Vectors and routers are f32 where they are computed with.
        let small = spec.weights().into_iter().filter(|w| w.shape.len() < 2 || w.role == Role::Router);
        let widened: u64 = small.map(|w| 2 * w.elements()).sum();
        let resident = model.weight_bytes() as u64;
        assert!(
            (checkpoint.weight_bytes..=checkpoint.weight_bytes + widened).contains(&resident),
            "{}: {resident} bytes in memory, {} in the file",
            scheme.name,
            checkpoint.weight_bytes
        );
        assert!(matrices > resident / 2, "most of the model is FP8");

        let report = fourfold(args!["inspect", &models.fp8, "--json"]).json();
        assert_eq!(report["weight_bytes"], checkpoint.weight_bytes);
        assert_eq!(report["run"]["weights"], checkpoint.weight_bytes, "{}", report["run"]);
        let fp8 = report["by_storage"].as_array().unwrap().iter().find(|group| group["name"] == "F8_E4M3").unwrap();
        assert_eq!(fp8["parameters"], matrices);
        assert!(fp8["bytes"].as_u64().unwrap() >= matrices);

        // What stands under adapters, by the files and by DeepSeek's configuration alone.
        let stored = |model: &Path| fourfold(args!["plan", model, "--lora-rank", "4", "--json"]).json()["rows"].clone();
        let rows = stored(&models.fp8);
        let of_f32 = stored(&models.wide)[0]["weights"].as_u64().unwrap();
        let saved = of_f32 - rows[0]["weights"].as_u64().unwrap();
        assert_eq!(saved, 4 * matrices - fp8["bytes"].as_u64().unwrap());
        if scheme.name == "deepseek" {
            assert_eq!(stored(&models.fp8.join("config.json")), rows);
        }
    }
}

fn tensors(dir: &Path) -> Vec<Stored> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let one =
        |(name, view): (&str, TensorView)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let mut all: Vec<Stored> = file.iter().map(one).collect();
    all.sort();
    all
}

/// Compressed from the products in f32: the same bytes as of a model that holds those. What is kept is written in BF16.
#[test]
fn compressing_reads_the_products_in_f32() {
    let models = models(&deepseek(), &schemes()[0]);
    let at = |name: &str| models.place.path().join(name);
    for (name, model) in [("a", &models.fp8), ("b", &models.wide), ("c", &models.rounded)] {
        fourfold(args!["compress", model, &at(name), "--bits", "8", "--method", "rtn"]).succeeded();
    }
    let [of_fp8, of_wide, of_rounded] = ["a", "b", "c"].map(|name| tensors(&at(name)));
    assert!(of_fp8 == of_wide);
    assert!(of_fp8 != of_rounded, "rounding to BF16 first gives another model");
    let config: Value = serde_json::from_slice(&fs::read(at("a").join("config.json")).unwrap()).unwrap();
    assert_ne!(config["quantization_config"]["quant_method"], "fp8");
}

/// Adapters stand over the packed model; merged with it they are BF16, as what was rounded once.
#[test]
fn adapters_are_trained_and_merged_over_fp8() {
    let models = models(&llama(), &schemes()[0]);
    let at = |name: &str| models.place.path().join(name);
    let text = common::text(models.place.path(), 600);
    let train = |more: &[&str], out: &Path| {
        let mut arguments = args![
            "train",
            "--model",
            &models.fp8,
            "--data",
            &text,
            "-o",
            out,
            "--context",
            "32",
            "--batch-size",
            "2",
            "--steps",
            "4",
            "--learning-rate",
            "0.01",
            "--json"
        ]
        .to_vec();
        arguments.extend(more.iter().map(|word| word.into()));
        let run = fourfold(arguments);
        run.succeeded();
        run.stderr
    };
    let said = train(&["--lora-rank", "4"], &at("adapter"));
    assert!(!said.contains("widened"), "{said}");
    let adapter = at("adapter").join("final");
    let shown = adapter.display().to_string();
    let adapted = logits(&models, &models.fp8, 48, &["--adapter", &shown]);
    let effect = distance(&adapted, &logits(&models, &models.fp8, 48, &[]));
    let error = distance(&adapted, &logits(&models, &models.wide, 48, &["--adapter", &shown]));
    assert!(effect > 0.05 && error < 2e-5, "the adapter changes {effect}; over the products in f32 {error}");

    fourfold(args!["merge", &models.fp8, &adapter, &at("merged")]).succeeded();
    fourfold(args!["merge", &models.wide, &adapter, &at("merged-wide")]).succeeded();
    let (merged, wide) = (tensors(&at("merged")), tensors(&at("merged-wide")));
    assert_eq!(merged.len(), wide.len());
    for ((name, dtype, _, data), (_, wide, _, values)) in merged.iter().zip(&wide) {
        assert_eq!(*dtype, Dtype::BF16, "{name}");
        let values: Vec<f32> = match wide {
            Dtype::F32 => values.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            _ => continue,
        };
        let once = FloatBuffer::from_f32(values, DType::Bf16);
        assert!(once.as_bytes() == data.as_slice(), "{name} is not the sum in f32, rounded once");
    }

    // Trained as a whole the matrices become what the preset stores, which is said.
    let said = train(&[], &at("whole"));
    assert!(said.contains("F8_E4M3") && said.contains("widened") && said.contains("--lora-rank"), "{said}");
}

/// A code that is no number is named.
#[test]
fn codes_that_are_no_numbers_are_refused_by_name() {
    let models = models(&llama(), &schemes()[0]);
    let mut stored = tensors(&models.fp8);
    let broken = stored.iter_mut().find(|(_, dtype, ..)| *dtype == Dtype::F8_E4M3).unwrap();
    let (name, cols) = (broken.0.clone(), broken.2[1]);
    broken.3[2 * cols + 5] = 0xff;
    let dir = models.place.path().join("broken");
    write(&dir, &llama(), Some(&schemes()[0].section), &stored);
    let text = common::text(models.place.path(), 100);
    let run = fourfold(args!["eval", &dir, "--text", &text, "--context", "32"]);
    let error = run.error();
    assert!(error.contains(&name) && error.contains("[2, 5]") && error.contains("NaN"), "{error}");
}

/// A matrix of codes without scales, as an embedding may be.
#[test]
fn embeddings_of_fp8_are_read_row_by_row() {
    let (config, scheme) = (common::config(), &schemes()[1]);
    let spec = spec_from_config(&config).unwrap();
    let models = models(&config, scheme);
    let embedding = spec.weights().into_iter().find(|w| w.role == Role::Embedding).unwrap();
    let codes: Vec<u8> =
        (0..embedding.elements()).map(|i| ((i * 37 + i / 64) % 64) as u8 | ((i % 3) as u8) << 7).collect();
    let values: Vec<f32> = codes.iter().map(|&code| E4M3[usize::from(code)]).collect();
    let (rows, cols) = (embedding.shape[0], embedding.shape[1]);
    assert_eq!(Dense::from_f32(vec![rows, cols], values.clone()).rows(), rows);
    for dir in [&models.fp8, &models.wide] {
        let mut stored = tensors(dir);
        let table = stored.iter_mut().find(|(name, ..)| *name == embedding.name).unwrap();
        let is_fp8 = *dir == models.fp8;
        *table = match is_fp8 {
            true => (embedding.name.clone(), Dtype::F8_E4M3, embedding.shape.clone(), codes.clone()),
            false => floats(&embedding.name, &embedding.shape, values.clone(), DType::F32),
        };
        write(dir, &config, is_fp8.then_some(&scheme.section), &stored);
    }
    // The embedding is the head too.
    for context in [8, 48] {
        let [fp8, wide] = [&models.fp8, &models.wide].map(|model| logits(&models, model, context, &[]));
        assert!(distance(&fp8, &wide) < 2e-5);
    }
}

/// GGUF has no such type: a file holds what DeepSeek's own conversion makes of it.
#[test]
fn gguf_files_hold_it_as_bf16() {
    for scheme in &schemes()[..2] {
        let models = models(&deepseek(), scheme);
        let out = models.place.path().join("out.gguf");
        fourfold(args!["export", &models.fp8, &out, "--quiet"]).succeeded();
        let [file, rounded] = [&out, &models.rounded].map(|path| fourfold_formats::open(path).unwrap());
        for info in rounded.weights.tensors() {
            let [found, expected] = [&file, &rounded].map(|source| source.weights.load(&info.name).unwrap().to_f32());
            assert!(found == expected, "{}: {}", scheme.name, info.name);
        }
    }
}
