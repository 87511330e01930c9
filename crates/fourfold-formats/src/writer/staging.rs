//! The directory an output grows in, and the rename that makes it the output.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::journal::{JOURNAL, Journal};
use super::layout::Layout;
use crate::{FormatError, OutputError};

/// `<out>.partial`, locked by this process.
pub(super) struct Staging {
    dir: PathBuf,
    out: PathBuf,
    /// Holds the lock as long as it is open.
    _lock: Option<File>,
    shards: Vec<(PathBuf, File)>,
    journal: Option<Journal>,
    /// Whether what the directory holds is this run's to remove.
    ours: bool,
}

impl Staging {
    /// Creates or takes up the directory beside `out`.
    pub fn open(out: &Path, overwrite: bool) -> Result<Self, FormatError> {
        let problem = |problem| FormatError::Output { path: out.to_owned(), problem };
        let Some(name) = out.file_name() else { return Err(problem(OutputError::Exists)) };
        check_free(out, overwrite)?;
        let mut partial = name.to_owned();
        partial.push(".partial");
        let dir = out.with_file_name(partial);
        fs::create_dir_all(&dir).map_err(FormatError::io(&dir))?;
        let lock = lock(&dir).map_err(|e| match e {
            Some(e) => FormatError::Io { file: dir.clone(), source: e },
            None => problem(OutputError::Busy { lock: dir.display().to_string() }),
        })?;
        let journal = Journal::read(&dir)?;
        let ours = journal.is_none();
        Ok(Self { dir, out: out.to_owned(), _lock: lock, shards: Vec::new(), journal, ours })
    }

    /// Makes the shards, or takes up those of an interrupted run of the same plan.
    pub fn begin(&mut self, plan: u64, layout: &Layout, overwrite: bool) -> Result<(), FormatError> {
        match &self.journal {
            Some(journal) if journal.plan() == plan && self.shards_are_whole(layout) => {}
            Some(_) if !overwrite => {
                let partial = self.dir.display().to_string();
                return Err(FormatError::Output {
                    path: self.out.clone(),
                    problem: OutputError::OtherLeftovers { partial },
                });
            }
            _ => {
                self.ours = true;
                self.clear()?;
                for shard in &layout.shards {
                    let path = self.dir.join(&shard.name);
                    let needed = shard.header.len() as u64 + shard.data_bytes;
                    let file = File::create(&path).map_err(FormatError::io(&path))?;
                    let made = reserve(&file, needed).and_then(|()| write_at(&file, 0, &shard.header));
                    made.map_err(|e| disk_error(&path, needed, e))?;
                }
                // Last: a journal says that every shard has its header and its room.
                self.journal = Some(Journal::create(&self.dir, plan)?);
            }
        }
        self.ours = true;
        for shard in &layout.shards {
            let path = self.dir.join(&shard.name);
            let file = OpenOptions::new().write(true).open(&path).map_err(FormatError::io(&path))?;
            self.shards.push((path, file));
        }
        Ok(())
    }

    fn shards_are_whole(&self, layout: &Layout) -> bool {
        layout.shards.iter().all(|shard| {
            let length = fs::metadata(self.dir.join(&shard.name)).map(|m| m.len());
            length.is_ok_and(|length| length == shard.header.len() as u64 + shard.data_bytes)
        })
    }

    /// Removes what an earlier run left, and no more: files of the names that runs give.
    fn clear(&mut self) -> Result<(), FormatError> {
        self.journal = None;
        for entry in fs::read_dir(&self.dir).map_err(FormatError::io(&self.dir))? {
            let path = entry.map_err(FormatError::io(&self.dir))?.path();
            fs::remove_file(&path).map_err(FormatError::io(&path))?;
        }
        Ok(())
    }

    /// A file inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What an interrupted run, and this one, have finished.
    pub fn journal(&self) -> impl Iterator<Item = (&str, u64)> {
        self.journal.iter().flat_map(Journal::iter)
    }

    /// Checksum of a tensor that an interrupted run had finished.
    pub fn finished(&self, tensor: &str) -> Option<u64> {
        self.journal.as_ref()?.finished(tensor)
    }

