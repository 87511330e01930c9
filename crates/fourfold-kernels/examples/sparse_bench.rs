//! Decoding through pruned weights against dense bf16 ones: `cargo run --release -p fourfold-kernels --example sparse_bench [threads]`.
//! As many copies of a weight as do not fit into a cache, each multiplied with one token in turn.

use std::time::Instant;

use fourfold_kernels::{Backend, Cpu, CpuOptions, DeviceWeight, LinearArg, Memory, Tensor};
use fourfold_tensor::{
    DType, Dense, FloatBuffer, Sparse, SparseCodes, SparseValues, Weight, mask_words_per_row, pack_row,
    packed_words_per_row,
};

/// Bytes of dense weights gone through.
const BYTES: usize = 400 << 20;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(0);
    let cpu = Cpu::new(CpuOptions { threads, ..CpuOptions::default() }).expect("a backend");
    println!("{}, {} threads; µs a product of one token", cpu.name(), cpu.threads());
    for (rows, cols) in [(1536, 576), (576, 1536), (4096, 4096)] {
        let copies = (BYTES / (rows * cols * 2)).max(2);
        let dense = measure(&cpu, cols, copies, || dense(rows, cols));
        print!("[{rows:>4}, {cols:>4}] dense bf16 {dense:8.1}");
        for kept in [32, 16] {
            for bits in [None, Some(8), Some(4), Some(3)] {
                let time = measure(&cpu, cols, copies, || sparse(rows, cols, kept, bits));
                let gone = 100 - kept * 100 / 64;
                let values = bits.map_or("bf16".to_owned(), |b| format!("int{b}"));
                print!(" | {gone} % {values} {time:.1} ({:.2}x)", dense / time);
            }
        }
        println!();
    }
}

fn measure(cpu: &Cpu, cols: usize, copies: usize, make: impl Fn() -> Weight) -> f64 {
    let weights: Vec<DeviceWeight> = (0..copies).map(|_| cpu.upload(make()).expect("uploaded")).collect();
    let x = Tensor::new(1, cols, (0..cols).map(|i| (i as f32 * 0.37).sin()).collect());
    let once = || weights.iter().for_each(|weight| drop(cpu.linear(&x, &[LinearArg { weight, bias: None }])));
    once();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        once();
        best = best.min(begin.elapsed().as_secs_f64() * 1e6 / copies as f64);
    }
    best
}

fn dense(rows: usize, cols: usize) -> Weight {
    Dense::new(vec![rows, cols], FloatBuffer::from_f32(vec![0.5; rows * cols], DType::Bf16)).into()
}

/// About `kept` of 64 elements.
fn sparse(rows: usize, cols: usize, kept: u64, bits: Option<u8>) -> Weight {
    let words = mask_words_per_row(cols);
    let mut mask = vec![0u64; rows * words];
    let (mut state, mut count) = (1u64, 0);
    for i in 0..rows * cols {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if (state >> 58) < kept {
            mask[i / cols * words + i % cols / 64] |= 1 << (i % cols % 64);
            count += 1;
        }
    }
    let values = match bits {
        None => SparseValues::Float(FloatBuffer::from_f32(vec![0.5; count], DType::Bf16)),
        Some(bits) => {
            let mut packed = vec![0; packed_words_per_row(count, bits)];
            pack_row(&vec![1; count], bits, &mut packed);
            let scales = FloatBuffer::from_f32(vec![0.5; rows * cols.div_ceil(128)], DType::F16);
            SparseValues::Codes(SparseCodes { bits, group_size: 128, packed: packed.into(), scales })
        }
    };
    Sparse::new(rows, cols, mask.into(), values).expect("parts fit").into()
}
