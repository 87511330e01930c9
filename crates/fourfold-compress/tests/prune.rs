//! Pruning and decomposition against independent implementations (`scripts/golden_prune.py`): PyTorch's masks, Wanda and SparseGPT by
//! their papers' formulas in NumPy, LAPACK's singular values. And what each method refuses.

use fourfold_compress::MethodError;
use fourfold_compress::factor::damped;
use fourfold_compress::hessian::Hessian;
use fourfold_compress::methods::decompose::svd::{rank_for_energy, truncate};
use fourfold_compress::methods::prune::magnitude::{Amount, global_counts};
use fourfold_compress::methods::{Compressed, Stats, method};
use fourfold_tensor::{Dense, Form, Weight};
use serde_json::{Value, json};

struct Golden {
    json: Value,
    rows: usize,
    cols: usize,
}

impl Golden {
    fn new() -> Self {
        let json: Value = serde_json::from_str(include_str!("golden/prune.json")).unwrap();
        let int = |key: &str| json[key].as_u64().unwrap() as usize;
        let (rows, cols) = (int("rows"), int("cols"));
        Self { json, rows, cols }
    }

    fn floats(&self, key: &str) -> Vec<f64> {
        self.json[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    }

    fn weight(&self) -> Weight {
        let values = self.floats("weight").into_iter().map(|v| v as f32).collect();
        Dense::from_f32(vec![self.rows, self.cols], values).into()
    }

    fn hessian(&self) -> Hessian {
        let lower = self.floats("hessian_lower");
        let at = |r: usize, c: usize| lower[r * (r + 1) / 2 + c] as f32;
        let n = self.cols;
        Hessian::from_matrix(n, (0..n * n).map(|i| at((i / n).max(i % n), (i / n).min(i % n))).collect())
    }
}

/// Compresses with everything that calibration can supply, and checks that the form was foretold.
fn run(name: &str, settings: Value, weight: &Weight, hessian: &Hessian) -> Result<Compressed, MethodError> {
    let moments = hessian.diagonal();
    let stats = Stats { moments: Some(&moments), hessian: Some(hessian) };
    let method = method(name, &settings)?;
    let out = method.compress(weight, stats)?;
    let foretold = method.form(weight.rows(), weight.cols())?;
    assert_eq!(foretold, Some(Form::of(&out.weight)), "{name} {settings}");
    Ok(out)
}

/// What stays, as zeros and ones. No weight of the golden file is zero.
fn mask(weight: &Weight) -> String {
    weight.to_f32().iter().map(|v| if *v == 0.0 { '0' } else { '1' }).collect()
}

#[test]
fn magnitude_gives_the_masks_of_pytorch() {
    let golden = Golden::new();
    let (weight, hessian) = (golden.weight(), golden.hessian());
    for (amount, settings) in
        [("0.3", json!({"sparsity": 0.3})), ("0.5", json!({"sparsity": 0.5})), ("37", json!({"count": 37}))]
    {
        let out = run("magnitude", json!({"amount": settings, "values": "f32"}), &weight, &hessian).unwrap();
        assert_eq!(mask(&out.weight), golden.json["l1"][amount].as_str().unwrap(), "{amount}");
        let (pruned, original) = (out.weight.to_f32(), weight.to_f32());
        assert!(pruned.iter().zip(&original).all(|(p, w)| *p == 0.0 || p == w));
    }
    let second: Vec<f32> = golden.floats("second").into_iter().map(|v| v as f32).collect();
    let second: Weight = Dense::from_f32(vec![5, 2, 3, 3], second).into();
    let names = ["a".to_owned(), "b".to_owned()];
    let load = |name: &str| Ok::<_, MethodError>(if name == "a" { weight.clone() } else { second.clone() });
    let counts = global_counts(&names, Amount::Sparsity(0.4), load).unwrap();
    let expected: Vec<usize> =
        golden.json["global_pruned"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
    assert_eq!(counts.into_values().collect::<Vec<_>>(), expected);
}

#[test]
fn wanda_and_sparsegpt_follow_their_papers() {
    let golden = Golden::new();
    let (weight, hessian) = (golden.weight(), golden.hessian());
    let text = |key: &str| golden.json[key].as_str().unwrap();
    let half = json!({"pattern": {"sparsity": 0.5}, "values": "f32"});
    let wanda = run("wanda", half.clone(), &weight, &hessian).unwrap();
    assert_eq!(mask(&wanda.weight), text("wanda"));
    let two_of_four = json!({"pattern": {"nm": {"n": 2, "m": 4}}, "values": "f32"});
    let mut errors = vec![wanda.error];
    for (settings, key) in [(half, "sparsegpt"), (two_of_four, "sparsegpt_2_4")] {
        let out = run("sparsegpt", settings, &weight, &hessian).unwrap();
        assert_eq!(mask(&out.weight), text(&format!("{key}_mask")), "{key}");
        for (found, expected) in out.weight.to_f32().iter().zip(golden.floats(key)) {
            assert!((f64::from(*found) - expected).abs() < 2e-3, "{key}: {found}, {expected}");
        }
        errors.push(out.error);
    }
    let magnitude = run("magnitude", json!({"amount": {"sparsity": 0.5}}), &weight, &hessian).unwrap();
    // Each pays more attention to the inputs than the one before it.
    assert!(errors[1] < errors[0] && errors[0] < magnitude.error, "{errors:?} {}", magnitude.error);
    assert!(errors[2] > errors[1], "a pattern costs something: {errors:?}");
}

#[test]
fn n_of_m_stay_in_every_block_and_codes_cost_little() {
    let golden = Golden::new();
    let (weight, hessian) = (golden.weight(), golden.hessian());
    let int8 = json!({"int": {"bits": 8, "group_size": 64}});
    let patterns = [(1, 4), (2, 4), (5, 8), (3, 7)];
    for (n, m) in patterns {
        for (name, settings) in [
            ("nm", json!({"n": n, "m": m})),
            ("wanda", json!({"pattern": {"nm": {"n": n, "m": m}}})),
            ("sparsegpt", json!({"pattern": {"nm": {"n": n, "m": m}}})),
        ] {
            let floats = run(name, settings.clone(), &weight, &hessian).unwrap();
            let Weight::Sparse(sparse) = &floats.weight else { panic!("{name} is not sparse") };
            for r in 0..golden.rows {
                let kept: Vec<usize> = fourfold_tensor::kept_columns(sparse.row_mask(r)).collect();
                for block in 0..golden.cols / m {
                    let here = kept.iter().filter(|c| **c / m == block).count();
                    assert_eq!(here, n, "{name} {n}:{m} row {r} block {block}");
                }
            }
            let mut settings = settings;
            settings["values"] = int8.clone();
            let (codes, floats) = (run(name, settings, &weight, &hessian).unwrap().error, floats.error);
            assert!(codes < floats * 1.02 + 1e-4, "{name} {n}:{m}: {codes} against {floats}");
        }
    }
}

#[test]
fn singular_values_are_those_of_lapack_and_the_rest_is_the_error() {
    let golden = Golden::new();
    let (rows, cols) = (golden.rows, golden.cols);
    let (weight, hessian) = (golden.weight(), golden.hessian());
    let w = weight.to_f32();
    let transposed: Vec<f32> = (0..rows * cols).map(|i| w[i % rows * cols + i / rows]).collect();
    for (key, w, cols, h) in [
        ("singular", &w, cols, None),
        ("singular", &transposed, rows, None),
        ("singular_whitened", &w, cols, Some(&hessian)),
    ] {
        let expected = golden.floats(key);
        let h = h.map(|h| damped(h, golden.json["damping"].as_f64().unwrap()).0);
        let whitened = h.is_some();
        let found = truncate(w, cols, h, 3).unwrap();
        for (found, expected) in found.singular.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4 * expected, "{key}: {found}, {expected}");
        }
        if !whitened {
            let product =
                |r: usize, c: usize| -> f32 { (0..3).map(|k| found.up[r * 3 + k] * found.down[k * cols + c]).sum() };
            let error: f64 = (0..w.len()).map(|i| f64::from(w[i] - product(i / cols, i % cols)).powi(2)).sum();
            let rest: f64 = expected[3..].iter().map(|s| s * s).sum();
            assert!((error - rest).abs() < 1e-4 * rest, "{error}, {rest}");
        }
        assert_eq!(rank_for_energy(&expected, 1.0 - 1e-12), expected.len());
        assert!(rank_for_energy(&expected, 0.5) < expected.len());
    }
    let error = |settings: Value| run("svd", settings, &weight, &hessian).unwrap().error;
    let (plain, whitened) =
        (error(json!({"rank": {"rank": 3}})), error(json!({"rank": {"rank": 3}, "whitened": true})));
    assert!(whitened < plain, "{whitened} against {plain}");
    // Of a tall weight likewise.
    let tall: Weight = Dense::from_f32(vec![cols, rows], transposed).into();
    let mixed: Vec<f32> = (0..rows * rows).map(|i| if i % (rows + 1) == 0 { (i + 1) as f32 } else { 1.0 }).collect();
    let small = Hessian::from_matrix(rows, mixed);
    let error = |settings: Value| run("svd", settings, &tall, &small).unwrap().error;
    let (plain, whitened) =
        (error(json!({"rank": {"rank": 2}})), error(json!({"rank": {"rank": 2}, "whitened": true})));
    assert!(whitened < plain, "{whitened} against {plain}");
}

