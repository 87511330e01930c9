//! What a command says: one JSON object or text on stdout, errors in one line.

use std::io::{self, Write};

use anyhow::{Error, Result};
use serde::Serialize;

/// A result that people and programs can read.
pub trait Report: Serialize {
    /// The text form.
    fn text(&self) -> String;
}

/// Prints a report.
pub fn print(report: &impl Report, json: bool) -> Result<()> {
    let mut text = if json { serde_json::to_string_pretty(report)? } else { report.text() };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    write(&text)
}

/// Writes text to stdout at once.
pub fn write(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Says something on stderr. Where nobody listens, that is no reason to fail.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A command that was given wrongly: exit code 2, as clap's own refusals.
#[derive(Debug)]
pub struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Marks an error as one of usage.
pub fn usage(error: Error) -> Error {
    Error::new(Usage(chain(&error)))
}

/// Whether the command was given wrongly: a refusal that begins with an option's name is one of its value, whenever that was judged.
pub fn is_usage(error: &Error) -> bool {
    error.chain().any(|cause| cause.is::<Usage>()) || chain(error).starts_with("--")
}

/// Whether the reader of stdout went away.
pub fn is_broken_pipe(error: &Error) -> bool {
    let kinds = error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::BrokenPipe)
}

/// The error and its causes in one line. A cause that the line says already (errors that show their source) is left out.
pub fn chain(error: &Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().trim().replace('\n', " ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_follow_without_repetition() {
        let error = Err::<(), _>(anyhow!("no space left")).context("cannot write x: no space left").context("compress");
        assert_eq!(chain(&error.unwrap_err()), "compress: cannot write x: no space left");
    }
}
