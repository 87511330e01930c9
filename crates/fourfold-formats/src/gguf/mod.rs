//! GGUF files (versions 2 and 3, little-endian), seen as Hugging Face checkpoints: weights under Hugging Face names, a
//! `config.json` and a `tokenizer.json` made from the metadata.
//!
//! The way through: [`header`] parses and checks, [`arch`] says what each tensor is to Hugging Face, [`blocks`] takes
//! quantized blocks apart without loss, [`config`] and [`tokenizer`] translate the metadata, and [`GgufSource`] reads one
//! tensor at a time.

use std::path::Path;

use serde_json::{Value, json};

use crate::{Checkpoint, FormatError, SpecialTokens, TokenizerFiles, TokenizerSource};

mod arch;
mod blocks;
mod config;
mod error;
mod ggml_type;
pub mod header;
pub mod imatrix;
mod keys;
pub mod metadata;
mod rope;
mod source;
mod split;
pub mod tokenizer;
pub mod write;

pub use arch::{Arch, Target};
pub use blocks::{decode, encode};
pub use error::GgufError;
pub use ggml_type::GgmlType;
pub use source::{Gguf, GgufSource, open};

/// Opens a GGUF file, or the first file of a split model, as a checkpoint.
///
/// # Errors
/// [`FormatError::Gguf`], which names the file.
pub fn checkpoint(path: &Path) -> Result<Checkpoint, FormatError> {
    let gguf = open(path).map_err(|(file, problem)| FormatError::Gguf { file, problem })?;
    let (tokenizer, special) = match gguf.tokenizer {
        Some(embedded) => (TokenizerSource::Embedded(embedded.json), embedded.special),
        None => (TokenizerSource::None, SpecialTokens::default()),
    };
    Ok(Checkpoint {
        path: path.to_owned(),
        config: gguf.config,
        generation_config: generation_config(&special),
        tokenizer,
        chat_template: gguf.chat_template,
        tool_template: gguf.tool_template,
        merged_tokenizer_config: None,
        special,
        tokenizer_files: TokenizerFiles::default(),
        gguf_tokenizer: gguf.tokenizer_metadata,
        weights: Box::new(gguf.source),
        weight_bytes: gguf.weight_bytes,
        file_bytes: gguf.file_bytes,
    })
}

/// `generation_config.json`: the tokens that end an answer, of which the metadata may know more than `config.json` can say.
fn generation_config(special: &SpecialTokens) -> Option<Value> {
    if special.eos_ids.is_empty() {
        return None;
    }
    let mut config = json!({ "eos_token_id": special.eos_ids });
    if let Some(id) = special.bos_id {
        config["bos_token_id"] = json!(id);
    }
    Some(config)
}
