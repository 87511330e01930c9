//! A tokenizer and the files beside it, opened the same way by every command.

use std::io;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use fourfold_disk::{copy_file, write_file};
use fourfold_formats::regular;
use fourfold_formats::writer::{TOKENIZER_FILES, tokenizer_config};
use fourfold_formats::{
    ChatTemplates, Checkpoint, TokenizerSource, chat_templates, tokenizer_files, with_templates_inside,
};
use fourfold_infer::{ChatTemplate, Tokenizer, TokenizerSettings};
use fourfold_kernels::release_freed_memory;
use serde_json::{Value, json};

use crate::context::Context;
use crate::limits;

/// Where a tokenizer is, and what the files beside it say.
#[derive(Clone)]
pub struct TokenizerText {
    source: TokenizerSource,
    /// What errors call it.
    name: String,
    settings: TokenizerSettings,
    /// The chat template beside it.
    templates: ChatTemplates,
    /// What a `tokenizer_config.json` beside an embedded tokenizer would say.
    config: Option<Vec<u8>>,
}

impl TokenizerText {
    /// None: a network that reads no text.
    pub fn none() -> Self {
        let (source, settings) = (TokenizerSource::None, TokenizerSettings::default());
        Self { source, name: String::new(), settings, templates: ChatTemplates::default(), config: None }
    }

    /// A checkpoint's.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let (files, special) = (&checkpoint.tokenizer_files, &checkpoint.special);
        let (name, settings) = match &checkpoint.tokenizer {
            TokenizerSource::Json(file) => {
                let settings =
                    TokenizerSettings::from_files(&files.config, &files.special_tokens_map, &files.added_tokens);
                let settings = settings.with_context(|| file.with_file_name("").display().to_string())?;
                (file, for_model(settings, file, &checkpoint.config)?)
            }
            // The embedded text says itself what is put around a text.
            TokenizerSource::Embedded(_) | TokenizerSource::None => {
                let named = json!({ "bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad,
                    "unk_token": special.unk });
                (&checkpoint.path, TokenizerSettings::from_files(&named, &Value::Null, &Value::Null)?)
            }
        };
        Ok(Self {
            source: checkpoint.tokenizer.clone(),
            name: name.display().to_string(),
            settings: settings.with_ids(special.bos_id, special.eos_ids.first().copied()),
            templates: ChatTemplates {
                default: checkpoint.chat_template.clone(),
                tool_use: checkpoint.tool_template.clone(),
            },
            config: match (&checkpoint.tokenizer, &checkpoint.merged_tokenizer_config) {
                (TokenizerSource::Embedded(_), _) => Some(tokenizer_config(checkpoint)),
                (_, merged) => merged.as_ref().map(pretty),
            },
        })
    }

    /// That of a `tokenizer.json`, with the files that lie beside it, for a model of this configuration.
    pub fn file(file: &Path, config: &Value) -> Result<Self> {
        let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let files = tokenizer_files(dir)?;
        let settings = TokenizerSettings::from_files(&files.config, &files.special_tokens_map, &files.added_tokens)
            .with_context(|| dir.display().to_string())?;
        let settings = for_model(settings, file, config)?;
        let id = |key: &str| config.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        Ok(Self {
            source: TokenizerSource::Json(file.to_path_buf()),
            name: file.display().to_string(),
            settings: settings.with_ids(id("bos_token_id"), id("eos_token_id")),
            templates: chat_templates(dir, &files.config)?,
            config: with_templates_inside(dir, &files.config)?.as_ref().map(pretty),
        })
    }

    /// Writes it and all that lies beside it into `place`.
    pub fn write(&self, place: &Path) -> io::Result<()> {
        match &self.source {
            TokenizerSource::None => {}
            TokenizerSource::Embedded(text) => write_file(&place.join("tokenizer.json"), text.as_bytes())?,
            TokenizerSource::Json(path) => {
                copy_file(path, &place.join("tokenizer.json"))?;
                for other in TOKENIZER_FILES {
                    // Templates in files of their own stand in the configuration that is written.
                    if self.config.is_some() && ["tokenizer_config.json", "chat_template.jinja"].contains(other) {
                        continue;
                    }
                    let from = path.with_file_name(other);
                    if from.is_file() {
                        copy_file(&from, &place.join(other))?;
                    }
                }
            }
        }
        match &self.config {
            Some(config) => Ok(write_file(&place.join("tokenizer_config.json"), config)?),
            None => Ok(()),
        }
    }

    /// The tokenizer, for a model whose embedding has `rows` rows.
    pub fn open(&self, rows: usize) -> Result<Tokenizer> {
        let named = || self.name.clone();
        let tokenizer = match &self.source {
            TokenizerSource::Json(file) => {
                Tokenizer::from_bytes(&regular::read(file, limits::MOST_BYTES).with_context(named)?)
                    .with_context(named)?
            }
            TokenizerSource::Embedded(json) => Tokenizer::from_bytes(json.as_bytes()).with_context(named)?,
            TokenizerSource::None => bail!("{}: {}", self.name, missing(Path::new(&self.name))),
        };
        let tokenizer = tokenizer.with_settings(&self.settings).with_context(named)?.with_rows(rows);
        // Its text, its parts and what they were built from are many times what is left.
        release_freed_memory();
        Ok(tokenizer)
    }

    /// The chat template that lies beside the tokenizer; `None` where there is none.
    pub fn template(&self) -> Result<Option<ChatTemplate>> {
        let named = || self.name.clone();
        let Some(source) = &self.templates.default else { return Ok(None) };
        let template = ChatTemplate::new(source, &self.settings.named).with_context(named)?;
        Ok(Some(match &self.templates.tool_use {
            Some(source) => template.with_tool_use(source).context("the template tool_use").with_context(named)?,
            None => template,
        }))
    }
}

