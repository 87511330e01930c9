//! The journal of a run: which plan it is, and a line for each tensor that is wholly written.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde_json::{Value, json};

use crate::FormatError;

/// The journal's name inside the partial output.
pub(super) const JOURNAL: &str = "fourfold-journal.jsonl";

/// FNV-1a (Fowler, Noll, Vo), 64 bits, over 8-byte words: tells a torn write from a whole one, no more.
pub(super) fn checksum<B: AsRef<[u8]>>(runs: &[B]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |word: u64| {
        sum = (sum ^ word).wrapping_mul(PRIME);
        // Words are wider than the bytes the hash was made for: bring the high bits down.
        sum ^= sum >> 29;
    };
    for run in runs {
        let (words, rest) = run.as_ref().as_chunks::<8>();
        words.iter().for_each(|w| mix(u64::from_le_bytes(*w)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        mix(u64::from_le_bytes(last));
        mix(run.as_ref().len() as u64);
    }
    sum
}

/// An open journal.
pub(super) struct Journal {
    file: File,
    plan: u64,
    finished: HashMap<String, u64>,
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
        let Some(plan) = lines.next().and_then(Result::ok).and_then(|v| hex(&v["plan"])) else { return Ok(None) };
        let mut finished = HashMap::new();
        for line in lines.filter_map(Result::ok) {
            if let (Some(tensor), Some(sum)) = (line["tensor"].as_str(), hex(&line["checksum"])) {
                finished.insert(tensor.to_owned(), sum);
            }
        }
        let file = OpenOptions::new().write(true).open(&path).map_err(FormatError::io(&path))?;
        // Lines go after the last whole one.
        file.set_len(whole.len() as u64).map_err(FormatError::io(&path))?;
        drop(file);
        let file = OpenOptions::new().append(true).open(&path).map_err(FormatError::io(&path))?;
        Ok(Some(Self { file, plan, finished }))
    }

    /// A new journal in `dir`.
    pub fn create(dir: &Path, plan: u64) -> Result<Self, FormatError> {
        let path = dir.join(JOURNAL);
        let mut file = File::create(&path).map_err(FormatError::io(&path))?;
        let line = format!("{}\n", json!({"plan": format!("{plan:016x}")}));
        file.write_all(line.as_bytes()).map_err(FormatError::io(&path))?;
        Ok(Self { file, plan, finished: HashMap::new() })
    }

    /// The plan it belongs to.
    pub fn plan(&self) -> u64 {
        self.plan
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
        self.file.write_all(line.as_bytes())
    }
}

/// A checksum as journals write it.
fn hex(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?, 16).ok()
}
