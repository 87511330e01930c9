//! What can be wrong with a checkpoint. [`FormatError`] names the file, [`TensorError`] what is wrong with one tensor in it.

use std::io;
use std::path::{Path, PathBuf};

use fourfold_tensor::{DType, QuantizedError, SourceError};
use thiserror::Error;

/// A checkpoint that cannot be read or written.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// There is nothing at the path, or nothing that holds a model.
    #[error("{}: {reason}", path.display())]
    NotACheckpoint {
        /// The path given.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A JSON file that is no JSON, or not of the form its name promises.
    #[error("{}: {reason}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// One tensor cannot be used.
    #[error("{}: tensor {tensor}: {problem}", file.display())]
    Tensor {
        /// The file that holds it.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: TensorError,
    },
}

/// What is wrong with one tensor.
#[derive(Debug, Error)]
pub enum TensorError {
    /// Elements that are no weight: integers outside a packed weight.
    #[error("{dtype} {shape:?} is not a weight of floats")]
    NotFloat {
        /// The stored type.
        dtype: DType,
        /// The stored shape.
        shape: Vec<usize>,
    },
    /// The parts of a quantized matrix do not fit together.
    #[error(transparent)]
    Quantized(#[from] QuantizedError),
}

impl FormatError {
    /// Joins an I/O error to the file it is about.
    pub fn io(file: &Path) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Io { file, source }
    }
}

impl From<FormatError> for SourceError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Tensor { file, tensor, problem } => Self::Tensor { file, tensor, reason: Box::new(problem) },
            FormatError::Io { file, source } => Self::File { file, reason: Box::new(source) },
            FormatError::NotACheckpoint { path, reason } => Self::File { file: path, reason: reason.into() },
            FormatError::Json { file, reason } => Self::File { file, reason: reason.into() },
        }
    }
}
