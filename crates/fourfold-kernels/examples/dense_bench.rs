//! Speed of the float linear layers and of attention, on the shapes of SmolLM2-135M:
//! `cargo run --release -p fourfold-kernels --example dense_bench [threads [training [f32 | bf16 | int16 [portable | avx2 | avx512]]]]`,
//! where the third says what fast products are made in.
//!
//! With one thread, times are the time it spent on a core (Linux), which other programs disturb little.

use std::time::Instant;

use fourfold_kernels::backward::{Backward, SelfAttention};
use fourfold_kernels::{
    Activations, AttentionSpec, Backend, Cpu, CpuOptions, DeviceWeight, FloatProducts, Isa, KvCache, KvDtype,
    LinearArg, Memory, Tensor, Values,
};
use fourfold_tensor::{DType, Dense, FloatBuffer};

const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const KV: usize = 192;
const BLOCKS: usize = 30;
/// Weights that share an input: (input, outputs).
const LAYERS: &[(usize, &[usize])] = &[
    (HIDDEN, &[HIDDEN, KV, KV]),
    (HIDDEN, &[HIDDEN]),
    (HIDDEN, &[INTERMEDIATE, INTERMEDIATE]),
    (INTERMEDIATE, &[HIDDEN]),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(0), |n| n.parse())?;
    let name = std::env::args().nth(3);
    let products = FloatProducts::ALL.into_iter().find(|products| Some(products.name()) == name.as_deref());
    let name = std::env::args().nth(4);
    let isa = Isa::ALL.into_iter().find(|isa| Some(isa.name()) == name.as_deref());
    let cpu = Cpu::new(CpuOptions { threads, isa, products, ..CpuOptions::default() })?;
    let bandwidth = cpu.read_bandwidth();
    println!("{}, {} threads, {:.1} GB/s read from memory", cpu.name(), cpu.threads(), bandwidth / 1e9);
    let only_training = std::env::args().nth(2).is_some_and(|part| part == "training");
    let inference = [
        (DType::Bf16, Activations::Fast),
        (DType::Bf16, Activations::F32),
        (DType::F16, Activations::F32),
        (DType::F32, Activations::F32),
    ];
    for (dtype, activations) in inference.into_iter().filter(|_| !only_training) {
        let cpu = Cpu::new(CpuOptions { threads, isa, activations, products })?;
        linear(&cpu, dtype, &format!("{dtype} weights, {activations:?} activations"), bandwidth)?;
    }
    for (tokens, cached) in [(512, 0), (1, 128), (1, 512), (1, 2048)].into_iter().filter(|_| !only_training) {
        attention(&cpu, tokens, cached);
    }
    for activations in [Activations::Fast, Activations::F32] {
        training(&Cpu::new(CpuOptions { threads, isa, activations, products })?, activations)?;
    }
    Ok(())
}

/// Seconds of a run: the best of many; or, for one thread, the mean time on a core.
fn best(threads: usize, mut run: impl FnMut()) -> f64 {
    run();
    let (begin, on_core) = (Instant::now(), seconds_on_core());
    let (mut best, mut runs) = (f64::INFINITY, 0);
    while begin.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    match (threads, on_core, seconds_on_core()) {
        (1, Some(before), Some(after)) => (after - before) / f64::from(runs),
        _ => best,
    }
}

/// Time that this thread has spent on a core.
fn seconds_on_core() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(text.split(' ').next()?.parse::<u64>().ok()? as f64 / 1e9)
}

fn tensor(rows: usize, cols: usize) -> Tensor {
    Tensor::new(rows, cols, (0..rows * cols).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect())
}

fn linear(cpu: &Cpu, dtype: DType, label: &str, bandwidth: f64) -> Result<(), Box<dyn std::error::Error>> {
    let mut bytes = 0;
    let mut multiplications = 0;
    let mut blocks: Vec<Vec<(usize, Vec<DeviceWeight>)>> = Vec::new();
    for _ in 0..BLOCKS {
        let mut block = Vec::new();
        for &(input, outputs) in LAYERS {
            let mut weights = Vec::new();
            for &output in outputs {
                let data = FloatBuffer::from_f32(tensor(output, input).into_host(), dtype);
                weights.push(cpu.upload(Dense::new(vec![output, input], data).into())?);
                bytes += weights.last().map_or(0, DeviceWeight::byte_len);
                multiplications += output * input;
            }
            block.push((input, weights));
        }
        blocks.push(block);
    }
    println!("{label}: {BLOCKS} blocks of linear layers, {:.1} MB", bytes as f64 / 1e6);
    for tokens in [1, 2, 4, 7, 8, 12, 16, 32, 64, 512] {
        let inputs = [tensor(tokens, HIDDEN), tensor(tokens, INTERMEDIATE)];
        let seconds = best(cpu.threads(), || {
            for (input, weights) in blocks.iter().flatten() {
                let x = &inputs[usize::from(*input == INTERMEDIATE)];
                let args: Vec<_> = weights.iter().map(|weight| LinearArg { weight, bias: None }).collect();
                std::hint::black_box(cpu.linear(x, &args));
            }
        });
        let (read, flops) = (bytes as f64 / seconds, 2.0 * (multiplications * tokens) as f64 / seconds);
        println!(
            "  {tokens:4} tokens: {:8.3} ms, {:7.1} tokens/s, {:5.1} GB/s ({:3.0} % of the read bandwidth), {:6.1} GFLOP/s",
            seconds * 1e3,
            tokens as f64 / seconds,
            read / 1e9,
            100.0 * read / bandwidth,
            flops / 1e9,
        );
    }
    Ok(())
}

