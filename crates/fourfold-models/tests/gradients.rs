//! The whole backward pass against PyTorch: loss, and norm of each tensor's gradient and its product with the tensor, as
//! transformers' models give them for the golden checkpoints.

mod support;

use std::collections::BTreeMap;
use std::ops::Range;

use fourfold_kernels::Tensor;
use fourfold_models::layers::Trained;
use fourfold_models::{FeedForward, Role};
use support::{With, check_gradients, next_tokens, train_step};

#[test]
fn gradients_are_those_of_pytorch() {
    for case in support::cases() {
        let (targets, whole) = (next_tokens(&case.ids), Range { start: 0, end: case.ids.len() });
        let mut step =
            train_step(&case.spec(), &case.weights, (&case.ids, &targets), std::slice::from_ref(&whole), Trained::All);
        check_gradients(&case.name, &case.weights, &mut step, &case.config("grads.json"));
    }
}

/// transformers' experts have no biases in every version, so these are checked against finite differences: along the gradient of a
/// router, and of the experts' own biases, the loss grows by the gradient's norm.
#[test]
fn experts_with_biases() {
    for case in support::cases().iter().filter(|case| case.name.ends_with("_moe")) {
        // No configuration asks for them.
        let mut spec = case.spec();
        for block in &mut spec.blocks {
            match &mut block.feed_forward {
                FeedForward::Mlp(mlp) => mlp.bias = true,
                FeedForward::Moe(moe) => {
                    moe.expert.bias = true;
                    moe.shared.iter_mut().for_each(|shared| shared.bias = true);
                }
            }
        }
        let mut source = With::new(&case.weights);
        for (salt, bias) in spec.weights().iter().filter(|w| w.role == Role::Bias && w.name.contains("mlp")).enumerate()
        {
            let value = |i| ((i * 7919 + salt * 104_729) % 201) as f32 / 200.0 - 0.5;
            source.set(&bias.name, &bias.shape, (0..bias.elements() as usize).map(value).collect());
        }
        let (targets, whole) = (next_tokens(&case.ids), Range { start: 0, end: case.ids.len() });
        let step = |source: &With| {
            train_step(&spec, source, (&case.ids, &targets), std::slice::from_ref(&whole), Trained::All)
        };
        let gradients = step(&source).gradients.take_all();
        let mut checked = 0;
        for (name, gradient) in &gradients {
            let is_bias = name.contains("experts") && name.ends_with("down_proj.bias");
            if !is_bias && !name.ends_with("mlp.gate.weight") {
                continue;
            }
            let norm = gradient.host().iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let shape = &spec.weights().into_iter().find(|w| w.name == *name).unwrap().shape;
            let loss = |by: f64| {
                let factor = (by / norm.max(1e-12)) as f32;
                let moved = source.values(name).iter().zip(gradient.host()).map(|(w, g)| w + factor * g).collect();
                let mut source = With::new(&source);
                source.set(name, shape, moved);
                step(&source).loss
            };
            let slope = (loss(1e-3) - loss(-1e-3)) / 2e-3;
            assert!((slope - norm).abs() < 0.02 * norm + 2e-4, "{}: {name}: {slope}, gradient {norm}", case.name);
            checked += 1;
        }
        assert!(checked > 2, "{}: {checked} tensors", case.name);
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
