//! Directories, indices and packed weights that are wrong: the message names file and tensor, and nothing panics.

mod common;

use common::{directory, f32_bytes, i32_bytes, i64_bytes, open_model, tensors};
use fourfold_formats::FormatError;
use fourfold_formats::safetensors::IndexError;
use serde_json::{Value, json};

fn shard(name: &str) -> Vec<u8> {
    tensors(&[(name, "F32", &[2], &f32_bytes(&[1.0, 2.0]))])
}

/// What is wrong with the index of a directory of shards "s1" (tensor a) and "s2" (tensor b).
fn index_problem(index: &str, with_second: bool) -> FormatError {
    let (first, second) = (shard("a"), shard("b"));
    let mut files: Vec<(&str, &[u8])> =
        vec![("config.json", b"{}"), ("model.safetensors.index.json", index.as_bytes()), ("s1.safetensors", &first)];
    if with_second {
        files.push(("s2.safetensors", &second));
    }
    let dir = directory(&files);
    let error = fourfold_formats::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("model.safetensors.index.json"), "{error}");
    error
}

#[test]
fn each_malformation_of_an_index_has_its_variant() {
    let owned = str::to_owned;
    let two = r#"{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"}}"#;
    for (index, with_second, expected) in [
        (two, false, IndexError::MissingShard { shard: owned("s2.safetensors"), tensor: owned("b"), tensors: 2 }),
        (two, true, IndexError::MissingTensor { tensor: owned("c"), shard: owned("s2.safetensors") }),
        (
            r#"{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}"#,
            true,
            IndexError::Duplicate { tensor: owned("a") },
        ),
        (
            r#"{"weight_map": {"a": "../s1.safetensors"}}"#,
            true,
            IndexError::ShardPath { tensor: owned("a"), shard: owned("../s1.safetensors") },
        ),
        (
            r#"{"weight_map": {"a": "/etc/passwd"}}"#,
            true,
            IndexError::ShardPath { tensor: owned("a"), shard: owned("/etc/passwd") },
        ),
        (r#"{"weight_map": {"a": ""}}"#, true, IndexError::ShardPath { tensor: owned("a"), shard: owned("") }),
    ] {
        match index_problem(index, with_second) {
            FormatError::Index { problem, .. } => assert_eq!(problem, expected, "{index}"),
            other => panic!("{index}: {other}"),
        }
    }
    for index in ["", "{}", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}"] {
        assert!(matches!(index_problem(index, true), FormatError::Json { .. }), "{index}");
    }
}

/// A tensor in two shards, or in another one than the index says, leaves it open which is meant.
#[test]
fn shards_that_contradict_their_index_are_refused() {
    let index = r#"{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}"#;
    let owned = str::to_owned;
    let (a, b, s1, s2) = (owned("a"), owned("b"), owned("s1.safetensors"), owned("s2.safetensors"));
    for (first, second, expected) in [
        (["a", "b"], ["b", "c"], IndexError::InTwoShards { tensor: b.clone(), first: s1.clone(), second: s2.clone() }),
        (["b", "c"], ["a", "d"], IndexError::OtherShard { tensor: a, shard: s1, other: s2 }),
    ] {
        let dir = directory(&[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
            ("s1.safetensors", &shard_of(&first)),
            ("s2.safetensors", &shard_of(&second)),
        ]);
        match fourfold_formats::open(dir.path()).unwrap_err() {
            FormatError::Index { problem, .. } => assert_eq!(problem, expected),
            other => panic!("{other}"),
        }
    }
    // What the index does not list is there all the same.
    let dir = directory(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("s1.safetensors", &shard_of(&["a", "c"])),
        ("s2.safetensors", &shard("b")),
    ]);
    assert_eq!(fourfold_formats::open(dir.path()).unwrap().weights.load("c").unwrap().shape(), [2]);
}

