//! One run a place: a lock that the system releases when its process ends, however it ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::DiskError;

/// A locked file that holds the process id of who locked it.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    /// Open as long as the lock is held.
    _file: File,
}

impl Lock {
    /// Locks the file at `path`, which is made, for the output `place`. Where the file system has no locks nothing is locked.
    ///
    /// # Errors
    /// [`DiskError::Busy`] with the other's process id; the file cannot be made.
    pub fn acquire(path: &Path, place: &Path) -> Result<Self, DiskError> {
        loop {
            let mut file = open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    // The number is for the message alone.
                    let _ = file.read_to_string(&mut text);
                    return Err(DiskError::Busy { place: place.to_owned(), process: text.trim().parse().ok() });
                }
                Err(TryLockError::Error(e)) if is_unsupported(&e) => {}
                Err(TryLockError::Error(e)) => return Err(DiskError::io("lock", path)(e)),
            }
            // Its last owner may have removed the file between the opening and the locking.
            if is_still(&file, path) {
                let noted = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                noted.map_err(DiskError::io("write", path))?;
                return Ok(Self { path: path.to_owned(), _file: file });
            }
        }
    }

    /// Removes the file and releases the lock.
    pub fn remove(self) {
        // A lock file that stays does no harm: the next run takes it over.
        let _ = fs::remove_file(&self.path);
    }
}

fn open(path: &Path) -> Result<File, DiskError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(DiskError::io("open", path))
}

/// Network file systems without locks: two runs at once are the user's to avoid there.
pub(crate) fn is_unsupported(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    if error.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error()) {
        return true;
    }
    error.kind() == ErrorKind::Unsupported
}

/// Whether `path` still leads to this open file.
pub(crate) fn is_still(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let key = |m: fs::Metadata| (m.dev(), m.ino());
        file.metadata().ok().map(key) == fs::symlink_metadata(path).ok().map(key)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_of_the_first() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lock");
        let lock = Lock::acquire(&path, place.path()).unwrap();
        let error = Lock::acquire(&path, place.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("another run (process {})", std::process::id())), "{error}");
        drop(lock);
        Lock::acquire(&path, place.path()).unwrap().remove();
        assert!(!path.exists());
    }
}
