//! The whole backward pass against PyTorch: loss, and norm of each tensor's gradient and its product with the tensor, as
//! transformers' models give them for the golden checkpoints.

mod support;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fourfold_kernels::backward::{Backward, IGNORE};
use fourfold_kernels::{Backend, Reference, Tensor};
use fourfold_models::layers::{Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, spec_from_config};
use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSource};
use safetensors::SafeTensors;
use serde_json::Value;

/// A golden checkpoint in memory.
struct Golden {
    infos: Vec<TensorInfo>,
    weights: Vec<Weight>,
}

impl WeightSource for Golden {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "golden".into(), tensor: name.to_owned() };
        let i = self.infos.iter().position(|info| info.name == name).ok_or_else(missing)?;
        Ok(self.weights[i].clone())
    }
}

fn read(path: &Path) -> Golden {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut golden = Golden { infos: Vec::new(), weights: Vec::new() };
    for (name, view) in file.tensors() {
        let values: Vec<f32> = match view.dtype() {
            safetensors::Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            safetensors::Dtype::I64 => {
                view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            other => panic!("{name}: {other:?}"),
        };
        let shape = view.shape().to_vec();
        let bytes = view.data().len() as u64;
        golden.infos.push(TensorInfo { name, shape: shape.clone(), storage: "F32".into(), bytes });
        golden.weights.push(Dense::from_f32(shape, values).into());
    }
    golden
}

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|case| case.join("grads.json").exists());
    cases.sort();
    assert!(cases.len() >= 8, "{cases:?}");
    cases
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn gradients_are_those_of_pytorch() {
    for case in cases() {
        let spec = spec_from_config(&json(&case.join("config.json"))).unwrap();
        let source = read(&case.join("model.safetensors"));
        let ids: Vec<u32> = read(&case.join("golden.safetensors"))
            .load("input_ids")
            .unwrap()
            .to_f32()
            .iter()
            .map(|&id| id as u32)
            .collect();
        let expected = json(&case.join("grads.json"));

        let backend: Arc<dyn Backend> = Arc::new(Reference);
        let embedding = Embedding::load(&spec, &source, &backend).unwrap();
        let head = Head::load_sharing(&spec, &source, &backend, &embedding).unwrap();
        let blocks: Vec<Block> =
            (0..spec.blocks.len()).map(|i| Block::load(&spec, i, &source, &backend).unwrap()).collect();
        let trained: &dyn Backward = &Reference;
        let positions: Vec<usize> = (0..ids.len()).collect();
        let documents = std::slice::from_ref(&(0..ids.len())).to_vec();
        let pass = TrainPass { backend: trained, documents: &documents, positions: &positions };
        let mut gradients = Gradients::new(Trained::All);

        let mut x = embedding.forward(&ids);
        let mut saved = Vec::new();
        for block in &blocks {
            let (y, s) = block.train_forward(x, &pass);
            saved.push(s);
            x = y;
        }
        let mut targets = ids[1..].to_vec();
        targets.push(IGNORE);
        let scored = (ids.len() - 1) as f32;
        let (losses, mut dx) = head.loss_backward(&x, &targets, 1.0 / scored, 7, &pass, &mut gradients);
        for (block, saved) in blocks.iter().zip(saved).rev() {
            dx = block.backward(saved, dx, &pass, &mut gradients);
        }
        embedding.backward(&ids, &dx, &pass, &mut gradients);

        let loss = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / f64::from(scored);
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        assert!((loss - expected["loss"].as_f64().unwrap()).abs() < 1e-4, "{name}: loss {loss}");
        let found = gradients.take_all();
        let expected = expected["gradients"].as_object().unwrap();
        for (tensor, values) in expected {
            let Some(gradient) = found.get(tensor) else {
                // A parameter that nothing flows into: the bias that only chooses experts.
                assert_eq!(values["norm"].as_f64().unwrap(), 0.0, "{name}: no gradient of {tensor}");
                continue;
            };
            let weight = source.load(tensor).unwrap().to_f32();
            let norm = gradient.host().iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let dot: f64 = gradient.host().iter().zip(&weight).map(|(&g, &w)| f64::from(g) * f64::from(w)).sum();
            let (norm_e, dot_e) = (values["norm"].as_f64().unwrap(), values["dot"].as_f64().unwrap());
            let size = weight.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
            assert!(
                (norm - norm_e).abs() < 1e-3 * norm_e.max(1e-3),
                "{name}: {tensor}: norm {norm}, {norm_e} expected"
            );
            assert!(
                (dot - dot_e).abs() < 1e-3 * (norm_e * size).max(1e-3),
                "{name}: {tensor}: {dot}, {dot_e} expected"
            );
        }
        for tensor in found.keys() {
            assert!(expected.contains_key(tensor), "{name}: PyTorch has no gradient of {tensor}");
        }
    }
}

/// Mean loss and gradients of packed documents.
fn step(model: &Parts, ids: &[u32], targets: &[u32], documents: &[Range<usize>]) -> (f64, BTreeMap<String, Tensor>) {
    let positions: Vec<usize> = documents.iter().flat_map(|document| 0..document.len()).collect();
    let pass = TrainPass { backend: &Reference, documents, positions: &positions };
    let mut gradients = Gradients::new(Trained::All);
    let mut x = model.embedding.forward(ids);
    let mut saved = Vec::new();
    for block in &model.blocks {
        let (y, s) = block.train_forward(x, &pass);
        saved.push(s);
        x = y;
    }
    let scored = targets.iter().filter(|&&t| t != IGNORE).count() as f32;
    let (losses, mut dx) = model.head.loss_backward(&x, targets, 1.0 / scored, 5, &pass, &mut gradients);
    for (block, saved) in model.blocks.iter().zip(saved).rev() {
        dx = block.backward(saved, dx, &pass, &mut gradients);
    }
    model.embedding.backward(ids, &dx, &pass, &mut gradients);
    (losses.iter().map(|&l| f64::from(l)).sum::<f64>() / f64::from(scored), gradients.take_all())
}

struct Parts {
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
}

fn next_tokens(ids: &[u32]) -> Vec<u32> {
    ids[1..].iter().copied().chain([IGNORE]).collect()
}

/// Documents packed behind one another learn as if each were alone.
#[test]
fn packed_documents_do_not_see_one_another() {
    for case in support::cases() {
        let (spec, backend): (_, Arc<dyn Backend>) = (case.spec(), Arc::new(Reference));
        let embedding = Embedding::load(&spec, &case.weights, &backend).unwrap();
        let head = Head::load_sharing(&spec, &case.weights, &backend, &embedding).unwrap();
        let blocks = (0..spec.blocks.len()).map(|i| Block::load(&spec, i, &case.weights, &backend).unwrap()).collect();
        let model = Parts { embedding, blocks, head };
        let (first, second) = case.ids.split_at(9);
        let alone = |ids: &[u32]| step(&model, ids, &next_tokens(ids), &[Range { start: 0, end: ids.len() }]);
        let ((loss_1, found_1), (loss_2, found_2)) = (alone(first), alone(second));
        let targets: Vec<u32> = next_tokens(first).into_iter().chain(next_tokens(second)).collect();
        let (loss, found) = step(&model, &case.ids, &targets, &[0..9, 9..case.ids.len()]);
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
        let (joined, _) = step(&model, &case.ids, &targets, &[Range { start: 0, end: case.ids.len() }]);
        assert!((joined - loss).abs() > 1e-4, "{}: {joined}, {loss}", case.name);
    }
}
