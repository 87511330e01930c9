//! `fourfold export`: a model for other programs, as GGUF or as a plain Hugging Face directory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use fourfold_compress::plan::{Entry, Plan, is_compressible};
use fourfold_compress::{CompressJob, Goal, compress};
use fourfold_disk::{Inputs, Use, output_directory, write_whole};
use fourfold_formats::gguf::write::GgufWriter;
use fourfold_formats::writer::{ModelFiles, SafetensorsWriter, WriteOptions};
use fourfold_tensor::WeightSink;
use serde::Serialize;
use serde_json::json;

use crate::context::Context;
use crate::gguf::{self, TypeArg, modelfile, parse_type};
use crate::model::{self, OpenModel};
use crate::output::Report;
use crate::progress::Stages;
use crate::{human, identity, memory};

#[derive(Args)]
pub struct ExportArgs {
    /// A directory, a .gguf file, or a name on the hub: everything that fourfold reads.
    #[arg(value_name = "MODEL")]
    model: String,
    /// The .gguf file, or with --format safetensors the directory, to write.
    #[arg(value_name = "OUT", required_unless_present = "out_flag")]
    out: Option<PathBuf>,
    /// The same as OUT.
    #[arg(short = 'o', long = "output", value_name = "OUT", conflicts_with = "out")]
    out_flag: Option<PathBuf>,
    /// `gguf`: a file for llama.cpp, Ollama, LM Studio. `safetensors`: the dense bf16 checkpoint with every side file, for
    /// transformers, vLLM and others [default: gguf].
    #[arg(long, value_name = "FORMAT", default_value = "gguf")]
    format: FormatArg,
    /// What matrices are stored as in GGUF: auto (as they are, where GGUF has such a type; what is packed otherwise becomes f16), f32, f16, bf16,
    /// q8_0, q6_k, q5_k, q4_k, q3_k, q2_k, q5_1, q5_0, q4_1, q4_0, iq4_nl, iq4_xs. Rows that do not divide into a type's blocks get another type.
    /// `fourfold compress MODEL OUT.gguf --calibration TEXT` loses less at the same size.
    #[arg(long = "type", value_name = "TYPE", default_value = "auto", value_parser = parse_type)]
    kind: TypeArg,
    /// An importance matrix (.gguf or .dat), as `fourfold imatrix` and llama-imatrix write them: rounding to blocks goes by it.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Split into files of at most so many bytes of tensors, named as llama.cpp names them; the first is the one to open.
    #[arg(long, value_name = "SIZE", value_parser = human::parse_bytes)]
    split_size: Option<u64>,
    /// Most bytes of a weight file (--format safetensors).
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = human::parse_bytes)]
    max_shard_size: u64,
    /// Write an Ollama Modelfile beside the GGUF file: OUT.Modelfile.
    #[arg(long)]
    modelfile: bool,
    /// Replace OUT if it exists.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Gguf,
    Safetensors,
}

#[derive(Serialize)]
struct ExportReport {
    model: String,
    files: Vec<String>,
    file_bytes: u64,
    /// Matrices whose rows do not divide into the type's blocks, and that got another.
    other_types: usize,
    /// Tensors of the source that the architecture does not read.
    dropped: Vec<String>,
    seconds: f64,
    peak_memory: Option<u64>,
}

pub fn run(args: &ExportArgs, context: &Context) -> Result<()> {
    let start = Instant::now();
    let Some(out) = args.out.as_ref().or(args.out_flag.as_ref()) else { bail!("OUT is missing") };
    let mut inputs = vec![("MODEL".to_owned(), PathBuf::from(&args.model))];
    inputs.extend(args.imatrix.iter().map(|file| ("--imatrix".to_owned(), file.clone())));
    let place = match args.format {
        FormatArg::Gguf => {
            if !gguf::is_named(out) {
                bail!(
                    "{}: a GGUF file's name ends in .gguf; with --format safetensors a directory is written",
                    out.display()
                );
            }
            gguf::check_out(out, &inputs, args.overwrite)?
        }
        FormatArg::Safetensors => {
            if args.kind != TypeArg::Auto || args.split_size.is_some() || args.modelfile || args.imatrix.is_some() {
                bail!("--type, --imatrix, --split-size and --modelfile go with --format gguf");
            }
            let place = output_directory(out, &inputs, Use::Replaced)?;
            SafetensorsWriter::check(&place, args.overwrite)?;
            place
        }
    };
    let open = model::open(&args.model, context)?;
    let (files, other_types, dropped) = match args.format {
        FormatArg::Gguf => to_gguf(args, &open, &place, context)?,
        FormatArg::Safetensors => to_safetensors(args, &open, &place, context)?,
    };
    let file_bytes = files.iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum();
    context.print(&ExportReport {
        model: args.model.clone(),
        files: files.iter().map(|file| file.display().to_string()).collect(),
        file_bytes,
        other_types,
        dropped,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
    })
}

