//! The whole claim on a classifier of images: trained in f32, and trained compressed from its first step (layers as low-rank chains, bf16
//! weights with 8-bit states, then pruned and trained on under the mask, then quantized), on the same images with the same seeds.
//!
//! Every command of a run counts: the peak is the largest of all its processes', the time their sum. The control is the f32 result put
//! through the same compression without training after it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::measure;
use super::table::{Table, interval, megabytes};

/// Options of `cargo xtask bench fashion`.
#[derive(clap::Args)]
pub struct Args {
    /// This program, already built [default: it is built].
    #[arg(long)]
    pub binary: Option<PathBuf>,
    /// A Python with torch and numpy; without it there is no peer.
    #[arg(long)]
    python: Option<PathBuf>,
    /// The directory of the images.
    #[arg(long, default_value = "/usr/share/datasets/fashion-mnist")]
    images: PathBuf,
    /// The network.
    #[arg(long, default_value = "examples/fashion-mnist-wide.json")]
    network: PathBuf,
    /// How layers are decomposed.
    #[arg(long, default_value = "svd:64,tucker:0.5")]
    factorize: String,
    /// How the factors are pruned.
    #[arg(long, default_value = "global:0.5")]
    prune: String,
    /// Bits of the result.
    #[arg(long, default_value_t = 8)]
    bits: u8,
    /// Passes over the images in f32.
    #[arg(long, default_value_t = 2.0)]
    epochs: f64,
    /// Passes of the compressed run before pruning: a pass takes it less time.
    #[arg(long, default_value_t = 2.0)]
    epochs_factors: f64,
    /// Passes of the compressed run after pruning.
    #[arg(long, default_value_t = 1.0)]
    epochs_pruned: f64,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Learning rate after pruning.
    #[arg(long, default_value_t = 1e-3)]
    lr_pruned: f64,
    /// Images of a step.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Seeds: a run of each kind for each.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the runs write; emptied before each.
    #[arg(long)]
    work: PathBuf,
}

/// What one kind of run took, a reading a seed.
#[derive(Default)]
struct Readings {
    name: &'static str,
    peak: Vec<f64>,
    wall: Vec<f64>,
    cpu: Vec<f64>,
    accuracy: Vec<f64>,
    file: Vec<f64>,
}

/// The commands of one run, added up.
struct Bill<'a> {
    ours: &'a Path,
    args: &'a Args,
    peak: u64,
    wall: f64,
    cpu: f64,
}

impl<'a> Bill<'a> {
    fn new(ours: &'a Path, args: &'a Args) -> Self {
        Self { ours, args, peak: 0, wall: 0.0, cpu: 0.0 }
    }

    fn add(&mut self, run: &measure::Run) {
        self.peak = self.peak.max(run.peak_rss);
        self.wall += run.wall.as_secs_f64();
        self.cpu += run.cpu.as_secs_f64();
    }

    /// Runs a command of ours that counts.
    fn command(&mut self, words: &[&str]) -> Result<Value> {
        let (value, run) = ours(self.ours, self.args, words)?;
        self.add(&run);
        Ok(value)
    }

    fn train(&mut self, begin: &[&str], out: &Path, epochs: f64, lr: f64, seed: u64) -> Result<()> {
        let (images, out) = (self.args.images.display().to_string(), out.display().to_string());
        let (epochs, lr, seed, batch) =
            (epochs.to_string(), lr.to_string(), seed.to_string(), self.args.batch.to_string());
        let common = ["--data", &images, "--output", &out, "--epochs", &epochs, "--lr", &lr, "--seed", &seed];
        // The same decay for all: an existing model's default is another.
        let more = ["--batch-size", &batch, "--weight-decay", "0.1", "--beta2", "0.95", "--save-every", "0"];
        self.command(&[&["train"], begin, &common, &more, &["--eval-every", "0"]].concat())?;
        Ok(())
    }

    /// Adds the readings, with the accuracy and size of the result, which is measured apart.
    fn close(self, to: &mut Readings, model: &Path) -> Result<()> {
        let (images, name) = (self.args.images.display().to_string(), model.display().to_string());
        let (value, _) = ours(self.ours, self.args, &["eval", &name, "--data", &images])?;
        to.accuracy.push(value["accuracy"].as_f64().context("`accuracy`")?);
        to.peak.push(self.peak as f64);
        to.wall.push(self.wall);
        to.cpu.push(self.cpu);
        to.file.push(std::fs::metadata(model.join("model.safetensors"))?.len() as f64);
        Ok(())
    }
}

/// Runs this program and reads what it prints.
fn ours(binary: &Path, args: &Args, words: &[&str]) -> Result<(Value, measure::Run)> {
    let run = measure::run(Command::new(binary).args(words).args(["--threads", &args.threads.to_string(), "--json"]))?;
    Ok((serde_json::from_str(&run.stdout)?, run))
}

