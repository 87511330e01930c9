//! The way back on every backend against the reference, and the same bits from any number of threads.

// Documents are ranges of rows; one document is one range.
#![allow(clippy::single_range_in_vec_init)]

mod common;

use std::ops::Range;

use common::{Candidate, candidates, check, each, noise};
use fourfold_kernels::backward::{Backward, IGNORE, SelfAttention, SoftTargets};
use fourfold_kernels::{Activations, Backend, LinearArg, Memory, Reference, RopeSpec, Tensor};
use fourfold_tensor::{DType, Dense, FloatBuffer};

/// (tokens, in, out).
const SHAPES: &[(usize, usize, usize)] =
    &[(1, 5, 3), (7, 33, 20), (64, 64, 31), (300, 70, 130), (2051, 33, 9), (1030, 300, 20), (40, 33, 500)];

#[test]
fn weight_bias_and_embedding_gradients() {
    each(|candidate| {
        let mut outputs = Vec::new();
        for &(tokens, inputs, features) in SHAPES {
            let what = |op: &str| format!("{} {op} {tokens}x{inputs}x{features}", candidate.label);
            let (x, dy) = (noise(tokens, inputs, 1), noise(tokens, features, 2));
            let start = noise(features, inputs, 3);
            let (mut expected, mut found) = (start.clone(), start);
            Reference.linear_weight_gradient(&x, &dy, &mut expected);
            candidate.backend.linear_weight_gradient(&x, &dy, &mut found);
            // A share of Σ |x| |dy|: f32 sums in another order, or both factors rounded to bf16.
            let share = if candidate.activations == Activations::F32 { 2e-6 } else { 2.0 * 2.0f32.powi(-9) };
            check(&what("weight gradient"), &found, &expected, |_| share * 0.5 * tokens as f32 + 1e-6);
            outputs.push(found);
            let mut expected = Tensor::zeros(features, inputs);
            candidate.backend.linear_weight_gradient(&x, &dy, &mut expected);
            assert_eq!(candidate.backend.new_linear_weight_gradient(&x, &dy), expected, "{}", what("new gradient"));

            let (mut expected, mut found) = (noise(1, features, 4), noise(1, features, 4));
            Reference.bias_gradient(&dy, &mut expected);
            candidate.backend.bias_gradient(&dy, &mut found);
            check(&what("bias gradient"), &found, &expected, |_| 1e-6 * tokens as f32);
            outputs.push(found);

            let ids: Vec<u32> = (0..tokens).map(|t| (t * t % 5) as u32).collect();
            let (mut expected, mut found) = (noise(5, features, 5), noise(5, features, 5));
            Reference.embedding_gradient(&ids, &dy, &mut expected);
            candidate.backend.embedding_gradient(&ids, &dy, &mut found);
            check(&what("embedding gradient"), &found, &expected, |_| 0.0);
        }
        outputs
    });
}

#[test]
fn input_gradient_of_large_batches() {
    each(|candidate| {
        let mut outputs = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            for (tokens, inputs, features) in [(40, 70, 33), (290, 64, 2060)] {
                let data = FloatBuffer::from_f32(noise(features, inputs, 1).into_host(), dtype);
                let weight = Dense::new(vec![features, inputs], data);
                let dy = noise(tokens, features, 2);
                let reference = Reference.upload(weight.clone().into()).unwrap();
                let uploaded = candidate.backend.upload(weight.into()).unwrap();
                let expected = Reference.linear_transposed(&dy, &reference, 0..features);
                let found = candidate.backend.linear_transposed(&dy, &uploaded, 0..features);
                let rounded = candidate.activations == Activations::Fast && dtype == DType::Bf16;
                let share = if rounded { 2.0f32.powi(-9) } else { 2e-6 };
                check(&format!("{} {dtype}", candidate.label), &found, &expected, |_| share * 0.5 * features as f32);
                // It is the gradient of the forward: <dy, W x> = <Wᵀ dy, x>.
                let x = noise(tokens, inputs, 3);
                let y = candidate.backend.linear(&x, &[LinearArg { weight: &uploaded, bias: None }]).remove(0);
                let dot = |a: &Tensor, b: &Tensor| {
                    a.host().iter().zip(b.host()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                };
                let (forward, backward) = (dot(&dy, &y), dot(&found, &x));
                let size = (tokens * features) as f64;
                assert!(
                    (forward - backward).abs() < 0.01 * size.sqrt() * (inputs as f64).sqrt(),
                    "{forward} {backward}"
                );
                outputs.push(found);
            }
        }
        outputs
    });
}

