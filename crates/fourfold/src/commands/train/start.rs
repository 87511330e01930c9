//! What a run begins with: the model, new or existing, its adapters, and the files that describe it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_disk::write_file;
use fourfold_formats::quantization::describe_storage;
use fourfold_formats::regular;
use fourfold_formats::writer::{ModelFiles, SafetensorsWriter, WriteOptions, without_unread_layers};
use fourfold_formats::{ADAPTER_CONFIG, Checkpoint};
use fourfold_models::layers::{LORA_A, LoraSpec};
use fourfold_models::{ModelSpec, Role, WeightSpec, config_remarks, spec_from_config, training_remarks};
use fourfold_tensor::{Form, SourceError, WeightSink, WeightSource};
use fourfold_train::memory::Adapters;
use fourfold_train::store::{Initialization, ParameterStore, Tune};
use serde_json::Value;

use super::classification::LabelledTexts;
use super::encode::Template;
use super::settings::Settings;
use crate::context::Context;
use crate::limits;
use crate::model::{self, OpenModel, Opening};
use crate::tokenizer::TokenizerText;

/// The model to begin with, before any of its weights is read.
pub(super) struct Start {
    pub(super) spec: ModelSpec,
    pub(super) description: Description,
    weights: Begin,
}

/// Where the weights come from.
enum Begin {
    /// Nowhere: they are new.
    New(Initialization),
    /// A checkpoint; what it does not hold is new.
    Existing(Checkpoint, Initialization),
    /// Adapters are new, over a model that stays as it is.
    Adapters(Checkpoint, LoraSpec),
    /// Scales, norms and biases of a model that stays as it is but for them; they are few, and read.
    Tuned(Box<ParameterStore>),
}

impl Start {
    /// A new model from a configuration, or an existing one.
    pub(super) fn open(settings: &Settings, texts: Option<&LabelledTexts>, context: &Context) -> Result<Self> {
        match (&settings.model, &settings.model_config) {
            (Some(name), None) => {
                let opening = if texts.is_some() { Opening::WithoutHead } else { Opening::Whole };
                let open = model::open_for(name, opening, context)?;
                for remark in training_remarks(&open.checkpoint.config)? {
                    context.remark(&format!("{name}: {remark}"));
                }
                match (&settings.lora, settings.tune) {
                    (Some(lora), _) => Self::adapted(lora, settings.lora_dropout, name, open),
                    (None, Some(tune)) => Self::tuning(tune, name, open, settings),
                    (None, None) => {
                        if let Some(remark) = widened(&open) {
                            context.remark(&format!("{name}: {remark}"));
                        }
                        Self::existing(name, open, texts, settings)
                    }
                }
            }
            (None, Some(file)) => Self::new(file, texts, settings, context),
            _ => bail!("name either a --model to go on with or a --model-config to begin from"),
        }
    }

    fn existing(name: &str, open: OpenModel, texts: Option<&LabelledTexts>, settings: &Settings) -> Result<Self> {
        let (config, spec) = match texts {
            Some(texts) => texts.classifier(&open.checkpoint.config, name)?,
            None => (open.checkpoint.config.clone(), open.spec.clone()),
        };
        let description = Description {
            config: dense_config(&config),
            generation_config: open.checkpoint.generation_config.clone(),
            tokenizer: TokenizerText::of(&open.checkpoint)?,
            template: open.chat_template().map(Some),
            adapter: None,
            packed: None,
        };
        let initialization = Initialization { deviation: initializer_range(&config), seed: settings.seed };
        Ok(Self { spec, description, weights: Begin::Existing(open.checkpoint, initialization) })
    }

    fn new(file: &Path, texts: Option<&LabelledTexts>, settings: &Settings, context: &Context) -> Result<Self> {
        let text = regular::read_text(file, limits::MOST_BYTES).with_context(|| file.display().to_string())?;
        let config: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        let (config, spec) = match texts {
            Some(texts) => texts.classifier(&config, &file.display().to_string())?,
            None => {
                let spec = spec_from_config(&config).with_context(|| file.display().to_string())?;
                (config, spec)
            }
        };
        for remark in config_remarks(&config)?.into_iter().chain(training_remarks(&config)?) {
            context.remark(&format!("{}: {remark}", file.display()));
        }
        let Some(tokenizer) = &settings.tokenizer else { bail!("--model-config needs --tokenizer FILE as well") };
        let weights = Begin::New(Initialization { deviation: initializer_range(&config), seed: settings.seed });
        let tokenizer = TokenizerText::file(tokenizer, &config)?;
        let template = tokenizer.template().map(|own| own.map(|template| (template, true)));
        let description =
            Description { config, generation_config: None, tokenizer, template, adapter: None, packed: None };
        Ok(Self { spec, description, weights })
    }

