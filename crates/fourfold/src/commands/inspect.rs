//! `fourfold inspect`: what is in a checkpoint, where its bytes are, what memory it takes.

use std::collections::HashMap;

use anyhow::Result;
use clap::Args;
use fourfold_infer::PROMPT_BATCH;
use fourfold_models::{ModelSpec, Role};
use fourfold_tensor::TensorInfo;
use fourfold_train::memory;
use fourfold_train::recipe::Recipe;
use serde::Serialize;

use crate::context::Context;
use crate::described::Described;
use crate::model::{self, OpenModel, Opening};
use crate::output::Report;
use crate::{fit, human, limits};

#[derive(Args)]
pub struct InspectArgs {
    /// A directory, a .gguf file, a name on the hub, or a config.json alone: weights as it says, FP8 or bf16.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Tokens of context to plan memory for [default: the model's, at most 4096].
    #[arg(short, long, value_name = "TOKENS", value_parser = limits::TOKENS)]
    context: Option<usize>,
    /// Sequences at a time to plan memory for.
    #[arg(short, long, default_value_t = 1, value_name = "N", value_parser = limits::BATCH)]
    batch: usize,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
}

/// Tensors that have something in common.
#[derive(Clone, Default, Serialize)]
struct Group {
    name: String,
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct TensorReport {
    name: String,
    shape: Vec<usize>,
    role: Option<&'static str>,
    storage: String,
    bytes: u64,
}

#[derive(Serialize)]
struct RunReport {
    weights: u64,
    kv_cache: u64,
    activations: u64,
    logits: u64,
    /// The program and its tokenizer.
    program: u64,
    total: u64,
}

#[derive(Serialize)]
struct TrainReport {
    recipe: &'static str,
    weights: u64,
    gradients: u64,
    optimizer: u64,
    activations: u64,
    logits: u64,
    total: u64,
}

#[derive(Serialize)]
struct InspectReport {
    model: String,
    architecture: String,
    parameters: u64,
    active_parameters: u64,
    blocks: usize,
    hidden_size: usize,
    vocab_size: usize,
    max_positions: usize,
    tied_embeddings: bool,
    weight_bytes: u64,
    bits_per_parameter: f64,
    kv_bytes_per_token: usize,
    by_storage: Vec<Group>,
    by_role: Vec<Group>,
    by_layer: Vec<Group>,
    unused: Vec<String>,
    missing: Vec<String>,
    context: usize,
    batch: u64,
    run: RunReport,
    train: Vec<TrainReport>,
    /// Of this command itself, which loads no weights.
    peak_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorReport>>,
}

pub fn run(args: &InspectArgs, context: &Context) -> Result<()> {
    let subject = match Described::read(&args.model, context)? {
        Some(described) => Subject::described(&args.model, described),
        None => Subject::open(model::open_for(&args.model, Opening::Listed, context)?),
    };
    context.print(&report(args, context, &subject))
}

/// What is looked at: a checkpoint, or what a configuration describes.
struct Subject {
    name: String,
    spec: ModelSpec,
    tensors: Vec<TensorInfo>,
    unused: Vec<String>,
    weight_bytes: u64,
}

impl Subject {
    fn open(model: OpenModel) -> Self {
        let OpenModel { checkpoint, spec } = model;
        Self {
            name: checkpoint.path.display().to_string(),
            tensors: checkpoint.weights.tensors().to_vec(),
            unused: spec.unused(&*checkpoint.weights),
            weight_bytes: checkpoint.weight_bytes,
            spec,
        }
    }

