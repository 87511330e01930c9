//! From a directory that is being written to one that is there, such that a loss of power at any moment leaves the old one
//! whole, the new one whole, or both.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::DiskError;

/// The operations that decide what a crash leaves. Tests put a model of a disk in their place.
pub trait Disk {
    /// Names in a directory, and whether each is a directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, bool)>>;
    /// Whether anything has this name; links are not followed.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Makes a file's bytes durable.
    fn sync_file(&self, file: &Path) -> io::Result<()>;
    /// Makes a directory's names durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Gives a name to what had another.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Exchanges two names at once; `false` where the file system cannot.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool>;
    /// Removes a directory and all below it.
    fn remove_tree(&self, dir: &Path) -> io::Result<()>;
}

/// The operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Disk for System {
    fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, bool)>> {
        fs::read_dir(dir)?.map(|entry| entry.and_then(|e| Ok((e.path(), e.file_type()?.is_dir())))).collect()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn sync_file(&self, file: &Path) -> io::Result<()> {
        retried(|| File::open(file)?.sync_all())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        #[cfg(unix)]
        match retried(|| File::open(dir)?.sync_all()) {
            // Some network file systems do not know it of directories.
            Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {}
            synced => synced?,
        }
        #[cfg(not(unix))]
        let _ = dir;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        retried(|| fs::rename(from, to))
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            use rustix::io::Errno;
            match rustix::io::retry_on_intr(|| renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)) {
                Ok(()) => Ok(true),
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
                Err(e) => Err(e.into()),
            }
        }
        #[cfg(not(any(target_os = "linux", target_os = "macos")))]
        {
            let _ = (a, b);
            Ok(false)
        }
    }

    fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

/// A call that a signal may interrupt without a reason of its own.
fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The directory a name stands in.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes everything below `dir` durable, bytes before the names that lead to them, `dir`'s own names last.
///
/// # Errors
/// The file that could not be made durable.
pub fn sync_tree(disk: &dyn Disk, dir: &Path) -> Result<(), DiskError> {
    for (path, is_dir) in disk.list(dir).map_err(DiskError::io("read the directory", dir))? {
        if is_dir {
            sync_tree(disk, &path)?;
        } else {
            disk.sync_file(&path).map_err(DiskError::io("make durable", &path))?;
        }
    }
    disk.sync_dir(dir).map_err(DiskError::io("make durable", dir))
}

/// Gives the directory `staged` the name `target`, in place of what had it; the old one is removed. Where two names cannot be
/// exchanged at once the old one stands as `aside` for a moment, and [`restore`] brings it back after a crash.
///
/// When this returns, the new directory survives a loss of power. After a crash on the way `target` is the old or the new one.
///
/// # Errors
/// An operation that failed, by file. `target` is the old or the new directory then, whole.
pub fn publish(disk: &dyn Disk, staged: &Path, target: &Path, aside: &Path) -> Result<(), DiskError> {
    sync_tree(disk, staged)?;
    let names = |action| DiskError::io(action, target);
    let sync_names = || {
        disk.sync_dir(parent(target)).map_err(DiskError::io("make durable", parent(target)))?;
        match parent(staged) == parent(target) {
            true => Ok(()),
            false => disk.sync_dir(parent(staged)).map_err(DiskError::io("make durable", parent(staged))),
        }
    };
    if !disk.exists(target).map_err(names("look at"))? {
        disk.rename(staged, target).map_err(names("give the finished directory this name"))?;
        return sync_names();
    }
    if disk.exchange(staged, target).map_err(names("put the finished directory here"))? {
        sync_names()?;
        // What is left of the old one, if this fails, is removed at the next start: the output is there.
        let _ = disk.remove_tree(staged);
        return Ok(());
    }
    disk.remove_tree(aside).map_err(DiskError::io("remove", aside))?;
    disk.rename(target, aside).map_err(names("move away"))?;
    if let Err(e) = disk.rename(staged, target) {
        // The old one goes back; if even that fails the first error is the one to tell, and `restore` tries again.
        let _ = disk.rename(aside, target);
        return Err(names("give the finished directory this name")(e));
    }
    sync_names()?;
    let _ = disk.remove_tree(aside);
    Ok(())
}

/// Brings back an old directory that a crash left as `aside`: see [`publish`].
///
/// # Errors
/// It cannot be renamed.
pub fn restore(disk: &dyn Disk, target: &Path, aside: &Path) -> Result<(), DiskError> {
    let exists = |path| disk.exists(path).map_err(DiskError::io("look at", path));
    if exists(aside)? && !exists(target)? {
        disk.rename(aside, target).map_err(DiskError::io("restore", target))?;
        disk.sync_dir(parent(target)).map_err(DiskError::io("make durable", parent(target)))?;
    }
    Ok(())
}

/// Makes a directory's names durable.
///
/// # Errors
/// The system's.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    System.sync_dir(dir)
}

/// Makes a directory, those above it that are not there yet, and their names durable.
///
/// # Errors
/// A directory that cannot be made.
pub fn create_dir_durably(dir: &Path) -> Result<(), DiskError> {
    let is_there = fs::symlink_metadata(dir).is_ok();
    if !is_there && parent(dir) != dir {
        create_dir_durably(parent(dir))?;
    }
    match fs::create_dir(dir) {
        Ok(()) => System.sync_dir(parent(dir)).map_err(DiskError::io("make durable", parent(dir))),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(DiskError::io("make the directory", dir)(e)),
    }
}

/// Writes a whole file with the mode that the umask gives, and makes its bytes durable.
///
/// # Errors
/// It cannot be written.
pub fn write_file(file: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let written = File::create(file).and_then(|mut out| {
        out.write_all(bytes)?;
        retried(|| out.sync_all())
    });
    written.map_err(DiskError::io("write", file))
}

/// Copies a file's bytes alone (not its mode) and makes them durable. A signal on the way does no harm: every call is made again.
///
/// # Errors
/// It cannot be read or written.
pub fn copy_file(from: &Path, to: &Path) -> Result<(), DiskError> {
    let mut source = File::open(from).map_err(DiskError::io("read", from))?;
    let mut target = File::create(to).map_err(DiskError::io("write", to))?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = retried(|| source.read(&mut buffer)).map_err(DiskError::io("read", from))?;
        if read == 0 {
            return retried(|| target.sync_all()).map_err(DiskError::io("write", to));
        }
        target.write_all(&buffer[..read]).map_err(DiskError::io("write", to))?;
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
