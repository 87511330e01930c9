//! `fourfold train` of a convolutional network, on images.

use std::path::Path;

use anyhow::{Context as _, Error, Result, bail, ensure};
use fourfold_compress::convnet::factorized;
use fourfold_formats::regular;
use fourfold_models::ConvNetSpec;
use fourfold_train::image_memory::image_memory;
use fourfold_train::images::{Augmentation, ImageBatches, Images, Subset, in_order};
use fourfold_train::memory::TrainMemory;
use fourfold_train::recipe::Recipe;
use fourfold_train::store::ParameterStore;
use fourfold_train::vision::{Classifier, initialize};
use serde_json::Value;

use super::fit;
use super::identity;
use super::job::{Job, Unit, prepare_output};
use super::settings::Settings;
use super::start::{Description, dense_config, with_pruned};
use crate::context::Context;
use crate::human;
use crate::images::{self, Split};
use crate::limits;
use crate::model;
use crate::tokenizer::TokenizerText;

/// A network to train, and its configuration.
pub struct Start {
    spec: ConvNetSpec,
    config: Value,
    /// Of a network that exists; a new one is not made before it is known to fit.
    store: Option<ParameterStore>,
}

/// The convolutional network that the settings name, if they name one.
pub fn start(settings: &Settings, context: &Context) -> Result<Option<Start>> {
    let file = match (&settings.model, &settings.model_config) {
        (None, Some(file)) => file.clone(),
        (Some(name), None) => Path::new(name).join("config.json"),
        _ => return Ok(None),
    };
    let Ok(text) = regular::read_text(&file, limits::MOST_BYTES) else { return Ok(None) };
    let Ok(config) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
    if !ConvNetSpec::is_described_by(&config) {
        return Ok(None);
    }
    let mut spec = ConvNetSpec::from_config(&config).with_context(|| file.display().to_string())?;
    let mut config = dense_config(&config);
    if let Some(words) = &settings.factorize {
        ensure!(settings.model.is_none(), "--factorize is for a new model; `compress` decomposes one that exists");
        let recipe: fourfold_compress::convnet::Recipe = words.parse().map_err(Error::msg)?;
        spec = factorized(&spec, &recipe);
        config = spec.describe(&config);
    }
    let store = match &settings.model {
        Some(name) => {
            let Some(open) = model::open_network(name, context)? else { bail!("{name}: no network that reads images") };
            let store = ParameterStore::load(&spec.weights(), &*open.checkpoint.weights, &settings.recipe)?;
            config = with_pruned(config, &store);
            Some(store)
        }
        None => None,
    };
    Ok(Some(Start { spec, config, store }))
}

pub fn run(start: Start, settings: &Settings, context: &Context) -> Result<()> {
    let Start { spec, config, store } = start;
    let [folder] = settings.data.as_slice() else { bail!("--data: one directory of images is expected") };
    let all = images::open(folder, Split::Train, &spec)?;
    // `best/` is chosen by images that are neither learned nor tested on, unless the user names some.
    let (learned, held_out): (Subset, Vec<_>) = match settings.eval_data.as_slice() {
        [] => {
            let (learned, held_out) = Subset::split(&all, settings.held_out);
            (learned, in_order(&held_out, settings.batch_size)?)
        }
        [folder] => {
            let measured = images::open(folder, Split::Test, &spec)?;
            (Subset::first(&all, all.count()), in_order(&measured, settings.batch_size)?)
        }
        _ => bail!("--eval-data: one directory of images is expected"),
    };
    let augmentation = Augmentation { flip: settings.flip, shift: settings.shift };
    let mut batches = ImageBatches::new(&learned, settings.batch_size, settings.seed, augmentation)?;
    let per_epoch = batches.per_epoch() as f64 / settings.gradient_accumulation as f64;
    let steps = settings.steps.unwrap_or((settings.epochs * per_epoch).ceil() as u64).max(1);
    ensure!(settings.shift < spec.image[1].min(spec.image[2]), "--shift {}: more than an image", settings.shift);
    let description = Description {
        config,
        generation_config: None,
        tokenizer: TokenizerText::none(),
        template: Ok(None),
        adapter: None,
        packed: None,
    };
    let parameters = spec.parameters();
    // What a mask leaves is less than the shape says; the images that are measured on stay in memory.
    let waiting = held_out.iter().map(|batch| batch.pixels.len() as u64).sum::<u64>();
    let predict = |recipe: &Recipe, batch| {
        let memory = image_memory(&spec, recipe, batch, settings.gradient_accumulation);
        TrainMemory { data: memory.data + waiting, ..memory }
    };
    let mut predicted = predict(&settings.recipe, settings.batch_size as u64);
    if let Some((weights, optimizer)) = store.as_ref().map(ParameterStore::byte_len) {
        (predicted.weights, predicted.optimizer) = (weights as u64, optimizer as u64);
    }
    context.remark(&format!("predicted peak memory {}", human::bytes(predicted.total())));
    if settings.memory_check {
        fit::check(&predicted, settings, &predict)?;
    }
    let identity = identity::of(settings, context)?;
    let _held = prepare_output(settings)?;
    let store = store.unwrap_or_else(|| initialize(&spec, settings.seed, &settings.recipe));
    let job = Job {
        settings,
        context,
        description: &description,
        parameters,
        objective: None,
        identity,
        steps,
        is_text: false,
        unit: Unit::Images,
        predicted: Some(predicted.total()),
    };
    job.run(Classifier::new(spec), store, &mut batches, &held_out)
}
