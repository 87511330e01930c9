//! `fourfold train`: trains a model from a configuration, or goes on with one that exists, in a fraction of the usual memory.

mod classification;
mod data;
mod metrics;
mod settings;
mod tensorboard;
mod vision;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_formats::{ADAPTER_CONFIG, TokenizerSource};
use fourfold_infer::ChatTemplate;
use fourfold_kernels::backward::Backward;
use fourfold_kernels::cpu::keep_freed_memory;
use fourfold_kernels::{Activations, Cpu, CpuOptions};
use fourfold_models::layers::{LORA_A, LoraSpec};
use fourfold_models::{ModelSpec, WeightSpec, spec_from_config};
use fourfold_tensor::WeightSource;
use fourfold_train::checkpoint::{self, State};
use fourfold_train::language::LanguageModel;
use fourfold_train::memory::train_memory;
use fourfold_train::network::{BatchSource, Network, Score};
use fourfold_train::run::{Events, Options, RunError, evaluate, latest_checkpoint, run as run_steps};
use fourfold_train::store::{Initialization, ParameterStore};
use fourfold_train::trainer::{StepReport, Trainer};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;

pub use settings::TrainArgs;

use self::classification::LabelledTexts;
use self::data::Data;
use self::metrics::Metrics;
use self::settings::{Settings, Task};
use crate::context::Context;
use crate::model::{self, OpenModel};
use crate::output::Report;
use crate::{human, interrupt, memory};

#[derive(Serialize)]
struct TrainReport {
    output: String,
    preset: &'static str,
    parameters: u64,
    steps: u64,
    tokens: u64,
    training_loss: Option<f64>,
    held_out_loss: Option<f64>,
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
        Some(texts) => texts.encode(&settings, &tokenizer, &description.config, context_length)?,
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
    job.run(LanguageModel::new(spec), store, &mut *batches, &held_out)
}

/// A run of any kind of network.
struct Job<'a> {
    settings: &'a Settings,
    context: &'a Context,
    description: &'a Description,
    /// Elements that are trained.
    parameters: u64,
    steps: u64,
    /// Whether the loss is one of tokens, whose exponential is a perplexity.
    is_text: bool,
    /// Bytes of the peak, where they can be told.
    predicted: Option<u64>,
}

