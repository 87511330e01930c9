//! Training what pruning left: values, gradients and states of kept elements alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Activations, Cpu, CpuOptions, Reference};
use fourfold_models::{ConvNetSpec, WeightSpec};
use fourfold_tensor::{DType, Dense, FloatBuffer, SourceError, Sparse, SparseValues, TensorInfo, Weight, WeightSource};
use fourfold_train::checkpoint::{self, State};
use fourfold_train::network::{Network, Run};
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::random::Stream;
use fourfold_train::recipe::{Recipe, Storage};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, Trainer};
use fourfold_train::vision::{Classifier, ImageBatch};
use serde_json::json;

fn spec() -> ConvNetSpec {
    let config = json!({ "model_type": "convnet", "image_size": [2, 5, 5], "layers": [
        { "type": "conv2d", "out_channels": 6, "kernel_size": 3, "padding": 1 }, { "type": "relu" },
        { "type": "conv2d", "out_channels": 4, "kernel_size": 3, "groups": 2 }, { "type": "relu" },
        { "type": "flatten" }, { "type": "linear", "out_features": 8 }, { "type": "relu" },
        { "type": "linear", "out_features": 3 } ] });
    ConvNetSpec::from_config(&config).unwrap()
}

/// Tensors in memory.
struct Tensors(BTreeMap<String, Weight>);

impl WeightSource for Tensors {
    fn tensors(&self) -> &[TensorInfo] {
        &[]
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        Ok(self.0[name].clone())
    }
}

fn values(weight: &WeightSpec) -> Vec<f32> {
    let stream = Stream::new(3, 0, weight.name.len() as u64 + weight.elements());
    (0..weight.elements() as usize).map(|i| 0.8 * (stream.unit(i) - 0.5)).collect()
}

/// Which elements are kept: about a third.
fn keeps(weight: &WeightSpec, element: usize) -> bool {
    Stream::new(11, weight.elements(), 0).unit(element) < 0.35
}

/// The network's matrices pruned, stored as they are: `sparse`, or as zeros among the others.
fn source(sparse: bool) -> Tensors {
    let tensor = |weight: WeightSpec| {
        let mut values = values(&weight);
        if weight.shape.len() < 2 {
            return (weight.name, Dense::from_f32(weight.shape, values).into());
        }
        let (rows, cols) = (weight.shape[0], weight.shape[1..].iter().product::<usize>());
        let mut mask = vec![0u64; rows * cols.div_ceil(64)];
        for (i, value) in values.iter_mut().enumerate() {
            if keeps(&weight, i) {
                mask[i / cols * cols.div_ceil(64) + i % cols / 64] |= 1 << (i % cols % 64);
            } else {
                *value = 0.0;
            }
        }
        if !sparse {
            return (weight.name, Dense::from_f32(weight.shape, values).into());
        }
        let kept = (0..values.len()).filter(|&i| keeps(&weight, i)).map(|i| values[i]).collect();
        let kept = SparseValues::Float(FloatBuffer::from_f32(kept, DType::F32));
        (weight.name, Sparse::new(rows, cols, mask.into(), kept).unwrap().into())
    };
    Tensors(spec().weights().into_iter().map(tensor).collect())
}

fn batch() -> ImageBatch {
    let stream = Stream::new(5, 0, 0);
    ImageBatch { pixels: (0..6 * 50).map(|i| stream.word(i) as u8).collect(), labels: vec![0, 1, 2, 1, 0, 2] }
}

fn backends() -> [Arc<dyn Backward>; 2] {
    let cpu = Cpu::new(CpuOptions { threads: 2, activations: Activations::F32, ..CpuOptions::default() }).unwrap();
    [Arc::new(Reference), Arc::new(cpu)]
}

/// The mean loss and all gradients.
fn gradients(source: &Tensors, backend: &Arc<dyn Backward>) -> (f64, BTreeMap<String, Vec<f32>>) {
    let recipe = Recipe::BASELINE;
    let mut store = ParameterStore::load(&spec().weights(), source, &recipe).unwrap();
    let run = Run { backend: backend.clone(), recipe: &recipe, counts: true, dropout: None };
    let mut found = BTreeMap::new();
    let loss = Classifier::new(spec()).backward(&mut store, &batch(), 1.0 / 6.0, &run, &mut |_, gradients| {
        found.extend(gradients.take_all().into_iter().map(|(name, g)| (name, g.into_host())));
        Ok(())
    });
    (loss.unwrap() / 6.0, found)
}

