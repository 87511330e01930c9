//! House tasks: the architecture's rules, synthetic checkpoints, torture, and benches side by side with other programs.

mod bench;
mod dependencies;
mod rules;
mod sparse;
#[cfg(unix)]
mod torture;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// House tasks.
#[derive(Parser)]
enum Task {
    /// Check the invariants of ARCHITECTURE.md that a machine can check.
    Rules,
    /// Write a synthetic llama checkpoint as a sparse file: its size without its disk space.
    SparseCheckpoint {
        /// The directory to make.
        out: PathBuf,
        /// Size of the weights.
        #[arg(long, default_value_t = 20.0)]
        gigabytes: f64,
    },
    /// Damage every kind of input file, kill runs at their system calls, fill the disk; look for panics, aborts, hangs and
    /// silent differences.
    #[cfg(unix)]
    Torture(torture::Args),
    /// Run this program and its peers on the same work and print ratios.
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> Result<()> {
    match Task::parse() {
        Task::Rules => rules::check(),
        Task::SparseCheckpoint { out, gigabytes } => sparse::write(&out, gigabytes),
        #[cfg(unix)]
        Task::Torture(args) => torture::run(&args),
        Task::Bench(bench) => bench.run(),
    }
}
