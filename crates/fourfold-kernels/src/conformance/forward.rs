//! The operations of the forward pass.

use fourfold_tensor::{DType, Dense, Weight};

use super::{Candidate, Check, FORMS, Form, check, noise, weight};
use crate::{
    Activations, AttentionSpec, Backend, KvCache, KvDtype, LinearArg, Memory, Reference, RopeSpec, Tensor, Values,
};

/// Every check, by name.
pub const FORWARD: &[(&str, Check)] = &[
    ("linear of every form", linear_of_every_form),
    ("linear of several forms of one input", linear_with_several_weights_and_forms_of_one_input),
    ("linear of some rows, and transposed", linear_rows_and_transposed_of_every_form),
    ("embedding", embedding_reads_rows_as_stored),
    ("operations on rows and elements", operations_on_rows_and_elements),
    ("rope", rope_of_both_layouts_on_parts_of_heads),
    ("attention", attention_of_every_cache_type),
    ("attention with large scores", attention_is_safe_from_large_scores),
];

/// Where a product may differ from the reference: by this share of `Σ |x| |w|`.
fn linear_tolerance(candidate: &Candidate, form: Form) -> f32 {
    let fast = candidate.activations == Activations::Fast;
    match form {
        // f32 sums in another order.
        Form::Dense(DType::F32 | DType::F16) | Form::Sparse { dtype: DType::F32 | DType::F16, .. } => 2e-6,
        // Rounding to bf16: 2^−9 of each term.
        Form::Dense(_) | Form::Sparse { .. } if fast => 2.0f32.powi(-9),
        // Both factors rounded.
        Form::Fp8 { .. } if fast => 2.0f32.powi(-8),
        // The sizes of the inner products' terms are not those of the whole product's: they may cancel.
        Form::LowRank { .. } | Form::Sum(_) => {
            if fast {
                0.05
            } else {
                2e-5
            }
        }
        // Rounding to int8: 1/254 of the largest activation, which is about twice the mean one.
        _ if fast => 0.01,
        _ => 2e-6,
    }
}

fn expected_sum(start: &Tensor, y: &Tensor) -> Tensor {
    let mut sum = start.clone();
    Reference.add(&mut sum, y);
    sum
}

/// `Σ |x| |w|` for each output, from the reference's own read of the weight.
fn magnitudes(x: &Tensor, stored: &Weight) -> Tensor {
    let absolute = |v: &[f32]| v.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let w = Dense::from_f32(vec![stored.rows(), stored.cols()], absolute(&stored.to_f32()));
    let w = Reference.upload(w.into()).unwrap_or_else(|e| panic!("{e}"));
    let x = Tensor::new(x.rows(), x.cols(), absolute(x.host()));
    Reference.linear(&x, &[LinearArg { weight: &w, bias: None }]).remove(0)
}

/// (tokens, in, out): single rows, odd sizes, below and above every block.
const LINEAR_SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 576, 192),
    (1, 67, 35),
    (2, 33, 5),
    (3, 64, 31),
    (5, 129, 70),
    (8, 96, 33),
    (17, 48, 64),
    (61, 131, 101),
];

fn linear_of_every_form(candidate: &Candidate) -> Vec<Tensor> {
    let mut outputs = Vec::new();
    for &form in FORMS {
        for &(tokens, cols, rows) in LINEAR_SHAPES {
            let stored = weight(form, rows, cols, 7);
            let (x, bias) = (noise(tokens, cols, 8), noise(1, rows, 9));
            let expected_weight = Reference.upload(stored.clone()).unwrap_or_else(|e| panic!("{e}"));
            let expected = Reference.linear(&x, &[LinearArg { weight: &expected_weight, bias: Some(&bias) }]).remove(0);
            let magnitude = magnitudes(&x, &stored);
            let uploaded = candidate.backend.upload(stored).unwrap_or_else(|e| panic!("{e}"));
            let (put_x, put_bias) = (candidate.put(&x), candidate.put(&bias));
            let arg = LinearArg { weight: &uploaded, bias: Some(&put_bias) };
            let y = candidate.get(candidate.backend.linear(&put_x, &[arg]).remove(0));
            let tolerance = linear_tolerance(candidate, form);
            let what = format!("{} linear {form:?} {tokens}x{cols}x{rows}", candidate.label);
            check(&what, &y, &expected, |i| tolerance * magnitude.host()[i] + 1e-6);
            // Added to what is there: one more rounding.
            let start = noise(tokens, rows, 10);
            let mut sum = candidate.put(&start);
            candidate.backend.linear_add(&put_x, arg, &mut sum);
            let sum = candidate.get(sum);
            check(&what, &sum, &expected_sum(&start, &expected), |i| tolerance * magnitude.host()[i] + 2e-6);
            outputs.push(sum);
            outputs.push(y);
        }
    }
    outputs
}

