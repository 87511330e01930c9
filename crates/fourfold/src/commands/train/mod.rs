//! `fourfold train`: trains a model from a configuration, or goes on with one that exists, in a fraction of the usual memory.

pub mod classification;
mod data;
mod finite;
mod job;
mod metrics;
mod settings;
mod start;
mod tensorboard;
mod vision;

use anyhow::Result;
use fourfold_train::language::LanguageModel;
use fourfold_train::memory::train_memory;

pub use settings::TrainArgs;

use self::classification::LabelledTexts;
use self::data::Data;
use self::job::Job;
use self::settings::{Settings, Task};
use self::start::start;
use crate::context::Context;
use crate::human;

pub fn run(args: &TrainArgs, context: &Context) -> Result<()> {
    let settings = Settings::resolve(args)?;
    if let Some(start) = vision::start(&settings, context)? {
        return vision::run(start, &settings, context);
    }
    let texts = match settings.task {
        Task::Text => None,
        Task::Classification => Some(LabelledTexts::read(&settings)?),
    };
    let (spec, description, store) = start(&settings, texts.as_ref(), context)?;
    let tokenizer = description.tokenizer(spec.vocab_size)?;
    let context_length = settings.context.min(spec.max_positions);
    let Data { tokens_per_epoch, per_epoch, mut batches, held_out } = match texts {
        Some(texts) => texts.encode(&settings, &tokenizer, &description, &spec)?,
        None => data::batches(&settings, &tokenizer, description.template.as_ref(), context_length)?,
    };
    drop(tokenizer);
    let steps = settings
        .steps
        .unwrap_or((settings.epochs * per_epoch as f64 / settings.gradient_accumulation as f64).ceil() as u64)
        .max(1);
    let predicted = train_memory(
        &spec,
        &settings.recipe,
        settings.batch_size as u64,
        context_length as u64,
        settings.gradient_accumulation,
    );
    context.remark(&format!("predicted peak memory {}", human::bytes(predicted.total())));
    context.remark(&format!(
        "{} tokens a pass, steps of up to {} tokens",
        human::count(tokens_per_epoch as u64),
        settings.batch_size * context_length * settings.gradient_accumulation as usize
    ));
    let job = Job {
        settings: &settings,
        context,
        description: &description,
        parameters: spec.parameters(),
        steps,
        is_text: settings.task == Task::Text,
        predicted: Some(predicted.total()),
    };
    job.run(LanguageModel::new(spec).balanced(settings.router_bias_update_rate), store, &mut *batches, &held_out)
}
