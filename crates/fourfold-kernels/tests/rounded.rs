//! What is prepared for products alone against the same operation with the rounding left to the products, on every backend; and the same
//! bits from any number of threads.

mod common;

use common::{check, each, noise};
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Activations, Backend, FloatProducts, Input, LinearArg, Memory, Prepared, Reference, Tensor};
use fourfold_tensor::{DType, Dense, FloatBuffer};

/// (tokens, in, out): few tokens, many, odd widths, and more outputs than an input's gradient sums over at a time.
const SHAPES: &[(usize, usize, usize)] =
    &[(1, 5, 3), (7, 33, 20), (16, 64, 32), (290, 71, 130), (40, 33, 2060), (1030, 40, 31)];

fn weight(outputs: usize, inputs: usize, dtype: DType) -> Dense {
    Dense::new(vec![outputs, inputs], FloatBuffer::from_f32(noise(outputs, inputs, 9).into_host(), dtype))
}

#[test]
fn only_products_of_bf16_weights_in_bf16_round() {
    each(|candidate| {
        let backend = &candidate.backend;
        let pairs = candidate.activations == Activations::Fast && candidate.products == FloatProducts::Bf16;
        for (dtype, rounds) in [(DType::Bf16, pairs), (DType::F32, false), (DType::F16, false)] {
            let uploaded = backend.upload(weight(6, 4, dtype).into()).unwrap();
            assert_eq!(backend.rounds(&uploaded), rounds, "{} {dtype}", candidate.label);
        }
        Vec::new()
    });
}

#[test]
fn products_of_what_is_rounded_are_those_that_round() {
    each(|candidate| {
        let backend = &candidate.backend;
        let mut outputs = Vec::new();
        for &(tokens, inputs, features) in SHAPES {
            let what = |op: &str| format!("{} {op} {tokens}x{inputs}x{features}", candidate.label);
            let uploaded = backend.upload(weight(features, inputs, DType::Bf16).into()).unwrap();
            let rounded = backend.rounds(&uploaded);
            let (scales, bias) = (noise(1, inputs, 4), noise(1, features, 5));
            let (x, y, dy) = (noise(tokens, inputs, 1), noise(tokens, inputs, 2), noise(tokens, features, 3));
            let rows: Vec<usize> = (0..tokens).map(|t| t * 7 % tokens).collect();
            let [d_gate, d_up] =
                backend.swiglu_backward_for_products(x.clone(), y.clone(), noise(tokens, inputs, 6), rounded);
            let (of_gate, of_up) = backend.swiglu_backward(x.clone(), y.clone(), &noise(tokens, inputs, 6));
            let cases = [
                (
                    "norm",
                    backend.rms_norm_for_products(&x, &scales, 1e-5, rounded),
                    backend.rms_norm(&x, &scales, 1e-5),
                ),
                ("swiglu", backend.swiglu_for_products(&x, &y, rounded), backend.swiglu_of(&x, &y)),
                ("gather", backend.gather_rows_for_products(&x, &rows, rounded), backend.gather_rows(&x, &rows)),
                ("gate", d_gate, of_gate),
                ("up", d_up, of_up),
            ];
            for (op, prepared, plain) in cases {
                assert_eq!(matches!(prepared, Prepared::Rounded(_)), rounded, "{}", what(op));
                let input = prepared.input();
                assert_eq!((input.rows(), input.cols()), (tokens, inputs));
                // As the input of a product, of two at once, one with a bias.
                let args = [None, Some(&bias)].map(|bias| LinearArg { weight: &uploaded, bias });
                let found = backend.linear_of(input, &args);
                assert_eq!(found, backend.linear(&plain, &args), "{}", what(op));
                // As a factor of a weight's gradient, on either side and on both.
                let gradient = |x: Input, dy: Input| {
                    let mut sum = noise(dy.cols(), x.cols(), 7);
                    backend.weight_gradient_of(x, dy, &mut sum);
                    [sum, backend.new_weight_gradient_of(x, dy)]
                };
                let dy = Input::from(&dy);
                assert_eq!(gradient(input, dy), gradient((&plain).into(), dy), "{}", what(op));
                assert_eq!(gradient(dy, input), gradient(dy, (&plain).into()), "{}", what(op));
                let square = gradient(input, input);
                assert_eq!(square, gradient((&plain).into(), (&plain).into()), "{}", what(op));
                outputs.extend(found.into_iter().chain(square));
            }
        }
        outputs
    });
}

