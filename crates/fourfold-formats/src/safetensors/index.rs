//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::HashSet;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use thiserror::Error;

use crate::{FormatError, json};

/// The index's file name.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// A parsed index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// The index file.
    pub path: PathBuf,
    /// Tensor and its shard's file name, in the file's order.
    pub weight_map: Vec<(String, String)>,
}

/// What is wrong with an index or its shards: one variant a malformation.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum IndexError {
    /// A tensor listed twice.
    #[error("tensor {tensor} is in the weight_map twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// A shard that is not a plain file name beside the index.
    #[error("tensor {tensor}: shard {shard:?} is not the name of a file beside the index")]
    ShardPath {
        /// A tensor of that shard.
        tensor: String,
        /// The shard.
        shard: String,
    },
    /// A shard that is not there.
    #[error("shard {shard} is missing; it holds tensor {tensor}{}", others(*.tensors))]
    MissingShard {
        /// The shard.
        shard: String,
        /// The first tensor in it.
        tensor: String,
        /// How many tensors it holds.
        tensors: usize,
    },
    /// A tensor that two shards hold.
    #[error("tensor {tensor} is in two shards, {first} and {second}; remove one of them and its line in the index")]
    InTwoShards {
        /// The tensor.
        tensor: String,
        /// The first shard that holds it.
        first: String,
        /// The second.
        second: String,
    },
    /// A tensor that its shard does not hold, where another one does.
    #[error("tensor {tensor} should be in shard {shard}, which has no such tensor; shard {other} has it")]
    OtherShard {
        /// The tensor.
        tensor: String,
        /// Its shard by the index.
        shard: String,
        /// The shard that holds it.
        other: String,
    },
    /// A tensor that its shard does not hold.
    #[error("tensor {tensor} should be in shard {shard}, which has no such tensor")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// Its shard by the index.
        shard: String,
    },
}

/// "and n others", where there are others.
fn others(tensors: usize) -> String {
    if tensors > 1 { format!(" and {} others", tensors - 1) } else { String::new() }
}

impl Index {
    /// Reads and checks an index; the shards are not opened.
    ///
    /// # Errors
    /// [`FormatError::Json`], [`FormatError::Index`].
    pub fn read(path: &Path) -> Result<Self, FormatError> {
        let raw: RawIndex = json::read(path, json::INDEX_LIMIT)?;
        let problem = |problem| FormatError::Index { file: path.to_owned(), problem };
        let mut seen = HashSet::new();
        for (tensor, shard) in &raw.weight_map.0 {
            if !seen.insert(tensor) {
                return Err(problem(IndexError::Duplicate { tensor: tensor.clone() }));
            }
            let mut parts = Path::new(shard).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(problem(IndexError::ShardPath { tensor: tensor.clone(), shard: shard.clone() }));
            }
        }
        Ok(Self { path: path.to_owned(), weight_map: raw.weight_map.0 })
    }

    /// The shards, each once, in the order of their first tensor.
    pub fn shards(&self) -> Vec<&str> {
        let mut seen = HashSet::new();
        self.weight_map.iter().map(|(_, shard)| shard.as_str()).filter(|s| seen.insert(*s)).collect()
    }
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Pairs,
}

/// An object's members with repetitions kept.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}
