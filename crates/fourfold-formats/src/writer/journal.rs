//! The journal of a run: which run and plan it is, a line for each tensor that is wholly written, and one when the output is
//! about to get its name.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::Hasher;
use std::io::{ErrorKind, Write};
use std::path::Path;

use fourfold_disk::Identity;
use serde_json::{Value, json};
use twox_hash::XxHash3_64;

use crate::FormatError;

/// The journal's name inside the partial output.
pub(super) const JOURNAL: &str = "fourfold-journal.jsonl";

/// XXH3 (Collet), 64 bits: tells a torn write from a whole one.
pub(super) fn checksum<B: AsRef<[u8]>>(runs: &[B]) -> u64 {
    let mut sum = XxHash3_64::new();
    for run in runs {
        sum.write(run.as_ref());
        sum.write(&(run.as_ref().len() as u64).to_le_bytes());
    }
    sum.finish()
}

/// An open journal.
pub(super) struct Journal {
    file: File,
    plan: u64,
    identity: Identity,
    finished: HashMap<String, u64>,
    publishing: Option<String>,
}

impl Journal {
    /// The journal in `dir`, with what it says already; `None` where there is none or it is not readable as one.
    pub fn read(dir: &Path) -> Result<Option<Self>, FormatError> {
        let path = dir.join(JOURNAL);
        let text = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(FormatError::Io { file: path, source: e }),
        };
        // A last line without its end was being written when the run was killed.
        let whole = text.rfind('\n').map_or("", |end| &text[..end + 1]);
        let mut lines = whole.lines().map(serde_json::from_str::<Value>);
        let Some(head) = lines.next().and_then(Result::ok) else { return Ok(None) };
        let Some(plan) = hex(&head["plan"]) else { return Ok(None) };
        let identity = serde_json::from_value(head["identity"].clone()).unwrap_or_default();
        let (mut finished, mut publishing) = (HashMap::new(), None);
        for line in lines.filter_map(Result::ok) {
            if let (Some(tensor), Some(sum)) = (line["tensor"].as_str(), hex(&line["checksum"])) {
                finished.insert(tensor.to_owned(), sum);
            } else if let Some(sum) = line["publishing"].as_str() {
                publishing = Some(sum.to_owned());
            }
        }
        let file = OpenOptions::new().write(true).open(&path).map_err(FormatError::io(&path))?;
        // Lines go after the last whole one.
        file.set_len(whole.len() as u64).map_err(FormatError::io(&path))?;
        drop(file);
        let file = OpenOptions::new().append(true).open(&path).map_err(FormatError::io(&path))?;
        Ok(Some(Self { file, plan, identity, finished, publishing }))
    }

    /// A new journal in `dir`.
    pub fn create(dir: &Path, plan: u64, identity: &Identity) -> Result<Self, FormatError> {
        let path = dir.join(JOURNAL);
        let mut file = File::create(&path).map_err(FormatError::io(&path))?;
        let line = format!("{}\n", json!({"plan": format!("{plan:016x}"), "identity": identity}));
        file.write_all(line.as_bytes()).map_err(FormatError::io(&path))?;
        Ok(Self { file, plan, identity: identity.clone(), finished: HashMap::new(), publishing: None })
    }

    /// The plan it belongs to.
    pub fn plan(&self) -> u64 {
        self.plan
    }

    /// The run it belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// SHA-256 of the checksums of the output that was about to get its name.
    pub fn publishing(&self) -> Option<&str> {
        self.publishing.as_deref()
    }

    /// Notes that the output with these checksums is about to get its name; durable when it returns.
    pub fn note_publishing(&mut self, sum: &str) -> std::io::Result<()> {
        self.file.write_all(format!("{}\n", json!({"publishing": sum})).as_bytes())?;
        self.file.sync_all()
    }

    /// Checksum of a finished tensor.
    pub fn finished(&self, tensor: &str) -> Option<u64> {
        self.finished.get(tensor).copied()
    }

    /// All finished tensors.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.finished.iter().map(|(tensor, &sum)| (tensor.as_str(), sum))
    }

    /// Notes a finished tensor.
    pub fn note(&mut self, tensor: &str, sum: u64) -> std::io::Result<()> {
        let line = format!("{}\n", json!({"tensor": tensor, "checksum": format!("{sum:016x}")}));
        self.file.write_all(line.as_bytes())?;
        self.finished.insert(tensor.to_owned(), sum);
        Ok(())
    }
}

/// A checksum as journals write it.
fn hex(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?, 16).ok()
}
