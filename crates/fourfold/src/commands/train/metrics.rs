//! `metrics.jsonl`: one JSON object a step, appended; and the same in TensorBoard's event files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::tensorboard::EventFile;

/// An open metrics file.
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: EventFile,
}

impl Metrics {
    /// Opens the file in `output`; lines of steps after `step`, left by a run that was stopped, are cut off.
    pub fn open(output: &Path, step: u64) -> Result<Self> {
        let path = output.join("metrics.jsonl");
        let file = open_until(&path, step)?;
        let events = EventFile::create(output, step).with_context(|| output.display().to_string())?;
        Ok(Self { file, path, events })
    }

    /// The held-out loss before the first step, if the run in `output` has measured it.
    pub fn first_held_out(output: &Path) -> Option<f64> {
        let file = File::open(output.join("metrics.jsonl")).ok()?;
        let lines = BufReader::new(file.take(1 << 16)).lines().map_while(Result::ok);
        let values = lines.map_while(|line| serde_json::from_str::<Value>(&line).ok());
        values.take_while(|values| values["step"] == 0).last()?["eval/loss"].as_f64()
    }

    /// Goes back to `step`: what was written of later steps is void.
    pub fn cut(&mut self, step: u64) -> Result<()> {
        self.file = open_until(&self.path, step)?;
        self.events.restart(step).context("TensorBoard's event file")
    }

    /// Appends the values of a step.
    pub fn write(&mut self, step: u64, mut values: Value) -> Result<()> {
        let scalars = values.as_object().into_iter().flatten();
        let scalars = scalars.filter_map(|(tag, value)| Some((tag.as_str(), value.as_f64()? as f32)));
        self.events.scalars(step, scalars).context("TensorBoard's event file")?;
        if let Some(object) = values.as_object_mut() {
            object.insert("step".to_owned(), step.into());
        }
        // A line in one write.
        self.file.write_all(format!("{values}\n").as_bytes()).with_context(|| self.path.display().to_string())
    }

    /// Makes all lines durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        self.events.sync()
    }
}

/// Opens the file for appending, without lines of steps after `step` and what a killed run left of a line. What is cut off goes by a
/// whole new file: the lines before are never lost.
fn open_until(path: &Path, step: u64) -> Result<File> {
    if let Ok(bytes) = fs::read(path) {
        let text = String::from_utf8_lossy(&bytes);
        let is_kept = |line: &&str| {
            serde_json::from_str::<Value>(line).is_ok_and(|v| v["step"].as_u64().is_some_and(|s| s <= step))
        };
        let kept: String = text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect();
        if kept.as_bytes() != bytes {
            fourfold_disk::write_whole(path, kept.as_bytes())?;
        }
    }
    OpenOptions::new().create(true).append(true).open(path).with_context(|| path.display().to_string())
}
