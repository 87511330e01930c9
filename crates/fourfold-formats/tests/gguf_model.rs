//! Small models of every architecture, written as GGUF and read under Hugging Face names.

mod support {
    pub mod gguf;
}

use std::path::PathBuf;

use fourfold_formats::{Checkpoint, FormatError, TokenizerSource, open};
use fourfold_tensor::{SourceError, Weight};
use serde_json::json;
use support::gguf::{File, Tensor};
use tempfile::TempDir;

const HIDDEN: u64 = 8;
const FF: u64 = 12;
const VOCAB: u64 = 10;

/// Values that tell every element of every tensor apart: exact in f32.
fn values(seed: u64, n: u64) -> Vec<f32> {
    (0..n).map(|i| (seed * 1000 + i) as f32).collect()
}

fn tensor(seed: u64, name: &str, shape: &[u64]) -> Tensor {
    Tensor::f32(name, shape, &values(seed, shape.iter().product()))
}

/// The metadata every architecture has.
fn base(arch: &str) -> File {
    let key = |part: &str| format!("{arch}.{part}");
    File::default()
        .meta("general.architecture", arch)
        .meta(&key("block_count"), 1u32)
        .meta(&key("context_length"), 64u32)
        .meta(&key("embedding_length"), HIDDEN as u32)
        .meta(&key("feed_forward_length"), FF as u32)
        .meta(&key("attention.head_count"), 2u32)
        .meta(&key("attention.layer_norm_rms_epsilon"), 1e-5f32)
        .tensor(tensor(1, "token_embd.weight", &[VOCAB, HIDDEN]))
        .tensor(tensor(2, "output_norm.weight", &[HIDDEN]))
        .tensor(tensor(3, "blk.0.attn_norm.weight", &[HIDDEN]))
        .tensor(tensor(4, "blk.0.ffn_norm.weight", &[HIDDEN]))
}

fn attention(file: File, kv_rows: u64) -> File {
    file.tensor(tensor(5, "blk.0.attn_q.weight", &[HIDDEN, HIDDEN]))
        .tensor(tensor(6, "blk.0.attn_k.weight", &[kv_rows, HIDDEN]))
        .tensor(tensor(7, "blk.0.attn_v.weight", &[kv_rows, HIDDEN]))
        .tensor(tensor(8, "blk.0.attn_output.weight", &[HIDDEN, HIDDEN]))
}

fn mlp(file: File) -> File {
    file.tensor(tensor(9, "blk.0.ffn_gate.weight", &[FF, HIDDEN]))
        .tensor(tensor(10, "blk.0.ffn_up.weight", &[FF, HIDDEN]))
        .tensor(tensor(11, "blk.0.ffn_down.weight", &[HIDDEN, FF]))
}

fn llama() -> File {
    mlp(attention(base("llama").meta("llama.attention.head_count_kv", 1u32), 4))
}

/// Writes the file and opens it.
fn opened(file: &File) -> (TempDir, Result<Checkpoint, FormatError>) {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let checkpoint = open(&path);
    (dir, checkpoint)
}

fn load(checkpoint: &Checkpoint, name: &str) -> Weight {
    checkpoint.weights.load(name).unwrap()
}

fn refusal(file: &File) -> String {
    opened(file).1.unwrap_err().to_string()
}

