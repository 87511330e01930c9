//! Adapters (LoRA) put into the weights beside which they were trained: `W + scaling · B · A` (Hu et al. 2021, section 4.1).
//!
//! A dense weight takes the product in and keeps its type. A packed one either keeps its codes with the product beside them, as factors
//! ([`Packed::Sum`]), or is taken apart, added to and packed again on its own grid ([`Packed::Requantize`]): an update is most often
//! smaller than half a step of the grid, so that rounding to nearest undoes most of it, which is why the former is the default.

use std::sync::Arc;

use fourfold_models::ModelSpec;
use fourfold_models::layers::{LORA_A, LORA_B, LORA_SCALING};
use fourfold_tensor::{DType, Dense, FloatBuffer, Form, LowRank, SourceError, Sum, TensorInfo, Weight, WeightSource};
use rayon::prelude::*;
use serde_json::json;

use crate::CompressError;
use crate::methods::quantize::gptq::Gptq;
use crate::methods::quantize::grid::GridSpec;
use crate::plan::{Entry, Plan};

/// What becomes of a packed weight with an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// Its codes stay, and the factors are stored beside them in bf16.
    Sum,
    /// It is rounded again on its own grid.
    Requantize,
}

/// A model with its adapters inside its weights, one tensor at a time.
pub struct Merged {
    adapted: Arc<dyn WeightSource>,
    packed: Packed,
    infos: Vec<TensorInfo>,
}

impl Merged {
    /// Merges what `adapted` holds: the weights of a model and, by the names that linear layers look for, its adapters.
    pub fn new(adapted: Arc<dyn WeightSource>, packed: Packed) -> Self {
        let infos = adapted.tensors().iter().filter(|info| !is_adapter(&info.name)).cloned().collect();
        Self { adapted, packed, infos }
    }

    /// Whether `name` has an adapter.
    pub fn has_adapter(&self, name: &str) -> bool {
        stem(name).is_some_and(|stem| self.adapted.info(&format!("{stem}{LORA_A}")).is_some())
    }

    /// What is to be done with every tensor of the model: all that has been merged stays as [`Merged::load`] gives it, but for packed
    /// weights that are to be rounded again, with GPTQ where there is calibration text.
    ///
    /// # Errors
    /// A packed weight that no grid of ours describes, by name.
    pub fn plan(&self, spec: &ModelSpec, with_text: bool) -> Result<Plan, CompressError> {
        let entry = |name: &str| {
            if self.packed == Packed::Sum || !self.has_adapter(name) {
                return Ok(Entry::keep(name));
            }
            let form = Form::of(&self.adapted.load(name)?);
            let grid = match &form {
                Form::Dense { .. } => return Ok(Entry::keep(name)),
                Form::Quantized(form) => GridSpec::of(form),
                Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => None,
            };
            let Some(grid) = grid else {
                let storage = form.describe();
                return Err(CompressError::Plan(format!(
                    "{name}: {storage} cannot be rounded again; keep the adapter as a sum"
                )));
            };
            let (method, settings) = if with_text { ("gptq", json!(Gptq::new(grid))) } else { ("rtn", json!(grid)) };
            Ok(Entry { method: method.to_owned(), settings, ..Entry::keep(name) })
        };
        let tensors: Result<Vec<Entry>, CompressError> = spec.weights().iter().map(|w| entry(&w.name)).collect();
        Ok(Plan { tensors: tensors? })
    }

    /// `scaling · B` `[outputs, rank]` and A `[rank, inputs]`, row-major.
    fn factors(&self, stem: &str) -> Result<[(usize, Vec<f32>); 2], SourceError> {
        let [a, b, scaling] = [LORA_A, LORA_B, LORA_SCALING].map(|part| self.adapted.load(&format!("{stem}{part}")));
        let (a, b, scaling) = (a?, b?, scaling?.to_f32()[0]);
        let scaled = b.to_f32().into_iter().map(|v| scaling * v).collect();
        Ok([(b.cols(), scaled), (a.cols(), a.to_f32())])
    }
}

fn is_adapter(name: &str) -> bool {
    [LORA_A, LORA_B, LORA_SCALING].iter().any(|suffix| name.ends_with(suffix))
}

fn stem(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")
}

impl WeightSource for Merged {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.adapted.info(name).filter(|info| !is_adapter(&info.name))
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.adapted.load(name)?;
        let Some(stem) = stem(name).filter(|_| self.has_adapter(name)) else { return Ok(weight) };
        let [(rank, b), (cols, a)] = self.factors(stem)?;
        let rows = weight.rows();
        let misfit = |reason: String| SourceError::Tensor {
            file: "the adapter".into(),
            tensor: format!("{stem}{LORA_A}"),
            reason: reason.into(),
        };
        if cols != weight.cols() || a.len() != rank * cols || b.len() != rows * rank {
            let shape = weight.shape();
            return Err(misfit(format!("factors of {} and {} elements, rank {rank}, for {shape:?}", b.len(), a.len())));
        }
        let dtype = match &weight {
            Weight::Dense(dense) => dense.dtype(),
            // What it is written as without an adapter, too.
            Weight::Fp8(_) => DType::Bf16,
            Weight::Quantized(_) | Weight::Sparse(_) | Weight::LowRank(_) | Weight::Sum(_) => match self.packed {
                Packed::Requantize => DType::F32,
                Packed::Sum => {
                    let factor = |rows, cols, values| {
                        Weight::from(Dense::new(vec![rows, cols], FloatBuffer::from_f32(values, DType::Bf16)))
                    };
                    let product = LowRank::new(factor(rows, rank, b), factor(rank, cols, a));
                    let product = product.map_err(|e| misfit(e.to_string()))?.into();
                    let terms = match weight {
                        Weight::Sum(sum) => sum.into_terms().into_iter().chain([product]).collect(),
                        other @ (Weight::Dense(_)
                        | Weight::Quantized(_)
                        | Weight::Fp8(_)
                        | Weight::Sparse(_)
                        | Weight::LowRank(_)) => {
                            vec![other, product]
                        }
                    };
                    return Ok(Sum::new(terms).map_err(|e| misfit(e.to_string()))?.into());
                }
            },
        };
        let mut merged = vec![0.0f32; rows * cols];
        merged.par_chunks_exact_mut(cols.max(1)).zip(b.par_chunks_exact(rank.max(1))).enumerate().for_each(
            |(r, (row, b))| {
                weight.read_row(r, row);
                for (&b, a) in b.iter().zip(a.chunks_exact(cols)) {
                    row.iter_mut().zip(a).for_each(|(w, a)| *w += b * a);
                }
            },
        );
        let merged = FloatBuffer::from_f32(merged, dtype);
        let too_large = (0..merged.len()).find(|&i| !merged.get(i).is_finite());
        if let Some(place) = too_large {
            let row = place / cols.max(1);
            return Err(misfit(format!(
                "merged, row {row} is beyond the largest {dtype}: cast the model to BF16 before"
            )));
        }
        Ok(Dense::new(weight.shape(), merged).into())
    }
}
