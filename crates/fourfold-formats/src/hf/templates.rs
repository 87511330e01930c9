//! The chat templates of a Hugging Face directory, found as transformers finds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{FormatError, json};

/// The directory of named templates.
const FOLDER: &str = "additional_chat_templates";
/// Most named templates.
const MOST: usize = 64;

/// Chat templates (Jinja): one for all conversations, and maybe another for those with tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatTemplates {
    /// The usual one.
    pub default: Option<String>,
    /// The one named `tool_use`.
    pub tool_use: Option<String>,
}

/// The chat templates of the files in `dir`: `chat_template.jinja` and `additional_chat_templates/NAME.jinja` go before
/// `chat_template.json` and `tokenizer_config.json`.
///
/// # Errors
/// A file cannot be read, or holds no template.
pub fn chat_templates(dir: &Path, tokenizer_config: &Value) -> Result<ChatTemplates, FormatError> {
    let named = files(dir)?;
    if !named.is_empty() {
        return Ok(chosen(named, &format!("{FOLDER}/ and chat_template.jinja")));
    }
    let json_path = dir.join("chat_template.json");
    if let Some(value) = json::read_if_present::<Value>(&json_path, json::CONFIG_LIMIT)? {
        return templates_of(&value, &json_path);
    }
    templates_of(tokenizer_config, &dir.join("tokenizer_config.json"))
}

/// `tokenizer_config.json` with the templates that lie in files of their own inside; `None` where there is no directory of them. A copy of
/// a directory then needs no second one.
///
/// # Errors
/// As [`chat_templates`].
pub fn with_templates_inside(dir: &Path, tokenizer_config: &Value) -> Result<Option<Value>, FormatError> {
    if !dir.join(FOLDER).is_dir() {
        return Ok(None);
    }
    let mut config = if tokenizer_config.is_object() { tokenizer_config.clone() } else { json!({}) };
    let templates = files(dir)?.into_iter().map(|(name, template)| json!({"name": name, "template": template}));
    config["chat_template"] = Value::Array(templates.collect());
    Ok(Some(config))
}

/// Templates in files of their own, by name.
fn files(dir: &Path) -> Result<BTreeMap<String, String>, FormatError> {
    let mut named = BTreeMap::new();
    let mut read = |name: &str, path: &PathBuf| -> Result<(), FormatError> {
        named.insert(name.to_owned(), json::read_text(path, json::CONFIG_LIMIT)?);
        Ok(())
    };
    let default = dir.join("chat_template.jinja");
    if default.try_exists().map_err(FormatError::io(&default))? {
        read("default", &default)?;
    }
    let folder = dir.join(FOLDER);
    if folder.is_dir() {
        let mut count = 0;
        for entry in std::fs::read_dir(&folder).map_err(FormatError::io(&folder))? {
            let path = entry.map_err(FormatError::io(&folder))?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if let (Some(name), Some("jinja")) = (name, path.extension().and_then(|end| end.to_str())) {
                count += 1;
                if count > MOST {
                    let reason = format!("holds more than {MOST} templates");
                    return Err(FormatError::Json { file: folder.clone(), reason });
                }
                read(name, &path)?;
            }
        }
    }
    Ok(named)
}

/// Templates as a configuration has them: a string, or a list of named ones.
fn templates_of(config: &Value, file: &Path) -> Result<ChatTemplates, FormatError> {
    let wrong = || FormatError::Json {
        file: file.to_owned(),
        reason: "chat_template is neither a string nor a list of {name, template}".to_owned(),
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(ChatTemplates::default()),
        Some(Value::String(template)) => Ok(ChatTemplates { default: Some(template.clone()), tool_use: None }),
        Some(Value::Array(list)) if !list.is_empty() => {
            let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            let named = list.iter().map(|entry| text(entry, "name").zip(text(entry, "template")).ok_or_else(wrong));
            Ok(chosen(named.collect::<Result<_, _>>()?, &file.display().to_string()))
        }
        Some(_) => Err(wrong()),
    }
}

/// The two that are used. Without a usual one, a conversation that needs it is refused by name, as in transformers.
fn chosen(mut named: BTreeMap<String, String>, place: &str) -> ChatTemplates {
    let default = named.remove("default").unwrap_or_else(|| {
        let names = named.keys().cloned().collect::<Vec<_>>().join(", ");
        let reason = json!(format!("{place} has the chat templates {names}, and none that is named default"));
        format!("{{{{ raise_exception({reason}) }}}}")
    });
    ChatTemplates { default: Some(default), tool_use: named.remove("tool_use") }
}
