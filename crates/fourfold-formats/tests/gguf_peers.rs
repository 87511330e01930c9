//! Real GGUF files against their peers: the model they were made from, the reference package's dequantization, llama.cpp's
//! tokenizer. They lie outside the repository; `FOURFOLD_PEERS` names their folder, and without it these checks say so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fourfold_formats::{TokenizerSource, open};
use half::bf16;
use tokenizers::Tokenizer;

fn peers() -> Option<PathBuf> {
    let folder = std::env::var_os("FOURFOLD_PEERS").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: FOURFOLD_PEERS is not set");
    }
    folder
}

/// A file of the folder; says so where it is absent.
fn peer(folder: &Path, name: &str) -> Option<PathBuf> {
    let path = folder.join(name);
    if !path.exists() {
        eprintln!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn every_tensor_of_smollm2_is_the_converted_model() {
    let Some(folder) = peers() else { return };
    let (Some(gguf), Some(hf)) = (peer(&folder, "smollm2-q4_1.gguf"), peer(&folder, "smollm2")) else { return };
    let (gguf, hf) = (open(&gguf).unwrap(), open(&hf).unwrap());
    for key in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
        "max_position_embeddings",
    ] {
        // Numbers agree whether written as 100000 or as 100000.0.
        let (found, expected) = (&gguf.config[key], &hf.config[key]);
        assert!(found == expected || found.as_f64() == expected.as_f64(), "{key}: {found}, expected {expected}");
    }
    let start = std::time::Instant::now();
    let (mut worst, mut count, mut seconds) = (0f32, 0, 0f64);
    for info in hf.weights.tensors() {
        let before = start.elapsed().as_secs_f64();
        let weight = gguf.weights.load(&info.name).unwrap();
        seconds += start.elapsed().as_secs_f64() - before;
        assert_eq!(weight.shape(), info.shape, "{}", info.name);
        let expected = hf.weights.load(&info.name).unwrap().to_f32();
        for (found, wanted) in weight.to_f32().into_iter().zip(expected) {
            worst = worst.max((bf16::from_f32(found).to_f32() - wanted).abs());
        }
        count += 1;
    }
    assert_eq!(gguf.weights.tensors().len(), count);
    eprintln!("{count} tensors, largest difference {worst:e}, {seconds:.2} s to read");
    assert_eq!(worst, 0.0);
}

/// As `scripts/gguf_checksums.py`.
fn checksum(values: &[f32]) -> u64 {
    let term = |(i, v): (usize, &f32)| u64::from((v + 0.0).to_bits()).wrapping_mul(2 * i as u64 + 1);
    values.iter().enumerate().map(term).fold(0, u64::wrapping_add)
}

/// Hugging Face's name of a llama tensor, by a table of its own.
fn hugging_face(name: &str) -> String {
    let [part, kind] = name.rsplit('.').collect::<Vec<_>>()[..2] else { panic!("{name}") };
    let layer = name.strip_prefix("blk.").map(|rest| rest.split('.').next().unwrap());
    let (part, kind) = (kind, part);
    let own = match part {
        "token_embd" => return "model.embed_tokens.weight".to_owned(),
        "output_norm" => return "model.norm.weight".to_owned(),
        "output" => return "lm_head.weight".to_owned(),
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("{other}"),
    };
    format!("model.layers.{}.{own}.{kind}", layer.unwrap())
}

#[test]
fn real_quantizations_decode_as_the_reference_does() {
    let Some(folder) = peers() else { return };
    let Some(sums) = peer(&folder, "gguf/checksums.json") else { return };
    let sums: BTreeMap<String, BTreeMap<String, (String, String)>> =
        serde_json::from_slice(&fs::read(sums).unwrap()).unwrap();
    for (file, tensors) in sums {
        let Some(path) = peer(&folder, &format!("gguf/{file}")) else { continue };
        let checkpoint = open(&path).unwrap();
        let mut types = BTreeMap::new();
        let (mut in_file, mut in_memory) = (0, 0);
        for (name, (kind, expected)) in &tensors {
            let name = hugging_face(name);
            let info = checkpoint.weights.info(&name).unwrap_or_else(|| panic!("{file}: {name}"));
            assert_eq!(&info.storage, kind, "{file}: {name}");
            let weight = checkpoint.weights.load(&name).unwrap();
            assert_eq!(checksum(&weight.to_f32()).to_string(), *expected, "{file}: {name} of {kind}");
            *types.entry(kind).or_insert(0) += 1;
            in_file += info.bytes;
            in_memory += weight.byte_len();
        }
        assert_eq!(checkpoint.weight_bytes, in_file, "{file}");
        eprintln!("{file}: {types:?}, {in_file} bytes in the file, {in_memory} in memory");
    }
}

#[test]
fn the_embedded_tokenizer_gives_llama_cpps_ids() {
    let Some(folder) = peers() else { return };
    let names = ("smollm2-q4_1.gguf", "llama.cpp/build/bin/llama-tokenize");
    let (Some(model), Some(program)) = (peer(&folder, names.0), peer(&folder, names.1)) else { return };
    let TokenizerSource::Embedded(json) = open(&model).unwrap().tokenizer else { panic!("no tokenizer") };
    let tokenizer = Tokenizer::from_bytes(&json).unwrap();
    let mut texts: Vec<String> = [
        "Hello, world! It's 2024; I'll pay $1,234.56 -- OK?",
        "fn main() {\n    let x = vec![1u8; 100];\n\tprintln!(\"{x:?}\");\n}\n",
        "  leading   and    inner spaces \n\n\n and lines\r\n\ttabs ",
        "Ünïcödé naïve café — “quotes” … ‰ ½ ¼ ²",
        "深度求索 四つの技術。 한국어도 됩니다. Русский текст, ελληνικά, עברית, العربية १२३",
        "emoji 🙂🚀👩‍👩‍👧 flags 🇩🇪 combining e\u{301} zero\u{200b}width",
        "<|im_start|>user\nhi<|im_end|>\n",
    ]
    .map(str::to_owned)
    .to_vec();
    if let Some(shared) = std::env::var_os("FOURFOLD_SHARED") {
        for name in ["calibration/code.utf8", "calibration/c4.utf8", "wikitext2/wiki.test.raw"] {
            let text = fs::read(Path::new(&shared).join("data").join(name)).unwrap();
            texts.push(String::from_utf8_lossy(&text).chars().take(100_000).collect());
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut count = 0;
    for text in &texts {
        let file = dir.path().join("text");
        fs::write(&file, text).unwrap();
        let run = Command::new(&program)
            .arg("-m")
            .arg(&model)
            .arg("-f")
            .arg(&file)
            .args(["--ids", "--log-disable", "--no-escape"])
            .output();
        let listed = String::from_utf8(run.unwrap().stdout).unwrap();
        let expected: Vec<u32> = serde_json::from_str(listed.trim()).unwrap();
        let found = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
        let first = found.iter().zip(&expected).position(|(f, e)| f != e);
        assert_eq!(first, None, "the ids part in {:?}", text.chars().take(80).collect::<String>());
        assert_eq!(found.len(), expected.len());
        count += found.len();
    }
    eprintln!("{count} ids agree");
}