fn linear_with_several_weights_and_forms_of_one_input(candidate: &Candidate) -> Vec<Tensor> {
    let fp8 = Form::Fp8 { rows: 16, cols: 32, scales: DType::F32 };
    let forms = [FORMS[0], FORMS[3], fp8, FORMS[2], FORMS[6], FORMS[1]];
    let rows = [33, 64, 50, 1, 40, 96];
    let mut outputs = Vec::new();
    for tokens in [1, 4, 40] {
        let x = noise(tokens, 72, 1);
        let biases: Vec<Tensor> = rows.iter().map(|&r| noise(1, r, 2)).collect();
        let put_biases: Vec<Tensor> = biases.iter().map(|bias| candidate.put(bias)).collect();
        let stored: Vec<_> = forms.iter().zip(rows).map(|(&form, r)| weight(form, r, 72, r as u64)).collect();
        let uploaded: Vec<_> =
            stored.iter().map(|w| candidate.backend.upload(w.clone()).unwrap_or_else(|e| panic!("{e}"))).collect();
        let args: Vec<_> = uploaded
            .iter()
            .zip(&put_biases)
            .enumerate()
            .map(|(i, (weight, bias))| LinearArg { weight, bias: (i % 2 == 0).then_some(bias) })
            .collect();
        let put = candidate.put(&x);
        let together: Vec<Tensor> =
            candidate.backend.linear(&put, &args).into_iter().map(|y| candidate.get(y)).collect();
        for (i, y) in together.iter().enumerate() {
            let alone = candidate.get(candidate.backend.linear(&put, &args[i..=i]).remove(0));
            assert!(*y == alone, "{} weight {i} of {tokens} tokens: together and alone differ", candidate.label);
            let w = Reference.upload(stored[i].clone()).unwrap_or_else(|e| panic!("{e}"));
            let expected =
                Reference.linear(&x, &[LinearArg { weight: &w, bias: (i % 2 == 0).then_some(&biases[i]) }]).remove(0);
            let magnitude = magnitudes(&x, &stored[i]);
            let tolerance = linear_tolerance(candidate, forms[i]);
            check(&candidate.label, y, &expected, |j| tolerance * magnitude.host()[j] + 1e-6);
        }
        outputs.extend(together);
    }
    outputs
}

fn linear_rows_and_transposed_of_every_form(candidate: &Candidate) -> Vec<Tensor> {
    let mut outputs = Vec::new();
    for &form in FORMS {
        for (tokens, cols, rows, range) in
            [(1, 576, 40, 8..24), (1, 35, 9, 0..9), (3, 70, 40, 17..30), (20, 129, 64, 32..64), (33, 40, 7, 2..3)]
        {
            let stored = weight(form, rows, cols, 3);
            let expected_weight = Reference.upload(stored.clone()).unwrap_or_else(|e| panic!("{e}"));
            let uploaded = candidate.backend.upload(stored.clone()).unwrap_or_else(|e| panic!("{e}"));
            let what = format!("{} {form:?} {tokens}x{cols}x{rows} rows {range:?}", candidate.label);

            let x = noise(tokens, cols, 4);
            let expected = Reference.linear_rows(&x, &expected_weight, range.clone());
            let y = candidate.get(candidate.backend.linear_rows(&candidate.put(&x), &uploaded, range.clone()));
            let magnitude = magnitudes(&x, &stored);
            let tolerance = linear_tolerance(candidate, form);
            check(&what, &y, &expected, |i| {
                tolerance * magnitude.row(i / range.len())[range.start + i % range.len()] + 1e-6
            });
            outputs.push(y);

            let x = noise(tokens, range.len(), 5);
            let expected = Reference.linear_transposed(&x, &expected_weight, range.clone());
            let y = candidate.get(candidate.backend.linear_transposed(&candidate.put(&x), &uploaded, range.clone()));
            // Weights are of magnitude 1 and activations below 1.
            check(&format!("{what} transposed"), &y, &expected, |_| tolerance * 2.0 * range.len() as f32);
            outputs.push(y);
        }
    }
    outputs
}

