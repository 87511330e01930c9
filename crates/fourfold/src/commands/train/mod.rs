//! `fourfold train`: trains a model from a configuration, or goes on with one that exists, in a fraction of the usual memory.

pub mod classification;
mod data;
mod encode;
mod fit;
mod identity;
mod job;
mod metrics;
mod pieces;
mod settings;
mod show;
mod start;
mod teacher;
mod tensorboard;
mod vision;

use std::fs;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use fourfold_infer::{ChatTemplate, Tokenizer};
use fourfold_kernels::release_freed_memory;
use fourfold_train::batch::Extent;
use fourfold_train::data::Record;
use fourfold_train::language::LanguageModel;
use fourfold_train::memory::{Tuned, Work, train_memory};
use fourfold_train::recipe::Recipe;

pub(super) use fit::largest;
pub use settings::TrainArgs;
pub use start::matrix_bytes;

use self::classification::LabelledTexts;
use self::data::Data;
use self::job::{Job, Unit, prepare_output};
use self::settings::{Settings, Task};
use self::start::Start;
use crate::args::Command;
use crate::context::Context;
use crate::human;
use crate::memory::resident_now;
use crate::output::usage;
use crate::tokenizer::remark_tokenizer;

/// Whether the options of a training command, with its TOML file, are settings of a run.
///
/// # Errors
/// They are not; it is no training command.
pub fn try_settings(command: &Command) -> Result<()> {
    match command {
        Command::Train(args) => Settings::resolve(args).map(|_| ()),
        _ => bail!("no training command"),
    }
}

/// Reads the metrics of a run that goes on from its second step.
///
/// # Errors
/// They cannot be read.
pub fn try_metrics(output: &Path) -> Result<()> {
    let _ = metrics::Metrics::first_held_out(output);
    metrics::Metrics::open(output, 2).map(|_| ())
}

/// Makes a row into tokens, by ChatML where it is a conversation.
///
/// # Errors
/// As in a run.
pub fn try_row(row: &Record, tokenizer: &Tokenizer) -> Result<()> {
    let template = Ok(Some((ChatTemplate::chatml()?, false)));
    encode::RowEncoder::new(tokenizer, &template).documents(row).map(|_| ())
}

/// Batches that are looked at for the longest. Those of a longer run are drawn from the same data.
const MOST_BATCHES: u64 = 1 << 16;

pub fn run(args: &TrainArgs, context: &Context) -> Result<()> {
    let mut settings = Settings::resolve(args).map_err(usage)?;
    settings.memory_check &= !context.global.no_memory_check;
    if !settings.show_data {
        identity::check_output(&settings)?;
    }
    if let Some(start) = vision::start(&settings, context)? {
        ensure!(
            settings.teacher.is_none() && settings.tune.is_none(),
            "--teacher, --trainable: of language models alone"
        );
        return vision::run(start, &settings, context);
    }
    let texts = match settings.task {
        Task::Text => None,
        Task::Classification => Some(LabelledTexts::read(&settings)?),
    };
    let start = Start::open(&settings, texts.as_ref(), context)?;
    if settings.show_data {
        ensure!(
            texts.is_none(),
            "--show-data: of texts and conversations; a row with a class is its text and its class"
        );
        let tokenizer = start.description.tokenizer(start.spec.vocab_size)?;
        let length = settings.length(start.spec.max_positions)?;
        return show::show(&settings, &tokenizer, &start.description.template, length, context);
    }
    let is_new = !settings.output.exists();
    let result = match prepare_output(&settings) {
        Ok(_held) => run_on(start, texts, &settings, context),
        Err(error) => Err(error),
    };
    if result.is_err() && is_new {
        // Nothing was written: a directory with something in it is not removed.
        let _ = fs::remove_dir(&settings.output);
    }
    result
}

/// Data first: then the longest batch is known, and so is whether the run fits, before a weight is read.
fn run_on(start: Start, texts: Option<LabelledTexts>, settings: &Settings, context: &Context) -> Result<()> {
    let identity = identity::of(settings, context)?;
    let spec = &start.spec;
    let tokenizer = start.description.tokenizer(spec.vocab_size)?;
    remark_tokenizer(&tokenizer, spec.vocab_size, context);
    let length = settings.length(spec.max_positions)?;
    let Data { tokens_per_epoch, per_epoch, bytes, mut batches, held_out } = match texts {
        Some(texts) => texts.encode(settings, &tokenizer, &start.description, spec)?,
        None => data::batches(settings, &tokenizer, &start.description.template, length, context)?,
    };
    let (teacher, of_teacher) = match &settings.teacher {
        Some(teacher) => teacher::open(teacher, spec, &tokenizer, context).map(|(t, text)| (Some(t), Some(text)))?,
        None => (None, None),
    };
    drop(tokenizer);
    release_freed_memory();
    // The data is part of it, and what a teacher or a packed model that is tuned has read would be, which is counted by itself.
    let resident = if teacher.is_none() && start.tuned().is_none() { resident_now() } else { None };
    let accumulation = settings.gradient_accumulation;
    let steps =
        settings.steps.unwrap_or((settings.epochs * per_epoch as f64 / accumulation as f64).ceil() as u64).max(1);
    let largest = (0..(steps * accumulation).min(MOST_BATCHES))
        .map(|number| batches.extent(number, settings.recipe.block_tokens))
        .fold(Extent::default(), Extent::max);
    // What is trained stays the same; recipe and batches may be others.
    let numbers = start.tuned().map(|store| store.tuned_numbers(spec)).unwrap_or_default();
    let tuned = start.tuned().map(|store| Tuned { numbers: &numbers, stored: store.base_bytes() });
    let predict = |recipe: &Recipe, work: Work| {
        let work = work.with_adapters(start.adapters()).with_tuned(tuned);
        let mut memory = train_memory(spec, recipe, &work);
        match resident {
            Some(resident) => memory = memory.started_at(resident),
            None => memory.data += bytes,
        }
        match &teacher {
            None => memory,
            Some(teacher) => memory.taught(teacher.spec(), recipe, work.largest.tokens as u64, teacher.stored_bytes()),
        }
    };
    let predicted = predict(&settings.recipe, Work { largest, accumulation, adapters: None, tuned: None });
    context.remark(&format!("predicted peak memory {}", human::bytes(predicted.total())));
    context.remark(&format!(
        "{} tokens a pass, steps of up to {} tokens",
        human::count(tokens_per_epoch as u64),
        largest.tokens as u64 * accumulation
    ));
    if settings.memory_check {
        let of_batch =
            |recipe: &Recipe, batch| predict(recipe, Work::sequences(batch, length as u64, accumulation, recipe));
        fit::check(&predicted, settings, &of_batch)?;
    }
    let (spec, description, store) = start.load(settings)?;
    let objective = teacher::objective(settings, &store, of_teacher)?;
    let job = Job {
        settings,
        context,
        description: &description,
        parameters: store.trained_elements(),
        objective,
        identity,
        steps,
        is_text: settings.task == Task::Text,
        unit: Unit::Tokens,
        predicted: Some(predicted.total()),
    };
    let network = LanguageModel::new(spec).balanced(settings.router_bias_update_rate).taught(teacher);
    job.run(network, store, &mut *batches, &*held_out)
}
