//! A run's output directory: checkpoints to resume from, and the models `best/` and `final/`. Each appears whole under its name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::{self, CheckpointError, State};
use crate::store::ParameterStore;

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
    restore_names(output)?;
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
    let moved = if aside.exists() { fs::remove_dir_all(&aside) } else { Ok(()) };
    moved.and_then(|()| fs::rename(place, aside)).map_err(io_error(place))
}

/// Removes all checkpoints but the newest `keep`.
pub(super) fn prune(output: &Path, keep: usize) -> Result<(), CheckpointError> {
    let all = checkpoints(output);
    all[..all.len().saturating_sub(keep.max(1))]
        .iter()
        .try_for_each(|(_, old)| fs::remove_dir_all(old).map_err(io_error(old)))
}

/// Writes the model alone, in place of what `place` held before.
pub(super) fn save_model(
    place: &Path,
    store: &ParameterStore,
    describe: &dyn Fn(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    let (new, old) = (place.with_extension("new"), place.with_extension("old"));
    for leftover in [&new, &old] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(io_error(place))?;
        }
    }
    fs::create_dir_all(&new).map_err(io_error(place))?;
    let written = checkpoint::save_weights(&new.join(checkpoint::weights_file(store)), store)
        .and_then(|()| describe(&new).map_err(io_error(place)))
        .and_then(|()| if place.exists() { fs::rename(place, &old).map_err(io_error(place)) } else { Ok(()) })
        .and_then(|()| fs::rename(&new, place).map_err(io_error(place)));
    if written.is_err() {
        // Best effort: the error above is what matters.
        let _ = fs::remove_dir_all(&new);
    }
    written?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io_error(place))?;
    }
    Ok(())
}

/// Gives a model its name back whose run was killed between taking it away and giving it to the next.
fn restore_names(output: &Path) -> Result<(), CheckpointError> {
    for place in ["best", "final"].map(|name| output.join(name)) {
        let old = place.with_extension("old");
        if old.exists() && !place.exists() {
            fs::rename(old, &place).map_err(io_error(&place))?;
        }
    }
    Ok(())
}

fn io_error(file: &Path) -> impl Fn(io::Error) -> CheckpointError {
    let file = file.to_path_buf();
    move |source| CheckpointError::Io { file: file.clone(), source }
}