#[test]
fn corrections_and_mixtures_are_better_than_their_parts() {
    let golden = Golden::new();
    let (weight, hessian) = (golden.weight(), golden.hessian());
    let error = |name: &str, settings: Value| run(name, settings, &weight, &hessian).unwrap().error;
    let grid = json!({"bits": 3, "granularity": {"group": 32}});
    let svd = json!({"rank": {"rank": 2}, "whitened": true});
    let base = error("rtn", grid.clone());
    let corrected = error("residual", json!({"base": {"method": "rtn", "settings": grid}, "correction": svd}));
    assert!(corrected < 0.8 * base, "{corrected} against {base}");
    let prune = json!({"method": "wanda", "settings": {"pattern": {"nm": {"n": 2, "m": 4}}}});
    let alone = error("wanda", prune["settings"].clone());
    let both = error("low_rank_sparse", json!({"low_rank": svd, "sparse": prune}));
    assert!(both < alone, "{both} against {alone}");
}

#[test]
fn zeros_and_singular_inputs_are_handled_and_nonsense_is_refused() {
    let zeros: Weight = Dense::from_f32(vec![4, 8], vec![0.0; 32]).into();
    let dead = Hessian::from_matrix(8, vec![0.0; 64]);
    let good = [
        ("magnitude", json!({"amount": {"sparsity": 0.5}})),
        ("wanda", json!({"pattern": {"sparsity": 0.5}, "values": {"int": {"bits": 4, "group_size": 64}}})),
        ("sparsegpt", json!({"pattern": {"sparsity": 0.5}, "values": {"int": {"bits": 4, "group_size": 64}}})),
        ("svd", json!({"rank": {"rank": 2}, "whitened": true})),
        ("svd", json!({"rank": {"share": 0.5}, "factors": {"bits": 8, "granularity": "channel"}})),
        ("svd", json!({"rank": {"bytes": 60}})),
    ];
    for (name, settings) in good {
        let out = run(name, settings.clone(), &zeros, &dead).unwrap();
        assert!(out.error == 0.0 && out.weight.to_f32().iter().all(|v| *v == 0.0), "{name} {settings}");
    }
    let refused = [
        ("magnitude", json!({"amount": {"sparsity": 1.0}})),
        ("magnitude", json!({"amount": {"sparsity": -0.1}})),
        ("magnitude", json!({"amount": {"count": 33}})),
        ("wanda", json!({"pattern": {"sparsity": 1.5}})),
        ("nm", json!({"n": 5, "m": 4})),
        ("nm", json!({"n": 0, "m": 0})),
        ("sparsegpt", json!({"pattern": {"sparsity": 0.5}, "values": {"int": {"bits": 9, "group_size": 64}}})),
        ("svd", json!({"rank": {"rank": 5}})),
        ("svd", json!({"rank": {"rank": 0}})),
        ("svd", json!({"rank": {"share": 1.5}})),
    ];
    for (name, settings) in refused {
        let error = run(name, settings.clone(), &zeros, &dead).unwrap_err();
        assert!(matches!(error, MethodError::Settings(_)), "{name} {settings}: {error}");
    }
    let mut values = vec![1.0; 32];
    values[13] = f32::NAN;
    let broken: Weight = Dense::from_f32(vec![4, 8], values).into();
    for (name, settings) in [
        ("magnitude", json!({"amount": {"sparsity": 0.5}})),
        ("wanda", json!({"pattern": {"sparsity": 0.5}})),
        ("sparsegpt", json!({"pattern": {"sparsity": 0.5}})),
        ("svd", json!({"rank": {"rank": 2}})),
    ] {
        let error = run(name, settings, &broken, &Hessian::identity(8)).unwrap_err();
        assert!(matches!(error, MethodError::NotFinite { row: 1, col: 5, .. }), "{name}: {error}");
    }
}
