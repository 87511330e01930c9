//! `fourfold plan`: the peak memory of a training run, before anything is allocated; and what fits into a given memory.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use fourfold_formats::regular;
use fourfold_models::layers::LoraSpec;
use fourfold_models::{ConvNetSpec, ModelSpec, Role, WeightSpec, spec_from_config};
use fourfold_train::image_memory::image_memory;
use fourfold_train::memory::{Adapters, TrainMemory, Work, train_memory};
use fourfold_train::recipe::Recipe;
use serde::Serialize;
use serde_json::Value;

use super::train::{largest, matrix_bytes};
use crate::context::Context;
use crate::model;
use crate::output::Report;
use crate::{human, limits};

#[derive(Args)]
pub struct PlanArgs {
    /// A directory, a .gguf file, a name on the hub, or a config.json alone.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Tokens of a sequence [default: 256, or fewer where the model has fewer positions].
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = limits::TRAIN_CONTEXT)]
    context: Option<usize>,
    /// Sequences or images of a step; with --memory, the most to try.
    #[arg(short, long, default_value_t = 8, value_name = "N", value_parser = limits::BATCH)]
    batch_size: usize,
    /// Batches whose gradients are summed for one step.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = limits::BATCH)]
    gradient_accumulation: usize,
    /// Low-rank adapters of this rank are trained, as by `train --lora-rank`, and the model stays as it is stored; a config.json alone
    /// is taken for bf16, or for FP8 where it says so.
    #[arg(long, value_name = "RANK", value_parser = limits::RANK)]
    lora_rank: Option<usize>,
    /// Layers that get an adapter: names such as q_proj,v_proj, or all-linear [default: all-linear].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora_rank")]
    lora_targets: Vec<String>,
    /// Find what fits into this much, `8GB` say.
    #[arg(long, value_name = "SIZE", value_parser = human::parse_bytes)]
    memory: Option<u64>,
}

#[derive(Serialize)]
struct Row {
    preset: String,
    batch_size: u64,
    weights: u64,
    optimizer: u64,
    gradients: u64,
    activations: u64,
    logits: u64,
    copies: u64,
    data: u64,
    program: u64,
    total: u64,
}

#[derive(Serialize)]
struct PlanReport {
    model: String,
    parameters: u64,
    /// Tokens of a sequence; none where images are learned.
    context: Option<u64>,
    rows: Vec<Row>,
    memory: Option<u64>,
    /// The first preset that fits, and its largest batch.
    choice: Option<(String, u64)>,
}

pub fn run(args: &PlanArgs, context: &Context) -> Result<()> {
    if let Some(spec) = images(&args.model, context)? {
        ensure!(args.lora_rank.is_none(), "--lora-rank: adapters are for language models");
        let predict = |recipe: &Recipe, batch| image_memory(&spec, recipe, batch, args.gradient_accumulation as u64);
        return report(args, context, spec.parameters(), None, &predict);
    }
    let (spec, base) = spec(&args.model, context)?;
    let lora = args.lora_rank.map(|rank| LoraSpec {
        rank,
        alpha: 1.0,
        targets: if args.lora_targets == ["all-linear"] { Vec::new() } else { args.lora_targets.clone() },
    });
    let adapters = lora.as_ref().map(|lora| Adapters { lora, base });
    if let Some(lora) = &lora {
        ensure!(!lora.weights(&spec).is_empty(), "--lora-targets: {} has no such layer", args.model);
    }
    let positions = spec.max_positions.max(2);
    let tokens = match args.context {
        Some(tokens) if tokens > positions => {
            bail!("--context {tokens}: the model has {positions} positions; --context {positions} is its most")
        }
        Some(tokens) => tokens.max(2) as u64,
        None => positions.min(256) as u64,
    };
    let predict = |recipe: &Recipe, batch| {
        let work = Work::sequences(batch, tokens, args.gradient_accumulation as u64, recipe);
        train_memory(&spec, recipe, &work.with_adapters(adapters))
    };
    report(args, context, spec.parameters(), Some(tokens), &predict)
}

/// Prints what `predict` says of every preset; `tokens` are those of a sequence.
fn report(
    args: &PlanArgs,
    context: &Context,
    parameters: u64,
    tokens: Option<u64>,
    predict: &dyn Fn(&Recipe, u64) -> TrainMemory,
) -> Result<()> {
    let candidates = candidates();
    let fits = |memory: u64| {
        candidates.iter().find_map(|recipe| {
            let batch = largest(args.batch_size as u64, |batch| predict(recipe, batch).total() <= memory);
            (batch > 0).then(|| (name(recipe), batch))
        })
    };
    let rows =
        candidates.iter().map(|r| row(name(r), args.batch_size as u64, &predict(r, args.batch_size as u64))).collect();
    let report = PlanReport {
        model: args.model.clone(),
        parameters,
        context: tokens,
        rows,
        memory: args.memory,
        choice: args.memory.and_then(fits),
    };
    context.print(&report)?;
    if let (Some(memory), None) = (report.memory, &report.choice) {
        let least = predict(&Recipe::EIGHTH, 1);
        bail!(
            "nothing fits into {}: `eighth` with one {} takes {}, {} of it weights and optimizer",
            human::bytes(memory),
            if tokens.is_some() { "sequence" } else { "image" },
            human::bytes(least.total()),
            human::bytes(least.weights + least.optimizer)
        );
    }
    Ok(())
}

