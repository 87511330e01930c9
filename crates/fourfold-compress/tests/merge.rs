//! Adapters put into weights: what is stored is W + scaling · B · A, in each form.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_compress::merge::{Merged, Packed};
use fourfold_compress::methods::quantize::grid::{Granularity, GridSpec, Levels, ScaleFormat, ZeroKind};
use fourfold_compress::methods::quantize::rtn::Rtn;
use fourfold_compress::methods::{Method, Stats};
use fourfold_models::layers::{LORA_A, LORA_B, LORA_SCALING, LoraSpec};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::{DType, Dense, FloatBuffer, Form, SourceError, TensorInfo, Weight, WeightSource};
use serde_json::json;

const SCALING: f32 = 0.5;

/// Weights by name.
struct Stored(BTreeMap<String, Weight>, Vec<TensorInfo>);

impl Stored {
    fn new(weights: BTreeMap<String, Weight>) -> Self {
        let info = |(name, weight): (&String, &Weight)| {
            let (shape, bytes) = (weight.shape(), weight.byte_len() as u64);
            TensorInfo { name: name.clone(), shape, storage: weight.describe(), bytes }
        };
        let infos = weights.iter().map(info).collect();
        Self(weights, infos)
    }
}

impl WeightSource for Stored {
    fn tensors(&self) -> &[TensorInfo] {
        &self.1
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "memory".into(), tensor: name.into() };
        self.0.get(name).cloned().ok_or_else(missing)
    }
}

fn spec() -> ModelSpec {
    let config = json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu"
    });
    spec_from_config(&config).unwrap()
}

/// A model whose projections are stored by `store`, with random adapters of rank 3 on q_proj and down_proj.
fn adapted(spec: &ModelSpec, store: &dyn Fn(Weight) -> Weight) -> Arc<dyn WeightSource> {
    let random = RandomWeights::new(spec, 3);
    let mut weights = BTreeMap::new();
    for weight in spec.weights() {
        let dense = random.load(&weight.name).unwrap();
        let is_projection = weight.name.contains("_proj");
        weights.insert(weight.name, if is_projection { store(dense) } else { dense });
    }
    let lora = LoraSpec { rank: 3, alpha: 1.5, targets: vec!["q_proj".into(), "down_proj".into()] };
    for (i, weight) in lora.weights(spec).into_iter().enumerate() {
        let values = (0..weight.elements()).map(|k| ((k * 7 + i as u64 * 3) % 11) as f32 * 0.1 - 0.5).collect();
        let dense = Dense::new(weight.shape, FloatBuffer::F32(Vec::<f32>::into(values)));
        if let Some(stem) = weight.name.strip_suffix(LORA_A) {
            weights.insert(format!("{stem}{LORA_SCALING}"), Dense::from_f32(vec![1], vec![SCALING]).into());
        }
        weights.insert(weight.name, dense.into());
    }
    Arc::new(Stored::new(weights))
}

/// W + scaling · B · A as the words say it.
fn expected(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    let stem = name.strip_suffix(".weight").unwrap();
    let (w, a, b) =
        (source.load(name).unwrap(), source.load(&format!("{stem}{LORA_A}")), source.load(&format!("{stem}{LORA_B}")));
    let (Ok(a), Ok(b)) = (a, b) else { return w.to_f32() };
    let (rows, cols, rank) = (w.rows(), w.cols(), a.rows());
    let (w, a, b) = (w.to_f32(), a.to_f32(), b.to_f32());
    let product = |r: usize, c: usize| (0..rank).map(|k| b[r * rank + k] * a[k * cols + c]).sum::<f32>();
    (0..rows * cols).map(|i| w[i] + SCALING * product(i / cols, i % cols)).collect()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

const NAMES: [&str; 3] = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
];

