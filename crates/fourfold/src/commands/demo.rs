//! `fourfold demo`, and `fourfold` alone: compresses a small model 4:1, trains it in a quarter of the memory, and shows what that
//! cost.
//!
//! Every figure is of a process of its own (this program run again), so that peak memory is that of one model, as the operating
//! system counted it.

mod training;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use self::training::Training;
use crate::child::{integer, number};
use crate::context::Context;
use crate::output::Report;
use crate::{assets, child, human, interrupt, limits};

#[derive(Args)]
pub struct DemoArgs {
    /// A directory with a model, `calibration.txt` and `eval.txt`, instead of what comes with fourfold.
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
    /// How many times smaller.
    #[arg(long, value_name = "R", default_value_t = RATIO, value_parser = limits::RATIO)]
    ratio: f64,
    /// Windows of the evaluation text to use.
    #[arg(long, value_name = "N", default_value_t = CHUNKS, value_parser = limits::WINDOWS)]
    chunks: u32,
    /// What the samples continue.
    #[arg(short, long, default_value = PROMPT)]
    prompt: String,
    /// Compress only; leave out the training.
    #[arg(long)]
    no_training: bool,
}

/// What clap fills in, for the program without a command.
impl Default for DemoArgs {
    fn default() -> Self {
        Self { folder: None, ratio: RATIO, chunks: CHUNKS, prompt: PROMPT.to_owned(), no_training: false }
    }
}

const RATIO: f64 = 4.0;
const CHUNKS: u32 = 40;
const PROMPT: &str = "/// Returns the number of elements.\npub fn len(";

/// One model's row.
#[derive(Serialize)]
struct Measured {
    name: &'static str,
    method: String,
    weight_bytes: u64,
    peak_memory: u64,
    generate_tokens_per_second: f64,
    prompt_tokens_per_second: f64,
    perplexity: f64,
    standard_error: f64,
    top1_accuracy: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean_kld: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top1_agreement: Option<f64>,
    sample: String,
}

#[derive(Serialize)]
struct DemoReport {
    model: String,
    parameters: u64,
    eval_tokens: u64,
    /// Peak memory of the program itself: the same run with no model.
    program_memory: u64,
    ratio: f64,
    memory_ratio: f64,
    seconds: f64,
    original: Measured,
    compressed: Measured,
    /// The textbook's round to nearest at as many bits, with no error minimised: what the evaluation must be able to tell.
    control: Measured,
    #[serde(skip_serializing_if = "Option::is_none")]
    training: Option<Training>,
}

pub fn run(args: &DemoArgs, context: &Context) -> Result<()> {
    let start = Instant::now();
    let _cooperation = interrupt::cooperate();
    let scratch = tempfile::Builder::new().prefix("fourfold-demo").tempdir().context("a temporary directory")?;
    let folder = match &args.folder {
        Some(folder) => folder.clone(),
        None => assets::unpack(&scratch.path().join("original"))?,
    };
    let demo = Demo { context, args, folder: &folder, scratch: scratch.path() };
    let report = demo.report(start)?;
    context.print(&report)
}

struct Demo<'a> {
    context: &'a Context,
    args: &'a DemoArgs,
    folder: &'a Path,
    scratch: &'a Path,
}

