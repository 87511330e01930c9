//! `checksums.json`: the SHA-256 (FIPS 180-4) and size of every file of an output, for whoever copies or keeps it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::DiskError;
use crate::publish::write_file;

/// The file's name.
pub const CHECKSUMS: &str = "checksums.json";
/// Most bytes of one: a hundred thousand files.
const LIMIT: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
struct Checksums {
    algorithm: String,
    files: BTreeMap<String, Sum>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sum {
    sha256: String,
    bytes: u64,
}

/// A file that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "problem", rename_all = "lowercase")]
pub enum Finding {
    /// Its bytes are others.
    Differs {
        /// Path below the directory.
        file: String,
        /// How it differs.
        reason: String,
    },
    /// It is not there.
    Missing {
        /// Path below the directory.
        file: String,
    },
    /// It was not written with the rest.
    Extra {
        /// Path below the directory.
        file: String,
    },
}

/// What became of a directory.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Files that were written.
    pub files: usize,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is not as it was.
    pub findings: Vec<Finding>,
}

/// SHA-256 of a file, in hexadecimal, and its bytes.
///
/// # Errors
/// It cannot be read.
pub fn sha256_of_file(path: &Path) -> Result<(String, u64), DiskError> {
    let mut file = File::open(path).map_err(DiskError::io("read", path))?;
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(), bytes)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(DiskError::io("read", path)(e)),
        }
    }
}

/// Every file below `dir` but its own checksums, by its path with `/`.
fn files_below(dir: &Path) -> Result<BTreeMap<String, PathBuf>, DiskError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(String::new(), dir.to_owned())];
    while let Some((prefix, folder)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(DiskError::io("read the directory", &folder))? {
            let entry = entry.map_err(DiskError::io("read the directory", &folder))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type().map_err(DiskError::io("look at", &entry.path()))?.is_dir() {
                true => folders.push((format!("{name}/"), entry.path())),
                false if name == CHECKSUMS => {}
                false => {
                    found.insert(name, entry.path());
                }
            }
        }
    }
    Ok(found)
}

/// Writes `checksums.json` into a directory that is complete otherwise.
///
/// # Errors
/// A file that cannot be read or written.
pub fn write_checksums(dir: &Path) -> Result<(), DiskError> {
    let sum = |(name, path): (String, PathBuf)| {
        let (sha256, bytes) = sha256_of_file(&path)?;
        Ok((name, Sum { sha256, bytes }))
    };
    let files: Vec<_> = files_below(dir)?.into_iter().collect();
    let files = files.into_par_iter().map(sum).collect::<Result<_, DiskError>>()?;
    let text = serde_json::json!(Checksums { algorithm: "sha256".to_owned(), files });
    write_file(&dir.join(CHECKSUMS), format!("{text:#}\n").as_bytes())
}

/// Reads every file of `dir` and compares it with its `checksums.json`.
///
/// # Errors
/// There is no `checksums.json`, or it is not one of [`write_checksums`]; a file cannot be read.
pub fn verify(dir: &Path) -> Result<Verification, DiskError> {
    let file = dir.join(CHECKSUMS);
    let malformed = |reason: String| DiskError::Malformed { file: file.clone(), reason };
    let size = fs::metadata(&file).map_err(DiskError::io("read", &file))?.len();
    if size > LIMIT {
        return Err(malformed(format!("{size} bytes are more than the {LIMIT} a list of checksums may have")));
    }
    let text = fs::read(&file).map_err(DiskError::io("read", &file))?;
    let written: Checksums = serde_json::from_slice(&text).map_err(|e| malformed(e.to_string()))?;
    if written.algorithm != "sha256" {
        return Err(malformed(format!("algorithm {}: sha256 is known", written.algorithm)));
    }
    for name in written.files.keys() {
        let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if name.is_empty() || !inside {
            return Err(malformed(format!("{name:?} is no file below this directory")));
        }
    }
    let found = files_below(dir)?;
    let check = |(name, sum): (&String, &Sum)| -> Result<(u64, Option<Finding>), DiskError> {
        let Some(path) = found.get(name) else { return Ok((0, Some(Finding::Missing { file: name.clone() }))) };
        let length = fs::metadata(path).map_err(DiskError::io("read", path))?.len();
        let differs = |reason: String| Some(Finding::Differs { file: name.clone(), reason });
        if length != sum.bytes {
            return Ok((0, differs(format!("{length} bytes, {} were written", sum.bytes))));
        }
        let (sha256, bytes) = sha256_of_file(path)?;
        let same = sha256.eq_ignore_ascii_case(&sum.sha256);
        Ok((bytes, if same { None } else { differs("other bytes, as many".to_owned()) }))
    };
    let list: Vec<_> = written.files.iter().collect();
    let checked = list.into_par_iter().map(check).collect::<Result<Vec<_>, DiskError>>()?;
    let extra = found.keys().filter(|name| !written.files.contains_key(*name));
    let mut findings: Vec<Finding> = extra.map(|name| Finding::Extra { file: name.clone() }).collect();
    let bytes = checked.iter().map(|(bytes, _)| bytes).sum();
    findings.extend(checked.into_iter().filter_map(|(_, finding)| finding));
    Ok(Verification { files: written.files.len(), bytes, findings })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_found() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let findings = || verify(place.path()).unwrap().findings;
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("a"), "abc").unwrap();
        fs::write(at("sub/b"), "").unwrap();
        // FIPS 180-4's examples: "abc" and the empty message.
        assert!(sha256_of_file(&at("a")).unwrap().0.starts_with("ba7816bf8f01cfea414140de5dae2223"));
        assert!(sha256_of_file(&at("sub/b")).unwrap().0.starts_with("e3b0c44298fc1c149afbf4c8996fb924"));
        write_checksums(place.path()).unwrap();
        assert_eq!((findings(), verify(place.path()).unwrap().files), (Vec::new(), 2));
        fs::write(at("a"), "abd").unwrap();
        fs::write(at("c"), "").unwrap();
        fs::remove_file(at("sub/b")).unwrap();
        let (a, b, c) = ("a".to_owned(), "sub/b".to_owned(), "c".to_owned());
        let differs = Finding::Differs { file: a, reason: "other bytes, as many".to_owned() };
        assert_eq!(findings(), [Finding::Extra { file: c }, differs, Finding::Missing { file: b }]);
        fs::write(at("a"), "abcd").unwrap();
        assert!(format!("{:?}", findings()).contains("4 bytes, 3 were written"));
        for (text, words) in [
            ("{}", "missing field"),
            ("{\"algorithm\": \"md5\", \"files\": {}}", "md5"),
            ("{\"algorithm\": \"sha256\", \"files\": {\"../a\": {\"sha256\": \"\", \"bytes\": 1}}}", "no file below"),
        ] {
            fs::write(at(CHECKSUMS), text).unwrap();
            let error = verify(place.path()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
