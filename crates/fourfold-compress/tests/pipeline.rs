//! From source to sink: sizes, resumption, sameness, refusals, on small random models.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_compress::methods::quantize::grid::{Granularity, GridSpec};
use fourfold_compress::pipeline::MemorySink;
use fourfold_compress::{CompressError, CompressJob, Goal, Plan, Progress, Report, Silent, compress};
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Cpu, CpuOptions};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSink, WeightSource};
use serde_json::json;

fn llama() -> ModelSpec {
    let config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu"
    });
    spec_from_config(&config).unwrap()
}

fn mixture() -> ModelSpec {
    let config = include_str!("../../fourfold-models/tests/golden/deepseek_v3_moe/config.json");
    spec_from_config(&serde_json::from_str(config).unwrap()).unwrap()
}

fn text(vocabulary: usize) -> Vec<Vec<u32>> {
    (0..6u32).map(|s| (0..24u32).map(|t| (s * 31 + t * t * 7 + t) % vocabulary as u32).collect()).collect()
}

fn bytes_of(source: &dyn WeightSource) -> u64 {
    source.tensors().iter().map(|t| t.bytes).sum()
}

type Weights = BTreeMap<String, Weight>;

fn run(job: &CompressJob) -> Result<(Report, Weights), CompressError> {
    let mut weights = Weights::new();
    let report = compress(job, Box::new(MemorySink { weights: Some(&mut weights) }), &mut Silent)?;
    Ok((report, weights))
}

fn calibrated<'a>(
    spec: &'a ModelSpec,
    source: &'a dyn WeightSource,
    calibration: &'a [Vec<u32>],
    threads: usize,
    goal: Goal,
) -> CompressJob<'a> {
    let cpu = Arc::new(Cpu::new(CpuOptions { threads, ..CpuOptions::default() }).unwrap());
    let (backend, backward): (Arc<dyn Backend>, Arc<dyn Backward>) = (cpu.clone(), cpu);
    CompressJob {
        backend: Some(backend),
        backward: Some(backward),
        calibration,
        ..CompressJob::new(spec, source, bytes_of(source), goal)
    }
}

fn uniform(method: &str) -> Goal {
    let settings = serde_json::to_value(GridSpec::new(4, Granularity::Group(32))).unwrap();
    Goal::Uniform { method: method.to_owned(), settings }
}

#[test]
fn a_ratio_is_kept_with_and_without_text() {
    let spec = llama();
    let source = RandomWeights::new(&spec, 1);
    let calibration = text(96);
    for ratio in [4.0, 6.0, 8.0] {
        let budget = (bytes_of(&source) as f64 / ratio) as u64;
        let plain = CompressJob::new(&spec, &source, bytes_of(&source), Goal::Ratio(ratio));
        for job in [plain, calibrated(&spec, &source, &calibration, 2, Goal::Ratio(ratio))] {
            // The headers of so small a model are a large part of it, so a small ratio may be all there is.
            match run(&job) {
                Ok((report, weights)) => {
                    assert!(report.output_bytes <= budget, "{ratio}: {} of {budget}", report.output_bytes);
                    let written: u64 = weights.values().map(|w| fourfold_tensor::Form::of(w).file_bytes()).sum();
                    assert_eq!(written, report.output_bytes);
                }
                Err(CompressError::Budget { smallest, .. }) => assert!(ratio > 4.0 && smallest > budget),
                Err(other) => panic!("{other}"),
            }
        }
    }
    let impossible = CompressJob::new(&spec, &source, bytes_of(&source), Goal::Bytes(1000));
    assert!(matches!(run(&impossible), Err(CompressError::Budget { budget: 1000, .. })));
    let nonsense = CompressJob::new(&spec, &source, bytes_of(&source), Goal::Ratio(0.5));
    assert!(run(&nonsense).is_err());
}

