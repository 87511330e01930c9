//! Compression from source to sink, by a plan.
//!
//! Without calibration text each tensor is loaded, compressed and written by itself. With it the model is taken block by block: the
//! calibration tokens run through what is already compressed, each block's Hessians are collected, its weights are compressed
//! and written, and the tokens go on through the compressed block. Either way no more than one tensor or one block is in memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use fourfold_kernels::Backend;
use fourfold_kernels::backward::Backward;
use fourfold_models::{Block, Head, ModelSpec, NoObserver, Role, WeightSpec};
use fourfold_tensor::{Form, SourceError, Weight, WeightSink, WeightSource};
use serde_json::Value;

use crate::CompressError;
use crate::calibrate::{Collector, ExpertCounter, Hidden, Overlay, check_finite};
use crate::gate::{Gate, HeldOut, Trial};
use crate::hessian::Hessian;
use crate::methods::Needs;
use crate::plan::{Entry, HeaderBytes, Plan, SAFETENSORS_BYTES, Scope, TensorBytes, shown};
use crate::planner::{Candidate, PlanJob, candidates, stats};
use crate::progress::Progress;
use crate::report::{self, ExpertReach, PlanReport};
use crate::sensitivity::Sensitivity;

/// Tokens that a layer's pooled Hessian counts for in each of its experts'.
pub const EXPERT_PRIOR: f64 = 256.0;

/// What the output should be.
pub enum Goal {
    /// What a finished plan says.
    Plan(Plan),
    /// One method with the same settings for every linear layer and the embeddings.
    Uniform {
        /// The method's name.
        method: String,
        /// Its settings.
        settings: Value,
    },
    /// At most the source's weight bytes divided by this, file headers included.
    Ratio(f64),
    /// At most so many bytes, file headers included.
    Bytes(u64),
}

/// Second moments of a weight's inputs, of which it has so many.
pub type Moments<'a> = dyn Fn(&str, usize) -> Option<Vec<f32>> + 'a;

/// A compression.
pub struct CompressJob<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Its weights.
    pub source: &'a dyn WeightSource,
    /// Bytes of the source's weight files; a ratio is against them.
    pub source_bytes: u64,
    /// Runs calibration text. `None` where there is none.
    pub backend: Option<Arc<dyn Backend>>,
    /// Calibration sequences, token ids; empty for round to nearest.
    pub calibration: &'a [Vec<u32>],
    /// Sequences of the same text that are calibrated on nothing: a plan made here must beat the best uniform choice on them (see
    /// [`crate::gate`]). Without any it is used as it is.
    pub held_out: &'a [Vec<u32>],
    /// What the output should be.
    pub goal: Goal,
    /// For [`Goal::Ratio`] and [`Goal::Bytes`]: the best choice with one format for all layers and one for embeddings and heads, instead of a mix.
    pub uniform: bool,
    /// What to choose from for [`Goal::Ratio`] and [`Goal::Bytes`]; see [`candidates`].
    pub candidates: Vec<Candidate>,
    /// Which tensors are compressed; a finished plan says so itself.
    pub scope: Scope,
    /// Bytes of the output's file headers, for [`Goal::Ratio`] and [`Goal::Bytes`]; [`CompressJob::new`] counts none.
    pub header: &'a HeaderBytes<'a>,
    /// Second moments E[x_i²] of a weight's inputs, by its name, where there is no text to run: an importance matrix.
    pub moments: &'a Moments<'a>,
    /// Bytes of a tensor in the output; [`CompressJob::new`] counts as safetensors does.
    pub bytes: &'a TensorBytes<'a>,
    /// Measures how much each tensor's error matters, for [`Goal::Ratio`] and [`Goal::Bytes`]; without it a rule by role and place is
    /// used.
    pub backward: Option<Arc<dyn Backward>>,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Report {
    /// The plan that was followed, with measured errors where the tensor was compressed in this run.
    pub plan: Plan,
    /// Bytes of the source's weights.
    pub source_bytes: u64,
    /// Bytes of the output's tensors, without file headers.
    pub output_bytes: u64,
    /// Calibration tokens that reached each expert's weights; empty without experts.
    pub coverage: BTreeMap<String, u64>,
    /// Experts that fewer than [`EXPERT_PRIOR`] calibration tokens reached, in the order of the stack; empty without text.
    pub hardly_reached: Vec<ExpertReach>,
    /// Tensors of the source that the architecture does not read, and that were therefore left out.
    pub dropped: Vec<String>,
    /// How the plan did against a uniform one, where that was asked.
    pub gate: Option<Gate>,
}

