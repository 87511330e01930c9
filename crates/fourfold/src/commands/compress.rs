//! `fourfold compress`: writes a smaller checkpoint.

mod choice;
mod gguf;
mod identity;
mod images;
mod time;
mod words;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, bail};
use clap::{Args, ValueEnum};
use fourfold_compress::gate::Gate;
use fourfold_compress::methods::quantize::gptq::Gptq;
use fourfold_compress::methods::quantize::grid::{Granularity, GridSpec, Levels, ScaleFormat, ScaleRule, ZeroKind};
use fourfold_compress::planner::{block_candidates, candidates, restrict};
use fourfold_compress::recipe::Recipe;
use fourfold_compress::report::ExpertReach;
use fourfold_compress::{CompressError, CompressJob, Goal, Outcome, Plan, Scope, compress, outcome};
use fourfold_formats::gguf::write::GgufWriter;
use fourfold_formats::regular;
use fourfold_formats::writer::{ModelFiles, SafetensorsWriter, WriteOptions, header_bytes};
use fourfold_tensor::{Form, WeightSink};
use serde::Serialize;
use serde_json::{Value, json};

use self::choice::{Bits, ChoiceArgs, Effort, bits};
use super::calibration::{CalibrationArgs, Sequences};
use crate::context::Context;
use crate::gguf::{Sizes, is_named};
use crate::model;
use crate::output::Report;
use crate::progress::Stages;
use crate::{human, limits, memory};

#[derive(Args)]
pub struct CompressArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// The directory to write, or a .gguf file for llama.cpp, Ollama and LM Studio: each matrix gets one of ggml's types, rounded with errors fed back. A directory grows as OUT.partial and takes its name when it is whole; a run that was killed is taken up where
    /// it stopped by giving the same command again (there is no --resume).
    #[arg(value_name = "OUT", required_unless_present_any = ["write_plan", "out_flag"])]
    out: Option<PathBuf>,
    /// The same as OUT.
    #[arg(short = 'o', long = "output", value_name = "OUT", conflicts_with = "out")]
    out_flag: Option<PathBuf>,
    /// How many times smaller all weight files together become; settings are chosen tensor by tensor [default: 4].
    #[arg(long, value_name = "R", conflicts_with_all = ["max_bytes", "bits", "plan"], value_parser = limits::RATIO)]
    ratio: Option<f64>,
    /// The size of all weight files together: 500MB, 4GB, 2GiB.
    #[arg(long, alias = "bytes", value_name = "SIZE", conflicts_with_all = ["bits", "plan"], value_parser = human::parse_bytes)]
    max_bytes: Option<u64>,
    /// 4: the same grid of 4 bits for every matrix. 4.0, with a point: a size of so many bits a parameter for all weight files together,
    /// scales, embeddings and headers counted; settings are chosen tensor by tensor, as for --ratio.
    #[arg(long, value_name = "N", conflicts_with = "plan", value_parser = bits)]
    bits: Option<Bits>,
    /// Follow this plan, a JSON file as --write-plan writes it.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Write the plan to a file ("-" for stdout) and compress nothing.
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    write_plan: Option<PathBuf>,
    /// How codes are found: `gptq`, by calibration text, or `rtn` (round to nearest), which reads none, takes seconds and costs several
    /// times the quality at the same size [default: gptq, or rtn for a model without a tokenizer]. Or
    /// one recipe for all linear layers, of which several parts are joined by commas: quantize:4, prune:0.5 or prune:2:4 (or
    /// magnitude:, wanda:, sparsegpt: instead of prune:), svd:64. Recipes that prune or decompose leave embeddings as they are. For
    /// convolutional networks: tucker:AMOUNT or cp:AMOUNT (convolutions), svd:AMOUNT (linear layers, and convolutions without one of
    /// these), an AMOUNT being a rank or a share of the largest; prune:0.5, prune:2:4 or global:0.5; quantize:BITS.
    #[arg(long, value_name = "METHOD", value_parser = method)]
    method: Option<Words>,
    /// Biases too: N bits, one scale for each [default: 8]. Norms and routers stay as they are.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8", require_equals = true,
          conflicts_with = "plan", value_parser = clap::value_parser!(u8).range(2..=8))]
    quantize_biases: Option<u8>,
    /// Whether embeddings (and an output head tied to them) are compressed [default: pack; with --format compressed-tensors keep].
    #[arg(long, value_name = "WHAT", conflicts_with = "plan")]
    embedding: Option<EmbeddingArg>,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// The grid of --bits.
