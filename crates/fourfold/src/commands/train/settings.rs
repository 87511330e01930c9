//! The settings of a run: a TOML file, and flags that go before it.

use std::path::PathBuf;

use anyhow::{Context as _, Error, Result, bail, ensure};
use clap::Args;
use fourfold_formats::regular;
use fourfold_kernels::backward::SoftTargets;
use fourfold_models::layers::LoraSpec;
use fourfold_tensor::DType;
use fourfold_train::balance::DEFAULT_RATE;
use fourfold_train::data::Columns;
use fourfold_train::labelled::LabelColumns;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::optim::sgd::Sgd;
use fourfold_train::optim::{Optimizer, OptimizerKind};
use fourfold_train::recipe::{MomentPrecision, Recipe, Storage};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::Tune;
use fourfold_train::trainer::Hyperparameters;
use serde::Deserialize;

use crate::data_files::DataFormat;
use crate::limits;

/// Flags of `fourfold train`; each may stand in the TOML file too, with `_` for `-`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainArgs {
    /// Read settings from this TOML file; flags go before it.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Go on with this model: a directory, a .gguf file, or a name on the hub.
    #[arg(long, value_name = "MODEL", conflicts_with = "model_config")]
    model: Option<String>,
    /// Begin a new model of this architecture (a Hugging Face config.json).
    #[arg(long, value_name = "FILE")]
    model_config: Option<PathBuf>,
    /// The new model's tokenizer.json.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// What is learned: `text`, or `classification` of texts with a label each [default: text].
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Text to learn: plain files, rows in .jsonl, .ndjson, .json, .csv, .tsv, .parquet (columns `text`; `prompt` and `completion`;
    /// `messages` or `conversations`; `instruction`, `input` and `output`), packed as .gz or .zst or not, or directories of them.
    /// For classification: rows with `text`, `label` and perhaps `text_pair`, or .tsv with text, tab, label.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Text to measure on [default: a part of --data, kept from learning].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    eval_data: Vec<PathBuf>,
    /// What the files of --data are, whatever their names: `text`, `jsonl`, `json`, `csv`, `tsv`, `parquet` [default: as their names
    /// end; others are text].
    #[arg(long, value_name = "NAME", value_parser = ["text", "jsonl", "json", "csv", "tsv", "parquet"])]
    data_format: Option<String>,
    /// The column of the text, where it is not named `text`.
    #[arg(long, value_name = "COLUMN")]
    text_column: Option<String>,
    /// The column that is given, where it is not named `prompt`.
    #[arg(long, value_name = "COLUMN")]
    prompt_column: Option<String>,
    /// The column that is learned, where it is not named `completion`.
    #[arg(long, value_name = "COLUMN")]
    completion_column: Option<String>,
    /// The column of a conversation, where it is not named `messages` or `conversations`.
    #[arg(long, value_name = "COLUMN")]
    messages_column: Option<String>,
    /// The column of what is asked, where it is not named `instruction`; goes through the model's chat template.
    #[arg(long, value_name = "COLUMN")]
    instruction_column: Option<String>,
    /// The column of what it is asked about, where it is not named `input`.
    #[arg(long, value_name = "COLUMN")]
    input_column: Option<String>,
    /// The column of the answer to an instruction, where it is not named `output`.
    #[arg(long, value_name = "COLUMN")]
    output_column: Option<String>,
    /// The column of a system message, where it is not named `system`.
    #[arg(long, value_name = "COLUMN")]
    system_column: Option<String>,
    /// The column of descriptions of tools, where it is not named `tools`.
    #[arg(long, value_name = "COLUMN")]
    tools_column: Option<String>,
    /// The column of the class, where it is not named `label` (classification).
    #[arg(long, value_name = "COLUMN")]
    label_column: Option<String>,
    /// The column of a pair's second text, where it is not named `text_pair` (classification).
    #[arg(long, value_name = "COLUMN")]
    text_pair_column: Option<String>,
    /// Show the first example as tokens, with what of it is learned, and end: nothing is trained.
    #[arg(long)]
    show_data: bool,
    /// Part of --data kept for measuring [default: 0.05].
    #[arg(long, value_name = "SHARE", value_parser = limits::HELD_OUT)]
    held_out: Option<f64>,
    /// Mirror every second image, left to right (networks that read images).
    #[arg(long)]
    flip: bool,
    /// Move images by up to so many pixels [default: 0].
    #[arg(long, value_name = "PIXELS", value_parser = limits::SHIFT)]
    shift: Option<usize>,
    /// Train the layers of a new convolutional network as chains of smaller ones from the beginning: tucker:AMOUNT or cp:AMOUNT, and
    /// svd:AMOUNT, as `compress --method` has them.
    #[arg(long, value_name = "RECIPE", requires = "model_config")]
    factorize: Option<String>,
    /// Train low-rank adapters of this rank (LoRA) and leave the model as it is; a compressed one stays compressed (QLoRA).
    /// What is written is in PEFT's format.
    #[arg(long, value_name = "RANK", value_parser = limits::RANK)]
    lora_rank: Option<usize>,
    /// The adapters count alpha / rank [default: twice the rank].
    #[arg(long, value_name = "ALPHA", requires = "lora_rank", value_parser = limits::ALPHA)]
    lora_alpha: Option<f32>,
    /// Layers that get an adapter: names such as q_proj,v_proj, or all-linear [default: all-linear].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora_rank")]
    lora_targets: Vec<String>,
    /// Share of the elements of the adapters' inputs that are dropped in training [default: 0].
    #[arg(long, value_name = "SHARE", requires = "lora_rank", value_parser = limits::DECAY_RATE)]
    lora_dropout: Option<f32>,
    /// Learn this model's distribution over the vocabulary instead of the text's next tokens: after compression, the original. It is read as
    /// it is stored.
    #[arg(long, value_name = "MODEL", requires = "model")]
    teacher: Option<String>,
    /// Compare softmax(logits / T) of teacher and model [default: 1].
    #[arg(long, value_name = "T", requires = "teacher", value_parser = limits::DISTILL_TEMPERATURE)]
    distill_temperature: Option<f32>,
    /// Share of the teacher in the loss; the rest is the text's next tokens [default: 1].
    #[arg(long, value_name = "SHARE", requires = "teacher", value_parser = limits::SHARE)]
    distill_weight: Option<f32>,
    /// What is trained of a --model: `all` (packed weights become plain ones), `scales` (scales and offsets of quantized weights, norms and
    /// biases: codes stay, and what is written has the form and the bytes of what was read), `norms` (norms and biases) [default: all].
    #[arg(long, value_name = "NAME", conflicts_with_all = ["lora_rank", "model_config"])]
    trainable: Option<String>,
    /// Where checkpoints and the model go.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// How numbers are stored: `baseline` (f32 AdamW, 16 bytes a parameter), `amp`, `quarter` (4), `eighth` (3)
    /// [default: quarter].
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// How weights are stored: `f32`, `bf16`, `bf16-nearest`, `bf16-residual`, `fp16` (f32 master weights, fp16 products, a scaled
    /// loss), `int8`, `int8-nearest` [default: as the preset says].
    #[arg(long, value_name = "NAME")]
    weights: Option<String>,
    /// Bits of the optimizer's states: 32, 8, 4 [default: as the preset says].
    #[arg(long, value_name = "BITS", value_parser = moments)]
    moments: Option<u8>,
    /// `adamw` or `sgd` [default: adamw].
    #[arg(long, value_name = "NAME")]
    optimizer: Option<String>,
    /// Momentum of SGD [default: 0.9].
    #[arg(long, value_name = "RATE", value_parser = limits::DECAY_RATE)]
    momentum: Option<f32>,
    /// Apply each block's gradients as soon as they are known [default: as the preset says].
    #[arg(long, value_name = "BOOL")]
    release: Option<bool>,
    /// Keep blocks' inputs alone and run blocks anew for their gradients [default: as the preset says].
    #[arg(long, value_name = "BOOL")]
    recompute: Option<bool>,
    /// Batches whose gradients are summed for one step. With gradient release the sums take 2 bytes a parameter: a larger
    /// --batch-size most often takes less [default: 1].
    #[arg(long, value_name = "N", value_parser = limits::BATCH)]
    gradient_accumulation: Option<usize>,
    /// Tokens of a sequence [default: 256].
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = limits::TRAIN_CONTEXT)]
    context: Option<usize>,
    /// Sequences of a step [default: 8].
    #[arg(short, long, value_name = "N", value_parser = limits::BATCH)]
    batch_size: Option<usize>,
    /// Steps to run [default: as --epochs says].
    #[arg(long, value_name = "N", value_parser = limits::SOME_STEPS)]
    steps: Option<u64>,
    /// Passes over the data [default: 1].
    #[arg(long, value_name = "N", conflicts_with = "steps", value_parser = limits::EPOCHS)]
    epochs: Option<f64>,
    /// Peak learning rate [default: 1e-3 for a new model, 2e-5 for an existing one, 2e-4 for adapters,
    /// 1e-3 for scales and norms].
    #[arg(long, visible_alias = "lr", value_name = "RATE", value_parser = limits::LEARNING_RATE)]
    learning_rate: Option<f64>,
    /// Course of the learning rate: `constant`, `linear`, `cosine`, `wsd` [default: cosine].
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// The learning rate that `linear`, `cosine` and `wsd` end at [default: 0 with `linear`, 5 % of the peak with the others].
    #[arg(long, visible_alias = "min-lr", value_name = "RATE", value_parser = limits::MIN_LEARNING_RATE)]
    min_learning_rate: Option<f64>,
    /// Steps of the linear warmup [default: 3 % of all].
    #[arg(long, value_name = "N", value_parser = limits::SOME_STEPS)]
    warmup_steps: Option<u64>,
    /// Decoupled weight decay of matrices [default: 0.1 for a new model, 0 for an existing one].
    #[arg(long, value_name = "RATE", value_parser = limits::WEIGHT_DECAY)]
    weight_decay: Option<f32>,
    /// Decay rate of the second moment [default: 0.95 for a new model, 0.999 for an existing one].
    #[arg(long, value_name = "RATE", value_parser = limits::DECAY_RATE)]
    beta2: Option<f32>,
    /// Clip by this norm of all gradients, exactly; takes a second backward pass with `quarter` and `eighth`
    /// [default: clipping of each tensor's update].
    #[arg(long, value_name = "NORM", value_parser = limits::GRADIENT_NORM)]
    max_grad_norm: Option<f64>,
    /// How much a step moves the bias by which a router chooses an expert, down where the expert had more tokens than the mean, up
    /// where fewer (models that have such a bias) [default: 0.001 for a new model, 0 for an existing one].
    #[arg(long, value_name = "RATE", value_parser = limits::SHARE)]
    router_bias_update_rate: Option<f32>,
    /// Steps between evaluations; 0 makes them at the end alone [default: a tenth of all].
    #[arg(long, value_name = "N", value_parser = limits::SOME_STEPS)]
    eval_every: Option<u64>,
    /// Steps between checkpoints; 0 makes them at the end alone [default: a tenth of all].
    #[arg(long, value_name = "N", value_parser = limits::SOME_STEPS)]
    save_every: Option<u64>,
    /// Checkpoints to keep [default: 2].
    #[arg(long, value_name = "N", value_parser = limits::KEEP)]
    keep: Option<usize>,
    /// Seed of initialisation, order and rounding [default: 0].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Go on from the last checkpoint in the output directory.
    #[arg(long)]
    resume: bool,
    /// Of a file; on the command line it is every command's option.
    #[arg(skip)]
    no_memory_check: bool,
}

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The next token.
    Text,
    /// The class of a text.
    Classification,
}

