//! What lies beside the weights: configuration, tokenizer, chat template.

use std::fs;
use std::path::{Path, PathBuf};

use fourfold_tensor::Form;
use serde_json::{Map, Value, json};

use crate::quantization::describe_storage;
use crate::safetensors::INDEX_NAME;
use crate::{Checkpoint, FormatError, OutputError, TokenizerSource};

/// Files that lie beside a `tokenizer.json` and belong to it.
pub const TOKENIZER_FILES: &[&str] = &[
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Files of Hugging Face directories that an output takes over as they are besides, where the source has them.
const COPIED: &[&str] = &["generation_config.json", "tokenizer.json", "LICENSE", "LICENSE.txt", "LICENSE.md"];

/// Whether a file of this name in a partial output is this program's.
pub(super) fn is_output_name(name: &str) -> bool {
    let made = ["config.json", "compression_report.json", fourfold_disk::CHECKSUMS, INDEX_NAME];
    let is_shard = || {
        let rest = name.strip_prefix("model").and_then(|rest| rest.strip_suffix(".safetensors"));
        rest.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '-' || "of".contains(c)))
    };
    made.contains(&name) || COPIED.contains(&name) || TOKENIZER_FILES.contains(&name) || is_shard()
}

/// The files of an output other than its weights.
#[derive(Clone, Debug, Default)]
pub struct ModelFiles {
    config: Option<Value>,
    texts: Vec<(String, Vec<u8>)>,
    copies: Vec<PathBuf>,
    /// Where the weights come from, if that is known.
    source: Option<PathBuf>,
}

impl ModelFiles {
    /// A configuration alone.
    pub fn config(config: Value) -> Self {
        Self { config: Some(config), ..Self::default() }
    }

    /// The same, from a checkpoint that an output must not replace.
    #[must_use]
    pub fn made_from(self, checkpoint: &Checkpoint) -> Self {
        Self { source: Some(checkpoint.path.clone()), ..self }
    }

    /// What a checkpoint has: from a directory its files, from GGUF what they would say.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut files = Self::config(checkpoint.config.clone());
        files.source = Some(checkpoint.path.clone());
        let dir = if checkpoint.path.is_dir() { Some(checkpoint.path.as_path()) } else { checkpoint.path.parent() };
        if let TokenizerSource::Embedded(tokenizer) = &checkpoint.tokenizer {
            files.texts.push(("tokenizer.json".to_owned(), tokenizer.clone().into_bytes()));
            files.texts.push(("tokenizer_config.json".to_owned(), tokenizer_config(checkpoint)));
            if let Some(generation) = &checkpoint.generation_config {
                files.texts.push(("generation_config.json".to_owned(), pretty(generation)));
            }
        } else if let Some(dir) = dir {
            let mut names: Vec<&str> = COPIED.iter().chain(TOKENIZER_FILES).copied().collect();
            if let Some(config) = &checkpoint.merged_tokenizer_config {
                names.retain(|name| !["tokenizer_config.json", "chat_template.jinja"].contains(name));
                files.texts.push(("tokenizer_config.json".to_owned(), pretty(config)));
            }
            files.copies = names.into_iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect();
        }
        files
    }

    /// One more file.
    pub fn add(&mut self, name: &str, text: &str) {
        self.texts.push((name.to_owned(), text.as_bytes().to_vec()));
    }

    /// Refuses an output that would replace what it is made from.
    pub(super) fn check_apart_from(&self, out: &Path) -> Result<(), FormatError> {
        let Ok(out_path) = fs::canonicalize(out) else { return Ok(()) };
        let sources = self.copies.iter().chain(&self.source);
        match sources.filter_map(|s| fs::canonicalize(s).ok()).any(|s| s.starts_with(&out_path)) {
            true => Err(FormatError::Output { path: out.to_owned(), problem: OutputError::HoldsSource }),
            false => Ok(()),
        }
    }

    /// Files made here, config.json with what describes `tensors` in place of what it said of the source's.
    pub(super) fn written(&self, tensors: &[(String, Form)]) -> Vec<(String, Vec<u8>)> {
        let mut texts = self.texts.clone();
        if let Some(config) = &self.config {
            let mut config = config.clone();
            if let Some(members) = config.as_object_mut() {
                describe_storage(members, tensors);
                without_unread_layers(members);
            }
            texts.push(("config.json".to_owned(), pretty(&config)));
        }
        texts
    }

    /// Files taken over.
    pub(super) fn copied(&self) -> &[PathBuf] {
        &self.copies
    }
}

/// Multi-token prediction layers (DeepSeek-V3, section 2.2) stand after the others, are read by no architecture and are not written: none
/// are announced.
pub fn without_unread_layers(config: &mut Map<String, Value>) {
    if let Some(count) = config.get_mut("num_nextn_predict_layers") {
        *count = 0.into();
    }
}

/// tokenizer_config.json as far as a checkpoint of one file knows it.
pub fn tokenizer_config(checkpoint: &Checkpoint) -> Vec<u8> {
    let special = &checkpoint.special;
    let mut config = serde_json::Map::new();
    config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
    let mut put = |key: &str, value: Option<Value>| {
        config.extend(value.map(|v| (key.to_owned(), v)));
    };
    put("bos_token", special.bos.clone().map(Value::from));
    put("eos_token", special.eos.clone().map(Value::from));
    put("pad_token", special.pad.clone().map(Value::from));
    put("unk_token", special.unk.clone().map(Value::from));
    put("add_bos_token", special.add_bos.map(Value::from));
    put("add_eos_token", special.add_eos.map(Value::from));
    let template = match (&checkpoint.chat_template, &checkpoint.tool_template) {
        (Some(default), Some(tools)) => {
            let named = |name: &str, template: &str| json!({"name": name, "template": template});
            Some(json!([named("default", default), named("tool_use", tools)]))
        }
        (default, _) => default.clone().map(Value::from),
    };
    put("chat_template", template);
    pretty(&Value::Object(config))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
