//! What the planner chooses, on models that are made for it.

use std::sync::Arc;

use fourfold_compress::planner::{Kind, candidates, restrict};
use fourfold_compress::{CompressJob, Goal, Plan, Scope, Silent};
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Cpu, CpuOptions};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSource};
use serde_json::json;

fn llama() -> ModelSpec {
    let config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu"
    });
    spec_from_config(&config).unwrap()
}

fn text() -> Vec<Vec<u32>> {
    (0..6u32).map(|s| (0..32u32).map(|t| (s * 31 + t * t * 7 + t) % 96).collect()).collect()
}

fn job<'a>(spec: &'a ModelSpec, source: &'a dyn WeightSource, text: &'a [Vec<u32>], bits: f64) -> CompressJob<'a> {
    let cpu = Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap());
    let (backend, backward): (Arc<dyn Backend>, Arc<dyn Backward>) = (cpu.clone(), cpu);
    let goal = Goal::Bytes((spec.parameters() as f64 * bits / 8.0) as u64);
    let (calibration, held_out) = text.split_at(4);
    CompressJob {
        backend: Some(backend),
        backward: Some(backward),
        calibration,
        held_out,
        ..CompressJob::new(spec, source, 4 * spec.parameters(), goal)
    }
}

/// Projections on a 4-bit grid with offsets in groups of 32.
struct OnGrid<'a>(&'a dyn WeightSource);

impl WeightSource for OnGrid<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.0.tensors()
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.0.load(name)?;
        if !name.ends_with("_proj.weight") {
            return Ok(weight);
        }
        let mut values = weight.to_f32();
        for group in values.chunks_mut(32) {
            let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            let (low, step) = (half::f16::from_f32(low).to_f32(), half::f16::from_f32((high - low) / 15.0).to_f32());
            group.iter_mut().for_each(|v| *v = low + step * ((*v - low) / step).round().clamp(0.0, 15.0));
        }
        Ok(Dense::from_f32(weight.shape(), values).into())
    }
}

fn errors_of_projections(plan: &Plan) -> f64 {
    plan.tensors.iter().filter(|t| t.name.ends_with("_proj.weight")).filter_map(|t| t.error).sum()
}

#[test]
fn a_grid_that_the_weights_lie_on_is_found() {
    let (spec, text) = (llama(), text());
    let random = RandomWeights::new(&spec, 3);
    let source = OnGrid(&random);
    let mut job = job(&spec, &source, &text, 5.6);
    job.held_out = &[];
    let with = errors_of_projections(&job.plan(&mut Silent).unwrap());
    job.candidates = restrict(candidates(false), &[], &[Kind::Affine]);
    let without = errors_of_projections(&job.plan(&mut Silent).unwrap());
    assert!(with < 0.02 * without, "{with} with offsets, {without} without");
}

#[test]
fn weights_that_are_multiplied_at_once_are_stored_alike_where_asked() {
    let (spec, text) = (llama(), text());
    let source = RandomWeights::new(&spec, 4);
    let groups = [["q_proj", "k_proj", "v_proj"].as_slice(), &["gate_proj", "up_proj"]];
    let mixed = |alike: bool| {
        let mut job = job(&spec, &source, &text, 4.6);
        (job.held_out, job.scope) = (&[], Scope { alike, ..Scope::default() });
        let plan = job.plan(&mut Silent).unwrap();
        let mut mixed = 0;
        for layer in 0..spec.blocks.len() {
            for group in groups {
                let of = |part: &str| {
                    let found = |name: &str| name.contains(&format!("layers.{layer}.")) && name.contains(part);
                    let entry = plan.tensors.iter().find(|t| found(&t.name)).unwrap();
                    (entry.method.clone(), entry.settings.clone())
                };
                mixed += usize::from(group.iter().any(|part| of(part) != of(group[0])));
            }
        }
        mixed
    };
    assert_eq!(mixed(true), 0);
    assert!(mixed(false) > 0, "there was nothing to ask for");
}

#[test]
fn a_plan_that_is_no_better_than_a_uniform_one_is_not_used() {
    let (spec, text) = (llama(), text());
    let source = RandomWeights::new(&spec, 5);
    let decide = |only: &[usize], bytes: Option<u64>| {
        let mut job = job(&spec, &source, &text, 6.0);
        job.goal = bytes.map_or(job.goal, Goal::Bytes);
        let all = candidates(false);
        job.candidates = only.iter().map(|&i| all[i].clone()).collect();
        let report = job.decide(&mut Silent).unwrap();
        let settings = |plan: &Plan| {
            let mut all: Vec<_> =
                plan.tensors.iter().filter(|t| t.method != "keep").map(|t| t.settings.clone()).collect();
            all.dedup();
            all.len()
        };
        (report.report.gate.clone().unwrap(), settings(&report.plan))
    };
    // One format, and no byte more than it takes: the mix is the uniform choice (the embedding has its own damping), and that is no better than itself.
    let (gate, _) = decide(&[2], None);
    let (gate, formats) = decide(&[2], Some(gate.uniform_bytes));
    assert!(!gate.passed && gate.planned == gate.uniform && formats <= 2, "{gate:?}, {formats} formats");
    // Two formats and a budget between them: here a mix is better.
    let (gate, formats) = decide(&[2, 6], Some(gate.uniform_bytes * 6 / 5));
    assert!(gate.passed && gate.planned < gate.uniform && formats > 2, "{gate:?}, {formats} formats in turn");
}