#[test]
fn llama_is_seen_as_hugging_face_has_it() {
    let (_dir, checkpoint) = opened(&llama());
    let checkpoint = checkpoint.unwrap();
    let c = &checkpoint.config;
    assert_eq!(c["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(c["model_type"], "llama");
    assert_eq!(c["hidden_size"], 8);
    assert_eq!(c["num_key_value_heads"], 1);
    assert_eq!(c["head_dim"], 4);
    assert_eq!(c["vocab_size"], 10);
    assert_eq!(c["rms_norm_eps"], 1e-5);
    assert_eq!(c["rope_theta"], 10000.0);
    assert_eq!(c["rope_scaling"], json!(null));
    assert_eq!(c["tie_word_embeddings"], true);
    assert_eq!(checkpoint.tokenizer, TokenizerSource::None);
    assert_eq!(checkpoint.generation_config, None);

    assert_eq!(load(&checkpoint, "model.embed_tokens.weight").to_f32(), values(1, VOCAB * HIDDEN));
    assert_eq!(load(&checkpoint, "model.norm.weight").shape(), [8]);
    assert_eq!(load(&checkpoint, "model.layers.0.mlp.down_proj.weight").shape(), [8, 12]);
    assert_eq!(load(&checkpoint, "model.layers.0.self_attn.v_proj.weight").to_f32(), values(7, 32));
    // Rows of each head of four return from 0 2 1 3 (the converter interleaves halves).
    let q = load(&checkpoint, "model.layers.0.self_attn.q_proj.weight").to_f32();
    let first_of_rows: Vec<f32> = q.chunks(8).map(|row| row[0] - 5000.0).collect();
    assert_eq!(first_of_rows, [0., 16., 8., 24., 32., 48., 40., 56.]);
    let k = load(&checkpoint, "model.layers.0.self_attn.k_proj.weight").to_f32();
    assert_eq!(k.chunks(8).map(|row| row[0] - 6000.0).collect::<Vec<_>>(), [0., 16., 8., 24.]);

    let bytes: u64 = checkpoint.weights.tensors().iter().map(|t| t.bytes).sum();
    assert_eq!(bytes, checkpoint.weight_bytes);
    assert!(matches!(checkpoint.weights.load("lm_head.weight"), Err(SourceError::Missing { .. })));
}

#[test]
fn quantized_rows_return_to_their_heads_too() {
    // 4 rows of one Q8_0 block each: the row is in the codes.
    let block = |row: u8| [&half::f16::from_f32(1.0).to_le_bytes()[..], &[row; 32]].concat();
    let rows: Vec<u8> = (0..4).flat_map(block).collect();
    let mut file = llama();
    let width = 32u64;
    file.tensors.retain(|t| t.name != "blk.0.attn_k.weight");
    file = file.tensor(Tensor::new("blk.0.attn_k.weight", &[4, width], 8, rows));
    let (_dir, checkpoint) = opened(&file);
    let k = load(&checkpoint.unwrap(), "model.layers.0.self_attn.k_proj.weight");
    assert!(matches!(k, Weight::Quantized(_)));
    assert_eq!(k.to_f32().chunks(32).map(|row| row[5]).collect::<Vec<_>>(), [0., 2., 1., 3.]);
}

#[test]
fn qwen_keeps_its_rows_biases_and_norms() {
    let biased = mlp(attention(base("qwen2").meta("qwen2.attention.head_count_kv", 2u32), HIDDEN))
        .tensor(tensor(12, "blk.0.attn_q.bias", &[HIDDEN]))
        .tensor(tensor(13, "output.weight", &[VOCAB, HIDDEN]))
        .meta("qwen2.rope.freq_base", 1e6f32)
        .meta("qwen2.rope.scaling.type", "yarn")
        .meta("qwen2.rope.scaling.factor", 4f32)
        .meta("qwen2.rope.scaling.original_context_length", 32u32);
    let (_dir, checkpoint) = opened(&biased);
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.config["model_type"], "qwen2");
    assert_eq!(checkpoint.config["tie_word_embeddings"], false);
    assert_eq!(checkpoint.config["rope_theta"], 1e6);
    assert_eq!(checkpoint.config["rope_scaling"]["rope_type"], "yarn");
    assert_eq!(checkpoint.config["rope_scaling"]["original_max_position_embeddings"], 32);
    assert_eq!(load(&checkpoint, "model.layers.0.self_attn.q_proj.weight").to_f32(), values(5, 64));
    assert_eq!(load(&checkpoint, "model.layers.0.self_attn.q_proj.bias").to_f32(), values(12, 8));
    assert_eq!(load(&checkpoint, "lm_head.weight").to_f32(), values(13, 80));

    let normed = mlp(attention(base("qwen3").meta("qwen3.attention.key_length", 4u32), HIDDEN))
        .tensor(tensor(12, "blk.0.attn_q_norm.weight", &[4]))
        .tensor(tensor(13, "blk.0.attn_k_norm.weight", &[4]));
    let (_dir, checkpoint) = opened(&normed);
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.config["architectures"], json!(["Qwen3ForCausalLM"]));
    assert_eq!(load(&checkpoint, "model.layers.0.self_attn.k_norm.weight").to_f32(), values(13, 4));
}

