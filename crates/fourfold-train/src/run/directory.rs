//! A run's output directory: checkpoints to resume from, and the models `best/` and `final/`. Each appears whole under its name, and goes whole.
//!
//! Whatever is being written or removed lies in `.fourfold/` meanwhile, which is the run's own: after a crash all of it is removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fourfold_disk::{DiskError, System};

use crate::checkpoint::{self, CheckpointError, State};
use crate::store::ParameterStore;

/// The run's own directory, in its output.
const WORK: &str = ".fourfold";
/// What is put after the name of an old model there, while a new one takes its place in two steps.
const REPLACED: &str = "replaced";
/// Files of checkpoints and models beside the weights.
const FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
    "compression_report.json",
    "model.safetensors.index.json",
    "trainer_state.json",
    "checksums.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "README.md",
];
/// How the names of files of tensors begin.
const TENSORS: &[&str] = &["model", "adapter_model", "tuning", "optimizer"];

/// The directory in `output` for a run's lock and for what it is writing or removing.
pub fn work_directory(output: &Path) -> PathBuf {
    output.join(WORK)
}

/// Whether nothing is in a directory but files of the names that checkpoints and models have: only such ones are ever removed or replaced.
pub fn is_ours(dir: &Path) -> bool {
    let of_ours = |entry: io::Result<fs::DirEntry>| {
        let Ok(entry) = entry else { return false };
        let name = entry.file_name().to_string_lossy().into_owned();
        let has_tensors = || {
            let stem = name.strip_suffix(".safetensors").unwrap_or_default();
            TENSORS.iter().any(|kind| stem == *kind || stem.starts_with(&format!("{kind}-0")))
        };
        entry.file_type().is_ok_and(|kind| kind.is_file()) && (FILES.contains(&name.as_str()) || has_tensors())
    };
    fs::symlink_metadata(dir).is_ok_and(|meta| meta.is_dir()) && fs::read_dir(dir).is_ok_and(|mut all| all.all(of_ours))
}

/// Ends what a run that was killed left: a model that was being replaced comes back, all that was being written or removed goes.
///
/// # Errors
/// Something cannot be renamed or removed.
pub fn tidy(output: &Path) -> Result<(), CheckpointError> {
    let work = work_directory(output);
    for name in ["best", "final"] {
        let (place, old) = (output.join(name), work.join(name).with_extension(REPLACED));
        fourfold_disk::restore(&System, &place, &old).map_err(disk_error)?;
    }
    for entry in fs::read_dir(&work).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    let _ = fs::remove_dir(&work);
    leftovers_of_earlier_versions(output)
}

/// Versions before wrote and replaced in the output directory itself.
fn leftovers_of_earlier_versions(output: &Path) -> Result<(), CheckpointError> {
    for name in ["best", "final"] {
        let (place, old) = (output.join(name), output.join(name).with_extension("old"));
        if is_ours(&old) {
            fourfold_disk::restore(&System, &place, &old).map_err(disk_error)?;
        }
    }
    for entry in fs::read_dir(output).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let unfinished = match name.rsplit_once('.') {
            Some((checkpoint, "tmp")) => checkpoint.starts_with("checkpoint-"),
            Some((model, "new" | "old")) => ["best", "final"].contains(&model),
            _ => false,
        };
        if unfinished && is_ours(&entry.path()) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes a directory in the run's own, by `make`, and gives it the name `place`, in place of what had it.
pub(crate) fn publish(
    place: &Path,
    make: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let work = work_directory(place.parent().unwrap_or(Path::new("")));
    let staged = work.join(place.file_name().unwrap_or_default());
    remove_tree(&staged)?;
    fourfold_disk::create_dir_durably(&staged).map_err(disk_error)?;
    let published = make(&staged).and_then(|()| {
        fourfold_disk::publish(&System, &staged, place, &staged.with_extension(REPLACED)).map_err(disk_error)
    });
    if published.is_err() {
        // Best effort: the error is what matters.
        let _ = fs::remove_dir_all(&staged);
    }
    // It stays as long as the run's lock is in it.
    let _ = fs::remove_dir(&work);
    published
}

/// Removes a directory such that a crash leaves nothing of it under its name.
fn remove(place: &Path) -> Result<(), CheckpointError> {
    let work = work_directory(place.parent().unwrap_or(Path::new("")));
    let away = work.join(place.file_name().unwrap_or_default());
    remove_tree(&away)?;
    fs::create_dir_all(&work).map_err(io_error(&work))?;
    fs::rename(place, &away).map_err(io_error(place))?;
    remove_tree(&away)?;
    let _ = fs::remove_dir(&work);
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(dir)(e)),
        _ => Ok(()),
    }
}

