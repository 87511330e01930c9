//! What can go wrong between a program and its disk.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a file could not be written, locked or checked.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process writes here.
    #[error("{}: another run{} is writing here; wait for it, or name another output", place.display(), by(.process))]
    Busy {
        /// The output.
        place: PathBuf,
        /// Its process id, where it is known.
        process: Option<u32>,
    },
    /// An output that cannot be made where it was asked for.
    #[error("{}: {reason}", place.display())]
    Place {
        /// The output as it was given.
        place: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// `checksums.json` is not one of ours.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

fn by(process: &Option<u32>) -> String {
    process.map(|id| format!(" (process {id})")).unwrap_or_default()
}

impl DiskError {
    /// For `map_err`: what was being done, and to which file.
    pub fn io(action: &'static str, file: &Path) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Io { action, file, source }
    }

    pub(crate) fn place(place: &Path, reason: impl Into<String>) -> Self {
        Self::Place { place: place.to_owned(), reason: reason.into() }
    }
}

/// For places where an I/O error is expected; the text keeps file and action.
impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        match &error {
            DiskError::Io { source, .. } => Self::new(source.kind(), error),
            DiskError::Busy { .. } | DiskError::Place { .. } | DiskError::Malformed { .. } => Self::other(error),
        }
    }
}