#[derive(Args)]
#[command(next_help_heading = "Grid (with --bits)")]
struct GridArgs {
    /// Columns that share a scale, or `channel` or `tensor`.
    #[arg(long, value_name = "N", default_value = "64", value_parser = granularity, requires = "bits")]
    group_size: Granularity,
    /// Zero in the middle of the grid (the default).
    #[arg(long, requires = "bits", conflicts_with = "asymmetric")]
    symmetric: bool,
    /// A zero point for each group.
    #[arg(long, requires = "bits")]
    asymmetric: bool,
    /// Levels where they suit each tensor best instead of evenly spaced; up to 4 bits.
    #[arg(long, requires = "bits", conflicts_with = "asymmetric")]
    learned_levels: bool,
    /// How scales are stored; `double` takes a byte a group.
    #[arg(long, value_name = "TYPE", default_value = "f16", requires = "bits")]
    scales: ScalesArg,
    /// How scales are chosen: `absmax` is the textbook's, `search` minimises the error.
    #[arg(long, value_name = "RULE", default_value = "search", requires = "bits")]
    scale_rule: RuleArg,
}

/// Where and how the output is written.
#[derive(Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// `fourfold` is the smallest, and read by this program alone: transformers refuses it. `compressed-tensors` is what `AutoModelForCausalLM.from_pretrained(OUT)` loads as it is: even levels, float
    /// scales, groups that divide the row, one format for all routed experts, the embedding kept dense (transformers cannot load a
    /// packed one) and, with --bits, symmetric (it cannot load zero points). `gguf`, which OUT.gguf says too: ggml's types.
    #[arg(long, value_name = "FORMAT", default_value = "fourfold")]
    format: FormatArg,
    /// GGUF: an importance matrix (.gguf or .dat, as `fourfold imatrix` and llama-imatrix write them) in the place of calibration text.
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    imatrix: Option<PathBuf>,
    /// GGUF: split into files of at most so many bytes of tensors, named as llama.cpp names them.
    #[arg(long, value_name = "SIZE", value_parser = human::parse_bytes)]
    split_size: Option<u64>,
    /// Most bytes of a weight file.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = human::parse_bytes)]
    max_shard_size: u64,
    /// Replace OUT if it exists, and what an interrupted run of other settings left.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum MethodArg {
    Rtn,
    Gptq,
    Recipe(Recipe),
}

/// A method in words. Which kind of network it is for shows when the model is open.
#[derive(Clone, Debug)]
struct Words {
    text: String,
    /// What it means for a language model, if anything.
    method: Result<MethodArg, String>,
}

fn method(text: &str) -> Result<Words, String> {
    let method = match text {
        "rtn" => Ok(MethodArg::Rtn),
        "gptq" => Ok(MethodArg::Gptq),
        recipe => recipe.parse().map(MethodArg::Recipe),
    };
    match method {
        Err(error) if text.parse::<fourfold_compress::convnet::Recipe>().is_err() => Err(error),
        method => Ok(Words { text: text.to_owned(), method }),
    }
}

impl MethodArg {
    fn needs_text(self) -> bool {
        match self {
            Self::Rtn => false,
            Self::Gptq => true,
            Self::Recipe(recipe) => recipe.needs_text(),
        }
    }

