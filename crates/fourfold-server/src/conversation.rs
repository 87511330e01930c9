//! A chat request's messages and tools, as its template wants them.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::fields::Fields;
use crate::state::State;
use crate::tools::Tool;

/// Most messages of a request.
const MOST_MESSAGES: usize = 4096;
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// The prompt of a conversation.
pub struct Prompt {
    /// Its text.
    pub text: String,
    /// Whether it has opened the model's thoughts.
    pub opens_thoughts: bool,
}

/// How tools may be used.
#[derive(Clone, Debug, Default)]
pub struct ToolUse {
    /// Those that may be called; none with `tool_choice: none`.
    pub tools: Vec<Tool>,
    /// As the request has them, for the template.
    given: Option<Value>,
    /// Whether the answer has to be a call.
    pub required: bool,
    /// Whether it may be several.
    pub parallel: bool,
}

impl ToolUse {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    ///
    /// # Errors
    /// A field is wrong, or a tool is chosen that there is not.
    pub fn read(fields: &Fields) -> Result<Self, ApiError> {
        let Some(list) = fields.list("tools")?.filter(|list| !list.is_empty()) else { return Ok(Self::default()) };
        let mut tools = Vec::with_capacity(list.len());
        for tool in list {
            let tool = Fields::of(tool, "tools")?;
            if tool.required_text("type")? != "function" {
                return Err(tool.wrong("type", "only function is supported"));
            }
            let function = tool.object("function")?.ok_or_else(|| tool.wrong("function", "this field is required"))?;
            let parameters = match function.object("parameters")? {
                Some(schema) => Value::Object(schema.map().clone()),
                None => json!({ "type": "object", "properties": {} }),
            };
            tools.push(Tool { name: function.required_text("name")?.to_owned(), parameters });
        }
        let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        let all = Self { tools, given: Some(Value::Array(list.to_vec())), required: false, parallel };
        match fields.get("tool_choice") {
            None => Ok(all),
            Some(Value::String(choice)) => match choice.as_str() {
                "auto" => Ok(all),
                "none" => Ok(Self::default()),
                "required" => Ok(Self { required: true, ..all }),
                _ => Err(fields.wrong("tool_choice", "none, auto, required or a function is expected")),
            },
            Some(choice) => {
                let chosen = choice.pointer("/function/name").and_then(Value::as_str);
                let chosen = chosen.ok_or_else(|| fields.wrong("tool_choice", "a function with a name is expected"))?;
                let tools: Vec<Tool> = all.tools.iter().filter(|tool| tool.name == chosen).cloned().collect();
                if tools.is_empty() {
                    return Err(fields.wrong("tool_choice", format!("there is no tool {chosen:?}")));
                }
                Ok(Self { tools, required: true, parallel: false, ..all })
            }
        }
    }
}

/// The prompt of a chat request, its last message continued where it asks for that (`prefix`).
///
/// # Errors
/// A message is wrong, or the template refuses the conversation.
pub fn prompt(state: &State, fields: &Fields, tools: &ToolUse) -> Result<Prompt, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| fields.wrong("messages", "this field is required"))?;
    if list.is_empty() || list.len() > MOST_MESSAGES {
        return Err(fields.wrong("messages", format!("1 to {MOST_MESSAGES} messages are expected")));
    }
    let mut messages = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let place = format!("messages[{index}]");
        messages.push(read_message(&Fields::of(message, &place)?)?);
    }
    let continued = match list.last().and_then(|last| last.get("prefix")) {
        Some(Value::Bool(true)) => messages.pop(),
        _ => None,
    };
    if continued.as_ref().is_some_and(|last| last.get("role") != Some(&json!("assistant"))) {
        return Err(fields.wrong("messages", "prefix goes with a last message of the assistant's"));
    }
    let extra = template_fields(fields)?;
    let text = render(state, &messages, tools, &extra)?;
    let mut prompt = Prompt { opens_thoughts: state.thinks && text.trim_end().ends_with("<think>"), text };
    if let Some(last) = continued {
        let part = |name: &str| last.get(name).and_then(Value::as_str).unwrap_or_default();
        let (thoughts, content) = (part("reasoning_content"), part("content"));
        if !thoughts.is_empty() && !prompt.opens_thoughts && state.thinks {
            prompt.text += "<think>\n";
            prompt.opens_thoughts = true;
        }
        prompt.text += thoughts;
        if prompt.opens_thoughts && !content.is_empty() {
            prompt.text += "\n</think>\n\n";
            prompt.opens_thoughts = false;
        }
        prompt.text += content;
    }
    Ok(prompt)
}

