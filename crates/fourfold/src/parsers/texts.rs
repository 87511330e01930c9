//! Readers of what turns text into tokens and back, and of what a server is sent.

use std::path::Path;
use std::sync::OnceLock;

use fourfold_formats::gguf::write::tokenizer as gguf_tokenizer;
use fourfold_formats::{SpecialTokens, tokenizer_files};
use fourfold_infer::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};

use super::{files, put};
use crate::tokenizer::TokenizerText;

/// The tokenizer of the program's own small model.
pub(super) fn tiny_tokenizer() -> Option<&'static Tokenizer> {
    static TOKENIZER: OnceLock<Option<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::from_bytes(crate::assets::tokenizer()).ok()).as_ref()
}

/// A text with what tokenizers treat in ways of their own.
const TEXT: &str = "The fox's 3 cafés,\r\n\t  don't 東京 \u{1f98a}\u{301} <s></s> <|im_start|>user\n[INST] 12345 x=1;";

/// Opens a tokenizer and its template, and uses them; whether all of it could be done.
pub(super) fn use_tokenizer(text: &TokenizerText) -> bool {
    let template = text.template().map(|template| template.map(|template| render(&template)));
    let Ok(tokenizer) = text.open(300) else { return false };
    let _ = tokenizer.encode_with_places(TEXT);
    let _ = tokenizer.encode_continuation(TEXT);
    let _ = tokenizer.encode_prefix(TEXT, 5);
    let _ = tokenizer.beyond(300, 3);
    let ids = tokenizer.encode_text(TEXT).unwrap_or_default();
    let some: Vec<u32> = ids.iter().copied().chain(0..40).chain([255, 299, 300, u32::MAX]).collect();
    let _ = tokenizer.decode(&some);
    let mut stream = tokenizer.detokenizer();
    for id in some {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
    matches!(template, Ok(None | Some(true)))
}

/// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.
pub(super) fn tokenizer(input: &[u8], dir: &Path) -> bool {
    let names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];
    let read = || {
        for (name, bytes) in names.iter().zip(files::<4>(input)) {
            put(dir, name, bytes)?;
        }
        let text = TokenizerText::file(&dir.join(names[0]), &json!({"bos_token_id": 0, "eos_token_id": 1})).ok()?;
        if let (Ok(json), Ok(beside)) = (serde_json::from_slice(files::<4>(input)[0]), tokenizer_files(dir)) {
            let _ = gguf_tokenizer::metadata(&json, &SpecialTokens::default(), &beside, 300);
        }
        use_tokenizer(&text).then_some(())
    };
    read().is_some()
}

/// Whether a template prints a conversation with tools.
fn render(template: &ChatTemplate) -> bool {
    let messages = json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "caf\u{e9}?"},
        {"role": "assistant", "content": "<think>a</think>b", "tool_calls": [{"type": "function", "id": "1",
            "function": {"name": "f", "arguments": {"x": 1.5, "y": [null, true]}}}]},
        {"role": "tool", "content": "12", "tool_call_id": "1"}, {"role": "user", "content": [{"type": "text", "text": "and?"}]}
    ]);
    let plain = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
    let tools =
        json!([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let first = template.render(&list(&messages), Some(&tools), true).is_ok();
    first | template.render(&list(&plain), None, false).is_ok()
}

/// A chat template.
pub(super) fn chat_template(input: &[u8], _: &Path) -> bool {
    let read = || {
        let tokens =
            [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned()));
        Some(render(&ChatTemplate::new(std::str::from_utf8(input).ok()?, &tokens).ok()?))
    };
    read().unwrap_or(false)
}

/// The body of a request.
pub(super) fn request(input: &[u8], _: &Path) -> bool {
    fourfold_server::untrusted::request(input)
}

/// The text of an answer, with calls of tools.
pub(super) fn answer(input: &[u8], _: &Path) -> bool {
    std::str::from_utf8(input).is_ok_and(fourfold_server::untrusted::answer)
}
