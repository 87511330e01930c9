//! What a `tokenizer.json` may hold of parts, checked before they are made: the `tokenizers` crate takes time that doubles with each
//! level of nesting, and panics at a broken character map.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::charsmap;

/// Levels of JSON in a part. Files of today have seven.
const DEPTH: usize = 16;
/// Values in a part. Files of today have some hundred.
const VALUES: usize = 10_000;
/// Bytes of a regular expression. The longest of today have some thousand.
const PATTERN: usize = 1 << 16;

/// The parts of a `tokenizer.json` around its model, null where there is none.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub(super) struct Parts {
    #[serde(default)]
    pub(super) normalizer: Value,
    #[serde(default)]
    pub(super) pre_tokenizer: Value,
    #[serde(default)]
    pub(super) post_processor: Value,
    #[serde(default)]
    pub(super) decoder: Value,
}

/// The parts of a `tokenizer.json`, checked.
///
/// # Errors
/// What is too deep, too large or broken, by its part's name.
pub(super) fn check(json: &[u8]) -> Result<Parts, String> {
    let parts: Parts = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let named = [
        ("normalizer", &parts.normalizer),
        ("pre_tokenizer", &parts.pre_tokenizer),
        ("post_processor", &parts.post_processor),
        ("decoder", &parts.decoder),
    ];
    for (name, part) in named {
        let mut left = VALUES;
        walk(part, DEPTH, &mut left).map_err(|reason| format!("{name}: {reason}"))?;
    }
    Ok(parts)
}

fn walk(value: &Value, depth: usize, left: &mut usize) -> Result<(), String> {
    if depth == 0 {
        return Err(format!("nested more than {DEPTH} levels deep"));
    }
    *left = left.checked_sub(1).ok_or_else(|| format!("more than {VALUES} values"))?;
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, depth - 1, left)),
        Value::Object(map) => {
            if map.get("type").and_then(Value::as_str) == Some("TemplateProcessing") {
                template(map)?;
            }
            if map.get("type").and_then(Value::as_str) == Some("Precompiled")
                && !map.get("precompiled_charsmap").is_some_and(Value::is_string)
            {
                return Err("Precompiled has no precompiled_charsmap, or one that is no text".to_owned());
            }
            for (key, item) in map {
                match (key.as_str(), item) {
                    ("precompiled_charsmap", Value::String(map)) => charsmap::check(map)?,
                    ("Regex", Value::String(pattern)) if pattern.len() > PATTERN => {
                        return Err(format!("a regular expression of {} bytes", pattern.len()));
                    }
                    _ => walk(item, depth - 1, left)?,
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// What is put around texts: the `tokenizers` crate panics where a token is not described, or one text's template has two texts.
fn template(map: &Map<String, Value>) -> Result<(), String> {
    let described = map.get("special_tokens").and_then(Value::as_object);
    for name in ["single", "pair"] {
        for piece in map.get(name).and_then(Value::as_array).into_iter().flatten() {
            let token = piece.pointer("/SpecialToken/id").and_then(Value::as_str);
            if let Some(token) = token.filter(|token| described.is_none_or(|known| !known.contains_key(*token))) {
                return Err(format!(
                    "the template `{name}` has the token {token:?}, which special_tokens does not describe"
                ));
            }
            if name == "single" && piece.pointer("/Sequence/id").and_then(Value::as_str) == Some("B") {
                return Err("the template `single` has a second text".to_owned());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_tokens_that_it_describes_and_one_text() {
        let check = |json: &[u8]| check(json).map(|_| ());
        let with = |piece: &str| {
            let first = r#"{"type": "TemplateProcessing", "single": ["#;
            let rest = r#"], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}"#;
            check(format!(r#"{{"post_processor": {first}{piece}{rest}}}"#).as_bytes())
        };
        let token = |id: &str| format!(r#"{{"SpecialToken": {{"id": "{id}", "type_id": 0}}}}"#);
        assert_eq!(with(&token("<s>")), Ok(()));
        assert!(with(&token("<q>")).unwrap_err().contains("\"<q>\""));
        assert!(with(r#"{"Sequence": {"id": "B", "type_id": 0}}"#).unwrap_err().contains("second text"));
    }

    #[test]
    fn deep_large_and_broken_parts_are_named() {
        let check = |json: &[u8]| check(json).map(|_| ());
        let nested = |n: usize| {
            let open = r#"{"type": "Sequence", "normalizers": ["#.repeat(n);
            format!(r#"{{"normalizer": {open}{{"type": "NFC"}}{} }}"#, "]}".repeat(n))
        };
        assert_eq!(check(nested(3).as_bytes()), Ok(()));
        assert!(check(nested(30).as_bytes()).unwrap_err().contains("normalizer: nested"));
        assert!(check(nested(30_000).as_bytes()).unwrap_err().contains("recursion limit"));
        let many = format!(r#"{{"decoder": [{}1]}}"#, "1,".repeat(20_000));
        assert!(check(many.as_bytes()).unwrap_err().contains("decoder: more than"));
        let long = format!(r#"{{"pre_tokenizer": {{"pattern": {{"Regex": "{}"}}}}}}"#, "a".repeat(100_000));
        assert!(check(long.as_bytes()).unwrap_err().contains("regular expression"));
        let map = r#"{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAP//"}}"#;
        assert!(check(map.as_bytes()).unwrap_err().contains("normalizer: the text of precompiled_charsmap"));
    }
}
