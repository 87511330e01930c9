//! What the tests share: golden cases, backends, comparisons.
#![allow(dead_code)] // Each test binary uses a part.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fourfold_kernels::backward::IGNORE;
use fourfold_kernels::{Activations, Backend, Cpu, CpuOptions, Reference, Tensor};
use fourfold_models::layers::{Dropout, Goals, Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, Model, ModelSpec, spec_from_config};
use fourfold_tensor::{DType, Dense, SourceError, TensorInfo, Weight, WeightSource};
use half::bf16;
use safetensors::{Dtype, SafeTensors};

/// A safetensors file in memory, f32 or bf16.
pub struct File {
    bytes: Vec<u8>,
    infos: Vec<TensorInfo>,
}

impl File {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let infos = SafeTensors::deserialize(&bytes)
            .unwrap()
            .iter()
            .map(|(name, t)| TensorInfo {
                name: name.to_owned(),
                shape: t.shape().to_vec(),
                storage: format!("{:?}", t.dtype()),
                bytes: t.data().len() as u64,
            })
            .collect();
        Self { bytes, infos }
    }

    fn tensor(&self, name: &str) -> Option<(Dtype, Vec<usize>, Vec<u8>)> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let t = file.tensor(name).ok()?;
        Some((t.dtype(), t.shape().to_vec(), t.data().to_vec()))
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let (dtype, _, data) = self.tensor(name).unwrap();
        assert_eq!(dtype, Dtype::F32, "{name}");
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let (dtype, _, data) = self.tensor(name).unwrap();
        assert_eq!(dtype, Dtype::I64, "{name}");
        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    }
}

impl WeightSource for File {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "golden".into(), tensor: name.to_owned() };
        let (dtype, shape, data) = self.tensor(name).ok_or_else(missing)?;
        let weight = match dtype {
            Dtype::F32 => {
                let values = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                Dense::from_f32(shape, values)
            }
            Dtype::BF16 => {
                let values =
                    data.chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect();
                Dense::new(shape, fourfold_tensor::FloatBuffer::from_f32(values, DType::Bf16))
            }
            other => panic!("{name}: {other:?}"),
        };
        Ok(weight.into())
    }
}

/// A golden case: a directory of `tests/golden`.
pub struct Case {
    pub name: String,
    pub dir: PathBuf,
    pub weights: File,
    pub ids: Vec<u32>,
    pub logits: Vec<f32>,
}

impl Case {
    pub fn open(dir: PathBuf) -> Self {
        let golden = File::read(&dir.join("golden.safetensors"));
        Self {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            weights: File::read(&dir.join("model.safetensors")),
            ids: golden.ids("input_ids"),
            logits: golden.f32("logits"),
            dir,
        }
    }

    pub fn config(&self, file: &str) -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(self.dir.join(file)).unwrap()).unwrap()
    }

    pub fn spec(&self) -> ModelSpec {
        spec_from_config(&self.config("config.json")).unwrap()
    }

    pub fn model(&self, backend: Arc<dyn Backend>) -> Model {
        Model::load(&self.spec(), &self.weights, backend, &mut |_| ()).unwrap()
    }
}

/// Every golden case, in order of name.
pub fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut dirs: Vec<PathBuf> = fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|dir| dir.join("golden.safetensors").exists());
    dirs.sort();
    assert!(dirs.len() >= 8, "golden cases are part of every checkout");
    dirs.into_iter().map(Case::open).collect()
}

/// The reference, and the CPU with exact activations.
pub fn backends() -> Vec<Arc<dyn Backend>> {
    vec![Arc::new(Reference), cpu(2)]
}

pub fn cpu(threads: usize) -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { threads, activations: Activations::F32, ..CpuOptions::default() }).unwrap())
}

/// Largest difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Not `f32::max`, which forgets NaN.
    a.iter().zip(b).fold(0.0, |worst, (x, y)| {
        let difference = (x - y).abs();
        if difference <= worst { worst } else { difference }
    })
}

/// A model with other tensors in place of some of its own, or beside them.
pub struct With<'a> {
    base: &'a dyn WeightSource,
    infos: Vec<TensorInfo>,
    weights: Vec<Weight>,
}

impl<'a> With<'a> {
    pub fn new(base: &'a dyn WeightSource) -> Self {
        Self { base, infos: Vec::new(), weights: Vec::new() }
    }

    pub fn set(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.infos.push(TensorInfo { name, shape: shape.clone(), storage: "F32".into(), bytes: 0 });
        self.weights.push(Dense::from_f32(shape, values).into());
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.load(name).unwrap().to_f32()
    }
}

