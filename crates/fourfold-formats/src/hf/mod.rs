//! Hugging Face directories: the weights under logical names, and the files beside them.

mod adapter;
mod directory;
mod source;
mod special;
mod templates;

pub use adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adaptable, AdapterError, with_adapter};
pub use directory::tokenizer_files;
pub(crate) use directory::{open_directory, open_file};
pub use source::HfSource;
pub use templates::{ChatTemplates, chat_templates, with_templates_inside};
