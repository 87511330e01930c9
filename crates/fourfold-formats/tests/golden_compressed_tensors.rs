//! What the Python package compressed-tensors wrote is read as that package reads it (scripts/golden_compressed_tensors.py).

mod common;

use std::fs;
use std::path::Path;

use common::{golden, open_model, tensors};
use fourfold_formats::{Access, ModelFiles, OpenOptions, SafetensorsWriter, WriteOptions, open_with};
use fourfold_tensor::{Form, Weight, WeightSink};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// The tensors of a golden file whose names begin so, as a file of their own.
fn subset(bytes: &[u8], prefix: &str) -> Vec<u8> {
    let all = SafeTensors::deserialize(bytes).unwrap();
    let chosen: Vec<_> = all.iter().filter(|(name, _)| name.starts_with(prefix)).collect();
    assert!(!chosen.is_empty(), "{prefix}");
    let dtypes: Vec<String> = chosen.iter().map(|(_, v)| format!("{:?}", v.dtype())).collect();
    let list: Vec<_> =
        chosen.iter().zip(&dtypes).map(|((name, v), dtype)| (*name, dtype.as_str(), v.shape(), v.data())).collect();
    tensors(&list)
}

fn config(bits: u8, symmetric: bool, group_size: Option<usize>) -> Value {
    let strategy = if group_size.is_some() { "group" } else { "channel" };
    json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
        {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric,
            "strategy": strategy, "group_size": group_size}}}}})
}

#[test]
fn every_width_packs_as_the_package_packs() {
    let bytes = fs::read(golden("ct_tensors.safetensors")).unwrap();
    let mut cases = vec![("w4_sym_g32_bf16", 4, true, Some(32)), ("actorder", 4, true, Some(32))];
    cases.extend([("w3_sym_channel", 3, true, None), ("w4_asym_channel", 4, false, None)]);
    cases.extend([("w5_asym_channel", 5, false, None), ("w8_sym_channel", 8, true, None)]);
    let names: Vec<(String, u8, bool)> =
        (2..=8).flat_map(|b| [(format!("w{b}_sym_g32"), b, true), (format!("w{b}_asym_g32"), b, false)]).collect();
    cases.extend(names.iter().map(|(name, bits, symmetric)| (name.as_str(), *bits, *symmetric, Some(32))));
    for (name, bits, symmetric, group_size) in cases {
        let (_dir, model) = open_model(&config(bits, symmetric, group_size), &subset(&bytes, &format!("{name}.")));
        let model = model.unwrap();
        let weight = model.weights.load(&format!("{name}.weight")).unwrap();
        let expected = model.weights.load(&format!("{name}.dequantised")).unwrap();
        assert!(matches!(weight, Weight::Quantized(_)), "{name}");
        assert_eq!(weight.to_f32(), expected.to_f32(), "{name}");

        // Written again it is byte for byte what the package wrote.
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let files = fourfold_formats::ModelFiles::config(json!({}));
        let mut sink = Box::new(SafetensorsWriter::create(&out, files, WriteOptions::default()).unwrap());
        let logical = format!("{name}.weight");
        sink.begin(&[(logical.clone(), Form::of(&weight))]).unwrap();
        sink.write(&logical, &weight).unwrap();
        sink.finish().unwrap();
        let ours = fs::read(out.join("model.safetensors")).unwrap();
        let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&bytes).unwrap());
        for (part, view) in ours.iter() {
            let their = theirs.tensor(part).unwrap();
            assert_eq!(
                (view.dtype(), view.shape(), view.data()),
                (their.dtype(), their.shape(), their.data()),
                "{part}"
            );
        }
    }
}

#[test]
fn fp8_blocks_decode_as_pytorch_decodes_them() {
    let bytes = fs::read(golden("ct_tensors.safetensors")).unwrap();
    let config = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}});
    let (dir, model) = open_model(&config, &subset(&bytes, "fp8_block."));
    let model = model.unwrap();
    let info = model.weights.info("fp8_block.weight").unwrap();
    assert_eq!((info.storage.as_str(), info.bytes), ("F8_E4M3", 24 * 40 + 2 * 3 * 4));
    let expected = model.weights.load("fp8_block.dequantised").unwrap().to_f32();
    let rounded: Vec<f32> = expected.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
    for access in [Access::Read, Access::Map] {
        let model = open_with(dir.path(), OpenOptions { access }).unwrap();
        let packed = model.weights.load("fp8_block.weight").unwrap();
        assert!(matches!(packed, Weight::Fp8(_)), "a byte a weight: {}", packed.describe());
        assert_eq!(packed.byte_len() as u64, info.bytes);
        assert_eq!(packed.to_f32(), expected, "each product is rounded to f32 alone");
        assert_ne!(packed.to_f32(), rounded);
    }

    // Written, it is BF16.
    let out = dir.path().join("out");
    let packed = model.weights.load("fp8_block.weight").unwrap();
    let files = ModelFiles::config(json!({}));
    let mut sink = Box::new(SafetensorsWriter::create(&out, files, WriteOptions::default()).unwrap());
    sink.begin(&[("fp8_block.weight".to_owned(), Form::of(&packed))]).unwrap();
    sink.write("fp8_block.weight", &packed).unwrap();
    sink.finish().unwrap();
    let written = fourfold_formats::open(&out).unwrap().weights.load("fp8_block.weight").unwrap();
    assert!(matches!(&written, Weight::Dense(w) if w.dtype() == fourfold_tensor::DType::Bf16));
    assert_eq!(written.to_f32(), rounded);

    // Wrong blocks, and blocks of unknown size, are errors that name the tensor.
    let config = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 16]}});
    let (_dir, model) = open_model(&config, &subset(&bytes, "fp8_block."));
    let error = model.unwrap().weights.load("fp8_block.weight").unwrap_err().to_string();
    assert!(error.contains("fp8_block.weight_scale_inv has shape [2, 3], [1, 3] was expected"), "{error}");
    let (_dir, model) = open_model(&json!({}), &subset(&bytes, "fp8_block."));
    let error = model.unwrap_err();
    assert!(error.contains("tensor fp8_block.weight") && error.contains("weight_block_size"), "{error}");
}

#[test]
fn whole_checkpoints_of_the_package_are_read() {
    let mut seen = 0;
    for entry in fs::read_dir(golden("")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() || !dir.file_name().unwrap().to_string_lossy().starts_with("ct_") {
            continue;
        }
        seen += 1;
        let model = fourfold_formats::open(&dir).unwrap();
        assert!(model.weights.tensors().iter().all(|t| !t.name.contains("weight_")), "parts became one tensor each");
        let quantized = model.weights.tensors().iter().filter(|t| t.storage.starts_with("int")).count();
        assert!(quantized >= 7, "{}: {quantized}", dir.display());
        check_against(&model, &dir.join("golden.safetensors"));
    }
    assert!(seen >= 4, "the golden checkpoints are there");
}

/// The weights that a golden file lists, exactly.
fn check_against(model: &fourfold_formats::Checkpoint, file: &Path) {
    let bytes = fs::read(file).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (name, view) in expected.iter().filter(|(name, _)| name.ends_with(".weight")) {
        let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(model.weights.load(name).unwrap().to_f32(), values, "{}: {name}", file.display());
        compared += 1;
    }
    assert!(compared >= 2, "{}", file.display());
}
