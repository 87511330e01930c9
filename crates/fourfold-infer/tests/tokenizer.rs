//! The tokenizer wrapper on a byte-level BPE small enough to read.

use fourfold_infer::{InferError, Tokenizer, TokenizerSettings};
use serde_json::{Map, Value, json};

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
    assert_eq!(Tokenizer::from_bytes(&file(true)).unwrap().bos(), Some(0), "the post-processor's");
    assert_eq!(tokenizer().bos(), None);
    assert_eq!(with(Some(0)).encode_text("the").unwrap(), [0, 259]);
    assert_eq!(with(Some(0)).encode_text("<s>the").unwrap(), [0, 259]);
    assert_eq!(with(None).encode_text("the").unwrap(), [259]);
    assert_eq!(with(Some(0)).encode_fragment("the</s>").unwrap(), [259, 1]);
}

/// `add_bos_token` and `add_eos_token` go before the post-processor; without them it decides.
#[test]
fn what_is_put_around_a_text() {
    let ids = |bos: bool, config: Value| {
        let settings = TokenizerSettings::from_files(&config, &Value::Null, &Value::Null).unwrap();
        Tokenizer::from_bytes(&file(bos)).unwrap().with_settings(&settings).unwrap().encode_text("the").unwrap()
    };
    let with = |flags: Value| {
        let mut config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        config.as_object_mut().unwrap().extend(flags.as_object().unwrap().clone());
        config
    };
    assert_eq!(ids(true, with(json!({}))), [0, 259]);
    assert_eq!(ids(false, with(json!({}))), [259]);
    assert_eq!(ids(false, with(json!({"add_bos_token": true}))), [0, 259]);
    assert_eq!(ids(true, with(json!({"add_bos_token": false}))), [259]);
    assert_eq!(ids(true, with(json!({"add_bos_token": null}))), [0, 259]);
    assert_eq!(ids(false, with(json!({"add_eos_token": true}))), [259, 1]);
    assert_eq!(ids(true, with(json!({"add_bos_token": true, "add_eos_token": true}))), [0, 259, 1]);
    assert_eq!(ids(true, json!({"add_bos_token": true})), [259], "no token to add");
}

#[test]
fn tokens_that_stand_beside_the_tokenizer_are_read() {
    let build = |config: Value, map: Value, added: Value| {
        TokenizerSettings::from_files(&config, &map, &added)
            .and_then(|settings| Tokenizer::from_bytes(&file(false)).unwrap().with_settings(&settings))
    };
    let none = || Value::Null;
    let next = 260;
    for (config, map, added) in [
        (json!({"added_tokens_decoder": {"260": {"content": "<x>", "special": true}}}), none(), none()),
        (json!({"additional_special_tokens": ["<x>"]}), none(), none()),
        (json!({"extra_special_tokens": {"image_token": "<x>"}}), none(), none()),
        (json!({"extra_special_tokens": ["<x>"]}), none(), none()),
        (json!({"image_token": "<x>"}), none(), none()),
        (none(), json!({"pad_token": {"content": "<x>"}}), none()),
        (none(), none(), json!({"<x>": 260})),
    ] {
        let tokenizer = build(config.clone(), map, added).unwrap();
        assert_eq!(tokenizer.encode_fragment("the<x>the").unwrap(), [259, next, 259], "{config}");
        assert_eq!(tokenizer.beyond(260, 9), [(260, "<x>".to_owned())]);
        let error = tokenizer.with_rows(260).encode_text("the<x>").unwrap_err();
        assert!(matches!(error, InferError::NoRow { id: 260, .. }) && error.to_string().contains("\"<x>\""), "{error}");
    }
    let split = build(json!({"split_special_tokens": true}), none(), none()).unwrap();
    assert!(split.encode_fragment("</s>").unwrap().len() > 1);
    for (config, named) in [
        (json!({"added_tokens_decoder": {"7": {"content": "<x>"}}}), "the id 7"),
        (json!({"added_tokens_decoder": {"a": {"content": "<x>"}}}), "added_tokens_decoder"),
        (json!({"add_bos_token": "yes"}), "add_bos_token"),
        (json!({"bos_token": 3}), "bos_token"),
        (json!({"fix_mistral_regex": true}), "fix_mistral_regex"),
        (json!([1]), "tokenizer_config.json"),
    ] {
        let error = build(config, none(), none()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// A tokenizer as SentencePiece makes them: byte tokens, a space before every text.
fn byte_fallback() -> Tokenizer {
    let mut vocab = Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(token.to_owned(), json!(id));
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(3 + byte));
    }
    for (i, token) in ["▁", "a", "b", "▁a"].into_iter().enumerate() {
        vocab.insert(token.to_owned(), json!(259 + i));
    }
    let added = json!([{"id": 2, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false}]);
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "pre_tokenizer": null,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["▁ a"], "byte_fallback": true, "unk_token": "<unk>",
            "fuse_unk": true},
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

/// Any tokens at all, broken characters among them: the pieces together are what decoding all of them gives.
#[test]
fn a_stream_is_equal_to_decoding_the_whole() {
    let mut state = 7u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut broken = 0;
    for (tokenizer, bytes) in [(byte_fallback(), 3..259), (tokenizer(), 2..258)] {
        let size = tokenizer.vocab_size() as u64;
        let some_char = "猫é".bytes().map(|b| bytes.start + u32::from(b)).collect::<Vec<_>>();
        for _ in 0..60 {
            let mut ids = Vec::new();
            for _ in 0..random(300) {
                match random(4) {
                    0 => ids.extend(&some_char[..random(6) as usize]),
                    1 => ids.push(random(size + 5) as u32),
                    _ => ids.push(bytes.end + random(3) as u32),
                }
            }
            let mut stream = tokenizer.detokenizer();
            let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            text += &stream.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&ids).unwrap(), "{ids:?}");
            broken += usize::from(text.contains('\u{fffd}'));
        }
    }
    assert!(broken > 20, "{broken} texts had broken characters");
}

