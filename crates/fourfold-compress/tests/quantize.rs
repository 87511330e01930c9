//! The quantization methods on weights whose answers are known.

use fourfold_compress::MethodError;
use fourfold_compress::hessian::Hessian;
use fourfold_compress::methods::quantize::gptq::{Gptq, Order};
use fourfold_compress::methods::quantize::grid::{Granularity, GridSpec, Levels, ScaleFormat, ScaleRule, ZeroKind};
use fourfold_compress::methods::quantize::rtn::Rtn;
use fourfold_compress::methods::{self, Compressed, Method, Stats};
use fourfold_tensor::{Dense, Form, Quantized, Weight};
use proptest::prelude::*;
use serde_json::json;

fn dense(rows: usize, cols: usize, values: Vec<f32>) -> Weight {
    Dense::from_f32(vec![rows, cols], values).into()
}

fn quantized(compressed: &Compressed) -> &Quantized {
    match &compressed.weight {
        Weight::Quantized(q) => q,
        other => panic!("{} is not quantized", other.describe()),
    }
}

/// Roughly Gaussian numbers: sums of a linear congruence's outputs.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>()).collect()
}

fn squared_error(a: &Weight, b: &Weight) -> f64 {
    a.to_f32().iter().zip(b.to_f32()).map(|(x, y)| f64::from(x - y).powi(2)).sum()
}

fn rtn_error(grid: GridSpec, weight: &Weight) -> f64 {
    Rtn { grid }.compress(weight, Stats::default()).unwrap().error
}

#[test]
fn per_tensor_symmetric_absmax_is_the_textbook_definition() {
    // By hand: absmax 2.54, 8 bits: scale 2.54 / 127 = 0.02; codes round(w / 0.02).
    let values = vec![0.5, -2.54, 0.031, 1.2, 0.0, -0.049];
    let grid = GridSpec { scales: ScaleFormat::F32, rule: ScaleRule::Absmax, ..GridSpec::new(8, Granularity::Tensor) };
    let out = Rtn { grid }.compress(&dense(2, 3, values), Stats::default()).unwrap();
    let q = quantized(&out);
    assert!(q.is_per_tensor());
    assert_eq!(q.scale(0, 0), 2.54f32 / 127.0);
    let mut codes = [0u8; 3];
    q.row_codes(0, &mut codes);
    assert_eq!(codes.map(|c| i32::from(c) - 128), [25, -127, 2]);
    q.row_codes(1, &mut codes);
    assert_eq!(codes.map(|c| i32::from(c) - 128), [60, 0, -2]);

    // 4 bits: scale 7 / 7 = 1; 3.5 is a tie and goes to the even code.
    let grid = GridSpec { bits: 4, ..grid };
    let out = Rtn { grid }.compress(&dense(1, 4, vec![7.0, -6.6, 0.4, 3.5]), Stats::default()).unwrap();
    assert_eq!(out.weight.to_f32(), [7.0, -7.0, 0.0, 4.0]);
}

#[test]
fn asymmetric_absmax_spans_the_range() {
    // Range −1 to 2 in 2 bits: scale 1, zero point 1.
    let grid =
        GridSpec { zero: ZeroKind::ZeroPoint, rule: ScaleRule::Absmax, ..GridSpec::new(2, Granularity::Channel) };
    let weight = dense(1, 5, vec![-1.0, 0.2, 2.0, 0.9, -0.4]);
    let out = Rtn { grid }.compress(&weight, Stats::default()).unwrap();
    assert_eq!(out.weight.to_f32(), [-1.0, 0.0, 2.0, 1.0, 0.0]);
}

#[test]
fn search_never_loses_to_the_textbook_and_wins_at_few_bits() {
    let weight = dense(16, 192, noise(3, 16 * 192));
    for bits in 2..=8 {
        for zero in [ZeroKind::Symmetric, ZeroKind::ZeroPoint, ZeroKind::Min] {
            let grid = GridSpec { zero, ..GridSpec::new(bits, Granularity::Group(64)) };
            let (found, plain) =
                (rtn_error(grid, &weight), rtn_error(GridSpec { rule: ScaleRule::Absmax, ..grid }, &weight));
            assert!(found <= plain * 1.001, "{}: {found} against {plain}", grid.describe());
            assert!(bits > 3 || found < plain * 0.95, "{}: {found} against {plain}", grid.describe());
        }
    }
}

#[test]
fn learned_levels_beat_even_ones_on_gaussian_weights() {
    let weight = dense(64, 256, noise(5, 64 * 256));
    for bits in [2, 3, 4] {
        let even = GridSpec { scales: ScaleFormat::Double, ..GridSpec::new(bits, Granularity::Group(64)) };
        let (learned, even) =
            (rtn_error(GridSpec { levels: Levels::Learned, ..even }, &weight), rtn_error(even, &weight));
        assert!(learned < even * 0.97, "{bits} bits: {learned} against {even}");
    }
}

