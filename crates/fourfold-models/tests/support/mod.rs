//! What the tests share: golden cases, backends, comparisons.
#![allow(dead_code)] // Each test binary uses a part.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fourfold_kernels::{Activations, Backend, Cpu, CpuOptions, Reference};
use fourfold_models::{Model, ModelSpec, spec_from_config};
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
    Arc::new(Cpu::new(CpuOptions { threads, isa: None, activations: Activations::F32 }).unwrap())
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