    fn described(name: &str, described: Described) -> Self {
        let Described { spec, tensors } = described;
        let weight_bytes = tensors.iter().map(|t| t.bytes).sum();
        Self { name: name.to_owned(), spec, tensors, unused: Vec::new(), weight_bytes }
    }
}

fn report(args: &InspectArgs, context: &Context, subject: &Subject) -> InspectReport {
    let Subject { name, spec, tensors: infos, unused, weight_bytes } = subject;
    let known: HashMap<String, (Role, Option<usize>)> =
        spec.weights().into_iter().map(|w| (w.name, (w.role, w.block))).collect();
    let layer = |name: &str| match known.get(name) {
        Some((_, Some(block))) => format!("block {block}"),
        Some((role, None)) => role_name(*role).to_owned(),
        None => UNUSED.to_owned(),
    };
    let role = |name: &str| known.get(name).map_or(UNUSED, |(role, _)| role_name(*role)).to_owned();
    let groups = |key: &dyn Fn(&str, &str) -> String| {
        let mut found: Vec<Group> = Vec::new();
        for info in infos {
            let name = key(&info.name, &info.storage);
            let at = found.iter().position(|g| g.name == name).unwrap_or_else(|| {
                found.push(Group { name, ..Group::default() });
                found.len() - 1
            });
            found[at].tensors += 1;
            found[at].parameters += info.elements();
            found[at].bytes += info.bytes;
        }
        found
    };
    let by_size = |mut groups: Vec<Group>| {
        groups.sort_by_key(|g| std::cmp::Reverse(g.bytes));
        groups
    };
    let mut by_layer = groups(&|name, _| layer(name));
    let block_number = |g: &Group| g.name.strip_prefix("block ").and_then(|n| n.parse::<usize>().ok());
    by_layer.sort_by_key(|g| block_number(g).map_or((0, 0), |n| (1, n)));

    let present: std::collections::HashSet<&str> = infos.iter().map(|i| i.name.as_str()).collect();
    let missing = spec.weights().into_iter().map(|w| w.name).filter(|n| !present.contains(n.as_str())).collect();
    let tokens = args.context.unwrap_or(4096).min(spec.max_positions).max(1);
    let parameters = spec.parameters();
    let recipes = [("f32 AdamW", Recipe::BASELINE), ("quarter", Recipe::QUARTER)];
    InspectReport {
        model: name.clone(),
        architecture: spec.architecture.clone(),
        parameters,
        active_parameters: spec.active_parameters(),
        blocks: spec.blocks.len(),
        hidden_size: spec.hidden_size,
        vocab_size: spec.vocab_size,
        max_positions: spec.max_positions,
        tied_embeddings: spec.tied,
        weight_bytes: *weight_bytes,
        bits_per_parameter: *weight_bytes as f64 * 8.0 / parameters as f64,
        kv_bytes_per_token: spec.kv_bytes_per_token(context.kv),
        by_storage: by_size(groups(&|_, storage| storage.to_owned())),
        by_role: by_size(groups(&|name, _| role(name))),
        by_layer,
        unused: unused.clone(),
        missing,
        context: tokens,
        batch: args.batch as u64,
        run: run_memory(subject, context, tokens as u64, args.batch as u64),
        train: recipes.map(|(name, recipe)| train_memory(spec, name, recipe, args.batch as u64, tokens as u64)).into(),
        peak_memory: crate::memory::peak_resident(),
        tensors: args.tensors.then(|| {
            let one = |info: &fourfold_tensor::TensorInfo| TensorReport {
                name: info.name.clone(),
                shape: info.shape.clone(),
                role: known.get(&info.name).map(|(role, _)| role_name(*role)),
                storage: info.storage.clone(),
                bytes: info.bytes,
            };
            infos.iter().map(one).collect()
        }),
    }
}

const UNUSED: &str = "not read by this architecture";

/// What a role is called in tables and plans.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Embedding => "embedding",
        Role::LmHead => "lm_head",
        Role::Attention => "attention",
        Role::Mlp => "mlp",
        Role::SharedExpert => "shared expert",
        Role::RoutedExpert => "routed expert",
        Role::Router => "router",
        Role::Norm => "norm",
        Role::Bias => "bias",
        Role::Convolution => "convolution",
        Role::RunningMean | Role::RunningVariance => "statistics",
    }
}

fn run_memory(subject: &Subject, context: &Context, tokens: u64, batch: u64) -> RunReport {
    let m = subject.spec.run_memory(subject.weight_bytes, tokens, PROMPT_BATCH as u64, context.kv);
    let (kv_cache, logits, activations) = (m.kv_cache * batch, m.logits * batch, m.activations + m.rotary_tables);
    let program = fit::program(subject.spec.vocab_size);
    let total = m.weights + kv_cache + activations + logits + program;
    RunReport { weights: m.weights, kv_cache, activations, logits, program, total }
}

fn train_memory(spec: &ModelSpec, name: &'static str, recipe: Recipe, batch: u64, tokens: u64) -> TrainReport {
    let m = memory::train_memory(spec, &recipe, &memory::Work::sequences(batch, tokens, 1, &recipe));
    TrainReport {
        recipe: name,
        weights: m.weights,
        gradients: m.gradients,
        optimizer: m.optimizer,
        activations: m.activations + m.copies + m.program,
        logits: m.logits,
        total: m.total(),
    }
}

