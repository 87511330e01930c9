//! How fast the packed linear layers are, against what the machine's memory delivers.
//!
//! ```text
//! cargo run --release -p fourfold-kernels --example quant_bench [-- bits,bits,… [threads,threads,… [portable|avx2|avx512]]]
//! ```
//!
//! For each shape there are copies enough that no cache holds them all: one token reads every weight from memory. Figures are
//! the tenth percentile of many calls.

use std::time::Instant;

use fourfold_kernels::cpu::measure_read_bandwidth;
use fourfold_kernels::cpu::pool::Pool;
use fourfold_kernels::cpu::quant::{Context, QuantWeight, linear, linear_transposed};
use fourfold_kernels::{Activations, FloatProducts, Isa, Tensor};
use fourfold_tensor::{DType, FloatBuffer, Offsets, Quantized, Scales, packed_words_per_row};

/// SmolLM2-135M's layers (weights that share an input together), its head, and a large square-ish one.
const SHAPES: [(&str, &[(usize, usize)]); 6] = [
    ("q,k,v 576", &[(576, 576), (192, 576), (192, 576)]),
    ("o 576x576", &[(576, 576)]),
    ("gate,up 1536x576", &[(1536, 576), (1536, 576)]),
    ("down 576x1536", &[(576, 1536)]),
    ("head 49152x576", &[(49152, 576)]),
    ("8192x2048", &[(8192, 2048)]),
];

/// Bytes of the copies of a shape together.
const COLD: usize = 96 << 20;

fn weight(rows: usize, cols: usize, bits: u8, seed: usize) -> Quantized {
    let words = rows * packed_words_per_row(cols, bits);
    let packed: Vec<u32> = (0..words).map(|i| ((i + seed) as u32).wrapping_mul(2_654_435_761)).collect();
    let scales = vec![0.01; rows * cols.div_ceil(64)];
    Quantized {
        rows,
        cols,
        bits,
        group_size: 64,
        packed: packed.into(),
        scales: Scales::Float(FloatBuffer::from_f32(scales, DType::F16)),
        offsets: Offsets::Symmetric,
        codebook: None,
        g_idx: None,
    }
}

fn input(tokens: usize, cols: usize) -> Tensor {
    Tensor::new(tokens, cols, (0..tokens * cols).map(|i| (i as f32 * 0.37).sin()).collect())
}

/// Seconds of `call`: the tenth percentile of several rounds over all copies, which is what the kernel does when other
/// programs leave it alone for the length of a call.
fn seconds<T>(rounds: usize, copies: &[T], mut call: impl FnMut(&T)) -> f64 {
    let mut times = Vec::with_capacity(rounds * copies.len());
    for copy in (0..rounds).flat_map(|_| copies) {
        let begin = Instant::now();
        call(copy);
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 10]
}

