//! Hugging Face directories: the weights under logical names, and the files beside them.

mod directory;
mod source;
mod special;

pub(crate) use directory::{open_directory, open_file};
pub use source::HfSource;
