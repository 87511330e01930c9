//! The whole claim on a language model: trained in f32, and trained in bf16 with 8-bit states and then compressed, on the same text with
//! the same seeds: by the planner, which may quantize, prune and decompose, or without calibration text by rounding to nearest.
//!
//! Every command of a run counts: the peak is the largest of all its processes', the time their sum. The controls, which must be worse: the
//! f32 result rounded to 4 bits as the textbook has it, and training with 8-bit weights rounded to nearest.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::experiment::{Bill, Common, Readings, print};
use super::table::interval;

/// Options of `cargo xtask bench text`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// The architecture, a Hugging Face config.json.
    #[arg(long)]
    config: PathBuf,
    /// Its tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    /// What is learned.
    #[arg(long)]
    text: PathBuf,
    /// What accuracy is measured on; kept out of training and calibration.
    #[arg(long)]
    test: PathBuf,
    /// What compression is calibrated on, a part of what was learned. Without it nothing is planned: the nearest of whole `bits`.
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Steps of training.
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Bits a parameter of the result, everything counted; 8 is a quarter of f32.
    #[arg(long, default_value_t = 8.0)]
    bits: f64,
}

impl Args {
    /// `how` are the options in which runs differ.
    fn train(&self, bill: &mut Bill, how: &[&str], out: &Path, seed: u64) -> Result<()> {
        let [config, tokenizer, text, out] =
            [&self.config, &self.tokenizer, &self.text, &out.to_path_buf()].map(|p| p.display().to_string());
        let numbers = [self.steps, self.batch as u64, self.context as u64, seed].map(|n| n.to_string());
        let [steps, batch, context, seed] = &numbers;
        let lr = self.lr.to_string();
        let model = ["train", "--model-config", &config, "--tokenizer", &tokenizer, "--data", &text, "--output", &out];
        let run = ["--steps", steps, "--batch-size", batch, "--context", context, "--seed", seed];
        let more = ["--lr", &lr, "--held-out", "0", "--eval-every", "0", "--save-every", "0"];
        bill.command(&[&model[..], how, &run, &more].concat())?;
        Ok(())
    }

    /// Accuracy and loss of `model` on the test's text, which count for no one.
    fn test(&self, bill: &Bill, model: &Path) -> Result<(f64, f64)> {
        let [model, text] = [model, &self.test].map(|p| p.display().to_string());
        let context = self.context.to_string();
        let (value, _) = bill.uncounted(&["eval", &model, "--text", &text, "--context", &context])?;
        let number = |key: &str| Value::as_f64(&value[key]).with_context(|| format!("`{key}`"));
        Ok((number("top1_accuracy")?, number("perplexity")?.ln()))
    }
}

/// Runs and prints the comparison.
pub fn run(binary: &Path, args: &Args) -> Result<()> {
    let ours = ["fourfold f32", "fourfold compressed", "of it the training"];
    let controls = ["control: f32, textbook 4 bits", "control: trained in int8 to nearest"];
    let mut all: Vec<Readings> = ours.into_iter().chain(controls).map(Readings::named).collect();
    let mut losses: [Vec<f64>; 5] = Default::default();
    for (done, seed) in args.common.seeds().enumerate() {
        if args.common.work.exists() {
            std::fs::remove_dir_all(&args.common.work)?;
        }
        let [base, quarter, small, control, nearest] = ["f32", "quarter", "small", "control", "nearest"]
            .map(|kind| args.common.work.join(format!("{kind}-{seed}")));
        let text = |path: &Path| path.display().to_string();
        let mut close = |bill: Bill, row: usize, model: &Path| {
            let (accuracy, loss) = args.test(&bill, model)?;
            losses[row].push(loss);
            bill.close(&mut all[row], accuracy, model)
        };

        eprintln!("seed {seed}: f32");
        let mut bill = Bill::new(binary, args.common.threads);
        args.train(&mut bill, &["--preset", "baseline"], &base, seed)?;
        close(bill, 0, &base.join("final"))?;

        eprintln!("seed {seed}: compressed");
        let mut bill = Bill::new(binary, args.common.threads);
        args.train(&mut bill, &["--preset", "quarter"], &quarter, seed)?;
        close(bill.clone(), 2, &quarter.join("final"))?;
        let whole = args.calibration.is_none() && args.bits.fract() == 0.0;
        let bits = if whole { format!("{}", args.bits) } else { format!("{:.3}", args.bits) };
        let calibration = args.calibration.as_deref().map(text);
        let mut goal = vec!["--bits", &bits];
        goal.extend(calibration.iter().flat_map(|calibration| ["--calibration", calibration]));
        bill.command(&[&["compress", &text(&quarter.join("final")), &text(&small)][..], &goal].concat())?;
        close(bill, 1, &small)?;

        eprintln!("seed {seed}: controls");
        let bill = Bill::new(binary, args.common.threads);
        let textbook = ["--bits", "4", "--group-size", "tensor", "--scale-rule", "absmax"];
        bill.uncounted(&[&["compress", &text(&base.join("final")), &text(&control)][..], &textbook].concat())?;
        close(bill, 3, &control)?;
        let mut bill = Bill::new(binary, args.common.threads);
        args.train(&mut bill, &["--preset", "quarter", "--weights", "int8-nearest"], &nearest, seed)?;
        close(bill, 4, &nearest.join("final"))?;

        println!("\nafter {} of {} seeds\n", done + 1, args.common.seeds);
        print(&all);
        println!("\nloss on the test's text, nats, and its paired difference from f32:");
        for (reading, loss) in all.iter().zip(&losses) {
            let paired: Vec<f64> = loss.iter().zip(&losses[0]).map(|(a, b)| a - b).collect();
            let show = |v: f64| format!("{v:.4}");
            println!("  {}: {}, {}", reading.name, interval(loss, show), interval(&paired, show));
        }
    }
    Ok(())
}
