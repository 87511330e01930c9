//! What the experiments of the whole claim share: what the commands of a run took together, and the table of all runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::Value;

use super::measure;
use super::table::{Table, interval, megabytes};

/// Options of every such experiment.
#[derive(clap::Args)]
pub struct Common {
    /// This program, already built [default: it is built].
    #[arg(long)]
    pub binary: Option<PathBuf>,
    /// Seeds: a run of each kind for each.
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// The first seed. Settings that were chosen by the test's accuracy with some seeds are to be measured with others.
    #[arg(long, default_value_t = 0)]
    pub first_seed: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the runs write; emptied before each.
    #[arg(long)]
    pub work: PathBuf,
}

impl Common {
    /// The seeds to run.
    pub fn seeds(&self) -> std::ops::Range<u64> {
        self.first_seed..self.first_seed + self.seeds
    }
}

/// What one kind of run took, a reading a seed.
#[derive(Default)]
pub struct Readings {
    pub name: &'static str,
    /// Largest resident set of its processes, bytes; 0 where nothing was trained.
    pub peak: Vec<f64>,
    pub wall: Vec<f64>,
    pub cpu: Vec<f64>,
    pub accuracy: Vec<f64>,
    /// Bytes of the result's weights.
    pub file: Vec<f64>,
}

impl Readings {
    /// None yet.
    pub fn named(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }

    /// What one process took.
    pub fn add(&mut self, run: &measure::Run) {
        self.peak.push(run.peak_rss as f64);
        self.wall.push(run.wall.as_secs_f64());
        self.cpu.push(run.cpu.as_secs_f64());
    }
}

/// The commands of one run of this program: the largest of their peaks, the sums of their times.
#[derive(Clone)]
pub struct Bill<'a> {
    ours: &'a Path,
    threads: usize,
    peak: u64,
    wall: f64,
    cpu: f64,
}

impl<'a> Bill<'a> {
    pub fn new(ours: &'a Path, threads: usize) -> Self {
        Self { ours, threads, peak: 0, wall: 0.0, cpu: 0.0 }
    }

    /// Runs a command that counts, and reads what it prints.
    pub fn command(&mut self, words: &[&str]) -> Result<Value> {
        let (value, run) = self.uncounted(words)?;
        self.peak = self.peak.max(run.peak_rss);
        self.wall += run.wall.as_secs_f64();
        self.cpu += run.cpu.as_secs_f64();
        Ok(value)
    }

    /// Runs a command that does not count.
    pub fn uncounted(&self, words: &[&str]) -> Result<(Value, measure::Run)> {
        let threads = self.threads.to_string();
        let run = measure::run(Command::new(self.ours).args(words).args(["--threads", &threads, "--json"]))?;
        Ok((serde_json::from_str(&run.stdout)?, run))
    }

    /// Adds the readings, with the accuracy and size of the result.
    pub fn close(self, to: &mut Readings, accuracy: f64, model: &Path) -> Result<()> {
        to.accuracy.push(accuracy);
        to.peak.push(self.peak as f64);
        to.wall.push(self.wall);
        to.cpu.push(self.cpu);
        to.file.push(std::fs::metadata(model.join("model.safetensors"))?.len() as f64);
        Ok(())
    }
}

/// Prints all runs beside the first.
pub fn print(all: &[Readings]) {
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
