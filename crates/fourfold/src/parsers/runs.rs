//! Readers of what runs leave, and of what is written to begin them.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use clap::Parser as _;
use fourfold_disk::Identity;
use fourfold_formats::{ModelFiles, SafetensorsWriter, WriteOptions};
use fourfold_infer::eval::SavedLogits;
use fourfold_tensor::{DType, Form, WeightSink};
use fourfold_train::checkpoint::{self, State};
use fourfold_train::recipe::Recipe;
use fourfold_train::store::ParameterStore;

use super::{files, models, put};
use crate::args::Cli;
use crate::commands::train::{try_metrics, try_settings};

/// `trainer_state.json`, `checksums.json` and `optimizer.safetensors` of a checkpoint of the smallest model.
pub(super) fn checkpoint(input: &[u8], dir: &Path) -> bool {
    let [state, sums, optimizer] = files(input);
    let read = || {
        let (place, recipe) = (dir.join("checkpoint-3"), Recipe::QUARTER);
        let begun = State::begin(&recipe, 3);
        let mut store = ParameterStore::initialize(models::tiny()?, 0.1, 1, &recipe);
        if !place.exists() {
            checkpoint::save(&place, &store, &State { step: 3, ..begun.clone() }, &|_| Ok(())).ok()?;
        }
        put(&place, "trainer_state.json", state)?;
        put(&place, "checksums.json", sums)?;
        put(&place, "optimizer.safetensors", optimizer)?;
        let origin = checkpoint::check_origin(&place, &begun).is_ok();
        let verified = checkpoint::verify(&place).is_ok_and(|verified| verified.findings.is_empty());
        let restored = checkpoint::restore(&place, &mut store).is_ok();
        (origin && verified && restored).then_some(())
    };
    read().is_some()
}

/// `checksums.json` of an output.
pub(super) fn checksums(input: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "config.json", b"{}")?;
        put(dir, "checksums.json", input)?;
        fourfold_disk::verify(dir).ok()
    };
    read().is_some()
}

/// The journal of a compression that was stopped.
pub(super) fn journal(input: &[u8], dir: &Path) -> bool {
    let read = || {
        let (out, partial) = (dir.join("out"), dir.join("out.partial"));
        fs::create_dir_all(&partial).ok()?;
        put(&partial, "fourfold-journal.jsonl", input)?;
        put(&partial, "model.safetensors", input)?;
        let mut identity = Identity::default();
        identity.set("--bits", 4);
        let options = WriteOptions { identity, ..WriteOptions::default() };
        let mut writer = SafetensorsWriter::create(&out, ModelFiles::config(serde_json::json!({})), options).ok()?;
        let tensors = ["a", "b"].map(|name| (name.to_owned(), Form::Dense { shape: vec![2, 4], dtype: DType::F32 }));
        writer.begin(&tensors).ok()?;
        let taken_up = writer.resumed().count();
        let read = tensors.iter().all(|(name, _)| writer.written(name).is_ok());
        writer.discard();
        drop(writer);
        (read && taken_up > 0).then_some(())
    };
    let done = read().is_some();
    let _ = fs::remove_dir_all(dir.join("out.partial"));
    done
}

/// `metrics.jsonl` of a run that goes on.
pub(super) fn metrics(input: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "metrics.jsonl", input)?;
        let done = try_metrics(dir).ok();
        for entry in fs::read_dir(dir).ok()?.flatten() {
            fs::remove_file(entry.path()).ok()?;
        }
        done
    };
    read().is_some()
}

/// The TOML file of a training run.
pub(super) fn run_toml(input: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "run.toml", input)?;
        let words = ["fourfold".into(), "train".into(), "--config".into(), dir.join("run.toml").into_os_string()];
        let cli = Cli::try_parse_from(words).ok()?;
        try_settings(cli.command.as_ref()?).ok()
    };
    read().is_some()
}

/// Saved logits.
pub(super) fn saved_logits(input: &[u8], _: &Path) -> bool {
    let read = || {
        let mut saved = SavedLogits::open(Cursor::new(input)).ok()?;
        while saved.left() > 0 {
            saved.read(1).ok()?;
        }
        Some(())
    };
    read().is_some()
}

/// A command line, a word a line.
pub(super) fn options(input: &[u8], _: &Path) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    Cli::try_parse_from(std::iter::once("fourfold").chain(text.lines())).is_ok()
}
