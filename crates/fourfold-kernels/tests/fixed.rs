//! Products in 16-bit integers against their definition (dynamic fixed point, Das et al. 2018): values of 128 terms of a sum share a
//! scale, the largest becomes 4095.

mod common;

use common::noise;
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Cpu, CpuOptions, DeviceWeight, FloatProducts, Isa, LinearArg, Memory, Tensor};
use fourfold_tensor::{DType, Dense, FloatBuffer};

const BLOCK: usize = 128;

/// A backend for each instruction set of this machine.
fn int16() -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(|isa| backend(isa, FloatProducts::Int16))
}

fn backend(isa: Isa, products: FloatProducts) -> Cpu {
    Cpu::new(CpuOptions { isa: Some(isa), products: Some(products), ..CpuOptions::default() }).unwrap()
}

fn weight(cpu: &Cpu, w: &Tensor) -> DeviceWeight {
    let data = FloatBuffer::from_f32(w.host().to_vec(), DType::Bf16);
    cpu.upload(Dense::new(vec![w.rows(), w.cols()], data).into()).unwrap()
}

fn transposed(x: &Tensor) -> Tensor {
    let element = |i: usize| x.row(i % x.rows())[i / x.rows()];
    Tensor::new(x.cols(), x.rows(), (0..x.rows() * x.cols()).map(element).collect())
}

/// Values that are bf16 already.
fn halves(rows: usize, cols: usize, seed: u64) -> Tensor {
    Tensor::new(rows, cols, FloatBuffer::from_f32(noise(rows, cols, seed).into_host(), DType::Bf16).to_f32())
}

/// `a · bᵀ` as defined, in f64.
fn definition(a: &Tensor, b: &Tensor) -> Tensor {
    let rounded = |block: &[f32]| -> Vec<f64> {
        let largest = block.iter().fold(0.0f32, |l, v| l.max(v.abs()));
        let (factor, scale) = if largest == 0.0 { (0.0, 0.0) } else { (4095.0 / largest, largest / 4095.0) };
        block.iter().map(|v| f64::from((v * factor).round_ties_even()) * f64::from(scale)).collect()
    };
    let all = |x: &Tensor| -> Vec<Vec<f64>> {
        (0..x.rows()).map(|r| x.row(r).chunks(BLOCK).flat_map(rounded).collect()).collect()
    };
    let (a, b) = (all(a), all(b));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() as f32;
    Tensor::new(a.len(), b.len(), a.iter().flat_map(|x| b.iter().map(|y| dot(x, y))).collect())
}

/// (tokens, in, out): odd sizes, below and above every block.
const SHAPES: [(usize, usize, usize); 6] =
    [(16, 1, 1), (17, 129, 33), (31, 128, 64), (130, 300, 47), (300, 515, 3), (20, 4224, 35)];

#[test]
fn products_are_as_defined() {
    for cpu in int16() {
        for (tokens, inputs, outputs) in SHAPES {
            let (x, w, dy) = (noise(tokens, inputs, 1), halves(outputs, inputs, 2), noise(tokens, outputs, 3));
            let stored = weight(&cpu, &w);
            let near = |what: &str, found: &Tensor, expected: &Tensor, terms: usize| {
                // f32 sums of a few blocks.
                let bound = 1e-6 * (terms as f32).max(1.0);
                common::check(&format!("{what} {tokens}x{inputs}x{outputs}"), found, expected, |_| bound);
            };
            let y = cpu.linear(&x, &[LinearArg { weight: &stored, bias: None }]).remove(0);
            near("forward", &y, &definition(&x, &w), inputs / 8);
            let dx = cpu.linear_transposed(&dy, &stored, 0..outputs);
            near("input gradient", &dx, &definition(&dy, &transposed(&w)), outputs / 8);
            let mut dw = Tensor::zeros(outputs, inputs);
            cpu.linear_weight_gradient(&x, &dy, &mut dw);
            near("weight gradient", &dw, &definition(&transposed(&dy), &transposed(&x)), tokens / 8);
            // The check can fail: what is not rounded so differs by more.
            let exact = backend(cpu.isa(), FloatProducts::F32);
            let other = exact.linear(&x, &[LinearArg { weight: &weight(&exact, &w), bias: None }]).remove(0);
            assert!(
                inputs < 100 || other.host().iter().zip(y.host()).any(|(a, b)| (a - b).abs() > 1e-4),
                "no rounding"
            );
        }
    }
}