impl<'a> CompressJob<'a> {
    /// A job with the default candidates and sensitivities, and no calibration.
    pub fn new(spec: &'a ModelSpec, source: &'a dyn WeightSource, source_bytes: u64, goal: Goal) -> Self {
        Self {
            spec,
            source,
            source_bytes,
            backend: None,
            calibration: &[],
            held_out: &[],
            goal,
            uniform: false,
            candidates: candidates(false),
            scope: Scope::default(),
            header: &|_| 0,
            bytes: SAFETENSORS_BYTES,
            moments: &|_, _| None,
            backward: None,
        }
    }

    /// The plan that [`compress`] would follow, with sizes, for a person to read and change.
    ///
    /// # Errors
    /// As [`compress`].
    pub fn plan(&self, progress: &mut dyn Progress) -> Result<Plan, CompressError> {
        Ok(self.decide(progress)?.plan)
    }

    /// The plan and what it is founded on.
    ///
    /// # Errors
    /// As [`compress`].
    pub fn decide(&self, progress: &mut dyn Progress) -> Result<Decision, CompressError> {
        let budget = match &self.goal {
            Goal::Plan(plan) => return self.decided(plan.clone()),
            Goal::Uniform { method, settings } => {
                return self.decided(Plan::uniform(self.spec, method, settings, &self.scope));
            }
            Goal::Ratio(ratio) if *ratio >= 1.0 && ratio.is_finite() => (self.source_bytes as f64 / ratio) as u64,
            Goal::Ratio(ratio) => return Err(CompressError::Plan(format!("ratio {ratio}: must be at least 1"))),
            Goal::Bytes(bytes) => *bytes,
        };
        if self.backend.is_some() && !self.calibration.is_empty() {
            check_finite(self.source, self.spec.weights().iter())?;
        }
        let (mut sensitivity, mut blocks) = (Sensitivity::default(), Vec::new());
        if let (Some(backend), Some(backward)) = (&self.backend, &self.backward) {
            let (spec, source, text) = (self.spec, self.source, self.calibration);
            sensitivity = Sensitivity::measure(spec, source, backend, &**backward, text, progress)?;
            blocks = sensitivity.measure_blocks(spec, source, backend, text, progress)?;
        }
        let job = PlanJob {
            spec: self.spec,
            source: self.source,
            backend: self.backend.as_ref(),
            calibration: self.calibration,
            budget,
            candidates: &self.candidates,
            scope: self.scope,
            sensitivity: &sensitivity,
            header: self.header,
            bytes: self.bytes,
            moments: self.moments,
        };
        let mut planned = job.plan(progress)?;
        if self.uniform && planned.uniform.is_none() {
            let why = "no uniform choice has at most as many bytes as the mix";
            return Err(CompressError::Plan(why.to_owned()));
        }
        let (gate, trial) = match (&self.backend, planned.uniform.take(), &planned.head) {
            (_, Some(uniform), _) if self.uniform => {
                planned.plan = uniform;
                (None, Trial::default())
            }
            (Some(backend), Some(uniform), Some(head)) if !self.held_out.is_empty() => {
                let of_uniform = self.trial("uniform", &uniform, head, backend, false, progress)?;
                let mut of_mix = self.trial("planned", &planned.plan, head, backend, true, progress)?;
                let (mut of_all_kinds, mut of_quantized) = (None, None);
                // Sums of layers' errors flatter pruning and low rank, whose errors are not like noise.
                if let Some(quantized) = planned.quantized.take() {
                    let other = self.trial("quantized", &quantized, head, backend, true, progress)?;
                    (of_all_kinds, of_quantized) = (Some(shown(of_mix.divergence)), Some(shown(other.divergence)));
                    if other.divergence <= of_mix.divergence {
                        (planned.plan, of_mix) = (quantized, other);
                    }
                }
                let passed = of_mix.divergence < of_uniform.divergence;
                let gate = Gate {
                    tokens: of_mix.tokens,
                    planned: shown(of_mix.divergence),
                    of_all_kinds,
                    of_quantized,
                    uniform: shown(of_uniform.divergence),
                    uniform_bytes: uniform.bytes(),
                    uniform_formats: formats(&uniform),
                    passed,
                };
                if !passed {
                    planned.plan = uniform;
                }
                (Some(gate), if passed { of_mix } else { of_uniform })
            }
            (_, _, _) => (None, Trial::default()),
        };
        let forms = planned.plan.resolve_for(self.spec, self.source, self.bytes)?;
        let mut report = PlanReport::new(self.spec, self.source_bytes, &planned.plan, &forms, &planned.priced);
        for tensor in report.tensors.iter_mut().filter(|t| t.error.is_some()) {
            tensor.measured_error = trial.errors.get(&tensor.name).copied();
        }
        report.budget = Some(budget);
        report.gate = gate;
        report.probes = planned.probes;
        report.blocks = blocks;
        Ok(Decision { plan: planned.plan, report, trial })
    }

