//! Making a plan for a size: candidates for each tensor, what each would cost, and the best choice under the budget.

use std::collections::HashMap;
use std::sync::Arc;

use fourfold_kernels::Backend;
use fourfold_models::{Block, Head, ModelSpec, Role, WeightSpec};
use fourfold_tensor::{Form, WeightSource};
use serde_json::{Value, json};

use crate::calibrate::{Collector, Hidden};
use crate::hessian::Hessian;
use crate::methods::Stats;
use crate::methods::quantize::estimate::Estimator;
use crate::methods::quantize::gptq::{self, Gptq};
use crate::methods::quantize::grid::{Granularity, GridSpec, Levels, ScaleFormat};
use crate::plan::{Choice, Entry, HeaderBytes, Plan, Scope, allocate, kept_form, matrix, shown};
use crate::progress::Progress;
use crate::sensitivity::{Energies, Sensitivity};
use crate::{CompressError, MethodError};

/// Rows of a weight that estimates look at.
const SAMPLED_ROWS: usize = 48;

/// What a planner works with.
pub struct PlanJob<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Its weights.
    pub source: &'a dyn WeightSource,
    /// Runs the calibration text; with `None` or without text, plans go by the weights alone and use round to nearest.
    pub backend: Option<&'a Arc<dyn Backend>>,
    /// Calibration sequences, token ids.
    pub calibration: &'a [Vec<u32>],
    /// Bytes that all weight files together may have.
    pub budget: u64,
    /// The grids to choose from; see [`candidates`].
    pub candidates: &'a [GridSpec],
    /// Which tensors are compressed.
    pub scope: Scope,
    /// How much each tensor's error matters.
    pub sensitivity: &'a Sensitivity,
    /// Bytes of the output's headers, which count too.
    pub header: &'a HeaderBytes<'a>,
}

/// The grids that are worth choosing between: learned levels up to 4 bits, even ones above, one-byte scales for groups of 32 to
/// 192 columns or f16 ones for whole rows.
///
/// With `interchange`, only those that compressed-tensors can say: even levels, f16 scales.
pub fn candidates(interchange: bool) -> Vec<GridSpec> {
    let learned = if interchange { Levels::Uniform } else { Levels::Learned };
    let scales = if interchange { ScaleFormat::F16 } else { ScaleFormat::Double };
    let group = |bits, levels, size| GridSpec { levels, scales, ..GridSpec::new(bits, Granularity::Group(size)) };
    let channel = |bits, levels| GridSpec { levels, ..GridSpec::new(bits, Granularity::Channel) };
    let mut grids = Vec::new();
    grids.extend([32, 64].map(|size| group(2, learned, size)));
    grids.extend([32, 64, 192].map(|size| group(3, learned, size)));
    grids.extend([32, 64, 96, 192].map(|size| group(4, learned, size)));
    grids.push(channel(4, learned));
    for bits in [5, 6] {
        grids.extend([32, 64, 192].map(|size| group(bits, Levels::Uniform, size)));
        grids.push(channel(bits, Levels::Uniform));
    }
    grids.extend([7, 8].map(|bits| channel(bits, Levels::Uniform)));
    grids
}

