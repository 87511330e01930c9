//! The directory an output grows in, and the rename that makes it the output.
//!
//! `<out>.partial/` holds a lock, the journal and the shards. When all is written, the files of the output move into
//! `<out>.partial/complete/`, which takes the output's name; an output that is replaced takes its place for a moment. So whatever a
//! crash leaves there is known by the journal, and an output never holds anything but its own files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use fourfold_disk::{CHECKSUMS, DiskError, Identity, Lock, System};

use super::journal::{JOURNAL, Journal};
use super::layout::{Layout, Shard};
use crate::{FormatError, OutputError};

/// The lock inside the partial output.
const LOCK: &str = "fourfold-lock";
/// The finished output inside the partial one, while it waits for its name; after that, the old one.
const COMPLETE: &str = "complete";
/// The old output, where two names cannot be exchanged at once.
const REPLACED: &str = "replaced";

/// `<out>.partial`, locked by this process.
pub(super) struct Staging {
    dir: PathBuf,
    out: PathBuf,
    /// Held as long as this lives.
    lock: Option<Lock>,
    shards: Vec<(PathBuf, File)>,
    journal: Option<Journal>,
    identity: Identity,
    /// Names of the output's files that are written beside the shards.
    files: Vec<String>,
    /// Whether what is here is of no use to another run.
    discarded: bool,
}

impl Staging {
    /// Creates or takes up the directory beside `out`, if what is in it is this run's.
    pub fn open(out: &Path, overwrite: bool, identity: &Identity) -> Result<Self, FormatError> {
        let problem = |problem| FormatError::Output { path: out.to_owned(), problem };
        let Some(dir) = partial(out) else { return Err(problem(OutputError::Exists)) };
        leftovers_of_earlier_versions(out)?;
        match state_of(&dir).map_err(FormatError::io(&dir))? {
            State::Foreign => {
                return Err(problem(OutputError::ForeignLeftovers { partial: dir.display().to_string() }));
            }
            State::Absent => check_free(out, overwrite)?,
            State::Ours => {}
        }
        fourfold_disk::create_dir_durably(&dir).map_err(disk)?;
        let lock = Lock::acquire(&dir.join(LOCK), out).map_err(disk)?;
        let journal = Journal::read(&dir)?;
        let (shards, files, identity) = (Vec::new(), Vec::new(), identity.clone());
        let mut staging =
            Self { dir, out: out.to_owned(), lock: Some(lock), shards, journal, identity, files, discarded: false };
        staging.tidy()?;
        check_free(out, overwrite)?;
        if let Some(journal) = &staging.journal
            && !overwrite
            && journal.iter().next().is_some()
        {
            let differing = staging.identity.differing(journal.identity());
            if !differing.is_empty() {
                let partial = staging.dir.display().to_string();
                let differs = staging.identity.told(journal.identity(), differing);
                return Err(problem(OutputError::OtherLeftovers { partial, differs }));
            }
        }
        Ok(staging)
    }

    /// Ends what a crash left of a publication: before it had happened the files go back to where they grew, after it nothing is left to do
    /// but to remove what was replaced.
    fn tidy(&mut self) -> Result<(), FormatError> {
        let (complete, replaced) = (self.dir.join(COMPLETE), self.dir.join(REPLACED));
        fourfold_disk::restore(&System, &self.out, &replaced).map_err(disk)?;
        let publishing = self.journal.as_ref().and_then(Journal::publishing);
        let is_new = match publishing {
            Some(sum) => complete.is_dir() && sha256(&complete.join(CHECKSUMS)).as_deref() == Some(sum),
            None => true,
        };
        let published = publishing.is_some_and(|sum| sha256(&self.out.join(CHECKSUMS)).as_deref() == Some(sum));
        if complete.is_dir() && is_new {
            for entry in fs::read_dir(&complete).map_err(FormatError::io(&complete))? {
                let path = entry.map_err(FormatError::io(&complete))?.path();
                let back = self.dir.join(path.file_name().unwrap_or_default());
                fs::rename(&path, &back).map_err(FormatError::io(&path))?;
            }
            fs::remove_dir(&complete).map_err(FormatError::io(&complete))?;
        } else {
            remove_tree(&complete)?;
        }
        remove_tree(&replaced)?;
        if published {
            self.clear()?;
        }
        Ok(())
    }