/// Why there is no tokenizer, and what helps.
fn missing(path: &Path) -> String {
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let found = |name: &str| dir.join(name).is_file();
    let convert = "transformers writes one: python -c 'import sys; from transformers import AutoTokenizer; \
                   AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])' DIR";
    let other = [
        ("tokenizer.model", "a SentencePiece or tiktoken vocabulary"),
        ("tekken.json", "Mistral's vocabulary"),
        ("tiktoken.model", "a tiktoken vocabulary"),
        ("qwen.tiktoken", "a tiktoken vocabulary"),
        ("vocab.json", "a BPE vocabulary"),
        ("vocab.txt", "a WordPiece vocabulary"),
        ("spiece.model", "a SentencePiece vocabulary"),
    ];
    match other.iter().find(|(name, _)| found(name)) {
        Some((name, what)) => {
            format!("there is no tokenizer.json, which alone is read; there is {name}, {what}, from which {convert}")
        }
        None => "there is no tokenizer (tokenizer.json)".to_owned(),
    }
}

fn pretty(config: &Value) -> Vec<u8> {
    format!("{config:#}\n").into_bytes()
}

/// The settings of a `tokenizer.json` for a model of this configuration.
fn for_model(settings: TokenizerSettings, file: &Path, config: &Value) -> Result<TokenizerSettings> {
    let is_byte_level = settings.asks_for_bytes() && {
        let text = regular::read(file, limits::MOST_BYTES).with_context(|| file.display().to_string())?;
        String::from_utf8_lossy(&text).contains("\"ByteLevel\"")
    };
    Ok(settings.for_model(config.get("model_type").and_then(Value::as_str), is_byte_level))
}

/// Says what a tokenizer's files ask for and is done otherwise, and which tokens of a tokenizer have no row in the model's embedding.
pub fn remark_tokenizer(tokenizer: &Tokenizer, rows: usize, context: &Context) {
    tokenizer.remarks().iter().for_each(|remark| context.remark(remark));
    let beyond = tokenizer.beyond(rows, usize::MAX);
    if let Some((id, token)) = beyond.first() {
        let others = if beyond.len() > 1 { format!(" and {} more", beyond.len() - 1) } else { String::new() };
        context.remark(&format!(
            "The tokenizer has tokens that the model has no row for: {token:?} (id {id}){others}. A text that needs one is an error."
        ));
    }
}
