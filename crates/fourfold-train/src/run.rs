//! A whole run: steps, evaluations on held-out text, checkpoints, the best model kept.
//!
//! In the output directory: `checkpoint-<step>/` (to resume from, and a model directory), `best/` and `final/` (models alone).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::checkpoint::{self, CheckpointError, State};
use crate::data::DataError;
use crate::network::{BatchSource, Network, Score};
use crate::trainer::{StepReport, TrainError, Trainer};

/// Why a run stopped.
#[derive(Debug, Error)]
pub enum RunError {
    /// A step failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A batch could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The loss or the gradients were not finite for many steps in a row.
    #[error("step {step}: {skipped} steps in a row had no finite loss or gradient; the last checkpoint is kept")]
    Diverged {
        /// The last step.
        step: u64,
        /// Steps skipped in a row.
        skipped: u32,
    },
}

/// How long to run and what to keep.
#[derive(Clone, Debug)]
pub struct Options {
    /// Steps in all, those before a resumption included.
    pub steps: u64,
    /// Batches whose gradients are summed for one step.
    pub accumulation: u64,
    /// Steps between evaluations; 0 for one at the end alone.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 for none before the end.
    pub save_every: u64,
    /// Checkpoints kept; older ones are removed.
    pub keep: usize,
    /// Where everything goes.
    pub output: PathBuf,
}

/// Who watches a run.
pub trait Events {
    /// A step is done; `elapsed` is what it took.
    fn step(&mut self, report: &StepReport, elapsed: Duration);
    /// The held-out losses, and whether their mean is the lowest so far.
    fn evaluated(&mut self, step: u64, score: &Score, best: bool);
    /// A directory is complete.
    fn saved(&mut self, place: &Path);
    /// Whether to stop after this step; a checkpoint is written.
    fn stop(&mut self) -> bool;
    /// Adds configuration and tokenizer to a model's directory.
    ///
    /// # Errors
    /// The files cannot be written.
    fn describe(&self, place: &Path) -> io::Result<()>;
}

/// Steps in a row without a finite loss after which a run gives up.
const MOST_SKIPPED: u32 = 20;

/// The latest whole checkpoint in `output`.
pub fn latest_checkpoint(output: &Path) -> Option<PathBuf> {
    checkpoints(output).pop().map(|(_, place)| place)
}

fn checkpoints(output: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|e| Some((e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?, e.path())))
        .collect();
    found.sort_unstable();
    found
}

/// The losses of all held-out batches.
///
/// # Errors
/// As [`Trainer::evaluate`].
pub fn evaluate<N: Network>(trainer: &Trainer<N>, held_out: &[N::Batch]) -> Result<Score, TrainError> {
    held_out.iter().try_fold(Score::default(), |sum, batch| Ok(sum.and(trainer.evaluate(batch)?)))
}

/// Runs `trainer` from where `state` says to the end, or until `events` says stop. Returns the last state.
///
/// # Errors
/// A batch the model cannot take, a place that cannot be written, or a loss that stays infinite. Checkpoints written before stay.
pub fn run<N: Network>(
    trainer: &mut Trainer<N>,
    batches: &mut dyn BatchSource<N::Batch>,
    held_out: &[N::Batch],
    mut state: State,
    options: &Options,
    events: &mut dyn Events,
) -> Result<State, RunError> {
    let mut skipped = 0;
    let accumulation = options.accumulation.max(1);
    trainer.resume(&state);
    while state.step < options.steps {
        let first = state.step * accumulation;
        let of_step: Vec<N::Batch> = (first..first + accumulation).map(|i| batches.get(i)).collect::<Result<_, _>>()?;
        let begun = Instant::now();
        let report = trainer.step_accumulated(&of_step)?;
        events.step(&report, begun.elapsed());
        trainer.record(&mut state);
        state.tokens += report.units as u64;
        skipped = if report.skipped { skipped + 1 } else { 0 };
        if skipped >= MOST_SKIPPED {
            return Err(RunError::Diverged { step: state.step, skipped });
        }
        let last = state.step == options.steps;
        let due = |every: u64| every > 0 && state.step.is_multiple_of(every);
        if !held_out.is_empty() && (last || due(options.eval_every)) {
            let score = evaluate(trainer, held_out)?;
            let loss = score.mean_loss();
            let best = state.best_loss.is_none_or(|lowest| loss < lowest);
            events.evaluated(state.step, &score, best);
            if best {
                state.best_loss = Some(loss);
                save_model(&options.output.join("best"), trainer, events)?;
            }
        }
        let stop = events.stop();
        if last || stop || due(options.save_every) {
            let place = options.output.join(format!("checkpoint-{}", state.step));
            if !place.exists() {
                checkpoint::save(&place, trainer.store(), &state, &|p| events.describe(p))?;
                events.saved(&place);
            }
            let all = checkpoints(&options.output);
            for (_, old) in &all[..all.len().saturating_sub(options.keep.max(1))] {
                fs::remove_dir_all(old).map_err(|source| CheckpointError::Io { file: old.clone(), source })?;
            }
        }
        if stop {
            return Ok(state);
        }
    }
    save_model(&options.output.join("final"), trainer, events)?;
    events.saved(&options.output.join("final"));
    Ok(state)
}

/// Writes the model alone, in place of what `place` held before.
fn save_model<N: Network>(place: &Path, trainer: &Trainer<N>, events: &dyn Events) -> Result<(), RunError> {
    let (new, old) = (place.with_extension("new"), place.with_extension("old"));
    let io = |source| CheckpointError::Io { file: place.to_path_buf(), source };
    for leftover in [&new, &old] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(io)?;
        }
    }
    fs::create_dir_all(&new).map_err(io)?;
    let written = checkpoint::save_weights(&new.join(checkpoint::weights_file(trainer.store())), trainer.store())
        .and_then(|()| events.describe(&new).map_err(io))
        .and_then(|()| if place.exists() { fs::rename(place, &old).map_err(io) } else { Ok(()) })
        .and_then(|()| fs::rename(&new, place).map_err(io));
    if written.is_err() {
        // Best effort: the error above is what matters.
        let _ = fs::remove_dir_all(&new);
    }
    written?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io)?;
    }
    Ok(())
}
