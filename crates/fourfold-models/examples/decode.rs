//! Where the time of a decoded token goes: a model of random weights, rounded to a symmetric grid, with each operation timed.
//!
//! ```sh
//! cargo run --release -p fourfold-models --example decode -- path/to/config.json [bits] [threads] [context]
//! ```
//! Bits 16 and 32 are bf16 and f32 weights.

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fourfold_kernels::{
    AttentionSpec, Backend, Cpu, CpuOptions, DeviceWeight, KernelError, KvCache, KvDtype, LinearArg, Memory, RopeSpec,
    Tensor, Values,
};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, spec_from_config};
use fourfold_tensor::{
    Buffer, DType, Dense, FloatBuffer, Offsets, Quantized, Scales, SourceError, TensorInfo, Weight, WeightSource,
    pack_row, packed_words_per_row,
};

/// Columns that share a scale.
const GROUP: usize = 64;

/// Random weights in another storage form.
struct Stored {
    random: RandomWeights,
    bits: u8,
}

impl WeightSource for Stored {
    fn tensors(&self) -> &[TensorInfo] {
        self.random.tensors()
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let weight = self.random.load(name)?;
        let (rows, cols) = (weight.rows(), weight.cols());
        if weight.shape().len() < 2 || self.bits == 32 {
            return Ok(weight);
        }
        if self.bits == 16 {
            return Ok(Dense::new(weight.shape(), FloatBuffer::from_f32(weight.to_f32(), DType::Bf16)).into());
        }
        let (words, half) = (packed_words_per_row(cols, self.bits), (1u32 << (self.bits - 1)) as f32);
        let (mut packed, mut scales) = (vec![0u32; rows * words], Vec::new());
        let (mut row, mut codes) = (vec![0.0; cols], vec![0u8; cols]);
        for r in 0..rows {
            weight.read_row(r, &mut row);
            for (values, codes) in row.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
                let scale = values.iter().fold(0.0f32, |m, v| m.max(v.abs())) / (half - 1.0);
                scales.push(scale);
                codes.iter_mut().zip(values).for_each(|(c, v)| *c = (v / scale + half).round() as u8);
            }
            pack_row(&codes, self.bits, &mut packed[r * words..(r + 1) * words]);
        }
        Ok(Quantized {
            rows,
            cols,
            bits: self.bits,
            group_size: GROUP,
            packed: Buffer::from(packed),
            scales: Scales::Float(FloatBuffer::from_f32(scales, DType::F16)),
            offsets: Offsets::Symmetric,
            codebook: None,
            g_idx: None,
        }
        .into())
    }
}

/// A backend that adds up the time of each operation.
struct Timed {
    cpu: Cpu,
    times: Mutex<BTreeMap<String, (Duration, u32)>>,
}

impl Timed {
    fn time<T>(&self, operation: &str, shape: impl FnOnce() -> String, run: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = run();
        let took = begin.elapsed();
        let mut times = self.times.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let entry = times.entry(format!("{operation} {}", shape())).or_default();
        *entry = (entry.0 + took, entry.1 + 1);
        result
    }
}

fn shape(x: &Tensor) -> String {
    format!("[{}, {}]", x.rows(), x.cols())
}

impl Memory for Timed {
    fn name(&self) -> String {
        self.cpu.name()
    }
    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        self.cpu.upload(weight)
    }
}

