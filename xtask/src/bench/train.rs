//! Training steps, time and peak memory of the whole process: `fourfold train` with its presets against PyTorch.
//!
//! Every contender runs once in each round, from start to the finished save of the model; the ratios are to the first one,
//! PyTorch in f32.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::measure::{self, median};
use super::table::{Table, megabytes};

/// Options of `cargo xtask bench train`.
#[derive(clap::Args)]
pub struct Args {
    /// A Python with torch, transformers, tokenizers and safetensors.
    #[arg(long)]
    python: PathBuf,
    /// The architecture, a Hugging Face config.json.
    #[arg(long)]
    config: PathBuf,
    /// Its tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    /// A text file.
    #[arg(long)]
    text: PathBuf,
    /// Presets of this program, each with more options where wanted (`quarter --float-products int16`).
    #[arg(long, default_value = "baseline,amp,quarter,eighth", value_delimiter = ',')]
    presets: Vec<String>,
    /// Steps of a run.
    #[arg(long, default_value_t = 6)]
    steps: u64,
    /// Rounds.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the runs write; emptied before each.
    #[arg(long)]
    work: PathBuf,
}

#[derive(Default)]
struct Readings {
    name: String,
    seconds: Vec<f64>,
    peak: Vec<f64>,
    import: f64,
}

/// Runs and prints the comparison.
pub fn run(ours: &Path, args: &Args) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/peer_train.py");
    std::fs::create_dir_all(&args.work).with_context(|| args.work.display().to_string())?;
    let mut all: Vec<Readings> = Vec::new();
    for round in 0..args.rounds {
        let mut contender = 0;
        let mut record = |name: String, seconds: f64, peak: u64, import: f64| {
            if round == 0 {
                all.push(Readings { name, import, ..Readings::default() });
            }
            all[contender].seconds.push(seconds);
            all[contender].peak.push(peak as f64);
            contender += 1;
        };
        for precision in ["f32", "bf16"] {
            eprintln!("round {}: PyTorch {precision}", round + 1);
            let mut command = Command::new(&args.python);
            command
                .arg(&script)
                .args([&args.config, &args.tokenizer, &args.text])
                .arg(args.work.join("peer.safetensors"));
            command.args(["--precision", precision, "--steps", &args.steps.to_string()]);
            command.args(["--batch", &args.batch.to_string(), "--context", &args.context.to_string()]);
            let run = measure::run(command.args(["--threads", &args.threads.to_string()]))?;
            let value: Value = serde_json::from_str(run.stdout.lines().last().unwrap_or_default())?;
            let number = |key: &str| value[key].as_f64().with_context(|| format!("`{key}` in {value}"));
            record(format!("PyTorch {precision}"), number("seconds")?, run.peak_rss, number("import_bytes")?);
        }
        for preset in &args.presets {
            eprintln!("round {}: fourfold {preset}", round + 1);
            let out = args.work.join("ours");
            if out.exists() {
                std::fs::remove_dir_all(&out)?;
            }
            let mut command = Command::new(ours);
            command.arg("train").arg("--model-config").arg(&args.config).arg("--tokenizer").arg(&args.tokenizer);
            command.arg("--data").arg(&args.text).arg("--output").arg(&out).args(["--held-out", "0", "--preset"]);
            command.args(preset.split_whitespace());
            command.args(["--steps", &args.steps.to_string(), "--save-every", "0", "--eval-every", "0", "--json"]);
            command.args(["--batch-size", &args.batch.to_string(), "--context", &args.context.to_string()]);
            let run = measure::run(command.args(["--threads", &args.threads.to_string()]))?;
            let value: Value = serde_json::from_str(&run.stdout)?;
            let tokens = value["tokens"].as_f64().context("`tokens`")?;
            let speed = value["tokens_per_second"].as_f64().context("`tokens_per_second`")?;
            // Equal tokens: a packed batch of ours can be short of the peer's.
            let equal = (args.steps as usize * args.batch * args.context) as f64;
            record(format!("fourfold {preset}"), tokens / speed * equal / tokens, run.peak_rss, 0.0);
        }
    }
    println!(
        "\n{}: {} steps of {} x {} tokens, {} threads, medians of {} rounds; ratios to PyTorch f32\n",
        args.config.display(),
        args.steps,
        args.batch,
        args.context,
        args.threads,
        args.rounds
    );
    let mut table = Table::new(&["run", "s/step", "ratio", "peak RSS MB", "ratio", "of it imports MB"]);
    let ratio = |a: &[f64], b: &[f64]| {
        let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
        format!("{:.2}", median(&ratios))
    };
    for r in &all {
        table.row(vec![
            r.name.clone(),
            format!("{:.2}", median(&r.seconds) / args.steps as f64),
            ratio(&r.seconds, &all[0].seconds),
            megabytes(median(&r.peak) as u64),
            ratio(&r.peak, &all[0].peak),
            if r.import > 0.0 { megabytes(r.import as u64) } else { String::new() },
        ]);
    }
    table.print();
    Ok(())
}
