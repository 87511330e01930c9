//! From text to batches: documents in tokens, held-out ones apart, packed into sequences, in an order that depends on seed and
//! epoch alone.

mod corpus;
mod documents;

use serde_json::Value;
use thiserror::Error;

pub use self::corpus::{Batches, Corpus, InOrder};
pub use self::documents::{Document, Documents, Spool};

/// Why data cannot be learned from.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DataError {
    /// A line of a JSONL file is not what it should be.
    #[error("{file}:{line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// Its line, counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing to learn.
    #[error("{file}: {reason}")]
    Empty {
        /// The file, or several.
        file: String,
        /// What is missing.
        reason: String,
    },
    /// The file that holds the tokens cannot be written or read.
    #[error("{file}: {reason}")]
    Spool {
        /// The file.
        file: String,
        /// What failed: the disk is full, say.
        reason: String,
    },
}

/// A conversation as its row has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Its turns, each an object with a `role`; what else a turn holds (`content`, `tool_calls`, `reasoning_content`) is for the
    /// chat template.
    pub messages: Vec<Value>,
    /// `tools`: descriptions of what the assistant may call.
    pub tools: Option<Value>,
}

/// One line of a JSONL file.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// `{"text": …}`: every token is learned.
    Text(String),
    /// `{"prompt": …, "completion": …}`: the completion is learned.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// `{"messages": [{"role": …, "content": …}, …]}`: what the assistant says is learned.
    Chat(Conversation),
}

/// Reads one line.
///
/// # Errors
/// It is no JSON object, or has none of the known sets of keys; the error names file and line.
pub fn parse_record(file: &str, line: usize, text: &str) -> Result<Record, DataError> {
    let fail = |reason: String| DataError::Line { file: file.to_owned(), line, reason };
    let value: Value = serde_json::from_str(text).map_err(|e| fail(e.to_string()))?;
    let object = value.as_object().ok_or_else(|| fail("not a JSON object".to_owned()))?;
    let string = |value: &Value, key: &str| {
        value
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or_else(|| fail(format!("`{key}` is not a string")))
    };
    if object.contains_key("messages") {
        let messages = value["messages"].as_array().ok_or_else(|| fail("`messages` is not a list".to_owned()))?;
        for message in messages {
            string(message, "role")?;
        }
        let tools = object.get("tools").filter(|t| !t.is_null()).cloned();
        return Ok(Record::Chat(Conversation { messages: messages.clone(), tools }));
    }
    if object.contains_key("prompt") || object.contains_key("completion") {
        return Ok(Record::Completion { prompt: string(&value, "prompt")?, completion: string(&value, "completion")? });
    }
    if object.contains_key("text") {
        return string(&value, "text").map(Record::Text);
    }
    Err(fail("none of `text`, `prompt` and `completion`, `messages`".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_lines_are_named() {
        let reason = |text: &str| parse_record("a.jsonl", 7, text).unwrap_err().to_string();
        assert!(reason("{\"text\": ").starts_with("a.jsonl:7: "));
        assert!(reason("[1]").contains("not a JSON object"));
        assert!(reason("{\"text\": 3}").contains("`text` is not a string"));
        assert!(reason("{\"prompt\": \"a\"}").contains("`completion`"));
        assert!(reason("{\"x\": 1}").contains("none of"));
        assert_eq!(parse_record("a", 1, "{\"text\": \"hi\"}").unwrap(), Record::Text("hi".into()));
    }
}