    /// Whether the plan was given, so that nobody has looked at the weights yet.
    pub fn is_finished(&self) -> bool {
        match self.goal {
            Goal::Plan(_) | Goal::Uniform { .. } => true,
            Goal::Ratio(_) | Goal::Bytes(_) => false,
        }
    }

    fn decided(&self, mut plan: Plan) -> Result<Decision, CompressError> {
        let forms = plan.resolve_for(self.spec, self.source, self.bytes)?;
        let report = PlanReport::new(self.spec, self.source_bytes, &plan, &forms, &[]);
        Ok(Decision { plan, report, trial: Trial::default() })
    }
}

/// A plan, why it is so, and what was already made by it.
pub struct Decision {
    /// The plan, with sizes.
    pub plan: Plan,
    /// What it is founded on.
    pub report: PlanReport,
    trial: Trial,
}

/// The formats of a uniform plan in words, the most used first.
fn formats(plan: &Plan) -> Vec<String> {
    let mut found: Vec<(String, u64)> = Vec::new();
    for entry in plan.tensors.iter().filter(|e| e.method != "keep") {
        let name = entry.format().unwrap_or_else(|| entry.method.clone());
        match found.iter_mut().find(|(known, _)| *known == name) {
            Some((_, bytes)) => *bytes += entry.bytes,
            None => found.push((name, entry.bytes)),
        }
    }
    found.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    found.into_iter().map(|(name, _)| name).collect()
}
/// Damping of the Hessian for a role. A tied embedding is also read as a table, where every direction of a row counts the same;
/// more damping stands for that.
pub(crate) fn damping(role: Role) -> f64 {
    match role {
        Role::Embedding => 0.1,
        Role::LmHead
        | Role::Attention
        | Role::Mlp
        | Role::SharedExpert
        | Role::RoutedExpert
        | Role::Router
        | Role::Norm
        | Role::Bias
        | Role::Convolution
        | Role::RunningMean
        | Role::RunningVariance => 0.01,
    }
}

/// Compresses a model. The output does not depend on the number of threads; a sink that remembers a killed run's tensors is not
/// asked to write them again.
///
/// # Errors
/// A tensor that cannot be read, compressed or written, by name; a plan that does not fit the model.
pub fn compress(
    job: &CompressJob,
    mut sink: Box<dyn WeightSink + '_>,
    progress: &mut dyn Progress,
) -> Result<Report, CompressError> {
    let Decision { mut plan, mut report, trial } = job.decide(progress)?;
    let forms = plan.resolve_for(job.spec, job.source, job.bytes)?;
    let written = follow(job, &mut *sink, &mut plan, &forms, &mut report, trial, progress);
    if let Err(error) = &written
        && !error.may_be_mended()
    {
        sink.discard();
    }
    let coverage = written?;
    sink.finish()?;
    let known: HashSet<String> = job.spec.weights().into_iter().map(|w| w.name).collect();
    let dropped = job.source.tensors().iter().map(|t| &t.name).filter(|name| !known.contains(*name));
    Ok(Report {
        source_bytes: job.source_bytes,
        output_bytes: plan.bytes(),
        dropped: dropped.cloned().collect(),
        coverage,
        hardly_reached: report.experts,
        plan,
        gate: report.gate,
    })
}

