//! Making a plan for a size: candidates for each tensor, what each would cost, and the best choice under the budget.
//!
//! [`probe`] tries every candidate on a few tensors of each part (the value projections, say). What is nowhere better than
//! quantization of the same bytes is tried no further; the rest is [`price`]d on every tensor, and the budget goes where it saves
//! most. [`uniform`] is what the plan has to beat: one format for the layers, one for embeddings and heads.

mod candidates;
mod price;
mod probe;
mod uniform;

use std::collections::HashMap;
use std::sync::Arc;

pub use candidates::{Candidate, Kind, block_candidates, candidates, restrict};
use fourfold_kernels::Backend;
use fourfold_models::{Block, Head, ModelSpec, NoObserver, Role, WeightSpec};
use fourfold_tensor::WeightSource;
pub use price::Priced;
pub use probe::{Probe, Probed};

use crate::CompressError;
use crate::calibrate::{Collector, Hidden};
use crate::hessian::Hessian;
use crate::methods::Stats;
use crate::pipeline::Moments;
use crate::plan::{Choice, HeaderBytes, Plan, Scope, TensorBytes, alike, allocate};
use crate::progress::Progress;
use crate::sensitivity::Sensitivity;

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
    /// What to choose from; see [`candidates()`].
    pub candidates: &'a [Candidate],
    /// Which tensors are compressed, and which alike.
    pub scope: Scope,
    /// How much each tensor's error matters.
    pub sensitivity: &'a Sensitivity,
    /// Bytes of the output's headers, which count too.
    pub header: &'a HeaderBytes<'a>,
    /// Second moments of a weight's inputs where there is no text.
    pub moments: &'a Moments<'a>,
    /// Bytes of a tensor in the output.
    pub bytes: &'a TensorBytes<'a>,
}

/// A plan, what it was chosen from, and what it should beat.
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// The best mix of quantized formats alone, where the plan has others too.
    pub quantized: Option<Plan>,
    /// The best choice with one format for all layers and one for embeddings and heads, of no more bytes; `None` where none is so small.
    pub uniform: Option<Plan>,
    /// All ways to store each tensor that were priced, in the order of the stack.
    pub priced: Vec<Vec<Priced>>,
    /// What was tried on a few tensors.
    pub probes: Vec<Probe>,
    /// The Hessian of the output head's input, in the original model.
    pub head: Option<Hessian>,
}

/// What is told of each weight: the weight, and the Hessian of its input where there is one.
type Visit<'v> = dyn FnMut(&WeightSpec, Option<&Hessian>) -> Result<(), CompressError> + 'v;

