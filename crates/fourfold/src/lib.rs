//! The commands of `fourfold`. This crate opens files and prints; everything it knows about models is in the libraries.
//!
//! It is a library so that its readers of files can be tried with any bytes ([`parsers`]); the program is [`main`].

mod args;
mod assets;
mod child;
mod commands;
mod context;
mod data_files;
mod described;
mod device;
mod fit;
mod gguf;
mod hub;
mod human;
mod identity;
mod images;
mod included_text;
mod interrupt;
mod limits;
mod memory;
mod model;
mod output;
pub mod parsers;
mod progress;
mod tokenizer;
mod weights;

use std::process::ExitCode;

use clap::Parser;

/// The program: reads the command line, runs the command, and gives the exit code.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(report_bug));
    let args = args::Cli::parse();
    interrupt::install();
    match commands::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if interrupt::requested() => {
            output::note(&format!("{error:#}"));
            ExitCode::from(interrupt::EXIT_CODE)
        }
        Err(error) => {
            output::note(&format!("error: {}", output::chain(&error)));
            if output::is_usage(&error) { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// What a user sees of a mistake of ours. The exit code is 101.
fn report_bug(info: &std::panic::PanicHookInfo) {
    if fourfold_infer::is_guarded() {
        return;
    }
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    let what = text.unwrap_or("no message");
    let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
    output::note(&format!("error: a bug in fourfold: {what}{place}\nPlease report it with the command that led here."));
}
