//! Chat templates: the Jinja text a model ships that lays out a conversation as it was in training.
//!
//! The language is that of Jinja 2.11 to 3.1 as Hugging Face transformers sets it up (`apply_chat_template`): its sandbox that changes no
//! value, white space trimmed around tags, loop controls, `{% generation %}`, `tojson`, `strftime_now`, `raise_exception`. Values behave
//! and print as Python's. A template is a stranger's program: its steps, its memory and its recursion are counted ([`budget`]), which
//! Jinja engines at hand do not do, and they print and format otherwise than Python.

mod ast;
mod budget;
mod checks;
mod eval;
mod filters;
mod functions;
mod lexer;
mod methods;
mod operators;
mod parser;
mod text;
mod value;

use std::rc::Rc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use self::budget::{Budget, Fail};
use self::eval::Machine;
use self::value::Value;
use crate::InferError;

/// Most bytes of a template.
const MOST: usize = 1 << 20;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
}

impl From<&Message> for Json {
    fn from(message: &Message) -> Self {
        json!({ "role": message.role, "content": message.content })
    }
}

/// A parsed chat template.
pub struct ChatTemplate {
    template: ast::Template,
    /// The one for conversations with tools, where there is another.
    tool_use: Option<ast::Template>,
    /// Special tokens by the names that templates print them under.
    tokens: Vec<(String, String)>,
}

/// The layout used when a model ships none: ChatML.
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl ChatTemplate {
    /// Parses a template; `tokens` are special tokens by name (`bos_token`), which templates may print.
    ///
    /// # Errors
    /// A syntax error in the template, or more than 1 MiB of it.
    pub fn new(source: &str, tokens: &[(String, String)]) -> Result<Self, InferError> {
        Ok(Self { template: parsed(source)?, tool_use: None, tokens: tokens.to_vec() })
    }

    /// The same, with another template for conversations with tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_tool_use(self, source: &str) -> Result<Self, InferError> {
        Ok(Self { tool_use: Some(parsed(source)?), ..self })
    }

    /// ChatML, for a model that ships no template.
    ///
    /// # Errors
    /// None in practice: the template is a constant.
    pub fn chatml() -> Result<Self, InferError> {
        Self::new(CHATML, &[])
    }

    /// The conversation as one text: messages are objects with a `role`, tools descriptions of what may be called. With
    /// `open_answer` it ends where the model begins to speak.
    ///
    /// # Errors
    /// The template refuses the conversation (`raise_exception`), uses something that is not there, or takes more work, memory or
    /// recursion than a template may.
    pub fn render(&self, messages: &[Json], tools: Option<&Json>, open_answer: bool) -> Result<String, InferError> {
        self.render_with(messages, tools, &Map::new(), open_answer)
    }

    /// As [`ChatTemplate::render`], with further variables (`chat_template_kwargs`), which stand in place of the usual ones of their names.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        further: &Map<String, Json>,
        open_answer: bool,
    ) -> Result<String, InferError> {
        let template = self.tool_use.as_ref().filter(|_| tools.is_some()).unwrap_or(&self.template);
        let messages = Json::Array(messages.iter().map(normal).collect());
        let tools = tools.cloned().unwrap_or(Json::Null);
        let input = size(&messages) + size(&tools) + further.values().map(size).sum::<u64>();
        let mut variables: Vec<(Rc<str>, Value)> = Vec::new();
        let fail = |fail: Fail, line: u32| {
            InferError::Template(match fail {
                Fail::Error(reason) | Fail::Limit(reason) if line > 0 => format!("{reason} (line {line})"),
                Fail::Error(reason) | Fail::Limit(reason) | Fail::Raised(reason) => reason,
            })
        };
        for (name, text) in &self.tokens {
            variables.push((name.as_str().into(), Value::str(text)));
        }
        let open_answer = Json::Bool(open_answer);
        for (name, json) in [
            ("messages", &messages),
            ("tools", &tools),
            ("documents", &Json::Null),
            ("add_generation_prompt", &open_answer),
        ] {
            variables.push((name.into(), Value::from_json(json).map_err(|f| fail(f, 0))?));
        }
        for (name, json) in further {
            variables.push((name.as_str().into(), Value::from_json(json).map_err(|f| fail(f, 0))?));
        }
        let mut machine = Machine::new(template, Budget::new(input), variables);
        let rendered = machine.run();
        rendered.map_err(|f| fail(f, machine.line))
    }
}

fn parsed(source: &str) -> Result<ast::Template, InferError> {
    if source.len() > MOST {
        return Err(InferError::Template(format!("{} bytes; the most that are read are {MOST}", source.len())));
    }
    parser::parse(source).map_err(|error| InferError::Template(format!("{} (line {})", error.reason, error.line)))
}

/// A message as transformers hands it to a template: without what is null, and with its thoughts under both of their names.
fn normal(message: &Json) -> Json {
    let Some(object) = message.as_object() else { return message.clone() };
    let present =
        || object.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone()));
    let thoughts =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|key| object.get(*key).filter(|v| !v.is_null()));
    let mut out = Map::new();
    if let Some(thoughts) = thoughts {
        out.insert("thinking".to_owned(), thoughts.clone());
        out.extend(present());
        out.insert("reasoning_content".to_owned(), thoughts.clone());
    } else {
        out.extend(present());
    }
    Json::Object(out)
}

/// Bytes of a JSON value, roughly.
fn size(json: &Json) -> u64 {
    match json {
        Json::String(text) => text.len() as u64 + 16,
        Json::Array(items) => items.iter().map(size).sum::<u64>() + 16,
        Json::Object(map) => map.iter().map(|(key, value)| key.len() as u64 + size(value)).sum::<u64>() + 16,
        _ => 16,
    }
}

#[cfg(test)]
mod tests;
