//! What the ways to store one tensor cost: their bytes, and the error they make in its output.

use fourfold_models::{Role, WeightSpec};
use fourfold_tensor::{DType, Dense, Form, Weight};
use rayon::prelude::*;

use super::probe::Guide;
use super::{Candidate, Kind, PlanJob, stats};
use crate::factor::damped;
use crate::hessian::Hessian;
use crate::methods::quantize::estimate::Estimator;
use crate::methods::quantize::gptq;
use crate::methods::quantize::store::read_finite;
use crate::methods::{self, matrix as matrices};
use crate::plan::{Choice, Entry, TensorBytes, kept_form, kept_in_gguf, matrix, shown};
use crate::sensitivity::Energies;
use crate::{CompressError, MethodError};

/// Rows of a weight that estimates look at.
pub(super) const SAMPLED_ROWS: usize = 48;
/// Rows of a weight that a method is tried on.
const TRIED_ROWS: usize = 64;
/// `rows · columns · min(rows, columns)` above which no decomposition is tried: its time grows with it.
pub(super) const MOST_DECOMPOSED: usize = 10_000_000_000;

/// One way to store one tensor.
#[derive(Clone, Debug)]
pub struct Priced {
    /// The family; `None` for the tensor as it came, or a rule of the scope.
    pub kind: Option<Kind>,
    /// Index of the candidate.
    pub candidate: Option<usize>,
    /// The form.
    pub form: Form,
    /// The entry of a plan.
    pub entry: Entry,
    /// What it costs the model, in nats a token, as far as a sum over tensors can say.
    pub cost: f64,
}

impl Priced {
    pub(super) fn choice(&self) -> Choice {
        Choice::of(self.form.clone(), self.entry.clone(), self.cost)
    }

    /// Whether it is what a plan's entry says.
    pub fn is(&self, entry: &Entry) -> bool {
        self.entry.method == entry.method && self.entry.settings == entry.settings
    }

    /// The error of its output, relative to the output's energy; 0 for the tensor as it came.
    pub fn error(&self) -> f64 {
        self.entry.error.unwrap_or(0.0)
    }
}

impl PlanJob<'_> {
    /// The ways to store one tensor.
    pub(super) fn price(
        &self,
        spec: &WeightSpec,
        hessian: Option<&Hessian>,
        guide: &Guide,
    ) -> Result<Vec<Priced>, CompressError> {
        let named = |e: MethodError| e.of(&spec.name);
        let keep = |form: Form| {
            let entry = Entry { bytes: (self.bytes)(&spec.name, &form), ..Entry::keep(&spec.name) };
            vec![Priced { kind: None, candidate: None, form, entry, cost: 0.0 }]
        };
        if let Some((entry, form)) = self.scope.bias(spec) {
            return Ok(vec![Priced { kind: None, candidate: None, form, entry, cost: 0.0 }]);
        }
        if !self.scope.has_matrix(spec) {
            return Ok(keep(kept_form(self.source, &spec.name)?));
        }
        let weight = self.source.load(&spec.name)?;
        let (rows, cols) = matrix(&spec.shape);
        let factor = match hessian {
            Some(hessian) => Some(gptq::factor_of(hessian, crate::pipeline::damping(spec.role)).map_err(named)?),
            None => None,
        };
        let moments = if factor.is_none() { (self.moments)(&spec.name, cols) } else { None };
        let estimator = match &moments {
            Some(moments) => Estimator::weighted(&weight, moments, SAMPLED_ROWS),
            None => Estimator::new(&weight, factor.as_ref(), SAMPLED_ROWS),
        };
        let estimator = estimator.map_err(named)?;
        let energies = match hessian {
            Some(hessian) => Some(Energies::of(hessian, estimator.energy(), estimator.row_energy())),
            None if spec.role == Role::Embedding => {
                Some(Energies { input: 0.0, output: 0.0, row: estimator.row_energy() })
            }
            None => None,
        };
        let sensitivity = self.sensitivity.of(spec, self.spec.blocks.len(), self.spec.tied, energies.as_ref());
        let suitable = self.candidates.iter().enumerate();
        let suitable = suitable.filter(|(_, c)| c.suits(spec.role, cols, &self.scope, hessian.is_some()));
        let (grids, others): (Vec<_>, Vec<_>) = suitable.partition(|(_, c)| c.grid().is_some());
        let mut errors: Vec<(usize, f64)> = Vec::new();
        for (i, candidate) in grids {
            let Some(grid) = candidate.grid() else { continue };
            errors.push((i, estimator.error_of(&grid).map_err(named)? * guide.correction(spec, i)));
        }
        if let Some(hessian) = hessian {
            let others: Vec<_> = others.into_iter().filter(|(i, _)| guide.tries(spec, *i)).collect();
            let trial = Trial::new(spec, &weight, hessian);
            errors.extend(trial.errors(&others).map_err(named)?);
        }
        let mut found = Vec::new();
        for (i, error) in errors {
            let candidate = &self.candidates[i];
            let Some(form) = candidate.form(rows, cols, spec.role) else { continue };
            let (method, settings) = candidate.settings(hessian.is_some(), spec.role);
            let (name, method, bytes) = (spec.name.clone(), method.to_owned(), (self.bytes)(&spec.name, &form));
            let entry = Entry { name, method, settings, bytes, error: Some(shown(error)) };
            found.push(Priced {
                kind: Some(candidate.kind),
                candidate: Some(i),
                form,
                entry,
                cost: error * sensitivity,
            });
        }
        let original = match self.scope.stacked {
            true => gguf_original(&weight, spec, self.bytes),
            false => keep(Form::of(&weight)),
        };
        // An original that is smaller than every candidate stays.
        let bytes = original[0].entry.bytes;
        if found.iter().all(|c| c.entry.bytes >= bytes) {
            return Ok(original);
        }
        found.extend(original);
        Ok(found)
    }
}

