//! One file a command: its options, its run, its report.

mod answer;
pub mod bench;
pub mod calibration;
pub mod chat;
pub mod compare;
pub mod compress;
pub mod demo;
pub mod devices;
pub mod docs;
pub mod eval;
pub mod export;
pub mod generate;
pub mod imatrix;
pub mod inspect;
pub mod merge;
pub mod plan;
mod sampling;
pub mod serve;
pub mod train;
pub mod verify;

use anyhow::{Result, bail};

use fourfold_kernels::heap_is_for;

use crate::args::{Cli, Command};
use crate::context::Context;
use crate::device::DeviceArg;

/// Runs what the command line asks for.
pub fn run(cli: Cli) -> Result<()> {
    let context = Context::new(cli.global)?;
    let command = cli.command.unwrap_or(Command::Demo(demo::DemoArgs::default()));
    if let (DeviceArg::Gpu(_), Some(name)) = (context.global.device, on_the_processor(&command)) {
        bail!(
            "--device {}: {name} computes on the CPU; {} run on a GPU",
            context.global.device,
            devices::COMMANDS.join(", ")
        );
    }
    heap_is_for("the command");
    match command {
        Command::Imatrix(args) => imatrix::run(&args, &context),
        Command::Inspect(args) => inspect::run(&args, &context),
        Command::Compress(args) => compress::run(&args, &context),
        Command::Export(args) => export::run(&args, &context),
        Command::Eval(args) => eval::run(&args, &context),
        Command::Generate(args) => generate::run(&args, &context),
        Command::Chat(args) => chat::run(&args, &context),
        Command::Serve(args) => serve::run(&args, &context),
        Command::Compare(args) => compare::run(&args, &context),
        Command::Devices => devices::run(&context),
        Command::Bench(args) => bench::run(&args, &context),
        Command::Plan(args) => plan::run(&args, &context),
        Command::Train(args) => train::run(&args, &context),
        Command::Merge(args) => merge::run(&args, &context),
        Command::Verify(args) => verify::run(&args, &context),
        Command::Docs(args) => docs::run(&args),
        Command::Demo(args) => demo::run(&args, &context),
    }
}

/// The name of a command that has no use for a GPU.
fn on_the_processor(command: &Command) -> Option<&'static str> {
    match command {
        Command::Compress(_) => Some("compress"),
        Command::Export(_) => Some("export"),
        Command::Imatrix(_) => Some("imatrix"),
        Command::Serve(_) => Some("serve"),
        Command::Train(_) => Some("train"),
        Command::Merge(_) => Some("merge"),
        _ => None,
    }
}