/// Compresses every tensor by the plan into the sink. Gives the calibration tokens that reached each expert's weights.
fn follow(
    job: &CompressJob,
    sink: &mut dyn WeightSink,
    plan: &mut Plan,
    forms: &[(String, Form)],
    report: &mut PlanReport,
    trial: Trial,
    progress: &mut dyn Progress,
) -> Result<BTreeMap<String, u64>, CompressError> {
    sink.begin(forms)?;
    let mut run = Run::new(job, sink, plan, "compress");
    run.coverage = trial.coverage;
    run.prepared = trial.prepared;
    run.errors = trial.errors;
    match &job.backend {
        Some(backend) if !job.calibration.is_empty() && run.wants_text()? => {
            if job.is_finished() {
                check_finite(job.source, job.spec.weights().iter())?;
            }
            let hidden = run.blocks(backend, progress)?;
            run.tables(hidden, backend, progress)?;
        }
        Some(_) | None => run.by_tensor(progress)?,
    }
    let coverage = run.coverage;
    report.experts = report::hardly_reached(job.spec, &coverage, EXPERT_PRIOR as u64);
    sink.attach(report::FILE_NAME, &(report.to_json() + "\n"))?;
    Ok(coverage)
}

/// A plan being followed.
pub(crate) struct Run<'a> {
    job: &'a CompressJob<'a>,
    sink: &'a mut dyn WeightSink,
    plan: &'a mut Plan,
    /// What progress calls it.
    stage: &'static str,
    /// Index of each tensor's entry.
    places: HashMap<String, usize>,
    /// Calibration tokens that reached each expert's weights.
    pub coverage: BTreeMap<String, u64>,
    /// Text that goes along without being calibrated on.
    pub held: Option<HeldOut>,
    /// What is compressed already, and the errors that were measured.
    prepared: HashMap<String, Weight>,
    errors: HashMap<String, f64>,
}

impl<'a> Run<'a> {
    pub fn new(
        job: &'a CompressJob<'a>,
        sink: &'a mut dyn WeightSink,
        plan: &'a mut Plan,
        stage: &'static str,
    ) -> Self {
        let places = plan.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let (coverage, prepared, errors) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Self { job, sink, plan, stage, places, coverage, held: None, prepared, errors }
    }