#[test]
fn a_larger_budget_is_spent_on_a_smaller_error() {
    let spec = llama();
    let source = RandomWeights::new(&spec, 1);
    let calibration = text(96);
    let cost = |ratio: f64| {
        let plan = calibrated(&spec, &source, &calibration, 2, Goal::Ratio(ratio)).plan(&mut Silent).unwrap();
        plan.tensors.iter().filter_map(|t| t.error).sum::<f64>()
    };
    let (small, large) = (cost(4.5), cost(3.0));
    assert!(large < 0.5 * small, "{large} against {small}");
}

#[test]
fn the_output_does_not_depend_on_threads() {
    for spec in [llama(), mixture()] {
        let source = RandomWeights::new(&spec, 2);
        let calibration = text(spec.vocab_size);
        let with = |threads: usize, method: &str| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&calibrated(&spec, &source, &calibration, threads, uniform(method))).unwrap().1)
        };
        for method in ["rtn", "gptq"] {
            assert!(with(1, method) == with(3, method), "{method} of {}", spec.architecture);
        }
    }
}

#[test]
fn experts_report_how_many_tokens_reached_them() {
    let spec = mixture();
    let source = RandomWeights::new(&spec, 3);
    let calibration = text(spec.vocab_size);
    let (report, weights) = run(&calibrated(&spec, &source, &calibration, 2, uniform("gptq"))).unwrap();
    assert!(!report.coverage.is_empty());
    assert!(report.coverage.keys().all(|name| name.contains(".experts.")));
    let experts = spec.weights().iter().filter(|w| w.name.contains(".experts.")).count();
    let quantized = weights.iter().filter(|(n, w)| n.contains(".experts.") && matches!(w, Weight::Quantized(_)));
    // Reached or not, every expert is compressed.
    assert_eq!(quantized.count(), experts);
    // The few hundred tokens of this text are too few for every expert: each is named once, with what reached it.
    let told: BTreeMap<&str, u64> = report.hardly_reached.iter().map(|e| (e.expert.as_str(), e.tokens)).collect();
    assert_eq!(told.len(), report.hardly_reached.len());
    for weight in spec.weights().iter().filter(|w| w.name.contains(".experts.")) {
        let expert = weight.name.rsplitn(3, '.').last().unwrap();
        let tokens = report.coverage.get(&weight.name).copied().unwrap_or(0);
        assert_eq!(told.get(expert).copied(), (tokens < 256).then_some(tokens), "{}", weight.name);
    }
}

#[test]
fn an_expert_that_no_token_reaches_is_told_of() {
    let spec = mixture();
    let reached = |weight: &str| u64::from(!weight.contains(".experts.2.")) * 300;
    let experts = || spec.weights().into_iter().filter(|w| w.name.contains(".experts."));
    let coverage: BTreeMap<String, u64> =
        experts().map(|w| (w.name.clone(), reached(&w.name))).filter(|(_, tokens)| *tokens > 0).collect();
    let told = fourfold_compress::report::hardly_reached(&spec, &coverage, 256);
    let layers = spec.blocks.iter().enumerate().filter(|(i, _)| experts().any(|w| w.block == Some(*i))).count();
    assert_eq!(told.len(), layers);
    assert!(told.iter().all(|e| e.expert.ends_with(".experts.2") && e.tokens == 0), "{told:?}");
    assert!(
        fourfold_compress::report::hardly_reached(&spec, &BTreeMap::new(), 256).is_empty(),
        "nothing was calibrated"
    );
}

/// A sink that fails after some tensors, and remembers them.
struct Failing<'a> {
    kept: &'a mut Weights,
    left: usize,
    writes: &'a mut usize,
}

