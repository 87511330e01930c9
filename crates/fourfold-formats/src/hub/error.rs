//! What can go wrong between the hub and the cache.

use std::path::PathBuf;

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
    /// A file of another content than announced.
    #[error("{file}: the content that arrived has the hash {found}, {announced} was announced; it was thrown away")]
    Content {
        /// The file.
        file: String,
        /// Hash of what came.
        found: String,
        /// Hash announced.
        announced: String,
    },
    /// An endpoint that is neither https nor on this machine.
    #[error("HF_ENDPOINT {endpoint:?}: an https:// address is expected (http:// to this machine alone)")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
    },
    /// A proxy's address that is none.
    #[error("HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: {reason}")]
    Proxy {
        /// Why.
        reason: String,
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
    /// Whether another try may do.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Length { .. } | Self::Content { .. })
    }
}
