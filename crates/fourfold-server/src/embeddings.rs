//! `POST /v1/embeddings`: the mean of the last hidden states, of length 1.

use std::sync::Arc;

use axum::response::Response;
use fourfold_infer::engine::{Event, Request};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::ApiError;
use crate::completions::token_ids;
use crate::fields::Fields;
use crate::reply;
use crate::state::State;

/// Most texts of a request.
const MOST_INPUTS: usize = 2048;

/// Embeds each input.
///
/// # Errors
/// A field is wrong, an input does not fit, or the server is busy.
pub async fn embed(state: Arc<State>, body: Value) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    reply::check_model(&state, &fields)?;
    let as_base64 = match fields.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(fields.wrong("encoding_format", "float or base64 is expected")),
    };
    let hidden = state.served.hidden_size as u64;
    fields.whole("dimensions", hidden..=hidden)?;
    let inputs = inputs(&state, &fields)?;
    let mut data = Vec::with_capacity(inputs.len());
    let mut tokens = 0;
    for (index, ids) in inputs.into_iter().enumerate() {
        tokens += ids.len();
        let embedding = one(&state, ids).await?;
        let embedding = if as_base64 { json!(encode(&embedding)) } else { json!(embedding) };
        data.push(json!({ "object": "embedding", "index": index, "embedding": embedding }));
    }
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    let model = &state.served.name;
    Ok(reply::json_response(&json!({ "object": "list", "data": data, "model": model, "usage": usage })))
}

fn inputs(state: &State, fields: &Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = || fields.wrong("input", "a string, a list of strings, of token ids or of lists of them is expected");
    let list = match fields.get("input") {
        Some(text @ Value::String(_)) => vec![text.clone()],
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => vec![Value::Array(list.clone())],
        Some(Value::Array(list)) => list.clone(),
        _ => return Err(wrong()),
    };
    if list.is_empty() || list.len() > MOST_INPUTS {
        return Err(fields.wrong("input", format!("1 to {MOST_INPUTS} inputs are expected")));
    }
    list.iter()
        .map(|input| match input {
            Value::String(text) => Ok(state.served.tokenizer.encode_text(text)?),
            Value::Array(ids) => token_ids(ids).ok_or_else(wrong),
            _ => Err(wrong()),
        })
        .collect()
}

async fn one(state: &State, ids: Vec<u32>) -> Result<Vec<f32>, ApiError> {
    let (sender, mut events) = mpsc::unbounded_channel();
    let request = Request {
        ids,
        max_tokens: Some(0),
        stop_ids: Vec::new(),
        sampling: state.served.sampling.clone(),
        logit_bias: Vec::new(),
        logprobs: None,
        constraint: None,
        embed: true,
        on_event: Box::new(move |event| sender.send(event).is_ok()),
    };
    state.served.engine.submit(request)?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Embedding(mut embedding) => {
                let length = embedding.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                if !(length.is_finite() && length > 0.0) {
                    return Err(ApiError::internal("the hidden states are not finite"));
                }
                embedding.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
                return Ok(embedding);
            }
            Event::Failed(error) => return Err(error.into()),
            Event::Started { .. } | Event::Reading { .. } | Event::Token(_) | Event::Finished(_) => {}
        }
    }
    Err(ApiError::internal("the computation ended unexpectedly"))
}

/// Little-endian f32 in base64, as OpenAI's client asks for it.
fn encode(values: &[f32]) -> String {
    base64(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}

/// Bytes in base64 (RFC 4648, section 4).
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0_u32, |word, &byte| (word << 8) | u32::from(byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let letter = LETTERS[((word >> (18 - 6 * place)) & 63) as usize];
            text.push(if place <= group.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_of_little_endian_floats() {
        assert_eq!(super::encode(&[1.0]), "AACAPw==");
        assert_eq!(super::encode(&[1.0, -2.0]), "AACAPwAAAMA=");
        assert_eq!(super::encode(&[1.0, -2.0, 0.5]), "AACAPwAAAMAAAAA/");
    }
}
