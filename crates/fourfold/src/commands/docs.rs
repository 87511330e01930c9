//! `fourfold docs`: what a package of the program carries beside it.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::args::Cli;
use crate::output;

#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct DocsArgs {
    /// Print the completions of this shell.
    #[arg(long, value_name = "SHELL")]
    completions: Option<Shell>,
    /// Write the manual's pages (fourfold.1 and one a command) into this directory.
    #[arg(long, value_name = "DIR")]
    man: Option<PathBuf>,
}

pub fn run(args: &DocsArgs) -> Result<()> {
    let mut command = Cli::command();
    if let Some(shell) = args.completions {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, "fourfold", &mut text);
        return output::write(&String::from_utf8_lossy(&text));
    }
    let Some(dir) = &args.man else { return Ok(()) };
    let named = || dir.display().to_string();
    std::fs::create_dir_all(dir).with_context(named)?;
    clap_mangen::generate_to(command, dir).with_context(named)
}