/// A model to learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct TeacherSettings {
    pub model: String,
    pub soft: SoftTargets,
}

/// The settings of a run, complete.
#[derive(Clone, Debug)]
pub struct Settings {
    pub model: Option<String>,
    pub model_config: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub task: Task,
    pub data: Vec<PathBuf>,
    pub eval_data: Vec<PathBuf>,
    /// What the files are; `None` for what their names say.
    pub data_format: Option<DataFormat>,
    pub columns: Columns,
    pub label_columns: LabelColumns,
    pub show_data: bool,
    pub held_out: f64,
    pub lora: Option<LoraSpec>,
    /// Share of the elements of adapters' inputs that are dropped.
    pub lora_dropout: f32,
    pub teacher: Option<TeacherSettings>,
    /// What little is trained of a model that otherwise stays; `None` for all of it.
    pub tune: Option<Tune>,
    pub output: PathBuf,
    pub recipe: Recipe,
    pub momentum: f32,
    pub gradient_accumulation: u64,
    pub context: usize,
    /// Whether the run's user chose it.
    pub is_context_given: bool,
    pub batch_size: usize,
    pub steps: Option<u64>,
    pub epochs: f64,
    pub learning_rate: f64,
    pub decay: String,
    /// Where the learning rate's course ends; `None` for the usual.
    pub min_learning_rate: Option<f64>,
    pub warmup_steps: Option<u64>,
    pub weight_decay: f32,
    pub beta2: f32,
    pub max_grad_norm: Option<f64>,
    pub router_bias_update_rate: f32,
    pub eval_every: Option<u64>,
    pub save_every: Option<u64>,
    pub keep: usize,
    pub seed: u64,
    pub factorize: Option<String>,
    pub flip: bool,
    pub shift: usize,
    pub resume: bool,
    /// Whether a run that will not fit is refused.
    pub memory_check: bool,
}

