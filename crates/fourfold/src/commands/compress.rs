//! `fourfold compress`: writes a smaller checkpoint.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::context::Context;

#[derive(Args)]
pub struct CompressArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// The directory to write. It must not exist.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// How many times smaller all weights together become; settings are chosen tensor by tensor.
    #[arg(long, value_name = "R", conflicts_with_all = ["bits", "plan"])]
    ratio: Option<f64>,
    /// The same number of bits for every matrix.
    #[arg(long, value_name = "N", conflicts_with = "plan", value_parser = clap::value_parser!(u8).range(2..=8))]
    bits: Option<u8>,
    /// How codes are found.
    #[arg(long, default_value = "gptq")]
    method: MethodArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    Rtn,
    Gptq,
}

pub fn run(_: &CompressArgs, _: &Context) -> Result<()> {
    bail!("not yet")
}
