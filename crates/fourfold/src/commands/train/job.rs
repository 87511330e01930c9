//! One run of any kind of network: from its checkpoint or anew, watched, to its report.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use fourfold_disk::{Identity, Lock, create_dir_durably};
use fourfold_kernels::backward::{Backward, SoftTargets};
use fourfold_kernels::cpu::keep_freed_memory;
use fourfold_kernels::{Activations, Cpu};
use fourfold_train::checkpoint::{CheckpointError, State};
use fourfold_train::network::{BatchSource, HeldOut, Network, Score};
use fourfold_train::run::{
    Events, Options, RunError, evaluate, is_ours, latest_checkpoint, resume, run as run_steps, tidy, work_directory,
};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{StepReport, Trainer};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;

use super::identity::free;
use super::metrics::Metrics;
use super::settings::{Settings, TeacherSettings};
use super::start::Description;
use crate::context::Context;
use crate::output::{Report, note};
use crate::{human, interrupt, memory};

#[derive(Serialize)]
struct TrainReport {
    #[serde(skip)]
    unit: Unit,
    output: String,
    preset: &'static str,
    parameters: u64,
    steps: u64,
    tokens: u64,
    training_loss: Option<f64>,
    held_out_loss: Option<f64>,
    /// Before the first step.
    held_out_loss_before: Option<f64>,
    /// What the losses are.
    loss: String,
    held_out_cross_entropy: Option<f64>,
    held_out_perplexity: Option<f64>,
    /// Share of tokens, or of texts, whose target was the most likely.
    held_out_accuracy: Option<f64>,
    held_out_scored: Option<usize>,
    best_held_out_loss: Option<f64>,
    seconds: f64,
    tokens_per_second: f64,
    weight_bytes: u64,
    optimizer_bytes: u64,
    /// The model under the adapters.
    frozen_bytes: u64,
    peak_memory: Option<u64>,
    predicted_memory: Option<u64>,
    complete: bool,
}

/// What a rate counts.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Tokens,
    Images,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Images => "images",
        }
    }

    fn rate(self) -> &'static str {
        match self {
            Self::Tokens => "tok/s",
            Self::Images => "images/s",
        }
    }
}

/// A run of any kind of network.
pub(super) struct Job<'a> {
    pub(super) settings: &'a Settings,
    pub(super) context: &'a Context,
    pub(super) description: &'a Description,
    /// Elements that are trained.
    pub(super) parameters: u64,
    /// What is learned besides the text: see [`State::objective`].
    pub(super) objective: Option<String>,
    /// What a checkpoint that is gone on from must share.
    pub(super) identity: Identity,
    pub(super) steps: u64,
    /// Whether the loss is one of tokens, whose exponential is a perplexity.
    pub(super) is_text: bool,
    pub(super) unit: Unit,
    /// Bytes of the peak, where they can be told.
    pub(super) predicted: Option<u64>,
}

/// An output directory that no other run writes to, as long as this lives.
pub(super) struct Held {
    lock: Option<Lock>,
    work: PathBuf,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            lock.remove();
        }
        // What a killed run left in it, if there is anything, is for the next one.
        let _ = fs::remove_dir(&self.work);
    }
}

/// Makes the output directory, locks it, and ends what a killed run left in it. One with a checkpoint is gone on with alone.
pub(super) fn prepare_output(settings: &Settings) -> Result<Held> {
    let work = work_directory(&settings.output);
    create_dir_durably(&work)?;
    let lock = Lock::acquire(&work.join("lock"), &settings.output)?;
    let held = Held { lock: Some(lock), work };
    tidy(&settings.output)?;
    for place in ["best", "final"].map(|name| settings.output.join(name)) {
        if fs::symlink_metadata(&place).is_ok() && !is_ours(&place) {
            bail!(
                "{}: holds what fourfold did not write and would be replaced; name another --output",
                place.display()
            );
        }
    }
    if let (Some(place), false) = (latest_checkpoint(&settings.output), settings.resume) {
        bail!("{}: exists; --resume goes on from it, another --output begins anew", place.display());
    }
    Ok(held)
}