    /// Writes into a shard.
    pub fn write_at(&self, shard: usize, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let (path, file) = &self.shards[shard];
        write_at(file, offset, bytes).map_err(|e| disk_error(path, bytes.len() as u64, e))
    }

    /// Notes that a tensor is written.
    pub fn note(&mut self, tensor: &str, sum: u64) -> Result<(), FormatError> {
        let path = self.dir.join(JOURNAL);
        match &mut self.journal {
            Some(journal) => journal.note(tensor, sum).map_err(|e| disk_error(&path, 0, e)),
            None => Ok(()),
        }
    }

    /// Writes a whole small file.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let path = self.dir.join(name);
        let write = |path: &Path| {
            let mut file = File::create(path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write(&path).map_err(|e| disk_error(&path, bytes.len() as u64, e))
    }

    /// Copies a file under its own name.
    pub fn copy_file(&self, from: &Path) -> Result<(), FormatError> {
        let Some(name) = from.file_name() else { return Ok(()) };
        let bytes = fs::read(from).map_err(FormatError::io(from))?;
        self.write_file(&name.to_string_lossy(), &bytes)
    }

    /// Makes all durable and gives it its name.
    pub fn commit(mut self, out: &Path) -> Result<(), FormatError> {
        for (path, file) in &self.shards {
            file.sync_all().map_err(|e| disk_error(path, 0, e))?;
        }
        sync_dir(&self.dir).map_err(FormatError::io(&self.dir))?;
        let replaced = self.dir.with_extension(format!("replaced-{}", std::process::id()));
        let has_old = out.try_exists().map_err(FormatError::io(out))?;
        if has_old {
            fs::rename(out, &replaced).map_err(FormatError::io(out))?;
        }
        if let Err(e) = fs::rename(&self.dir, out) {
            if has_old {
                // The old output goes back to its place; if even that fails the first error is the one to tell.
                let _ = fs::rename(&replaced, out);
            }
            return Err(FormatError::Io { file: out.to_owned(), source: e });
        }
        self.ours = false;
        let journal = out.join(JOURNAL);
        fs::remove_file(&journal).map_err(FormatError::io(&journal))?;
        if has_old {
            fs::remove_dir_all(&replaced).map_err(FormatError::io(&replaced))?;
        }
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_dir(parent).map_err(FormatError::io(parent))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.ours {
            // An error is on its way to the user already.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Whether `out` may be made: it is not there, or is an empty directory, or is a model directory that may be replaced.
fn check_free(out: &Path, overwrite: bool) -> Result<(), FormatError> {
    let exists = Err(FormatError::Output { path: out.to_owned(), problem: OutputError::Exists });
    match fs::read_dir(out) {
        Ok(mut entries) => {
            let is_model = || out.join("config.json").exists();
            if entries.next().is_none() || (overwrite && is_model()) { Ok(()) } else { exists }
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotADirectory => exists,
        Err(e) => Err(FormatError::Io { file: out.to_owned(), source: e }),
    }
}

/// Locks a directory against other processes; `Err(None)` where one of them has it.
#[cfg(unix)]
fn lock(dir: &Path) -> Result<Option<File>, Option<io::Error>> {
    let handle = File::open(dir).map_err(Some)?;
    match handle.try_lock() {
        Ok(()) => Ok(Some(handle)),
        Err(fs::TryLockError::WouldBlock) => Err(None),
        // Some network file systems have no locks; two runs at once are then the user's to avoid.
        Err(fs::TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(None),
        Err(fs::TryLockError::Error(e)) => Err(Some(e)),
    }
}

/// Directories cannot be opened for locking here.
#[cfg(not(unix))]
fn lock(_dir: &Path) -> Result<Option<File>, Option<io::Error>> {
    Ok(None)
}

/// Gives a file its length, and the room for it where the file system can promise that.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
        Err(e) => return Err(e.into()),
    }
    file.set_len(length)
}

#[cfg(unix)]
fn write_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}

/// Makes a directory's names durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(dir)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

/// An I/O error while writing, a full disk by its own name.
fn disk_error(file: &Path, needed: u64, error: io::Error) -> FormatError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            FormatError::DiskFull { file: file.to_owned(), needed }
        }
        _ => FormatError::Io { file: file.to_owned(), source: error },
    }
}
