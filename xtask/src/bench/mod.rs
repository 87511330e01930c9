//! Benches side by side: this program and llama.cpp's tools on the same work, interleaved in one run.

mod experiment;
mod fashion;
mod measure;
mod quality;
mod seeds;
mod speed;
mod table;
mod text;
mod train;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

/// What to compare.
#[derive(Subcommand)]
pub enum Bench {
    /// Prefill and decode speed and peak memory against llama-bench.
    Speed(speed::Args),
    /// Perplexity and KL divergence at given bytes against llama-quantize's files.
    Quality(quality::Args),
    /// Training time and peak memory against PyTorch.
    Train(train::Args),
    /// Held-out loss of several ways to train over several seeds, each seed's runs paired.
    Seeds(seeds::Args),
    /// A classifier of images trained in f32, trained compressed, and in PyTorch: memory, time and accuracy.
    Fashion(Box<fashion::Args>),
    /// A language model trained in f32, and trained in less memory and compressed: memory, time and accuracy.
    Text(Box<text::Args>),
}

impl Bench {
    /// Builds this program and runs the comparison.
    pub fn run(self) -> Result<()> {
        let binary = match &self {
            Self::Fashion(args) => args.common.binary.clone(),
            Self::Text(args) => args.common.binary.clone(),
            _ => None,
        };
        let ours = binary.map_or_else(build, Ok)?;
        match self {
            Self::Speed(args) => speed::run(&ours, &args),
            Self::Quality(args) => quality::run(&ours, &args),
            Self::Train(args) => train::run(&ours, &args),
            Self::Seeds(args) => seeds::run(&ours, &args),
            Self::Fashion(args) => fashion::run(&ours, &args),
            Self::Text(args) => text::run(&ours, &args),
        }
    }
}

/// Builds the release binary and returns its path.
pub fn build() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "fourfold"])
        .current_dir(root)
        .status()
        .context("cargo build")?;
    ensure!(status.success(), "the build failed");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release").join("fourfold"))
}

/// A tool of llama.cpp's in the folder the user named.
fn tool(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "{}: not there; build llama.cpp's tools and name their folder with --llama-cpp",
        path.display()
    );
    Ok(path)
}