    /// Makes the shards, or takes up those of an interrupted run of the same plan.
    pub fn begin(&mut self, plan: u64, layout: &Layout, overwrite: bool) -> Result<(), FormatError> {
        match &self.journal {
            Some(journal) if journal.plan() == plan && *journal.identity() == self.identity => {
                layout.shards.iter().try_for_each(|shard| self.mend(shard))?;
            }
            Some(journal) if !overwrite && journal.iter().next().is_some() => {
                let (partial, differs) = (self.dir.display().to_string(), "the plan is another".to_owned());
                let problem = OutputError::OtherLeftovers { partial, differs };
                return Err(FormatError::Output { path: self.out.clone(), problem });
            }
            _ => {
                self.clear()?;
                for shard in &layout.shards {
                    let path = self.dir.join(&shard.name);
                    let file = File::create(&path).map_err(FormatError::io(&path))?;
                    let made = reserve(&file, shard.bytes()).and_then(|()| write_at(&file, 0, &shard.header));
                    made.map_err(|e| disk_error(&path, shard.bytes(), e))?;
                }
                // Last: a journal says that every shard has its header and its room.
                self.journal = Some(Journal::create(&self.dir, plan, &self.identity)?);
            }
        }
        for shard in &layout.shards {
            let path = self.dir.join(&shard.name);
            let file = OpenOptions::new().read(true).write(true).open(&path).map_err(FormatError::io(&path))?;
            self.shards.push((path, file));
        }
        Ok(())
    }

