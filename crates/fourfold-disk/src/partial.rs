//! A file that is whole or absent.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::lock::{is_still, is_unsupported};
use crate::publish::parent;
use crate::{DiskError, System, publish::Disk};

/// What an unfinished file's name ends in; it begins with a dot. Nobody else gives such names: what is found under one is a killed
/// run's, and is written over.
const SUFFIX: &str = ".fourfold-partial";

/// Unfinished files of this process.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the unfinished files of this process, which is about to end at once.
pub fn remove_unfinished() {
    if let Ok(files) = UNFINISHED.lock() {
        files.iter().for_each(|file| {
            let _ = fs::remove_file(file);
        });
    }
}

fn forget(file: &Path) {
    if let Ok(mut files) = UNFINISHED.lock() {
        files.retain(|other| other != file);
    }
}

/// A file that grows under another name and takes its own when it is finished. Dropped before, it leaves nothing. What is no regular
/// file (a pipe, a terminal, `/dev/null`) is written to as it is.
#[derive(Debug)]
pub struct PartialFile {
    file: File,
    /// Its name while it grows; `None` for what is written to as it is.
    temporary: Option<PathBuf>,
    target: PathBuf,
}

impl PartialFile {
    /// Begins the file that [`crate::output_file`] found `target` to be.
    ///
    /// # Errors
    /// It cannot be made; another run writes it.
    pub fn create(target: &Path) -> Result<Self, DiskError> {
        let existing = fs::metadata(target).ok();
        if existing.as_ref().is_some_and(|m| !m.is_file()) {
            let file = OpenOptions::new().write(true).open(target).map_err(DiskError::io("write", target))?;
            return Ok(Self { file, temporary: None, target: target.to_owned() });
        }
        let mut name = std::ffi::OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(SUFFIX);
        let temporary = target.with_file_name(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = loop {
            let file = options.open(&temporary).map_err(DiskError::io("write", target))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(DiskError::Busy { place: target.to_owned(), process: None });
                }
                Err(TryLockError::Error(e)) if is_unsupported(&e) => {}
                Err(TryLockError::Error(e)) => return Err(DiskError::io("lock", &temporary)(e)),
            }
            if is_still(&file, &temporary) {
                break file;
            }
        };
        if let Ok(mut files) = UNFINISHED.lock() {
            files.push(temporary.clone());
        }
        let begun = Self { file, temporary: Some(temporary), target: target.to_owned() };
        begun.file.set_len(0).map_err(DiskError::io("write", target))?;
        if let Some(existing) = existing {
            // A file that is replaced keeps its mode, as it would if it were written to.
            let _ = begun.file.set_permissions(existing.permissions());
        }
        Ok(begun)
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// It cannot be made durable or renamed.
    pub fn finish(mut self) -> Result<(), DiskError> {
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        let target = self.target.clone();
        let finished = self.file.sync_all().map_err(DiskError::io("make durable", &target)).and_then(|()| {
            System.rename(&temporary, &target).map_err(DiskError::io("give the finished file this name", &target))?;
            System.sync_dir(parent(&target)).map_err(DiskError::io("make durable", parent(&target)))
        });
        if finished.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        forget(&temporary);
        finished
    }
}

impl Write for PartialFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl io::Seek for PartialFile {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
            forget(temporary);
        }
    }
}

/// Writes a file that is whole or absent.
///
/// # Errors
/// As [`PartialFile`].
pub fn write_whole(target: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let mut file = PartialFile::create(target)?;
    file.write_all(bytes).map_err(DiskError::io("write", target))?;
    file.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_absent_and_over_what_a_killed_run_left() {
        let place = tempfile::tempdir().unwrap();
        let count = || fs::read_dir(place.path()).unwrap().count();
        let file = place.path().join("report.html");
        fs::write(place.path().join(".report.html.fourfold-partial"), "half of something longer").unwrap();
        let mut half = PartialFile::create(&file).unwrap();
        half.write_all(b"half").unwrap();
        assert!(matches!(PartialFile::create(&file), Err(DiskError::Busy { .. })));
        drop(half);
        assert_eq!(count(), 0);
        write_whole(&file, b"whole").unwrap();
        assert_eq!((fs::read(&file).unwrap().as_slice(), count()), (&b"whole"[..], 1));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |file: &Path| fs::metadata(file).unwrap().permissions().mode() & 0o777;
            let plain = place.path().join("plain");
            fs::write(&plain, "").unwrap();
            assert_eq!(mode(&file), mode(&plain), "the umask's mode");
            write_whole(Path::new("/dev/null"), b"gone").unwrap();
            assert!(!fs::metadata("/dev/null").unwrap().is_file());
        }
    }
}
