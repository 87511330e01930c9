//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use fourfold_infer::engine::TokenEvent;
use serde_json::{Value, json};

use crate::ApiError;
use crate::answer::{AnswerText, Delta};
use crate::conversation::{self, Prompt, ToolUse};
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::reply::{self, Answers, Shape};
use crate::run::{self, Step};
use crate::sampling::{self, Choices};
use crate::state::State;

/// Answers a chat request.
///
/// # Errors
/// A field is wrong, the conversation does not fit, or the server is busy.
pub async fn complete(state: Arc<State>, body: Value) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    reply::check_model(&state, &fields)?;
    let served = &state.served;
    let choices = Choices::read(&fields, &served.sampling, served.vocab_size)?;
    let logprobs = sampling::chat_logprobs(&fields)?;
    let tools = ToolUse::read(&fields)?;
    let prompt = conversation::prompt(&state, &fields, &tools)?;
    let grammar = grammar_of(&state, &fields, &tools)?;
    let ids = served.tokenizer.encode_beginning(&prompt.text)?;
    let format = if tools.tools.is_empty() { None } else { state.tools };

    let mut answers = Vec::with_capacity(choices.n);
    for choice in 0..choices.n {
        let constraint = match &grammar {
            Some((grammar, param)) => Some(state.grammars.constraint(grammar, Some(prompt.opens_thoughts), param)?),
            None => None,
        };
        let request = choices.request(choice, &ids, &served.stop_ids, logprobs, constraint);
        let text = AnswerText::new(&choices.stops, state.thinks, prompt.opens_thoughts, format);
        answers.push(run::start(&state, request, text, false)?);
    }
    let shape = Box::new(Chat { wants_logprobs: logprobs.is_some(), called: vec![0; choices.n] });
    Answers::new(Arc::clone(&state), "chatcmpl", answers, shape).respond(choices.stream, choices.include_usage).await
}

/// The prompt's text alone, as `/apply-template` gives it.
///
/// # Errors
/// As [`complete`].
pub fn prompt_of(state: &State, body: &Value) -> Result<Prompt, ApiError> {
    let fields = Fields::of_body(body)?;
    conversation::prompt(state, &fields, &ToolUse::read(&fields)?)
}

/// The grammar of the answer: of the format asked for, or of a call that has to come.
fn grammar_of(state: &State, fields: &Fields, tools: &ToolUse) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let format = sampling::grammar(fields)?;
    if !tools.required {
        return Ok(format);
    }
    if format.is_some() {
        return Err(fields.wrong("tool_choice", "an answer that is a call of a tool has no other format"));
    }
    let Some(markup) = state.tools else {
        return Err(fields.wrong("tool_choice", "this model's chat template does not show how it calls tools"));
    };
    Ok(Some((Grammar::Lark(markup.grammar(&tools.tools, tools.parallel)), "tools")))
}

/// The JSON of chat answers.
struct Chat {
    wants_logprobs: bool,
    /// Calls told so far, for each choice.
    called: Vec<usize>,
}

impl Shape for Chat {
    fn object(&self, stream: bool) -> &'static str {
        if stream { "chat.completion.chunk" } else { "chat.completion" }
    }

    fn opening(&self, index: usize) -> Option<Value> {
        Some(json!({ "index": index, "delta": { "role": "assistant", "content": "" }, "logprobs": null,
                     "finish_reason": null }))
    }

    fn chunk(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent]) -> Vec<Value> {
        let logprobs = self.logprobs(state, tokens);
        let mut said = serde_json::Map::new();
        if !delta.reasoning.is_empty() {
            said.insert("reasoning_content".to_owned(), json!(delta.reasoning));
        }
        if !delta.content.is_empty() {
            said.insert("content".to_owned(), json!(delta.content));
        }
        let chunk = |said: Value, logprobs: Value| json!({ "index": index, "delta": said, "logprobs": logprobs, "finish_reason": null });
        let mut chunks = Vec::new();
        if !said.is_empty() || (!logprobs.is_null() && delta.calls.is_empty()) {
            chunks.push(chunk(Value::Object(said), logprobs));
        }
        for call in delta.calls {
            let number = self.called[index];
            self.called[index] += 1;
            let head = json!({ "index": number, "id": reply::new_id("call"), "type": "function",
                               "function": { "name": call.name, "arguments": "" } });
            chunks.push(chunk(json!({ "tool_calls": [head] }), Value::Null));
            let rest = json!({ "index": number, "function": { "arguments": call.arguments } });
            chunks.push(chunk(json!({ "tool_calls": [rest] }), Value::Null));
        }
        chunks
    }

    fn closing(&self, index: usize, reason: &str) -> Value {
        json!({ "index": index, "delta": {}, "logprobs": null, "finish_reason": reason })
    }

    fn whole(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent], reason: &str) -> Value {
        let calls: Vec<Value> = delta
            .calls
            .iter()
            .map(|call| {
                json!({ "id": reply::new_id("call"), "type": "function",
                        "function": { "name": call.name, "arguments": call.arguments } })
            })
            .collect();
        let content = if delta.content.is_empty() && !calls.is_empty() { Value::Null } else { json!(delta.content) };
        let mut message = json!({ "role": "assistant", "content": content });
        if !delta.reasoning.is_empty() {
            message["reasoning_content"] = json!(delta.reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
        }
        json!({ "index": index, "message": message, "logprobs": self.logprobs(state, tokens), "finish_reason": reason })
    }
}

impl Chat {
    fn logprobs(&self, state: &State, tokens: &[TokenEvent]) -> Value {
        if !self.wants_logprobs || tokens.is_empty() {
            return Value::Null;
        }
        let one = |id: u32, logprob: f32| {
            let (token, bytes) = reply::token_text(state, id);
            json!({ "token": token, "logprob": logprob, "bytes": bytes })
        };
        let all: Vec<Value> = tokens
            .iter()
            .map(|token| {
                let mut entry = one(token.id, token.logprob.unwrap_or_default());
                entry["top_logprobs"] = token.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
                entry
            })
            .collect();
        json!({ "content": all, "refusal": null })
    }
}

/// Everything that steps told, joined.
pub fn join(all: &mut Delta, tokens: &mut Vec<TokenEvent>, step: Step) -> Option<Result<run::Done, ApiError>> {
    match step {
        Step::More { delta, tokens: more } => {
            all.reasoning += &delta.reasoning;
            all.content += &delta.content;
            all.calls.extend(delta.calls);
            tokens.extend(more);
            None
        }
        Step::Done(done) => Some(Ok(done)),
        Step::Failed(error) => Some(Err(error)),
    }
}
