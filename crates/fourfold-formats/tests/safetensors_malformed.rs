//! Every malformation of a header has its own variant, and a message that names file and tensor.

mod common;

use common::file_of;
use fourfold_formats::FormatError;
use fourfold_formats::safetensors::{HEADER_LIMIT, HeaderError, Store};
use fourfold_formats::{Access, OpenOptions};

/// Opens bytes as a file and gives back what is wrong with its header.
fn problem(bytes: &[u8]) -> HeaderError {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let mut problems = Vec::new();
    for access in [Access::Read, Access::Map] {
        match Store::single(&path, access).map(|_| ()) {
            Err(FormatError::Header { file, problem }) => {
                assert_eq!(file, path);
                problems.push(problem);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(problems[0], problems[1]);
    let message = FormatError::Header { file: path.clone(), problem: problems[0].clone() }.to_string();
    assert!(message.contains("bad.safetensors"), "{message}");
    problems.remove(0)
}

/// One tensor "t" by its three members.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

/// Two F32 tensors of two elements at those offsets.
fn two(a: &str, b: &str) -> String {
    format!(
        r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
    )
}

#[test]
fn each_malformation_has_its_variant() {
    let t = || "t".to_owned();
    let cases: Vec<(&str, Vec<u8>, HeaderError)> = vec![
        ("an empty file", vec![], HeaderError::TooShort { length: 0 }),
        ("seven bytes", vec![0; 7], HeaderError::TooShort { length: 7 }),
        (
            "a zip file's first bytes",
            b"PK\x03\x04\x14\0\0\x08 and more".to_vec(),
            HeaderError::HeaderBeyondFile { claimed: u64::from_le_bytes(*b"PK\x03\x04\x14\0\0\x08"), available: 9 },
        ),
        (
            "a header cut short",
            file_of("{}", 0)[..9].to_vec(),
            HeaderError::HeaderBeyondFile { claimed: 2, available: 1 },
        ),
        (
            "an unknown dtype",
            file_of(&one("F31", "[2]", "[0,8]"), 8),
            HeaderError::UnknownDtype { tensor: t(), dtype: "F31".to_owned(), shape: vec![2] },
        ),
        (
            "a shape that overflows",
            file_of(&one("F32", "[4294967296,4294967296]", "[0,8]"), 8),
            HeaderError::ShapeOverflow { tensor: t(), dtype: "F32".into(), shape: vec![1 << 32, 1 << 32] },
        ),
        (
            "a shape that overflows once bytes are counted",
            file_of(&one("F64", "[1152921504606846976,8]", "[0,8]"), 8),
            HeaderError::ShapeOverflow { tensor: t(), dtype: "F64".into(), shape: vec![1 << 60, 8] },
        ),
        (
            "offsets that run backwards",
            file_of(&one("F32", "[2]", "[8,0]"), 8),
            HeaderError::OffsetsReversed { tensor: t(), begin: 8, end: 0 },
        ),
        (
            "fewer bytes than the shape needs",
            file_of(&one("F32", "[3]", "[0,8]"), 8),
            HeaderError::LengthMismatch { tensor: t(), dtype: "F32".into(), shape: vec![3], expected: 12, found: 8 },
        ),
        (
            "another dtype than the bytes are of",
            file_of(&one("BF16", "[2]", "[0,8]"), 8),
            HeaderError::LengthMismatch { tensor: t(), dtype: "BF16".into(), shape: vec![2], expected: 4, found: 8 },
        ),
        (
            "a truncated file",
            file_of(&one("F32", "[2]", "[0,8]"), 7),
            HeaderError::BeyondFile { tensor: t(), shape: vec![2], end: 8, available: 7 },
        ),
        (
            "overlapping tensors",
            file_of(&two("[0,8]", "[4,12]"), 12),
            HeaderError::Overlap { tensor: "b".to_owned(), other: "a".to_owned(), begin: 4, end: 8 },
        ),
        (
            "two tensors of the same bytes",
            file_of(&two("[0,8]", "[0,8]"), 8),
            HeaderError::Overlap { tensor: "b".to_owned(), other: "a".to_owned(), begin: 0, end: 8 },
        ),
        (
            "a hole between tensors",
            file_of(&two("[0,8]", "[12,20]"), 20),
            HeaderError::Hole { tensor: "b".to_owned(), from: 8, begin: 12 },
        ),
        (
            "a hole before the first",
            file_of(&one("F32", "[2]", "[4,12]"), 12),
            HeaderError::Hole { tensor: t(), from: 0, begin: 4 },
        ),
        (
            "bytes after the last",
            file_of(&one("F32", "[2]", "[0,8]"), 9),
            HeaderError::Trailing { last: Some(t()), extra: 1 },
        ),
        ("bytes and no tensor", file_of("{}", 3), HeaderError::Trailing { last: None, extra: 3 }),
        (
            "a name that stands twice",
            file_of(&two("[0,8]", "[8,16]").replace("\"b\":", "\"a\":"), 16),
            HeaderError::Duplicate { tensor: "a".to_owned() },
        ),
        (
            // Escaped in one place: the same name all the same.
            "a name that stands twice, spelled differently",
            file_of(&two("[0,8]", "[8,16]").replace("\"b\":", "\"\\u0061\":"), 16),
            HeaderError::Duplicate { tensor: "a".to_owned() },
        ),
    ];
    for (what, bytes, expected) in cases {
        let found = problem(&bytes);
        assert_eq!(found, expected, "{what}");
        let message = found.to_string();
        for tensor in ["t", "a", "b"].iter().filter(|t| format!("{found:?}").contains(&format!("tensor: \"{t}\""))) {
            assert!(message.contains(&format!("tensor {tensor}")), "{what}: {message}");
        }
    }
}

#[test]
fn json_that_is_no_header_says_where() {
    let shapes = format!("[{}]", vec!["1"; 65].join(","));
    for (header, words) in [
        ("", "EOF"),
        ("[]", "expected an object of tensors"),
        ("{\"t\":7}", "tensor t"),
        ("{\"t\":{\"dtype\":\"F32\",\"shape\":[2]}}", "data_offsets"),
        (&one("F32", "[-2]", "[0,8]"), "tensor t: invalid value: integer `-2`"),
        (&one("F32", "[2.5]", "[0,8]"), "tensor t"),
        (&one("F32", "[2]", "[0,8,9]"), "tensor t"),
        (&one("F32", &shapes, "[0,4]"), "at most 64 dimensions"),
        ("{\"__metadata__\":{\"a\":1}}", "__metadata__.a is no string"),
        ("{\"__metadata__\":{},\"__metadata__\":{}}", "duplicate field `__metadata__`"),
        ("{} x", "trailing characters"),
        (&"[".repeat(10_000), "expected an object"),
        (&format!("{{\"__metadata__\":{}", "[".repeat(10_000)), "line 1"),
    ] {
        match problem(&file_of(header, 8)) {
            HeaderError::Json(message) => assert!(message.contains(words), "{header:.60}: {message}"),
            other => panic!("{header:.60}: {other:?}"),
        }
    }
    let mut invalid = file_of("{\"t\":1}", 0);
    invalid[10] = 0xff;
    assert!(matches!(problem(&invalid), HeaderError::Json(_)));
}

/// A header beyond the limit is refused by its length alone: the file is sparse, and nothing of it is read.
#[test]
fn an_oversized_header_is_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big.safetensors");
    std::fs::write(&path, (HEADER_LIMIT + 1).to_le_bytes()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    match Store::single(&path, Access::Read).map(|_| ()) {
        Err(FormatError::Header { problem, .. }) => {
            assert_eq!(problem, HeaderError::HeaderTooLarge { claimed: HEADER_LIMIT + 1 });
        }
        other => panic!("{other:?}"),
    }
}

/// What is right is read: empty tensors, scalars, metadata, padding, tensors in any order.
#[test]
fn odd_but_valid_files_are_read() {
    let header = r#"{"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]},"__metadata__":{"format":"pt"},
        "none":{"dtype":"F16","shape":[0,7],"data_offsets":[4,4]},
        "a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}    "#;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, file_of(header, 8)).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for access in [Access::Read, Access::Map] {
        let model = fourfold_formats::open_with(&path, OpenOptions { access }).unwrap();
        let names: Vec<&str> = model.weights.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a", "none", "b"]);
        assert_eq!(model.weight_bytes, 8);
        assert_eq!(model.weights.load("b").unwrap().to_f32(), [f32::from_le_bytes([4, 5, 6, 7])]);
        assert_eq!(model.weights.load("none").unwrap().shape(), [0, 7]);
        let missing = model.weights.load("c").unwrap_err().to_string();
        assert!(missing.contains("no tensor named c") && missing.contains("model.safetensors"), "{missing}");
    }
}

/// What the reference implementation reads is read: no metadata at all, and types that this program does not compute
/// with, as long as nothing asks for their numbers.
#[test]
fn types_that_nothing_computes_with_are_listed() {
    let header = r#"{"__metadata__":null,"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "freqs_cis":{"dtype":"C64","shape":[3],"data_offsets":[8,32]},
        "codes":{"dtype":"F4","shape":[2,3],"data_offsets":[32,35]},
        "six":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[35,38]}}"#;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, file_of(header, 38)).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    safetensors::SafeTensors::deserialize(&std::fs::read(&path).unwrap()).expect("the reference reads it");
    let model = fourfold_formats::open(&path).unwrap();
    assert_eq!(model.weight_bytes, 38);
    assert_eq!(model.weights.load("w").unwrap().shape(), [2]);
    for (name, dtype, shape) in
        [("freqs_cis", "C64", vec![3]), ("codes", "F4", vec![2, 3]), ("six", "F6_E2M3", vec![4])]
    {
        let info = model.weights.info(name).unwrap();
        assert_eq!((info.storage.as_str(), &info.shape), (dtype, &shape));
        let error = model.weights.load(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(dtype) && error.contains("does not compute"), "{error}");
    }
    for (header, bytes, expected) in [
        (one("C64", "[2]", "[0,8]"), 8, "C64 [2] takes 16 bytes"),
        (one("F4", "[3]", "[0,2]"), 2, "ends inside a byte"),
    ] {
        let message = problem(&file_of(&header, bytes)).to_string();
        assert!(message.contains(expected), "{message}");
    }
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"C64","shape":[1],"data_offsets":[4,12]}}"#;
    assert!(matches!(problem(&file_of(overlap, 12)), HeaderError::Overlap { .. }));
}
