//! The `tokenizer.ggml.pre` of a `tokenizer.json`: the name under which llama.cpp splits texts in the same way.

use serde_json::Value;

use super::super::GgufError;
use super::pre::{self, GPT2};

/// Names to choose from, the most usual of those that split alike first.
const NAMES: [&str; 10] = [
    "llama-bpe",
    "qwen2",
    "deepseek-v3",
    "smollm",
    "gpt-2",
    "dbrx",
    "stablelm2",
    "deepseek-llm",
    "deepseek-coder",
    "default",
];

/// A step of splitting.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// What a pattern matches is cut out.
    Pattern(String),
    /// Numbers become single digits.
    Digits,
    /// Bytes are spelled as letters.
    Bytes,
}

/// The steps of a pre-tokenizer, nested sequences flattened and byte-level splitting spelled out.
fn steps(pre_tokenizer: &Value, out: &mut Vec<Step>) -> Result<(), GgufError> {
    let refuse = |what: String| Err(GgufError::Inexpressible(what));
    let flag = |key: &str, default: bool| pre_tokenizer[key].as_bool().unwrap_or(default);
    match pre_tokenizer["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            let parts = pre_tokenizer["pretokenizers"].as_array();
            parts.into_iter().flatten().try_for_each(|part| steps(part, out))
        }
        "Split" => {
            let behavior = pre_tokenizer["behavior"].as_str().unwrap_or_default();
            let Some(pattern) = pre_tokenizer["pattern"]["Regex"].as_str() else {
                return refuse("a pre-tokenizer that splits at a fixed string has no name in GGUF".to_owned());
            };
            // Cutting out what matches, and dropping what does not, are one where a pattern matches everything.
            if !matches!((behavior, flag("invert", false)), ("Isolated", false) | ("Removed", true)) {
                return refuse(format!("a pre-tokenizer whose pattern is {behavior} has no name in GGUF"));
            }
            out.push(Step::Pattern(pattern.to_owned()));
            Ok(())
        }
        "Digits" if flag("individual_digits", false) => {
            out.push(Step::Digits);
            Ok(())
        }
        "ByteLevel" => {
            if flag("add_prefix_space", true) {
                return refuse(
                    "byte-level splitting with add_prefix_space has no name in GGUF; llama.cpp adds no space"
                        .to_owned(),
                );
            }
            if flag("use_regex", true) {
                out.push(Step::Pattern(GPT2.to_owned()));
            }
            out.push(Step::Bytes);
            Ok(())
        }
        other => refuse(format!("a pre-tokenizer of type {other:?} has no name in GGUF")),
    }
}

/// Whether a normalizer changes nothing.
fn is_empty(normalizer: &Value) -> bool {
    normalizer.is_null()
        || (normalizer["type"] == "Sequence" && normalizer["normalizers"].as_array().is_some_and(Vec::is_empty))
}

/// The name of a byte-level `tokenizer.json`'s way to split.
///
/// # Errors
/// A way that none of the known names stands for: a guess would give other tokens, silently worse.
pub fn name_of(tokenizer: &Value) -> Result<&'static str, GgufError> {
    let mut wanted = Vec::new();
    steps(&tokenizer["pre_tokenizer"], &mut wanted)?;
    let ignores = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
    let normalizer = &tokenizer["normalizer"];
    for name in NAMES {
        let known = pre::named(if name == "default" { None } else { Some(name) })?;
        let mut found = Vec::new();
        steps(&known.pre_tokenizer, &mut found)?;
        let normal = is_empty(normalizer) || (normalizer["type"] == "NFC" && known.normalizer == *normalizer);
        if found == wanted && known.ignore_merges == ignores && normal {
            return Ok(name);
        }
    }
    let patterns: Vec<String> = wanted.iter().map(|step| format!("{step:?}")).collect();
    Err(GgufError::Inexpressible(format!(
        "llama.cpp has no known name (tokenizer.ggml.pre) for this way to split a text: {}{}, normalizer {normalizer}; a \
         file with another name would give other tokens",
        patterns.join(", "),
        if ignores { ", ignore_merges" } else { "" },
    )))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_name_is_found_by_its_own_splitting() {
        for name in NAMES {
            let known = pre::named(if name == "default" { None } else { Some(name) }).unwrap();
            let tokenizer = json!({"pre_tokenizer": known.pre_tokenizer, "normalizer": known.normalizer,
                "model": {"ignore_merges": known.ignore_merges}});
            let found = name_of(&tokenizer).unwrap();
            let same = pre::named(if found == "default" { None } else { Some(found) }).unwrap();
            assert_eq!(same.pre_tokenizer, known.pre_tokenizer, "{name} is taken for {found}");
        }
    }

    #[test]
    fn files_as_they_are_published_have_their_names() {
        let smollm = json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}, "model": {}});
        assert_eq!(name_of(&smollm).unwrap(), "smollm");
        let gpt2 = json!({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "model": {}});
        assert_eq!(name_of(&gpt2).unwrap(), "gpt-2");
        for (what, tokenizer) in [
            ("add_prefix_space", json!({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true}})),
            ("Whitespace", json!({"pre_tokenizer": {"type": "Whitespace"}})),
            ("Removed", json!({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed"}})),
            (
                "no known name",
                json!({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}}),
            ),
            (
                "no known name",
                json!({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "normalizer": {"type": "NFKC"}}),
            ),
        ] {
            let error = name_of(&tokenizer).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
