//! The cache that Python's `huggingface_hub` uses too: contents once under `blobs/` by their ETag, `snapshots/COMMIT/` with links to
//! them, `refs/` with the commits of branches and tags, and `.locks/` beside the repositories.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::HubError;

/// One repository's part of the cache.
pub(super) struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// A content that is not whole yet.
    pub(super) fn part(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a branch or tag was at when it was last asked for.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| !commit.is_empty())
    }

    /// Notes the commit of a branch or tag.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder.join("refs").join(revision);
        let folder = file.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder)?;
        let new = tempfile::NamedTempFile::new_in(folder)?;
        fs::write(new.path(), commit)?;
        new.persist(&file)?;
        Ok(())
    }

    /// Keeps other processes from the same content until the file is dropped.
    pub(super) fn lock(&self, etag: &str, file: &str) -> Result<File, HubError> {
        let failed = |e: io::Error| HubError::Cache { reason: format!("{}: {e}", self.locks.display()) };
        fs::create_dir_all(&self.locks).map_err(failed)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(lock),
            Err(TryLockError::WouldBlock) => {
                Err(HubError::Cache { reason: format!("{file}: another process downloads it ({})", path.display()) })
            }
            // A file system without locks.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Ok(lock),
            Err(TryLockError::Error(e)) => Err(failed(e)),
        }
    }

    /// Gives a content its name in a snapshot.
    pub(super) fn link(&self, etag: &str, commit: &str, name: &str) -> io::Result<()> {
        let pointer = self.snapshot(commit).join(name);
        fs::create_dir_all(pointer.parent().unwrap_or(&self.folder))?;
        if pointer.symlink_metadata().is_ok() {
            fs::remove_file(&pointer)?;
        }
        let up = "../".repeat(name.split('/').count() + 1);
        let blob = self.blob(etag);
        symlink(&format!("{up}blobs/{etag}"), &pointer)
            .or_else(|_| fs::hard_link(&blob, &pointer))
            .or_else(|_| fs::copy(&blob, &pointer).map(|_| ()))
    }
}

#[cfg(unix)]
fn symlink(to: &str, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(not(unix))]
fn symlink(_to: &str, _at: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
