//! `/tokenize`, `/detokenize` and `/apply-template`, as llama.cpp has them.

use axum::response::Response;
use serde_json::{Value, json};

use crate::ApiError;
use crate::completions::token_ids;
use crate::fields::Fields;
use crate::reply::{json_response, token_text};
use crate::state::State;

/// `content` (or `prompt`) to `tokens`.
///
/// # Errors
/// A field is wrong.
pub fn tokenize(state: &State, body: &Value) -> Result<Response, ApiError> {
    let fields = Fields::of_body(body)?;
    let text = match fields.text("content")? {
        Some(text) => text,
        None => fields.text("prompt")?.ok_or_else(|| fields.wrong("content", "this field is required"))?,
    };
    let tokenizer = &state.served.tokenizer;
    let special = fields.flag("add_special")?.or(fields.flag("add_special_tokens")?).unwrap_or(false);
    let ids = if special { tokenizer.encode_text(text)? } else { tokenizer.encode_fragment(text)? };
    let count = ids.len();
    let tokens = if fields.flag("with_pieces")?.unwrap_or(false) {
        ids.iter().map(|&id| json!({ "id": id, "piece": token_text(state, id).0 })).collect()
    } else {
        json!(ids)
    };
    Ok(json_response(
        &json!({ "tokens": tokens, "count": count, "max_model_len": state.served.engine.settings().context }),
    ))
}

/// `tokens` to `content`.
///
/// # Errors
/// A field is wrong.
pub fn detokenize(state: &State, body: &Value) -> Result<Response, ApiError> {
    let fields = Fields::of_body(body)?;
    let ids = fields.list("tokens")?.and_then(token_ids);
    let ids = ids.ok_or_else(|| fields.wrong("tokens", "a list of token ids is expected"))?;
    let vocab_size = state.served.vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(fields.wrong("tokens", format!("{id} is no token: there are {vocab_size}")));
    }
    let text = state.served.tokenizer.decode(&ids)?;
    Ok(json_response(&json!({ "content": text, "prompt": text })))
}

/// `messages` to the `prompt` that the model would see.
///
/// # Errors
/// A field is wrong, or the template refuses the conversation.
pub fn apply_template(state: &State, body: &Value) -> Result<Response, ApiError> {
    let prompt = crate::chat::prompt_of(state, body)?;
    Ok(json_response(&json!({ "prompt": prompt.text })))
}
