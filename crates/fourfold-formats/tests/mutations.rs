//! Golden checkpoints with bytes changed, cut, copied and inserted at random: opening one and reading all of it ends in values or
//! an error, never in a panic. By default some thousand cases of a fixed seed; FOURFOLD_FUZZ_SECONDS=300 goes on for minutes.

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Random, golden};
use fourfold_formats::{Access, OpenOptions, open_with};
use fourfold_tensor::Weight;

/// Seeds: config.json and model.safetensors.
fn seeds() -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(golden("")).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|d| d.join("config.json").exists());
    dirs.sort();
    let read = |d: &PathBuf| (fs::read(d.join("config.json")).unwrap(), fs::read(d.join("model.safetensors")).unwrap());
    let mut seeds: Vec<_> = dirs.iter().map(read).collect();
    // Parts that the package does not write: double scales, offsets, a codebook, FP8.
    let config =
        br#"{"quantization_config": {"quant_method": "fourfold", "config_groups": {"g": {"targets": ["Linear"],
        "weights": {"num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 4}}}}}"#;
    let model = common::tensors(&[
        ("x.weight_packed", "I32", &[2, 1], &[0x5a; 8]),
        ("x.weight_scale", "F32", &[2, 1], &common::f32_bytes(&[0.5, 0.25])),
        ("x.weight_scale_code", "U8", &[2, 2], &[1, 2, 3, 4]),
        ("x.weight_codebook", "I8", &[16], &[7; 16]),
        ("x.weight_shape", "I64", &[2], &common::i64_bytes(&[2, 8])),
        ("y.weight_packed", "I32", &[2, 1], &[0x5a; 8]),
        ("y.weight_scale", "F32", &[2, 2], &common::f32_bytes(&[0.5, 0.25, 1.0, 2.0])),
        ("y.weight_min", "F32", &[2, 2], &common::f32_bytes(&[0.5, 0.25, 1.0, 2.0])),
        ("y.weight_shape", "I64", &[2], &common::i64_bytes(&[2, 8])),
        ("z.weight", "F8_E4M3", &[4, 3], &[0x38; 12]),
        ("z.weight_scale_inv", "F32", &[2, 2], &common::f32_bytes(&[1.0, 2.0, 3.0, 4.0])),
        ("i.weight", "I8", &[1, 8], &[0xff, 0, 1, 2, 3, 4, 5, 0xfe]),
        ("i.weight_scale", "F32", &[1, 2], &common::f32_bytes(&[0.5, 0.25])),
    ]);
    seeds.push((config.to_vec(), model.clone()));
    let forms =
        br#"{"quantization_config": {"quant_method": "fourfold", "config_groups": {"g": {"targets": ["m.weight_term0"],
        "weights": {"num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 4}}},
        "forms": [{"targets": ["s.weight"], "form": "sparse"},
            {"targets": ["c.weight"], "form": {"sparse": {"num_bits": 4, "group_size": 8}}},
            {"targets": ["m.weight"], "form": {"sum": ["packed", {"low_rank": ["dense", "dense"]}]}}]}}"#;
    let masks: Vec<u8> = [0b1011_0001u64, 0x3ff].iter().flat_map(|word| word.to_le_bytes()).collect();
    let ones = |n| common::f32_bytes(&vec![1.5; n]);
    seeds.push((
        forms.to_vec(),
        common::tensors(&[
            ("s.weight_mask", "I64", &[2, 1], &masks),
            ("s.weight_values", "F32", &[14], &ones(14)),
            ("s.weight_shape", "I64", &[2], &common::i64_bytes(&[2, 10])),
            ("c.weight_mask", "I64", &[2, 1], &masks),
            ("c.weight_values_packed", "I32", &[2], &[0x5a; 8]),
            ("c.weight_values_scale", "F32", &[2, 2], &ones(4)),
            ("c.weight_shape", "I64", &[2], &common::i64_bytes(&[2, 10])),
            ("m.weight_term0_packed", "I32", &[2, 1], &[0x5a; 8]),
            ("m.weight_term0_scale", "F32", &[2, 2], &ones(4)),
            ("m.weight_term0_shape", "I64", &[2], &common::i64_bytes(&[2, 8])),
            ("m.weight_term1_up", "F32", &[2, 1], &ones(2)),
            ("m.weight_term1_down", "F32", &[1, 8], &ones(8)),
        ]),
    ));
    let fp8 = br#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}"#;
    seeds.push((
        fp8.to_vec(),
        common::tensors(&[
            ("z.weight", "F8_E4M3", &[4, 3], &[0x38; 12]),
            ("z.weight_scale_inv", "F32", &[2, 2], &common::f32_bytes(&[1.0, 2.0, 3.0, 4.0])),
        ]),
    ));
    seeds
}

