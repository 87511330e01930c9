//! Calibration text that comes with fourfold, inside the binary: used where nobody names another.
//!
//! Kinds of text that models are used for, of our own or in the public domain (`assets/calibration/SOURCES.md`). Conversations are
//! rendered by the model's own chat template, so that the tokens between turns are among what is calibrated on.

use anyhow::{Context as _, Result};
use fourfold_infer::ChatTemplate;
use serde_json::Value;

const TEXTS: [(&str, &str); 4] = [
    ("prose", include_str!("../assets/calibration/prose.txt")),
    ("languages", include_str!("../assets/calibration/languages.txt")),
    ("code", include_str!("../assets/calibration/code.txt")),
    ("mathematics", include_str!("../assets/calibration/mathematics.txt")),
];
const CHAT: &str = include_str!("../assets/calibration/chat.jsonl");

/// What the text is, in a remark.
pub const CONTENT: &str = "the text that comes with fourfold (prose, many languages, code, mathematics, conversations)";

/// Each kind's name and text; conversations as `template` has them, or in plain words where it is missing or refuses them.
pub fn texts(template: Option<&ChatTemplate>) -> Result<Vec<(String, String)>> {
    let mut texts: Vec<(String, String)> =
        TEXTS.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let mut chat = String::new();
    for line in CHAT.lines() {
        let row: Value = serde_json::from_str(line).context("assets/calibration/chat.jsonl")?;
        let messages = row["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
        let rendered = template.and_then(|template| template.render(messages, None, false).ok());
        chat += &rendered.unwrap_or_else(|| plain(messages));
        chat.push('\n');
    }
    texts.push(("conversations".to_owned(), chat));
    Ok(texts)
}

fn plain(messages: &[Value]) -> String {
    let turn = |message: &Value| {
        let (role, content) = (message["role"].as_str().unwrap_or(""), message["content"].as_str().unwrap_or(""));
        format!("{role}: {content}\n")
    };
    messages.iter().map(turn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_conversation_is_rendered_either_way() {
        let plain = texts(None).unwrap();
        let chatml = texts(Some(&ChatTemplate::chatml().unwrap())).unwrap();
        assert_eq!((plain.len(), chatml.len()), (5, 5));
        let count = |texts: &[(String, String)], word: &str| texts[4].1.matches(word).count();
        let turns = count(&chatml, "<|im_start|>");
        assert!(turns > 2 * CHAT.lines().count() - 1 && count(&chatml, "<|im_end|>") == turns);
        assert_eq!(count(&plain, "<|im_start|>"), 0);
        // At most 300 kB of the binary, and enough of each kind for 32 sequences of 512 tokens, of four bytes, from all of them.
        let bytes: usize = TEXTS.iter().map(|(_, text)| text.len()).sum::<usize>() + CHAT.len();
        assert!(bytes <= 300_000, "{bytes}");
        assert!(plain.iter().all(|(_, text)| text.len() > 9 * 512 * 4), "a kind is short");
    }
}