#[test]
fn dense_weights_take_the_product_in_and_keep_their_type() {
    let spec = spec();
    for (dtype, bound) in [(DType::F32, 1e-6), (DType::Bf16, 4e-3)] {
        let store = |w: Weight| Dense::new(w.shape(), FloatBuffer::from_f32(w.to_f32(), dtype)).into();
        let source = adapted(&spec, &store);
        let merged = Merged::new(source.clone(), Packed::Requantize);
        for name in NAMES {
            let weight = merged.load(name).unwrap();
            assert!(matches!(&weight, Weight::Dense(dense) if dense.dtype() == dtype));
            let far = furthest(&weight.to_f32(), &expected(&*source, name));
            assert!(far <= bound, "{name}: {far}");
            // Without the adapter it is much further, where there is one.
            let change = furthest(&source.load(name).unwrap().to_f32(), &expected(&*source, name));
            assert_eq!(change > 4.0 * bound, merged.has_adapter(name), "{name}: {change}");
        }
        let plan = merged.plan(&spec, true).unwrap();
        assert!(plan.tensors.iter().all(|entry| entry.method == "keep"));
        assert!(merged.tensors().iter().all(|info| !info.name.contains("lora_")));
    }
}

#[test]
fn packed_weights_keep_their_codes_beside_the_factors_or_their_grid() {
    let spec = spec();
    let grids = [
        GridSpec::new(4, Granularity::Group(16)),
        GridSpec { zero: ZeroKind::ZeroPoint, ..GridSpec::new(3, Granularity::Channel) },
        GridSpec { zero: ZeroKind::Min, ..GridSpec::new(5, Granularity::Group(32)) },
        GridSpec { levels: Levels::Learned, scales: ScaleFormat::Double, ..GridSpec::new(4, Granularity::Group(16)) },
        GridSpec { scales: ScaleFormat::F32, ..GridSpec::new(8, Granularity::Tensor) },
    ];
    for grid in grids {
        let store = |w: Weight| Rtn { grid }.compress(&w, Stats::default()).unwrap().weight;
        let source = adapted(&spec, &store);
        let sums = Merged::new(source.clone(), Packed::Sum);
        let dense = Merged::new(source.clone(), Packed::Requantize);
        for name in NAMES {
            let (base, expected) = (source.load(name).unwrap(), expected(&*source, name));
            let sum = sums.load(name).unwrap();
            if sums.has_adapter(name) {
                assert!(matches!(&sum, Weight::Sum(sum) if sum.terms()[0] == base));
            }
            // The factors are rounded to bf16.
            assert!(furthest(&sum.to_f32(), &expected) < 6e-3, "{name}");
            let merged = dense.load(name).unwrap();
            assert!(furthest(&merged.to_f32(), &expected) < 1e-6);
            // The plan rounds it to the base's own grid.
            let plan = dense.plan(&spec, false).unwrap();
            let entry = plan.tensors.iter().find(|entry| entry.name == name).unwrap();
            assert_eq!(entry.method == "rtn", dense.has_adapter(name));
            let again = entry.method().unwrap().compress(&merged, Stats::default()).unwrap().weight;
            assert_eq!(Form::of(&again), Form::of(&base), "{name} on {}", grid.describe());
        }
        let kept = sums.plan(&spec, true).unwrap();
        assert!(kept.tensors.iter().all(|entry| entry.method == "keep"));
        let gptq = dense.plan(&spec, true).unwrap();
        assert_eq!(gptq.tensors.iter().filter(|entry| entry.method == "gptq").count(), 2);
    }
}

#[test]
fn an_adapter_of_another_shape_is_refused() {
    let spec = spec();
    let source = adapted(&spec, &|weight| weight);
    let mut weights: BTreeMap<String, Weight> =
        source.tensors().iter().map(|info| (info.name.clone(), source.load(&info.name).unwrap())).collect();
    weights.insert(
        "model.layers.0.self_attn.q_proj.lora_A.weight".into(),
        Dense::from_f32(vec![3, 31], vec![0.1; 93]).into(),
    );
    let merged = Merged::new(Arc::new(Stored::new(weights)), Packed::Sum);
    let error = merged.load(NAMES[0]).unwrap_err().to_string();
    assert!(error.contains("q_proj.lora_A.weight") && error.contains("[32, 32]"), "{error}");
}