#[test]
fn moments_move_precision_to_the_columns_that_matter() {
    let weight = dense(8, 64, noise(7, 8 * 64));
    let moments: Vec<f32> = (0..64).map(|c| if c < 8 { 100.0 } else { 0.01 }).collect();
    let rtn = Rtn { grid: GridSpec::new(3, Granularity::Group(64)) };
    let plain = rtn.compress(&weight, Stats::default()).unwrap();
    let weighted = rtn.compress(&weight, Stats { moments: Some(&moments), hessian: None }).unwrap();
    let error = |c: &Compressed| -> f64 {
        let pairs = weight.to_f32().into_iter().zip(c.weight.to_f32()).enumerate();
        pairs.map(|(i, (a, b))| f64::from((a - b).powi(2) * moments[i % 64])).sum()
    };
    assert!(error(&weighted) < 0.8 * error(&plain), "{} against {}", error(&weighted), error(&plain));
    // Negative control: where all columns count the same, the plain fit is the better one.
    assert!(squared_error(&weight, &plain.weight) < squared_error(&weight, &weighted.weight));
}

/// H of inputs that share a few strong directions.
fn correlated(n: usize, tokens: usize) -> Hessian {
    let (basis, mix, own) = (noise(11, 6 * n), noise(13, tokens * 6), noise(17, tokens * n));
    let mut hessian = Hessian::new(n);
    let x: Vec<f32> = (0..tokens * n)
        .map(|i| {
            let (t, c) = (i / n, i % n);
            0.3 * own[i] + (0..6).map(|k| mix[t * 6 + k] * basis[k * n + c]).sum::<f32>()
        })
        .collect();
    hessian.accumulate(&x);
    hessian.finish();
    hessian
}

fn output_error(weight: &Weight, other: &Weight, hessian: &Hessian) -> f64 {
    let n = hessian.size();
    let difference: Vec<f32> = weight.to_f32().iter().zip(other.to_f32()).map(|(a, b)| a - b).collect();
    let mut total = 0.0;
    for row in difference.chunks_exact(n) {
        for i in 0..n {
            for j in 0..n {
                total += f64::from(row[i] * row[j]) * f64::from(hessian.data()[i * n + j]);
            }
        }
    }
    total
}

#[test]
fn gptq_beats_rounding_on_correlated_inputs_and_polish_helps() {
    let n = 96;
    let (hessian, weight) = (correlated(n, 1000), dense(40, n, noise(19, 40 * n)));
    let moments = hessian.diagonal();
    let stats = Stats { moments: Some(&moments), hessian: Some(&hessian) };
    for grid in [
        GridSpec::new(3, Granularity::Group(32)),
        GridSpec::new(4, Granularity::Channel),
        GridSpec { zero: ZeroKind::ZeroPoint, ..GridSpec::new(3, Granularity::Group(40)) },
        GridSpec { zero: ZeroKind::Min, ..GridSpec::new(3, Granularity::Group(32)) },
        GridSpec { scales: ScaleFormat::Double, levels: Levels::Learned, ..GridSpec::new(3, Granularity::Group(32)) },
    ] {
        let rtn = output_error(&weight, &Rtn { grid }.compress(&weight, stats).unwrap().weight, &hessian);
        for order in [Order::Natural, Order::Groups, Order::Activation] {
            let gptq = |polish| {
                let out = Gptq { order, polish, ..Gptq::new(grid) }.compress(&weight, stats).unwrap();
                quantized(&out).validate().unwrap();
                output_error(&weight, &out.weight, &hessian)
            };
            let (plain, polished) = (gptq(0), gptq(4));
            assert!(plain < 0.7 * rtn, "{} {order:?}: {plain} against {rtn}", grid.describe());
            assert!(polished < plain, "{} {order:?}: {polished} against {plain}", grid.describe());
        }
    }
}

/// The negative control: where inputs are unrelated there is nothing for GPTQ to carry, and it rounds to nearest.
#[test]
fn gptq_is_rounding_where_inputs_are_unrelated() {
    let weight = dense(9, 80, noise(23, 9 * 80));
    let hessian = Hessian::identity(80);
    for grid in [
        GridSpec::new(4, Granularity::Group(32)),
        GridSpec { zero: ZeroKind::ZeroPoint, ..GridSpec::new(3, Granularity::Channel) },
        GridSpec::new(4, Granularity::Tensor),
    ] {
        let stats = Stats { moments: None, hessian: Some(&hessian) };
        let gptq = Gptq { polish: 0, ..Gptq::new(grid) }.compress(&weight, stats).unwrap();
        let rtn = Rtn { grid }.compress(&weight, Stats::default()).unwrap();
        assert_eq!(gptq.weight, rtn.weight, "{}", grid.describe());
    }
}

