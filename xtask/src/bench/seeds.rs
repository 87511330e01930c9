//! What a way to train costs in quality: the same training with the same seeds, data and order in several variants, and the mean of the paired
//! differences of the held-out loss with its interval. A seed's runs follow one another.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::measure;
use super::table::{Table, interval, megabytes};

/// Options of `cargo xtask bench seeds`.
#[derive(clap::Args)]
pub struct Args {
    /// Options of `fourfold train` that differ, a variant each; the others are compared with the first. The last is meant to fail.
    #[arg(
        long,
        allow_hyphen_values = true,
        value_delimiter = ';',
        default_value = "--preset baseline;--preset quarter;--preset quarter --weights int8-nearest"
    )]
    variants: Vec<String>,
    /// Seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Where runs write; emptied of each run.
    #[arg(long)]
    work: PathBuf,
    /// Options of `fourfold train` for all: what to train, on what, for how long.
    #[arg(last = true, required = true)]
    train: Vec<String>,
}

/// What the runs of one variant gave, a reading a seed.
#[derive(Default)]
struct Readings {
    loss: Vec<f64>,
    accuracy: Vec<f64>,
    seconds: Vec<f64>,
    peak: Vec<f64>,
}

/// Runs and prints the comparison.
pub fn run(ours: &Path, args: &Args) -> Result<()> {
    ensure!(args.seeds > 0 && !args.variants.is_empty(), "nothing to run");
    let mut all: Vec<Readings> = args.variants.iter().map(|_| Readings::default()).collect();
    for seed in 0..args.seeds {
        for (variant, readings) in args.variants.iter().zip(&mut all) {
            let out = args.work.join("run");
            if out.exists() {
                std::fs::remove_dir_all(&out).with_context(|| out.display().to_string())?;
            }
            let mut command = Command::new(ours);
            command.arg("train").args(&args.train).args(variant.split_whitespace());
            command.args(["--seed", &seed.to_string(), "--save-every", "0", "--json", "--output"]).arg(&out);
            let run = measure::run(&mut command)?;
            let report: Value = serde_json::from_str(&run.stdout)?;
            let number = |key: &str| report[key].as_f64().with_context(|| format!("{key} in {report}"));
            readings.loss.push(number("held_out_loss")?);
            readings.accuracy.push(number("held_out_accuracy")?);
            readings.seconds.push(run.wall.as_secs_f64());
            readings.peak.push(run.peak_rss as f64);
            eprintln!("seed {seed}, {variant}: {:.4}", number("held_out_loss")?);
        }
    }
    let heading = ["variant", "held-out loss", "difference", "accuracy, points", "peak RSS MB", "s"];
    let mut table = Table::new(&heading);
    let first = &all[0];
    for (variant, r) in args.variants.iter().zip(&all) {
        let paired = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f64>>();
        table.row(vec![
            variant.clone(),
            interval(&r.loss, |v| format!("{v:.4}")),
            interval(&paired(&r.loss, &first.loss), |v| format!("{v:.4}")),
            interval(&paired(&r.accuracy, &first.accuracy), |v| format!("{:.2}", 100.0 * v)),
            interval(&r.peak, |v| megabytes(v as u64)),
            interval(&r.seconds, |v| format!("{v:.0}")),
        ]);
    }
    println!("\n{} seeds, mean ± half of the 95 % interval; train {}\n", args.seeds, args.train.join(" "));
    table.print();
    Ok(())
}
