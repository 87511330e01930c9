//! `fourfold plan`: the peak memory of running and of training a model, before anything is allocated; and what fits into a given memory.

mod sizes;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use fourfold_formats::regular;
use fourfold_models::layers::LoraSpec;
use fourfold_models::{ConvNetSpec, ModelSpec};
use fourfold_train::image_memory::image_memory;
use fourfold_train::memory::{Adapters, TrainMemory, Work, train_memory};
use fourfold_train::recipe::Recipe;
use serde::Serialize;
use serde_json::Value;

use self::sizes::{Advice, Size, Sizes};
use super::train::{largest, matrix_bytes};
use crate::context::Context;
use crate::described::Described;
use crate::model;
use crate::output::Report;
use crate::{human, limits};

#[derive(Args)]
pub struct PlanArgs {
    /// A directory, a .gguf file, a name on the hub, or a config.json alone.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Tokens of a sequence [default: 256 for training and 4096 for running, or fewer where the model has fewer positions].
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = limits::TRAIN_CONTEXT)]
    context: Option<usize>,
    /// Sequences or images of a step; with --memory, the most to try.
    #[arg(short, long, default_value_t = 8, value_name = "N", value_parser = limits::BATCH)]
    batch_size: usize,
    /// Batches whose gradients are summed for one step.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = limits::BATCH)]
    gradient_accumulation: usize,
    /// What the model takes once `compress --bits` has made it this small, everything counted; without it several sizes are shown.
    #[arg(long, value_name = "BITS", value_parser = limits::AVERAGE_BITS, conflicts_with = "ratio")]
    bits: Option<f64>,
    /// The same for `compress --ratio`.
    #[arg(long, value_name = "R", value_parser = limits::RATIO)]
    ratio: Option<f64>,
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
    /// Tokens that running is planned for; none for networks that read images.
    #[serde(skip_serializing_if = "Option::is_none")]
    run_context: Option<u64>,
    /// What running takes, by size of the weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    run: Vec<Size>,
    /// Commands that fit into the memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    advice: Vec<Advice>,
}

pub fn run(args: &PlanArgs, context: &Context) -> Result<()> {
    if let Some(spec) = images(&args.model, context)? {
        ensure!(args.lora_rank.is_none(), "--lora-rank: adapters are for language models");
        let predict = |recipe: &Recipe, batch| image_memory(&spec, recipe, batch, args.gradient_accumulation as u64);
        ensure!(args.bits.is_none() && args.ratio.is_none(), "--bits and --ratio are for language models");
        return report(args, context, spec.parameters(), None, &predict, None);
    }
    let (spec, stored) = spec(&args.model, context)?;
    let bits = match (args.bits, args.ratio) {
        (None, Some(ratio)) => Some(stored as f64 / ratio * 8.0 / spec.parameters() as f64),
        (bits, _) => bits,
    };
    // Adapters are trained on what is asked for.
    let base = bits.map_or(stored, |bits| (bits * spec.parameters() as f64 / 8.0) as u64);
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
    let default = LoraSpec { rank: ADAPTER_RANK, alpha: 1.0, targets: Vec::new() };
    let sizes = Sizes {
        spec: &spec,
        // A configuration alone can be neither compressed nor run.
        model: if args.model.ends_with(".json") { "MODEL" } else { &args.model },
        stored,
        lora: lora.as_ref().unwrap_or(&default),
        context: args.context.unwrap_or(4096).min(positions) as u64,
        train_context: tokens,
        bits,
        kv: context.kv,
    };
    report(args, context, spec.parameters(), Some(tokens), &predict, Some(&sizes))
}

/// Rank of the adapters that are planned where none is given.
const ADAPTER_RANK: usize = 16;

/// Prints what `predict` says of every preset; `tokens` are those of a sequence.
fn report(
    args: &PlanArgs,
    context: &Context,
    parameters: u64,
    tokens: Option<u64>,
    predict: &dyn Fn(&Recipe, u64) -> TrainMemory,
    sizes: Option<&Sizes>,
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
    let run = sizes.map(Sizes::all).unwrap_or_default();
    let advice = match (sizes, args.memory) {
        (Some(sizes), Some(memory)) => sizes.advice(&run, memory),
        (_, _) => Vec::new(),
    };
    let cheapest = sizes.and_then(|sizes| sizes.cheapest(&run)).map(|words| format!("; {words}")).unwrap_or_default();
    let report = PlanReport {
        model: args.model.clone(),
        parameters,
        context: tokens,
        rows,
        memory: args.memory,
        choice: args.memory.and_then(fits),
        run_context: sizes.map(|sizes| sizes.context),
        run,
        advice,
    };
    context.print(&report)?;
    if let (Some(memory), None, true) = (report.memory, &report.choice, report.advice.is_empty()) {
        let least = predict(&Recipe::EIGHTH, 1);
        bail!(
            "nothing fits into {}: training by `eighth` with one {} takes {}, {} of it weights and optimizer{cheapest}",
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
    if let Some(described) = Described::read(name, context)? {
        let bytes = described.tensors.iter().filter(|t| t.shape.len() > 1).map(|t| t.bytes).sum();
        return Ok((described.spec, bytes));
    }
    let open = model::open(name, context)?;
    let bytes = matrix_bytes(&open.spec, &*open.checkpoint.weights);
    Ok((open.spec, bytes))
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
        if let Some(context) = self.run_context {
            text += &format!("\n{}", sizes::table(&self.run, context, self.memory));
        }
        let Some(memory) = self.memory else { return text };
        text += &format!("\n{} is enough", human::bytes(memory));
        for advice in &self.advice {
            text += &format!("\n  to {} ({}):", advice.what, human::bytes(advice.total));
            text.extend(advice.commands.iter().map(|command| format!("\n    {command}")));
        }
        match &self.choice {
            Some((preset, batch)) => {
                text += &format!("\n  to train all weights: --preset {preset} --batch-size {batch}\n");
            }
            None if self.advice.is_empty() => text += " for nothing of this\n",
            None => text += "\n  not to train all weights\n",
        }
        text
    }
}