#[test]
fn dead_inputs_and_too_few_tokens_are_no_obstacle() {
    let n = 64;
    let mut hessian = Hessian::new(n);
    // Three tokens, and half the columns always 0: H has rank 3.
    let x: Vec<f32> = noise(29, 3 * n).iter().enumerate().map(|(i, v)| if i % n < n / 2 { *v } else { 0.0 }).collect();
    hessian.accumulate(&x);
    hessian.finish();
    let weight = dense(5, n, noise(31, 5 * n));
    let stats = Stats { moments: None, hessian: Some(&hessian) };
    let out = Gptq::new(GridSpec::new(4, Granularity::Group(32))).compress(&weight, stats).unwrap();
    // Dead columns are still rounded sensibly: they matter on other text.
    assert!(squared_error(&weight, &out.weight) < 0.2 * squared_error(&weight, &dense(5, n, vec![0.0; 5 * n])));
}

#[test]
fn results_do_not_depend_on_threads() {
    let n = 96;
    let weight = dense(100, n, noise(37, 100 * n));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let hessian = correlated(n, 700);
            let stats = Stats { moments: None, hessian: Some(&hessian) };
            let grid = GridSpec { levels: Levels::Learned, ..GridSpec::new(3, Granularity::Group(32)) };
            let gptq = Gptq::new(grid).compress(&weight, stats).unwrap();
            let rtn = Rtn { grid }.compress(&weight, stats).unwrap();
            (gptq.weight, gptq.error.to_bits(), rtn.weight, rtn.error.to_bits())
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(run(threads) == one, "{threads} threads give other bytes");
    }
}

#[test]
fn what_is_not_finite_is_named() {
    let mut values = noise(41, 3 * 32);
    values[32 + 7] = f32::NAN;
    let refused = Rtn { grid: GridSpec::new(4, Granularity::Group(32)) }
        .compress(&dense(3, 32, values.clone()), Stats::default())
        .unwrap_err();
    assert!(matches!(refused, MethodError::NotFinite { row: 1, col: 7, .. }), "{refused}");
    values[32 + 7] = f32::NEG_INFINITY;
    let hessian = Hessian::identity(32);
    let refused = Gptq::new(GridSpec::new(4, Granularity::Group(32)))
        .compress(&dense(3, 32, values), Stats { moments: None, hessian: Some(&hessian) })
        .unwrap_err();
    assert_eq!(refused.to_string(), "element [1, 7] is -inf");
}

#[test]
fn zeros_constants_and_extremes_survive() {
    for value in [0.0f32, -0.37, 1e-30, 3e38, 6e4] {
        for zero in [ZeroKind::Symmetric, ZeroKind::ZeroPoint, ZeroKind::Min] {
            for scales in [ScaleFormat::F16, ScaleFormat::Double, ScaleFormat::F32, ScaleFormat::Bf16] {
                let grid = GridSpec { zero, scales, ..GridSpec::new(4, Granularity::Group(32)) };
                let compressed = Rtn { grid }.compress(&dense(1, 70, vec![value; 70]), Stats::default());
                let out = match compressed {
                    Err(MethodError::BeyondF16 { .. }) if [1e-30, 3e38].contains(&value) => continue,
                    out => out.unwrap(),
                };
                let back = out.weight.to_f32();
                assert!(back.iter().all(|v| v.is_finite()), "{} of {value}: {back:?}", grid.describe());
                assert!(value != 0.0 || back.iter().all(|&v| v == 0.0), "{}: {back:?}", grid.describe());
            }
        }
    }
}