#[test]
fn tokens_that_end_an_answer_are_all_named() {
    let file = llama()
        .meta("tokenizer.ggml.model", "gpt2")
        .meta("tokenizer.ggml.pre", "llama-bpe")
        .meta("tokenizer.ggml.tokens", &["a", "<s>", "</s>", "<|eot_id|>", "<turn>"][..])
        .meta("tokenizer.ggml.token_type", &[1, 3, 3, 3, 3][..])
        .meta("tokenizer.ggml.merges", &[][..] as &[&str])
        .meta("tokenizer.ggml.bos_token_id", 1u32)
        .meta("tokenizer.ggml.eos_token_id", 2u32)
        .meta("tokenizer.ggml.eot_token_id", 4u32)
        .meta("tokenizer.chat_template", "{{ messages }}");
    let (_dir, checkpoint) = opened(&file);
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.special.eos_ids, [2, 4, 3]);
    assert_eq!(checkpoint.generation_config, Some(json!({"eos_token_id": [2, 4, 3], "bos_token_id": 1})));
    assert_eq!(checkpoint.config["eos_token_id"], 2);
    assert_eq!(checkpoint.chat_template.as_deref(), Some("{{ messages }}"));
    assert!(matches!(checkpoint.tokenizer, TokenizerSource::Embedded(_)));
}

const RANK: u64 = 6;
const NOPE: u64 = 4;
const ROPE: u64 = 2;
const VALUE: u64 = 3;
const EXPERTS: u64 = 4;
const EXPERT_FF: u64 = 5;

/// DeepSeek with two layers: a dense one and a mixture.
fn deepseek(v3: bool, halves: bool) -> File {
    let mut file = base("deepseek2");
    file.meta[1] = ("deepseek2.block_count".to_owned(), 2u32.into());
    let (key, value) = if halves { (RANK + ROPE, RANK) } else { (NOPE + ROPE, VALUE) };
    file = file
        .meta("deepseek2.attention.head_count_kv", if halves { 1u32 } else { 2 })
        .meta("deepseek2.attention.kv_lora_rank", RANK as u32)
        .meta("deepseek2.attention.key_length", key as u32)
        .meta("deepseek2.attention.value_length", value as u32)
        .meta("deepseek2.rope.dimension_count", ROPE as u32)
        .meta("deepseek2.leading_dense_block_count", 1u32)
        .meta("deepseek2.expert_count", EXPERTS as u32)
        .meta("deepseek2.expert_used_count", 2u32)
        .meta("deepseek2.expert_shared_count", 1u32)
        .meta("deepseek2.expert_feed_forward_length", EXPERT_FF as u32)
        .meta("deepseek2.expert_weights_scale", 2.5f32);
    if halves {
        file = file
            .meta("deepseek2.attention.key_length_mla", (NOPE + ROPE) as u32)
            .meta("deepseek2.attention.value_length_mla", VALUE as u32);
    }
    if v3 {
        file = file
            .meta("deepseek2.expert_gating_func", 2u32)
            .meta("deepseek2.expert_weights_norm", true)
            .meta("deepseek2.expert_group_count", 2u32)
            .meta("deepseek2.expert_group_used_count", 1u32)
            .tensor(tensor(60, "blk.1.exp_probs_b.bias", &[EXPERTS]));
    }
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        if layer == 1 {
            file =
                file.tensor(tensor(3, &name("attn_norm"), &[HIDDEN])).tensor(tensor(4, &name("ffn_norm"), &[HIDDEN]));
        }
        file = file
            .tensor(tensor(20, &name("attn_q"), &[2 * (NOPE + ROPE), HIDDEN]))
            .tensor(tensor(21, &name("attn_kv_a_mqa"), &[RANK + ROPE, HIDDEN]))
            .tensor(tensor(22, &name("attn_kv_a_norm"), &[RANK]))
            .tensor(tensor(23, &name("attn_output"), &[HIDDEN, 2 * VALUE]));
        file = if halves {
            file.tensor(tensor(24, &name("attn_k_b"), &[2, RANK, NOPE])).tensor(tensor(
                25,
                &name("attn_v_b"),
                &[2, VALUE, RANK],
            ))
        } else {
            file.tensor(tensor(24, &name("attn_kv_b"), &[2 * (NOPE + VALUE), RANK]))
        };
    }
    mlp(file)
        .tensor(tensor(30, "blk.1.ffn_gate_inp.weight", &[EXPERTS, HIDDEN]))
        .tensor(tensor(31, "blk.1.ffn_gate_exps.weight", &[EXPERTS, EXPERT_FF, HIDDEN]))
        .tensor(tensor(32, "blk.1.ffn_up_exps.weight", &[EXPERTS, EXPERT_FF, HIDDEN]))
        .tensor(tensor(33, "blk.1.ffn_down_exps.weight", &[EXPERTS, HIDDEN, EXPERT_FF]))
        .tensor(tensor(34, "blk.1.ffn_gate_shexp.weight", &[EXPERT_FF, HIDDEN]))
        .tensor(tensor(35, "blk.1.ffn_up_shexp.weight", &[EXPERT_FF, HIDDEN]))
        .tensor(tensor(36, "blk.1.ffn_down_shexp.weight", &[HIDDEN, EXPERT_FF]))
}