impl Job<'_> {
    pub(super) fn run<N: Network>(
        self,
        network: N,
        mut store: ParameterStore,
        batches: &mut dyn BatchSource<N::Batch>,
        held_out: &dyn HeldOut<N::Batch>,
    ) -> Result<()> {
        let Self { settings, context, description, parameters, objective, identity, steps, is_text, unit, predicted } =
            self;
        let hyper = settings.hyperparameters(steps);

        let free = free(settings, steps, context);
        let mut state = State { objective, identity, free, ..State::begin(&settings.recipe, settings.seed) };
        if settings.resume {
            let mut damaged = |place: &Path, error: &CheckpointError| {
                note(&format!(
                    "warning: {error}; {} is set aside, an older checkpoint is gone on from",
                    place.display()
                ));
            };
            if let Some((place, found)) = resume(&settings.output, &mut store, &state, &mut damaged)? {
                context.remark(&format!("resuming from {}", place.display()));
                // What is free may have changed, which is no fault; a checkpoint of a version that noted nothing is one of this run from now on.
                let changed = state.free.differing(&found.free);
                if !found.free.is_empty() && !changed.is_empty() {
                    context.remark(&format!("goes on otherwise: {}", state.free.told(&found.free, changed)));
                }
                state = State { identity: state.identity, free: state.free, ..found };
                if state.step >= steps {
                    let done = state.step;
                    context.remark(&format!("the run of {steps} steps is finished: {done} steps are done"));
                }
            }
        }

        let (weight_bytes, optimizer_bytes) = store.byte_len();
        context.remark(&format!(
            "{} trained parameters, {}: weights {}, optimizer {}; {steps} steps",
            human::count(parameters),
            settings.recipe.label(),
            human::bytes(weight_bytes as u64),
            human::bytes(optimizer_bytes as u64),
        ));
        let mut options = context.global.cpu(context.threads);
        if settings.recipe.activations() == Activations::F32 {
            options.activations = Activations::F32;
        }
        let backend: Arc<dyn Backward> = Arc::new(Cpu::new(options)?);
        network.prepare(&store, &backend)?;
        keep_freed_memory();
        let mut trainer = Trainer::new(network, store, backend, settings.recipe, hyper, state.step);
        let bar = context.progress.bar("training", steps, "steps");
        bar.set_position(state.step);
        let mut watcher = Watcher {
            bar,
            metrics: Metrics::open(&settings.output, state.step)?,
            description,
            loss: loss_name(settings),
            smooth: None,
            held_out: None,
            last_step: state.step,
            seconds: 0.0,
            tokens: 0,
            unit,
            failure: None,
        };
        let _cooperation = match context.quiet {
            true => interrupt::cooperate(),
            false => {
                interrupt::cooperate_saying("finishing this step and writing a checkpoint; Ctrl-C again quits at once")
            }
        };
        let options = Options {
            steps,
            accumulation: settings.gradient_accumulation,
            eval_every: settings.eval_every.unwrap_or((steps / 10).max(1)),
            save_every: settings.save_every.unwrap_or((steps / 10).max(1)),
            keep: settings.keep,
            output: settings.output.clone(),
        };
        let begun = Instant::now();
        // Where the run begins, so that its end can say from where to where. A run that goes on knows it from its metrics.
        let known = || Metrics::first_held_out(&settings.output);
        let mut at_begin = if settings.resume { known() } else { None };
        if at_begin.is_none() && state.step == 0 && held_out.count() > 0 {
            let score = evaluate(&trainer, held_out, &mut interrupt::requested)?;
            score.iter().for_each(|score| watcher.begun_at(score));
            at_begin = score.map(|s| s.mean_loss());
        }
        let end = run_steps(&mut trainer, batches, held_out, state, &options, &mut watcher);
        watcher.bar.finish_and_clear();
        let end = end.map_err(|error| explain(error, settings))?;
        if let Some(failure) = watcher.failure {
            return Err(failure);
        }
        let score = match watcher.held_out {
            None if held_out.count() > 0 && end.step >= steps => {
                evaluate(&trainer, held_out, &mut interrupt::requested)?
            }
            found => found,
        };
        let complete = end.step >= steps && !end.evaluation_due;
        context.print(&TrainReport {
            output: settings.output.display().to_string(),
            preset: settings.recipe.name,
            parameters,
            steps: end.step,
            tokens: end.tokens,
            unit,
            training_loss: watcher.smooth,
            held_out_loss: score.map(|s| s.mean_loss()),
            held_out_loss_before: at_begin,
            loss: loss_name(settings),
            held_out_cross_entropy: score.filter(|_| is_text).map(|s| s.mean_cross_entropy()),
            held_out_perplexity: score.filter(|_| is_text).map(|s| s.mean_cross_entropy().exp()),
            held_out_accuracy: score.and_then(|s| s.accuracy()),
            held_out_scored: score.map(|s| s.scored),
            best_held_out_loss: end.best_loss,
            seconds: begun.elapsed().as_secs_f64(),
            tokens_per_second: watcher.tokens as f64 / watcher.seconds.max(1e-9),
            weight_bytes: weight_bytes as u64,
            optimizer_bytes: optimizer_bytes as u64,
            frozen_bytes: trainer.store().frozen_bytes() as u64,
            peak_memory: memory::peak_resident(),
            predicted_memory: predicted,
            complete,
        })?;
        if !complete {
            bail!("interrupted at step {}; --resume goes on from the last checkpoint", end.step);
        }
        Ok(())
    }
}