impl Settings {
    /// Flags, then the file, then defaults.
    pub fn resolve(flags: &TrainArgs) -> Result<Self> {
        let file = match &flags.config {
            Some(path) => {
                let text = regular::read_text(path, limits::MOST_BYTES).with_context(|| path.display().to_string())?;
                toml::from_str(&text).with_context(|| path.display().to_string())?
            }
            None => TrainArgs::default(),
        };
        let (flags, new) = (flags.clone(), flags.model_config.is_some() || file.model_config.is_some());
        macro_rules! pick {
            ($name:ident) => {
                flags.$name.or(file.$name)
            };
            // A number of the file has had no parser that knows its limits.
            ($name:ident, $limit:ident) => {
                match flags.$name.or(file.$name) {
                    Some(value) => {
                        let option = format!("--{}", stringify!($name).replace('_', "-"));
                        Some(limits::$limit.check(&option, value)?)
                    }
                    None => None,
                }
            };
        }
        let preset = pick!(preset).unwrap_or_else(|| Recipe::QUARTER.name.to_owned());
        let Some(mut recipe) = Recipe::named(&preset) else {
            let known: Vec<&str> = Recipe::ALL.iter().map(|r| r.name).collect();
            bail!("--preset {preset}: there are {}", known.join(", "));
        };
        if let Some(name) = pick!(weights) {
            (recipe.storage, recipe.compute) = storage(&name, recipe.compute)?;
        }
        if let Some(bits) = pick!(moments) {
            recipe.moments = match bits {
                32 => MomentPrecision::F32,
                8 => MomentPrecision::Bits8,
                4 => MomentPrecision::Bits4,
                other => bail!("--moments {other}: 32, 8 or 4 is expected"),
            };
        }
        if let Some(name) = pick!(optimizer) {
            recipe.optimizer = match name.as_str() {
                "adamw" => OptimizerKind::AdamW,
                "sgd" => OptimizerKind::Sgd,
                other => bail!("--optimizer {other}: there are adamw, sgd"),
            };
        }
        recipe.release = pick!(release).unwrap_or(recipe.release);
        recipe.recompute = pick!(recompute).unwrap_or(recipe.recompute);
        let shows = flags.show_data || file.show_data;
        let Some(output) = pick!(output).or(shows.then(PathBuf::new)) else { bail!("--output DIR is missing") };
        let either = |flag: Vec<PathBuf>, file: Vec<PathBuf>| if flag.is_empty() { file } else { flag };
        let steps = pick!(steps, SOME_STEPS);
        let mut targets = match flags.lora_targets.is_empty() {
            true => file.lora_targets,
            false => flags.lora_targets,
        };
        if targets == ["all-linear"] {
            targets.clear();
        }
        let alpha = pick!(lora_alpha, ALPHA);
        let lora_dropout = pick!(lora_dropout, DECAY_RATE).unwrap_or(0.0);
        let lora =
            pick!(lora_rank, RANK).map(|rank| LoraSpec { rank, alpha: alpha.unwrap_or(2.0 * rank as f32), targets });
        let tune = match pick!(trainable).as_deref() {
            None | Some("all") => None,
            Some("scales") => Some(Tune::Scales),
            Some("norms") => Some(Tune::Norms),
            Some(other) => bail!("--trainable {other}: there are all, scales, norms"),
        };
        let soft = SoftTargets {
            temperature: pick!(distill_temperature, DISTILL_TEMPERATURE).unwrap_or(1.0),
            weight: pick!(distill_weight, SHARE).unwrap_or(1.0),
        };
        let teacher = pick!(teacher).map(|model| TeacherSettings { model, soft });
        let with_adapters = lora.is_some();
        let columns = Columns {
            text: pick!(text_column),
            prompt: pick!(prompt_column),
            completion: pick!(completion_column),
            messages: pick!(messages_column),
            instruction: pick!(instruction_column),
            input: pick!(input_column),
            output: pick!(output_column),
            system: pick!(system_column),
            tools: pick!(tools_column),
        };
        columns.check().map_err(Error::msg)?;
        let settings = Self {
            model: pick!(model),
            model_config: pick!(model_config),
            tokenizer: pick!(tokenizer),
            task: match pick!(task).as_deref() {
                None | Some("text") => Task::Text,
                Some("classification") => Task::Classification,
                Some(other) => bail!("--task {other}: there are text, classification"),
            },
            data: either(flags.data, file.data),
            eval_data: either(flags.eval_data, file.eval_data),
            data_format: match pick!(data_format).as_deref() {
                None => None,
                Some(name) => match DataFormat::named(name) {
                    Some(format) => Some(format),
                    None => bail!("--data-format {name}: there are text, jsonl, json, csv, tsv, parquet"),
                },
            },
            label_columns: LabelColumns {
                text: columns.text.clone(),
                text_pair: pick!(text_pair_column),
                label: pick!(label_column),
            },
            columns,
            show_data: flags.show_data || file.show_data,
            held_out: pick!(held_out, HELD_OUT).unwrap_or(0.05),
            lora,
            lora_dropout,
            teacher,
            tune,
            output,
            recipe,
            momentum: pick!(momentum, DECAY_RATE).unwrap_or(0.9),
            gradient_accumulation: pick!(gradient_accumulation, BATCH).unwrap_or(1) as u64,
            is_context_given: flags.context.is_some() || file.context.is_some(),
            context: pick!(context, TRAIN_CONTEXT).unwrap_or(256),
            batch_size: pick!(batch_size, BATCH).unwrap_or(8),
            steps,
            epochs: pick!(epochs, EPOCHS).unwrap_or(1.0),
            learning_rate: pick!(learning_rate, LEARNING_RATE).unwrap_or(match (new, with_adapters, tune.is_some()) {
                (true, _, _) => 1e-3,
                (false, true, _) => 2e-4,
                // Numbers about 1: see `fourfold_tensor::Tuning`.
                (false, false, true) => 1e-3,
                (false, false, false) => 2e-5,
            }),
            decay: pick!(schedule).unwrap_or_else(|| "cosine".to_owned()),
            min_learning_rate: pick!(min_learning_rate, MIN_LEARNING_RATE),
            warmup_steps: pick!(warmup_steps, SOME_STEPS),
            weight_decay: pick!(weight_decay, WEIGHT_DECAY).unwrap_or(if new { 0.1 } else { 0.0 }),
            beta2: pick!(beta2, DECAY_RATE).unwrap_or(if new { 0.95 } else { 0.999 }),
            max_grad_norm: pick!(max_grad_norm, GRADIENT_NORM),
            router_bias_update_rate: pick!(router_bias_update_rate, SHARE).unwrap_or(if new {
                DEFAULT_RATE
            } else {
                0.0
            }),
            eval_every: pick!(eval_every, SOME_STEPS),
            save_every: pick!(save_every, SOME_STEPS),
            keep: pick!(keep, KEEP).unwrap_or(2),
            seed: pick!(seed).unwrap_or(0),
            factorize: pick!(factorize),
            flip: flags.flip || file.flip,
            shift: pick!(shift, SHIFT).unwrap_or(0),
            resume: flags.resume || file.resume,
            memory_check: !(flags.no_memory_check || file.no_memory_check),
        };
        ensure!(!settings.data.is_empty(), "--data FILE is missing");
        if let Some(rate) = settings.min_learning_rate {
            ensure!(
                rate.is_finite() && (0.0..=settings.learning_rate).contains(&rate),
                "--min-learning-rate {rate}: from 0 to --learning-rate, {}",
                settings.learning_rate
            );
            ensure!(settings.decay != "constant", "--min-learning-rate: the schedule `constant` has no lower end");
        }
        ensure!(
            settings.epochs > 0.0 || settings.steps.is_some(),
            "--epochs {}: nothing would be trained; --epochs 1 is one pass over the data, and `fourfold eval` measures a model as it is",
            settings.epochs
        );
        ensure!(
            settings.steps != Some(0),
            "--steps 0: nothing would be trained; --steps 1 is one step, and `fourfold eval` measures a model as it is"
        );
        if settings.lora.is_some() {
            ensure!(
                settings.task == Task::Text,
                "--lora-rank: a classifier's new head is trained with all weights only"
            );
        }
        let (task, tune) = (settings.task, settings.tune);
        if settings.teacher.is_some() {
            ensure!(task == Task::Text, "--teacher: a classifier is not distilled; its task has labels of its own");
        }
        ensure!(
            tune.is_none() || settings.lora.is_none(),
            "--trainable: with --lora-rank the adapters alone are trained"
        );
        ensure!(
            tune.is_none() || task == Task::Text,
            "--trainable: a classifier's new head is trained with all weights only"
        );
        settings.decay(1)?;
        Ok(settings)
    }