impl PlanJob<'_> {
    /// Makes the plan.
    ///
    /// # Errors
    /// A tensor that cannot be read or used, or a budget below the smallest plan.
    pub fn plan(&self, progress: &mut dyn Progress) -> Result<Plan, CompressError> {
        let mut choices: Vec<(String, Vec<Choice>)> = Vec::new();
        let weights = self.spec.weights();
        match self.backend {
            Some(backend) if !self.calibration.is_empty() => self.by_text(backend, &weights, &mut choices, progress)?,
            Some(_) | None => {
                for (done, weight) in weights.iter().enumerate() {
                    progress.update("plan", done as u64, weights.len() as u64);
                    choices.push((weight.name.clone(), self.choices(weight, None)?));
                }
            }
        }
        // In the order of the stack, whatever the order of finding.
        let order: HashMap<&str, usize> = weights.iter().enumerate().map(|(i, w)| (w.name.as_str(), i)).collect();
        choices.sort_by_key(|(name, _)| order.get(name.as_str()).copied());
        allocate(choices.into_iter().map(|(_, c)| c).collect(), self.budget, self.header)
    }

    /// Block by block through the original model.
    fn by_text(
        &self,
        backend: &Arc<dyn Backend>,
        weights: &[WeightSpec],
        choices: &mut Vec<(String, Vec<Choice>)>,
        progress: &mut dyn Progress,
    ) -> Result<(), CompressError> {
        let spec = self.spec;
        let mut hidden = Hidden::embed(spec, self.source, backend, self.calibration)?;
        for index in 0..spec.blocks.len() {
            progress.update("plan", index as u64, spec.blocks.len() as u64 + 1);
            let block = Block::load(spec, index, self.source, backend)?;
            let mut collector = Collector::new();
            hidden.forward(spec, index, &block, &mut collector, true);
            drop(block);
            collector.finish(crate::pipeline::EXPERT_PRIOR);
            for weight in weights.iter().filter(|w| w.block == Some(index)) {
                let hessian = collector.hessian(&weight.name);
                choices.push((weight.name.clone(), self.choices(weight, hessian)?));
            }
        }
        progress.update("plan", spec.blocks.len() as u64, spec.blocks.len() as u64 + 1);
        let head = Head::load(spec, self.source, backend)?;
        let hessian = hidden.head_hessian(spec, &head);
        for weight in weights.iter().filter(|w| w.block.is_none()) {
            let reads_states = weight.role == Role::LmHead || (weight.role == Role::Embedding && spec.tied);
            choices.push((weight.name.clone(), self.choices(weight, reads_states.then_some(&hessian))?));
        }
        Ok(())
    }

    /// The ways to store one tensor.
    fn choices(&self, spec: &WeightSpec, hessian: Option<&Hessian>) -> Result<Vec<Choice>, CompressError> {
        let named = |e: MethodError| e.of(&spec.name);
        let keep = |form: Form| {
            let bytes = form.file_bytes();
            vec![Choice { form, bytes, cost: 0.0, entry: Entry { bytes, ..Entry::keep(&spec.name) } }]
        };
        if let Some((entry, form)) = self.scope.bias(spec) {
            return Ok(vec![Choice { bytes: form.file_bytes(), form, cost: 0.0, entry }]);
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
        let estimator = Estimator::new(&weight, factor.as_ref(), SAMPLED_ROWS).map_err(named)?;
        let energies = hessian.map(|h| {
            let trace: f64 = h.diagonal().iter().map(|&v| f64::from(v)).sum();
            // H is twice the second moments.
            Energies { input: trace / 2.0, output: estimator.energy() / 2.0, row: estimator.row_energy() }
        });
        let sensitivity = self.sensitivity.of(spec, self.spec.blocks.len(), self.spec.tied, energies.as_ref());
        let mut found = Vec::new();
        for &grid in self.candidates {
            // A group as wide as the row is the channel's case.
            let narrow = matches!(grid.granularity, Granularity::Group(size) if size >= cols);
            if narrow || (self.scope.whole_groups && !cols.is_multiple_of(grid.group_size(cols))) {
                continue;
            }
            let error = estimator.error(grid).map_err(named)?;
            let (method, settings) = settings(grid, factor.is_some(), spec.role);
            let form = Form::Quantized(grid.form(rows, cols));
            let bytes = form.file_bytes();
            let entry = Entry {
                name: spec.name.clone(),
                method: method.to_owned(),
                settings,
                bytes,
                error: Some(shown(error)),
            };
            found.push(Choice { form, bytes, cost: error * sensitivity, entry });
        }
        // An original that is smaller than every candidate stays.
        let original = Form::of(&weight);
        if found.iter().all(|c| c.bytes >= original.file_bytes()) {
            return Ok(keep(original));
        }
        found.extend(keep(original));
        Ok(found)
    }
}

/// Method and settings of a plan's entry.
fn settings(grid: GridSpec, hessian: bool, role: Role) -> (&'static str, Value) {
    if hessian {
        let method = Gptq { damping: crate::pipeline::damping(role), ..Gptq::new(grid) };
        ("gptq", serde_json::to_value(method).unwrap_or(Value::Null))
    } else {
        ("rtn", json!(grid))
    }
}

/// Statistics of a Hessian: itself and its diagonal.
pub(crate) fn stats<'a>(hessian: Option<&'a Hessian>, moments: &'a Option<Vec<f32>>) -> Stats<'a> {
    Stats { moments: moments.as_deref(), hessian }
}