/// What a tensor is in a GGUF file that is not compressed: its floats or blocks as they are, packed otherwise as f16.
fn gguf_original(weight: &Weight, spec: &WeightSpec, bytes: &TensorBytes) -> Vec<Priced> {
    let mut entry = kept_in_gguf(weight, &spec.name);
    let (rows, cols) = matrix(&spec.shape);
    let form = match entry.method.as_str() {
        "keep" => Form::of(weight),
        _ => Form::Dense { shape: vec![rows, cols], dtype: DType::F16 },
    };
    entry.bytes = bytes(&spec.name, &form);
    vec![Priced { kind: None, candidate: None, form, entry, cost: 0.0 }]
}

/// A weight that methods are tried on.
pub(super) struct Trial<'a> {
    spec: &'a WeightSpec,
    weight: &'a Weight,
    hessian: &'a Hessian,
    /// What errors are measured by: the Hessian with the damping of the role.
    measure: Hessian,
}

impl<'a> Trial<'a> {
    pub fn new(spec: &'a WeightSpec, weight: &'a Weight, hessian: &'a Hessian) -> Self {
        let (matrix, _) = damped(hessian, crate::pipeline::damping(spec.role));
        let measure = Hessian::from_matrix(hessian.size(), matrix.matrix().to_vec());
        Self { spec, weight, hessian, measure }
    }

    /// The error of each candidate, by its index; those that do not go with the shape, or would take too long, are left out. Methods that
    /// treat rows alike are tried on some rows.
    pub fn errors(&self, candidates: &[(usize, &Candidate)]) -> Result<Vec<(usize, f64)>, MethodError> {
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        let small = rows * cols * rows.min(cols) <= MOST_DECOMPOSED;
        let fits = |c: &Candidate| (c.kind.goes_by_rows() || small) && c.form(rows, cols, self.spec.role).is_some();
        let tried: Vec<_> = candidates.iter().filter(|(_, c)| fits(c)).collect();
        if tried.is_empty() {
            return Ok(Vec::new());
        }
        let count = TRIED_ROWS.min(rows);
        let mut sample = vec![0.0f32; count * cols];
        for (i, row) in sample.chunks_exact_mut(cols.max(1)).enumerate() {
            read_finite(self.weight, i * rows / count, row)?;
        }
        let sample: Weight = Dense::from_f32(vec![count, cols], sample).into();
        let moments = Some(self.hessian.diagonal());
        let error = |&&(i, candidate): &&(usize, &Candidate)| {
            let tried = if candidate.kind.goes_by_rows() { &sample } else { self.weight };
            let method = candidate.method(true, self.spec.role)?;
            let stored = method.compress(tried, stats(Some(self.hessian), &moments))?.weight;
            let by = methods::Stats { moments: None, hessian: Some(&self.measure) };
            Ok((i, matrices::relative_error(&tried.to_f32(), &stored, &by)))
        };
        tried.par_iter().map(error).collect::<Vec<Result<_, MethodError>>>().into_iter().collect()
    }
}
