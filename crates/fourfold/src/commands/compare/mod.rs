//! `fourfold compare`: two models side by side, as text, Markdown, JSON or one self-contained HTML page.
//!
//! Every figure of speed and memory is of a process of its own ([`crate::child`]).

mod figures;
mod html;
mod markdown;
mod tensors;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use fourfold_disk::{output_file, write_whole};
use serde::Serialize;

use crate::context::Context;
use crate::output::Report;
use crate::{assets, child, interrupt, limits};

use figures::Side;
use tensors::TensorPair;

#[derive(Args)]
pub struct CompareArgs {
    /// The original: a directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "A")]
    original: String,
    /// What was made of it.
    #[arg(value_name = "B")]
    other: String,
    /// The text to predict [default: some sources of fourfold's].
    #[arg(short = 'f', long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window [default: 512, or all positions of a model that has fewer].
    #[arg(short, long, value_name = "TOKENS", value_parser = limits::EVAL_CONTEXT)]
    context: Option<usize>,
    /// Evaluate the first N windows only.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = limits::WINDOWS)]
    chunks: u32,
    /// What the samples continue; once for each sample.
    #[arg(short, long, default_values = ["The first thing to know is", "fn main() {"])]
    prompt: Vec<String>,
    /// Tokens of a sample.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100, value_parser = limits::SOME_TOKENS)]
    predict: usize,
    /// Write the report to a file: .html (one page, nothing loaded from elsewhere), .md or .json [default: text on stdout].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Two models side by side.
#[derive(Serialize)]
pub struct Comparison {
    /// This program's version.
    version: &'static str,
    /// Threads of every measurement.
    threads: usize,
    /// The text and how it was cut.
    text: String,
    context: usize,
    /// The original and the other.
    a: Side,
    b: Side,
    /// Mean KL divergence of B's predictions from A's, nats a token.
    mean_kld: f64,
    /// Its standard error.
    kld_error: f64,
    /// Share of positions where both have the same first choice.
    top1_agreement: f64,
    /// Tensor by tensor, in the order of A.
    tensors: Vec<TensorPair>,
    /// Tensors that only one of the two has.
    unmatched: Vec<String>,
}

/// What the report is written as.
enum Format {
    Html,
    Markdown,
    Json,
}

/// By the file's ending.
fn format(file: &Path) -> Result<Format> {
    match file.extension().and_then(OsStr::to_str) {
        Some("html" | "htm") => Ok(Format::Html),
        Some("md" | "markdown") => Ok(Format::Markdown),
        Some("json") => Ok(Format::Json),
        _ => bail!("{}: a report is written as .html, .md or .json", file.display()),
    }
}

impl CompareArgs {
    /// Where the report goes, apart from all that is read.
    fn place(&self, file: &Path) -> Result<PathBuf> {
        let models = [("A", &self.original), ("B", &self.other)];
        let mut inputs: Vec<_> = models.iter().map(|(name, path)| ((*name).to_owned(), PathBuf::from(path))).collect();
        inputs.extend(self.text.iter().map(|text| ("--text".to_owned(), text.clone())));
        Ok(output_file(file, &inputs)?)
    }
}

pub fn run(args: &CompareArgs, context: &Context) -> Result<()> {
    let output = match &args.output {
        Some(file) => Some((args.place(file)?, format(file)?)),
        None => None,
    };
    let _cooperation = interrupt::cooperate();
    let comparison = compare(args, context)?;
    let Some((file, format)) = output else { return context.print(&comparison) };
    let text = match format {
        Format::Html => html::page(&comparison)?,
        Format::Markdown => markdown::document(&comparison),
        Format::Json => serde_json::to_string_pretty(&comparison)?,
    };
    write_whole(&file, text.as_bytes())?;
    if context.json {
        return context.print(&comparison);
    }
    context.remark(&format!("{}: {} : 1", file.display(), figures::times(comparison.bytes_ratio())));
    Ok(())
}

fn compare(args: &CompareArgs, context: &Context) -> Result<Comparison> {
    let scratch = tempfile::Builder::new().prefix("fourfold-compare").tempdir().context("a temporary directory")?;
    let text = match &args.text {
        Some(file) => file.clone(),
        None => assets::unpack(&scratch.path().join("assets"))?.join("eval.txt"),
    };
    fs::metadata(&text).with_context(|| text.display().to_string())?;
    let (tensors, unmatched) = tensors::pairs(&args.original, &args.other, context)?;
    context.remark("Measuring both, each in processes of its own ...");
    let logits = scratch.path().join("logits");
    let (windows, chunks) = (args.context.map(|c| c.to_string()), args.chunks.to_string());
    let evaluate = |model: &str, logits_option: &str| {
        let mut options: Vec<&OsStr> = vec![model.as_ref(), "--text".as_ref(), text.as_ref()];
        options.extend(["--chunks".as_ref(), chunks.as_ref(), logits_option.as_ref(), logits.as_os_str()]);
        if let Some(windows) = &windows {
            options.extend(["--context".as_ref(), OsStr::new(windows)]);
        }
        child::run(context, "eval", &options)
    };
    let (eval_a, _) = evaluate(&args.original, "--save-logits")?;
    let (eval_b, _) = evaluate(&args.other, "--load-logits")?;
    let divergence = eval_b.get("divergence").context("the evaluation has no divergence")?;
    Ok(Comparison {
        version: env!("CARGO_PKG_VERSION"),
        threads: context.threads,
        text: args.text.as_ref().map_or("sources of fourfold's".to_owned(), |t| t.display().to_string()),
        context: child::integer(&eval_a, "context")? as usize,
        mean_kld: child::number(divergence, "mean_kld")?,
        kld_error: child::number(divergence, "standard_error")?,
        top1_agreement: child::number(divergence, "top1_agreement")?,
        a: figures::side(args, &args.original, &eval_a, context)?,
        b: figures::side(args, &args.other, &eval_b, context)?,
        tensors,
        unmatched,
    })
}

impl Comparison {
    /// How many times smaller B's weights are.
    fn bytes_ratio(&self) -> f64 {
        self.a.weight_bytes as f64 / self.b.weight_bytes as f64
    }
}

impl Report for Comparison {
    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = figures::table(self).into_iter().map(|row| row.to_vec()).collect();
        format!("\n{}\n", crate::human::table(&rows))
    }
}
