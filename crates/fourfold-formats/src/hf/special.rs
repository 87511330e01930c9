//! Special tokens, gathered from the four files that may name them.

use serde_json::Value;

use crate::SpecialTokens;

/// Strings from tokenizer_config.json, else special_tokens_map.json; ids from generation_config.json, else config.json, else
/// from the added tokens that tokenizer_config.json lists.
pub(super) fn special_tokens(
    config: &Value,
    generation: Option<&Value>,
    tokenizer_config: &Value,
    tokens_map: &Value,
) -> SpecialTokens {
    let text = |key: &str| token_text(tokenizer_config.get(key)).or_else(|| token_text(tokens_map.get(key)));
    let ids = |key: &str| {
        let from_generation = generation.map(|g| token_ids(g.get(key))).unwrap_or_default();
        if from_generation.is_empty() { token_ids(config.get(key)) } else { from_generation }
    };
    let added = |content: &Option<String>| added_id(tokenizer_config, content.as_deref()?);
    let (bos, eos, pad) = (text("bos_token"), text("eos_token"), text("pad_token"));
    let mut eos_ids = ids("eos_token_id");
    if eos_ids.is_empty() {
        eos_ids.extend(added(&eos));
    }
    SpecialTokens {
        bos_id: ids("bos_token_id").first().copied().or_else(|| added(&bos)),
        pad_id: ids("pad_token_id").first().copied().or_else(|| added(&pad)),
        eos_ids,
        unk: text("unk_token"),
        add_bos: tokenizer_config.get("add_bos_token").and_then(Value::as_bool),
        add_eos: tokenizer_config.get("add_eos_token").and_then(Value::as_bool),
        bos,
        eos,
        pad,
    }
}

/// A token given as a string, or as an object with its `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// One id or several.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The id that `added_tokens_decoder` gives a token.
fn added_id(tokenizer_config: &Value, content: &str) -> Option<u32> {
    let tokens = tokenizer_config.get("added_tokens_decoder")?.as_object()?;
    let (id, _) = tokens.iter().find(|(_, t)| t.get("content").and_then(Value::as_str) == Some(content))?;
    id.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_nearer_file_decides() {
        let tokenizer = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true,
            "added_tokens_decoder": {"7": {"content": "<pad>"}, "1": {"content": "<s>"}}});
        let map = json!({"bos_token": "<other>", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>"});
        let generation = json!({"eos_token_id": [2, 9]});
        let special = special_tokens(&json!({"eos_token_id": 5}), Some(&generation), &tokenizer, &map);
        let expected = SpecialTokens {
            bos: Some("<s>".to_owned()),
            bos_id: Some(1),
            eos: Some("</s>".to_owned()),
            eos_ids: vec![2, 9],
            pad: Some("<pad>".to_owned()),
            pad_id: Some(7),
            unk: Some("<unk>".to_owned()),
            add_bos: Some(true),
            add_eos: None,
        };
        assert_eq!(special, expected);
        let special = special_tokens(&json!({"eos_token_id": 5, "bos_token_id": -1}), None, &json!({}), &json!(null));
        assert_eq!((special.eos_ids, special.bos_id), (vec![5], None));
    }
}
