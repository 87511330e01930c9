//! A whole run: steps, evaluations on held-out text, checkpoints, the best model kept.
//!
//! In the output directory: `checkpoint-<step>/` (to resume from, and a model directory), `best/` and `final/` (models alone).
//!
//! With gradient release a gradient that is not finite may be met when later layers have been updated. Such a step is taken back: the
//! last checkpoint is read again and the steps since then are done again without it, which gives what they gave, since a step is a
//! function of seed and number. So a skipped step changes nothing in any recipe, and costs nothing until it happens.

mod directory;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fourfold_kernels::release_freed_memory;
use thiserror::Error;

pub(crate) use self::directory::{disk_error, publish};
pub use self::directory::{is_ours, latest_checkpoint, resume, tidy, work_directory};

use self::directory::{prune, save_model};
use crate::checkpoint::{self, CheckpointError, State};
use crate::data::DataError;
use crate::network::{BatchSource, HeldOut, Network, Score};
use crate::optim::OptimError;
use crate::store::ParameterStore;
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
    /// The loss exploded, or the gradients were zero or not finite, for many steps in a row.
    #[error(
        "step {step}: the training diverged: for {steps} steps the loss has been above {limit:.1} (it was {first:.2} at first), or \
         the gradients zero or not finite; {kept}"
    )]
    Diverged {
        /// The last step.
        step: u64,
        /// Steps in a row.
        steps: u32,
        /// What a loss is not expected to exceed.
        limit: f64,
        /// The first step's loss.
        first: f64,
        /// What is left to go on from.
        kept: Kept,
    },
    /// A gradient was not finite after other tensors had been updated, and the step cannot be taken back.
    #[error("step {step}: {source}, when later layers had been updated; {reason}")]
    Torn {
        /// The step.
        step: u64,
        /// The gradient.
        source: OptimError,
        /// Why not.
        reason: &'static str,
    },
    /// The trained model could not be written. Its weights are in the last checkpoint.
    #[error("{source}; the trained weights are in {}", checkpoint.display())]
    Unsaved {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What failed.
        source: CheckpointError,
    },
}

/// The newest checkpoint of a run that failed.
#[derive(Debug)]
pub struct Kept(Option<PathBuf>);

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(place) => write!(f, "{} is from before", place.display()),
            None => write!(f, "no checkpoint had been written before"),
        }
    }
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
    /// The run is back at `step`, to do the steps after it again.
    fn rolled_back(&mut self, step: u64);
    /// The held-out losses, and whether their mean is the lowest so far.
    fn evaluated(&mut self, step: u64, score: &Score, best: bool);
    /// A directory is complete.
    fn saved(&mut self, place: &Path);
    /// Whether to stop after this step, or before the next held-out batch; a checkpoint is written.
    fn stop(&mut self) -> bool;
    /// Adds configuration and tokenizer to a model's directory, and the weights of a packed model that is tuned.
    ///
    /// # Errors
    /// The files cannot be written.
    fn describe(&self, place: &Path, store: &ParameterStore) -> io::Result<()>;
}

/// Bad steps in a row after which a run gives up.
const PATIENCE: u32 = 20;
/// Steps taken back since the last checkpoint after which it does: each costs the steps since then.
const MOST_TAKEN_BACK: usize = 4;

/// What a loss that has not exploded stays below, nats: a batch may be much harder than the first one, guessing is not this bad.
fn limit(first_loss: f64) -> f64 {
    3.0 * first_loss + 3.0
}

