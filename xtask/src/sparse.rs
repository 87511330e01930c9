//! A llama checkpoint of any size that takes no disk space: a real header over a hole. Every weight reads as zero.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

const HIDDEN: u64 = 4096;
const FFN: u64 = 14336;
const KV: u64 = 1024;
const VOCAB: u64 = 32000;

/// Writes `config.json` and a sparse `model.safetensors` of about `gigabytes` (10^9 bytes) of bf16 weights.
pub fn write(out: &Path, gigabytes: f64) -> Result<()> {
    let block: u64 = 2 * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * FFN * HIDDEN + 2 * HIDDEN);
    let embeddings: u64 = 2 * 2 * VOCAB * HIDDEN;
    ensure!(gigabytes * 1e9 > (embeddings + block) as f64, "too small for one block");
    let blocks = ((gigabytes * 1e9 - embeddings as f64) / block as f64).ceil() as u64;

    let mut header = Map::new();
    let mut offset = 0u64;
    let mut add = |name: String, shape: &[u64]| {
        let bytes = 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + bytes]}));
        offset += bytes;
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    for i in 0..blocks {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KV, HIDDEN]),
            ("self_attn.v_proj", vec![KV, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
        ] {
            add(format!("model.layers.{i}.{name}.weight"), &shape);
        }
    }
    add("model.norm.weight".into(), &[HIDDEN]);
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);

    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": blocks, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16"
    });
    fs::write(out.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    let mut text = serde_json::to_string(&Value::Object(header))?;
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    let mut file = File::create(out.join("model.safetensors"))?;
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(text.as_bytes())?;
    file.set_len(8 + text.len() as u64 + offset)?;
    println!("{}: {blocks} blocks, {:.2} GB of weights, sparse", out.display(), offset as f64 / 1e9);
    Ok(())
}
