//! A weight that makes up for what has happened to its input.

use fourfold_compress::drift::Drift;
use fourfold_compress::hessian::Hessian;
use fourfold_tensor::{Dense, Weight};

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>()).collect()
}

/// `‖x·Wᵀ − x̂·Ŵᵀ‖²`.
fn distance(w: &Weight, x: &[f32], other: &Weight, now: &[f32]) -> f64 {
    let (n, w, other) = (w.cols(), w.to_f32(), other.to_f32());
    let mut total = 0.0;
    for (x, now) in x.chunks_exact(n).zip(now.chunks_exact(n)) {
        for (a, b) in w.chunks_exact(n).zip(other.chunks_exact(n)) {
            let y: f32 = a.iter().zip(x).map(|(a, x)| a * x).sum();
            let z: f32 = b.iter().zip(now).map(|(b, x)| b * x).sum();
            total += f64::from(y - z).powi(2);
        }
    }
    total
}

#[test]
fn a_linear_change_of_the_input_is_undone() {
    let (n, rows, tokens) = (100, 7, 900);
    let weight: Weight = Dense::from_f32(vec![rows, n], noise(1, rows * n)).into();
    let x = noise(2, tokens * n);
    // Every input is scaled, and leaks into its neighbour.
    let now: Vec<f32> = (0..tokens * n)
        .map(|i| {
            let c = i % n;
            0.8 * x[i] + if c > 0 { 0.3 * x[i - 1] } else { 0.0 }
        })
        .collect();
    let (mut hessian, mut drift) = (Hessian::new(n), Drift::new(n));
    for (now, x) in now.chunks(n * 300).zip(x.chunks(n * 300)) {
        hessian.accumulate(now);
        drift.accumulate(now, x);
    }
    hessian.finish();
    let target = drift.target(&weight, &hessian, 1e-6).unwrap();
    let (before, after) = (distance(&weight, &x, &weight, &now), distance(&weight, &x, &target, &now));
    assert!(after < 1e-4 * before, "{after} of {before}");
}

/// The negative control: what has not drifted is left as it is.
#[test]
fn an_unchanged_input_changes_nothing() {
    let (n, rows) = (40, 3);
    let weight: Weight = Dense::from_f32(vec![rows, n], noise(3, rows * n)).into();
    let x = noise(4, 200 * n);
    let (mut hessian, mut drift) = (Hessian::new(n), Drift::new(n));
    hessian.accumulate(&x);
    drift.accumulate(&x, &x);
    hessian.finish();
    assert_eq!(drift.target(&weight, &hessian, 0.01).unwrap().to_f32(), weight.to_f32());
}
