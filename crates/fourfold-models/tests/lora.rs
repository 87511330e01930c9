//! Adapters: the model they make is the one with `scaling · B · A` added to its weights, and their gradients are those of finite
//! differences and of the whole weights.

mod support;

use std::sync::Arc;

use fourfold_kernels::{KvDtype, Reference};
use fourfold_models::layers::{Dropout, Gradients, LORA_A, LORA_B, LORA_SCALING, LoraSpec, Trained};
use fourfold_models::{Model, ModelSpec};
use fourfold_tensor::WeightSource;
use support::With;

const LORA: LoraSpec = LoraSpec { rank: 3, alpha: 6.0, targets: Vec::new() };

/// Some numbers between -0.1 and 0.1.
fn values(len: usize, salt: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + salt * 104_729) % 201) as f32 / 1000.0 - 0.1).collect()
}

fn adapted<'a>(spec: &ModelSpec, base: &'a dyn WeightSource) -> With<'a> {
    moved(spec, base, 0.0)
}

/// With adapters some way along a direction of their own.
fn moved<'a>(spec: &ModelSpec, base: &'a dyn WeightSource, by: f32) -> With<'a> {
    let mut source = With::new(base);
    for (salt, weight) in LORA.weights(spec).iter().enumerate() {
        let mut at = values(weight.elements() as usize, salt);
        at.iter_mut().zip(values(weight.elements() as usize, salt + 50)).for_each(|(v, d)| *v += by * d);
        source.set(&weight.name, &weight.shape, at);
        if let Some(stem) = weight.name.strip_suffix(LORA_A) {
            source.set(&format!("{stem}{LORA_SCALING}"), &[1], vec![LORA.scaling()]);
        }
    }
    source
}

/// The model with the adapters' products in its weights.
fn merged<'a>(spec: &ModelSpec, adapted: &With, base: &'a dyn WeightSource) -> With<'a> {
    let mut source = With::new(base);
    for weight in LORA.weights(spec) {
        let Some(stem) = weight.name.strip_suffix(LORA_A) else { continue };
        let (a, b) = (adapted.values(&weight.name), adapted.values(&format!("{stem}{LORA_B}")));
        let name = format!("{stem}.weight");
        let (mut w, cols) = (base.load(&name).unwrap().to_f32(), weight.shape[1]);
        for (i, w) in w.iter_mut().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let product: f32 = (0..LORA.rank).map(|k| b[row * LORA.rank + k] * a[k * cols + col]).sum();
            *w += LORA.scaling() * product;
        }
        let rows = w.len() / cols;
        source.set(&name, &[rows, cols], w);
    }
    source
}

/// Gradients of the mean loss over the tokens.
fn gradients(spec: &ModelSpec, source: &With, ids: &[u32], trained: Trained) -> Gradients {
    let documents = [std::ops::Range { start: 0, end: ids.len() }];
    support::train_step(spec, source, (ids, &support::next_tokens(ids)), &documents, trained).gradients
}

#[test]
fn an_adapted_model_is_the_merged_one() {
    for case in support::cases() {
        let spec = case.spec();
        let adapted = adapted(&spec, &case.weights);
        let merged = merged(&spec, &adapted, &case.weights);
        let logits = |source: &dyn WeightSource| {
            let model = Model::load(&spec, source, Arc::new(Reference), &mut |_| {}).unwrap();
            let mut cache = model.new_cache(KvDtype::F32);
            // Two parts, so that latent attention runs in both of its forms.
            let (first, second) = case.ids.split_at(9);
            model.hidden(first, &mut cache);
            let hidden = model.hidden(second, &mut cache);
            model.logits(&hidden).into_host()
        };
        let difference = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0f32, |most, (x, y)| most.max((x - y).abs()));
        let (with, without) = (logits(&adapted), logits(&case.weights));
        let error = difference(&with, &logits(&merged));
        let effect = difference(&with, &without);
        assert!(effect > 1e-3 && error < 0.01 * effect, "{}: {error}, the adapter's effect {effect}", case.name);
    }
}

