//! What can go wrong between the hub and the cache.

use std::path::PathBuf;

use hf_hub::api::sync::ApiError;
use thiserror::Error;

/// Why a model could not be fetched.
#[derive(Debug, Error)]
pub enum HubError {
    /// A name that no repository can have.
    #[error("{name:?} is no name of a repository (owner/name) or revision")]
    Name {
        /// The name given.
        name: String,
    },
    /// No such repository, revision or file; a private one looks the same.
    #[error("{what} was not found on the hub, or needs a token (HF_TOKEN)")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// Not to be read by this user.
    #[error("{what}: access denied; accept the model's terms on its page and set HF_TOKEN")]
    Denied {
        /// What was asked for.
        what: String,
    },
    /// Not asked, and not in the cache.
    #[error("not (wholly) in the cache {}, and HF_HUB_OFFLINE forbids asking the hub", cache.display())]
    Offline {
        /// The cache.
        cache: PathBuf,
    },
    /// No answer, or a connection that was cut too often.
    #[error("the hub cannot be reached: {reason}")]
    Unreachable {
        /// The last error.
        reason: String,
    },
    /// An answer that makes no sense.
    #[error("the hub answered what was not understood: {reason}")]
    Answer {
        /// What it was.
        reason: String,
    },
    /// The cache cannot be written, or another process holds it.
    #[error("the cache: {reason}")]
    Cache {
        /// Why.
        reason: String,
    },
    /// A file of another length than announced.
    #[error("{file}: {found} bytes arrived, {total} were announced")]
    Length {
        /// The file.
        file: String,
        /// Bytes on disk.
        found: u64,
        /// Bytes announced.
        total: u64,
    },
    /// A repository without weights that this program reads.
    #[error("the repository holds no safetensors weights{}", match ggufs.as_slice() {
        [] => String::new(),
        files => format!("; download one of its GGUF files and give its path: {}", files.join(", ")),
    })]
    NoWeights {
        /// GGUF files it holds.
        ggufs: Vec<String>,
    },
}

impl HubError {
    /// Sorts an error of hf-hub's by what a user can do about it.
    pub(super) fn of(error: ApiError, file: Option<&str>) -> Self {
        let what = file.unwrap_or("the repository").to_owned();
        match error {
            ApiError::RequestError(e) => match *e {
                ureq::Error::Status(401 | 404, _) => Self::NotFound { what },
                ureq::Error::Status(403, _) => Self::Denied { what },
                // The server's trouble, or ours with an unfinished part, which has been removed: worth another try.
                ureq::Error::Status(code @ (408 | 416 | 429 | 500..=599), _) => {
                    Self::Unreachable { reason: format!("{what}: status {code}") }
                }
                ureq::Error::Status(code, _) => Self::Answer { reason: format!("{what}: status {code}") },
                ureq::Error::Transport(t) => Self::Unreachable { reason: format!("{what}: {t}") },
            },
            // A cut connection shows as an I/O error of the copy to disk; a full disk does too.
            ApiError::IoError(e) if is_of_disk(&e) => Self::Cache { reason: format!("{what}: {e}") },
            ApiError::IoError(e) => Self::Unreachable { reason: format!("{what}: {e}") },
            ApiError::InvalidResume => Self::Unreachable { reason: format!("{what}: the part on disk is too long") },
            ApiError::TooManyRetries(e) => Self::of(*e, file),
            ApiError::LockAcquisition(path) => {
                Self::Cache { reason: format!("{what}: another process holds {}", path.display()) }
            }
            other => Self::Answer { reason: format!("{what}: {other}") },
        }
    }

    /// Whether another try may do.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Length { .. })
    }
}

fn is_of_disk(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), NotFound | PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}
