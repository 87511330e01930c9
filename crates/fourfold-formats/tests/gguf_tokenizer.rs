//! Tokenizers embedded in GGUF files, rebuilt and run by the `tokenizers` crate.

mod support {
    pub mod gguf;
}

use std::collections::BTreeMap;
use std::path::Path;

use fourfold_formats::gguf::tokenizer::{Embedded, embedded};
use fourfold_formats::gguf::{GgufError, header};
use support::gguf::File;
use tokenizers::Tokenizer;

const TEXTS: &[&str] = &[
    "Hello, world! It's 2024; I'll pay $1,234.56 -- OK?",
    "fn main() {\n    let x = vec![1u8; 100];\n\tprintln!(\"{x:?}\");\n}\n",
    "  leading   and    inner spaces \n\n\n and lines\r\n\ttabs ",
    "Ünïcödé naïve café — “quotes” … ‰ ½",
    "深度求索 四つの技術で四分の一に。 한국어도 됩니다. Русский текст, ελληνικά, עברית, العربية",
    "emoji 🙂🚀👩‍👩‍👧 flags 🇩🇪 combining e\u{301} zero\u{200b}width",
    "١٢٣ ௧௨௩ ⅣⅤ x²+y³ 10000000000 3.14159",
    "a",
    " ",
    "",
];

fn rebuild(file: &File) -> Result<Option<Embedded>, GgufError> {
    let bytes = file.bytes();
    embedded(&header::parse(&bytes[..], bytes.len() as u64).unwrap().metadata)
}

fn tokenizer(file: &File) -> (Tokenizer, Embedded) {
    let embedded = rebuild(file).unwrap().unwrap();
    (Tokenizer::from_bytes(&embedded.json).unwrap(), embedded)
}

