//! One damaged file for each malformation, and the error that names it.

mod support {
    pub mod gguf;
}

use fourfold_formats::gguf::{GgufError, header};
use support::gguf::{File, Meta, Tensor, string_bytes};

fn good() -> File {
    File::default()
        .meta("general.architecture", "llama")
        .meta("general.name", "x")
        .tensor(Tensor::f32("a", &[2, 4], &[0.0; 8]))
        .tensor(Tensor::new("b", &[2, 32], 8, vec![0; 68]))
}

fn parse(bytes: &[u8]) -> Result<header::Header, GgufError> {
    header::parse(bytes, bytes.len() as u64)
}

#[test]
fn a_sound_file_parses() {
    for version in [2, 3] {
        let header = parse(&File { version, ..good() }.bytes()).unwrap();
        assert_eq!(header.tensors.len(), 2);
        assert_eq!(header.tensors[1].shape, [2, 32]);
        assert_eq!(header.tensors[1].bytes, 68);
        assert_eq!(header.tensors[0].position % 32, 0);
    }
}

/// A file with one more tensor.
fn with(tensor: Tensor) -> File {
    good().tensor(tensor)
}

fn with_offset(name: &str, offset: u64) -> File {
    with(Tensor { offset: Some(offset), ..Tensor::f32(name, &[8], &[0.0; 8]) })
}

#[test]
fn every_malformation_has_its_error() {
    let nested = |depth: usize| {
        let mut bytes = Meta::array(0, 1, vec![7]).bytes;
        for _ in 1..depth {
            bytes = Meta::array(9, 1, bytes).bytes;
        }
        Meta { kind: 9, bytes }
    };
    let wide = Tensor::new("w", &[1 << 40, 1 << 40], 0, Vec::new());
    let cases: Vec<(&str, File, &str)> = vec![
        ("magic", File { magic: *b"GGML", ..good() }, "not a GGUF file"),
        ("big endian", File { version: 3u32.swap_bytes(), ..good() }, "big-endian"),
        ("version 1", File { version: 1, ..good() }, "GGUF version 1"),
        ("version 4", File { version: 4, ..good() }, "GGUF version 4"),
        ("too many tensors", File { tensor_count: Some(u64::MAX), ..good() }, "tensors cannot lie in"),
        (
            "tensors beyond the header",
            File { tensor_count: Some(3), ..good() },
            "unknown ggml type|dimensions|truncated|cannot",
        ),
        ("too many entries", File { meta_count: Some(1 << 60), ..good() }, "metadata entries cannot lie in"),
        ("key twice", good().meta("general.name", "y"), "general.name occurs twice"),
        ("value type", good().meta("k", Meta { kind: 99, bytes: vec![0; 8] }), "k: unknown value type 99"),
        ("element type", good().meta("k", Meta::array(77, 0, vec![])), "k: unknown value type 77"),
        ("boolean", good().meta("k", Meta { kind: 7, bytes: vec![2] }), "k: 2 is not a boolean"),
        ("nesting", good().meta("k", nested(5)), "nested more than 4 deep"),
        ("array of numbers", good().meta("k", Meta::array(10, u64::MAX / 4, vec![])), "elements of k cannot lie in"),
        ("array of strings", good().meta("k", Meta::array(8, 1 << 50, vec![])), "elements of k cannot lie in"),
        ("array of arrays", good().meta("k", Meta::array(9, 1 << 50, vec![])), "elements of k cannot lie in"),
        (
            "string",
            good().meta("k", Meta { kind: 8, bytes: u64::MAX.to_le_bytes().to_vec() }),
            "truncated: the value of k",
        ),
        (
            "text",
            good().meta("k", Meta { kind: 8, bytes: [string_bytes("x")[..8].to_vec(), vec![0xff]].concat() }),
            "the value of k is not UTF-8",
        ),
        ("key length", good().meta(&"k".repeat(70_000), 1u32), "70000 bytes long"),
        ("name length", with(Tensor::f32(&"n".repeat(65), &[1], &[0.0])), "65 bytes long, at most 64"),
        ("tensor twice", with(Tensor::f32("a", &[1], &[0.0])), "tensor a occurs twice"),
        ("five dimensions", with(Tensor::f32("c", &[1, 1, 1, 1, 1], &[0.0])), "tensor c: 5 dimensions"),
        ("no dimension", with(Tensor::f32("c", &[], &[0.0])), "tensor c: 0 dimensions"),
        ("empty", with(Tensor::f32("c", &[3, 0], &[])), "shape [3, 0] is empty or overflows"),
        ("overflow", with(wide), "is empty or overflows"),
        ("unknown type", with(Tensor::new("c", &[32], 200, vec![0; 32])), "tensor c: unknown ggml type 200"),
        (
            "unsupported type",
            with(Tensor::new("c", &[256], 16, vec![0; 66])),
            "tensor c: ggml type IQ2_XXS is not supported",
        ),
        (
            "row length",
            with(Tensor::new("c", &[2, 33], 8, vec![0; 70])),
            "tensor c of shape [2, 33]: rows do not divide into Q8_0 blocks of 32",
        ),
        (
            "row length, whole blocks in all",
            with(Tensor::new("c", &[2, 16], 8, vec![0; 34])),
            "tensor c of shape [2, 16]: rows do not divide",
        ),
        ("alignment 0", good().meta("general.alignment", 0u32), "alignment 0 is not a power of two"),
        ("alignment 24", good().meta("general.alignment", 24u32), "alignment 24 is not a power of two"),
        ("misaligned", with_offset("c", 33), "tensor c: offset 33 is not a multiple of the alignment 32"),
        ("outside", with_offset("c", 1 << 40), "lie outside the data section"),
        ("outside, overflowing", with_offset("c", u64::MAX - 31), "lie outside the data section"),
        ("overlap", with_offset("c", 0), "tensors a and c overlap"),
        ("overlap by one block", with_offset("c", 96), "tensors b and c overlap"),
    ];
    for (name, file, expected) in cases {
        let error = parse(&file.bytes()).expect_err(name).to_string();
        assert!(expected.split('|').any(|e| error.contains(e)), "{name}: {error}");
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = good().bytes();
    for len in 0..bytes.len() {
        // The last tensor ends before its padding does.
        if len >= bytes.len() - 28 {
            assert!(parse(&bytes[..len]).is_ok(), "{len} of {}", bytes.len());
        } else {
            assert!(parse(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
        }
    }
}

#[test]
fn a_flipped_bit_never_panics() {
    let bytes = good().bytes();
    let mut refused = 0;
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(parse(&damaged).is_err());
    }
    // Bits of texts and data may change unseen; those of counts, types and offsets may not.
    assert!(refused > 500, "{refused} of {} refused", bytes.len() * 8);
}
