//! The files of a Hugging Face directory.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::adapter::ADAPTER_CONFIG;
use super::source::HfSource;
use super::special::special_tokens;
use super::templates::{chat_templates, with_templates_inside};
use crate::quantization::QuantizationConfig;
use crate::safetensors::{INDEX_NAME, Index, Store};
use crate::{Checkpoint, FormatError, OpenOptions, TokenizerFiles, TokenizerSource, json};

/// Most bytes of a tokenizer.json.
const TOKENIZER_LIMIT: u64 = 256 << 20;

/// Opens a directory that holds config.json and safetensors.
pub(crate) fn open_directory(dir: &Path, options: OpenOptions) -> Result<Checkpoint, FormatError> {
    let config_path = dir.join("config.json");
    if !config_path.try_exists().map_err(FormatError::io(&config_path))? {
        if dir.join(ADAPTER_CONFIG).exists() {
            let reason = format!(
                "holds an adapter ({ADAPTER_CONFIG}) and no model: name its base model, and this with --adapter"
            );
            return Err(FormatError::NotACheckpoint { path: dir.to_owned(), reason });
        }
        let reason = "holds no config.json (a Hugging Face model directory or a .gguf file was expected)".to_owned();
        return Err(FormatError::NotACheckpoint { path: dir.to_owned(), reason });
    }
    let store = open_store(dir, options)?;
    with_files_beside(dir, dir, store)
}

/// Opens one safetensors file; config.json and the tokenizer are looked for beside it.
pub(crate) fn open_file(path: &Path, options: OpenOptions) -> Result<Checkpoint, FormatError> {
    let store = Store::single(path, options.access)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    with_files_beside(path, dir, store)
}

fn with_files_beside(path: &Path, dir: &Path, store: Store) -> Result<Checkpoint, FormatError> {
    let config_path = dir.join("config.json");
    let config: Value = json::read(&config_path, json::CONFIG_LIMIT)?;
    if !config.is_object() {
        return Err(FormatError::Json { file: config_path, reason: "no JSON object".to_owned() });
    }
    let quantization = QuantizationConfig::from_config(&config)
        .map_err(|problem| FormatError::Quantization { file: config_path.clone(), problem })?;
    let generation_config: Option<Value> =
        json::read_if_present(&dir.join("generation_config.json"), json::CONFIG_LIMIT)?;
    let tokenizer_files = tokenizer_files(dir)?;
    let tokenizer = tokenizer(dir)?;
    let TokenizerFiles { config: tokenizer_config, special_tokens_map, .. } = &tokenizer_files;
    let special = special_tokens(&config, generation_config.as_ref(), tokenizer_config, special_tokens_map);
    let templates = chat_templates(dir, tokenizer_config)?;
    let file_bytes = store.file_bytes();
    let source = HfSource::new(path, store, &quantization)?;
    Ok(Checkpoint {
        path: path.to_owned(),
        config,
        generation_config,
        tokenizer,
        chat_template: templates.default,
        tool_template: templates.tool_use,
        merged_tokenizer_config: with_templates_inside(dir, tokenizer_config)?,
        special,
        tokenizer_files,
        gguf_tokenizer: Vec::new(),
        weight_bytes: source.data_bytes(),
        file_bytes,
        weights: Box::new(source),
    })
}

/// The files beside a `tokenizer.json` in `dir`.
///
/// # Errors
/// One of them is no JSON, or too large.
pub fn tokenizer_files(dir: &Path) -> Result<TokenizerFiles, FormatError> {
    let read =
        |name: &str| json::read_if_present::<Value>(&dir.join(name), json::CONFIG_LIMIT).map(Option::unwrap_or_default);
    Ok(TokenizerFiles {
        config: read("tokenizer_config.json")?,
        special_tokens_map: read("special_tokens_map.json")?,
        added_tokens: read("added_tokens.json")?,
    })
}

/// The weights: as `model.safetensors`, by index, or as the only safetensors file there is. Where the first two are
/// there, transformers reads the single file.
fn open_store(dir: &Path, options: OpenOptions) -> Result<Store, FormatError> {
    let single = dir.join("model.safetensors");
    if single.try_exists().map_err(FormatError::io(&single))? {
        return Store::single(&single, options.access);
    }
    let index = dir.join(INDEX_NAME);
    if index.try_exists().map_err(FormatError::io(&index))? {
        return Store::sharded(&Index::read(&index)?, options.access);
    }
    let not = |reason: String| FormatError::NotACheckpoint { path: dir.to_owned(), reason };
    let files = files(dir)?;
    let ending = |end: &str| files.iter().filter(|f| f.extension().is_some_and(|e| e == end)).collect::<Vec<_>>();
    match ending("safetensors").as_slice() {
        [only] => Store::single(only, options.access),
        [] if !ending("bin").is_empty() || !ending("pt").is_empty() || !ending("pth").is_empty() => {
            Err(not("its weights are PyTorch pickles, which this program does not read; convert them to safetensors"
                .to_owned()))
        }
        [] => Err(not("holds no safetensors file".to_owned())),
        several => Err(not(format!("holds {} safetensors files and no {INDEX_NAME}", several.len()))),
    }
}

/// The plain files of a directory, sorted.
fn files(dir: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let entries = std::fs::read_dir(dir).map_err(FormatError::io(dir))?;
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.map_err(FormatError::io(dir))?.path());
    }
    files.sort();
    Ok(files)
}

/// `tokenizer.json`, if it is JSON; what it means is for the tokenizer to say.
fn tokenizer(dir: &Path) -> Result<TokenizerSource, FormatError> {
    let path = dir.join("tokenizer.json");
    match json::read_if_present::<serde::de::IgnoredAny>(&path, TOKENIZER_LIMIT)? {
        Some(_) => Ok(TokenizerSource::Json(path)),
        None => Ok(TokenizerSource::None),
    }
}
