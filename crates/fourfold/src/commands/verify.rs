//! `fourfold verify`: whether an output is as it was written.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use fourfold_disk::{CHECKSUMS, Finding};
use fourfold_train::checkpoint;
use serde::Serialize;

use crate::context::Context;
use crate::human;
use crate::output::Report;

#[derive(Args)]
pub struct VerifyArgs {
    /// What `compress`, `merge` or `train` wrote: a directory with `checksums.json`, or a whole output of `train`.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Serialize)]
struct VerifyReport {
    intact: bool,
    directories: Vec<Checked>,
}

#[derive(Serialize)]
struct Checked {
    directory: String,
    /// Files that were written.
    files: usize,
    bytes: u64,
    findings: Vec<Finding>,
}

pub fn run(args: &VerifyArgs, context: &Context) -> Result<()> {
    let directories = outputs(&args.dir)?.iter().map(|dir| check(dir)).collect::<Result<Vec<_>>>()?;
    let wrong: usize = directories.iter().map(|d| d.findings.len()).sum();
    context.print(&VerifyReport { intact: wrong == 0, directories })?;
    if wrong > 0 {
        bail!("{}: {wrong} {} not as written", args.dir.display(), if wrong == 1 { "file is" } else { "files are" });
    }
    Ok(())
}

/// The directory itself, or those of a training run in it.
fn outputs(dir: &Path) -> Result<Vec<PathBuf>> {
    if dir.join(CHECKSUMS).is_file() {
        return Ok(vec![dir.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| anyhow::anyhow!("{}: {e}", dir.display()))? {
        let path = entry?.path();
        found.extend(path.join(CHECKSUMS).is_file().then_some(path));
    }
    found.sort();
    if found.is_empty() {
        bail!("{}: there is no {CHECKSUMS}, in it or one directory below", dir.display());
    }
    Ok(found)
}

fn check(dir: &Path) -> Result<Checked> {
    let directory = dir.display().to_string();
    if dir.join("trainer_state.json").is_file() || is_checkpoint(dir) {
        let checked = checkpoint::verify(dir)?;
        let files = checked.files;
        let findings = checked.findings.into_iter().map(|(file, reason)| Finding::Differs { file, reason }).collect();
        return Ok(Checked { directory, files, bytes: checked.bytes, findings });
    }
    let done = fourfold_disk::verify(dir)?;
    Ok(Checked { directory, files: done.files, bytes: done.bytes, findings: done.findings })
}

/// By name: its state may be what is missing.
fn is_checkpoint(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.strip_prefix("checkpoint-").is_some_and(|step| step.parse::<u64>().is_ok())
}

impl Report for VerifyReport {
    fn text(&self) -> String {
        let mut text = String::new();
        for Checked { directory, files, bytes, findings } in &self.directories {
            for finding in findings {
                text += &match finding {
                    Finding::Differs { file, reason } => format!("{directory}/{file}: differs ({reason})\n"),
                    Finding::Missing { file } => format!("{directory}/{file}: is missing\n"),
                    Finding::Extra { file } => format!("{directory}/{file}: was not written with the rest\n"),
                };
            }
            if findings.is_empty() {
                text += &format!("{directory}: {files} files, {}, as they were written\n", human::bytes(*bytes));
            }
        }
        text
    }
}