#[test]
fn gradients_of_kept_elements_are_those_of_the_dense_weight_and_of_finite_differences() {
    for backend in backends() {
        let (loss, of_kept) = gradients(&source(true), &backend);
        let (dense_loss, of_all) = gradients(&source(false), &backend);
        assert!((loss - dense_loss).abs() < 1e-5, "{}: {loss} {dense_loss}", backend.name());
        for weight in spec().weights().iter().filter(|w| w.shape.len() > 1) {
            let expected: Vec<f32> = (0..weight.elements() as usize)
                .filter(|&i| keeps(weight, i))
                .map(|i| of_all[&weight.name][i])
                .collect();
            let found = &of_kept[&weight.name];
            assert_eq!(found.len(), expected.len(), "{}: kept elements alone", weight.name);
            let worst = found.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(worst < 2e-6, "{} {}: {worst}", backend.name(), weight.name);
            // The loss itself, a little to either side of the kept element with the largest gradient.
            let at = (0..found.len()).max_by(|&a, &b| found[a].abs().total_cmp(&found[b].abs())).unwrap();
            let moved = |by: f32| {
                let mut source = source(true);
                let Weight::Sparse(pruned) = &source.0[&weight.name] else { panic!("it is pruned") };
                let SparseValues::Float(values) = pruned.values() else { panic!("as floats") };
                let mut values: Vec<f32> = (0..values.len()).map(|i| values.get(i)).collect();
                values[at] += by;
                let values = SparseValues::Float(FloatBuffer::from_f32(values, DType::F32));
                let pruned = Sparse::of(Arc::clone(pruned.mask()), values).unwrap();
                source.0.insert(weight.name.clone(), pruned.into());
                gradients(&source, &backend).0
            };
            let step = 2e-3;
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            let gradient = f64::from(found[at]);
            assert!((slope - gradient).abs() < 0.02 * gradient.abs() + 1e-4, "{}: {slope} {gradient}", weight.name);
        }
    }
}

fn trainer(recipe: Recipe, source: &Tensors) -> Trainer<Classifier> {
    let store = ParameterStore::load(&spec().weights(), source, &recipe).unwrap();
    let schedule = Schedule { warmup_steps: 0, total_steps: 60, decay: Decay::Constant, floor: 1.0 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr: 1e-2,
        schedule,
        max_gradient_norm: None,
        seed: 1,
        lora_dropout: 0.0,
    };
    Trainer::new(Classifier::new(spec()), store, Arc::new(Reference), recipe, hyper, 0)
}

#[test]
fn pruned_elements_stay_away_and_take_no_memory_in_every_recipe() {
    let int8 = Recipe { name: "int8", storage: Storage::Int8, ..Recipe::QUARTER };
    for recipe in Recipe::ALL.into_iter().chain([int8]) {
        let mut of_kept = trainer(recipe, &source(true));
        let of_all = trainer(recipe, &source(false));
        let (before, (weights, states)) = (of_kept.evaluate(&batch()).unwrap().mean_loss(), of_kept.store().byte_len());
        let (dense_weights, dense_states) = of_all.store().byte_len();
        assert!(states < dense_states * 6 / 10, "{}: states {states} of {dense_states}", recipe.name);
        // The masks' rows of 64 bits weigh more here than they do over wider rows.
        assert!(weights < dense_weights, "{}: weights {weights} of {dense_weights}", recipe.name);
        (0..60).for_each(|_| assert!(!of_kept.step(&batch()).unwrap().skipped));
        let after = of_kept.evaluate(&batch()).unwrap().mean_loss();
        assert!(after < 0.75 * before, "{}: {before} to {after}", recipe.name);
        let mut moved = 0;
        for weight in spec().weights().iter().filter(|w| w.shape.len() > 1) {
            let (now, old) = (of_kept.store().load(&weight.name).unwrap().to_f32(), values(weight));
            for (i, (now, old)) in now.iter().zip(&old).enumerate() {
                assert!(keeps(weight, i) || *now == 0.0, "{} {}: element {i} came back", recipe.name, weight.name);
                moved += usize::from(keeps(weight, i) && (now - old).abs() > 1e-3);
            }
        }
        assert!(moved > 20, "{}: {moved} moved", recipe.name);
    }
}

#[test]
fn a_resumed_run_goes_on_bit_by_bit_and_another_mask_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe::QUARTER;
    let mut whole = trainer(recipe, &source(true));
    (0..3).for_each(|_| assert!(!whole.step(&batch()).unwrap().skipped));
    let place = folder.path().join("checkpoint-3");
    let mut state = State::begin(&recipe, 1);
    whole.record(&mut state);
    checkpoint::save(&place, whole.store(), &state, &|_| Ok(())).unwrap();
    let mut resumed = trainer(recipe, &source(true));
    let state = checkpoint::restore(&place, resumed.store_mut()).unwrap();
    resumed.resume(&state);
    (0..3).for_each(|_| assert_eq!(whole.step(&batch()).unwrap(), resumed.step(&batch()).unwrap()));
    assert!(whole.store().entries().zip(resumed.store().entries()).all(|((_, a), (_, b))| a == b));

    let mut other = source(true);
    let Weight::Sparse(pruned) = &other.0["5.weight"] else { panic!("it is pruned") };
    let words: Vec<u64> = pruned.mask().words().iter().rev().copied().collect();
    let moved = Sparse::new(pruned.rows(), pruned.cols(), words.into(), pruned.values().clone()).unwrap();
    other.0.insert("5.weight".into(), moved.into());
    let error = checkpoint::restore(&place, trainer(recipe, &other).store_mut()).unwrap_err().to_string();
    assert!(error.contains("5.weight") && error.contains("pruned"), "{error}");
}