    /// Makes a shard of an interrupted run what it was begun as: its length, and its header byte by byte. Its tensors have checksums of their
    /// own in the journal.
    fn mend(&self, shard: &Shard) -> Result<(), FormatError> {
        let path = self.dir.join(&shard.name);
        let mend = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false).open(&path)?;
            if file.metadata()?.len() != shard.bytes() {
                reserve(&file, shard.bytes())?;
                file.set_len(shard.bytes())?;
            }
            let mut header = vec![0; shard.header.len()];
            read_at(&file, 0, &mut header)?;
            if header == shard.header { Ok(()) } else { write_at(&file, 0, &shard.header) }
        };
        mend().map_err(|e| disk_error(&path, shard.bytes(), e))
    }

    /// Removes what an earlier run left, and no more: files of the names that runs give.
    fn clear(&mut self) -> Result<(), FormatError> {
        self.journal = None;
        for entry in fs::read_dir(&self.dir).map_err(FormatError::io(&self.dir))? {
            let path = entry.map_err(FormatError::io(&self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name == JOURNAL || super::files::is_output_name(&name) {
                fs::remove_file(&path).map_err(FormatError::io(&path))?;
            }
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

    /// Bytes of a shard as they lie there.
    pub fn read_at(&self, shard: usize, offset: u64, bytes: u64) -> Result<Vec<u8>, FormatError> {
        let (path, file) = &self.shards[shard];
        let mut found = vec![0; bytes as usize];
        read_at(file, offset, &mut found).map_err(FormatError::io(path))?;
        Ok(found)
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
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.files.push(name.to_owned());
        fourfold_disk::write_file(&self.dir.join(name), bytes).map_err(disk)
    }

    /// Copies a file under its own name.
    pub fn copy_file(&mut self, from: &Path) -> Result<(), FormatError> {
        let Some(name) = from.file_name() else { return Ok(()) };
        self.files.push(name.to_string_lossy().into_owned());
        fourfold_disk::copy_file(from, &self.dir.join(name)).map_err(disk)
    }

    /// Leaves nothing to another run.
    pub fn discard(&mut self) {
        self.discarded = true;
    }

    /// Makes all durable and gives it its name.
    pub fn commit(mut self) -> Result<(), FormatError> {
        let complete = self.dir.join(COMPLETE);
        fs::create_dir(&complete).map_err(FormatError::io(&complete))?;
        let shards = self.shards.drain(..).map(|(path, _)| path);
        let mut files: Vec<PathBuf> = shards.chain(self.files.iter().map(|name| self.dir.join(name))).collect();
        files.sort();
        files.dedup();
        for path in files {
            let to = complete.join(path.file_name().unwrap_or_default());
            fs::rename(&path, &to).map_err(FormatError::io(&path))?;
        }
        fourfold_disk::write_checksums(&complete).map_err(disk)?;
        let (sum, _) = fourfold_disk::sha256_of_file(&complete.join(CHECKSUMS)).map_err(disk)?;
        let path = self.dir.join(JOURNAL);
        if let Some(journal) = &mut self.journal {
            journal.note_publishing(&sum).map_err(|e| disk_error(&path, 0, e))?;
        }
        fourfold_disk::publish(&System, &complete, &self.out, &self.dir.join(REPLACED)).map_err(disk)?;
        self.discarded = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let is_of_use = self.journal.as_ref().is_some_and(|journal| journal.iter().next().is_some());
        if is_of_use && !self.discarded {
            return;
        }
        // An error is on its way to the user already, or the output is there. What is not ours stays.
        let trees = [COMPLETE, REPLACED].map(|name| self.dir.join(name));
        let cleared = trees.iter().try_for_each(|dir| remove_tree(dir)).and_then(|()| self.clear());
        if let (Ok(()), Some(lock)) = (cleared, self.lock.take()) {
            lock.remove();
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Versions before put an output that they replaced beside it, as `OUT.replaced-PID`, and left their journal in an output when they were
/// killed at its end. What is not there comes back; what has been replaced goes, and only what holds nothing but an output's files.
fn leftovers_of_earlier_versions(out: &Path) -> Result<(), FormatError> {
    let (Some(name), Some(parent)) = (out.file_name(), out.parent()) else { return Ok(()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let prefix = format!("{}.replaced-", name.to_string_lossy());
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(&prefix).unwrap_or_default();
        let is_theirs = !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit());
        if is_theirs && is_output(&entry.path()) {
            match fs::symlink_metadata(out) {
                Ok(_) => remove_tree(&entry.path())?,
                Err(_) => fs::rename(entry.path(), out).map_err(FormatError::io(out))?,
            }
        }
    }
    if is_output(out) && out.join(JOURNAL).is_file() {
        fs::remove_file(out.join(JOURNAL)).map_err(FormatError::io(out))?;
    }
    Ok(())
}

/// Whether a directory is a model and holds nothing but files of the names that outputs have.
fn is_output(dir: &Path) -> bool {
    let is_known = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            entry.file_type().is_ok_and(|kind| kind.is_file())
                && (name == JOURNAL || super::files::is_output_name(&name))
        })
    };
    let is_directory = fs::symlink_metadata(dir).is_ok_and(|meta| meta.is_dir());
    is_directory && dir.join("config.json").is_file() && fs::read_dir(dir).is_ok_and(|mut all| all.all(is_known))
}

/// Where an output grows.
fn partial(out: &Path) -> Option<PathBuf> {
    let mut name = out.file_name()?.to_owned();
    name.push(".partial");
    Some(out.with_file_name(name))
}

/// What stands where an output would grow.
enum State {
    Absent,
    /// Nothing, or what a run of this program left.
    Ours,
    Foreign,
}

fn state_of(dir: &Path) -> io::Result<State> {
    match fs::symlink_metadata(dir) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(State::Foreign),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(State::Absent),
        Err(e) => return Err(e),
    }
    let marked = [LOCK, JOURNAL].iter().any(|name| dir.join(name).is_file());
    Ok(if marked || fs::read_dir(dir)?.next().is_none() { State::Ours } else { State::Foreign })
}

fn sha256(file: &Path) -> Option<String> {
    fourfold_disk::sha256_of_file(file).ok().map(|(sum, _)| sum)
}

fn remove_tree(dir: &Path) -> Result<(), FormatError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(FormatError::Io { file: dir.to_owned(), source: e }),
        _ => Ok(()),
    }
}

/// An error of the disk, a full one by its own name.
fn disk(error: DiskError) -> FormatError {
    match error {
        DiskError::Io { file, source, .. } if is_full(source.kind()) => FormatError::DiskFull { file, needed: 0 },
        error => FormatError::Disk(error),
    }
}

/// Whether `out` may be made: it is not there, or is an empty directory, or is a model directory that may be replaced.
pub(super) fn check_free(out: &Path, overwrite: bool) -> Result<(), FormatError> {
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

#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => (out, offset) = (&mut out[n..], offset + n as u64),
        }
    }
    Ok(())
}

/// An I/O error while writing, a full disk by its own name.
fn disk_error(file: &Path, needed: u64, error: io::Error) -> FormatError {
    match is_full(error.kind()) {
        true => FormatError::DiskFull { file: file.to_owned(), needed },
        false => FormatError::Io { file: file.to_owned(), source: error },
    }
}

fn is_full(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}
