//! A checkpoint whose tensors are looked through before they are trained: one NaN would reach every other number in a step or two.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fourfold_formats::Checkpoint;
use fourfold_tensor::{SourceError, TensorInfo, Weight, WeightSource};
use rayon::prelude::*;
use serde_json::Value;

/// Weights without infinities and NaN; a tensor that has one is refused when it is read for the first time.
pub struct FiniteWeights {
    inner: Box<dyn WeightSource>,
    path: PathBuf,
    seen: Mutex<HashSet<String>>,
}

impl FiniteWeights {
    /// The weights of a checkpoint.
    pub fn of(checkpoint: Checkpoint) -> Self {
        Self { inner: checkpoint.weights, path: checkpoint.path, seen: Mutex::default() }
    }
}

impl WeightSource for FiniteWeights {
    fn tensors(&self) -> &[TensorInfo] {
        self.inner.tensors()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.inner.info(name)
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.inner.load(name)?;
        if !self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned()) {
            return Ok(weight);
        }
        match first_bad_row(&weight) {
            None => Ok(weight),
            Some((row, value)) => {
                let reason = format!("row {row} holds {value}: such a model cannot be trained").into();
                Err(SourceError::Tensor { file: file_of(&self.path, name), tensor: name.to_owned(), reason })
            }
        }
    }
}

/// The first row with an infinity or NaN, and that number.
fn first_bad_row(weight: &Weight) -> Option<(usize, f32)> {
    let bad = |out: &mut Vec<f32>, row: usize| {
        weight.read_row(row, out);
        out.iter().find(|value| !value.is_finite()).map(|&value| (row, value))
    };
    let rows = (0..weight.rows()).into_par_iter();
    rows.map_init(|| vec![0.0; weight.cols()], bad).find_map_first(|found| found)
}

/// The file of a directory that holds a tensor, as its index says.
fn file_of(path: &Path, tensor: &str) -> PathBuf {
    let index = fs::read_to_string(path.join("model.safetensors.index.json")).unwrap_or_default();
    let index: Value = serde_json::from_str(&index).unwrap_or_default();
    let single = path.join("model.safetensors");
    match index["weight_map"][tensor].as_str() {
        Some(file) => path.join(file),
        None if single.exists() => single,
        None => path.to_path_buf(),
    }
}
