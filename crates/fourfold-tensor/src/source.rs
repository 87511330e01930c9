//! How weights enter and leave: by name, one at a time.

use std::error::Error;
use std::path::PathBuf;

use thiserror::Error;

use crate::{Form, Weight};

/// What is known of a tensor before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its logical name, in the model's Hugging Face spelling (`model.layers.0.self_attn.q_proj.weight`). The parts of a
    /// packed weight (`weight_packed`, `weight_scale`, …) are one tensor here, under the name of the weight they stand for.
    pub name: String,
    /// Logical shape, outermost first.
    pub shape: Vec<usize>,
    /// How it is stored: `BF16`, `Q4_K`, `int4 g64`.
    pub storage: String,
    /// Bytes in the file, all its parts together.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of logical elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// Why a tensor could not be read or written. The format's own error is the source; this names the place.
#[derive(Debug, Error)]
pub enum SourceError {
    /// There is no such tensor.
    #[error("{}: no tensor named {tensor}", file.display())]
    Missing {
        /// The checkpoint.
        file: PathBuf,
        /// The name looked for.
        tensor: String,
    },
    /// The tensor is there and cannot be used.
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    Tensor {
        /// The file that holds it.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong, from the format's own error enum.
        reason: Box<dyn Error + Send + Sync>,
    },
    /// The file itself cannot be read or written.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: Box<dyn Error + Send + Sync>,
    },
}

impl SourceError {
    /// The system's error beneath, if it is one: of a disk, say, which may be mended.
    pub fn io(&self) -> Option<&std::io::Error> {
        let mut cause: Option<&(dyn Error + 'static)> = match self {
            Self::Missing { .. } => None,
            Self::Tensor { reason, .. } | Self::File { reason, .. } => Some(&**reason),
        };
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref() {
                return Some(io);
            }
            cause = error.source();
        }
        None
    }
}

/// A checkpoint to read from. Loading is lazy: one call reads one tensor, and nothing is kept.
pub trait WeightSource: Send + Sync {
    /// Every logical tensor, in the file's order.
    fn tensors(&self) -> &[TensorInfo];

    /// One tensor's description.
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors().iter().find(|t| t.name == name)
    }

    /// Reads one tensor in its stored form: packed codes stay packed.
    ///
    /// # Errors
    /// [`SourceError::Missing`] for an unknown name; otherwise what is wrong with the bytes.
    fn load(&self, name: &str) -> Result<Weight, SourceError>;
}

/// A checkpoint to write to, one tensor at a time; nothing appears under the final name before [`WeightSink::finish`].
///
/// The whole output is declared before the first tensor is written, so that a file's header can precede its data and a full
/// disk shows before hours of work. A sink that outlives a killed run gives back what that run had finished.
pub trait WeightSink {
    /// Declares every tensor, in the order of the file: called once, before anything else.
    ///
    /// # Errors
    /// A form that the format cannot store, a name twice, no room on the disk.
    fn begin(&mut self, tensors: &[(String, Form)]) -> Result<(), SourceError> {
        let _ = tensors;
        Ok(())
    }

    /// The tensor as an earlier, killed run of the same plan wrote it; `None` where it is still to be written. What this gives
    /// need not be written again.
    ///
    /// # Errors
    /// An I/O failure.
    fn written(&self, name: &str) -> Result<Option<Weight>, SourceError> {
        let _ = name;
        Ok(None)
    }

    /// Writes one declared tensor, in any order.
    ///
    /// # Errors
    /// A tensor that was not declared or has another form than declared, or an I/O failure.
    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError>;

    /// Puts a small file beside the weights; sinks that have no place for one drop it.
    ///
    /// # Errors
    /// An I/O failure.
    fn attach(&mut self, name: &str, text: &str) -> Result<(), SourceError> {
        let _ = (name, text);
        Ok(())
    }

    /// The run has failed for a reason that the same command would meet again: what was written is of no use to it.
    fn discard(&mut self) {}

    /// Completes the files and gives them their final names.
    ///
    /// # Errors
    /// A declared tensor that was never written, or an I/O failure; the output is then absent.
    fn finish(self: Box<Self>) -> Result<(), SourceError>;
}