    fn decay(&self, steps: u64) -> Result<Decay> {
        Ok(match self.decay.as_str() {
            "constant" => Decay::Constant,
            "linear" => Decay::Linear,
            "cosine" => Decay::Cosine,
            "wsd" => Decay::WarmupStableDecay { decay_steps: steps / 5 },
            other => bail!("--schedule {other}: there are constant, linear, cosine, wsd"),
        })
    }

    /// What the trainer needs, for a run of `steps`; fills in the intervals that depend on it.
    pub fn hyperparameters(&self, steps: u64) -> Hyperparameters {
        let decay = self.decay(steps).unwrap_or(Decay::Cosine);
        let schedule = Schedule {
            warmup_steps: self.warmup_steps.unwrap_or(steps * 3 / 100),
            total_steps: steps,
            decay,
            floor: match self.min_learning_rate {
                Some(rate) => rate / self.learning_rate,
                None if decay == Decay::Linear => 0.0,
                None => 0.05,
            },
        };
        let optimizer = match self.recipe.optimizer {
            OptimizerKind::AdamW => Optimizer::AdamW(AdamW {
                beta2: self.beta2,
                weight_decay: self.weight_decay,
                clip_update: self.max_grad_norm.is_none(),
                ..AdamW::default()
            }),
            OptimizerKind::Sgd => {
                Optimizer::Sgd(Sgd { momentum: self.momentum, weight_decay: self.weight_decay, nesterov: false })
            }
        };
        Hyperparameters {
            optimizer,
            lr: self.learning_rate,
            schedule,
            max_gradient_norm: self.max_grad_norm,
            seed: self.seed,
            lora_dropout: self.lora_dropout,
        }
    }

