//! The whole claim on a classifier of images: trained in f32, and trained compressed from its first step (layers as low-rank chains, bf16
//! weights with 8-bit states, then pruned and trained on under the mask, then quantized), on the same images with the same seeds.
//!
//! Every command of a run counts: the peak is the largest of all its processes', the time their sum. The control is the f32 result put
//! through the same compression without training after it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::experiment::{Bill, Common, Readings, print};
use super::measure;

/// Options of `cargo xtask bench fashion`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
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
    #[arg(long, default_value = "svd:64,tucker:0.75")]
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
    #[arg(long, default_value_t = 3.0)]
    epochs_factors: f64,
    /// Passes of the compressed run after pruning.
    #[arg(long, default_value_t = 2.0)]
    epochs_pruned: f64,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Learning rate after pruning.
    #[arg(long, default_value_t = 1e-3)]
    lr_pruned: f64,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    batch: usize,
}

/// The commands of one run, added up.
struct Run<'a> {
    args: &'a Args,
    bill: Bill<'a>,
}

impl<'a> Run<'a> {
    fn new(ours: &'a Path, args: &'a Args) -> Self {
        Self { args, bill: Bill::new(ours, args.common.threads) }
    }

    fn train(&mut self, begin: &[&str], out: &Path, epochs: f64, lr: f64, seed: u64) -> Result<()> {
        let (images, out) = (self.args.images.display().to_string(), out.display().to_string());
        let (epochs, lr, seed, batch) =
            (epochs.to_string(), lr.to_string(), seed.to_string(), self.args.batch.to_string());
        let common = ["--data", &images, "--output", &out, "--epochs", &epochs, "--lr", &lr, "--seed", &seed];
        // The same decay for all: an existing model's default is another.
        let more = ["--batch-size", &batch, "--weight-decay", "0.1", "--beta2", "0.95", "--save-every", "0"];
        self.bill.command(&[&["train"], begin, &common, &more, &["--eval-every", "0"]].concat())?;
        Ok(())
    }

    /// Adds the readings, with the accuracy and size of the result, which is measured apart.
    fn close(self, to: &mut Readings, model: &Path) -> Result<()> {
        let (images, name) = (self.args.images.display().to_string(), model.display().to_string());
        let (value, _) = self.bill.uncounted(&["eval", &name, "--data", &images])?;
        self.bill.close(to, value["accuracy"].as_f64().context("`accuracy`")?, model)
    }
}

/// Runs and prints the comparison.
pub fn run(binary: &Path, args: &Args) -> Result<()> {
    let mut all =
        ["fourfold f32", "fourfold compressed", "control: not trained after", "PyTorch f32"].map(Readings::named);
    let network = args.network.display().to_string();
    for (done, seed) in args.common.seeds().enumerate() {
        let folder = |kind: &str| args.common.work.join(format!("{kind}-{seed}"));
        if args.common.work.exists() {
            std::fs::remove_dir_all(&args.common.work)?;
        }
        let [base, factors, pruned, tuned, small, control] =
            ["f32", "factors", "pruned", "tuned", "small", "control"].map(folder);
        let text = |path: &Path| path.display().to_string();

        eprintln!("seed {seed}: f32");
        let mut run = Run::new(binary, args);
        run.train(&["--model-config", &network, "--preset", "baseline"], &base, args.epochs, args.lr, seed)?;
        run.close(&mut all[0], &base.join("final"))?;

        eprintln!("seed {seed}: compressed");
        let mut run = Run::new(binary, args);
        let begin = ["--model-config", &network, "--factorize", &args.factorize, "--preset", "quarter"];
        run.train(&begin, &factors, args.epochs_factors, args.lr, seed)?;
        let prune = format!("{},quantize:16", args.prune);
        run.bill.command(&["compress", &text(&factors.join("final")), &text(&pruned), "--method", &prune])?;
        let begin = ["--model", &text(&pruned), "--preset", "quarter"];
        run.train(&begin, &tuned, args.epochs_pruned, args.lr_pruned, seed)?;
        let store = format!("{},quantize:{}", args.prune, args.bits);
        run.bill.command(&["compress", &text(&tuned.join("final")), &text(&small), "--method", &store])?;
        run.close(&mut all[1], &small)?;

        eprintln!("seed {seed}: control");
        let run = Run::new(binary, args);
        let at_once = format!("{},{store}", args.factorize);
        run.bill.uncounted(&["compress", &text(&base.join("final")), &text(&control), "--method", &at_once])?;
        run.close(&mut all[2], &control)?;

        if let Some(python) = &args.python {
            eprintln!("seed {seed}: PyTorch");
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/peer_fashion.py");
            let mut command = Command::new(python);
            command.arg(script).args([&args.network, &args.images]).args(["--epochs", &args.epochs.to_string()]);
            command.args(["--seed", &seed.to_string(), "--batch", &args.batch.to_string()]);
            command.args(["--lr", &args.lr.to_string(), "--threads", &args.common.threads.to_string()]);
            let peer = measure::run(&mut command)?;
            let value: Value = serde_json::from_str(peer.stdout.lines().last().unwrap_or_default())?;
            all[3].accuracy.push(value["accuracy"].as_f64().context("`accuracy`")?);
            all[3].add(&peer);
        }
        println!("\nafter {} of {} seeds\n", done + 1, args.common.seeds);
        print(&all);
    }
    Ok(())
}