#[test]
fn deepseek_v3_has_experts_one_by_one() {
    let (_dir, checkpoint) = opened(&deepseek(true, false));
    let checkpoint = checkpoint.unwrap();
    let c = &checkpoint.config;
    for (key, value) in [
        ("model_type", json!("deepseek_v3")),
        ("num_key_value_heads", json!(2)),
        ("q_lora_rank", json!(null)),
        ("kv_lora_rank", json!(6)),
        ("qk_nope_head_dim", json!(4)),
        ("qk_rope_head_dim", json!(2)),
        ("v_head_dim", json!(3)),
        ("first_k_dense_replace", json!(1)),
        ("n_routed_experts", json!(4)),
        ("n_shared_experts", json!(1)),
        ("num_experts_per_tok", json!(2)),
        ("moe_intermediate_size", json!(5)),
        ("n_group", json!(2)),
        ("topk_group", json!(1)),
        ("topk_method", json!("noaux_tc")),
        ("scoring_func", json!("sigmoid")),
        ("norm_topk_prob", json!(true)),
        ("routed_scaling_factor", json!(2.5)),
    ] {
        assert_eq!(c[key], value, "{key}");
    }
    let per_expert = EXPERT_FF * HIDDEN;
    for expert in 0..EXPERTS {
        let name = format!("model.layers.1.mlp.experts.{expert}.down_proj.weight");
        let weight = load(&checkpoint, &name);
        assert_eq!(weight.shape(), [8, 5]);
        let all = values(33, EXPERTS * per_expert);
        assert_eq!(weight.to_f32(), all[(expert * per_expert) as usize..][..per_expert as usize]);
    }
    let bias = load(&checkpoint, "model.layers.1.mlp.gate.e_score_correction_bias");
    assert_eq!(bias.to_f32(), values(60, 4));
    assert_eq!(load(&checkpoint, "model.layers.1.mlp.shared_experts.up_proj.weight").shape(), [5, 8]);
    assert_eq!(load(&checkpoint, "model.layers.0.self_attn.kv_b_proj.weight").to_f32(), values(24, 14 * 6));
}

#[test]
fn deepseek_v2_is_told_by_its_scores() {
    let (_dir, checkpoint) = opened(&deepseek(false, false));
    let c = checkpoint.unwrap().config;
    assert_eq!(c["model_type"], "deepseek_v2");
    assert_eq!(c["topk_method"], "greedy");
    assert_eq!(c["norm_topk_prob"], false);
}