/// A message with what templates read: its content as one text.
fn read_message(message: &Fields) -> Result<Map<String, Value>, ApiError> {
    let role = message.required_text("role")?;
    if !ROLES.contains(&role) {
        return Err(message.wrong("role", format!("one of {} is expected", ROLES.join(", "))));
    }
    let content = match message.get("content") {
        None if role == "assistant" => Value::Null,
        None => return Err(message.wrong("content", "this field is required")),
        Some(Value::String(text)) => Value::String(text.clone()),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                let part = Fields::of(part, "content")?;
                match part.required_text("type")? {
                    "text" => text += part.required_text("text")?,
                    other => return Err(message.wrong("content", format!("{other}: this model reads text alone"))),
                }
            }
            Value::String(text)
        }
        Some(_) => return Err(message.wrong("content", "a string or a list of parts is expected")),
    };
    let mut read = message.map().clone();
    // Templates know the older name.
    let role = if role == "developer" { "system" } else { role };
    read.insert("role".to_owned(), json!(role));
    read.insert("content".to_owned(), content);
    read.remove("prefix");
    Ok(read)
}

/// Further variables of the template: `chat_template_kwargs`, and whether to think in the names that templates use.
fn template_fields(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    let mut extra = match fields.object("chat_template_kwargs")? {
        Some(object) => object.map().clone(),
        None => Map::new(),
    };
    let mut think = match fields.get("thinking") {
        None => None,
        Some(Value::Bool(think)) => Some(*think),
        Some(_) => match fields.object("thinking")?.map(|object| object.required_text("type")).transpose()? {
            Some("enabled") => Some(true),
            Some("disabled") => Some(false),
            _ => return Err(fields.wrong("thinking.type", "enabled or disabled is expected")),
        },
    };
    if let Some(effort) = fields.text("reasoning_effort")? {
        if !["none", "minimal", "low", "medium", "high", "xhigh", "max"].contains(&effort) {
            let message = "one of none, minimal, low, medium, high, xhigh, max is expected";
            return Err(fields.wrong("reasoning_effort", message));
        }
        think = think.or(Some(effort != "none"));
        extra.entry("reasoning_effort").or_insert(json!(effort));
    }
    if let Some(think) = think.or(fields.flag("enable_thinking")?) {
        // DeepSeek's and Qwen's names.
        for name in ["thinking", "enable_thinking"] {
            extra.entry(name).or_insert(json!(think));
        }
    }
    Ok(extra)
}

/// Calls in earlier messages carry their arguments as JSON text; most templates want the object, some the text.
fn render(
    state: &State,
    messages: &[Map<String, Value>],
    tools: &ToolUse,
    extra: &Map<String, Value>,
) -> Result<String, ApiError> {
    let as_given: Vec<Value> = messages.iter().cloned().map(Value::Object).collect();
    let mut parsed = as_given.clone();
    let mut calls = false;
    for call in parsed.iter_mut().filter_map(|m| m.get_mut("tool_calls")?.as_array_mut()).flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = object;
            calls = true;
        }
    }
    let template = &state.served.template;
    let rendered = template.render_with(&parsed, tools.given.as_ref(), extra, true);
    let rendered = match rendered {
        Err(_) if calls => template.render_with(&as_given, tools.given.as_ref(), extra, true),
        other => other,
    };
    Ok(rendered?)
}
