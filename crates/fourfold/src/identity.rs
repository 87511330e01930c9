//! What decides the bytes that a run writes: settings, kernels, this program's version, and the content of every input. A run goes on from what
//! another left only where all of these are the same.

use std::path::{Path, PathBuf};

use anyhow::Result;
use fourfold_disk::{DiskError, Identity, Inputs};

use crate::context::Context;

/// From so many bytes on, reading the inputs is shown.
const SHOWN: u64 = 2_000_000_000;

/// Notes the files of a model: weights, configuration, tokenizer, template.
pub fn model(inputs: &mut Inputs, name: &str, path: &Path) -> Result<(), DiskError> {
    if path.is_dir() {
        return inputs.directory(name, path, decides);
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if file.ends_with(".safetensors") {
        // Configuration and tokenizer lie beside it.
        return inputs.directory(name, folder, |other| other == file || (decides(other) && !is_weights(other)));
    }
    // A GGUF file may be one of several: NAME-00001-of-00003.gguf.
    let stem = file.strip_suffix(".gguf").unwrap_or(&file);
    let first = stem.rsplit_once("-of-").and_then(|(first, count)| Some((first.rsplit_once('-')?.0.to_owned(), count)));
    match first {
        Some((first, count)) => {
            let end = format!("-of-{count}.gguf");
            inputs.directory(name, folder, |other| other.starts_with(&first) && other.ends_with(&end))
        }
        None => {
            inputs.file(name, path);
            Ok(())
        }
    }
}

fn is_weights(name: &str) -> bool {
    [".safetensors", ".gguf", ".bin"].iter().any(|end| name.ends_with(end))
}

/// Whether a file of a model's directory, by its name, is one that a run reads.
fn decides(name: &str) -> bool {
    const REPORTS: &[&str] =
        &[fourfold_disk::CHECKSUMS, "compression_report.json", "trainer_state.json", "optimizer.safetensors"];
    let is_read = [".safetensors", ".gguf", ".json", ".jinja", ".model"].iter().any(|end| name.ends_with(end));
    (is_read || name == "merges.txt" || name == "adapter_model.bin")
        && !REPORTS.contains(&name)
        && !name.starts_with('.')
}

/// Notes files or directories that an option names, in their order.
pub fn files(inputs: &mut Inputs, option: &str, paths: &[PathBuf]) -> Result<(), DiskError> {
    for (i, path) in paths.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = if paths.len() > 1 { format!(" {}", i + 1) } else { String::new() };
        inputs.tree(&format!("{option}{number} {name}"), path)?;
    }
    Ok(())
}

/// The content of the inputs, and what decides bytes in every command.
pub fn of(inputs: &Inputs, context: &Context) -> Result<Identity> {
    let mut identity = read(inputs, context)?;
    identity.extend(program(context));
    Ok(identity)
}

/// This program on this machine.
pub fn program(context: &Context) -> Identity {
    let mut identity = Identity::default();
    identity.set("fourfold", env!("CARGO_PKG_VERSION"));
    identity.set("the kernels (--isa, --activations, --float-products)", &context.kernels);
    identity
}

/// Reads the inputs.
pub fn read(inputs: &Inputs, context: &Context) -> Result<Identity> {
    let bytes = inputs.bytes();
    let bar = (bytes >= SHOWN).then(|| context.progress.bytes("reading the inputs", bytes));
    let identity = inputs.fingerprint(&|read| {
        if let Some(bar) = &bar {
            bar.inc(read);
        }
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(identity)
}
