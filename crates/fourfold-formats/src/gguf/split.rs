//! Models split over several files: `name-00001-of-00003.gguf` and its brothers. The first holds the metadata; each holds
//! `split.no`, `split.count` and whole tensors.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::GgufError;
use super::header::{Header, parse};

/// Most parts of a model: a count beyond it is damage.
const MAX_PARTS: u64 = 9_999;

/// A file and its header.
pub struct Part {
    /// Where it lies.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    /// What it holds.
    pub header: Header,
}

/// Opens `path` and, where it is the first part of a split model, all others.
///
/// # Errors
/// The file concerned, and what is wrong with it.
pub fn open_parts(path: &Path) -> Result<Vec<Part>, (PathBuf, GgufError)> {
    let at = |file: &Path| {
        let file = file.to_owned();
        move |error: GgufError| (file, error)
    };
    let first = open_one(path).map_err(at(path))?;
    let (number, count) = numbers(&first.header).map_err(at(path))?;
    if count <= 1 {
        return Ok(vec![first]);
    }
    let others = names(path, number, count).map_err(at(path))?;
    let mut seen: HashSet<String> = first.header.tensors.iter().map(|t| t.name.clone()).collect();
    let mut parts = vec![first];
    for (expected, other) in (1..).zip(others) {
        let part = open_one(&other).map_err(at(&other))?;
        if numbers(&part.header).map_err(at(&other))? != (expected, count) {
            let message = format!("this file does not call itself part {} of {count}", expected + 1);
            return Err((other, GgufError::Split(message)));
        }
        if let Some(t) = part.header.tensors.iter().find(|t| !seen.insert(t.name.clone())) {
            return Err((other, GgufError::DuplicateTensor(t.name.clone())));
        }
        parts.push(part);
    }
    Ok(parts)
}

fn open_one(path: &Path) -> Result<Part, GgufError> {
    let file = crate::regular::open(path)?;
    let length = file.metadata()?.len();
    let header = parse(BufReader::new(&file), length)?;
    Ok(Part { path: path.to_owned(), file, header })
}

/// This part's number, from 0, and the number of parts.
fn numbers(header: &Header) -> Result<(u64, u64), GgufError> {
    let number = header.metadata.count("split.no")?.unwrap_or(0);
    let count = header.metadata.count("split.count")?.unwrap_or(0);
    if count > MAX_PARTS || (count > 0 && number >= count) {
        return Err(GgufError::Split(format!("part {number} of {count}")));
    }
    Ok((number, count))
}

/// Paths of the parts after the first.
fn names(first: &Path, number: u64, count: u64) -> Result<Vec<PathBuf>, GgufError> {
    let ending = |part: u64| format!("-{part:05}-of-{count:05}.gguf");
    let name = first.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if number != 0 {
        return Err(GgufError::Split(format!("this is part {} of {count}: open the first", number + 1)));
    }
    let Some(stem) = name.strip_suffix(&ending(1)) else {
        return Err(GgufError::Split(format!("the first of {count} parts must be named *{}", ending(1))));
    };
    Ok((2..=count).map(|part| first.with_file_name(format!("{stem}{}", ending(part)))).collect())
}