impl WeightSink for Failing<'_> {
    fn written(&self, name: &str) -> Result<Option<Weight>, SourceError> {
        Ok(self.kept.get(name).cloned())
    }

    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError> {
        if self.left == 0 {
            return Err(SourceError::File { file: "full".into(), reason: "no room".into() });
        }
        self.left -= 1;
        *self.writes += 1;
        self.kept.insert(name.to_owned(), weight.clone());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

#[test]
fn a_run_that_was_cut_off_goes_on_to_the_same_bytes() {
    let spec = llama();
    let source = RandomWeights::new(&spec, 4);
    let calibration = text(96);
    for method in ["rtn", "gptq"] {
        let job = calibrated(&spec, &source, &calibration, 2, uniform(method));
        let whole = run(&job).unwrap().1;
        for cut in [0, 1, 9, 17] {
            let (mut kept, mut writes) = (Weights::new(), 0);
            let mut sink = |left| {
                let failing = Failing { kept: &mut kept, left, writes: &mut writes };
                compress(&job, Box::new(failing), &mut Silent).map(|_| ())
            };
            assert!(sink(cut).is_err());
            sink(usize::MAX).unwrap();
            assert_eq!(writes, whole.len(), "{method}, cut after {cut}: nothing is written twice");
            assert!(kept == whole, "{method}, cut after {cut}");
        }
    }
}

/// A source with one value replaced.
struct Poisoned<'a>(&'a dyn WeightSource, &'static str);

impl WeightSource for Poisoned<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.0.tensors()
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.0.load(name)?;
        if name != self.1 {
            return Ok(weight);
        }
        let mut values = weight.to_f32();
        values[50] = f32::NAN;
        Ok(Dense::from_f32(weight.shape(), values).into())
    }
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    let spec = llama();
    let source = RandomWeights::new(&spec, 5);
    let poisoned = Poisoned(&source, "model.layers.1.mlp.up_proj.weight");
    let job = CompressJob::new(&spec, &poisoned, bytes_of(&source), uniform("rtn"));
    let error = run(&job).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("tensor model.layers.1.mlp.up_proj.weight: element [1, 2] is NaN"));
}

#[test]
fn plans_are_read_back_and_checked() {
    let spec = llama();
    let source = RandomWeights::new(&spec, 6);
    let job = CompressJob::new(&spec, &source, bytes_of(&source), Goal::Ratio(4.0));
    let plan = job.plan(&mut Silent).unwrap();
    let back = Plan::from_json(&plan.to_json()).unwrap();
    assert_eq!(plan, back);
    let with = |plan: Plan| CompressJob::new(&spec, &source, bytes_of(&source), Goal::Plan(plan)).plan(&mut Silent);
    assert_eq!(with(back.clone()).unwrap(), plan);
    let refused = |change: &dyn Fn(&mut Plan)| {
        let mut plan = back.clone();
        change(&mut plan);
        with(plan).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(refused(&|p| drop(p.tensors.remove(3))).starts_with("plan: no entry for tensor model.layers."));
    assert!(refused(&|p| p.tensors[0].name = "nonsense".into()).contains("no entry for tensor model.embed_tokens"));
    assert!(refused(&|p| p.tensors.push(p.tensors[0].clone())).contains("two entries"));
    assert!(refused(&|p| p.tensors[0].method = "magic".into()).contains("no method named magic"));
    assert!(refused(&|p| p.tensors[0].settings = json!({"bits": 99, "granularity": "channel"})).contains("99 bits"));
    assert!(Plan::from_json("{\"tensors\": [{]}").is_err());
}

#[test]
fn progress_rises_to_its_total() {
    struct Watch(Vec<(String, u64, u64)>);
    impl Progress for Watch {
        fn update(&mut self, stage: &str, done: u64, total: u64) {
            self.0.push((stage.to_owned(), done, total));
        }
    }
    let spec = llama();
    let source = RandomWeights::new(&spec, 7);
    let mut watch = Watch(Vec::new());
    let job = CompressJob::new(&spec, &source, bytes_of(&source), uniform("rtn"));
    compress(&job, Box::new(MemorySink::default()), &mut watch).unwrap();
    assert!(watch.0.iter().all(|(_, done, total)| done <= total));
    assert!(watch.0.windows(2).all(|w| w[0].0 != w[1].0 || w[0].1 <= w[1].1));
    assert!(watch.0.last().is_some_and(|(_, done, total)| done == total));
}