/// Runs and prints the comparison.
pub fn run(binary: &Path, args: &Args) -> Result<()> {
    let named = |name| Readings { name, ..Readings::default() };
    let mut all = ["fourfold f32", "fourfold compressed", "control: not trained after", "PyTorch f32"].map(named);
    let network = args.network.display().to_string();
    for seed in 0..args.seeds {
        let folder = |kind: &str| args.work.join(format!("{kind}-{seed}"));
        if args.work.exists() {
            std::fs::remove_dir_all(&args.work)?;
        }
        let [base, factors, pruned, tuned, small, control] =
            ["f32", "factors", "pruned", "tuned", "small", "control"].map(folder);
        let text = |path: &Path| path.display().to_string();

        eprintln!("seed {seed}: f32");
        let mut bill = Bill::new(binary, args);
        bill.train(&["--model-config", &network, "--preset", "baseline"], &base, args.epochs, args.lr, seed)?;
        bill.close(&mut all[0], &base.join("final"))?;

        eprintln!("seed {seed}: compressed");
        let mut bill = Bill::new(binary, args);
        let begin = ["--model-config", &network, "--factorize", &args.factorize, "--preset", "quarter"];
        bill.train(&begin, &factors, args.epochs_factors, args.lr, seed)?;
        let prune = format!("{},quantize:16", args.prune);
        bill.command(&["compress", &text(&factors.join("final")), &text(&pruned), "--method", &prune])?;
        let begin = ["--model", &text(&pruned), "--preset", "quarter"];
        bill.train(&begin, &tuned, args.epochs_pruned, args.lr_pruned, seed)?;
        let store = format!("{},quantize:{}", args.prune, args.bits);
        bill.command(&["compress", &text(&tuned.join("final")), &text(&small), "--method", &store])?;
        bill.close(&mut all[1], &small)?;

        eprintln!("seed {seed}: control");
        let bill = Bill::new(binary, args);
        let at_once = format!("{},{store}", args.factorize);
        ours(binary, args, &["compress", &text(&base.join("final")), &text(&control), "--method", &at_once])?;
        bill.close(&mut all[2], &control)?;

        if let Some(python) = &args.python {
            eprintln!("seed {seed}: PyTorch");
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/peer_fashion.py");
            let mut command = Command::new(python);
            command.arg(script).args([&args.network, &args.images]).args(["--epochs", &args.epochs.to_string()]);
            command.args(["--seed", &seed.to_string(), "--batch", &args.batch.to_string()]);
            command.args(["--lr", &args.lr.to_string(), "--threads", &args.threads.to_string()]);
            let run = measure::run(&mut command)?;
            let value: Value = serde_json::from_str(run.stdout.lines().last().unwrap_or_default())?;
            all[3].accuracy.push(value["accuracy"].as_f64().context("`accuracy`")?);
            all[3].peak.push(run.peak_rss as f64);
            all[3].wall.push(run.wall.as_secs_f64());
            all[3].cpu.push(run.cpu.as_secs_f64());
        }
        println!("\nafter {} of {} seeds\n", seed + 1, args.seeds);
        print(&all);
    }
    Ok(())
}

fn print(all: &[Readings]) {
    let mut table = Table::new(&[
        "run",
        "peak MB",
        "of f32",
        "CPU s",
        "of f32",
        "wall s",
        "of f32",
        "accuracy %",
        "- f32",
        "file MB",
    ]);
    let pairs = |a: &[f64], b: &[f64], f: fn(f64, f64) -> f64| -> Vec<f64> {
        a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
    };
    let plain = |digits: usize| move |v: f64| format!("{v:.digits$}");
    let first = &all[0];
    for r in all.iter().filter(|r| !r.accuracy.is_empty()) {
        // The control trains nothing: its time and peak are no one's.
        let trained = r.peak.iter().all(|&p| p > 0.0);
        let cell = |text: String| if trained { text } else { String::new() };
        let ratio = |a: &[f64], b: &[f64]| interval(&pairs(a, b, |a, b| a / b), plain(3));
        table.row(vec![
            r.name.to_owned(),
            cell(interval(&r.peak, |v| megabytes(v as u64))),
            cell(ratio(&r.peak, &first.peak)),
            cell(interval(&r.cpu, plain(1))),
            cell(ratio(&r.cpu, &first.cpu)),
            cell(interval(&r.wall, plain(0))),
            cell(ratio(&r.wall, &first.wall)),
            interval(&r.accuracy, |v| format!("{:.2}", 100.0 * v)),
            interval(&pairs(&r.accuracy, &first.accuracy, |a, b| 100.0 * (a - b)), plain(2)),
            interval(&r.file, |v| format!("{:.3}", v / 1e6)),
        ]);
    }
    table.print();
}
