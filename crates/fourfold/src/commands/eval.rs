//! `fourfold eval`: how well a model predicts a text, and how far its predictions are from the original's.

mod images;
mod texts;

use std::io::{self, BufReader, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use fourfold_disk::{PartialFile, output_file};
use fourfold_formats::regular;
use fourfold_infer::InferError;
use fourfold_infer::eval::{
    Base, Evaluation, EvaluationReport, Protocol, ReadSeek, SavedLogits, SavedLogitsWriter, Window, dump_logits,
    evaluate, windows,
};
use serde::Serialize;

use crate::context::Context;
use crate::data_files;
use crate::device::{self, DeviceArg, DeviceReport};
use crate::fit::Room;
use crate::model::{self, OpenModel};
use crate::output::Report;
use crate::{human, interrupt, limits, memory};

#[derive(Args)]
pub struct EvalArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Put this adapter (LoRA, in PEFT's format) on the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The text to predict.
    #[arg(short = 'f', long, value_name = "FILE", required_unless_present = "data")]
    text: Option<PathBuf>,
    /// What to classify: for a network that reads images a directory of idx files, of which the test images are taken; for a
    /// sequence classifier a .jsonl or .tsv file of texts with their classes.
    #[arg(long, value_name = "PATH", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Tokens of a window [default: 512, or all positions of a model that has fewer].
    #[arg(short, long, value_name = "TOKENS", value_parser = limits::EVAL_CONTEXT)]
    context: Option<usize>,
    /// Evaluate the first N windows only.
    #[arg(long, value_name = "N", value_parser = limits::WINDOWS)]
    chunks: Option<u32>,
    /// Slide the window by this many tokens and score each token once, as the transformers documentation does
    /// [default: disjoint windows of which the second half is scored, as llama-perplexity does].
    #[arg(long, value_name = "TOKENS", value_parser = limits::TOKENS)]
    stride: Option<usize>,
    /// Compare with this MODEL, the original.
    #[arg(long, value_name = "MODEL", conflicts_with = "load_logits")]
    against: Option<String>,
    /// Keep the model's predictions in a file, for --load-logits.
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// Compare with the predictions in a file that --save-logits wrote.
    #[arg(long, value_name = "FILE")]
    load_logits: Option<PathBuf>,
    /// Write `input_ids` and the `logits` of every position as safetensors, and measure nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["against", "save_logits", "load_logits"])]
    dump_logits: Option<PathBuf>,
}

#[derive(Serialize)]
struct EvalReport {
    model: String,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<String>,
    context: usize,
    protocol: Protocol,
    complete: bool,
    weight_bytes: u64,
    #[serde(flatten)]
    figures: EvaluationReport,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceReport>,
}

/// Where `--dump-logits` and `--save-logits` go.
struct Outputs {
    dump: Option<PathBuf>,
    save: Option<PathBuf>,
}

impl EvalArgs {
    /// Tokens of a window of this model.
    fn context(&self, open: &OpenModel) -> usize {
        self.context.unwrap_or(open.spec.max_positions.min(512))
    }

    /// The files to write, apart from all that is read.
    fn outputs(&self) -> Result<Outputs> {
        let mut inputs = vec![("MODEL".to_owned(), PathBuf::from(&self.model))];
        let options = [("--adapter", &self.adapter), ("--text", &self.text), ("--load-logits", &self.load_logits)];
        inputs.extend(options.into_iter().filter_map(|(name, path)| Some((name.to_owned(), path.clone()?))));
        inputs.extend(self.against.iter().map(|model| ("--against".to_owned(), PathBuf::from(model))));
        let place = |file: &Option<PathBuf>| file.as_ref().map(|file| output_file(file, &inputs)).transpose();
        Ok(Outputs { dump: place(&self.dump_logits)?, save: place(&self.save_logits)? })
    }

    /// The text; clap has seen to it that there is one.
    fn text(&self) -> &Path {
        self.text.as_deref().unwrap_or(Path::new(""))
    }
}

pub fn run(args: &EvalArgs, context: &Context) -> Result<()> {
    if let (Some(_), DeviceArg::Gpu(_)) = (&args.data, context.global.device) {
        bail!(
            "--device {}: what --data names is evaluated on the CPU; a --text can be on a GPU",
            context.global.device
        );
    }
    match &args.data {
        Some(data) if data.is_file() => return texts::run(&args.model, data, context),
        Some(folder) => return images::run(&args.model, folder, context),
        None => {}
    }
    let outputs = args.outputs()?;
    let open = model::open_adapted(&args.model, args.adapter.as_deref(), context)?;
    let windows = cut(args, &open)?;
    if let Some(file) = &outputs.dump {
        return dump(file, &open, &windows, context);
    }
    let room = room(&windows);
    let model = open.load_on_device(room, context)?;
    let original = match &args.against {
        Some(name) => Some(model::open(name, context)?.load_on_device(room, context)?),
        None => None,
    };
    let mut saved = match &args.load_logits {
        Some(file) => Some(open_saved(file)?),
        None => None,
    };
    let base = match (&original, &mut saved) {
        (Some(model), _) => Base::Model(model),
        (None, Some(saved)) => Base::Saved(saved),
        (None, None) => Base::None,
    };
    let mut save = match &outputs.save {
        Some(file) => Some(SavedFile::create(file, &windows, open.spec.vocab_size)?),
        None => None,
    };
    let _cooperation = interrupt::cooperate();
    let tokens: usize = windows.iter().map(|w| w.ids.len()).sum();
    let bar = context.progress.bar("evaluating", tokens as u64, "tokens");
    let start = Instant::now();
    let evaluation = Evaluation { model: &model, base, save: save.as_mut().map(|s| &mut s.writer), kv: context.kv };
    let figures = evaluate(evaluation, &windows, &mut |so_far| {
        bar.set_position(windows[..so_far.windows].iter().map(|w| w.ids.len() as u64).sum());
        bar.set_message(format!("perplexity {:.3}", so_far.perplexity.perplexity));
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let complete = figures.windows == windows.len();
    if complete && let Some(save) = save {
        save.finish()?;
    }
    let done: usize = windows[..figures.windows].iter().map(|w| w.ids.len()).sum();
    context.print(&EvalReport {
        model: args.model.clone(),
        text: args.text().display().to_string(),
        against: args.against.clone().or(args.load_logits.as_ref().map(|f| f.display().to_string())),
        context: args.context(&open),
        protocol: protocol(args),
        complete,
        weight_bytes: open.checkpoint.weight_bytes,
        figures,
        seconds,
        tokens_per_second: done as f64 / seconds,
        peak_memory: memory::peak_resident(),
        device: device::report(&model),
    })?;
    if !complete {
        bail!("interrupted: the figures are of the windows done so far");
    }
    Ok(())
}

fn protocol(args: &EvalArgs) -> Protocol {
    args.stride.map_or(Protocol::Chunks, |stride| Protocol::Sliding { stride })
}

/// The text's windows. Of a long text only what they need is tokenized.
fn cut(args: &EvalArgs, open: &OpenModel) -> Result<Vec<Window>> {
    let text = data_files::text(args.text())?;
    let context = args.context(open);
    if context > open.spec.max_positions {
        bail!("--context {context}: the model has {} positions", open.spec.max_positions);
    }
    let tokenizer = open.tokenizer()?;
    let limit = args.chunks.map(|n| n as usize);
    let step = args.stride.unwrap_or(context);
    let needed = limit.map_or(usize::MAX / 16, |n| step.saturating_mul(n.saturating_sub(1)).saturating_add(context));
    let ids = tokenizer.encode_prefix(&text, needed)?;
    windows(&ids, tokenizer.bos(), context, protocol(args), limit).with_context(|| args.text().display().to_string())
}

/// What an evaluation holds at a time: a window, and the logits of all its tokens.
fn room(windows: &[Window]) -> Room {
    let tokens = windows.iter().map(|window| window.ids.len()).max().unwrap_or(0);
    Room { tokens, rows: tokens }
}

fn dump(file: &Path, open: &OpenModel, windows: &[Window], context: &Context) -> Result<()> {
    let model = open.load_on_device(room(windows), context)?;
    let named = || file.display().to_string();
    let mut out = BufWriter::with_capacity(1 << 20, PartialFile::create(file)?);
    dump_logits(&model, context.kv, windows, &mut out).with_context(named)?;
    out.into_inner().map_err(|e| e.into_error()).with_context(named)?.finish()?;
    context.remark(&format!("logits of {} windows written to {}", windows.len(), file.display()));
    Ok(())
}

fn open_saved(file: &Path) -> Result<SavedLogits<Box<dyn ReadSeek>>> {
    let named = || file.display().to_string();
    let reader: Box<dyn ReadSeek> =
        Box::new(BufReader::with_capacity(1 << 20, regular::open(file).with_context(named)?));
    SavedLogits::open(reader).with_context(named)
}

/// Predictions on their way to a file, under a temporary name until they are complete.
struct SavedFile {
    writer: SavedLogitsWriter,
    out: Shared,
    file: PathBuf,
}

impl SavedFile {
    fn create(file: &Path, windows: &[Window], vocab: usize) -> Result<Self> {
        let out = Shared(Arc::new(Mutex::new(Some(PartialFile::create(file)?))));
        let buffered: Box<dyn Write> = Box::new(BufWriter::with_capacity(1 << 20, out.clone()));
        let writer = SavedLogitsWriter::new(buffered, windows, vocab).map_err(|e| describe(e, file))?;
        Ok(Self { writer, out, file: file.to_owned() })
    }

    fn finish(self) -> Result<()> {
        self.writer.finish().map_err(|e| describe(e, &self.file))?;
        match self.out.0.lock().ok().and_then(|mut file| file.take()) {
            Some(file) => Ok(file.finish()?),
            None => bail!("{}: the file is not open", self.file.display()),
        }
    }
}

/// A file that its writer fills and [`SavedFile`] finishes.
#[derive(Clone)]
struct Shared(Arc<Mutex<Option<PartialFile>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.lock().ok().as_deref_mut() {
            Some(Some(file)) => file.write(bytes),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn describe(error: InferError, file: &Path) -> anyhow::Error {
    anyhow::Error::new(error).context(file.display().to_string())
}

impl Report for EvalReport {
    fn text(&self) -> String {
        let p = &self.figures.perplexity;
        let how = match self.protocol {
            Protocol::Chunks => "the second half of each window scored".to_owned(),
            Protocol::Sliding { stride } => format!("sliding by {stride}"),
        };
        let mut rows = vec![
            vec!["model".into(), format!("{} ({})", self.model, human::bytes(self.weight_bytes))],
            vec!["text".into(), format!("{}: {} windows of {}, {how}", self.text, self.figures.windows, self.context)],
            vec!["perplexity".into(), format!("{:.4} ± {:.4}", p.perplexity, p.standard_error)],
            vec!["top-1 accuracy".into(), format!("{} of {} tokens", human::percent(p.top1_accuracy), p.tokens)],
        ];
        if let (Some(o), Some(d)) = (&self.figures.original, &self.figures.divergence) {
            let against = self.against.as_deref().unwrap_or_default();
            rows.push(vec![
                "original".into(),
                format!("{against}: perplexity {:.4} ± {:.4}", o.perplexity, o.standard_error),
            ]);
            rows.push(vec!["mean KL divergence".into(), format!("{:.5} ± {:.5} nats", d.mean_kld, d.standard_error)]);
            rows.push(vec![
                "  median, 99 %, max".into(),
                format!("{:.5}, {:.4}, {:.4}", d.median_kld, d.p99_kld, d.max_kld),
            ]);
            rows.push(vec!["top-1 agreement".into(), human::percent(d.top1_agreement)]);
            rows.push(vec![
                "mean Δp".into(),
                format!("{:+.3} % (root mean square {:.3} %)", d.mean_delta_p * 100.0, d.rms_delta_p * 100.0),
            ]);
        }
        let time = human::duration(Duration::from_secs_f64(self.seconds));
        let speed = format!("{:.0} tokens a second, {time}", self.tokens_per_second);
        rows.push(vec!["speed".into(), speed]);
        rows.extend(self.peak_memory.map(|m| vec!["peak memory".into(), human::bytes(m)]));
        rows.extend(self.device.as_ref().map(|d| vec![format!("peak on {}", d.name), human::bytes(d.peak_memory)]));
        let width = rows.iter().map(|r| r[0].chars().count()).max().unwrap_or(0);
        let line = |r: &Vec<String>| format!("{}{}  {}\n", r[0], " ".repeat(width - r[0].chars().count()), r[1]);
        rows.iter().map(line).collect()
    }
}