    /// Whether any method of the plan asks for statistics; text that nobody needs is not run. Moments improve round to nearest.
    fn wants_text(&self) -> Result<bool, CompressError> {
        for entry in &self.plan.tensors {
            if entry.method != "keep" && entry.method()?.needs() >= Needs::Nothing {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn by_tensor(&mut self, progress: &mut dyn Progress) -> Result<(), CompressError> {
        let total = self.plan.bytes();
        let mut done = 0;
        for i in 0..self.plan.tensors.len() {
            progress.update(self.stage, done, total);
            let name = self.plan.tensors[i].name.clone();
            self.one(&name, None)?;
            done += self.plan.tensors[i].bytes;
        }
        progress.update(self.stage, total, total);
        Ok(())
    }

    /// Compresses the blocks one after another, each with what the compressed ones before it make of the text. Returns the states after the last.
    pub fn blocks(&mut self, backend: &Arc<dyn Backend>, progress: &mut dyn Progress) -> Result<Hidden, CompressError> {
        let (spec, source) = (self.job.spec, self.job.source);
        let weights = spec.weights();
        let total = spec.blocks.len() as u64 + 1;
        let mut hidden = Hidden::embed(spec, source, backend, self.job.calibration)?;
        for index in 0..spec.blocks.len() {
            progress.update(self.stage, index as u64, total);
            let mut overlay = Overlay { base: source, replaced: HashMap::new() };
            let mut missing: Vec<&WeightSpec> = Vec::new();
            for weight in weights.iter().filter(|w| w.block == Some(index)) {
                match self.ready(&weight.name)? {
                    Some(done) => drop(overlay.replaced.insert(weight.name.clone(), done)),
                    None => missing.push(weight),
                }
            }
            let original = Block::load(spec, index, source, backend)?;
            if !missing.is_empty() {
                let mut collector = Collector::new();
                hidden.forward(spec, index, &original, &mut collector, false);
                collector.finish(EXPERT_PRIOR);
                self.coverage.extend(collector.coverage());
                for weight in missing {
                    let siblings;
                    let hessian = match collector.hessian(&weight.name) {
                        Some(hessian) => Some(hessian),
                        None if weight.role == Role::RoutedExpert => {
                            siblings = collector.hessian_of_unreached(weight);
                            Some(&siblings)
                        }
                        None => None,
                    };
                    let compressed = self.one(&weight.name, hessian)?;
                    overlay.replaced.insert(weight.name.clone(), compressed);
                }
            } else if self.misses_coverage(&weights, index) {
                let mut counter = ExpertCounter::default();
                hidden.forward(spec, index, &original, &mut counter, false);
                self.coverage.extend(counter.tokens);
            }
            let block = Block::load(spec, index, &overlay, backend)?;
            hidden.forward(spec, index, &block, &mut NoObserver, true);
            if let Some(held) = &mut self.held {
                held.forward(spec, index, &original, &block);
            }
        }
        progress.update(self.stage, total - 1, total);
        Ok(hidden)
    }

    /// Whether a block has experts of which nobody has counted the tokens: an earlier, killed run has compressed them.
    fn misses_coverage(&self, weights: &[WeightSpec], index: usize) -> bool {
        let experts = |w: &&WeightSpec| w.block == Some(index) && w.role == Role::RoutedExpert;
        let mut experts = weights.iter().filter(experts).peekable();
        experts.peek().is_some() && !experts.any(|w| self.coverage.contains_key(&w.name))
    }

    /// Compresses what belongs to no block.
    fn tables(
        &mut self,
        hidden: Hidden,
        backend: &Arc<dyn Backend>,
        progress: &mut dyn Progress,
    ) -> Result<(), CompressError> {
        let spec = self.job.spec;
        let head = Head::load(spec, self.job.source, backend)?;
        let hessian = hidden.head_hessian(spec, &head);
        drop(head);
        for weight in spec.weights().iter().filter(|w| w.block.is_none()) {
            let reads_states = weight.role == Role::LmHead || (weight.role == Role::Embedding && spec.tied);
            self.one(&weight.name, reads_states.then_some(&hessian))?;
        }
        let total = spec.blocks.len() as u64 + 1;
        progress.update(self.stage, total, total);
        Ok(())
    }

    /// A tensor that an earlier, killed run has written, or that the gate has made.
    fn ready(&mut self, name: &str) -> Result<Option<Weight>, CompressError> {
        let written = self.sink.written(name)?;
        let done = match (written, self.prepared.remove(name)) {
            (Some(done), _) => done,
            (None, Some(done)) => {
                self.sink.write(name, &done)?;
                done
            }
            (None, None) => return Ok(None),
        };
        if let Some(error) = self.errors.remove(name) {
            self.entry(name)?.error = Some(error);
        }
        Ok(Some(done))
    }

    /// Compresses and writes one tensor, unless that is done.
    fn one(&mut self, name: &str, hessian: Option<&Hessian>) -> Result<Weight, CompressError> {
        if let Some(done) = self.ready(name)? {
            return Ok(done);
        }
        let source = self.job.source;
        let weight = source.load(name)?;
        let moments = match hessian {
            Some(hessian) => Some(hessian.diagonal()),
            None => (self.job.moments)(name, weight.cols()),
        };
        let entry = self.entry(name)?;
        let out = entry.method()?.compress(&weight, stats(hessian, &moments)).map_err(|e| e.of(name))?;
        drop(weight);
        entry.error = (entry.method != "keep").then_some(shown(out.error));
        self.sink.write(name, &out.weight)?;
        Ok(out.weight)
    }

    fn entry(&mut self, name: &str) -> Result<&mut Entry, CompressError> {
        let place = self.places.get(name).copied();
        place
            .and_then(|i| self.plan.tensors.get_mut(i))
            .ok_or_else(|| CompressError::Plan(format!("no entry for tensor {name}")))
    }
}

/// A sink that keeps what it is given: for tests, and for callers that go on in memory.
#[derive(Default)]
pub struct MemorySink<'a> {
    /// What was written, by name.
    pub weights: Option<&'a mut BTreeMap<String, Weight>>,
}

impl WeightSink for MemorySink<'_> {
    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError> {
        if let Some(weights) = &mut self.weights {
            weights.insert(name.to_owned(), weight.clone());
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}
