//! The turns of a conversation: OpenAI's `role` and `content`, ShareGPT's `from` and `value`.

use serde_json::{Map, Value, json};

use super::record::Conversation;
use super::rows::kind;

/// Whether a value says nothing.
pub(super) fn nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

impl Conversation {
    /// Puts a system message before everything.
    ///
    /// # Errors
    /// There is another one already.
    pub(super) fn begin_with_system(&mut self, text: &str) -> Result<(), String> {
        match self.messages.first() {
            Some(first) if first["role"] == "system" && first["content"] == text => Ok(()),
            Some(first) if first["role"] == "system" => Err("another system message than the first turn".to_owned()),
            _ => {
                self.messages.insert(0, json!({ "role": "system", "content": text }));
                self.given.iter_mut().for_each(|i| *i += 1);
                Ok(())
            }
        }
    }

    /// Turns of the assistant that say nothing are given.
    pub(super) fn leave_out_empty(&mut self) {
        for (i, turn) in self.messages.iter().enumerate() {
            let text = turn.get("content").and_then(Value::as_str).unwrap_or_default();
            let calls = turn.get("tool_calls").is_some_and(|calls| !nothing(calls));
            if turn["role"] == "assistant" && text.trim().is_empty() && !calls && !self.given.contains(&i) {
                self.given.push(i);
            }
        }
    }
}

/// The turns in `column`. Where all columns are strings, it is JSON text.
pub(super) fn conversation(column: &str, value: &Value, is_untyped: bool) -> Result<Conversation, String> {
    match value {
        Value::Null => Ok(Conversation::default()),
        Value::Array(list) => turns(column, list),
        Value::String(text) if is_untyped => match serde_json::from_str(text) {
            Ok(Value::Array(list)) => turns(column, &list),
            Ok(other) => Err(format!("column `{column}`: {} where a JSON list of messages is expected", kind(&other))),
            Err(error) => Err(format!("column `{column}`: no JSON list of messages: {error}")),
        },
        other => Err(format!("column `{column}`: {} where a list of messages is expected", kind(other))),
    }
}

/// The turns of a list.
pub(super) fn turns(column: &str, list: &[Value]) -> Result<Conversation, String> {
    let mut conversation = Conversation::default();
    for (i, value) in list.iter().enumerate() {
        let (turn, is_learned) =
            turn(value).map_err(|reason| format!("column `{column}`, message {}: {reason}", i + 1))?;
        if !is_learned {
            conversation.given.push(i);
        }
        conversation.messages.push(turn);
    }
    conversation.leave_out_empty();
    Ok(conversation)
}

/// A turn with `role` and `content`, and whether nothing says that it is not learned.
fn turn(value: &Value) -> Result<(Value, bool), String> {
    let Some(members) = value.as_object() else { return Err(format!("{} where an object is expected", kind(value))) };
    let mut members = members.clone();
    let (role, content) = if members.contains_key("role") { ("role", "content") } else { ("from", "value") };
    let Some(speaker) = members.shift_remove(role) else {
        let keys: Vec<&str> = members.keys().map(String::as_str).collect();
        return Err(format!("neither `role` nor `from` among its members ({})", keys.join(", ")));
    };
    let Some(speaker) = speaker.as_str() else {
        return Err(format!("`{role}`: {} where a string is expected", kind(&speaker)));
    };
    if let Some(call) = members.get("function_call").filter(|v| !nothing(v)) {
        return Err(format!("`function_call` ({}) is the older form of `tool_calls`: convert it", kind(call)));
    }
    // What stands there as null or empty is not there: templates ask whether it is defined.
    members.retain(|key, value| key == content || !nothing(value));
    let mut turn = Map::new();
    turn.insert("role".to_owned(), canonical(speaker)?.into());
    match members.shift_remove(content) {
        Some(value) => {
            let text = text_of(content, &value)?;
            if speaker == "function_call" {
                members.insert("tool_calls".to_owned(), calls(&text)?);
            } else {
                turn.insert("content".to_owned(), text.into());
            }
        }
        None if members.contains_key("tool_calls") => {}
        None => return Err(format!("`{content}` is missing")),
    }
    let is_learned = learned(&mut members)?;
    turn.extend(members);
    Ok((turn.into(), is_learned))
}

/// Takes the marks of turns that are not learned: OpenAI's `weight`, axolotl's `train` and `training`, ms-swift's `loss`.
///
/// # Errors
/// A mark is neither yes nor no, or one that is not known here.
fn learned(members: &mut Map<String, Value>) -> Result<bool, String> {
    let mut is_learned = true;
    for mark in ["weight", "loss_weight", "loss_scale"] {
        let Some(weight) = members.shift_remove(mark) else { continue };
        is_learned &= match weight.as_f64() {
            Some(1.0) => true,
            Some(0.0) => false,
            _ => return Err(format!("`{mark}` {weight}: a turn is learned (1) or not (0)")),
        };
    }
    for mark in ["train", "training", "trainable", "loss"] {
        let Some(train) = members.shift_remove(mark) else { continue };
        let Value::Bool(train) = train else {
            return Err(format!("`{mark}`: {} where true or false is expected", kind(&train)));
        };
        is_learned &= train;
    }
    for mark in ["train_detail", "training_detail", "mask", "masked", "loss_mask", "ignore_loss"] {
        if members.contains_key(mark) {
            return Err(format!(
                "`{mark}`: this mark is not read; `train` (true, false) says whether a turn is learned"
            ));
        }
    }
    Ok(is_learned)
}

/// LLaMA-Factory's turn that calls tools: its text is a call or a list of calls.
fn calls(text: &str) -> Result<Value, String> {
    let call: Value = serde_json::from_str(text).map_err(|e| format!("a function call that is no JSON: {e}"))?;
    let calls = if let Value::Array(calls) = call { calls } else { vec![call] };
    let is_call = |call: &Value| call.get("name").is_some_and(Value::is_string) && call.get("arguments").is_some();
    if !calls.iter().all(is_call) {
        return Err("a function call without `name` and `arguments`".to_owned());
    }
    Ok(calls.into_iter().map(|call| json!({ "type": "function", "function": call })).collect())
}

/// What a turn says: a string, nothing, or OpenAI's list of parts.
fn text_of(key: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Ok(String::new()),
        Value::Array(parts) => {
            let mut all = String::new();
            for part in parts {
                match (part.get("type").and_then(Value::as_str), part.get("text")) {
                    (Some("text"), Some(Value::String(text))) => all.push_str(text),
                    (Some(other), _) => {
                        return Err(format!("`{key}` has a part of type `{other}`: text alone is learned"));
                    }
                    (None, _) => return Err(format!("`{key}` has a part without a `type`")),
                }
            }
            Ok(all)
        }
        other => Err(format!("`{key}`: {} where a string is expected", kind(other))),
    }
}

/// A role by the name that chat templates know.
fn canonical(role: &str) -> Result<&'static str, String> {
    Ok(match role {
        "system" | "developer" => "system",
        "user" | "human" => "user",
        "assistant" | "gpt" | "chatgpt" | "model" | "bot" | "bing" | "bard" | "function_call" => "assistant",
        "tool" | "observation" | "function" | "function_response" | "tool_response" | "ipython" => "tool",
        other => {
            return Err(format!(
                "role `{other}`: there are system, user (human), assistant (gpt), tool (observation), function_call"
            ));
        }
    })
}