#[test]
fn halves_of_kv_b_proj_join() {
    let (_dir, checkpoint) = opened(&deepseek(true, true));
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.config["qk_nope_head_dim"], 4);
    assert_eq!(checkpoint.config["v_head_dim"], 3);
    let kv_b = load(&checkpoint, "model.layers.1.self_attn.kv_b_proj.weight");
    assert_eq!(kv_b.shape(), [14, 6]);
    let found = kv_b.to_f32();
    // Head 1, key row 2, column 5 is k_b[1][5][2]; value row 1 of head 1 is v_b[1][1].
    let k_b = values(24, 2 * 6 * 4);
    let v_b = values(25, 2 * 3 * 6);
    assert_eq!(found[(7 + 2) * 6 + 5], k_b[(6 + 5) * 4 + 2]);
    assert_eq!(found[(7 + 4 + 1) * 6..][..6], v_b[(3 + 1) * 6..][..6]);

    let mut half = deepseek(true, true);
    half.tensors.retain(|t| t.name != "blk.1.attn_v_b.weight");
    assert!(refusal(&half).contains("attn_v_b of model.layers.1.self_attn.kv_b_proj.weight is missing"));
}

#[test]
fn rope_factors_become_llama3_scaling() {
    let file = llama().tensor(Tensor::f32("rope_freqs.weight", &[2], &[1.0, 1.0]));
    assert_eq!(opened(&file).1.unwrap().config["rope_scaling"], json!(null));
    // Base 1e6 and two frequencies: wavelengths 6.3 and 6283, against a context of 8192: the second lies between.
    let between = {
        let wavelength = 2.0 * std::f64::consts::PI * 1e6f64.powf(0.5);
        let smooth = (8192.0 / wavelength - 1.0) / 3.0;
        (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
    };
    let file =
        llama().meta("llama.rope.freq_base", 1e6f32).tensor(Tensor::f32("rope_freqs.weight", &[2], &[1.0, between]));
    // Of two factors the larger is taken for the whole factor, with a context at which it is reached: the same rotation.
    let scaling = opened(&file).1.unwrap().config["rope_scaling"].clone();
    assert_eq!(scaling["rope_type"], "llama3");
    assert_eq!(scaling["factor"], f64::from(between));
    assert_eq!(scaling["original_max_position_embeddings"], 4096);
    let odd = llama().tensor(Tensor::f32("rope_freqs.weight", &[2], &[3.0, 2.0]));
    let scaling = opened(&odd).1.unwrap().config["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["long_factor"]), (&json!("longrope"), &json!([3.0, 2.0])));
    let negative = llama().tensor(Tensor::f32("rope_freqs.weight", &[2], &[-3.0, 2.0]));
    assert!(refusal(&negative).contains("rotary factors"));
    let long = llama().tensor(Tensor::f32("rope_freqs.weight", &[3], &[1.0; 3]));
    assert!(refusal(&long).contains("tensor rope_freqs.weight: shape [3], expected [2]"));
}

/// What llama.cpp reads and this program does not compute is refused by name; values that change nothing pass.
#[test]
fn keys_that_results_depend_on_are_refused_by_name() {
    for (key, value) in [
        ("llama.attention.sliding_window", 4u32),
        ("llama.attention.scale", 2),
        ("llama.attn_logit_softcapping", 50),
        ("llama.logit_scale", 2),
        ("llama.rope.scale_linear", 4),
        ("llama.rope.scaling.yarn_attn_factor", 2),
        ("llama.expert_used_count", 2),
        ("llama.expert_chunk_feed_forward_length", 8),
        ("llama.rope.dimension_sections", 1),
        ("llama.attention.indexer.top_k", 2048),
        ("llama.attention.something_new", 1),
        ("llama.ssm.conv_kernel", 4),
    ] {
        let text = refusal(&llama().meta(key, value));
        assert!(text.contains(key), "{key}: {text}");
    }
    for (key, value) in [
        ("llama.attention.sliding_window", 0u32),
        ("llama.attention.sliding_window", 1 << 20),
        ("llama.expert_used_count", 0),
        ("llama.logit_scale", 1),
        ("llama.vocab_size", 99),
        ("mamba.ssm.conv_kernel", 4),
    ] {
        assert!(opened(&llama().meta(key, value)).1.is_ok(), "{key} = {value}");
    }
    assert!(refusal(&llama().meta("general.type", "adapter")).contains("general.type"));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let without = |key: &str| {
        let mut file = llama();
        file.meta.retain(|(k, _)| k != key);
        refusal(&file)
    };
    assert!(without("general.architecture").contains("metadata general.architecture is missing"));
    assert!(without("llama.block_count").contains("metadata llama.block_count is missing"));
    assert!(without("llama.attention.layer_norm_rms_epsilon").contains("layer_norm_rms_epsilon is missing"));
    let odd = |tensor: Tensor| refusal(&llama().tensor(tensor));
    assert!(odd(tensor(1, "blk.0.ssm_in.weight", &[2, 2])).contains("tensor blk.0.ssm_in.weight has no place"));
    assert!(odd(tensor(1, "output.weight", &[2, 2, 2])).contains("tensor output.weight: shape [2, 2, 2]"));
    let typed = |key: &str, value: &str| {
        let mut file = llama();
        file.meta.retain(|(k, _)| k != key);
        refusal(&file.meta(key, value))
    };
    assert!(typed("llama.block_count", "x").contains("llama.block_count: the string \"x\", expected a count"));
    assert!(typed("general.architecture", "mamba").contains("architecture \"mamba\""));
    assert!(refusal(&llama().meta("llama.expert_count", 8u32)).contains("mixture of experts"));
    assert!(refusal(&llama().meta("llama.rope.dimension_count", 2u32)).contains("rotation of a part"));
    let mut wide = llama();
    wide.tensors.retain(|t| t.name != "blk.0.attn_q.weight");
    assert!(refusal(&wide.tensor(tensor(1, "blk.0.attn_q.weight", &[6, 8]))).contains("shape [6, 8], expected 8 rows"));
    let mut experts = deepseek(true, false);
    experts.tensors.retain(|t| t.name != "blk.1.ffn_up_exps.weight");
    let experts = experts.tensor(tensor(1, "blk.1.ffn_up_exps.weight", &[3, EXPERT_FF, HIDDEN]));
    assert!(refusal(&experts).contains("expected [4, _, _]"));
}

#[test]
fn parts_of_a_split_model_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let whole = llama();
    let part = |number: u32, tensors: &[Tensor]| {
        let mut file = if number == 0 { llama() } else { File::default() };
        file.tensors = tensors.to_vec();
        file.meta("split.no", number).meta("split.count", 2u32)
    };
    let path = |number: u32| dir.path().join(format!("m-{number:05}-of-00002.gguf"));
    std::fs::write(path(1), part(0, &whole.tensors[..5]).bytes()).unwrap();
    let missing = open(&path(1)).unwrap_err().to_string();
    assert!(missing.contains("m-00002-of-00002.gguf"), "{missing}");
    std::fs::write(path(2), part(1, &whole.tensors[5..]).bytes()).unwrap();
    let checkpoint = open(&path(1)).unwrap();
    assert_eq!(checkpoint.weights.tensors().len(), whole.tensors.len());
    assert_eq!(load(&checkpoint, "model.layers.0.mlp.up_proj.weight").to_f32(), values(10, FF * HIDDEN));
    assert!(open(&path(2)).unwrap_err().to_string().contains("open the first"));
    std::fs::write(path(2), part(1, &whole.tensors[4..]).bytes()).unwrap();
    assert!(open(&path(1)).unwrap_err().to_string().contains("occurs twice"));
    std::fs::write(path(2), part(0, &whole.tensors[5..]).bytes()).unwrap();
    assert!(open(&path(1)).unwrap_err().to_string().contains("does not call itself part 2"));
}

#[test]
fn damage_after_opening_names_file_and_tensor() {
    let (dir, checkpoint) = opened(&llama());
    let checkpoint = checkpoint.unwrap();
    let path = dir.path().join("model.gguf");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(std::fs::metadata(&path).unwrap().len() - 64).unwrap();
    let error = checkpoint.weights.load("model.layers.0.mlp.down_proj.weight").unwrap_err().to_string();
    assert!(error.contains("model.gguf") && error.contains("mlp.down_proj.weight"), "{error}");
}