fn attention(cpu: &Cpu, tokens: usize, cached: usize) {
    let (heads, kv_heads, dim) = (9, 3, 64);
    let mut keys = KvCache::new(kv_heads * dim, KvDtype::F16);
    let mut values = KvCache::new(kv_heads * dim, KvDtype::F16);
    keys.append(&tensor(cached + tokens, kv_heads * dim));
    values.append(&tensor(cached + tokens, kv_heads * dim));
    let q = tensor(tokens, heads * dim);
    let spec = AttentionSpec {
        heads,
        kv_heads,
        key_dim: dim,
        value_dim: dim,
        scale: 0.125,
        first_position: cached,
        window: None,
    };
    let seconds = best(cpu.threads(), || {
        for _ in 0..BLOCKS {
            std::hint::black_box(cpu.attention(&q, &keys, Values::Cache(&values), &spec));
        }
    });
    println!("attention of {tokens} tokens after {cached}, {BLOCKS} blocks: {:.3} ms", seconds * 1e3);
}

/// A training step's products: (tokens, inputs, outputs) of a wide layer, of the two sides of a small model's feed-forward, of its
/// vocabulary and of an expert.
const TRAINED: &[(usize, usize, usize)] = &[
    (2048, HIDDEN, INTERMEDIATE),
    (512, 384, 1024),
    (512, 1024, 384),
    (512, 384, 384),
    (256, 384, 20_000),
    (128, 384, 256),
];

/// The gradients of some layers, and of attention for 2048 tokens in documents of 256.
fn training(cpu: &Cpu, activations: Activations) -> Result<(), Box<dyn std::error::Error>> {
    const TOKENS: usize = 2048;
    println!("{activations:?} activations");
    for &(tokens, inputs, outputs) in TRAINED {
        let (x, dy) = (tensor(tokens, inputs), tensor(tokens, outputs));
        let data = FloatBuffer::from_f32(tensor(outputs, inputs).into_host(), DType::Bf16);
        let weight = cpu.upload(Dense::new(vec![outputs, inputs], data).into())?;
        let mut dw = Tensor::zeros(outputs, inputs);
        let flops = 2.0 * (tokens * inputs * outputs) as f64;
        let forward = best(cpu.threads(), || {
            std::hint::black_box(cpu.linear(&x, &[LinearArg { weight: &weight, bias: None }]));
        });
        let input = best(cpu.threads(), || {
            std::hint::black_box(cpu.linear_transposed(&dy, &weight, 0..outputs));
        });
        let weights = best(cpu.threads(), || cpu.linear_weight_gradient(&x, &dy, &mut dw));
        println!(
            "{tokens:5} tokens, {inputs:4} to {outputs:5}: forward {:5.1} GFLOP/s, input gradient {:5.1}, weight gradient {:5.1}",
            flops / forward / 1e9,
            flops / input / 1e9,
            flops / weights / 1e9,
        );
    }
    let (heads, kv_heads, dim) = (9, 3, 64);
    let documents: Vec<_> = (0..TOKENS).step_by(256).map(|start| start..start + 256).collect();
    let spec = SelfAttention {
        heads,
        kv_heads,
        key_dim: dim,
        value_dim: dim,
        scale: 0.125,
        window: None,
        documents: &documents,
    };
    let (q, k, v) = (tensor(TOKENS, heads * dim), tensor(TOKENS, kv_heads * dim), tensor(TOKENS, kv_heads * dim));
    let output = cpu.attention_forward(&q, &k, &v, &spec);
    let forward = best(cpu.threads(), || _ = std::hint::black_box(cpu.attention_forward(&q, &k, &v, &spec)));
    let backward =
        best(cpu.threads(), || _ = std::hint::black_box(cpu.attention_backward(&q, &k, &v, &output, &q, &spec)));
    println!("attention of one block: forward {:.2} ms, backward {:.2} ms", forward * 1e3, backward * 1e3);
    Ok(())
}
