//! `fourfold merge`: writes a model with an adapter inside its weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use fourfold_compress::merge::{Merged, Packed};
use fourfold_compress::{CompressJob, Goal, compress};
use fourfold_disk::{Identity, Inputs, Use, output_directory};
use fourfold_formats::writer::{ModelFiles, SafetensorsWriter, WriteOptions};
use fourfold_tensor::WeightSource;
use serde::Serialize;

use super::calibration::CalibrationArgs;
use crate::context::Context;
use crate::model::{self, OpenModel};
use crate::output::Report;
use crate::progress::Stages;
use crate::{human, identity, memory};

#[derive(Args)]
pub struct MergeArgs {
    /// The model beside which the adapter was trained: a directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "BASE")]
    base: String,
    /// The adapter: a directory in PEFT's format (LoRA).
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The directory to write; it takes its name when it is whole.
    #[arg(value_name = "OUT", required_unless_present = "out_flag")]
    out: Option<PathBuf>,
    /// The same as OUT.
    #[arg(short = 'o', long = "output", value_name = "OUT", conflicts_with = "out")]
    out_flag: Option<PathBuf>,
    /// What becomes of packed weights. `sum` keeps their codes and stores the adapter's factors beside them: exact, some percent larger,
    /// read by this program alone. `requantize` rounds them again on their own grid (with --calibration by GPTQ), which loses part of
    /// what was learned. Dense weights take the adapter in either way.
    #[arg(long, value_name = "HOW", default_value = "sum")]
    packed: PackedArg,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Most bytes of a weight file.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = human::parse_bytes)]
    max_shard_size: u64,
    /// Replace OUT if it exists.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PackedArg {
    Sum,
    Requantize,
}

#[derive(Serialize)]
struct MergeReport {
    out: PathBuf,
    /// Tensors that took an adapter in.
    merged: usize,
    /// Of these, packed ones that were rounded again.
    requantized: usize,
    base_bytes: u64,
    output_bytes: u64,
    seconds: f64,
    peak_memory: Option<u64>,
}

pub fn run(args: &MergeArgs, context: &Context) -> Result<()> {
    let start = Instant::now();
    let Some(out) = args.out.as_ref().or(args.out_flag.as_ref()) else { bail!("OUT is missing") };
    let mut read = vec![("BASE".to_owned(), PathBuf::from(&args.base)), ("ADAPTER".to_owned(), args.adapter.clone())];
    read.extend(args.calibration.files().iter().map(|file| ("--calibration".to_owned(), file.clone())));
    let place = output_directory(out, &read, Use::Replaced)?;
    SafetensorsWriter::check(&place, args.overwrite)?;
    let base = model::open(&args.base, context)?;
    let base_bytes = base.checkpoint.weight_bytes - base.unread_bytes();
    let open = base.adapted(&args.adapter)?;
    let calibration = args.calibration.sequences(&open, 32)?.calibration;
    let files = ModelFiles::of(&open.checkpoint);
    let OpenModel { checkpoint, spec } = open;
    let packed = match args.packed {
        PackedArg::Sum => Packed::Sum,
        PackedArg::Requantize => Packed::Requantize,
    };
    let adapted: Arc<dyn WeightSource> = Arc::from(checkpoint.weights);
    let merged = Merged::new(adapted, packed);
    let plan = merged.plan(&spec, !calibration.is_empty())?;
    let requantized = plan.tensors.iter().filter(|entry| entry.method != "keep").count();
    let mut job = CompressJob::new(&spec, &merged, base_bytes, Goal::Plan(plan));
    if requantized > 0 {
        job.backend = Some(context.backend.clone());
        job.calibration = &calibration;
    }
    let options = WriteOptions {
        max_shard_bytes: args.max_shard_size,
        overwrite: args.overwrite,
        identity: identity(args, &checkpoint.path, context)?,
        interchange: false,
    };
    let sink = SafetensorsWriter::create(&place, files, options)?;
    let mut stages = Stages::new(context.progress, "merge", &[("compress", 1.0)]);
    let done = compress(&job, Box::new(sink), &mut stages)?;
    stages.finish();
    context.print(&MergeReport {
        out: out.clone(),
        merged: done.plan.tensors.iter().filter(|entry| merged.has_adapter(&entry.name)).count(),
        requantized,
        base_bytes,
        output_bytes: fourfold_formats::open(&place)?.weight_bytes,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
    })
}

/// What decides the bytes of the output. Every setting is named here: one that is added is decided on before this compiles.
fn identity(args: &MergeArgs, base: &Path, context: &Context) -> Result<Identity> {
    let MergeArgs { base: _, adapter, out: _, out_flag: _, packed, calibration, max_shard_size, overwrite: _ } = args;
    let mut inputs = Inputs::default();
    identity::model(&mut inputs, "BASE", base)?;
    identity::model(&mut inputs, "ADAPTER", adapter)?;
    identity::files(&mut inputs, "--calibration", calibration.files())?;
    let mut identity = identity::of(&inputs, context)?;
    identity.set("--packed", format!("{packed:?}"));
    identity.set("--max-shard-size", max_shard_size);
    calibration.identify(&mut identity);
    Ok(identity)
}

impl Report for MergeReport {
    fn text(&self) -> String {
        let rounded = match self.requantized {
            0 => String::new(),
            n => format!(" ({n} of them rounded again)"),
        };
        format!(
            "{}: {} weights took the adapter in{rounded}, {} -> {}\n{}{}\n",
            self.out.display(),
            self.merged,
            human::bytes(self.base_bytes),
            human::bytes(self.output_bytes),
            human::duration(Duration::from_secs_f64(self.seconds)),
            self.peak_memory.map(|m| format!(", peak memory {}", human::bytes(m))).unwrap_or_default()
        )
    }
}