/// The losses of all held-out batches; `None` where `stop` said so before all were done.
///
/// # Errors
/// As [`Trainer::evaluate`], and a batch that cannot be read.
pub fn evaluate<N: Network>(
    trainer: &Trainer<N>,
    held_out: &dyn HeldOut<N::Batch>,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Option<Score>, RunError> {
    let mut sum = Score::default();
    for i in 0..held_out.count() {
        if stop() {
            return Ok(None);
        }
        sum = sum.and(trainer.evaluate(&held_out.batch(i)?)?);
    }
    Ok(Some(sum))
}

/// Measures the model if that is due, and keeps it if it is the best so far.
fn measure<N: Network>(
    trainer: &Trainer<N>,
    held_out: &dyn HeldOut<N::Batch>,
    state: &mut State,
    options: &Options,
    events: &mut dyn Events,
) -> Result<(), RunError> {
    if !state.evaluation_due {
        return Ok(());
    }
    let Some(score) = evaluate(trainer, held_out, &mut || events.stop())? else { return Ok(()) };
    let loss = score.mean_loss();
    let best = !loss.is_nan() && state.best_loss.is_none_or(|lowest| loss < lowest);
    events.evaluated(state.step, &score, best);
    if best {
        state.best_loss = Some(loss);
        save_model(&options.output.join("best"), trainer.store(), &|place| events.describe(place, trainer.store()))?;
    }
    state.evaluation_due = false;
    Ok(())
}

/// Runs `trainer` from where `state` says to the end, or until `events` says stop. Returns the last state.
///
/// # Errors
/// A batch the model cannot take, a place that cannot be written, or a loss that explodes. Checkpoints written before stay, and none is
/// written while the loss is an exploded one.
pub fn run<N: Network>(
    trainer: &mut Trainer<N>,
    batches: &mut dyn BatchSource<N::Batch>,
    held_out: &dyn HeldOut<N::Batch>,
    mut state: State,
    options: &Options,
    events: &mut dyn Events,
) -> Result<State, RunError> {
    let accumulation = options.accumulation.max(1);
    let (mut bad_steps, mut save_due) = (0, false);
    let mut left_out: BTreeMap<u64, StepReport> = BTreeMap::new();
    trainer.resume(&state);
    measure(trainer, held_out, &mut state, options, events)?;
    // Steps begin on a heap without the holes of that.
    release_freed_memory();
    if state.evaluation_due {
        // Stopped before it was done: it stays owed, and the checkpoint that says so is the last one.
        return Ok(state);
    }
    while state.step < options.steps {
        let begun = Instant::now();
        let report = match left_out.get(&(state.step + 1)) {
            Some(report) => trainer.leave_out(report),
            None => {
                let first = state.step * accumulation;
                let of_step: Result<Vec<N::Batch>, _> = (first..first + accumulation).map(|i| batches.get(i)).collect();
                match trainer.step_accumulated(&of_step?) {
                    Err(TrainError::Torn { report, source }) => {
                        let step = report.step;
                        let Some(place) = latest_checkpoint(&options.output) else {
                            let reason = "there is no checkpoint yet to go back to";
                            return Err(RunError::Torn { step, source, reason });
                        };
                        if left_out.len() == MOST_TAKEN_BACK {
                            let reason = "so had several steps before, and the training has diverged";
                            return Err(RunError::Torn { step, source, reason });
                        }
                        (bad_steps, save_due) = (0, false);
                        state = checkpoint::restore(&place, trainer.store_mut())?;
                        trainer.resume(&state);
                        left_out.insert(step, *report);
                        events.rolled_back(state.step);
                        continue;
                    }
                    report => report?,
                }
            }
        };
        events.step(&report, begun.elapsed());
        trainer.record(&mut state);
        state.tokens += report.units as u64;
        if report.loss.is_finite() {
            state.first_loss.get_or_insert(report.loss);
        }
        let first = state.first_loss.unwrap_or(f64::INFINITY);
        // Where activations overflow, norms give zero: the loss is that of guessing and nothing is learned any more.
        let broken = report.loss > limit(first) || report.gradient_norm == 0.0;
        bad_steps = if broken || report.skipped { bad_steps + 1 } else { 0 };
        let last = state.step == options.steps;
        if bad_steps >= PATIENCE || (last && broken) {
            let (step, steps, limit) = (state.step, bad_steps, limit(first));
            let kept = Kept(latest_checkpoint(&options.output));
            return Err(RunError::Diverged { step, steps, limit, first, kept });
        }
        let due = |every: u64| every > 0 && state.step.is_multiple_of(every);
        state.evaluation_due = held_out.count() > 0 && (last || due(options.eval_every));
        save_due |= last || due(options.save_every);
        measure(trainer, held_out, &mut state, options, events)?;
        let stop = events.stop();
        // After a bad step the weights may be, which is seen by the next good one. A scaled loss is infinite now and then.
        let sound = bad_steps == 0 || trainer.scales_loss() || (last && bad_steps == 1);
        if (save_due || stop) && sound {
            let place = options.output.join(format!("checkpoint-{}", state.step));
            if !place.exists() {
                checkpoint::save(&place, trainer.store(), &state, &|place| events.describe(place, trainer.store()))?;
                events.saved(&place);
            }
            prune(&options.output, options.keep)?;
            save_due = false;
            left_out.clear();
        }
        if stop && !last {
            return Ok(state);
        }
    }
    if state.evaluation_due {
        return Ok(state);
    }
    let place = options.output.join("final");
    save_model(&place, trainer.store(), &|place| events.describe(place, trainer.store())).map_err(|source| {
        match latest_checkpoint(&options.output) {
            Some(checkpoint) => RunError::Unsaved { checkpoint, source },
            None => RunError::Checkpoint(source),
        }
    })?;
    events.saved(&place);
    Ok(state)
}
