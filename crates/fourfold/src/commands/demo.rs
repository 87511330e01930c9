//! `fourfold demo`.

use anyhow::{Result, bail};
use clap::Args;

use crate::context::Context;

#[derive(Args, Default)]
pub struct DemoArgs {}

pub fn run(_: &DemoArgs, _: &Context) -> Result<()> {
    bail!("not yet")
}