/// Several tensors of the values of [`shard`].
fn shard_of(names: &[&str]) -> Vec<u8> {
    let data: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let views = names
        .iter()
        .map(|&name| (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn shards_are_one_checkpoint() {
    let index = r#"{"metadata": {"total_size": 16}, "weight_map": {"b": "s2.safetensors", "a": "s1.safetensors"}}"#;
    let dir = directory(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("s1.safetensors", &shard("a")),
        ("s2.safetensors", &shard("b")),
    ]);
    let model = fourfold_formats::open(dir.path()).unwrap();
    assert_eq!(model.weight_bytes, 16);
    assert_eq!(model.weights.load("b").unwrap().to_f32(), [1.0, 2.0]);
    // A shard that is malformed is named itself.
    std::fs::write(dir.path().join("s2.safetensors"), b"short").unwrap();
    let error = fourfold_formats::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("s2.safetensors"), "{error}");
}

#[test]
fn what_is_no_checkpoint_says_what_it_lacks() {
    let model = shard("a");
    for (files, words) in [
        (vec![], "holds no config.json"),
        (vec![("config.json", &b"{}"[..])], "holds no safetensors file"),
        (vec![("a.gguf", b"GGUF"), ("b.gguf", b"GGUF")], "holds 2 GGUF files"),
        (vec![("a.gguf", b"GGUF")], "a.gguf"),
        (vec![("config.json", b"{}"), ("pytorch_model.bin", b"PK")], "PyTorch pickles"),
        (vec![("config.json", b"{}"), ("a.safetensors", &model), ("b.safetensors", &model)], "2 safetensors files"),
        (vec![("config.json", b"{"), ("model.safetensors", &model)], "config.json: EOF"),
        (vec![("config.json", b"[]"), ("model.safetensors", &model)], "no JSON object"),
        (
            vec![("config.json", b"{}"), ("tokenizer.json", b"{\"a\""), ("model.safetensors", &model)],
            "tokenizer.json: EOF",
        ),
        (
            vec![
                ("config.json", b"{}"),
                ("tokenizer_config.json", b"{\"chat_template\": 7}"),
                ("model.safetensors", &model),
            ],
            "chat_template is neither",
        ),
        (
            vec![
                ("config.json", br#"{"quantization_config": {"quant_method": "bitsandbytes"}}"#),
                ("model.safetensors", &model),
            ],
            "quant_method is \"bitsandbytes\"",
        ),
    ] {
        let dir = directory(&files);
        let error = fourfold_formats::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&*dir.path().to_string_lossy()), "{words}: {error}");
    }
    let dir = directory(&[("weights.pt", b"PK")]);
    for (name, words) in [("none", "no such file"), ("weights.pt", "neither a directory nor")] {
        let error = fourfold_formats::open(&dir.path().join(name)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn chat_templates_of_every_place_are_found() {
    let model = shard("a");
    let named = br#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    let tools = br#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]}"#;
    let folder = "additional_chat_templates/tool_use.jinja";
    for (files, expected) in [
        (vec![], None),
        (vec![("tokenizer_config.json", &br#"{"chat_template": "S"}"#[..])], Some("S")),
        (vec![("tokenizer_config.json", named)], Some("D")),
        (vec![("tokenizer_config.json", named), ("chat_template.json", br#"{"chat_template": "C"}"#)], Some("C")),
        (vec![("tokenizer_config.json", named), ("chat_template.jinja", b"J")], Some("J")),
        (vec![("tokenizer_config.json", tools)], Some("has the chat templates rag, tool_use, and none")),
        (vec![("tokenizer_config.json", named), (folder, b"F"), ("chat_template.jinja", b"J")], Some("J")),
        (vec![("tokenizer_config.json", named), (folder, b"F")], Some("has the chat templates tool_use, and none")),
    ] {
        let mut all: Vec<(&str, &[u8])> = vec![("config.json", b"{}"), ("model.safetensors", &model)];
        all.extend(files.iter().copied());
        let dir = directory(&all);
        let checkpoint = fourfold_formats::open(dir.path()).unwrap();
        let (got, tool) = (checkpoint.chat_template.unwrap_or_default(), checkpoint.tool_template);
        assert!(
            if expected.is_none_or(|e| e.len() < 2) {
                Some(got.as_str()).filter(|t| !t.is_empty()) == expected
            } else {
                got.contains(expected.unwrap())
            },
            "{got}"
        );
        let has = |name: &str| files.iter().any(|(file, _)| *file == name);
        let lists = files.iter().any(|(_, text)| text.starts_with(br#"{"chat_template": [{"name": "tool_use""#));
        let wanted = match has(folder) {
            true => Some("F"),
            false if has("chat_template.jinja") || has("chat_template.json") => None,
            false => lists.then_some("T"),
        };
        assert_eq!(tool.as_deref(), wanted);
        assert_eq!(checkpoint.merged_tokenizer_config.is_some(), has(folder));
    }
}

/// Name, type, shape and bytes of each part.
type Parts = Vec<(String, String, Vec<usize>, Vec<u8>)>;
/// One way to be wrong.
type Edit = fn(&mut Parts);

/// A packed weight [2, 8] of 4 bits in groups of 4, and one way to be wrong.
fn packed(edit: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let part = |suffix: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| {
        (format!("m.weight{suffix}"), dtype.to_owned(), shape.to_vec(), bytes)
    };
    let mut parts = vec![
        part("_packed", "I32", &[2, 1], i32_bytes(&[0x7654_3210, 0x0123_4567])),
        part("_scale", "F32", &[2, 2], f32_bytes(&[1.0, 2.0, 3.0, 4.0])),
        part("_shape", "I64", &[2], i64_bytes(&[2, 8])),
        part("_zero_point", "I32", &[1, 2], i32_bytes(&[0x31, 0x42])),
    ];
    edit(&mut parts);
    let parts: Vec<(&str, &str, &[usize], &[u8])> =
        parts.iter().map(|(n, d, s, b)| (n.as_str(), d.as_str(), s.as_slice(), b.as_slice())).collect();
    tensors(&parts)
}

fn config(targets: &str) -> Value {
    json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
        {"group_0": {"targets": [targets], "weights": {"num_bits": 4, "type": "int", "symmetric": false,
            "strategy": "group", "group_size": 4}}}}})
}

#[test]
fn a_packed_weight_is_one_tensor() {
    let (_dir, model) = open_model(&config("Linear"), &packed(|_| {}));
    let model = model.unwrap();
    let info = &model.weights.tensors()[0];
    assert_eq!((info.name.as_str(), info.storage.as_str(), info.bytes), ("m.weight", "int4 g4", 8 + 16 + 16 + 8));
    assert_eq!(info.shape, [2, 8]);
    // Zero points down the columns: rows 0 and 1 have 1 and 3 in group 0, 2 and 4 in group 1.
    let expected: Vec<f32> = (0..8)
        .map(|c| if c < 4 { 1.0 * (c as f32 - 1.0) } else { 2.0 * (c as f32 - 2.0) })
        .chain((0..8).map(|c| if c < 4 { 3.0 * (7.0 - c as f32 - 3.0) } else { 4.0 * (7.0 - c as f32 - 4.0) }))
        .collect();
    assert_eq!(model.weights.load("m.weight").unwrap().to_f32(), expected);
    assert_eq!(model.weights.tensors().len(), 1);
}

#[test]
fn each_malformation_of_a_packed_weight_is_named() {
    let cases: Vec<(&str, Edit, &str)> = vec![
        ("no scale", |p| drop(p.remove(1)), "m.weight_scale is missing"),
        ("no shape", |p| drop(p.remove(2)), "m.weight_shape is missing"),
        ("no zero point", |p| drop(p.remove(3)), "m.weight_zero_point is missing"),
        ("codes of another type", |p| p[0].1 = "F32".to_owned(), "m.weight_packed is F32, I32 was expected"),
        ("scales of another type", |p| p[1].1 = "I32".to_owned(), "m.weight_scale is I32"),
        ("a shape of another type", |p| p[2].1 = "F64".to_owned(), "m.weight_shape is F64"),
        ("zero points of another type", |p| p[3].1 = "F32".to_owned(), "m.weight_zero_point is F32"),
        ("a shape that is negative", |p| p[2].3 = i64_bytes(&[-2, 8]), "shape part says [-2, 8]"),
        ("a shape that is huge", |p| p[2].3 = i64_bytes(&[i64::MAX, i64::MAX]), "shape part says"),
        ("a shape of more columns", |p| p[2].3 = i64_bytes(&[2, 9]), "codes of shape [2, 1] do not fit"),
        ("a shape of other rows", |p| p[2].3 = i64_bytes(&[3, 8]), "codes of shape [2, 1] do not fit"),
        (
            "fewer scales",
            |p| {
                p[1].2 = vec![2, 1];
                p[1].3.truncate(8);
            },
            "m.weight_scale has shape [2, 1], [2, 2] was expected",
        ),
        (
            "fewer zero points",
            |p| {
                p[3].2 = vec![1, 1];
                p[3].3.truncate(4);
            },
            "m.weight_zero_point has shape [1, 1], [1, 2] was expected",
        ),
        (
            "a g_idx beyond the groups",
            |p| p.push(("m.weight_g_idx".to_owned(), "I32".to_owned(), vec![8], i32_bytes(&[0, 0, 0, 0, 1, 1, 1, 2]))),
            "g_idx[7] = 2, of 2 groups",
        ),
        (
            "a g_idx that is negative",
            |p| p.push(("m.weight_g_idx".to_owned(), "I32".to_owned(), vec![8], i32_bytes(&[0, 0, 0, 0, 1, 1, 1, -1]))),
            "g_idx[7] = 4294967295",
        ),
        (
            "the weight also unpacked",
            |p| p.push(("m.weight".to_owned(), "F32".to_owned(), vec![1], f32_bytes(&[1.0]))),
            "is there both packed and plain",
        ),
    ];
    for (what, edit, words) in cases {
        let (_dir, model) = open_model(&config("Linear"), &packed(edit));
        let error = match model {
            Err(error) => error,
            Ok(model) => model.weights.load("m.weight").unwrap_err().to_string(),
        };
        assert!(error.contains(words), "{what}: {error}");
        assert!(error.contains("model.safetensors") && error.contains("tensor m.weight"), "{what}: {error}");
    }
    let (_dir, model) = open_model(&config("Embedding"), &packed(|_| {}));
    let error = model.unwrap_err();
    assert!(error.contains("no scheme") && error.contains("m.weight"), "{error}");
}