impl Demo<'_> {
    fn report(&self, start: Instant) -> Result<DemoReport> {
        let (compressed, control) = (self.scratch.join("compressed"), self.scratch.join("control"));
        let inspected = self.child("inspect", &[self.folder.into()])?;
        let parameters = integer(&inspected, "parameters")?;
        self.context.remark(&format!(
            "A {} model of {} parameters, {}. Compressing it {} : 1 ...",
            inspected["architecture"].as_str().unwrap_or("small"),
            human::count(parameters),
            human::bytes(integer(&inspected, "weight_bytes")?),
            self.args.ratio
        ));
        let mut options: Vec<OsString> = vec![self.folder.into(), compressed.clone().into()];
        options.extend(["--ratio".into(), self.args.ratio.to_string().into()]);
        options.extend(["--calibration".into(), self.folder.join("calibration.txt").into()]);
        self.child("compress", &options)?;
        let mut options: Vec<OsString> = vec![self.folder.into(), control.clone().into()];
        options.extend(
            ["--method", "rtn", "--bits", "4", "--group-size", "tensor", "--scale-rule", "absmax"].map(Into::into),
        );
        self.child("compress", &options)?;

        self.context
            .remark("Measuring the original, the compressed model and the control, each in a process of its own ...");
        let original = self.measure("original", "bf16, as trained".to_owned(), self.folder)?;
        let method = format!("GPTQ, {} : 1", self.args.ratio);
        let compressed = self.measure("compressed", method, &compressed)?;
        let control = self.measure("control", "4 bits, textbook rounding".to_owned(), &control)?;
        let training = match self.args.no_training {
            true => None,
            false => Some(Training::run(self, self.folder)?),
        };
        Ok(DemoReport {
            model: inspected["architecture"].as_str().unwrap_or_default().to_owned(),
            parameters,
            eval_tokens: self.eval_tokens(self.folder)?,
            program_memory: integer(&inspected, "peak_memory")?,
            ratio: original.weight_bytes as f64 / compressed.weight_bytes as f64,
            memory_ratio: original.peak_memory as f64 / compressed.peak_memory as f64,
            seconds: start.elapsed().as_secs_f64(),
            original,
            compressed,
            control,
            training,
        })
    }

    fn eval_tokens(&self, model: &Path) -> Result<u64> {
        let report = std::fs::read(self.eval_report(model)).context("the evaluation's report")?;
        integer(&serde_json::from_slice(&report)?, "tokens")
    }

    /// Where a model's evaluation is kept.
    fn eval_report(&self, model: &Path) -> PathBuf {
        self.scratch.join(model.file_name().unwrap_or_default()).with_extension("eval.json")
    }

    fn measure(&self, name: &'static str, method: String, model: &Path) -> Result<Measured> {
        let logits = self.scratch.join("original.logits");
        let mut options: Vec<OsString> = vec![model.into(), "--text".into(), self.folder.join("eval.txt").into()];
        options.extend(["--context".into(), "256".into(), "--chunks".into(), self.args.chunks.to_string().into()]);
        let keep = if name == "original" { "--save-logits" } else { "--load-logits" };
        options.extend([keep.into(), logits.into()]);
        let eval = self.child("eval", &options)?;
        std::fs::write(self.eval_report(model), eval.to_string()).context("the evaluation's report")?;
        let mut options: Vec<OsString> = vec![model.into(), "--prompt".into(), (&self.args.prompt).into()];
        options.extend(["--predict", "100", "--temp", "0.5", "--seed", "1"].map(Into::into));
        let generated = self.child("generate", &options)?;
        let divergence = eval.get("divergence");
        Ok(Measured {
            name,
            method,
            weight_bytes: integer(&eval, "weight_bytes")?,
            peak_memory: integer(&generated, "peak_memory")?,
            generate_tokens_per_second: number(&generated, "tokens_per_second")?,
            prompt_tokens_per_second: number(&eval, "tokens_per_second")?,
            perplexity: number(&eval, "perplexity")?,
            standard_error: number(&eval, "standard_error")?,
            top1_accuracy: number(&eval, "top1_accuracy")?,
            mean_kld: divergence.map(|d| number(d, "mean_kld")).transpose()?,
            top1_agreement: divergence.map(|d| number(d, "top1_agreement")).transpose()?,
            sample: generated["text"].as_str().unwrap_or_default().to_owned(),
        })
    }

    /// Runs this program with other arguments and reads its report.
    fn child(&self, command: &str, options: &[OsString]) -> Result<Value> {
        let options: Vec<&OsStr> = options.iter().map(OsString::as_os_str).collect();
        Ok(child::run(self.context, command, &options)?.0)
    }
}

impl Report for DemoReport {
    fn text(&self) -> String {
        let (a, b, c) = (&self.original, &self.compressed, &self.control);
        let mut rows = vec![["", "original", "compressed", "ratio", "control"].map(String::from).to_vec()];
        let mut row = |name: &str, ratio: String, cell: &dyn Fn(&Measured) -> String| {
            rows.push(vec![name.to_owned(), cell(a), cell(b), ratio, cell(c)]);
        };
        let times = |x: f64, y: f64| if y > 0.0 { format!("{:.2}", x / y) } else { "–".to_owned() };
        row("method", String::new(), &|m| m.method.clone());
        row("weights on disk", times(a.weight_bytes as f64, b.weight_bytes as f64), &|m| human::bytes(m.weight_bytes));
        row("bits a parameter", times(a.weight_bytes as f64, b.weight_bytes as f64), &|m| {
            format!("{:.2}", m.weight_bytes as f64 * 8.0 / self.parameters as f64)
        });
        row("peak memory, generating", times(a.peak_memory as f64, b.peak_memory as f64), &|m| {
            human::bytes(m.peak_memory)
        });
        let above = |m: &Measured| m.peak_memory.saturating_sub(self.program_memory);
        row("  above the bare program", times(above(a) as f64, above(b) as f64), &|m| human::bytes(above(m)));
        let rate = |v: f64| format!("{v:.0}");
        row("generating, tokens/s", times(b.generate_tokens_per_second, a.generate_tokens_per_second), &|m| {
            rate(m.generate_tokens_per_second)
        });
        row("reading, tokens/s", times(b.prompt_tokens_per_second, a.prompt_tokens_per_second), &|m| {
            rate(m.prompt_tokens_per_second)
        });
        row("perplexity", times(b.perplexity, a.perplexity), &|m| {
            format!("{:.3} ± {:.3}", m.perplexity, m.standard_error)
        });
        row("top-1 accuracy", times(b.top1_accuracy, a.top1_accuracy), &|m| human::percent(m.top1_accuracy));
        let or_dash = |v: Option<String>| v.unwrap_or_else(|| "–".to_owned());
        row("KL divergence, nats", String::new(), &|m| or_dash(m.mean_kld.map(|v| format!("{v:.4}"))));
        row("same first choice", String::new(), &|m| or_dash(m.top1_agreement.map(human::percent)));
        let mut text = format!(
            "\n{}, {} parameters, {} tokens of text it has not seen:\n\n{}",
            self.model,
            human::count(self.parameters),
            self.eval_tokens,
            human::table(&rows)
        );
        text += &self.training.as_ref().map(Training::text).unwrap_or_default();
        for m in [a, b, c] {
            text += &format!("\n--- {} continues:\n{}\n", m.name, m.sample.trim_end());
        }
        text + &format!("\n{}\n", human::duration(Duration::from_secs_f64(self.seconds)))
    }
}