/// What is not decoding or prefilling: loading, evaluation with exact activations, MLA's absorbed product, embedding.
fn others(bits: u8, context: Context) {
    let (rows, cols) = (8192, 2048);
    let source = weight(rows, cols, bits, 1);
    let begin = Instant::now();
    let w = QuantWeight::prepare(source, context.pool).expect("a well-formed weight");
    let prepare = begin.elapsed().as_secs_f64();
    let exact = Context { activations: Activations::F32, ..context };
    let copies = [&w];
    let x = input(128, cols);
    let f32s = seconds(3, &copies, |w| _ = std::hint::black_box(linear(exact, &x, &[w])));
    let xt = input(1, rows);
    let transposed = seconds(10, &copies, |w| _ = std::hint::black_box(linear_transposed(context, &xt, w, 0..rows)));
    let mut row = vec![0.0; cols];
    let read = seconds(1000, &copies, |w| w.read_row(77, std::hint::black_box(&mut row)));
    println!(
        "{bits} bits 8192x2048 {} threads: prepare {:.2} G codes/s, 128 tokens in f32 {:.0} GFLOP/s, one token transposed \
         {:.0} µs, a row {:.2} µs",
        context.pool.threads(),
        (rows * cols) as f64 / prepare / 1e9,
        (2 * 128 * rows * cols) as f64 / f32s / 1e9,
        transposed * 1e6,
        read * 1e6
    );
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mut numbers = |default: &str| -> Vec<usize> {
        let text = args.next().unwrap_or_else(|| default.to_owned());
        text.split(',').filter_map(|n| n.parse().ok()).collect()
    };
    let bits = numbers("2,3,4,8");
    let threads = numbers("1,2");
    let name = args.next();
    let isa = Isa::ALL.into_iter().find(|isa| Some(isa.name()) == name.as_deref()).unwrap_or_else(Isa::detect);
    let pools: Vec<Pool> = threads.iter().map(|&n| Pool::new(n)).collect();
    let ceilings: Vec<f64> = pools.iter().map(measure_read_bandwidth).collect();
    for (pool, ceiling) in pools.iter().zip(&ceilings) {
        println!("{} threads read {:.1} GB/s", pool.threads(), ceiling / 1e9);
    }
    println!("{} kernels; groups of 64 with f16 scales", isa.name());
    for &bits in &bits {
        // Seconds of a token and of a batch through all thirty layers, by pool.
        let mut token = vec![0.0; pools.len()];
        let mut batch = vec![0.0; pools.len()];
        for (shape, parts) in SHAPES {
            let make = |copy| -> Vec<QuantWeight> {
                let prepare = |&(rows, cols)| QuantWeight::prepare(weight(rows, cols, bits as u8, copy), &pools[0]);
                parts.iter().map(|part| prepare(part).expect("a well-formed weight")).collect()
            };
            let mut copies = vec![make(0)];
            let bytes: usize = copies[0].iter().map(QuantWeight::byte_len).sum();
            copies.extend((1..COLD.div_ceil(bytes)).map(make));
            let operations: usize = parts.iter().map(|(rows, cols)| 2 * rows * cols).sum();
            for (p, (pool, ceiling)) in pools.iter().zip(&ceilings).enumerate() {
                let context =
                    Context { pool, isa, activations: Activations::Fast, products: FloatProducts::fastest(isa) };
                let mut line = format!("{bits} bits {shape:17} {} threads:", pool.threads());
                for tokens in [1, 4] {
                    let x = input(tokens, parts[0].1);
                    let seconds = seconds(10, &copies, |copy| {
                        std::hint::black_box(linear(context, &x, &copy.iter().collect::<Vec<_>>()));
                    });
                    let rate = bytes as f64 / seconds;
                    line += &format!(
                        " {tokens} tokens {:7.1} µs {:5.1} GB/s {:3.0} %;",
                        seconds * 1e6,
                        rate / 1e9,
                        100.0 * rate / ceiling
                    );
                    if tokens == 1 {
                        token[p] += match shape {
                            "8192x2048" => 0.0,
                            "head 49152x576" => seconds,
                            _ => 30.0 * seconds,
                        };
                    }
                }
                if !shape.starts_with("head") {
                    let x = input(512, parts[0].1);
                    let seconds = seconds(20, &copies[..1], |copy| {
                        std::hint::black_box(linear(context, &x, &copy.iter().collect::<Vec<_>>()));
                    });
                    line += &format!(" 512 tokens {:6.0} GOP/s", (512 * operations) as f64 / seconds / 1e9);
                    batch[p] += if shape == "8192x2048" { 0.0 } else { 30.0 * seconds };
                }
                println!("{line}");
            }
        }
        for pool in &pools {
            others(
                bits as u8,
                Context { pool, isa, activations: Activations::Fast, products: FloatProducts::fastest(isa) },
            );
        }
        for ((pool, token), batch) in pools.iter().zip(&token).zip(&batch) {
            let (decode, prefill) = (1.0 / token, 512.0 / batch);
            println!(
                "{bits} bits, SmolLM2-135M's linear layers alone, {} threads: decode {decode:.0} tokens/s, prefill {prefill:.0}",
                pool.threads()
            );
        }
    }
}
