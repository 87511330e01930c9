//! What a run is: every setting that decides bytes, and the content of every input.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::DiskError;

/// What stands before the fingerprint of a file.
const CONTENT: &str = "content ";
/// What is said of a pipe or a device: it can be read once, and that is the run's to do.
const STREAM: &str = "a stream, whose content is not known";

/// Names and values, in order of name. A run goes on from what another left only where both are the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(BTreeMap<String, String>);

impl Identity {
    /// Notes a setting.
    pub fn set(&mut self, name: impl Into<String>, value: impl ToString) {
        self.0.insert(name.into(), value.to_string());
    }

    /// Takes over what another says.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Whether nothing is known: of a run of a version that did not note it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names whose values differ between this run and an earlier one.
    pub fn differing<'a>(&'a self, earlier: &'a Self) -> Vec<&'a str> {
        let mut names: Vec<&str> = self.0.keys().chain(earlier.0.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names.retain(|name| self.get(name) != earlier.get(name));
        names
    }

    /// What differs from an earlier run, in words: `--seed is 1, was 0; model.safetensors has another content`.
    pub fn told<'a>(&self, earlier: &Self, names: impl IntoIterator<Item = &'a str>) -> String {
        const MOST: usize = 6;
        let all: Vec<String> = names.into_iter().map(|name| told(name, self.get(name), earlier.get(name))).collect();
        let mut text = all[..all.len().min(MOST)].join("; ");
        if all.len() > MOST {
            text += &format!("; and {} more", all.len() - MOST);
        }
        text
    }
}

fn told(name: &str, now: Option<&str>, earlier: Option<&str>) -> String {
    match (now, earlier) {
        (Some(now), Some(earlier)) if now.starts_with(CONTENT) && earlier.starts_with(CONTENT) => {
            format!("{name} has another content")
        }
        (Some(now), None) if now.starts_with(CONTENT) => format!("{name} was not there"),
        (None, Some(earlier)) if earlier.starts_with(CONTENT) => format!("{name} is not there any more"),
        (Some(now), None) => format!("{name} is {now}, was not given"),
        (None, earlier) => format!("{name} is not given, was {}", earlier.unwrap_or("nothing")),
        (Some(now), Some(earlier)) => format!("{name} is {now}, was {earlier}"),
    }
}

/// Files whose content is part of an identity.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    files: Vec<(String, PathBuf)>,
}

impl Inputs {
    /// One file, under the name that a person is told.
    pub fn file(&mut self, name: impl Into<String>, path: &Path) {
        self.files.push((name.into(), path.to_owned()));
    }

    /// The files right inside a directory that `wanted` chooses by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn directory(&mut self, name: &str, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), DiskError> {
        for entry in fs::read_dir(dir).map_err(DiskError::io("read the directory", dir))? {
            let entry = entry.map_err(DiskError::io("read the directory", dir))?;
            let file = entry.file_name().to_string_lossy().into_owned();
            if wanted(&file) && entry.path().is_file() {
                self.file(format!("{name}/{file}"), &entry.path());
            }
        }
        Ok(())
    }

    /// A file, or every file below a directory.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn tree(&mut self, name: &str, path: &Path) -> Result<(), DiskError> {
        if !path.is_dir() {
            self.file(name, path);
            return Ok(());
        }
        for entry in fs::read_dir(path).map_err(DiskError::io("read the directory", path))? {
            let entry = entry.map_err(DiskError::io("read the directory", path))?;
            self.tree(&format!("{name}/{}", entry.file_name().to_string_lossy()), &entry.path())?;
        }
        Ok(())
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|(_, path)| Some(fs::metadata(path).ok()?.len())).sum()
    }

    /// Reads all files, several at once, and fingerprints them: XXH3 of 128 bits (Collet), at the disk's speed. `read` is told of bytes
    /// as they are read.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn fingerprint(&self, read: &(dyn Fn(u64) + Sync)) -> Result<Identity, DiskError> {
        let of = |(name, path): &(String, PathBuf)| Ok((name.clone(), content(path, read)?));
        Ok(Identity(self.files.par_iter().map(of).collect::<Result<_, DiskError>>()?))
    }
}

fn content(path: &Path, read: &(dyn Fn(u64) + Sync)) -> Result<String, DiskError> {
    let meta = fs::metadata(path).map_err(DiskError::io("read", path))?;
    if !meta.is_file() {
        return Ok(STREAM.to_owned());
    }
    let mut file = File::open(path).map_err(DiskError::io("read", path))?;
    let mut hash = XxHash3_128::new();
    let (mut buffer, mut length) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(format!("{CONTENT}{:032x}, {length} bytes", hash.finish_128())),
            Ok(n) => {
                hash.write(&buffer[..n]);
                length += n as u64;
                read(n as u64);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(DiskError::io("read", path)(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("weights");
        let identity = |text: &[u8], seed: u64, more: &[(&str, &str)]| {
            fs::write(&file, text).unwrap();
            let mut inputs = Inputs::default();
            inputs.tree("MODEL", place.path()).unwrap();
            let mut identity = inputs.fingerprint(&|_| {}).unwrap();
            identity.set("--seed", seed);
            more.iter().for_each(|(name, value)| identity.set(*name, value));
            identity
        };
        let earlier = identity(b"one", 0, &[]);
        let told = |now: Identity| now.told(&earlier, now.differing(&earlier));
        assert_eq!(told(identity(b"one", 0, &[])), "");
        assert_eq!(told(identity(b"two", 0, &[])), "MODEL/weights has another content");
        assert_eq!(told(identity(b"one", 1, &[])), "--seed is 1, was 0");
        assert_eq!(told(identity(b"one", 0, &[("--plan", "3")])), "--plan is 3, was not given");
        // The reference's value for "one" would do as well; this one shows that the file's bytes are what is hashed.
        let sum = format!("content {:032x}, 3 bytes", XxHash3_128::oneshot(b"one"));
        assert_eq!(earlier.get("MODEL/weights"), Some(sum.as_str()));
        let text = serde_json::to_string(&earlier).unwrap();
        assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), earlier);
    }
}