type Exported = (Vec<PathBuf>, usize, Vec<String>);

fn to_gguf(args: &ExportArgs, open: &OpenModel, place: &Path, context: &Context) -> Result<Exported> {
    let (plan, others) = gguf::plan_of_type(open, args.kind)?;
    if others > 0 {
        context.remark(&format!(
            "note: the rows of {others} matrices do not divide into blocks of this type; they get another"
        ));
    }
    let name = model_name(&args.model);
    let described = gguf::model(open, &name, gguf::file_type(&open.spec, &plan), context)?;
    let sink = GgufWriter::new(place, described, args.split_size, args.overwrite);
    let dropped = follow(open, plan, Box::new(sink), args.imatrix.as_deref(), context)?;
    let files = gguf::written_files(place);
    if args.modelfile {
        write_modelfile(open, &files, place)?;
    }
    Ok((files, others, dropped))
}

/// Runs a finished plan into a sink.
fn follow(
    open: &OpenModel,
    plan: Plan,
    sink: Box<dyn WeightSink + '_>,
    imatrix: Option<&Path>,
    context: &Context,
) -> Result<Vec<String>> {
    let checkpoint = &open.checkpoint;
    let mut job = CompressJob::new(&open.spec, &*checkpoint.weights, checkpoint.weight_bytes, Goal::Plan(plan));
    let moments = imatrix.map(|file| gguf::moments(file, &open.spec)).transpose()?;
    let moments = |name: &str, inputs: usize| moments.as_ref().and_then(|of| of(name, inputs));
    job.moments = &moments;
    let mut stages = Stages::new(context.progress, "export", &[("compress", 1.0)]);
    let done = compress(&job, sink, &mut stages)?;
    stages.finish();
    Ok(done.dropped)
}

fn to_safetensors(args: &ExportArgs, open: &OpenModel, place: &Path, context: &Context) -> Result<Exported> {
    let entry = |weight: &fourfold_models::WeightSpec| {
        let dense = open
            .checkpoint
            .weights
            .info(&weight.name)
            .is_some_and(|info| ["F32", "F16", "BF16"].contains(&info.storage.as_str()));
        // What is float and no matrix (norms, a router's correction) keeps its type, as in the checkpoints that were published.
        if dense && !is_compressible(weight) && weight.shape.len() < 2 {
            return Entry::keep(&weight.name);
        }
        Entry { method: "cast".to_owned(), settings: json!({"dtype": "bf16"}), ..Entry::keep(&weight.name) }
    };
    let plan = Plan { tensors: open.spec.weights().iter().map(entry).collect() };
    let mut inputs = Inputs::default();
    identity::model(&mut inputs, "MODEL", &open.checkpoint.path)?;
    let mut identity = identity::of(&inputs, context)?;
    identity.set("export", "safetensors".to_owned());
    let options =
        WriteOptions { max_shard_bytes: args.max_shard_size, overwrite: args.overwrite, identity, interchange: false };
    let sink = SafetensorsWriter::create(place, ModelFiles::of(&open.checkpoint), options)?;
    let dropped = follow(open, plan, Box::new(sink), None, context)?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(place)?.filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    Ok((files, 0, dropped))
}

/// Writes `OUT.Modelfile` beside the first file.
pub fn write_modelfile(open: &OpenModel, files: &[PathBuf], place: &Path) -> Result<()> {
    let Some(first) = files.first() else { return Ok(()) };
    let stops = match open.tokenizer() {
        Ok(tokenizer) => {
            let ids = open.stop_ids(&tokenizer);
            ids.iter().filter_map(|&id| tokenizer.id_to_token(id)).collect()
        }
        Err(_) => Vec::new(),
    };
    let text = modelfile::text(first, &stops, open.spec.max_positions);
    Ok(write_whole(&place.with_extension("Modelfile"), text.as_bytes())?)
}

/// What a model is called: its file's or directory's name.
pub fn model_name(model: &str) -> String {
    let path = Path::new(model);
    let stem = if gguf::is_named(path) { path.file_stem() } else { path.file_name() };
    stem.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

impl Report for ExportReport {
    fn text(&self) -> String {
        let mut text = match self.files.as_slice() {
            [one] => format!("{} -> {one}: {}", self.model, human::bytes(self.file_bytes)),
            [first, ..] => {
                format!(
                    "{} -> {first} and {} more: {}",
                    self.model,
                    self.files.len() - 1,
                    human::bytes(self.file_bytes)
                )
            }
            [] => self.model.clone(),
        };
        let peak = self.peak_memory.map(|m| format!(", peak memory {}", human::bytes(m))).unwrap_or_default();
        text += &format!("\n{}{peak}\n", human::duration(Duration::from_secs_f64(self.seconds)));
        if !self.dropped.is_empty() {
            let names = self.dropped[..self.dropped.len().min(5)].join(", ");
            text += &format!("left out, as the architecture does not read them: {} ({names})\n", self.dropped.len());
        }
        text
    }
}