impl Job<'_> {
    fn run<N: Network>(
        self,
        network: N,
        mut store: ParameterStore,
        batches: &mut dyn BatchSource<N::Batch>,
        held_out: &[N::Batch],
    ) -> Result<()> {
        let Self { settings, context, description, parameters, steps, is_text, predicted } = self;
        let hyper = settings.hyperparameters(steps);

        let mut state = State::begin(&settings.recipe, settings.seed);
        match latest_checkpoint(&settings.output) {
            Some(place) if settings.resume => {
                state = checkpoint::restore(&place, &mut store)?;
                ensure!(
                    state.recipe == settings.recipe.label() && state.seed == settings.seed,
                    "{}: made with preset {}, --seed {}; resume with these",
                    place.display(),
                    state.recipe,
                    state.seed
                );
                context.remark(&format!("resuming from {}", place.display()));
            }
            Some(place) => bail!("{}: exists; --resume goes on from it, another --output begins anew", place.display()),
            None => {}
        }
        fs::create_dir_all(&settings.output).with_context(|| settings.output.display().to_string())?;

        let (weight_bytes, optimizer_bytes) = store.byte_len();
        context.remark(&format!(
            "{} parameters, {}: weights {}, optimizer {}; {steps} steps",
            human::count(parameters),
            settings.recipe.label(),
            human::bytes(weight_bytes as u64),
            human::bytes(optimizer_bytes as u64),
        ));
        let options = CpuOptions {
            threads: context.threads,
            isa: context.global.isa.map(Into::into),
            activations: match settings.recipe.activations() {
                Activations::F32 => Activations::F32,
                Activations::Fast => context.global.activations.into(),
            },
        };
        keep_freed_memory();
        let backend: Arc<dyn Backward> = Arc::new(Cpu::new(options)?);
        let mut trainer = Trainer::new(network, store, backend, settings.recipe, hyper, state.step);
        let bar = context.progress.bar("training", steps, "steps");
        bar.set_position(state.step);
        let mut watcher = Watcher {
            bar,
            metrics: Metrics::open(&settings.output, state.step)?,
            description,
            smooth: None,
            held_out: None,
            seconds: 0.0,
            tokens: 0,
            failure: None,
        };
        let _cooperation = interrupt::cooperate();
        let options = Options {
            steps,
            accumulation: settings.gradient_accumulation,
            eval_every: settings.eval_every.unwrap_or((steps / 10).max(1)),
            save_every: settings.save_every.unwrap_or((steps / 10).max(1)),
            keep: settings.keep,
            output: settings.output.clone(),
        };
        let begun = Instant::now();
        let end = run_steps(&mut trainer, batches, held_out, state, &options, &mut watcher);
        watcher.bar.finish_and_clear();
        let end = end.map_err(|error| explain(error, settings))?;
        if let Some(failure) = watcher.failure {
            return Err(failure);
        }
        let score = match watcher.held_out {
            None if !held_out.is_empty() && end.step == steps => Some(evaluate(&trainer, held_out)?),
            found => found,
        };
        context.print(&TrainReport {
            output: settings.output.display().to_string(),
            preset: settings.recipe.name,
            parameters,
            steps: end.step,
            tokens: end.tokens,
            training_loss: watcher.smooth,
            held_out_loss: score.map(|s| s.mean_loss()),
            held_out_perplexity: score.filter(|_| is_text).map(|s| s.mean_loss().exp()),
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
            complete: end.step == steps,
        })
    }
}

/// A finished run asked to go on, a diverging one: what to do about it.
fn explain(error: RunError, settings: &Settings) -> anyhow::Error {
    let diverged = matches!(error, RunError::Diverged { .. });
    let error = anyhow::Error::from(error);
    if diverged { error.context(format!("try a lower --learning-rate than {}", settings.learning_rate)) } else { error }
}

/// The model to begin with: a new one from a configuration, or an existing one.
fn start(
    settings: &Settings,
    texts: Option<&LabelledTexts>,
    context: &Context,
) -> Result<(ModelSpec, Description, ParameterStore)> {
    match (&settings.model, &settings.model_config) {
        (Some(name), None) => {
            let open = model::open(name, context)?;
            let (config, spec) = match texts {
                Some(texts) => texts.classifier(&open.checkpoint.config, name)?,
                None => (open.checkpoint.config.clone(), open.spec.clone()),
            };
            if let Some(lora) = &settings.lora {
                return adapters(lora, name, open, settings);
            }
            let deviation = initializer_range(&config);
            let weights = &*open.checkpoint.weights;
            // A language model that becomes a classifier gets a new head.
            let known = |weight: &WeightSpec| weights.info(&weight.name).is_some() || spec.classes.is_none();
            let store = ParameterStore::load_or_initialize(
                &spec,
                weights,
                &known,
                Initialization { deviation, seed: settings.seed },
                &settings.recipe,
            )?;
            let description = Description {
                config: dense_config(&config),
                generation_config: open.checkpoint.generation_config.clone(),
                tokenizer: TokenizerText::of(&open, name)?,
                template: Some(open.chat_template()?.0),
                adapter: None,
            };
            Ok((spec, description, store))
        }
        (None, Some(file)) => {
            let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let config: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
            let (config, spec) = match texts {
                Some(texts) => texts.classifier(&config, &file.display().to_string())?,
                None => {
                    let spec = spec_from_config(&config).with_context(|| file.display().to_string())?;
                    (config, spec)
                }
            };
            let Some(tokenizer) = &settings.tokenizer else { bail!("--model-config needs --tokenizer FILE as well") };
            let store = ParameterStore::initialize(&spec, initializer_range(&config), settings.seed, &settings.recipe);
            let tokenizer = TokenizerText::File(tokenizer.clone());
            let description = Description { config, generation_config: None, tokenizer, template: None, adapter: None };
            Ok((spec, description, store))
        }
        _ => bail!("name either a --model to go on with or a --model-config to begin from"),
    }
}

