//! `fourfold train`: trains a model from a configuration, or goes on with one that exists, in a fraction of the usual memory.

pub mod classification;
mod data;
mod finite;
mod job;
mod metrics;
mod settings;
mod start;
mod teacher;
mod tensorboard;
mod vision;

use anyhow::{Result, ensure};
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
    let (spec, description, store) = start(&settings, texts.as_ref(), context)?;
    let tokenizer = description.tokenizer(spec.vocab_size)?;
    let context_length = settings.context.min(spec.max_positions);
    let Data { tokens_per_epoch, per_epoch, mut batches, held_out } = match texts {
        Some(texts) => texts.encode(&settings, &tokenizer, &description, &spec)?,
        None => data::batches(&settings, &tokenizer, description.template.as_ref(), context_length)?,
    };
    let (teacher, of_teacher) = match &settings.teacher {
        Some(teacher) => teacher::open(teacher, &spec, &tokenizer, context).map(|(t, text)| (Some(t), Some(text)))?,
        None => (None, None),
    };
    let objective = teacher::objective(&settings, &store, of_teacher)?;
    drop(tokenizer);
    let steps = settings
        .steps
        .unwrap_or((settings.epochs * per_epoch as f64 / settings.gradient_accumulation as f64).ceil() as u64)
        .max(1);
    let mut predicted = train_memory(
        &spec,
        &settings.recipe,
        settings.batch_size as u64,
        context_length as u64,
        settings.gradient_accumulation,
    );
    if let (Some(_), Some(base)) = (settings.tune, store.base()) {
        let stored = base.tensors().iter().map(|tensor| tensor.bytes).sum();
        predicted = predicted.tuned(&spec, stored, store.trained_elements());
    }
    if let Some(teacher) = &teacher {
        let tokens = (settings.batch_size * context_length) as u64;
        predicted = predicted.taught(teacher.spec(), &settings.recipe, tokens, teacher.stored_bytes());
    }
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
        parameters: store.trained_elements(),
        objective,
        steps,
        is_text: settings.task == Task::Text,
        predicted: Some(predicted.total()),
    };
    let network = LanguageModel::new(spec).balanced(settings.router_bias_update_rate).taught(teacher);
    job.run(network, store, &mut *batches, &held_out)
}