#[test]
fn the_largest_sums_do_not_overflow() {
    for cpu in int16() {
        for value in [1.0f32, -1.0, 3e30, 1e-15] {
            let x = Tensor::new(16, 1000, vec![value; 16_000]);
            let w = Tensor::new(20, 1000, vec![1.0; 20_000]);
            let y = cpu.linear(&x, &[LinearArg { weight: &weight(&cpu, &w), bias: None }]).remove(0);
            let expected = value * 1000.0;
            assert!(y.host().iter().all(|y| (y / expected - 1.0).abs() < 1e-6), "{value}: {}", y.host()[0]);
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_rows() {
    for cpu in int16() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut x, w, dy) = (noise(40, 200, 1), halves(50, 200, 2), noise(40, 50, 3));
            x.host_mut()[7 * 200 + 150] = bad;
            let y = cpu.linear(&x, &[LinearArg { weight: &weight(&cpu, &w), bias: None }]).remove(0);
            for token in 0..40 {
                assert!(y.row(token).iter().all(|v| v.is_finite() == (token != 7)), "{bad}: token {token}");
            }
            let mut dw = Tensor::zeros(50, 200);
            cpu.linear_weight_gradient(&x, &dy, &mut dw);
            for row in 0..50 {
                assert!(dw.row(row).iter().enumerate().all(|(c, v)| v.is_finite() == (c != 150)), "{bad}: row {row}");
            }
            let mut w = w;
            w.host_mut()[3 * 200 + 9] = bad;
            let x = noise(40, 200, 1);
            let y = cpu.linear(&x, &[LinearArg { weight: &weight(&cpu, &w), bias: None }]).remove(0);
            assert!(
                (0..40).all(|t| y.row(t).iter().enumerate().all(|(c, v)| v.is_finite() == (c != 3))),
                "{bad}: weight"
            );
            let dx = cpu.linear_transposed(&dy, &weight(&cpu, &w), 0..50);
            assert!(
                (0..40).all(|t| dx.row(t).iter().enumerate().all(|(c, v)| v.is_finite() == (c != 9))),
                "{bad}: weight"
            );
        }
    }
}

#[test]
fn nothing_and_next_to_nothing_are_zeros() {
    for cpu in int16() {
        for value in [0.0f32, 1e-38, 1e-42] {
            let (x, w) = (Tensor::new(16, 130, vec![value; 16 * 130]), halves(5, 130, 2));
            let y = cpu.linear(&x, &[LinearArg { weight: &weight(&cpu, &w), bias: None }]).remove(0);
            assert!(y.host().iter().all(|&v| v == 0.0), "{value}");
        }
        // In steps of 1e-30 / 4095.
        let (x, w) = (Tensor::new(16, 130, vec![1e-31; 16 * 130]), Tensor::new(5, 130, vec![1.0; 5 * 130]));
        let y = cpu.linear(&x, &[LinearArg { weight: &weight(&cpu, &w), bias: None }]).remove(0);
        assert!(y.host().iter().all(|v| (v / 130e-31 - 1.0).abs() < 2e-3), "{}", y.host()[0]);
    }
}

/// Sums of integers are exact, and scales are applied in one order.
#[test]
fn instruction_sets_come_to_the_same_bits() {
    for (tokens, inputs, outputs) in SHAPES {
        let (x, w, dy) = (noise(tokens, inputs, 1), halves(outputs, inputs, 2), noise(tokens, outputs, 3));
        let mut all = int16().map(|cpu| {
            let stored = weight(&cpu, &w);
            let y = cpu.linear(&x, &[LinearArg { weight: &stored, bias: None }]).remove(0);
            let mut dw = Tensor::zeros(outputs, inputs);
            cpu.linear_weight_gradient(&x, &dy, &mut dw);
            [y, cpu.linear_transposed(&dy, &stored, 0..outputs), dw]
        });
        let first = all.next().unwrap();
        assert!(all.all(|other| other == first), "{tokens}x{inputs}x{outputs}");
    }
}

#[test]
fn instruction_sets_without_products_of_bf16_refuse_them() {
    let options = CpuOptions { isa: Some(Isa::Portable), products: Some(FloatProducts::Bf16), ..CpuOptions::default() };
    let error = Cpu::new(options).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("portable has no fast bf16 products"));
}