fn embedding_reads_rows_as_stored(candidate: &Candidate) -> Vec<Tensor> {
    FORMS
        .iter()
        .map(|&form| {
            let stored = weight(form, 11, 50, 6);
            let ids = [3, 0, 10, 3];
            let expected =
                Reference.embedding(&Reference.upload(stored.clone()).unwrap_or_else(|e| panic!("{e}")), &ids);
            let uploaded = candidate.backend.upload(stored).unwrap_or_else(|e| panic!("{e}"));
            let y = candidate.get(candidate.backend.embedding(&uploaded, &ids));
            let what = format!("{} embedding {form:?}", candidate.label);
            // Rows of a product are sums, the others are as stored.
            let share = if matches!(form, Form::LowRank { .. } | Form::Sum(_)) { 2e-5 } else { 1e-6 };
            check(&what, &y, &expected, |i| share * expected.host()[i].abs().max(0.1));
            y
        })
        .collect()
}

/// (rows, columns): one element, odd, and large enough for threads.
const ROWWISE_SHAPES: &[(usize, usize)] = &[(1, 1), (1, 576), (7, 33), (3, 130), (90, 1000)];

fn operations_on_rows_and_elements(candidate: &Candidate) -> Vec<Tensor> {
    let mut outputs = Vec::new();
    for &(rows, cols) in ROWWISE_SHAPES {
        let what = |op: &str| format!("{} {op} [{rows}, {cols}]", candidate.label);
        let (x, y, weight) = (noise(rows, cols, 1), noise(rows, cols, 2), noise(1, cols, 3));
        let relative = |expected: &Tensor| {
            let expected = expected.clone();
            move |i: usize| 2e-6 * expected.host()[i].abs() + 1e-9
        };

        let expected = Reference.rms_norm(&x, &weight, 1e-5);
        let found = candidate.get(candidate.backend.rms_norm(&candidate.put(&x), &candidate.put(&weight), 1e-5));
        check(&what("rms_norm"), &found, &expected, relative(&expected));
        outputs.push(found);

        // Gates up to ±90: the exponential saturates.
        let gate = Tensor::new(rows, cols, x.host().iter().map(|v| v * 90.0).collect());
        let expected = Reference.swiglu(gate.clone(), &y);
        let found = candidate.get(candidate.backend.swiglu(candidate.put(&gate), &candidate.put(&y)));
        check(&what("swiglu"), &found, &expected, |i| candidate.exponential * expected.host()[i].abs() + 1e-9);
        outputs.push(found);

        let (mut found, mut expected) = (candidate.put(&x), x.clone());
        Reference.add(&mut expected, &y);
        candidate.backend.add(&mut found, &candidate.put(&y));
        let found = candidate.get(found);
        check(&what("add"), &found, &expected, |_| 0.0);
        outputs.push(found);

        let range = cols / 3..cols - cols / 4;
        let picked: Vec<usize> = [rows - 1, 0, rows / 2, 0].into_iter().chain((0..rows).rev()).collect();
        let (put_x, put_y) = (candidate.put(&x), candidate.put(&y));
        let pairs = [
            (Reference.columns(&x, range.clone()), candidate.backend.columns(&put_x, range)),
            (Reference.concat_columns(&x, &y), candidate.backend.concat_columns(&put_x, &put_y)),
            (Reference.gather_rows(&x, &picked), candidate.backend.gather_rows(&put_x, &picked)),
        ];
        for (expected, found) in pairs {
            check(&what("moving"), &candidate.get(found), &expected, |_| 0.0);
        }

        let places: Vec<usize> = (0..rows).map(|r| r * 5 % 3).collect();
        let factors: Vec<f32> = (0..rows).map(|r| 1.0 / (r + 1) as f32).collect();
        let (mut found, mut expected) = (candidate.put(&noise(3, cols, 4)), noise(3, cols, 4));
        Reference.scatter_add_rows(&mut expected, &y, &places, &factors);
        candidate.backend.scatter_add_rows(&mut found, &put_y, &places, &factors);
        let found = candidate.get(found);
        check(&what("scatter_add_rows"), &found, &expected, |_| 1e-5);
        outputs.push(found);
    }
    outputs
}