/// What is tried, the least change of numbers first: what recomputes costs time alone.
fn candidates() -> Vec<Recipe> {
    let mut candidates = Recipe::ALL.to_vec();
    candidates.insert(2, Recipe { recompute: true, block_tokens: 512, loss_chunk: 256, ..Recipe::AMP });
    candidates
}

/// A recipe's label, and what of it no checkpoint needs to remember.
fn name(recipe: &Recipe) -> String {
    let is_usual = Recipe::named(recipe.name).is_none_or(|preset| preset.recompute == recipe.recompute);
    recipe.label() + if is_usual { "" } else { ", recompute" }
}

/// The convolutional network that a configuration describes, if it is one: a file, or in a directory.
fn images(name: &str, context: &Context) -> Result<Option<ConvNetSpec>> {
    let path = PathBuf::from(name);
    if path.is_dir() && path.join("config.json").is_file() {
        return Ok(model::open_network(name, context)?.map(|open| open.spec));
    }
    let file = if path.extension().is_some_and(|e| e == "json") { path } else { path.join("config.json") };
    // What cannot be read is told of by whoever reads it as a language model.
    let config =
        regular::read_text(&file, limits::MOST_BYTES).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
    match config.filter(ConvNetSpec::is_described_by) {
        Some(config) => Ok(Some(ConvNetSpec::from_config(&config).with_context(|| file.display().to_string())?)),
        None => Ok(None),
    }
}

/// The model, and the bytes of its matrices as they are stored.
fn spec(name: &str, context: &Context) -> Result<(ModelSpec, u64)> {
    let path = PathBuf::from(name);
    if path.extension().is_none_or(|e| e != "json") {
        let open = model::open(name, context)?;
        let bytes = matrix_bytes(&open.spec, &*open.checkpoint.weights);
        return Ok((open.spec, bytes));
    }
    let text = regular::read_text(&path, limits::MOST_BYTES).with_context(|| name.to_owned())?;
    let config: Value = serde_json::from_str(&text).with_context(|| name.to_owned())?;
    let spec = spec_from_config(&config).with_context(|| name.to_owned())?;
    let bytes = described_bytes(&spec, &config);
    Ok((spec, bytes))
}

/// Bytes of the matrices that a configuration alone describes: bf16, and linear layers in DeepSeek's FP8 where it says so.
fn described_bytes(spec: &ModelSpec, config: &Value) -> u64 {
    let section = &config["quantization_config"];
    let block = |i: usize| section["weight_block_size"][i].as_u64().filter(|&size| size > 0);
    let blocks = match (section["quant_method"] == "fp8", block(0), block(1)) {
        (true, Some(rows), Some(cols)) => Some((rows, cols)),
        _ => None,
    };
    let bytes = |weight: WeightSpec| {
        let is_linear = match weight.role {
            Role::Attention | Role::Mlp | Role::SharedExpert | Role::RoutedExpert => true,
            Role::Embedding
            | Role::LmHead
            | Role::Router
            | Role::Norm
            | Role::Bias
            | Role::Convolution
            | Role::RunningMean
            | Role::RunningVariance => false,
        };
        match (blocks, is_linear, weight.shape.as_slice()) {
            (Some(block), true, &[rows, cols]) => {
                weight.elements() + 4 * (rows as u64).div_ceil(block.0) * (cols as u64).div_ceil(block.1)
            }
            _ => 2 * weight.elements(),
        }
    };
    spec.weights().into_iter().filter(|weight| weight.shape.len() > 1).map(bytes).sum()
}

fn row(preset: String, batch_size: u64, m: &TrainMemory) -> Row {
    Row {
        preset,
        batch_size,
        weights: m.weights,
        optimizer: m.optimizer,
        gradients: m.gradients,
        activations: m.activations,
        logits: m.logits,
        copies: m.copies,
        data: m.data,
        program: m.program,
        total: m.total(),
    }
}

impl Report for PlanReport {
    fn text(&self) -> String {
        let mut rows = vec![vec!["peak memory of training".to_owned()]];
        rows[0].extend(self.rows.iter().map(|r| r.preset.clone()));
        let mut line = |name: &str, value: fn(&Row) -> u64| {
            let mut cells = vec![name.to_owned()];
            cells.extend(self.rows.iter().map(|r| human::bytes(value(r))));
            rows.push(cells);
        };
        line("  weights", |r| r.weights);
        line("  optimizer", |r| r.optimizer);
        line("  gradients", |r| r.gradients);
        line("  activations", |r| r.activations);
        line("  logits", |r| r.logits);
        line("  copies of weights", |r| r.copies);
        line("  batches", |r| r.data);
        line("  program", |r| r.program);
        line("  total", |r| r.total);
        let batch = self.rows.first().map_or(0, |r| r.batch_size);
        let mut text = format!(
            "{}: {} parameters, steps of {batch} {}\n\n{}",
            self.model,
            human::count(self.parameters),
            self.context.map_or("images".to_owned(), |tokens| format!("x {tokens} tokens")),
            human::table(&rows)
        );
        if let (Some(memory), Some((preset, batch))) = (self.memory, &self.choice) {
            text += &format!("\n{} is enough for: {preset}, batch size {batch}\n", human::bytes(memory));
        }
        text
    }
}