/// GPT-2's letter for every byte.
fn byte_letters() -> Vec<String> {
    let mut next = 256;
    (0..=255u32)
        .map(|b| {
            let visible = matches!(b, 33..=126 | 161..=172 | 174..=255);
            let code = if visible {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

/// All bytes, four merges, two control tokens and a user's own.
fn bpe(pre: Option<&str>) -> File {
    let mut tokens = byte_letters();
    tokens.extend(["he", "ll", "hell", "Ġw", "12", "<s>", "</s>", "<tool>"].map(str::to_owned));
    let mut kinds = vec![1i32; tokens.len()];
    kinds[261..].copy_from_slice(&[3, 3, 4]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let file = File::default()
        .meta("tokenizer.ggml.model", "gpt2")
        .meta("tokenizer.ggml.tokens", &tokens[..])
        .meta("tokenizer.ggml.token_type", &kinds[..])
        .meta("tokenizer.ggml.merges", &["h e", "l l", "he ll", "Ġ w", "1 2"][..])
        .meta("tokenizer.ggml.bos_token_id", 261u32)
        .meta("tokenizer.ggml.eos_token_id", 262u32);
    match pre {
        Some(pre) => file.meta("tokenizer.ggml.pre", pre),
        None => file,
    }
}

#[test]
fn byte_level_bpe_merges_splits_and_returns() {
    let (t, special) = tokenizer(&bpe(Some("qwen2")));
    let ids = |text: &str| t.encode(text, false).unwrap().get_ids().to_vec();
    assert_eq!(ids("hello wo"), [258, u32::from(b'o'), 259, u32::from(b'o')]);
    assert_eq!(ids("he<tool>he</s>"), [256, 263, 256, 262]);
    // Qwen 2 cuts numbers into digits, Llama 3 by threes.
    assert_eq!(ids("12"), [u32::from(b'1'), u32::from(b'2')]);
    assert_eq!(tokenizer(&bpe(Some("llama-bpe"))).0.encode("12", false).unwrap().get_ids(), [260]);
    assert_eq!(special.special.bos.as_deref(), Some("<s>"));
    assert_eq!(special.special.eos_ids, [262]);
    assert_eq!(special.special.add_bos, Some(false));
    for text in TEXTS {
        let back = t.decode(&ids(text), false).unwrap();
        // Qwen 2 composes accents.
        assert_eq!(back, text.replace("e\u{301}", "é"));
    }
}

#[test]
fn bos_comes_first_where_the_file_asks_for_it() {
    for (file, add) in [
        (bpe(Some("qwen2")), false),
        (bpe(Some("llama-bpe")), true),
        (bpe(Some("llama-bpe")).meta("tokenizer.ggml.add_bos_token", false), false),
        (bpe(Some("deepseek-v3")).meta("tokenizer.ggml.add_bos_token", true), true),
    ] {
        let (t, special) = tokenizer(&file);
        assert_eq!(special.special.add_bos, Some(add));
        let ids = t.encode("he", true).unwrap().get_ids().to_vec();
        assert_eq!(ids, if add { vec![261, 256] } else { vec![256] });
    }
}

#[test]
fn every_named_splitting_loads() {
    for pre in [
        "default",
        "llama-bpe",
        "qwen2",
        "deepseek-r1-qwen",
        "gpt-2",
        "smollm",
        "deepseek-llm",
        "deepseek-coder",
        "deepseek-v3",
        "stablelm2",
        "dbrx",
        "starcoder",
    ] {
        let (t, _) = tokenizer(&bpe(Some(pre)));
        let text = "x 123 四分 hello\n\n wow!! ÀÉ";
        assert_eq!(t.decode(t.encode(text, false).unwrap().get_ids(), true).unwrap(), text, "{pre}");
    }
    assert!(rebuild(&bpe(None)).unwrap().is_some());
    let error = rebuild(&bpe(Some("superbpe"))).unwrap_err().to_string();
    assert!(error.contains("pre-tokenizer \"superbpe\" is not supported"), "{error}");
}

/// SentencePiece: bytes, single letters, and pieces with scores.
fn spm() -> File {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let pieces = ["▁", "a", "b", "c", "ab", "bc", "▁ab", "abc"];
    tokens.extend(pieces.map(str::to_owned));
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6i32; 256]);
    kinds.extend([1i32; 8]);
    let mut scores = vec![0f32; 259];
    scores.extend([-10.0, -11.0, -12.0, -13.0, -3.0, -2.0, -1.0, -5.0]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    File::default()
        .meta("tokenizer.ggml.model", "llama")
        .meta("tokenizer.ggml.tokens", &tokens[..])
        .meta("tokenizer.ggml.token_type", &kinds[..])
        .meta("tokenizer.ggml.scores", &scores[..])
        .meta("tokenizer.ggml.bos_token_id", 1u32)
        .meta("tokenizer.ggml.eos_token_id", 2u32)
}

#[test]
fn sentencepiece_merges_by_score() {
    let (t, embedded) = tokenizer(&spm());
    let ids = |text: &str| t.encode(text, false).unwrap().get_tokens().to_vec();
    // "bc" (−2) beats "ab" (−3), so that "▁ab" (−1) never forms: only pairs of present pieces can merge.
    assert_eq!(ids("abc"), ["▁", "abc"]);
    assert_eq!(ids("ab"), ["▁ab"]);
    assert_eq!(ids("ab ab"), ["▁ab", "▁ab"]);
    assert_eq!(ids("é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(embedded.special.add_bos, Some(true));
    assert_eq!(t.encode("ab", true).unwrap().get_ids()[0], 1);
    for text in ["abc ab", "é 四 ab", "a  b"] {
        assert_eq!(t.decode(t.encode(text, false).unwrap().get_ids(), true).unwrap(), text);
    }
    let (bare, _) = tokenizer(&spm().meta("tokenizer.ggml.add_space_prefix", false));
    assert_eq!(bare.encode("ab", false).unwrap().get_tokens(), ["ab"]);
}

#[test]
fn a_contradicting_vocabulary_is_refused() {
    let replace = |file: File, key: &str, value: support::gguf::Meta| {
        let mut file = file;
        file.meta.retain(|(k, _)| k != key);
        rebuild(&file.meta(key, value)).unwrap_err().to_string()
    };
    let merges = "tokenizer.ggml.merges";
    assert!(replace(bpe(Some("qwen2")), merges, (&["h  e"][..]).into()).contains("there is no token"));
    assert!(replace(bpe(Some("qwen2")), merges, (&["he"][..]).into()).contains("is not a pair"));
    assert!(replace(bpe(Some("qwen2")), merges, (&["z q"][..]).into()).contains("there is no token \"zq\""));
    assert!(replace(spm(), "tokenizer.ggml.scores", (&[1f32][..]).into()).contains("267 tokens, 1 scores"));
    assert!(replace(spm(), "tokenizer.ggml.token_type", (&[1i32][..]).into()).contains("267 tokens, 1 token types"));
    assert!(replace(spm(), "tokenizer.ggml.bos_token_id", 9999u32.into()).contains("9999, expected the id of a token"));
    assert!(replace(spm(), "tokenizer.ggml.model", "t5".into()).contains("\"t5\" is not supported"));
    assert!(rebuild(&File::default()).unwrap().is_none());
}

/// A GGUF that embeds a `tokenizer.json`, as llama.cpp's converter would write it.
fn convert(tokenizer_json: &Path, pre: &str) -> File {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(tokenizer_json).unwrap()).unwrap();
    let mut tokens: BTreeMap<u64, (&str, i32)> = BTreeMap::new();
    for (text, id) in json["model"]["vocab"].as_object().unwrap() {
        tokens.insert(id.as_u64().unwrap(), (text, 1));
    }
    for added in json["added_tokens"].as_array().unwrap() {
        let kind = if added["special"].as_bool().unwrap() { 3 } else { 4 };
        tokens.insert(added["id"].as_u64().unwrap(), (added["content"].as_str().unwrap(), kind));
    }
    assert!(tokens.keys().copied().eq(0..tokens.len() as u64), "ids without a hole");
    let texts: Vec<&str> = tokens.values().map(|t| t.0).collect();
    let kinds: Vec<i32> = tokens.values().map(|t| t.1).collect();
    let merges: Vec<&str> = json["model"]["merges"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    File::default()
        .meta("tokenizer.ggml.model", "gpt2")
        .meta("tokenizer.ggml.pre", pre)
        .meta("tokenizer.ggml.tokens", &texts[..])
        .meta("tokenizer.ggml.token_type", &kinds[..])
        .meta("tokenizer.ggml.merges", &merges[..])
}

/// DeepSeek's own tokenizers, through GGUF and back. They lie outside the repository: `FOURFOLD_SHARED` names the folder.
#[test]
fn deepseeks_tokenizers_survive_the_way_through_gguf() {
    let Some(shared) = std::env::var_os("FOURFOLD_SHARED") else {
        eprintln!("skipped: FOURFOLD_SHARED is not set");
        return;
    };
    let shared = Path::new(&shared);
    let mut texts: Vec<String> = TEXTS.iter().map(|t| (*t).to_owned()).collect();
    for name in ["code.utf8", "c4.utf8", "wiki.utf8"] {
        let text =
            String::from_utf8_lossy(&std::fs::read(shared.join("data/calibration").join(name)).unwrap()).into_owned();
        texts.push(text.chars().take(50_000).collect());
    }
    texts.push("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>\nyes 1234\n</think>".to_owned());
    for (folder, pre) in [("deepseek-v3", "deepseek-v3"), ("deepseek-r1-distill-qwen-7b", "deepseek-r1-qwen")] {
        let path = shared.join("data/tokenizers").join(folder).join("tokenizer.json");
        let original = Tokenizer::from_file(&path).unwrap();
        let (rebuilt, _) = tokenizer(&convert(&path, pre));
        let mut count = 0;
        for text in &texts {
            let expected = original.encode_fast(text.as_str(), false).unwrap();
            let found = rebuilt.encode_fast(text.as_str(), false).unwrap();
            assert_eq!(
                found.get_ids(),
                expected.get_ids(),
                "{folder}: {:?}",
                text.chars().take(80).collect::<String>()
            );
            let ids = expected.get_ids();
            assert_eq!(rebuilt.decode(ids, false).unwrap(), original.decode(ids, false).unwrap());
            count += ids.len();
        }
        eprintln!("{folder}: {count} ids agree");
    }
}