fn rope_of_both_layouts_on_parts_of_heads(candidate: &Candidate) -> Vec<Tensor> {
    let mut outputs = Vec::new();
    for (tokens, heads, head_dim, start, half) in [(1, 9, 64, 0, 32), (5, 3, 24, 16, 4), (300, 4, 50, 7, 19)] {
        for interleaved in [false, true] {
            let spec = RopeSpec { head_dim, heads, start, interleaved, first_position: 11 };
            let (cos, sin) = (noise(311, half, 1), noise(311, half, 2));
            let x = noise(tokens * heads, head_dim, 3);
            let (mut found, mut expected) = (candidate.put(&x), x);
            Reference.rope(&mut expected, &cos, &sin, &spec);
            candidate.backend.rope(&mut found, &candidate.put(&cos), &candidate.put(&sin), &spec);
            let found = candidate.get(found);
            check(&format!("{} {spec:?}", candidate.label), &found, &expected, |_| 1e-6);
            outputs.push(found);
        }
    }
    outputs
}

/// (tokens, heads, kv heads, key dim, value dim, first position, window).
type AttentionShape = (usize, usize, usize, usize, usize, usize, Option<usize>);

const ATTENTION_SHAPES: &[AttentionShape] = &[
    (1, 1, 1, 4, 4, 0, None),
    (1, 9, 3, 64, 64, 300, None),
    (1, 9, 3, 64, 64, 1000, None),
    (1, 4, 4, 80, 80, 513, Some(100)),
    (1, 80, 1, 48, 32, 270, None),
    (3, 6, 2, 20, 12, 500, None),
    (3, 4, 2, 33, 33, 77, Some(5)),
    (5, 16, 1, 72, 64, 0, None),
    (70, 9, 3, 64, 64, 0, None),
    (130, 2, 2, 16, 24, 60, None),
    (90, 8, 2, 40, 40, 150, Some(64)),
    (40, 70, 1, 24, 16, 3, None),
];

fn attention_of_every_cache_type(candidate: &Candidate) -> Vec<Tensor> {
    let mut outputs = Vec::new();
    for &(tokens, heads, kv_heads, key_dim, value_dim, first_position, window) in ATTENTION_SHAPES {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
            let spec = AttentionSpec { heads, kv_heads, key_dim, value_dim, scale: 0.7, first_position, window };
            let q = noise(tokens, heads * key_dim, 1);
            let mut keys = KvCache::new(kv_heads * key_dim, dtype);
            let mut values = KvCache::new(kv_heads * value_dim, dtype);
            // One position more than any query sees.
            let positions = first_position + tokens + 1;
            let (k, v) = (noise(positions, kv_heads * key_dim, 2), noise(positions, kv_heads * value_dim, 3));
            let (mut put_keys, mut put_values) = (keys.clone(), values.clone());
            keys.append(&k);
            values.append(&v);
            // In two parts, as a prompt and what follows it.
            for (cache, rows) in [(&mut put_keys, &k), (&mut put_values, &v)] {
                let (cols, cut) = (rows.cols(), rows.cols() * (positions - 1));
                cache.append(&candidate.put(&Tensor::new(positions - 1, cols, rows.host()[..cut].to_vec())));
                cache.append(&candidate.put(&Tensor::new(1, cols, rows.host()[cut..].to_vec())));
            }
            for own in [true, false] {
                if !own && value_dim > key_dim {
                    continue;
                }
                let source = if own { Values::Cache(&values) } else { Values::PrefixOfKeys };
                let expected = Reference.attention(&q, &keys, source, &spec);
                let put_source = if own { Values::Cache(&put_values) } else { Values::PrefixOfKeys };
                let found =
                    candidate.get(candidate.backend.attention(&candidate.put(&q), &put_keys, put_source, &spec));
                let what = format!("{} attention {spec:?} {tokens} tokens {dtype:?} {own}", candidate.label);
                check(&what, &found, &expected, |_| candidate.exponential.max(3e-6));
                outputs.push(found);
            }
        }
    }
    outputs
}

fn attention_is_safe_from_large_scores(candidate: &Candidate) -> Vec<Tensor> {
    let spec = AttentionSpec {
        heads: 1,
        kv_heads: 1,
        key_dim: 16,
        value_dim: 16,
        scale: 1000.0,
        first_position: 99,
        window: None,
    };
    let mut keys = KvCache::new(16, KvDtype::F32);
    let mut put_keys = keys.clone();
    keys.append(&noise(100, 16, 2));
    put_keys.append(&candidate.put(&noise(100, 16, 2)));
    let q = noise(1, 16, 1);
    let expected = Reference.attention(&q, &keys, Values::PrefixOfKeys, &spec);
    assert!(expected.host().iter().all(|v| v.is_finite()));
    let found = candidate.get(candidate.backend.attention(&candidate.put(&q), &put_keys, Values::PrefixOfKeys, &spec));
    check(&candidate.label, &found, &expected, |_| 1e-3);
    vec![found]
}
