//! What can be wrong with GGUF files: one clear line with the place, exit code 1, and nothing under the output's name.

mod common;
#[path = "../../fourfold-formats/tests/support/gguf.rs"]
mod gguf;

use std::fs;

use common::{folder, fourfold};
use gguf::{File, Tensor};

const HIDDEN: u64 = 32;
const FF: u64 = 64;
const UP: &str = "blk.0.ffn_up.weight";

/// A llama of one block.
fn good() -> File {
    let tensor = |name: &str, shape: &[u64]| {
        let n = shape.iter().product::<u64>();
        Tensor::f32(name, shape, &(0..n).map(|i| (i * 37 % 101) as f32 / 500.0 - 0.1).collect::<Vec<_>>())
    };
    File::default()
        .meta("general.architecture", "llama")
        .meta("llama.block_count", 1u32)
        .meta("llama.context_length", 64u32)
        .meta("llama.embedding_length", HIDDEN as u32)
        .meta("llama.feed_forward_length", FF as u32)
        .meta("llama.attention.head_count", 2u32)
        .meta("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .tensor(tensor("token_embd.weight", &[48, HIDDEN]))
        .tensor(tensor("output_norm.weight", &[HIDDEN]))
        .tensor(tensor("blk.0.attn_norm.weight", &[HIDDEN]))
        .tensor(tensor("blk.0.ffn_norm.weight", &[HIDDEN]))
        .tensor(tensor("blk.0.attn_q.weight", &[HIDDEN, HIDDEN]))
        .tensor(tensor("blk.0.attn_k.weight", &[HIDDEN, HIDDEN]))
        .tensor(tensor("blk.0.attn_v.weight", &[HIDDEN, HIDDEN]))
        .tensor(tensor("blk.0.attn_output.weight", &[HIDDEN, HIDDEN]))
        .tensor(tensor("blk.0.ffn_gate.weight", &[FF, HIDDEN]))
        .tensor(tensor(UP, &[FF, HIDDEN]))
        .tensor(tensor("blk.0.ffn_down.weight", &[HIDDEN, FF]))
}

/// The good file with one tensor changed.
fn with(name: &str, change: impl FnOnce(&mut Tensor)) -> Vec<u8> {
    let mut file = good();
    change(file.tensors.iter_mut().find(|t| t.name == name).unwrap());
    file.bytes()
}

/// The file cannot be compressed, the error has these words, and no output appears.
fn refused_as(name: &str, bytes: &[u8], words: &[&str]) {
    let dir = folder();
    let (source, out) = (dir.path().join(name), dir.path().join("out"));
    fs::write(&source, bytes).unwrap();
    let run = fourfold(args!["compress", &source, &out, "--bits", "4"]);
    for word in words {
        assert!(run.error().contains(word), "{word:?} is not in: {}", run.stderr);
    }
    assert!(!out.exists() && !dir.path().join("out.partial").exists());
}

const NAME: &str = "model.gguf";

/// As [`refused_as`], and the error names the file.
fn refused(bytes: &[u8], words: &[&str]) {
    refused_as(NAME, bytes, &[&[NAME], words].concat());
}

#[test]
fn the_good_file_is_good() {
    let dir = folder();
    let (source, out) = (dir.path().join(NAME), dir.path().join("out"));
    fs::write(&source, good().bytes()).unwrap();
    let run = fourfold(args!["compress", &source, &out, "--bits", "4"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(out.join("model.safetensors").is_file());
}

#[test]
fn truncated() {
    let bytes = good().bytes();
    for length in [0, 3, 20, 100, 700, bytes.len() / 2, bytes.len() - 1] {
        refused(&bytes[..length], &[]);
    }
}

#[test]
fn flipped_bits_end_cleanly() {
    // Some flips are harmless (a letter of an unread name); none may crash, and where one is refused the file is named.
    let bytes = good().bytes();
    let dir = folder();
    let (source, out) = (dir.path().join(NAME), dir.path().join("out"));
    for i in (0..900).step_by(31) {
        let mut bytes = bytes.clone();
        bytes[i] ^= 1 << (i % 8);
        fs::write(&source, bytes).unwrap();
        let run = fourfold(args!["compress", &source, &out, "--bits", "4", "--overwrite", "--quiet"]);
        match run.code {
            Some(0) => fs::remove_dir_all(&out).unwrap(),
            _ => assert!(!run.error().is_empty() && !out.exists(), "byte {i}: {}", run.stderr),
        }
    }
    let mut magic = bytes.clone();
    magic[0] ^= 1;
    refused(&magic, &[]);
}

#[test]
fn oversized_headers() {
    for count in [u64::MAX, 1 << 40, 1 << 31] {
        refused(&File { tensor_count: Some(count), ..good() }.bytes(), &[]);
        refused(&File { meta_count: Some(count), ..good() }.bytes(), &[]);
    }
    refused(&with(UP, |t| t.shape = vec![1 << 40, 1 << 40]), &[UP]);
}

#[test]
fn overlapping_offsets() {
    refused(&with(UP, |t| t.offset = Some(0)), &[UP]);
    refused(&with(UP, |t| t.offset = Some(1 << 50)), &[UP]);
    refused(&with(UP, |t| t.offset = Some(7)), &[UP]);
}

#[test]
fn wrong_types_and_shapes() {
    refused(&with(UP, |t| t.kind = 99), &[UP]);
    // I32: a known type that is none of weights.
    refused(&with(UP, |t| t.kind = 26), &[UP]);
    refused(&with(UP, |t| t.shape = vec![HIDDEN, FF]), &["up_proj"]);
}

#[test]
fn a_missing_tensor() {
    let mut file = good();
    file.tensors.retain(|t| t.name != UP);
    refused(&file.bytes(), &["up_proj"]);
}

#[test]
fn a_missing_part() {
    let file = good().meta("split.no", 0u32).meta("split.count", 2u32).meta("split.tensors.count", 12u32);
    refused_as("model-00001-of-00002.gguf", &file.bytes(), &["model-00002-of-00002.gguf"]);
}

#[test]
fn an_unknown_architecture() {
    let mut file = good();
    file.meta[0].1 = "perceptron".into();
    refused(&file.bytes(), &["perceptron"]);
}