#[test]
fn gradients_of_an_input_add_up() {
    each(|candidate| {
        let backend = &candidate.backend;
        let mut outputs = Vec::new();
        for &(tokens, inputs, features) in SHAPES {
            for dtype in [DType::F32, DType::Bf16] {
                let what = format!("{} {dtype} {tokens}x{inputs}x{features}", candidate.label);
                let stored = weight(features, inputs, dtype);
                let uploaded = backend.upload(stored.clone().into()).unwrap();
                let rounded = backend.rounds(&uploaded);
                let (gate, up) = (noise(tokens, features, 1), noise(tokens, features, 2));
                let dy = backend.swiglu_of(&gate, &up);
                let prepared = backend.swiglu_for_products(&gate, &up, rounded);
                let alone = backend.input_gradient(prepared.input(), &uploaded, None);
                let start = noise(tokens, inputs, 3);
                let sum = backend.input_gradient(prepared.input(), &uploaded, Some(start.clone()));
                let reference = Reference.upload(stored.into()).unwrap();
                let expected = Reference.input_gradient((&dy).into(), &reference, None);
                let share = if candidate.activations == Activations::Fast { 2.0f32.powi(-8) } else { 2e-6 };
                check(&what, &alone, &expected, |_| share * 0.5 * features as f32 + 1e-6);
                let expected = Reference.input_gradient((&dy).into(), &reference, Some(start.clone()));
                check(&what, &sum, &expected, |_| share * 0.5 * features as f32 + 1e-6);
                let added: Vec<f32> = alone.host().iter().zip(start.host()).map(|(a, b)| a + b).collect();
                check(&what, &sum, &Tensor::new(tokens, inputs, added), |_| 1e-6 * features as f32);
                outputs.extend([alone, sum]);
            }
        }
        outputs
    });
}

#[test]
fn heads_that_share_a_part() {
    each(|candidate| {
        let mut outputs = Vec::new();
        // The last takes more than one thread.
        for (tokens, heads, own, shared, value) in [(1, 1, 3, 2, 4), (5, 3, 7, 1, 16), (300, 6, 32, 32, 64)] {
            let what = format!("{} {tokens} tokens of {heads} heads", candidate.label);
            let (kv, both) = (noise(tokens * heads, own + value, 1), noise(tokens, shared, 2));
            let found = candidate.backend.split_heads(&kv, &both, heads, own);
            assert_eq!(found, Reference.split_heads(&kv, &both, heads, own), "{what}");
            let (dk, dv) = (noise(tokens * heads, own + shared, 3), noise(tokens * heads, value, 4));
            let back = candidate.backend.split_heads_backward(&dk, &dv, heads, own);
            assert_eq!(back, Reference.split_heads_backward(&dk, &dv, heads, own), "{what}");
            // The one is the other's transpose: <split(kv, shared), d> = <(kv, shared), back(d)>.
            let dot = |a: &Tensor, b: &Tensor| {
                a.host().iter().zip(b.host()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
            };
            let forward = dot(&found[0], &dk) + dot(&found[1], &dv);
            let backward = dot(&kv, &back[0]) + dot(&both, &back[1]);
            assert!((forward - backward).abs() < 1e-3, "{what}: {forward} {backward}");
            outputs.extend(found.into_iter().chain(back));
        }
        outputs
    });
}