/// One change. Headers are where most of the meaning is, so most changes go to the first kilobytes.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const WORDS: &[&str] = &[
        "0",
        "1",
        "-1",
        "9999999999",
        "18446744073709551615",
        "\"F32\"",
        "\"I32\"",
        "\"I64\"",
        "\"F8_E4M3\"",
        "null",
        "[]",
        "{}",
        "\"group\"",
        "\"tensor\"",
        "\"channel\"",
        "\"Linear\"",
        "_packed",
        "_scale",
        "_shape",
        "_scale_inv",
        "re:.*",
        "true",
        "4",
        "8",
        "[0,0]",
        "\"float\"",
        "\"block\"",
        "\"sparse\"",
        "\"sum\"",
        "\"low_rank\"",
        "_mask",
        "_values",
        "_up",
    ];
    if bytes.is_empty() {
        return bytes.push(random.next() as u8);
    }
    let most = if random.below(4) == 0 { bytes.len() } else { bytes.len().min(4096) };
    let at = random.below(most);
    match random.below(9) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..(at + 1 + random.below(32)).min(bytes.len()))),
        4 => {
            let chunk: Vec<u8> = bytes[at..].iter().take(1 + random.below(64)).copied().collect();
            let to = random.below(most);
            bytes.splice(to..to, chunk);
        }
        5 => bytes[at] = b"0123456789[]{},:\"-"[random.below(18)],
        6 => {
            let value = [0, 1, 8, 100_000_001, bytes.len() as u64, u64::MAX, random.next()][random.below(7)];
            bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(b, v)| *b = v);
        }
        _ => {
            let word = WORDS[random.below(WORDS.len())].as_bytes();
            let end = (at + random.below(12)).min(bytes.len());
            bytes.splice(at..end, word.iter().copied());
        }
    }
}

/// Changes a safetensors file: anywhere, or its header with the length made right again, or its data alone, so that changes get
/// past the first checks.
fn mutate_model(bytes: &mut Vec<u8>, random: &mut Random) {
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    match random.below(4) {
        0 => mutate(bytes, random),
        1 => {
            let mut header = bytes[8..data].trim_ascii_end().to_vec();
            mutate(&mut header, random);
            let length = (header.len() as u64).to_le_bytes();
            bytes.splice(..data, length.into_iter().chain(header));
        }
        _ => {
            let at = data + random.below(bytes.len() - data);
            let value = [0, 1, 0x7f, 0x80, 0xff, random.next() as u8][random.below(6)];
            let end = (at + [1, 2, 4, 8][random.below(4)]).min(bytes.len());
            bytes[at..end].fill(value);
        }
    }
}

/// Opens and reads all; gives how many tensors were read.
fn read_all(dir: &Path, access: Access) -> usize {
    let Ok(model) = open_with(dir, OpenOptions { access }) else { return 0 };
    let mut read = 0;
    for tensor in model.weights.tensors() {
        let Ok(weight) = model.weights.load(&tensor.name) else { continue };
        assert_eq!(weight.shape(), tensor.shape, "{}", tensor.name);
        if let Weight::Quantized(q) = &weight {
            q.validate().unwrap();
        }
        assert_eq!(weight.to_f32().len() as u64, tensor.elements(), "{}", tensor.name);
        read += 1;
    }
    read
}

#[test]
fn no_change_of_bytes_makes_a_reader_panic() {
    let seconds = std::env::var("FOURFOLD_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).map(Duration::from_secs);
    let seeds = seeds();
    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
    let (config, model) = (dir.path().join("config.json"), dir.path().join("model.safetensors"));
    let begin = Instant::now();
    let (mut case, mut whole, mut partly) = (0u64, 0u64, 0u64);
    loop {
        match seconds {
            Some(limit) if begin.elapsed() >= limit => break,
            None if case >= 3000 => break,
            _ => {}
        }
        let mut random = Random((case + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (mut config_bytes, mut model_bytes) = seeds[random.below(seeds.len())].clone();
        for _ in 0..random.below(3) {
            mutate(&mut config_bytes, &mut random);
        }
        mutate_model(&mut model_bytes, &mut random);
        fs::write(&config, &config_bytes).unwrap();
        fs::write(&model, &model_bytes).unwrap();
        let access = if random.below(2) == 0 { Access::Read } else { Access::Map };
        match catch_unwind(AssertUnwindSafe(|| read_all(dir.path(), access))) {
            Ok(0) => {}
            Ok(n) if n < 9 => partly += 1,
            Ok(_) => whole += 1,
            Err(_) => panic!("case {case}; config {}", String::from_utf8_lossy(&config_bytes)),
        }
        case += 1;
    }
    println!("{case} cases, {partly} read in part, {whole} read whole");
    // Were every case refused at once, nothing behind the first check would be tested.
    assert!(partly > 0 && whole > case / 50, "{case} cases, {partly} read in part, {whole} read whole");
}