#[test]
fn adapter_gradients_are_those_of_the_weights_and_nothing_else_is_computed() {
    for case in support::cases() {
        let spec = case.spec();
        let adapted = adapted(&spec, &case.weights);
        let names = LORA.weights(&spec).into_iter().map(|w| w.name).collect();
        let mut found = gradients(&spec, &adapted, &case.ids, Trained::Only(names));
        let mut whole = gradients(&spec, &merged(&spec, &adapted, &case.weights), &case.ids, Trained::All);
        let (found, whole) = (found.take_all(), whole.take_all());
        assert!(found.keys().all(|name| name.ends_with(LORA_A) || name.ends_with(LORA_B)), "{}", case.name);
        let mut checked = 0;
        for (name, da) in found.iter().filter(|(name, _)| name.ends_with(LORA_A)) {
            let stem = name.strip_suffix(LORA_A).unwrap();
            let (dw, db) = (&whole[&format!("{stem}.weight")], &found[&format!("{stem}{LORA_B}")]);
            let (a, b) = (adapted.values(name), adapted.values(&format!("{stem}{LORA_B}")));
            let (rows, cols, scaling) = (dw.rows(), dw.cols(), LORA.scaling());
            let size = dw.host().iter().fold(0.0f32, |most, d| most.max(d.abs()));
            // The chain rule through W + scaling · B · A.
            for k in 0..LORA.rank {
                for col in 0..cols {
                    let sum: f32 = (0..rows).map(|row| b[row * LORA.rank + k] * dw.row(row)[col]).sum();
                    assert!((da.row(k)[col] - scaling * sum).abs() < 1e-2 * size.max(1e-4), "{}: {name}", case.name);
                }
                for row in 0..rows {
                    let sum: f32 = (0..cols).map(|col| a[k * cols + col] * dw.row(row)[col]).sum();
                    assert!((db.row(row)[k] - scaling * sum).abs() < 1e-2 * size.max(1e-4), "{}: {stem} B", case.name);
                }
            }
            checked += 1;
        }
        assert!(checked > 0, "{}", case.name);
    }
}

/// The slope of the loss along some direction is the gradients' product with it, with elements of every adapter's input dropped; and with
/// the same key the same ones are.
#[test]
fn gradients_with_dropout_are_those_of_finite_differences() {
    for case in support::cases() {
        let spec = case.spec();
        let names: Vec<String> = LORA.weights(&spec).into_iter().map(|w| w.name).collect();
        let (ids, targets) = (&case.ids, support::next_tokens(&case.ids));
        let documents = [0..9, 9..ids.len()];
        let step = |source: &With, dropout: Option<Dropout>| {
            let trained = Trained::Only(names.iter().cloned().collect());
            support::train_step_with(&spec, source, (ids, &targets), &documents, trained, dropout)
        };
        let moved = |by: f32| moved(&spec, &case.weights, by);
        let dropout = Dropout::new(0.3, 11);
        let mut here = step(&moved(0.0), dropout);
        assert_eq!(here.loss, step(&moved(0.0), dropout).loss, "{}", case.name);
        assert_ne!(here.loss, step(&moved(0.0), Dropout::new(0.3, 12)).loss, "{}", case.name);
        assert_ne!(here.loss, step(&moved(0.0), None).loss, "{}", case.name);
        let found = here.gradients.take_all();
        let slope: f64 = LORA
            .weights(&spec)
            .iter()
            .enumerate()
            .filter_map(|(salt, weight)| {
                let gradient = found.get(&weight.name)?.host();
                let towards = values(gradient.len(), salt + 50);
                Some(gradient.iter().zip(towards).map(|(&g, d)| f64::from(g) * f64::from(d)).sum::<f64>())
            })
            .sum();
        let by = 0.002;
        let measured = (step(&moved(by), dropout).loss - step(&moved(-by), dropout).loss) / (2.0 * f64::from(by));
        assert!(
            (slope - measured).abs() < 0.02 * measured.abs().max(0.01),
            "{}: {slope}, {measured} measured",
            case.name
        );
    }
}