/// What the losses of a run are.
fn loss_name(settings: &Settings) -> String {
    match &settings.teacher {
        None => "cross-entropy".to_owned(),
        Some(TeacherSettings { soft: SoftTargets { temperature, weight }, .. }) => {
            let divergence = match *temperature {
                1.0 => "KL(teacher || model)".to_owned(),
                t => format!("{t}^2 KL(teacher || model) at temperature {t}"),
            };
            match *weight {
                1.0 => divergence,
                w => format!("{w} {divergence} + {} cross-entropy", 1.0 - w),
            }
        }
    }
}

/// A run that failed, and what to do about it.
fn explain(error: RunError, settings: &Settings) -> anyhow::Error {
    let advice = match &error {
        RunError::Diverged { .. } => format!("; try a lower --learning-rate than {}", settings.learning_rate),
        RunError::Torn { .. } => format!(
            "; try a lower --learning-rate than {}, or --max-grad-norm, which looks at every gradient before any is applied",
            settings.learning_rate
        ),
        RunError::Unsaved { .. } => "; the same command with --resume writes them again".into(),
        RunError::Checkpoint(_) if latest_checkpoint(&settings.output).is_some() => {
            "; the checkpoints before are kept, the same command with --resume goes on from the last one".into()
        }
        RunError::Checkpoint(_) | RunError::Train(_) | RunError::Data(_) => return error.into(),
    };
    anyhow!("{error}{advice}")
}

/// Shows and records what happens.
struct Watcher<'a> {
    bar: ProgressBar,
    metrics: Metrics,
    description: &'a Description,
    /// What the losses are.
    loss: String,
    /// The training loss, smoothed over about twenty steps.
    smooth: Option<f64>,
    held_out: Option<Score>,
    last_step: u64,
    seconds: f64,
    tokens: u64,
    unit: Unit,
    /// A metrics file that could not be written.
    failure: Option<anyhow::Error>,
}

impl Watcher<'_> {
    /// The score before the first step, which is no candidate for `best/`.
    fn begun_at(&mut self, score: &Score) {
        let (loss, cross_entropy, accuracy) = (score.mean_loss(), score.mean_cross_entropy(), score.accuracy());
        self.bar.set_message(format!("held out {loss:.4}"));
        self.record(
            0,
            serde_json::json!({
                "eval/loss": loss, "loss": self.loss, "eval/cross_entropy": cross_entropy,
                "eval/perplexity": cross_entropy.exp(), "eval/accuracy": accuracy, "eval/best": 0
            }),
        );
    }

    fn record(&mut self, step: u64, values: Value) {
        if let Err(error) = self.metrics.write(step, values) {
            self.failure.get_or_insert(error);
        }
    }
}