    fn adapted(lora: &LoraSpec, dropout: f32, name: &str, open: OpenModel) -> Result<Self> {
        let targets = lora.weights(&open.spec);
        for target in &lora.targets {
            let part = format!(".{target}.");
            ensure!(
                targets.iter().any(|w| w.name.contains(&part)),
                "--lora-targets {target}: {name} has no such layer"
            );
        }
        let description = Description {
            config: open.checkpoint.config.clone(),
            generation_config: None,
            tokenizer: TokenizerText::of(&open.checkpoint)?,
            template: open.chat_template().map(Some),
            adapter: Some(adapter_config(lora, dropout, name, &targets)),
            packed: None,
        };
        Ok(Self { spec: open.spec, description, weights: Begin::Adapters(open.checkpoint, lora.clone()) })
    }

    /// A model of which scales, norms and biases alone are trained.
    fn tuning(tune: Tune, name: &str, open: OpenModel, settings: &Settings) -> Result<Self> {
        let description = Description {
            config: open.checkpoint.config.clone(),
            generation_config: None,
            tokenizer: TokenizerText::of(&open.checkpoint)?,
            template: open.chat_template().map(Some),
            adapter: None,
            packed: Some(ModelFiles::of(&open.checkpoint)),
        };
        let base: Arc<dyn WeightSource> = Arc::from(open.checkpoint.weights);
        let store = ParameterStore::tune(&open.spec, base, tune, &settings.recipe)?;
        ensure!(
            tune == Tune::Norms || store.entries().any(|(info, _)| info.shape.len() > 1),
            "--trainable scales: {name} has no quantized weights (`fourfold compress` makes them)"
        );
        Ok(Self { spec: open.spec, description, weights: Begin::Tuned(Box::new(store)) })
    }

    /// What is trained of a model that stays as it is otherwise.
    pub(super) fn tuned(&self) -> Option<&ParameterStore> {
        match &self.weights {
            Begin::Tuned(store) => Some(store),
            Begin::New(_) | Begin::Existing(..) | Begin::Adapters(..) => None,
        }
    }

    /// What is trained in place of the model's own weights.
    pub(super) fn adapters(&self) -> Option<Adapters<'_>> {
        match &self.weights {
            Begin::New(_) | Begin::Existing(..) | Begin::Tuned(_) => None,
            Begin::Adapters(checkpoint, lora) => {
                Some(Adapters { lora, base: matrix_bytes(&self.spec, &*checkpoint.weights) })
            }
        }
    }

    /// Reads or makes the weights.
    pub(super) fn load(self, settings: &Settings) -> Result<(ModelSpec, Description, ParameterStore)> {
        let Self { spec, mut description, weights } = self;
        let (seed, recipe) = (settings.seed, &settings.recipe);
        let store = match weights {
            Begin::New(with) => ParameterStore::initialize(&spec, with.deviation, seed, recipe),
            Begin::Existing(checkpoint, initialization) => {
                let weights = &*checkpoint.weights;
                // A language model that becomes a classifier gets a new head.
                let known = |weight: &WeightSpec| weights.info(&weight.name).is_some() || weight.role != Role::LmHead;
                let store = ParameterStore::load_or_initialize(&spec, weights, &known, initialization, recipe)?;
                description.config = with_pruned(description.config, &store);
                store
            }
            Begin::Adapters(checkpoint, lora) => {
                let base: Arc<dyn WeightSource> = Arc::from(checkpoint.weights);
                ParameterStore::adapt(&spec, base, &lora, seed, recipe)
            }
            Begin::Tuned(store) => *store,
        };
        Ok((spec, description, store))
    }
}

/// Bytes of a model's matrices as they are stored: what stays in memory of a model under adapters.
pub fn matrix_bytes(spec: &ModelSpec, source: &dyn WeightSource) -> u64 {
    let matrices = spec.weights().into_iter().filter(|w| w.shape.len() > 1);
    matrices.filter_map(|w| Some(source.info(&w.name)?.bytes)).sum()
}

/// What becomes of matrices that are stored in fewer bits than a float has, when all of a model is trained.
fn widened(open: &OpenModel) -> Option<String> {
    let weights = &open.checkpoint.weights;
    let is_packed = |storage: &str| !FLOATS.contains(&storage) && !storage.starts_with("sparse");
    let mut found = BTreeMap::<&str, usize>::new();
    for info in open.spec.weights().iter().filter_map(|w| weights.info(&w.name)).filter(|i| is_packed(&i.storage)) {
        *found.entry(&info.storage).or_default() += 1;
    }
    let found: Vec<String> = found.iter().map(|(storage, count)| format!("{count} in {storage}")).collect();
    let found = (!found.is_empty()).then(|| found.join(", "))?;
    Some(format!(
        "packed tensors ({found}) are widened, as the whole model is trained; with --lora-rank they stay as they are"
    ))
}

