//! Hermes and Qwen: a JSON object with `name` and `arguments` between `<tool_call>` and `</tool_call>`; Qwen3-Coder writes
//! `<function=NAME>` and `<parameter=NAME>` there (their chat templates).

use serde_json::{Map, Value};

use super::{ToolCall, arguments};

/// One call; `None` where it is malformed.
pub(super) fn parse(inside: &str) -> Option<ToolCall> {
    let inside = inside.trim();
    if let Some(function) = inside.strip_prefix("<function=") {
        return tagged(function);
    }
    let call: Value = serde_json::from_str(inside).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    let given = call.get("arguments").or_else(|| call.get("parameters"));
    Some(ToolCall { name, arguments: given.map_or_else(|| "{}".to_owned(), arguments) })
}

fn tagged(function: &str) -> Option<ToolCall> {
    let (name, body) = function.split_once('>')?;
    let mut values = Map::new();
    for parameter in body.split("<parameter=").skip(1) {
        let (key, rest) = parameter.split_once('>')?;
        let text = rest.split("</parameter>").next()?;
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        // Numbers, lists and objects are written as JSON, strings as they are.
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
        values.insert(key.to_owned(), value);
    }
    Some(ToolCall { name: name.trim().to_owned(), arguments: Value::Object(values).to_string() })
}