/// What is put after the name of a checkpoint that cannot be read.
const DAMAGED: &str = "damaged";

/// The newest checkpoint in `output`, whole or not.
pub fn latest_checkpoint(output: &Path) -> Option<PathBuf> {
    checkpoints(output).pop().map(|(_, place)| place)
}

/// All checkpoints in `output`, oldest first.
fn checkpoints(output: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|e| Some((e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?, e.path())))
        .collect();
    found.sort_unstable();
    found
}

/// Reads the newest checkpoint in `output` that can be read into `store`, for a run that began as `begun`. Newer ones that cannot are
/// set aside under another name; `damaged` is told of each. `None` where there is no checkpoint at all.
///
/// # Errors
/// The newest checkpoint is another run's, or none of them can be read: then the error is the newest one's, and nothing is renamed. The store
/// must not be used after an error.
pub fn resume(
    output: &Path,
    store: &mut ParameterStore,
    begun: &State,
    damaged: &mut dyn FnMut(&Path, &CheckpointError),
) -> Result<Option<(PathBuf, State)>, CheckpointError> {
    tidy(output)?;
    let mut failed: Vec<(PathBuf, CheckpointError)> = Vec::new();
    for (_, place) in checkpoints(output).into_iter().rev() {
        checkpoint::check_origin(&place, begun)?;
        match checkpoint::restore(&place, store) {
            Ok(state) => {
                for (bad, error) in &failed {
                    set_aside(bad)?;
                    damaged(bad, error);
                }
                return Ok(Some((place, state)));
            }
            Err(error) => failed.push((place, error)),
        }
    }
    match failed.into_iter().next() {
        Some((_, error)) => Err(error),
        None => Ok(None),
    }
}

fn set_aside(place: &Path) -> Result<(), CheckpointError> {
    let aside = place.with_extension(DAMAGED);
    if is_ours(&aside) {
        remove(&aside)?;
    }
    fs::rename(place, aside).map_err(io_error(place))
}

/// Removes all checkpoints but the newest `keep`. What holds anything else stays.
pub(super) fn prune(output: &Path, keep: usize) -> Result<(), CheckpointError> {
    let all: Vec<_> = checkpoints(output).into_iter().filter(|(_, place)| is_ours(place)).collect();
    all[..all.len().saturating_sub(keep.max(1))].iter().try_for_each(|(_, old)| remove(old))
}

/// Writes the model alone, with its checksums, in place of what `place` held before.
pub(super) fn save_model(
    place: &Path,
    store: &ParameterStore,
    describe: &dyn Fn(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    publish(place, |new| {
        checkpoint::save_weights(&new.join(checkpoint::weights_file(store)), store)?;
        describe(new).map_err(io_error(place))?;
        fourfold_disk::write_checksums(new).map_err(disk_error)
    })
}

/// An error of the disk, by its file.
pub(crate) fn disk_error(error: DiskError) -> CheckpointError {
    match error {
        DiskError::Io { file, source, action } => {
            let source = io::Error::new(source.kind(), format!("cannot {action}: {source}"));
            CheckpointError::Io { file, source }
        }
        DiskError::Busy { ref place, .. } => CheckpointError::Io { file: place.clone(), source: error.into() },
        DiskError::Place { place: file, reason } | DiskError::Malformed { file, reason } => {
            CheckpointError::Malformed { file, reason }
        }
    }
}

fn io_error(file: &Path) -> impl Fn(io::Error) -> CheckpointError {
    let file = file.to_path_buf();
    move |source| CheckpointError::Io { file: file.clone(), source }
}