    /// Whether embeddings stay unless asked for otherwise.
    fn is_for_layers(self) -> bool {
        matches!(self, Self::Recipe(recipe) if recipe.is_for_layers())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Fourfold,
    CompressedTensors,
    Gguf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EmbeddingArg {
    /// Left as it is.
    Keep,
    /// Compressed like a linear layer.
    Pack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScalesArg {
    F16,
    Bf16,
    F32,
    Double,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RuleArg {
    Absmax,
    Search,
}

fn granularity(text: &str) -> Result<Granularity, String> {
    match (text, text.parse::<usize>()) {
        ("tensor", _) => Ok(Granularity::Tensor),
        ("channel", _) => Ok(Granularity::Channel),
        (_, Ok(n)) => limits::GROUP.check("--group-size", n).map(Granularity::Group).map_err(|e| e.to_string()),
        _ => Err("a number of columns, `channel` or `tensor` is expected".to_owned()),
    }
}

impl GridArgs {
    fn spec(&self, bits: u8) -> GridSpec {
        GridSpec {
            bits,
            granularity: self.group_size,
            scales: match self.scales {
                ScalesArg::F16 => ScaleFormat::F16,
                ScalesArg::Bf16 => ScaleFormat::Bf16,
                ScalesArg::F32 => ScaleFormat::F32,
                ScalesArg::Double => ScaleFormat::Double,
            },
            zero: if self.asymmetric { ZeroKind::ZeroPoint } else { ZeroKind::Symmetric },
            levels: if self.learned_levels { Levels::Learned } else { Levels::Uniform },
            rule: match self.scale_rule {
                RuleArg::Absmax => ScaleRule::Absmax,
                RuleArg::Search => ScaleRule::Search,
            },
        }
    }
}

#[derive(Serialize)]
struct CompressReport {
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<String>,
    /// Bytes of the source's tensors, those that the architecture does not read left out.
    source_bytes: u64,
    /// Bytes of the output's tensors.
    output_bytes: u64,
    /// Of the tensors.
    ratio: f64,
    /// Bytes of the source's weight files, headers included, less the tensors that are not read.
    source_file_bytes: u64,
    /// Bytes of the output's weight files, headers included.
    output_file_bytes: u64,
    /// Of the files.
    file_ratio: f64,
    bits_per_parameter: f64,
    calibration_tokens: usize,
    /// The output against the source on text that was kept out of the calibration.
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<Outcome>,
    seconds: f64,
    /// What was said before the work began.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_seconds: Option<f64>,
    /// What of that each stage took.
    stages: Vec<StageReport>,
    peak_memory: Option<u64>,
    /// How many tensors and bytes each kind of storage has.
    storage: Vec<Storage>,
    /// Tensors of the source that the architecture does not read.
    dropped: Vec<String>,
    /// The plan against the best uniform choice on held-out text.
    #[serde(skip_serializing_if = "Option::is_none")]
    gate: Option<Gate>,
    /// Experts that the calibration text reached least: weight, tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    least_covered_experts: Vec<(String, u64)>,
    /// Experts that fewer calibration tokens reached than an expert's statistics need to stand for themselves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    experts_hardly_reached: Vec<ExpertReach>,
}

#[derive(Serialize)]
struct StageReport {
    stage: String,
    seconds: f64,
}

#[derive(Default, Serialize)]
struct Storage {
    name: String,
    tensors: usize,
    bytes: u64,
    /// Mean of the tensors' relative output errors.
    mean_error: f64,
}

impl CompressArgs {
    /// Where the output goes, by whichever of the two ways to say it.
    fn out(&self) -> Option<&PathBuf> {
        self.out.as_ref().or(self.out_flag.as_ref())
    }

    /// Whether the output is a GGUF file.
    fn is_gguf(&self) -> bool {
        self.output.format == FormatArg::Gguf || self.out().is_some_and(|out| is_named(out))
    }
}

pub fn run(args: &CompressArgs, context: &Context) -> Result<()> {
    let start = Instant::now();
    let place = identity::check_outputs(args)?;
    if let Some(network) = model::open_network(&args.model, context)? {
        return images::run(&network, args, place.as_deref(), context);
    }
    let open = model::open(&args.model, context)?;
    let asked = args.method.as_ref().map(|words| words.method.clone().map_err(Error::msg)).transpose()?;
    let effort = args.choice.effort(args.calibration.is_given());
    let sequences = match args.output.imatrix {
        Some(_) => Sequences::default(),
        None => args.calibration.sequences(&open, effort.samples())?,
    };
    // Round to nearest goes by the weights alone: it is the plain method that others are compared with.
    let method = match asked {
        Some(method) if method.needs_text() && sequences.calibration.is_empty() => {
            bail!("this --method needs --calibration FILE, and a tokenizer beside the model")
        }
        Some(method) => method,
        None if sequences.calibration.is_empty() || effort == Effort::Seconds => MethodArg::Rtn,
        None => MethodArg::Gptq,
    };
    let calibration: &[Vec<u32>] = if method == MethodArg::Rtn { &[] } else { &sequences.calibration };
    let goal = goal(args, method, open.spec.parameters(), !calibration.is_empty())?;
    let is_gguf = args.is_gguf();
    if is_gguf {
        gguf::check(args, &goal)?;
    }
    let checkpoint = &open.checkpoint;
    let unread = open.unread_bytes();
    let source_bytes = checkpoint.weight_bytes - unread;
    let mut job = CompressJob::new(&open.spec, &*checkpoint.weights, source_bytes, goal);
    let interchange = args.output.format == FormatArg::CompressedTensors;
    let embeddings = args.embedding.unwrap_or(if interchange || method.is_for_layers() {
        EmbeddingArg::Keep
    } else {
        EmbeddingArg::Pack
    });
    job.scope = Scope {
        embeddings: embeddings == EmbeddingArg::Pack,
        biases: args.quantize_biases.map(|bits| GridSpec::new(bits, Granularity::Tensor)),
        whole_groups: interchange,
        experts_alike: interchange,
        alike: args.choice.fusible,
        stacked: is_gguf,
    };
    for remark in words::before(args, &open, &job.scope, calibration) {
        context.remark(&remark);
    }
    // A form that cannot be written is an error when it is declared, with its name.
    let header = |forms: &[(String, Form)]| header_bytes(forms, args.output.max_shard_size).unwrap_or(0);
    job.header = &header;
    let described = if is_gguf { Some(gguf::describe(args, &open, &job, context)?) } else { None };
    let sizes = described.as_ref().map(Sizes::new);
    let (gguf_header, gguf_bytes);
    if let Some(sizes) = &sizes {
        gguf_header = |forms: &[(String, Form)]| sizes.header(forms);
        gguf_bytes = |name: &str, form: &Form| sizes.tensor(name, form);
        (job.header, job.bytes) = (&gguf_header, &gguf_bytes);
    }
    let moments = args.output.imatrix.as_ref().map(|file| crate::gguf::moments(file, &open.spec)).transpose()?;
    let moments = |name: &str, inputs: usize| moments.as_ref().and_then(|of| of(name, inputs));
    job.moments = &moments;
    job.uniform = args.choice.uniform;
    let all = if is_gguf { block_candidates() } else { candidates(interchange) };
    let only = match args.choice.only.as_slice() {
        // The types of GGUF are of one kind.
        [] if !is_gguf => effort.kinds(),
        only => only,
    };
    job.candidates = restrict(all, only, &args.choice.exclude);
    if !calibration.is_empty() {
        job.backend = Some(context.backend.clone());
        job.backward = Some(context.backward.clone());
        job.calibration = calibration;
        let has_gate = effort.has_gate() && !args.choice.no_gate;
        job.held_out = if has_gate { &sequences.held_out } else { &[] };
    }
    let estimated_seconds = time::estimate(&job);
    if let Some(seconds) = estimated_seconds {
        context.remark(&format!("this takes about {} here", human::duration(Duration::from_secs_f64(seconds))));
    }
    let mut stages = Stages::new(context.progress, "compress", time::shares(&job));
    if let Some(file) = &args.write_plan {
        let plan = job.plan(&mut stages)?;
        stages.finish();
        return write_plan(file, &plan);
    }
    let Some(out) = &place else { bail!("OUT is missing") };
    let options = WriteOptions {
        max_shard_bytes: args.output.max_shard_size,
        overwrite: args.output.overwrite,
        identity: identity::of(args, &checkpoint.path, context)?,
        interchange,
    };
    let sink: Box<dyn WeightSink> = match described {
        Some(model) => Box::new(GgufWriter::new(out, model, args.output.split_size, args.output.overwrite)),
        None => Box::new(SafetensorsWriter::create(out, ModelFiles::of(checkpoint), options)?),
    };
    let done = compress(&job, sink, &mut stages).map_err(|error| match error {
        CompressError::Budget { smallest, .. } => {
            let possible = words::possible(smallest, source_bytes, open.spec.parameters(), job.scope.embeddings);
            anyhow::Error::new(error).context(possible)
        }
        CompressError::Model(_) => anyhow::Error::new(error).context(checkpoint.path.display().to_string()),
        error => error.into(),
    })?;
    let first = gguf::first_file(out, is_gguf);
    let written = fourfold_formats::open(&first)?;
    let outcome = match sequences.held_out.as_slice() {
        [] => None,
        held_out => {
            let new = model::open(&first.display().to_string(), &context.silent())?;
            let (old, new) = (&*checkpoint.weights, &*new.checkpoint.weights);
            Some(outcome(&open.spec, old, new, &context.backend, held_out, &mut stages)?)
        }
    };
    let stages = stages.finish();
    let (output_bytes, output_file_bytes) = (written.weight_bytes, written.file_bytes);
    let source_file_bytes = checkpoint.file_bytes - unread;
    let mut least: Vec<(String, u64)> = done.coverage.into_iter().collect();
    least.sort_by(|a, b| a.1.cmp(&b.1).then(a.0.cmp(&b.0)));
    least.truncate(5);
    context.print(&CompressReport {
        model: args.model.clone(),
        out: args.out().map(|out| out.display().to_string()),
        source_bytes,
        output_bytes,
        ratio: source_bytes as f64 / output_bytes as f64,
        source_file_bytes,
        output_file_bytes,
        file_ratio: source_file_bytes as f64 / output_file_bytes as f64,
        bits_per_parameter: output_bytes as f64 * 8.0 / open.spec.parameters() as f64,
        calibration_tokens: calibration.iter().map(Vec::len).sum(),
        outcome,
        estimated_seconds,
        stages: stages.into_iter().map(|(stage, seconds)| StageReport { stage, seconds }).collect(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
        storage: storage(&done.plan),
        dropped: done.dropped,
        gate: done.gate,
        least_covered_experts: least,
        experts_hardly_reached: done.hardly_reached,
    })
}

fn goal(args: &CompressArgs, method: MethodArg, parameters: u64, with_text: bool) -> Result<Goal> {
    if let Some(file) = &args.plan {
        let text = regular::read_text(file, limits::MOST_BYTES).with_context(|| file.display().to_string())?;
        return Ok(Goal::Plan(Plan::from_json(&text).with_context(|| file.display().to_string())?));
    }
    if let MethodArg::Recipe(recipe) = method {
        if args.bits.is_some() || args.ratio.is_some() || args.max_bytes.is_some() {
            bail!("--method with a recipe says all itself: leave out --bits, --ratio and --max-bytes");
        }
        let (method, settings) = recipe.method(with_text);
        return Ok(Goal::Uniform { method: method.to_owned(), settings });
    }
    if let Some(Bits::Average(bits)) = args.bits {
        return Ok(Goal::Bytes((bits * parameters as f64 / 8.0) as u64));
    }
    if let Some(Bits::Grid(bits)) = args.bits {
        let grid = args.grid.spec(bits);
        grid.validate()?;
        let (method, settings): (&str, Value) = match method {
            MethodArg::Rtn | MethodArg::Recipe(_) => ("rtn", json!(grid)),
            MethodArg::Gptq => ("gptq", serde_json::to_value(Gptq::new(grid))?),
        };
        return Ok(Goal::Uniform { method: method.to_owned(), settings });
    }
    Ok(match args.max_bytes {
        Some(bytes) => Goal::Bytes(bytes),
        None => Goal::Ratio(args.ratio.unwrap_or(4.0)),
    })
}

fn write_plan(file: &std::path::Path, plan: &Plan) -> Result<()> {
    let text = plan.to_json() + "\n";
    if file.as_os_str() == "-" {
        return crate::output::write(&text);
    }
    Ok(fourfold_disk::write_whole(&fourfold_disk::output_file(file, &[])?, text.as_bytes())?)
}

/// The plan's tensors by the words of their method and grid.
fn storage(plan: &Plan) -> Vec<Storage> {
    let mut found: Vec<Storage> = Vec::new();
    for entry in &plan.tensors {
        let name = entry.format().map_or_else(|| entry.method.clone(), |grid| format!("{} {grid}", entry.method));
        let at = found.iter().position(|s| s.name == name).unwrap_or_else(|| {
            found.push(Storage { name, ..Storage::default() });
            found.len() - 1
        });
        found[at].tensors += 1;
        found[at].bytes += entry.bytes;
        found[at].mean_error += entry.error.unwrap_or(0.0);
    }
    for storage in &mut found {
        storage.mean_error /= storage.tensors as f64;
    }
    found.sort_by_key(|s| std::cmp::Reverse(s.bytes));
    found
}

impl Report for CompressReport {
    fn text(&self) -> String {
        let mut rows = vec![["stored as", "tensors", "bytes", "mean error"].map(String::from).to_vec()];
        rows.extend(self.storage.iter().map(|s| {
            vec![s.name.clone(), s.tensors.to_string(), human::bytes(s.bytes), format!("{:.2e}", s.mean_error)]
        }));
        let mut text = human::table(&rows);
        text += &format!(
            "\n{} -> {}: tensors {} -> {}, {:.3} : 1, {:.3} bits a parameter; files {} -> {}, {:.3} : 1\n",
            self.model,
            self.out.as_deref().unwrap_or("-"),
            human::bytes(self.source_bytes),
            human::bytes(self.output_bytes),
            self.ratio,
            self.bits_per_parameter,
            human::bytes(self.source_file_bytes),
            human::bytes(self.output_file_bytes),
            self.file_ratio
        );
        let peak = self.peak_memory.map(|m| format!(", peak memory {}", human::bytes(m))).unwrap_or_default();
        text += &format!("{}{peak}\n", human::duration(Duration::from_secs_f64(self.seconds)));
        if let Some(gate) = &self.gate {
            let (used, than) = if gate.passed { ("used", "less than") } else { ("not used", "no less than") };
            text += &format!(
                "on {} held-out tokens the plan diverges by {:.4} nats, {than} {:.4} of the best uniform choice of no more bytes ({}): it is {used}\n",
                gate.tokens,
                gate.planned,
                gate.uniform,
                gate.uniform_formats.join(", ")
            );
        }
        if !self.dropped.is_empty() {
            let names = self.dropped[..self.dropped.len().min(5)].join(", ");
            text += &format!("left out, as the architecture does not read them: {} ({names})\n", self.dropped.len());
        }
        if !self.experts_hardly_reached.is_empty() {
            text += &words::hardly_reached(&self.experts_hardly_reached, self.calibration_tokens);
        } else if let Some((name, tokens)) = self.least_covered_experts.first() {
            text += &format!("the calibration text's least used expert: {name}, {tokens} tokens\n");
        }
        if let Some(outcome) = &self.outcome {
            text += &words::cost(outcome);
        }
        if let Some(out) = &self.out {
            text += &words::next(&self.model, out);
        }
        text
    }
}
