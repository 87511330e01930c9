//! The tokenizer wrapper on a byte-level BPE small enough to read.

use fourfold_infer::{InferError, Tokenizer};
use serde_json::json;

/// Bytes as GPT-2 spells them, and two merges; ids 0 and 1 are special. With `bos` the post-processor puts `<s>` in front.
fn file(bos: bool) -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    };
    add("<s>".into());
    add("</s>".into());
    for byte in 0..=255_u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let nth = (0..byte).filter(|b| !matches!(b, 33..=126 | 161..=172 | 174..=255)).count() as u32;
        let spelled = if printable { byte } else { 256 + nth };
        add(char::from_u32(spelled).unwrap().to_string());
    }
    add("th".into());
    add("the".into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false})
    };
    let post = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens":
        {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    let tokenizer = json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": if bos { post } else { json!(null) }, "decoder": {"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e"]}
    });
    serde_json::to_vec(&tokenizer).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(&file(false)).unwrap()
}

#[test]
fn text_comes_back_and_a_files_truncation_is_ignored() {
    let t = tokenizer();
    let text = "the cat — thé 猫\n";
    let ids = t.encode_text(text).unwrap();
    assert!(ids.len() > 3);
    assert_eq!(ids[0], t.token_to_id("the").unwrap());
    assert_eq!(t.decode(&ids).unwrap(), text);
}

#[test]
fn bos_stands_in_front_once() {
    let with = |bos| Tokenizer::from_bytes(&file(true)).unwrap().with_bos(bos);
    assert_eq!(with(None).prefix_token().unwrap(), Some(0));
    assert_eq!(tokenizer().prefix_token().unwrap(), None);
    assert_eq!(with(Some(0)).encode_text("the").unwrap(), [0, 259]);
    assert_eq!(with(Some(0)).encode_text("<s>the").unwrap(), [0, 259]);
    assert_eq!(with(None).encode_text("the").unwrap(), [259]);
    assert_eq!(with(Some(0)).encode_fragment("the</s>").unwrap(), [259, 1]);
}

#[test]
fn a_stream_gives_whole_characters_only() {
    let t = tokenizer();
    let text = "a猫 thé</s>";
    let mut stream = t.detokenizer();
    let pieces: Vec<String> = t.encode_text(text).unwrap().into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.concat(), "a猫 thé", "special tokens are left out");
    assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')), "{pieces:?}");
    assert!(pieces.iter().any(String::is_empty), "bytes of one character are held back");
}

#[test]
fn a_prefix_of_the_tokens_costs_a_prefix_of_the_text() {
    let t = tokenizer().with_bos(Some(0));
    let text = "the cat sat on the mat\nand the dog — thé 猫 — slept.\n".repeat(200);
    let all = t.encode_text(&text).unwrap();
    for limit in [1, 2, 63, 500, all.len() - 1, all.len(), all.len() + 10] {
        assert_eq!(t.encode_prefix(&text, limit).unwrap(), all[..limit.min(all.len())], "{limit}");
    }
    let one_line = "the猫".repeat(3000);
    assert_eq!(t.encode_prefix(&one_line, 1000).unwrap(), t.encode_text(&one_line).unwrap()[..1000]);
}

#[test]
fn a_vocabulary_beyond_the_models_is_refused() {
    let t = tokenizer();
    assert_eq!(t.vocab_size(), 260);
    t.check_fits(260).unwrap();
    t.check_fits(320).unwrap();
    let error = t.check_fits(259).unwrap_err();
    assert!(matches!(error, InferError::WrongTokenizer { largest: 259, vocab_size: 259, .. }), "{error}");
    assert!(error.to_string().contains("does not belong to this model"));
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for bytes in [&b""[..], b"{}", b"[1, 2]", &file(false)[..500]] {
        assert!(matches!(Tokenizer::from_bytes(bytes), Err(InferError::Tokenizer(_))));
    }
    let error = Tokenizer::from_file(std::path::Path::new("/nonexistent/tokenizer.json")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/tokenizer.json"));
}
