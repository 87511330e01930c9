//! Conversations in files: `{"messages": [{"role": …, "content": …}, …]}`, as training data has them.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_disk::write_whole;
use fourfold_formats::regular;
use fourfold_infer::Message;
use serde_json::{Value, json};

use crate::limits;

/// Writes a conversation; a file that is none is not replaced.
pub fn save(file: &Path, messages: &[Message]) -> Result<()> {
    ensure!(
        !file.exists() || load(file).is_ok(),
        "{}: is there already and no conversation; it is not replaced",
        file.display()
    );
    let text = format!("{:#}\n", json!({ "messages": messages }));
    Ok(write_whole(file, text.as_bytes())?)
}

/// Reads a conversation: an object with `messages`, or the list alone.
pub fn load(file: &Path) -> Result<Vec<Message>> {
    let named = || file.display().to_string();
    let text = regular::read_text(file, limits::MOST_BYTES).with_context(named)?;
    let json: Value = serde_json::from_str(&text).with_context(named)?;
    let list = json.get("messages").unwrap_or(&json);
    let Some(list) = list.as_array() else { bail!("{}: no list of messages", named()) };
    let mut messages = Vec::with_capacity(list.len());
    for (i, message) in list.iter().enumerate() {
        let place = || format!("{}: message {}", named(), i + 1);
        let role = message.get("role").and_then(Value::as_str).with_context(|| format!("{} has no role", place()))?;
        ensure!(
            ["system", "user", "assistant"].contains(&role),
            "{} is of the role {role:?}; system, user and assistant are read",
            place()
        );
        ensure!(role != "system" || i == 0, "{}: a system message stands at the beginning alone", place());
        ensure!(message.get("content").is_some_and(Value::is_string), "{} has no text as its content", place());
        messages.push(serde_json::from_value(message.clone()).with_context(place)?);
    }
    Ok(messages)
}