/// Types that a whole tensor is trained from as it is.
const FLOATS: [&str; 4] = ["F64", "F32", "F16", "BF16"];

/// PEFT's `adapter_config.json`.
fn adapter_config(lora: &LoraSpec, dropout: f32, base: &str, weights: &[WeightSpec]) -> Value {
    let parts = weights.iter().filter_map(|w| w.name.strip_suffix(LORA_A)?.rsplit('.').next());
    let parts: std::collections::BTreeSet<&str> = parts.collect();
    serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": dropout.to_string().parse::<f64>().unwrap_or_default(),
        "target_modules": parts,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": null,
        "inference_mode": true,
    })
}

/// Deviation of new matrices.
pub(super) fn initializer_range(config: &Value) -> f32 {
    config.get("initializer_range").and_then(Value::as_f64).unwrap_or(0.02) as f32
}

/// A compressed source's configuration describes its packing; what is trained from it is plain.
pub(super) fn dense_config(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        describe_storage(object, &[]);
        without_unread_layers(object);
    }
    config
}

/// `config` with the forms of the tensors that stay pruned.
pub(super) fn with_pruned(mut config: Value, store: &ParameterStore) -> Value {
    if let Some(members) = config.as_object_mut() {
        describe_storage(members, &store.pruned_forms());
    }
    config
}

/// What a model's directory holds besides its weights.
pub(super) struct Description {
    pub(super) config: Value,
    pub(super) generation_config: Option<Value>,
    pub(super) tokenizer: TokenizerText,
    /// For conversations; a new model may have none.
    pub(super) template: Template,
    /// An adapter's configuration, which then is all that is written: the rest is the model's.
    pub(super) adapter: Option<Value>,
    /// A packed model's files, which is written whole and packed as it was.
    pub(super) packed: Option<ModelFiles>,
}

impl Description {
    pub(super) fn tokenizer(&self, vocabulary: usize) -> Result<fourfold_infer::Tokenizer> {
        self.tokenizer.open(vocabulary)
    }

    pub(super) fn write(&self, place: &Path, store: &ParameterStore) -> io::Result<()> {
        let put = |name: &str, text: &str| Ok::<_, io::Error>(write_file(&place.join(name), text.as_bytes())?);
        if let Some(files) = &self.packed {
            return write_packed(place, files, store).map_err(io::Error::other);
        }
        if let Some(adapter) = &self.adapter {
            return put(ADAPTER_CONFIG, &serde_json::to_string_pretty(adapter)?);
        }
        put("config.json", &serde_json::to_string_pretty(&self.config)?)?;
        if let Some(generation) = &self.generation_config {
            put("generation_config.json", &serde_json::to_string_pretty(generation)?)?;
        }
        self.tokenizer.write(place)
    }
}

/// Writes the whole model into `place`: tuned tensors from `store`, all others as they came, in the order and the forms they had.
fn write_packed(place: &Path, files: &ModelFiles, store: &ParameterStore) -> Result<(), SourceError> {
    let at = |file: &Path| {
        let file = file.to_path_buf();
        move |error: io::Error| SourceError::File { file, reason: error.into() }
    };
    let whole = place.join("packed");
    let mut sink = SafetensorsWriter::create(&whole, files.clone(), WriteOptions::default())
        .map_err(|error| SourceError::File { file: whole.clone(), reason: error.into() })?;
    let names: Vec<&str> = store.base().into_iter().flat_map(WeightSource::tensors).map(|t| t.name.as_str()).collect();
    let forms: Result<Vec<_>, SourceError> =
        names.iter().map(|&name| Ok((name.to_owned(), Form::of(&store.load(name)?)))).collect();
    sink.begin(&forms?)?;
    names.iter().try_for_each(|name| sink.write(name, &store.load(name)?))?;
    Box::new(sink).finish()?;
    // The checksums of the whole are made when all is there.
    fs::remove_file(whole.join(fourfold_disk::CHECKSUMS)).map_err(at(&whole))?;
    for entry in fs::read_dir(&whole).map_err(at(&whole))? {
        let entry = entry.map_err(at(&whole))?;
        fs::rename(entry.path(), place.join(entry.file_name())).map_err(at(place))?;
    }
    fs::remove_dir(&whole).map_err(at(&whole))
}
