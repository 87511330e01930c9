//! Hugging Face directories: the weights under logical names, and the files beside them.

mod adapter;
mod directory;
mod source;
mod special;

pub use adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adaptable, AdapterError, with_adapter};
pub use directory::{chat_template, tokenizer_files};
pub(crate) use directory::{open_directory, open_file};
pub use source::HfSource;