/// Adapters over a model that stays as it is.
fn adapters(
    lora: &LoraSpec,
    name: &str,
    open: OpenModel,
    settings: &Settings,
) -> Result<(ModelSpec, Description, ParameterStore)> {
    let targets = lora.weights(&open.spec);
    for target in &lora.targets {
        let part = format!(".{target}.");
        ensure!(targets.iter().any(|w| w.name.contains(&part)), "--lora-targets {target}: {name} has no such layer");
    }
    let description = Description {
        config: open.checkpoint.config.clone(),
        generation_config: None,
        tokenizer: TokenizerText::of(&open, name)?,
        template: Some(open.chat_template()?.0),
        adapter: Some(adapter_config(lora, name, &targets)),
    };
    let base: Arc<dyn WeightSource> = open.checkpoint.weights.into();
    let store = ParameterStore::adapt(&open.spec, base, lora, settings.seed, &settings.recipe);
    Ok((open.spec, description, store))
}

/// PEFT's `adapter_config.json`.
fn adapter_config(lora: &LoraSpec, base: &str, weights: &[WeightSpec]) -> Value {
    let parts = weights.iter().filter_map(|w| w.name.strip_suffix(LORA_A)?.rsplit('.').next());
    let parts: std::collections::BTreeSet<&str> = parts.collect();
    serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
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
fn initializer_range(config: &Value) -> f32 {
    config.get("initializer_range").and_then(Value::as_f64).unwrap_or(0.02) as f32
}

/// A compressed source's configuration describes its packing; what is trained from it is plain.
fn dense_config(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        object.remove("quantization_config");
    }
    config
}

enum TokenizerText {
    File(PathBuf),
    Text(String),
    /// A network that reads no text.
    None,
}

impl TokenizerText {
    fn of(open: &OpenModel, name: &str) -> Result<Self> {
        Ok(match &open.checkpoint.tokenizer {
            TokenizerSource::Json(path) => Self::File(path.clone()),
            TokenizerSource::Embedded(text) => Self::Text(text.clone()),
            TokenizerSource::None => bail!("{name}: there is no tokenizer"),
        })
    }
}

/// What a model's directory holds besides its weights.
struct Description {
    config: Value,
    generation_config: Option<Value>,
    tokenizer: TokenizerText,
    /// For conversations; a new model has none.
    template: Option<ChatTemplate>,
    /// An adapter's configuration, which then is all that is written: the rest is the model's.
    adapter: Option<Value>,
}

impl Description {
    fn tokenizer(&self, vocabulary: usize) -> Result<fourfold_infer::Tokenizer> {
        let tokenizer = match &self.tokenizer {
            TokenizerText::File(path) => fourfold_infer::Tokenizer::from_file(path)?,
            TokenizerText::Text(text) => fourfold_infer::Tokenizer::from_bytes(text.as_bytes())?,
            TokenizerText::None => bail!("there is no tokenizer"),
        };
        tokenizer.check_fits(vocabulary)?;
        let bos = tokenizer.prefix_token()?;
        Ok(tokenizer.with_bos(bos))
    }