    /// Tokens of a sequence of a model with so many positions.
    pub fn length(&self, positions: usize) -> Result<usize> {
        ensure!(
            self.context <= positions || !self.is_context_given,
            "--context {}: the model has {positions} positions; --context {positions} is its most",
            self.context
        );
        Ok(self.context.min(positions))
    }

    /// The data's name in errors.
    pub fn data_name(&self) -> String {
        name_of(&self.data)
    }
}

/// Bits of an optimizer's states.
fn moments(text: &str) -> Result<u8, String> {
    match text {
        "32" => Ok(32),
        "8" => Ok(8),
        "4" => Ok(4),
        _ => Err("32, 8 or 4 is expected".to_owned()),
    }
}

/// What errors call several files.
pub fn name_of(files: &[PathBuf]) -> String {
    files.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// How weights of that name are stored, and in what they are multiplied where the preset multiplies in `compute`.
fn storage(name: &str, compute: DType) -> Result<(Storage, DType)> {
    Ok(match name {
        "f32" => (Storage::F32, compute),
        "bf16" => (Storage::Bf16, compute),
        "bf16-nearest" => (Storage::Bf16Nearest, compute),
        "bf16-residual" => (Storage::Bf16Residual, compute),
        "fp16" => (Storage::F32, DType::F16),
        "int8" => (Storage::Int8, compute),
        "int8-nearest" => (Storage::Int8Nearest, compute),
        other => bail!("--weights {other}: there are f32, bf16, bf16-nearest, bf16-residual, fp16, int8, int8-nearest"),
    })
}