#[test]
fn moved_and_scaled_rows() {
    each(|candidate| {
        let mut outputs = Vec::new();
        // The last takes more than one thread.
        for (rows, cols) in [(1, 3), (5, 33), (700, 130)] {
            let what = |op: &str| format!("{} {op} [{rows}, {cols}]", candidate.label);
            let (x, y) = (noise(rows, cols, 1), noise(rows, cols, 2));
            let part = rows / 3..rows;
            let taken = candidate.backend.rows(&x, part.clone());
            assert_eq!(taken, Reference.rows(&x, part.clone()), "{}", what("rows"));
            let narrow = Reference.to_bf16(&x);
            let wide = candidate.backend.rows_of_bf16(&narrow, part.clone());
            assert_eq!(wide, Reference.rows_of_bf16(&narrow, part.clone()), "{}", what("rows of bf16"));
            let (mut expected, mut found) = (y.clone(), y.clone());
            Reference.set_rows(&mut expected, part.start, &taken);
            candidate.backend.set_rows(&mut found, part.start, &taken);
            assert_eq!(found, expected, "{}", what("set rows"));

            let some = cols / 3..cols - 1;
            let taken = Reference.columns(&x, some.clone());
            let (mut expected, mut found) = (y.clone(), y.clone());
            Reference.set_columns(&mut expected, some.start, &taken);
            candidate.backend.set_columns(&mut found, some.start, &taken);
            assert_eq!(found, expected, "{}", what("set columns"));
            assert_eq!(Reference.columns(&found, some.clone()), taken);
            assert_eq!(Reference.columns(&found, 0..some.start), Reference.columns(&y, 0..some.start));

            let factors = noise(1, rows, 3).into_host();
            let (mut expected, mut found) = (x.clone(), x.clone());
            Reference.scale_rows(&mut expected, &factors);
            candidate.backend.scale_rows(&mut found, &factors);
            assert_eq!(found, expected, "{}", what("scale rows"));
            let expected = Tensor::new(1, rows, Reference.row_dots(&x, &y));
            let found = Tensor::new(1, rows, candidate.backend.row_dots(&x, &y));
            check(&what("row dots"), &found, &expected, |_| 1e-6 * cols as f32);
            outputs.push(found);
        }
        outputs
    });
}

#[test]
fn norm_rope_swiglu_and_loss() {
    each(|candidate| {
        let mut outputs = Vec::new();
        for (rows, cols) in [(1, 3), (5, 33), (120, 576)] {
            let what = |op: &str| format!("{} {op} [{rows}, {cols}]", candidate.label);
            let (x, dy, weight) = (noise(rows, cols, 1), noise(rows, cols, 2), noise(1, cols, 3));
            let (mut expected_w, mut found_w) = (noise(1, cols, 4), noise(1, cols, 4));
            let expected = Reference.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut expected_w);
            let found = candidate.backend.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut found_w);
            check(&what("norm dx"), &found, &expected, |_| 1e-5);
            check(&what("norm dw"), &found_w, &expected_w, |_| 2e-6 * rows as f32);
            outputs.extend([found, found_w]);

            let gate = Tensor::new(rows, cols, x.host().iter().map(|v| v * 30.0).collect());
            let (dgate, dup) = Reference.swiglu_backward(gate.clone(), weight_rows(&x), &dy);
            let (found_gate, found_up) = candidate.backend.swiglu_backward(gate, weight_rows(&x), &dy);
            check(&what("dgate"), &found_gate, &dgate, |_| 1e-5);
            check(&what("dup"), &found_up, &dup, |i| 1e-6 * dup.host()[i].abs() + 1e-7);
            outputs.extend([found_gate, found_up]);

            let targets: Vec<u32> =
                (0..rows).map(|r| if r % 4 == 3 { IGNORE } else { (r * 7 % cols) as u32 }).collect();
            let logits = Tensor::new(rows, cols, x.host().iter().map(|v| v * 20.0 - 50.0).collect());
            let (mut expected, mut found) = (logits.clone(), logits);
            let expected_losses = Reference.cross_entropy(&mut expected, &targets, 0.25);
            let losses = candidate.backend.cross_entropy(&mut found, &targets, 0.25);
            check(&what("logits' gradient"), &found, &expected, |_| 1e-6);
            let (losses, expected_losses) = (Tensor::new(1, rows, losses), Tensor::new(1, rows, expected_losses));
            check(&what("losses"), &losses, &expected_losses, |_| 1e-5);
            outputs.extend([found, losses]);

            let teacher = Tensor::new(rows, cols, dy.host().iter().map(|v| v * 15.0 + 30.0).collect());
            let student = Tensor::new(rows, cols, x.host().iter().map(|v| v * 20.0 - 50.0).collect());
            for (temperature, weight) in [(1.0, 1.0), (2.5, 0.4)] {
                let soft = SoftTargets { temperature, weight };
                let (mut expected, mut found) = (student.clone(), student.clone());
                let expected_losses = Reference.distillation(&mut expected, teacher.clone(), &targets, soft, 0.25);
                let losses = candidate.backend.distillation(&mut found, teacher.clone(), &targets, soft, 0.25);
                check(&what("distilled gradient"), &found, &expected, |_| 2e-6);
                let (losses, expected_losses) = (Tensor::new(1, rows, losses), Tensor::new(1, rows, expected_losses));
                check(&what("distillation"), &losses, &expected_losses, |i| 1e-5 + 2e-6 * expected_losses.host()[i]);
                outputs.extend([found, losses]);
            }
        }
        for interleaved in [false, true] {
            let spec = RopeSpec { head_dim: 20, heads: 3, start: 4, interleaved, first_position: 2 };
            let (cos, sin) = (noise(60, 6, 1), noise(60, 6, 2));
            let (mut expected, mut found) = (noise(58 * 3, 20, 3), noise(58 * 3, 20, 3));
            Reference.rope_backward(&mut expected, &cos, &sin, &spec);
            candidate.backend.rope_backward(&mut found, &cos, &sin, &spec);
            check(&format!("{} rope backward", candidate.label), &found, &expected, |_| 1e-6);
            outputs.push(found);
        }
        outputs
    });
}

