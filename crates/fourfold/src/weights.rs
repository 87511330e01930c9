//! A checkpoint's weights as every command reads them. A tensor with an infinity or NaN is refused when it is read for
//! the first time: one such number would reach every other in a step or two. Tensors that no layer reads and that hold
//! no floats are left out.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fourfold_models::holds_floats;
use fourfold_tensor::{SourceError, TensorInfo, Weight, WeightSource};
use rayon::prelude::*;
use serde_json::Value;

/// Weights without infinities and NaN.
pub struct CheckedWeights {
    inner: Box<dyn WeightSource>,
    infos: Vec<TensorInfo>,
    path: PathBuf,
    seen: Mutex<HashSet<String>>,
}

impl CheckedWeights {
    /// The weights of the checkpoint at `path`, of which no layer reads `unread`.
    pub fn new(inner: Box<dyn WeightSource>, unread: &[String], path: &Path) -> Self {
        let unread: HashSet<&str> = unread.iter().map(String::as_str).collect();
        let is_kept = |info: &&TensorInfo| holds_floats(info) || !unread.contains(info.name.as_str());
        let infos = inner.tensors().iter().filter(is_kept).cloned().collect();
        Self { inner, infos, path: path.to_owned(), seen: Mutex::default() }
    }
}

impl WeightSource for CheckedWeights {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.inner.info(name)
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.inner.load(name)?;
        if !self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned()) {
            return Ok(weight);
        }
        match first_bad_element(&weight) {
            None => Ok(weight),
            Some((row, col, value)) => {
                let reason =
                    format!("element [{row}, {col}] is {value}: a model with infinities or NaN gives no results")
                        .into();
                Err(SourceError::Tensor { file: file_of(&self.path, name), tensor: name.to_owned(), reason })
            }
        }
    }
}

/// The first infinity or NaN: row, column, and that number.
fn first_bad_element(weight: &Weight) -> Option<(usize, usize, f32)> {
    // Of finite numbers since it is made.
    if let Weight::Fp8(_) = weight {
        return None;
    }
    let bad = |out: &mut Vec<f32>, row: usize| {
        weight.read_row(row, out);
        out.iter().position(|value| !value.is_finite()).map(|col| (row, col, out[col]))
    };
    let rows = (0..weight.rows()).into_par_iter();
    rows.map_init(|| vec![0.0; weight.cols()], bad).find_map_first(|found| found)
}

/// The file of a directory that holds a tensor, as its index says.
pub fn file_of(path: &Path, tensor: &str) -> PathBuf {
    let index = fs::read_to_string(path.join("model.safetensors.index.json")).unwrap_or_default();
    let index: Value = serde_json::from_str(&index).unwrap_or_default();
    let single = path.join("model.safetensors");
    match index["weight_map"][tensor].as_str() {
        Some(file) => path.join(file),
        None if single.exists() => single,
        None => path.to_path_buf(),
    }
}