impl Report for InspectReport {
    fn text(&self) -> String {
        let mut text = format!("{}\n", self.model);
        let active = if self.active_parameters < self.parameters * 9 / 10 {
            format!(", {} active for a token", human::count(self.active_parameters))
        } else {
            String::new()
        };
        text += &format!(
            "{}: {} parameters{active}, {} blocks, hidden {}, vocabulary {}{}, context {}\n",
            self.architecture,
            human::count(self.parameters),
            self.blocks,
            self.hidden_size,
            self.vocab_size,
            if self.tied_embeddings { " (tied)" } else { "" },
            self.max_positions
        );
        text += &format!(
            "weights {}, {:.2} bits a parameter; KV cache {} a token\n",
            human::bytes(self.weight_bytes),
            self.bits_per_parameter,
            human::bytes(self.kv_bytes_per_token as u64)
        );
        for (title, groups) in [("stored as", &self.by_storage), ("role", &self.by_role)] {
            text += &format!("\n{}", human::table(&rows(title, groups, self.weight_bytes)));
        }
        text += &format!("\n{}", human::table(&rows("layer", &merge_equal(&self.by_layer), self.weight_bytes)));
        if let Some(tensors) = &self.tensors {
            let mut rows = vec![["tensor", "shape", "stored as", "bytes"].map(String::from).to_vec()];
            let row = |t: &TensorReport| {
                vec![t.name.clone(), format!("{:?}", t.shape), t.storage.clone(), human::bytes(t.bytes)]
            };
            rows.extend(tensors.iter().map(row));
            text += &format!("\n{}", human::table(&rows));
        }
        text += &format!("\n{}", self.memory_text());
        for (what, names) in [("missing", &self.missing), ("not read by this architecture", &self.unused)] {
            if !names.is_empty() {
                let more = if names.len() > 5 { ", …" } else { "" };
                text += &format!("\n{what}: {} ({}{more})\n", names.len(), names[..names.len().min(5)].join(", "));
            }
        }
        text
    }
}

impl InspectReport {
    /// Memory by component: running beside training.
    fn memory_text(&self) -> String {
        let title = format!("memory at context {}, batch {}", self.context, self.batch);
        let mut rows = vec![vec![title, "run".to_owned()]];
        rows[0].extend(self.train.iter().map(|t| format!("train, {}", t.recipe)));
        let mut row = |name: &str, run: Option<u64>, train: fn(&TrainReport) -> Option<u64>| {
            let cell = |v: Option<u64>| v.map_or_else(|| "–".to_owned(), human::bytes);
            let mut cells = vec![name.to_owned(), cell(run)];
            cells.extend(self.train.iter().map(|t| cell(train(t))));
            rows.push(cells);
        };
        row("  weights", Some(self.run.weights), |t| Some(t.weights));
        row("  gradients", None, |t| Some(t.gradients));
        row("  optimizer", None, |t| Some(t.optimizer));
        row("  KV cache", Some(self.run.kv_cache), |_| None);
        row("  activations", Some(self.run.activations), |t| Some(t.activations));
        row("  logits", Some(self.run.logits), |t| Some(t.logits));
        row("  program", Some(self.run.program), |_| None);
        row("  total", Some(self.run.total), |t| Some(t.total));
        human::table(&rows)
    }
}

fn rows(title: &str, groups: &[Group], all: u64) -> Vec<Vec<String>> {
    let mut rows = vec![[title, "tensors", "parameters", "bytes", "share"].map(String::from).to_vec()];
    rows.extend(groups.iter().map(|g| {
        let share = human::percent(g.bytes as f64 / all.max(1) as f64);
        vec![g.name.clone(), g.tensors.to_string(), human::count(g.parameters), human::bytes(g.bytes), share]
    }));
    rows
}

/// Neighbouring blocks of equal size in one row.
fn merge_equal(layers: &[Group]) -> Vec<Group> {
    let block = |g: &Group| g.name.starts_with("block ");
    let equal = |a: &Group, b: &Group| {
        block(a) && block(b) && (a.tensors, a.parameters, a.bytes) == (b.tensors, b.parameters, b.bytes)
    };
    let run = |run: &[Group]| {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let mut group = first.clone();
        if run.len() > 1 {
            let number = last.name.trim_start_matches("block ");
            group.name = format!("blocks {}–{number}, each", first.name.trim_start_matches("block "));
        }
        group
    };
    layers.chunk_by(equal).map(run).collect()
}