impl Backend for Timed {
    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        let outputs = || weights.iter().map(|w| w.weight.rows().to_string()).collect::<Vec<_>>().join("+");
        self.time("linear", || format!("{} -> {}", shape(x), outputs()), || self.cpu.linear(x, weights))
    }
    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        self.time("linear_rows", || shape(x), || self.cpu.linear_rows(x, weight, rows))
    }
    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        self.time("linear_transposed", || shape(x), || self.cpu.linear_transposed(x, weight, rows))
    }
    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        self.time("embedding", String::new, || self.cpu.embedding(weight, ids))
    }
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        self.time("rms_norm", || shape(x), || self.cpu.rms_norm(x, weight, eps))
    }
    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        let what = shape(x);
        self.time("rope", || what, || self.cpu.rope(x, cos, sin, spec));
    }
    fn attention(&self, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
        self.time("attention", || shape(q), || self.cpu.attention(q, keys, values, spec))
    }
    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor {
        self.time("swiglu", || shape(up), || self.cpu.swiglu(gate, up))
    }
    fn add(&self, x: &mut Tensor, y: &Tensor) {
        self.time("add", || shape(y), || self.cpu.add(x, y));
    }
    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        self.time("columns", || shape(x), || self.cpu.columns(x, range))
    }
    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.time("concat_columns", || shape(a), || self.cpu.concat_columns(a, b))
    }
    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        self.time("gather_rows", || shape(x), || self.cpu.gather_rows(x, rows))
    }
    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        self.time("scatter_add_rows", || shape(y), || self.cpu.scatter_add_rows(x, y, rows, factors));
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: decode CONFIG.json [bits] [threads] [context]")?;
    let number = |i: usize, default| arguments.get(i).map_or(Ok(default), |text: &String| text.parse::<usize>());
    let (bits, threads, context) = (number(1, 4)?, number(2, 0)?, number(3, 64)?);
    let spec = spec_from_config(&serde_json::from_str(&std::fs::read_to_string(path)?)?)?;
    let cpu = Cpu::new(CpuOptions { threads, ..CpuOptions::default() })?;
    let timed = Arc::new(Timed { cpu, times: Mutex::default() });
    let source = Stored { random: RandomWeights::new(&spec, 1), bits: u8::try_from(bits)? };
    let model = Model::load(&spec, &source, Arc::clone(&timed) as Arc<dyn Backend>, &mut |_| ())?;
    let read = model.weight_bytes() as f64;
    println!("{}: {:.1} MB of weights on {}", spec.architecture, read / 1e6, timed.name());

    let mut cache = model.new_cache(KvDtype::F16);
    let prompt: Vec<u32> = (0..context).map(|i| (i * 7919 % spec.vocab_size) as u32).collect();
    let begin = Instant::now();
    model.hidden(&prompt, &mut cache);
    println!("prefill of {context}: {:.1} tokens/s", context as f64 / begin.elapsed().as_secs_f64());

    let steps = 200;
    let mut took = Vec::with_capacity(steps);
    timed.times.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    let begin = Instant::now();
    for step in 0..steps {
        let begin = Instant::now();
        let hidden = model.hidden(&[(step * 31 % spec.vocab_size) as u32], &mut cache);
        model.logits(&hidden);
        took.push(begin.elapsed().as_secs_f64());
    }
    let total = begin.elapsed();
    took.sort_by(f64::total_cmp);
    println!(
        "decode: best {:.3} ms, median {:.3} ms ({:.0} tokens/s, {:.1} GB/s)",
        took[0] * 1e3,
        took[steps / 2] * 1e3,
        1.0 / took[steps / 2],
        read / took[steps / 2] / 1e9
    );
    let times = timed.times.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut rows: Vec<_> = times.iter().collect();
    rows.sort_by_key(|(_, (time, _))| std::cmp::Reverse(*time));
    let inside: Duration = rows.iter().map(|(_, (time, _))| *time).sum();
    for (operation, (time, calls)) in rows {
        let share = 100.0 * time.as_secs_f64() / total.as_secs_f64();
        let each = time.as_secs_f64() * 1e6 / f64::from(*calls);
        println!("{share:5.1} %  {each:8.2} µs x {:4}  {operation}", f64::from(*calls) / steps as f64);
    }
    println!("{:5.1} %  between operations", 100.0 * (total - inside).as_secs_f64() / total.as_secs_f64());
    Ok(())
}
