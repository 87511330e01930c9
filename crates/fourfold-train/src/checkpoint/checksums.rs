//! `checksums.json`: the CRC-32C (RFC 3720, B.4) of every tensor that a run is resumed from, and of its state. A disk that gives
//! back other bytes than it was given, or a file cut short, shows before it is trained on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crc32c::crc32c;
use serde::{Deserialize, Serialize};

use super::CheckpointError;

/// The file's name.
pub(super) const CHECKSUMS: &str = "checksums.json";
/// What is said of bytes that are not those written.
pub(super) const DIFFERS: &str = "is damaged: its checksum differs";

/// By file, and for safetensors files by tensor.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Checksums {
    files: BTreeMap<String, u32>,
    tensors: BTreeMap<String, BTreeMap<String, u32>>,
}

impl Checksums {
    /// Reads the file.
    pub fn read(file: &Path) -> Result<Self, CheckpointError> {
        let text = fs::read_to_string(file).map_err(|source| CheckpointError::Io { file: file.into(), source })?;
        serde_json::from_str(&text).map_err(|e| CheckpointError::Malformed { file: file.into(), reason: e.to_string() })
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Files of tensors.
    pub fn tensor_files(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensors of a file.
    pub fn tensors_of(&self, file: &str) -> Vec<String> {
        self.tensors.get(file).into_iter().flat_map(BTreeMap::keys).cloned().collect()
    }

    pub fn add_file(&mut self, file: &str, data: &[u8]) {
        self.files.insert(file.to_owned(), crc32c(data));
    }

    pub fn add_tensor(&mut self, file: &str, tensor: &str, data: &[u8]) {
        self.tensors.entry(file.to_owned()).or_default().insert(tensor.to_owned(), crc32c(data));
    }

    /// Whether `data` is the file as it was written.
    pub fn is_file(&self, file: &str, data: &[u8]) -> bool {
        self.files.get(file) == Some(&crc32c(data))
    }

    /// Whether `data` is the tensor as it was written.
    pub fn is_tensor(&self, file: &str, tensor: &str, data: &[u8]) -> bool {
        self.tensors.get(file).and_then(|tensors| tensors.get(tensor)) == Some(&crc32c(data))
    }
}
