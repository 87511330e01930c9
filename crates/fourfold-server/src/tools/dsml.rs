//! DeepSeek V3.2 and V4: `<｜DSML｜invoke name="NAME">` with `<｜DSML｜parameter name="KEY" string="true">` inside; a
//! parameter that is no string is JSON (the model's `encoding_dsv32.py`).

use serde_json::{Map, Value, json};

use super::{Tool, ToolCall, text};
use crate::grammar::compact;

/// Every call of a group; `None` where one is malformed.
pub(super) fn parse(inside: &str) -> Option<Vec<ToolCall>> {
    inside.split("<｜DSML｜invoke ").skip(1).map(one).collect()
}

fn one(call: &str) -> Option<ToolCall> {
    let (head, body) = call.split_once('>')?;
    let body = body.split("</｜DSML｜invoke>").next()?;
    let mut values = Map::new();
    for parameter in body.split("<｜DSML｜parameter ").skip(1) {
        let (head, rest) = parameter.split_once('>')?;
        let (value, _) = rest.split_once("</｜DSML｜parameter>")?;
        let is_text = attribute(head, "string").is_none_or(|kind| kind == "true");
        let parsed = if is_text { None } else { serde_json::from_str(value).ok() };
        values.insert(attribute(head, "name")?.to_owned(), parsed.unwrap_or_else(|| Value::String(value.to_owned())));
    }
    Some(ToolCall { name: attribute(head, "name")?.to_owned(), arguments: Value::Object(values).to_string() })
}

/// The value of `name="…"`.
fn attribute<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = head.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

/// The right side of a Lark rule for a call of `tool`: its parameters in the schema's order, those not required optional.
pub(super) fn call_grammar(index: usize, tool: &Tool) -> String {
    let none = Map::new();
    let properties = tool.parameters.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required = tool.parameters.get("required").and_then(Value::as_array);
    let mut rules = String::new();
    let mut body = format!("{} ", text(&format!("<｜DSML｜invoke name=\"{}\">\n", tool.name)));
    for (at, (name, schema)) in properties.iter().enumerate() {
        let is_text = schema.get("type").and_then(Value::as_str) == Some("string");
        let open = text(&format!("<｜DSML｜parameter name=\"{name}\" string=\"{is_text}\">"));
        let value = format!("value_{index}_{at}");
        let wanted = required.is_some_and(|list| list.contains(&json!(name)));
        let parameter = format!("{open} {value} {}", text("</｜DSML｜parameter>\n"));
        body += &if wanted { format!("{parameter} ") } else { format!("({parameter})? ") };
        rules += &if is_text { format!("{value}: /[^<]*/\n") } else { format!("{value}: %json {}\n", compact(schema)) };
    }
    body += &text("</｜DSML｜invoke>");
    format!("{body}\n{rules}")
}
