//! Checkpoints on disk. [`open`] reads a Hugging Face directory or a file and hands out its weights, one at a time, through
//! [`fourfold_tensor::WeightSource`]; [`SafetensorsWriter`] takes them back through
//! [`fourfold_tensor::WeightSink`].
//!
//! This crate knows no model and no compression method: names and shapes go through as the files have them.

mod checkpoint;
mod error;
pub mod gguf;
pub mod hf;
pub mod hub;
pub mod images;
mod json;
pub mod mmap;
pub mod quantization;
pub mod regular;
pub mod safetensors;
pub mod writer;

pub use checkpoint::{
    Access, Checkpoint, OpenOptions, SpecialTokens, TokenizerFiles, TokenizerSource, open, open_with,
};
pub use error::{FormatError, OutputError, TensorError};
pub use hf::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adaptable, AdapterError, ChatTemplates, chat_templates, tokenizer_files,
    with_adapter, with_templates_inside,
};
pub use writer::{ModelFiles, SafetensorsWriter, WriteOptions};