    fn write(&self, place: &Path) -> io::Result<()> {
        if let Some(adapter) = &self.adapter {
            return fs::write(place.join(ADAPTER_CONFIG), serde_json::to_string_pretty(adapter)?);
        }
        fs::write(place.join("config.json"), serde_json::to_string_pretty(&self.config)?)?;
        if let Some(generation) = &self.generation_config {
            fs::write(place.join("generation_config.json"), serde_json::to_string_pretty(generation)?)?;
        }
        match &self.tokenizer {
            TokenizerText::None => {}
            TokenizerText::Text(text) => fs::write(place.join("tokenizer.json"), text)?,
            TokenizerText::File(path) => {
                fs::copy(path, place.join("tokenizer.json"))?;
                for other in ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"] {
                    let from = path.with_file_name(other);
                    if from.is_file() {
                        fs::copy(from, place.join(other))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Shows and records what happens.
struct Watcher<'a> {
    bar: ProgressBar,
    metrics: Metrics,
    description: &'a Description,
    /// The training loss, smoothed over about twenty steps.
    smooth: Option<f64>,
    held_out: Option<Score>,
    seconds: f64,
    tokens: u64,
    /// A metrics file that could not be written.
    failure: Option<anyhow::Error>,
}

impl Watcher<'_> {
    fn record(&mut self, step: u64, values: Value) {
        if let Err(error) = self.metrics.write(step, values) {
            self.failure.get_or_insert(error);
        }
    }
}

impl Events for Watcher<'_> {
    fn step(&mut self, report: &StepReport, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.seconds += seconds;
        self.tokens += report.units as u64;
        if report.loss.is_finite() {
            self.smooth = Some(self.smooth.map_or(report.loss, |s| 0.95 * s + 0.05 * report.loss));
        }
        let peak = memory::peak_resident().unwrap_or(0);
        self.bar.set_position(report.step);
        self.bar.set_message(format!(
            "loss {:.4}{}, {:.0} tok/s, {}",
            self.smooth.unwrap_or(report.loss),
            self.held_out.map(|h| format!(", held out {:.4}", h.mean_loss())).unwrap_or_default(),
            self.tokens as f64 / self.seconds.max(1e-9),
            human::bytes(peak)
        ));
        self.record(
            report.step,
            serde_json::json!({
                "train/loss": report.loss,
                "train/learning_rate": report.lr,
                "train/grad_norm": report.gradient_norm,
                "train/skipped": u8::from(report.skipped),
                "train/loss_scale": report.loss_scale.unwrap_or(1.0),
                "train/tokens_per_second": report.units as f64 / seconds.max(1e-9),
                "memory/peak_bytes": peak,
            }),
        );
    }

    fn evaluated(&mut self, step: u64, score: &Score, best: bool) {
        let loss = score.mean_loss();
        self.held_out = Some(*score);
        let (perplexity, accuracy) = (loss.exp(), score.accuracy());
        let best = u8::from(best);
        self.record(
            step,
            serde_json::json!({
                "eval/loss": loss, "eval/perplexity": perplexity, "eval/accuracy": accuracy, "eval/best": best
            }),
        );
    }

    fn saved(&mut self, _: &Path) {}

    fn stop(&mut self) -> bool {
        interrupt::requested() || self.failure.is_some()
    }

    fn describe(&self, place: &Path) -> io::Result<()> {
        self.description.write(place)
    }
}

impl Report for TrainReport {
    fn text(&self) -> String {
        let mut text = format!(
            "{}: {} steps, {} tokens in {} ({:.0} tok/s)\n",
            self.output,
            self.steps,
            human::count(self.tokens),
            human::duration(Duration::from_secs_f64(self.seconds)),
            self.tokens_per_second
        );
        if let Some(loss) = self.training_loss {
            text += &format!("training loss {loss:.4}");
        }
        if let Some(loss) = self.held_out_loss {
            text += &format!(", held-out loss {loss:.4}");
        }
        if let Some(perplexity) = self.held_out_perplexity {
            text += &format!(" (perplexity {perplexity:.2})");
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
        if !self.complete {
            text += "\nstopped early; --resume goes on from the last checkpoint";
        }
        text + "\n"
    }
}