impl PlanJob<'_> {
    /// Makes the plan.
    ///
    /// # Errors
    /// A tensor that cannot be read or used, or a budget below the smallest plan.
    pub fn plan(&self, progress: &mut dyn Progress) -> Result<Planned, CompressError> {
        let weights = self.spec.weights();
        let mut priced: Vec<Vec<Priced>> = Vec::new();
        let (mut probes, mut head) = (Vec::new(), None);
        match self.backend {
            Some(backend) if !self.calibration.is_empty() => {
                probes = self.probe(backend, progress)?;
                let guide = probe::Guide::new(&probes);
                let mut visit = |weight: &WeightSpec, hessian: Option<&Hessian>| {
                    priced.push(self.price(weight, hessian, &guide)?);
                    Ok(())
                };
                head = Some(self.walk("plan", backend, self.calibration, &|_| true, &mut visit, progress)?);
            }
            Some(_) | None => {
                for (done, weight) in weights.iter().enumerate() {
                    progress.update("plan", done as u64, weights.len() as u64);
                    priced.push(self.price(weight, None, &probe::Guide::default())?);
                }
            }
        }
        // In the order of the stack, whatever the order of finding.
        let order: HashMap<&str, usize> = weights.iter().enumerate().map(|(i, w)| (w.name.as_str(), i)).collect();
        let place = |name: &str| order.get(name).copied();
        priced.sort_by_key(|ways| ways.first().and_then(|way| place(&way.entry.name)));
        let units = self.units(&weights, &priced);
        if units.iter().any(Vec::is_empty) {
            let why = "no format to choose from suits all weights that must be stored alike: their rows have no group size in common";
            return Err(CompressError::Plan(why.to_owned()));
        }
        let mut plan = allocate(units, self.budget, self.header)?;
        plan.tensors.sort_by_key(|entry| place(&entry.name));
        let quantized = self.quantized(&weights, &priced, &plan);
        let uniform = self.uniform(&weights, &priced, self.bytes_of(&plan, &priced));
        Ok(Planned { plan, quantized, uniform, priced, probes, head })
    }

    /// The plan again with nothing but quantization, where it has anything else and there is such a plan.
    fn quantized(&self, weights: &[WeightSpec], priced: &[Vec<Priced>], plan: &Plan) -> Option<Plan> {
        let other = |way: &&Priced| way.kind.is_some_and(|kind| !kind.is_grid());
        let mixed = plan.tensors.iter().zip(priced).any(|(entry, ways)| ways.iter().filter(other).any(|w| w.is(entry)));
        if !mixed {
            return None;
        }
        let grids = |ways: &Vec<Priced>| ways.iter().filter(|way| !other(way)).cloned().collect();
        let grids: Vec<Vec<Priced>> = priced.iter().map(grids).collect();
        let mut plan = allocate(self.units(weights, &grids), self.budget, self.header).ok()?;
        let place: HashMap<&str, usize> = weights.iter().enumerate().map(|(i, w)| (w.name.as_str(), i)).collect();
        plan.tensors.sort_by_key(|entry| place.get(entry.name.as_str()).copied());
        Some(plan)
    }

    /// What is chosen together: tensors of one name ([`PlanJob::unit`]), each tensor elsewhere.
    fn units(&self, weights: &[WeightSpec], priced: &[Vec<Priced>]) -> Vec<Vec<Choice>> {
        let mut units: Vec<Vec<Choice>> = Vec::new();
        let mut named: HashMap<String, usize> = HashMap::new();
        for (weight, ways) in weights.iter().zip(priced) {
            let packed = |way: &&Priced| way.candidate.is_some();
            // transformers loads no dense expert beside packed weights.
            let only_packed = self.scope.experts_alike && is_expert(weight) && ways.iter().any(|way| packed(&way));
            let choices: Vec<Choice> =
                ways.iter().filter(|way| !only_packed || packed(way)).map(Priced::choice).collect();
            let place = units.len();
            match self.unit(weight).map_or(place, |unit| *named.entry(unit).or_insert(place)) {
                new if new == place => units.push(choices),
                known => units[known] = alike(std::mem::take(&mut units[known]), &choices),
            }
        }
        units
    }

    /// The name of those that a weight is stored like, where [`Scope`] asks for that.
    fn unit(&self, weight: &WeightSpec) -> Option<String> {
        if self.scope.experts_alike && is_expert(weight) {
            return Some("experts".to_owned());
        }
        if self.scope.stacked && is_expert(weight) {
            let (layer, expert) = weight.name.split_once(".experts.")?;
            return Some(format!("{layer}.experts.*.{}", expert.split_once('.')?.1));
        }
        self.scope.alike.then(|| fused_name(weight)).flatten()
    }

    /// Bytes of a plan made of priced ways, headers included.
    fn bytes_of(&self, plan: &Plan, priced: &[Vec<Priced>]) -> u64 {
        let chosen = plan.tensors.iter().zip(priced).filter_map(|(entry, ways)| ways.iter().find(|w| w.is(entry)));
        let forms: Vec<_> = chosen.map(|way| (way.entry.name.clone(), way.form.clone())).collect();
        plan.bytes() + (self.header)(&forms)
    }

    /// Block by block through the original model; `visit` sees the weights of the `wanted` blocks, and those of none. Returns the Hessian of
    /// the head's input.
    fn walk(
        &self,
        stage: &str,
        backend: &Arc<dyn Backend>,
        sequences: &[Vec<u32>],
        wanted: &dyn Fn(usize) -> bool,
        visit: &mut Visit,
        progress: &mut dyn Progress,
    ) -> Result<Hessian, CompressError> {
        let spec = self.spec;
        let weights = spec.weights();
        let total = spec.blocks.len() as u64 + 1;
        let mut hidden = Hidden::embed(spec, self.source, backend, sequences)?;
        for index in 0..spec.blocks.len() {
            progress.update(stage, index as u64, total);
            let block = Block::load(spec, index, self.source, backend)?;
            if !wanted(index) {
                hidden.forward(spec, index, &block, &mut NoObserver, true);
                continue;
            }
            let mut collector = Collector::new();
            hidden.forward(spec, index, &block, &mut collector, true);
            drop(block);
            collector.finish(crate::pipeline::EXPERT_PRIOR);
            for weight in weights.iter().filter(|w| w.block == Some(index)) {
                // An expert that no token reached is planned, as it is compressed, by what reached the others.
                let unreached = is_expert(weight) && collector.hessian(&weight.name).is_none();
                let siblings = unreached.then(|| collector.hessian_of_unreached(weight));
                visit(weight, siblings.as_ref().or(collector.hessian(&weight.name)))?;
            }
        }
        progress.update(stage, total - 1, total);
        let head = Head::load(spec, self.source, backend)?;
        let hessian = hidden.head_hessian(spec, &head);
        for weight in weights.iter().filter(|w| w.block.is_none()) {
            let reads_states = weight.role == Role::LmHead || (weight.role == Role::Embedding && spec.tied);
            visit(weight, reads_states.then_some(&hessian))?;
        }
        progress.update(stage, total, total);
        Ok(hessian)
    }
}

/// Whether a weight is a matrix of a routed expert.
fn is_expert(weight: &WeightSpec) -> bool {
    weight.role == Role::RoutedExpert && weight.shape.len() >= 2
}

/// The product that runtimes make of several weights at once, by a name of its own: query, key and value; gate and up; the experts of a
/// block; the two down-projections of multi-head latent attention.
fn fused_name(weight: &WeightSpec) -> Option<String> {
    if is_expert(weight) {
        return weight.name.split_once(".experts.").map(|(before, _)| format!("{before}.experts"));
    }
    let (before, part) = weight.name.strip_suffix(".weight")?.rsplit_once('.')?;
    let together = match part {
        "q_proj" | "k_proj" | "v_proj" => "qkv",
        "gate_proj" | "up_proj" => "gate_up",
        "q_a_proj" | "kv_a_proj_with_mqa" => "qkv_a",
        _ => return None,
    };
    Some(format!("{before}.{together}"))
}

/// Statistics of a Hessian: itself and its diagonal.
pub(crate) fn stats<'a>(hessian: Option<&'a Hessian>, moments: &'a Option<Vec<f32>>) -> Stats<'a> {
    Stats { moments: moments.as_deref(), hessian }
}