/// Another tensor of the same shape.
fn weight_rows(x: &Tensor) -> Tensor {
    noise(x.rows(), x.cols(), 9)
}

/// (heads, kv heads, key dim, value dim, window, documents).
type AttentionCase = (usize, usize, usize, usize, Option<usize>, &'static [Range<usize>]);

const ATTENTIONS: &[AttentionCase] = &[
    (2, 1, 8, 8, None, &[0..1]),
    (9, 3, 64, 64, None, &[0..150]),
    (4, 2, 20, 12, None, &[0..30, 30..31, 31..140]),
    (4, 4, 33, 40, Some(9), &[0..100, 100..130]),
    (70, 1, 24, 16, None, &[0..20, 20..37]),
];

#[test]
fn attention_inside_documents() {
    each(|candidate: &Candidate| {
        let mut outputs = Vec::new();
        for &(heads, kv_heads, key_dim, value_dim, window, documents) in ATTENTIONS {
            let spec = SelfAttention { heads, kv_heads, key_dim, value_dim, scale: 0.6, window, documents };
            let tokens = documents[documents.len() - 1].end;
            let q = noise(tokens, heads * key_dim, 1);
            let (k, v) = (noise(tokens, kv_heads * key_dim, 2), noise(tokens, kv_heads * value_dim, 3));
            let dy = noise(tokens, heads * value_dim, 4);
            let what = |part: &str| format!("{} {part} {spec:?}", candidate.label);
            let expected = Reference.attention_forward(&q, &k, &v, &spec);
            let found = candidate.backend.attention_forward(&q, &k, &v, &spec);
            // Factors rounded to bf16: scores and sums of probabilities are off by some 2⁻⁹ of their size.
            let rounded = candidate.activations == Activations::Fast;
            check(&what("y"), &found.y, &expected.y, |_| if rounded { 0.01 } else { 3e-6 });
            check(&what("lse"), &found.lse, &expected.lse, |_| if rounded { 0.01 } else { 1e-5 });
            let gradients = Reference.attention_backward(&q, &k, &v, &expected, &dy, &spec);
            let ours = candidate.backend.attention_backward(&q, &k, &v, &expected, &dy, &spec);
            // Sums over as many as all tokens and the heads of a group.
            let share = if rounded { 0.05 } else { 2e-5 };
            check(&what("dq"), &ours.dq, &gradients.dq, |_| share);
            check(&what("dk"), &ours.dk, &gradients.dk, |i| share * gradients.dk.host()[i].abs().max(1.0));
            check(&what("dv"), &ours.dv, &gradients.dv, |i| share * gradients.dv.host()[i].abs().max(1.0));
            outputs.extend([found.y, found.lse, ours.dq, ours.dk, ours.dv]);
        }
        outputs
    });
}

#[test]
fn the_candidates_include_threads_and_precisions() {
    let all = candidates();
    assert!(all.iter().any(|c| c.threads == 2) && all.iter().any(|c| c.activations == Activations::Fast));
}