impl WeightSource for With<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.iter().find(|info| info.name == name).or_else(|| self.base.info(name))
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        match self.infos.iter().position(|info| info.name == name) {
            Some(i) => Ok(self.weights[i].clone()),
            None => self.base.load(name),
        }
    }
}

/// What a training step on packed documents gives, before any update.
pub struct Step {
    /// Mean loss of the scored places.
    pub loss: f64,
    /// Outputs of the head, `[tokens, outputs]`.
    pub logits: Tensor,
    /// Of the mean loss.
    pub gradients: Gradients,
}

/// Runs documents, one after the other in `ids`, forward and backward on the reference.
pub fn train_step(
    spec: &ModelSpec,
    source: &dyn WeightSource,
    (ids, targets): (&[u32], &[u32]),
    documents: &[Range<usize>],
    trained: Trained,
) -> Step {
    train_step_with(spec, source, (ids, targets), documents, trained, None)
}

/// As [`train_step`], with dropout of adapters' inputs.
pub fn train_step_with(
    spec: &ModelSpec,
    source: &dyn WeightSource,
    (ids, targets): (&[u32], &[u32]),
    documents: &[Range<usize>],
    trained: Trained,
    dropout: Option<Dropout>,
) -> Step {
    let backend: Arc<dyn Backend> = Arc::new(Reference);
    let positions: Vec<usize> = documents.iter().flat_map(|document| 0..document.len()).collect();
    let pass = TrainPass { backend: &Reference, documents, positions: &positions, dropout };
    let embedding = Embedding::load(spec, source, &backend).unwrap();
    let head = Head::load_sharing(spec, source, &backend, &embedding).unwrap();
    let blocks: Vec<Block> = (0..spec.blocks.len()).map(|i| Block::load(spec, i, source, &backend).unwrap()).collect();
    let mut gradients = Gradients::new(trained);
    let (mut x, mut saved) = (embedding.forward(ids), Vec::new());
    for block in &blocks {
        let (y, s) = block.train_forward(x, &pass);
        saved.push(s);
        x = y;
    }
    let logits = head.logits(&head.norm(&x));
    let scored = targets.iter().filter(|&&t| t != IGNORE).count() as f32;
    let (losses, mut dx) = head.loss_backward(x, &Goals::targets(targets), 1.0 / scored, 5, &pass, &mut gradients);
    for (block, saved) in blocks.iter().zip(saved).rev() {
        dx = block.backward(saved, dx, &pass, &mut gradients);
    }
    embedding.backward(ids, &dx, &pass, &mut gradients);
    Step { loss: losses.iter().map(|&l| f64::from(l)).sum::<f64>() / f64::from(scored), logits, gradients }
}

/// Each token's successor, and nothing after the last.
pub fn next_tokens(ids: &[u32]) -> Vec<u32> {
    ids[1..].iter().copied().chain([IGNORE]).collect()
}

/// Compares a step with a `grads.json`: the loss, and each gradient by its norm and its product with the tensor.
pub fn check_gradients(case: &str, source: &dyn WeightSource, step: &mut Step, expected: &serde_json::Value) {
    let loss = step.loss;
    assert!((loss - expected["loss"].as_f64().unwrap()).abs() < 1e-4, "{case}: loss {loss}");
    let found = step.gradients.take_all();
    let expected = expected["gradients"].as_object().unwrap();
    for (tensor, values) in expected {
        let Some(gradient) = found.get(tensor) else {
            // A parameter that nothing flows into: the bias that only chooses experts.
            assert_eq!(values["norm"].as_f64().unwrap(), 0.0, "{case}: no gradient of {tensor}");
            continue;
        };
        let weight = source.load(tensor).unwrap().to_f32();
        let norm = gradient.host().iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let dot: f64 = gradient.host().iter().zip(&weight).map(|(&g, &w)| f64::from(g) * f64::from(w)).sum();
        let (norm_e, dot_e) = (values["norm"].as_f64().unwrap(), values["dot"].as_f64().unwrap());
        let size = weight.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        assert!((norm - norm_e).abs() < 1e-3 * norm_e.max(1e-3), "{case}: {tensor}: norm {norm}, {norm_e} expected");
        assert!((dot - dot_e).abs() < 1e-3 * (norm_e * size).max(1e-3), "{case}: {tensor}: {dot}, {dot_e} expected");
    }
    for tensor in found.keys() {
        assert!(expected.contains_key(tensor), "{case}: PyTorch has no gradient of {tensor}");
    }
}