#[test]
fn a_continuation_has_no_space_in_front() {
    let tokenizer = byte_fallback();
    assert_eq!(tokenizer.encode_fragment("a").unwrap(), [262]);
    assert_eq!(tokenizer.encode_continuation("a").unwrap(), [260]);
    assert_eq!(tokenizer.encode_continuation(" a").unwrap(), [262]);
    assert_eq!(self::tokenizer().encode_continuation("the").unwrap(), [259]);
}

#[test]
fn a_stream_gives_whole_characters_only() {
    let t = tokenizer();
    let text = "a猫 thé</s>";
    let mut stream = t.detokenizer();
    let pieces: Vec<String> = t.encode_text(text).unwrap().into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.concat() + &stream.finish().unwrap(), "a猫 thé", "special tokens are left out");
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
fn what_is_no_tokenizer_is_an_error() {
    for bytes in [&b""[..], b"{}", b"[1, 2]", &file(false)[..500]] {
        assert!(matches!(Tokenizer::from_bytes(bytes), Err(InferError::Tokenizer(_))));
    }
    let error = Tokenizer::from_file(std::path::Path::new("/nonexistent/tokenizer.json")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/tokenizer.json"));
}

/// The `tokenizers` crate alone would leave such a text in one piece.
#[test]
fn an_expression_that_backtracks_without_end_is_an_error() {
    let with = |pre: Value, normalizer: Value| {
        let mut json: Value = serde_json::from_slice(&file(false)).unwrap();
        (json["pre_tokenizer"], json["normalizer"]) = (pre, normalizer);
        Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
    };
    let split = json!({"type": "Split", "pattern": {"Regex": "(?=.)(t|t)+(?=x)| ?\\w+"}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let bad = json!({"type": "Replace", "pattern": {"Regex": "(?=.)(t|t)+(?=x)"}, "content": "t"});
    for tokenizer in [
        with(json!({"type": "Sequence", "pretokenizers": [split, bytes]}), Value::Null),
        with(bytes.clone(), json!({"type": "Sequence", "normalizers": [bad]})),
    ] {
        assert_eq!(tokenizer.encode_text("the ttx").unwrap()[0], 259);
        let error = tokenizer.encode_text(&"t".repeat(50)).unwrap_err().to_string();
        assert!(error.contains("(t|t)+") && error.contains("50 bytes"), "{error}");
        assert!(tokenizer.encode_with_places(&"t".repeat(50)).is_err());
        assert_eq!(tokenizer.encode_text("the").unwrap(), [259], "a failure is forgotten");
    }
}

/// The text that follows another has the space that its first token begins with; a text's own beginning has none.
#[test]
fn a_stream_goes_on_from_tokens_before() {
    for (tokenizer, first) in [(byte_fallback(), "a a"), (self::tokenizer(), "the cat")] {
        let ids = tokenizer.encode_fragment(&format!("{first} a 猫 a")).unwrap();
        let whole = tokenizer.decode(&ids).unwrap();
        for cut in 0..=ids.len() {
            let mut stream = tokenizer.detokenizer_after(&ids[..cut]).unwrap();
            let mut text: String = ids[cut..].iter().map(|&id| stream.push(id).unwrap()).collect();
            text += &stream.finish().unwrap();
            let before = tokenizer.decode(&ids[..cut]).unwrap();
            // Where the cut lies inside of a character, its parts are broken on one side.
            if !before.contains('\u{fffd}') {
                assert_eq!(before + &text, whole, "{cut}");
            }
        }
    }
}
