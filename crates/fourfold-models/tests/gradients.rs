//! The whole backward pass against PyTorch: loss, and norm of each tensor's gradient and its product with the tensor, as
//! transformers' models give them for the golden checkpoints.

mod support;

use std::collections::BTreeMap;
use std::ops::Range;

use fourfold_kernels::Tensor;
use fourfold_models::layers::Trained;
use support::{check_gradients, next_tokens, train_step};

#[test]
fn gradients_are_those_of_pytorch() {
    for case in support::cases() {
        let (targets, whole) = (next_tokens(&case.ids), Range { start: 0, end: case.ids.len() });
        let mut step =
            train_step(&case.spec(), &case.weights, (&case.ids, &targets), std::slice::from_ref(&whole), Trained::All);
        check_gradients(&case.name, &case.weights, &mut step, &case.config("grads.json"));
    }
}

/// Documents packed behind one another learn as if each were alone.
#[test]
fn packed_documents_do_not_see_one_another() {
    for case in support::cases() {
        let spec = case.spec();
        let step = |ids: &[u32], targets: &[u32], documents: &[Range<usize>]| {
            let mut step = train_step(&spec, &case.weights, (ids, targets), documents, Trained::All);
            (step.loss, step.gradients.take_all())
        };
        let (first, second) = case.ids.split_at(9);
        let alone = |ids: &[u32]| step(ids, &next_tokens(ids), &[Range { start: 0, end: ids.len() }]);
        let ((loss_1, found_1), (loss_2, found_2)) = (alone(first), alone(second));
        let targets: Vec<u32> = next_tokens(first).into_iter().chain(next_tokens(second)).collect();
        let (loss, found) = step(&case.ids, &targets, &[0..9, 9..case.ids.len()]);
        let (scored_1, scored_2) = (first.len() as f64 - 1.0, second.len() as f64 - 1.0);
        let mean = |a: f64, b: f64| (a * scored_1 + b * scored_2) / (scored_1 + scored_2);
        assert!((loss - mean(loss_1, loss_2)).abs() <= 1e-4, "{}: {loss}, {loss_1}, {loss_2}", case.name);
        for (name, gradient) in &found {
            let part = |found: &BTreeMap<String, Tensor>, i: usize| {
                found.get(name).map_or(0.0, |gradient| f64::from(gradient.host()[i]))
            };
            for (i, &value) in gradient.host().iter().enumerate() {
                let expected = mean(part(&found_1, i), part(&found_2, i));
                assert!((f64::from(value) - expected).abs() <= 1e-4, "{}: {name}[{i}]: {value}, {expected}", case.name);
            }
        }
        // Negative control: as one document they give another loss.
        let (joined, _) = step(&case.ids, &targets, &[Range { start: 0, end: case.ids.len() }]);
        assert!((joined - loss).abs() > 1e-4, "{}: {joined}, {loss}", case.name);
    }
}