impl Events for Watcher<'_> {
    fn step(&mut self, report: &StepReport, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.last_step = report.step;
        self.seconds += seconds;
        self.tokens += report.units as u64;
        if report.loss.is_finite() {
            self.smooth = Some(self.smooth.map_or(report.loss, |s| 0.95 * s + 0.05 * report.loss));
        }
        let peak = memory::peak_resident().unwrap_or(0);
        self.bar.set_position(report.step);
        self.bar.set_message(format!(
            "loss {:.4}{}, {:.0} {}, {}",
            self.smooth.unwrap_or(report.loss),
            self.held_out.map(|h| format!(", held out {:.4}", h.mean_loss())).unwrap_or_default(),
            self.tokens as f64 / self.seconds.max(1e-9),
            self.unit.rate(),
            human::bytes(peak)
        ));
        let mut values = serde_json::json!({
            "train/loss": report.loss,
            "loss": self.loss,
            "train/learning_rate": report.lr,
            "train/grad_norm": report.gradient_norm,
            "train/skipped": u8::from(report.skipped),
            "train/loss_scale": report.loss_scale.unwrap_or(1.0),
            "train/tokens_per_second": report.units as f64 / seconds.max(1e-9),
            "memory/peak_bytes": peak,
        });
        if let Some(imbalance) = report.expert_imbalance {
            values["train/expert_imbalance"] = imbalance.into();
        }
        self.record(report.step, values);
    }

    fn rolled_back(&mut self, step: u64) {
        self.bar.set_position(step);
        note(&format!(
            "warning: step {}: a gradient was not finite; the step is left out, and the run goes on from step {step}",
            self.last_step + 1
        ));
        if let Err(error) = self.metrics.cut(step) {
            self.failure.get_or_insert(error);
        }
    }

    fn evaluated(&mut self, step: u64, score: &Score, best: bool) {
        let loss = score.mean_loss();
        self.held_out = Some(*score);
        let (cross_entropy, accuracy) = (score.mean_cross_entropy(), score.accuracy());
        let perplexity = cross_entropy.exp();
        let best = u8::from(best);
        self.record(
            step,
            serde_json::json!({
                "eval/loss": loss, "loss": self.loss, "eval/cross_entropy": cross_entropy, "eval/perplexity": perplexity,
                "eval/accuracy": accuracy, "eval/best": best
            }),
        );
    }

    fn saved(&mut self, _: &Path) {}

    fn stop(&mut self) -> bool {
        interrupt::requested() || self.failure.is_some()
    }

    fn describe(&self, place: &Path, store: &ParameterStore) -> io::Result<()> {
        // A checkpoint's lines are there when it is.
        self.metrics.sync()?;
        self.description.write(place, store)
    }
}

impl Report for TrainReport {
    fn text(&self) -> String {
        let mut text = format!(
            "{}: {} steps, {} {} in {} ({:.0} {})\n",
            self.output,
            self.steps,
            human::count(self.tokens),
            self.unit.name(),
            human::duration(Duration::from_secs_f64(self.seconds)),
            self.tokens_per_second,
            self.unit.rate()
        );
        if let Some(loss) = self.training_loss {
            text += &format!("training loss {loss:.4}");
        }
        if let Some(loss) = self.held_out_loss {
            // A run that was finished already has learned nothing more.
            text += if self.training_loss.is_some() { ", " } else { "" };
            text += &match self.held_out_loss_before {
                Some(before) => format!("held-out loss from {before:.4} to {loss:.4}"),
                None => format!("held-out loss {loss:.4}"),
            };
        }
        if let Some(perplexity) = self.held_out_perplexity {
            text += &match self.held_out_cross_entropy {
                Some(ce) if self.held_out_loss != Some(ce) => {
                    format!(" ({}), cross-entropy {ce:.4} (perplexity {perplexity:.2})", self.loss)
                }
                _ => format!(" (perplexity {perplexity:.2})"),
            };
        }
        if let (Some(accuracy), Some(scored)) = (self.held_out_accuracy, self.held_out_scored) {
            text += &format!(", accuracy {} of {}", human::percent(accuracy), human::count(scored as u64));
        }
        if let Some(peak) = self.peak_memory {
            text += &format!(
                "\npeak memory {}{} (weights {}, optimizer {})",
                human::bytes(peak),
                self.predicted_memory.map(|b| format!(", predicted {}", human::bytes(b))).unwrap_or_default(),
                human::bytes(self.weight_bytes),
                human::bytes(self.optimizer_bytes)
            );
        }
        text + "\n"
    }
}