/// Weights whose scales f16 would hold as zero, or not at all: with another type they lose what they lose at their own
/// size.
#[test]
fn scales_that_f16_does_not_hold_are_refused_and_other_types_hold_them() {
    let values = noise(9, 4 * 64);
    let sized = |factor: f32| dense(4, 64, values.iter().map(|v| v * factor).collect());
    let hessian = correlated(64, 200);
    for bits in [2, 4, 8] {
        for zero in [ZeroKind::Symmetric, ZeroKind::ZeroPoint, ZeroKind::Min] {
            for granularity in [Granularity::Group(32), Granularity::Channel, Granularity::Tensor] {
                let grid = |scales| GridSpec { scales, zero, ..GridSpec::new(bits, granularity) };
                if grid(ScaleFormat::F32).validate().is_err() {
                    continue;
                }
                let usual = rtn_error(grid(ScaleFormat::F32), &sized(0.02));
                for factor in [2e-9, 2e6] {
                    let described = format!("{} at {factor:e}", grid(ScaleFormat::F16).describe());
                    for scales in [ScaleFormat::F16, ScaleFormat::Double] {
                        let grid = grid(scales);
                        if grid.validate().is_err() {
                            continue;
                        }
                        let stats = Stats { hessian: Some(&hessian), ..Stats::default() };
                        let rtn = Rtn { grid }.compress(&sized(factor), Stats::default());
                        for out in [rtn, Gptq::new(grid).compress(&sized(factor), stats)] {
                            // Where f16 holds the scales after all (8 bits of 10^6), nothing is lost.
                            match out {
                                Err(error) => assert!(matches!(error, MethodError::BeyondF16 { .. }), "{error}"),
                                Ok(out) => assert!(out.error < 2.0 * usual + 0.02, "{described}: {}", out.error),
                            }
                        }
                    }
                    if zero == ZeroKind::Min {
                        continue;
                    }
                    for scales in [ScaleFormat::Bf16, ScaleFormat::F32] {
                        let error = rtn_error(grid(scales), &sized(factor));
                        assert!(error < 1.3 * usual + 1e-4, "{described}: {error}, {usual} at the usual size");
                    }
                }
                let small = Rtn { grid: grid(ScaleFormat::F16) }.compress(&sized(2e-9), Stats::default());
                let error = small.unwrap_err().to_string();
                assert!(error.contains("f16") && error.contains("plan"), "{error}");
            }
        }
    }
}

#[test]
fn the_registry_reads_what_plans_say() {
    let made = methods::method("gptq", &json!({"bits": 3, "granularity": {"group": 64}, "scales": "double"})).unwrap();
    assert_eq!(made.name(), "gptq");
    // 3 bits of 576 are 54 words; 9 groups of a byte and a row's two; the shape takes 16.
    let form = made.form(10, 576).unwrap().map(|f: Form| f.file_bytes());
    assert_eq!(form, Some(10 * (54 * 4 + 9 + 2) + 16));
    assert!(methods::method("rtn", &json!({"bits": 4, "granularity": "channel"})).is_ok());
    assert!(matches!(methods::method("magic", &json!({})), Err(MethodError::Unknown(_))));
    let misspelt = methods::method("rtn", &json!({"bits": 4, "granularity": "channel", "bots": 1}));
    assert!(matches!(misspelt, Err(MethodError::Settings(_))));
    assert!(methods::method("rtn", &json!({"bits": 4})).is_err());
    let nine = methods::method("rtn", &json!({"bits": 9, "granularity": "tensor"})).unwrap();
    assert!(nine.compress(&dense(1, 1, vec![1.0]), Stats::default()).is_err());
}

fn grids() -> impl Strategy<Value = GridSpec> {
    let granularity =
        prop_oneof![Just(Granularity::Tensor), Just(Granularity::Channel), (1usize..100).prop_map(Granularity::Group)];
    let scales = prop::sample::select(vec![ScaleFormat::F16, ScaleFormat::Bf16, ScaleFormat::F32, ScaleFormat::Double]);
    let zero = prop::sample::select(vec![ZeroKind::Symmetric, ZeroKind::ZeroPoint, ZeroKind::Min]);
    let levels = prop::sample::select(vec![Levels::Uniform, Levels::Learned]);
    (2u8..=8, granularity, scales, zero, levels)
        .prop_map(|(bits, granularity, scales, zero, levels)| GridSpec {
            bits,
            granularity,
            scales,
            zero,
            levels,
            rule: ScaleRule::Search,
        })
        .prop_filter("parts that go together", |grid| grid.validate().is_ok())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the shape and the grid: the parts fit together, the form is the one promised, the error is the one measured.
    #[test]
    fn every_grid_fits_every_shape(grid in grids(), rows in 1usize..70, cols in 1usize..130, seed in 0u64..1000) {
        let weight = dense(rows, cols, noise(seed, rows * cols));
        let hessian = Hessian::identity(cols);
        let rtn = Rtn { grid }.compress(&weight, Stats::default()).unwrap();
        let gptq = Gptq::new(grid).compress(&weight, Stats { moments: None, hessian: Some(&hessian) }).unwrap();
        for out in [&rtn, &gptq] {
            let q = quantized(out);
            prop_assert!(q.validate().is_ok(), "{:?}", q.validate());
            prop_assert_eq!(Form::of(&out.weight), Form::Quantized(grid.form(rows, cols)));
        }
        let energy: f64 = weight.to_f32().iter().map(|v| f64::from(*v).powi(2)).sum();
        let measured = squared_error(&weight, &rtn.weight) / energy;
        prop_assert!((measured - rtn.error).abs() <= 1e-3 * measured + 1e-7, "{} and {}", measured, rtn.error);
        prop_assert!(rtn.error < 0.95);
    }
}
