//! `POST /v1/completions`: a prompt continued as it is.

use std::sync::Arc;

use axum::response::Response;
use fourfold_infer::engine::TokenEvent;
use serde_json::{Value, json};

use crate::ApiError;
use crate::answer::{AnswerText, Delta};
use crate::fields::Fields;
use crate::reply::{self, Answers, Shape};
use crate::run;
use crate::sampling::{self, Choices};
use crate::state::State;

/// Most prompts of a request.
const MOST_PROMPTS: usize = 64;

/// Continues each prompt.
///
/// # Errors
/// A field is wrong, a prompt does not fit, or the server is busy.
pub async fn complete(state: Arc<State>, body: Value) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    reply::check_model(&state, &fields)?;
    let served = &state.served;
    let mut choices = Choices::read(&fields, &served.sampling, served.vocab_size)?;
    // OpenAI's default; the other names of the field leave it open.
    choices.max_tokens = choices.max_tokens.or(Some(16));
    if fields.whole("best_of", 1..=64)?.is_some_and(|best| best as usize != choices.n) {
        return Err(fields.wrong("best_of", "only as many as n are made"));
    }
    let logprobs = sampling::completion_logprobs(&fields)?;
    let grammar = sampling::grammar(&fields)?;
    let prompts = prompts(&state, &fields)?;
    let echo = fields.flag("echo")?.unwrap_or(false);

    let mut answers = Vec::new();
    let mut begins = Vec::new();
    for (text, ids) in &prompts {
        for choice in 0..choices.n {
            let constraint = match &grammar {
                Some((grammar, param)) => Some(state.grammars.constraint(grammar, None, param)?),
                None => None,
            };
            let request = choices.request(choice, ids, &served.stop_ids, logprobs, constraint);
            answers.push(run::start(&state, request, AnswerText::new(&choices.stops, false, false, None), true)?);
            begins.push(if echo { text.clone() } else { String::new() });
        }
    }
    let offsets = begins.iter().map(String::len).collect();
    let shape = Box::new(Plain { wants_logprobs: logprobs.is_some(), begins, offsets });
    Answers::new(Arc::clone(&state), "cmpl", answers, shape).respond(choices.stream, choices.include_usage).await
}

/// The prompts: texts or token ids, one or several, `suffix` put around the hole where there is one.
fn prompts(state: &State, fields: &Fields) -> Result<Vec<(String, Vec<u32>)>, ApiError> {
    let tokenizer = &state.served.tokenizer;
    let wrong = || fields.wrong("prompt", "a string, a list of strings, of token ids or of lists of them is expected");
    let given = fields.get("prompt").ok_or_else(|| fields.wrong("prompt", "this field is required"))?;
    let mut prompts: Vec<Value> = match given {
        Value::String(_) => vec![given.clone()],
        Value::Array(list) if list.first().is_some_and(Value::is_number) => vec![given.clone()],
        Value::Array(list) => list.clone(),
        _ => return Err(wrong()),
    };
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        return Err(fields.wrong("prompt", format!("1 to {MOST_PROMPTS} prompts are expected")));
    }
    let suffix = fields.text("suffix")?.filter(|suffix| !suffix.is_empty());
    let mut read = Vec::with_capacity(prompts.len());
    for prompt in prompts.drain(..) {
        read.push(match (&prompt, suffix) {
            (Value::String(text), None) => (text.clone(), tokenizer.encode_beginning(text)?),
            (Value::String(text), Some(suffix)) => (text.clone(), around_hole(state, fields, text, suffix)?),
            (Value::Array(_), Some(_)) => return Err(fields.wrong("suffix", "it goes with a text as prompt")),
            (Value::Array(ids), None) => {
                let ids = token_ids(ids).ok_or_else(wrong)?;
                (tokenizer.decode(&ids)?, ids)
            }
            _ => return Err(wrong()),
        });
    }
    Ok(read)
}

/// Token ids of a list of numbers.
pub fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

/// A prompt with a hole, by the tokens for it: DeepSeek's, Qwen's and CodeLlama's order.
fn around_hole(state: &State, fields: &Fields, before: &str, after: &str) -> Result<Vec<u32>, ApiError> {
    const TOKENS: [[&str; 3]; 3] = [
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ];
    let tokenizer = &state.served.tokenizer;
    let known = TOKENS.iter().find_map(|names| {
        let ids = names.map(|name| tokenizer.token_to_id(name));
        Some([ids[0]?, ids[1]?, ids[2]?])
    });
    let Some([begin, hole, end]) = known else {
        return Err(fields.wrong("suffix", "this model's tokenizer has no tokens for a hole in the middle"));
    };
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    ids.push(begin);
    ids.extend(tokenizer.encode_fragment(before)?);
    ids.push(hole);
    ids.extend(tokenizer.encode_fragment(after)?);
    ids.push(end);
    Ok(ids)
}

/// The JSON of plain completions.
struct Plain {
    wants_logprobs: bool,
    /// The prompts that are echoed, taken once told.
    begins: Vec<String>,
    /// Bytes told so far, for each choice.
    offsets: Vec<usize>,
}

impl Shape for Plain {
    fn object(&self, _: bool) -> &'static str {
        "text_completion"
    }

    fn opening(&self, index: usize) -> Option<Value> {
        let begin = &self.begins[index];
        (!begin.is_empty()).then(|| choice(index, begin, Value::Null, Value::Null))
    }

    fn chunk(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent]) -> Vec<Value> {
        let logprobs = self.logprobs(state, index, tokens);
        vec![choice(index, &delta.content, logprobs, Value::Null)]
    }

    fn closing(&self, index: usize, reason: &str) -> Value {
        choice(index, "", Value::Null, json!(reason))
    }

    fn whole(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent], reason: &str) -> Value {
        let logprobs = self.logprobs(state, index, tokens);
        choice(index, &(std::mem::take(&mut self.begins[index]) + &delta.content), logprobs, json!(reason))
    }
}

fn choice(index: usize, text: &str, logprobs: Value, reason: Value) -> Value {
    json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason })
}

impl Plain {
    fn logprobs(&mut self, state: &State, index: usize, tokens: &[TokenEvent]) -> Value {
        if !self.wants_logprobs || tokens.is_empty() {
            return Value::Null;
        }
        let text = |id: u32| reply::token_text(state, id).0;
        let offset = &mut self.offsets[index];
        let offsets: Vec<usize> = tokens
            .iter()
            .map(|token| {
                let at = *offset;
                *offset += reply::token_text(state, token.id).1.len();
                at
            })
            .collect();
        let top = |token: &TokenEvent| -> Value {
            Value::Object(token.top.iter().map(|&(id, logprob)| (text(id), json!(logprob))).collect())
        };
        json!({
            "tokens": tokens.iter().map(|token| text(token.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}
