//! Every block type against the reference reader's values (`scripts/golden_gguf.py`), bit for bit.

use std::fs;
use std::path::Path;

use fourfold_formats::gguf::metadata::{Number, Value};
use fourfold_formats::gguf::{GgmlType, GgufError, decode, encode, header};
use fourfold_tensor::{BlockType, DType, Scales, Weight};
use safetensors::SafeTensors;

fn golden(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

#[test]
fn every_block_type_decodes_to_the_reference_values() {
    let file = golden("gguf_blocks.gguf");
    let expected = golden("gguf_blocks.safetensors");
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let header = header::parse(&file[..], file.len() as u64).unwrap();
    let mut types = Vec::new();
    for entry in &header.tensors {
        let bytes = &file[entry.position as usize..][..entry.bytes as usize];
        assert_eq!(bytes, expected.tensor(&format!("{}.blocks", entry.name)).unwrap().data(), "{}", entry.name);
        let shape: Vec<usize> = entry.shape.iter().map(|&d| d as usize).collect();
        let weight = decode(entry.ggml_type, &shape, bytes).unwrap();
        if let Weight::Quantized(q) = &weight {
            q.validate().unwrap();
        }
        let view = expected.tensor(&entry.name).unwrap();
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        for (i, (found, wanted)) in weight.to_f32().into_iter().zip(values).enumerate() {
            assert!(found == wanted, "{} element {i}: {found:e}, expected {wanted:e}", entry.name);
        }
        types.push(entry.ggml_type);
    }
    for t in GgmlType::all() {
        assert!(types.contains(&t), "the golden file has no {t:?}");
    }
}

#[test]
fn blocks_stay_small_in_memory() {
    // Bits a weight in memory: within a twentieth of the file's.
    for name in
        ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4"]
    {
        let file = golden("gguf_blocks.gguf");
        let header = header::parse(&file[..], file.len() as u64).unwrap();
        let entry = header.tensors.iter().find(|t| t.name == name).unwrap();
        let bytes = &file[entry.position as usize..][..entry.bytes as usize];
        let weight = decode(entry.ggml_type, &[2, 256], bytes).unwrap();
        let bits = (weight.byte_len() * 8) as f64 / 512.0;
        let in_file = (entry.bytes * 8) as f64 / 512.0;
        // A codebook is stored once a tensor; this one is tiny. Q2_K's codes of groups fill bytes here, half bytes in a backend;
        // MXFP4's exponents become floats of two bytes.
        let more = match name {
            "q2_k" => 0.51,
            "mxfp4" => 0.3,
            _ => 0.26,
        };
        let most = in_file * 1.05 + more;
        assert!(bits <= most, "{name}: {bits} bits, {in_file} in the file");
    }
}

#[test]
fn metadata_of_every_type_come_back() {
    let file = golden("gguf_blocks.gguf");
    let m = header::parse(&file[..], file.len() as u64).unwrap().metadata;
    let number = |key: &str| match m.get(key) {
        Some(Value::Number(n)) => *n,
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(number("test.uint8"), Number::Unsigned(200));
    assert_eq!(number("test.int8"), Number::Negative(-100));
    assert_eq!(number("test.uint16"), Number::Unsigned(60000));
    assert_eq!(number("test.int16"), Number::Negative(-30000));
    assert_eq!(number("test.uint32"), Number::Unsigned(4_000_000_000));
    assert_eq!(number("test.int32"), Number::Negative(-2_000_000_000));
    assert_eq!(number("test.float32"), Number::Float(0.15625));
    assert_eq!(number("test.bool"), Number::Bool(true));
    assert_eq!(number("test.uint64"), Number::Unsigned(9_223_372_036_854_775_809));
    assert_eq!(number("test.int64"), Number::Negative(-4_611_686_018_427_387_904));
    assert_eq!(number("test.float64"), Number::Float(1.0000000000000002));
    assert_eq!(m.string("test.string").unwrap(), Some("vier mal, quatre fois, 四つ"));
    assert_eq!(m.strings("test.strings").unwrap().unwrap().iter().collect::<Vec<_>>(), ["a", "", "b c", "Ġd"]);
    let floats = m.numbers("test.floats").unwrap().unwrap();
    assert_eq!(floats, [Number::Float(0.5), Number::Float(-0.25)]);
    let ints = m.numbers("test.ints").unwrap().unwrap();
    assert_eq!(ints, [Number::Unsigned(1), Number::Negative(-2), Number::Unsigned(3)]);
}

#[test]
fn groups_keep_their_bytes_beside_the_blocks_floats() {
    let mut block = vec![0u8; 144];
    block[..2].copy_from_slice(&half::f16::from_f32(0.3333).to_le_bytes());
    block[4] = 63;
    let Weight::Quantized(q) = decode(GgmlType::Q4_K, &[1, 256], &block).unwrap() else { panic!("dense") };
    let Scales::Double(scales) = &q.scales else { panic!("{:?}", q.scales) };
    assert_eq!((scales.floats.dtype(), scales.span, scales.codes.len()), (DType::F16, 8, 8));
    assert_eq!(q.scale(0, 0), half::f16::from_f32(0.3333).to_f32() * 63.0);
    assert_eq!(q.scale(0, 1), 0.0);
}

#[test]
fn a_damaged_scale_is_an_error() {
    let mut blocks = vec![0u8; 2 * 18];
    blocks[18..20].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let error = decode(GgmlType::Q4_0, &[2, 32], &blocks).unwrap_err();
    assert!(matches!(error, GgufError::NonFinite { row: 1 }), "{error}");
}

#[test]
fn vectors_are_dense_whatever_their_type() {
    let mut block = vec![0u8; 34];
    block[..2].copy_from_slice(&half::f16::from_f32(2.0).to_le_bytes());
    block[2] = 3;
    let weight = decode(GgmlType::Q8_0, &[32], &block).unwrap();
    assert!(matches!(weight, Weight::Dense(_)));
    assert_eq!(weight.to_f32()[..2], [6.0, 0.0]);
}

#[test]
fn blocks_are_put_together_as_they_were() {
    let file = golden("gguf_blocks.gguf");
    let header = header::parse(&file[..], file.len() as u64).unwrap();
    let mut written = 0;
    for entry in &header.tensors {
        let bytes = &file[entry.position as usize..][..entry.bytes as usize];
        let shape: Vec<usize> = entry.shape.iter().map(|&d| d as usize).collect();
        let (Some(kind), Weight::Quantized(q)) =
            (entry.ggml_type.blocks(), decode(entry.ggml_type, &shape, bytes).unwrap())
        else {
            continue;
        };
        assert_eq!(BlockType::of(&q), Some(kind), "{}", entry.name);
        let mut out = Vec::new();
        encode(kind, &q, 0..q.rows, &mut out);
        assert_eq!(out, bytes, "{}", entry.name);
        written += 1;
    }
    assert_eq!(written, BlockType::all().count());
}
