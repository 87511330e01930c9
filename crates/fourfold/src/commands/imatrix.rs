//! `fourfold imatrix`: llama.cpp's importance matrix of a model over some text.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use fourfold_compress::calibrate::Hidden;
use fourfold_disk::{PartialFile, output_file};
use fourfold_formats::gguf::imatrix::{Imatrix, Importance};
use fourfold_formats::gguf::{Arch, Target};
use fourfold_infer::eval::{Protocol, windows};
use fourfold_kernels::Tensor;
use fourfold_models::{Block, BlockSpec, FeedForward, Observer};
use serde::Serialize;

use crate::context::Context;
use crate::gguf::architecture;
use crate::output::Report;
use crate::{data_files, human, limits, memory, model};

#[derive(Args)]
pub struct ImatrixArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// The file to write: .gguf, or .dat for llama.cpp's older form.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// The text to run through the model.
    #[arg(short = 'f', long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a chunk [default: 512, or all positions of a model that has fewer].
    #[arg(short, long, value_name = "TOKENS", value_parser = limits::EVAL_CONTEXT)]
    context: Option<usize>,
    /// Read the first N chunks only.
    #[arg(long, value_name = "N", value_parser = limits::WINDOWS)]
    chunks: Option<u32>,
}

#[derive(Serialize)]
struct ImatrixReport {
    model: String,
    out: String,
    entries: usize,
    tokens: usize,
    seconds: f64,
    peak_memory: Option<u64>,
}

/// Sums of squares by weight.
#[derive(Default)]
struct Squares {
    sums: HashMap<String, (Vec<f64>, u64)>,
}

impl Observer for Squares {
    fn linear_input(&mut self, weight_name: &str, input: &Tensor) {
        let (sums, tokens) = self.sums.entry(weight_name.to_owned()).or_insert_with(|| (vec![0.0; input.cols()], 0));
        for row in input.host().chunks_exact(input.cols()) {
            sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
        }
        *tokens += input.rows() as u64;
    }
}

pub fn run(args: &ImatrixArgs, context: &Context) -> Result<()> {
    let start = Instant::now();
    let old = match args.out.extension().and_then(|e| e.to_str()) {
        Some("gguf") => false,
        Some("dat") => true,
        _ => bail!("{}: an importance matrix is a .gguf or a .dat file", args.out.display()),
    };
    let inputs = [("MODEL".to_owned(), PathBuf::from(&args.model)), ("--text".to_owned(), args.text.clone())];
    let place = output_file(&args.out, &inputs)?;
    let open = model::open(&args.model, context)?;
    let arch = architecture(&open.spec)?;
    let length = args.context.unwrap_or(open.spec.max_positions.min(512));
    if length > open.spec.max_positions {
        bail!("--context {length}: the model has {} positions", open.spec.max_positions);
    }
    let text = data_files::text(&args.text)?;
    let tokenizer = open.tokenizer()?;
    let limit = args.chunks.map(|n| n as usize);
    let ids = tokenizer.encode_prefix(&text, limit.map_or(usize::MAX / 16, |n| n.saturating_mul(length)))?;
    let chunks = windows(&ids, tokenizer.bos(), length, Protocol::Chunks, limit);
    let chunks = chunks.with_context(|| args.text.display().to_string())?;
    let sequences: Vec<Vec<u32>> = chunks.into_iter().map(|chunk| chunk.ids).collect();

    let (spec, source) = (&open.spec, &*open.checkpoint.weights);
    let bar = context.progress.bar("imatrix", spec.blocks.len() as u64, "blocks");
    let mut hidden = Hidden::embed(spec, source, &context.backend, &sequences)?;
    let mut entries: BTreeMap<String, Importance> = BTreeMap::new();
    for index in 0..spec.blocks.len() {
        let block = Block::load(spec, index, source, &context.backend)?;
        let mut squares = Squares::default();
        hidden.forward(spec, index, &block, &mut squares, true);
        add(arch, &spec.blocks[index], &squares, &mut entries);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let imatrix = Imatrix {
        entries,
        datasets: vec![args.text.display().to_string()],
        chunks: sequences.len() as u32,
        chunk_size: length as u32,
    };
    let mut file = PartialFile::create(&place)?;
    file.write_all(&if old { imatrix.to_dat() } else { imatrix.to_gguf() })?;
    file.finish()?;
    context.print(&ImatrixReport {
        model: args.model.clone(),
        out: args.out.display().to_string(),
        entries: imatrix.entries.len(),
        tokens: sequences.iter().map(Vec::len).sum(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
    })
}

/// A block's sums as entries; experts that no token reached have none of their own.
fn add(arch: Arch, block: &BlockSpec, squares: &Squares, entries: &mut BTreeMap<String, Importance>) {
    let experts = match &block.feed_forward {
        FeedForward::Moe(moe) => moe.router.experts,
        FeedForward::Mlp(_) => 0,
    };
    for weight in block.weights().iter().filter(|w| w.shape.len() == 2) {
        let (name, index, rows) = match arch.target(&weight.name) {
            Some(Target::Tensor(name) | Target::QueryRows(name) | Target::KeyRows(name)) => (name, 0, 1),
            Some(Target::Expert(name, index)) => (name, index as usize, experts),
            // The halves of `kv_b_proj` are multiplied with other inputs in llama.cpp.
            Some(Target::KeyValueUp { .. }) | None => continue,
        };
        let cols = weight.shape[1];
        let Some((sums, tokens)) = squares.sums.get(&weight.name) else { continue };
        let entry = entries
            .entry(name)
            .or_insert_with(|| Importance { means: vec![1.0; rows * cols], counts: vec![0.0; rows] });
        let mean = sums.iter().map(|&sum| (sum / *tokens as f64) as f32);
        entry.means[index * cols..(index + 1) * cols].iter_mut().zip(mean).for_each(|(to, v)| *to = v);
        entry.counts[index] = *tokens as f32;
    }
}

impl Report for ImatrixReport {
    fn text(&self) -> String {
        let peak = self.peak_memory.map(|m| format!(", peak memory {}", human::bytes(m))).unwrap_or_default();
        format!(
            "{} -> {}: {} entries, {} tokens\n{}{peak}\n",
            self.model,
            self.out,
            self.entries,
            self.tokens,
            human::duration(Duration::from_secs_f64(self.seconds))
        )
    }
}
