//! What [`open`] gives: a model's weights, and all that lies beside them.

use std::fmt;
use std::path::{Path, PathBuf};

use fourfold_tensor::WeightSource;
use serde_json::Value;

use crate::gguf::write::MetaValue;
use crate::{FormatError, gguf, hf};

/// An opened model. Nothing of its weights is in memory yet.
pub struct Checkpoint {
    /// What was opened: a directory, or a file.
    pub path: PathBuf,
    /// `config.json`; for GGUF the equivalent, made from its metadata.
    pub config: Value,
    /// `generation_config.json`, where there is one.
    pub generation_config: Option<Value>,
    /// Where the tokenizer is.
    pub tokenizer: TokenizerSource,
    /// The chat template (Jinja), where there is one.
    pub chat_template: Option<String>,
    /// The chat template for conversations with tools, where there is one of its own.
    pub tool_template: Option<String>,
    /// `tokenizer_config.json` with all chat templates inside, where some lie in a directory of their own.
    pub merged_tokenizer_config: Option<Value>,
    /// Special tokens, as far as the files say.
    pub special: SpecialTokens,
    /// The files beside a `tokenizer.json`, as they are.
    pub tokenizer_files: TokenizerFiles,
    /// The tokenizer as a GGUF file's metadata have it, for a GGUF file made from it; empty elsewhere.
    pub gguf_tokenizer: Vec<(String, MetaValue)>,
    /// The weights, under Hugging Face names whatever the file format.
    pub weights: Box<dyn WeightSource>,
    /// Bytes of all tensor data in the files.
    pub weight_bytes: u64,
    /// Bytes of the files that hold them, headers included.
    pub file_bytes: u64,
}

/// The files beside a `tokenizer.json` that say more of its tokens, each null where there is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerFiles {
    /// `tokenizer_config.json`.
    pub config: Value,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Value,
    /// `added_tokens.json`.
    pub added_tokens: Value,
}

/// Where a checkpoint keeps its tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    Json(PathBuf),
    /// The text of a `tokenizer.json`, made from what a GGUF file embeds.
    Embedded(String),
    /// There is none.
    None,
}

/// Tokens with a meaning of their own. Ids come from the files' own words; a string alone is for the tokenizer to look up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<String>,
    /// Its id.
    pub bos_id: Option<u32>,
    /// End of sequence.
    pub eos: Option<String>,
    /// Every id that ends a generation.
    pub eos_ids: Vec<u32>,
    /// Padding.
    pub pad: Option<String>,
    /// Its id.
    pub pad_id: Option<u32>,
    /// Unknown.
    pub unk: Option<String>,
    /// Whether `bos` is put before every text; `None` leaves it to the tokenizer's own post-processor.
    pub add_bos: Option<bool>,
    /// Whether `eos` is put after every text; `None` likewise.
    pub add_eos: Option<bool>,
}

/// How tensor data is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// By position, into memory of our own: a tensor that is dropped leaves nothing resident. For compressing.
    #[default]
    Read,
    /// By memory map, without a copy: pages count as resident from the first touch for as long as the checkpoint lives.
    Map,
}

/// How a checkpoint is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// How tensor data is read.
    pub access: Access,
}

/// Opens a model: a Hugging Face directory (safetensors, plain, compressed-tensors or DeepSeek FP8), a `.safetensors` file beside
/// its `config.json`, or a `.gguf` file (or a directory of one). Reads headers only.
///
/// # Errors
/// What is wrong with the files, by file and tensor.
pub fn open(path: &Path) -> Result<Checkpoint, FormatError> {
    open_with(path, OpenOptions::default())
}

/// [`open`], with options.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: &Path, options: OpenOptions) -> Result<Checkpoint, FormatError> {
    let not = |reason: &str| FormatError::NotACheckpoint { path: path.to_owned(), reason: reason.to_owned() };
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => not("there is no such file or directory"),
        _ => FormatError::Io { file: path.to_owned(), source: e },
    })?;
    if meta.is_dir() {
        return match only_gguf(path)? {
            Some(file) => gguf::checkpoint(&file),
            None => hf::open_directory(path, options),
        };
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => hf::open_file(path, options),
        Some("gguf") => gguf::checkpoint(path),
        _ => Err(not("is neither a directory nor a .safetensors or .gguf file")),
    }
}

/// The GGUF file of a directory that holds one and no config.json.
fn only_gguf(dir: &Path) -> Result<Option<PathBuf>, FormatError> {
    if dir.join("config.json").exists() {
        return Ok(None);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let path = entry.map_err(FormatError::io(dir))?.path();
        files.extend(path.extension().is_some_and(|e| e == "gguf").then_some(path));
    }
    if files.len() > 1 {
        let reason = format!("holds {} GGUF files; give the path of one of them", files.len());
        return Err(FormatError::NotACheckpoint { path: dir.to_owned(), reason });
    }
    Ok(files.pop())
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("tokenizer", &self.tokenizer)
            .field("weight_bytes", &self.weight_bytes)
            .finish_non_exhaustive()
    }
}
