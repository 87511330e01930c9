//! What a compression costs, on a model and texts of your own: compresses in memory, then prints bytes, perplexity and the mean
//! divergence from the original (second half of each chunk, as llama.cpp counts).
//!
//! `quality MODEL CALIBRATION.json TEST.json (ratio R | bytes N | plan FILE | uniform METHOD SETTINGS) [PLAN-OUT]`; the texts are
//! JSON arrays of arrays of token ids, or `none` for no calibration.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fourfold_compress::calibrate::Overlay;
use fourfold_compress::pipeline::MemorySink;
use fourfold_compress::{CompressJob, Goal, Plan, Progress, compress};
use fourfold_kernels::cpu::{Activations, Cpu, CpuOptions};
use fourfold_kernels::{Backend, KvDtype, Tensor};
use fourfold_models::{Model, spec_from_config};

struct Print(Instant);

impl Progress for Print {
    fn update(&mut self, stage: &str, done: u64, total: u64) {
        eprintln!("{:7.1} s  {stage} {done} of {total}", self.0.elapsed().as_secs_f64());
    }
}

fn ids(path: &str) -> Result<Vec<Vec<u32>>, Box<dyn Error>> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, calibration, test, rest @ ..] = args.as_slice() else {
        return Err("see the file's first lines".into());
    };
    let (goal, plan_out) = match rest {
        [kind, ratio, out @ ..] if kind == "ratio" => (Goal::Ratio(ratio.parse()?), out),
        [kind, bytes, out @ ..] if kind == "bytes" => (Goal::Bytes(bytes.parse()?), out),
        [kind, file, out @ ..] if kind == "plan" => {
            (Goal::Plan(Plan::from_json(&std::fs::read_to_string(file)?)?), out)
        }
        [kind, method, settings, out @ ..] if kind == "uniform" => {
            (Goal::Uniform { method: method.clone(), settings: serde_json::from_str(settings)? }, out)
        }
        _ => return Err("see the file's first lines".into()),
    };
    let checkpoint = fourfold_formats::open(Path::new(model))?;
    let spec = spec_from_config(&checkpoint.config)?;
    let calibration = if calibration == "none" { Vec::new() } else { ids(calibration)? };
    let activations = if std::env::var_os("EXACT").is_some() { Activations::F32 } else { Activations::Fast };
    let cpu = Arc::new(Cpu::new(CpuOptions { activations, ..CpuOptions::default() })?);
    let fast: Arc<dyn Backend> = cpu.clone();
    let source = &*checkpoint.weights;
    let job = CompressJob {
        backward: std::env::var_os("NO_FISHER").is_none().then(|| Arc::clone(&cpu) as _),
        backend: Some(Arc::clone(&fast)),
        calibration: &calibration,
        ..CompressJob::new(&spec, source, checkpoint.weight_bytes, goal)
    };
    let start = Instant::now();
    let mut weights = BTreeMap::new();
    let report = compress(&job, Box::new(MemorySink { weights: Some(&mut weights) }), &mut Print(start))?;
    let seconds = start.elapsed().as_secs_f64();
    drop((fast, cpu));
    if let Some(path) = plan_out.first() {
        std::fs::write(path, report.plan.to_json())?;
    }
    let exact: Arc<dyn Backend> =
        Arc::new(Cpu::new(CpuOptions { activations: Activations::F32, ..CpuOptions::default() })?);
    let overlay = Overlay { base: source, replaced: weights.into_iter().collect::<HashMap<_, _>>() };
    let original = Model::load(&spec, source, Arc::clone(&exact), &mut |_| {})?;
    let compressed = Model::load(&spec, &overlay, exact, &mut |_| {})?;
    let mut score = Score::default();
    for chunk in ids(test)? {
        score.chunk(&chunk, &original, &compressed);
    }
    println!(
        "bytes {} of {} ({:.3}:1)  {score}  {seconds:.0} s",
        report.output_bytes,
        report.source_bytes,
        report.source_bytes as f64 / report.output_bytes as f64,
    );
    Ok(())
}

#[derive(Default)]
struct Score {
    divergence: f64,
    loss: f64,
    base_loss: f64,
    same: usize,
    count: usize,
}

impl Score {
    fn chunk(&mut self, chunk: &[u32], original: &Model, compressed: &Model) {
        let half = chunk.len() / 2;
        let run = |model: &Model| {
            let mut cache = model.new_cache(KvDtype::F32);
            let hidden = model.hidden(chunk, &mut cache);
            let (cols, rows) = (hidden.cols(), chunk.len() - 1 - half);
            let rest = hidden.host()[half * cols..(half + rows) * cols].to_vec();
            model.logits(&Tensor::new(rows, cols, rest))
        };
        let (p, q) = (run(original), run(compressed));
        for r in 0..p.rows() {
            let (p, q) = (log_softmax(p.row(r)), log_softmax(q.row(r)));
            self.divergence += p.iter().zip(&q).map(|(p, q)| f64::from(p.exp() * (p - q))).sum::<f64>();
            let target = chunk[half + r + 1] as usize;
            self.loss -= f64::from(q[target]);
            self.base_loss -= f64::from(p[target]);
            self.same += usize::from(argmax(&p) == argmax(&q));
            self.count += 1;
        }
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n = self.count as f64;
        write!(
            f,
            "KLD {:.5}  PPL {:.3} (original {:.3})  same top {:.2} %",
            self.divergence / n,
            (self.loss / n).exp(),
            (self.base_loss / n).exp(),
            100.0 * self.same as f64 / n
        )
    }
}

fn log_softmax(row: &[f32]) -> Vec<f32> {
    let largest = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let sum: f64 = row.iter().map(|&v| f64::from((v - largest).exp())).sum();
    let shift = largest + sum.ln() as f32;
    row.iter().map(|&v| v - shift).collect()
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0)
}
