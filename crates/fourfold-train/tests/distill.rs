//! Learning from a teacher, and the scales of packed weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::backward::{Backward, SoftTargets};
use fourfold_kernels::{Activations, Cpu, CpuOptions, Reference};
use fourfold_models::{ModelSpec, WeightSpec, spec_from_config};
use fourfold_tensor::{
    DType, Dense, Double, FloatBuffer, Form, Offsets, Quantized, Scales, SourceError, TensorInfo, Weight, WeightSource,
    pack_row, packed_words_per_row,
};
use fourfold_train::batch::Batch;
use fourfold_train::checkpoint::{self, State};
use fourfold_train::distill::Teacher;
use fourfold_train::language::LanguageModel;
use fourfold_train::network::{Network, Run};
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::random::Stream;
use fourfold_train::recipe::Recipe;
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::{ParameterStore, Tune};
use fourfold_train::trainer::{Hyperparameters, Trainer};
use serde_json::json;

fn spec(hidden: usize, vocabulary: u32, tied: bool) -> ModelSpec {
    spec_from_config(&json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": tied,
        "hidden_act": "silu"
    }))
    .unwrap()
}

const VOCABULARY: u32 = 20;

fn batch(number: u64) -> Batch {
    let tokens: Vec<u32> = (0..17).map(|i| Stream::new(4, number, 0).word(i) % VOCABULARY).collect();
    Batch::from_sequences([&tokens[..7], &tokens[6..]])
}

/// Tensors in memory.
struct Tensors {
    infos: Vec<TensorInfo>,
    weights: BTreeMap<String, Weight>,
}

impl Tensors {
    fn new(weights: impl Iterator<Item = (String, Weight)>) -> Arc<Self> {
        let weights: BTreeMap<String, Weight> = weights.collect();
        let info = |(name, w): (&String, &Weight)| TensorInfo {
            name: name.clone(),
            shape: w.shape(),
            storage: w.describe(),
            bytes: w.byte_len() as u64,
        };
        Arc::new(Self { infos: weights.iter().map(info).collect(), weights })
    }
}

impl WeightSource for Tensors {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "memory".into(), tensor: name.to_owned() };
        self.weights.get(name).cloned().ok_or_else(missing)
    }
}

fn values(weight: &WeightSpec, seed: u64) -> Vec<f32> {
    let name = weight.name.bytes().fold(seed, |hash, b| hash.wrapping_mul(31).wrapping_add(u64::from(b)));
    let stream = Stream::new(name, 0, 0);
    let (middle, width) = if weight.shape.len() == 1 { (0.9, 0.4) } else { (0.0, 0.9) };
    (0..weight.elements() as usize).map(|i| middle + width * (stream.unit(i) - 0.5)).collect()
}

fn dense(spec: &ModelSpec, seed: u64) -> Arc<Tensors> {
    Tensors::new(spec.weights().into_iter().map(|w| {
        let weight = Dense::from_f32(w.shape.clone(), values(&w, seed)).into();
        (w.name, weight)
    }))
}

/// The same model with matrices of three bits, in three ways in turn: one scale a group, offsets besides, scales of one byte.
fn packed(spec: &ModelSpec, seed: u64, floats: DType) -> Arc<Tensors> {
    const GROUP: usize = 5;
    Tensors::new(spec.weights().into_iter().enumerate().map(|(i, w)| {
        let values = values(&w, seed);
        if w.shape.len() == 1 {
            return (w.name, Dense::new(w.shape, FloatBuffer::from_f32(values, floats)).into());
        }
        let (rows, cols) = (w.shape[0], w.shape[1]);
        let with_offsets = i % 3 == 1;
        let (mut packed, mut scales, mut mins) = (Vec::new(), Vec::new(), Vec::new());
        for row in values.chunks(cols) {
            let mut codes = Vec::new();
            for group in row.chunks(GROUP) {
                let most = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let scale = most / 3.5;
                codes.extend(group.iter().map(|v| (v / scale + 4.0).round().clamp(0.0, 7.0) as u8));
                scales.push(scale);
                mins.push(4.1 * scale);
            }
            let mut words = vec![0; packed_words_per_row(cols, 3)];
            pack_row(&codes, 3, &mut words);
            packed.extend(words);
        }
        let groups = cols.div_ceil(GROUP);
        let scales = if i % 3 == 2 {
            let most: Vec<f32> =
                scales.chunks(groups).map(|row| row.iter().fold(0.0f32, |m, v| m.max(*v)) / 255.0).collect();
            let codes = scales.iter().enumerate().map(|(i, s)| (s / most[i / groups]).round() as u8).collect();
            Scales::Double(Double::by_row(FloatBuffer::from_f32(most, floats), codes, groups))
        } else {
            Scales::Float(FloatBuffer::from_f32(scales, floats))
        };
        let offsets = if with_offsets { Offsets::Min(FloatBuffer::from_f32(mins, floats)) } else { Offsets::Symmetric };
        let packed = packed.into();
        let weight =
            Quantized { rows, cols, bits: 3, group_size: GROUP, packed, scales, offsets, codebook: None, g_idx: None };
        weight.validate().unwrap();
        (w.name, weight.into())
    }))
}

const SOFT: SoftTargets = SoftTargets { temperature: 1.0, weight: 1.0 };

fn trainer(network: LanguageModel, store: ParameterStore, recipe: Recipe, lr: f64) -> Trainer<LanguageModel> {
    let schedule = Schedule { warmup_steps: 0, total_steps: 100, decay: Decay::Constant, floor: 1.0 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr,
        schedule,
        max_gradient_norm: None,
        seed: 3,
        lora_dropout: 0.0,
    };
    Trainer::new(network, store, Arc::new(Reference), recipe, hyper, 0)
}

#[test]
fn a_student_learns_its_teacher_and_a_model_is_its_own_perfect_student() {
    // A wider teacher, of the same vocabulary.
    let (small, large) = (spec(16, VOCABULARY, true), spec(24, VOCABULARY, false));
    for recipe in [Recipe::BASELINE, Recipe::QUARTER] {
        for soft in [SOFT, SoftTargets { temperature: 2.0, weight: 0.7 }] {
            let network =
                LanguageModel::new(small.clone()).taught(Some(Teacher::new(large.clone(), dense(&large, 1), soft)));
            let store = ParameterStore::load(&small.weights(), &*dense(&small, 2), &recipe).unwrap();
            let mut student = trainer(network, store, recipe, 1e-2);
            let before = student.evaluate(&batch(0)).unwrap();
            let plain = ParameterStore::load(&small.weights(), &*dense(&small, 2), &recipe).unwrap();
            let plain = trainer(LanguageModel::new(small.clone()), plain, recipe, 1e-2).evaluate(&batch(0)).unwrap();
            assert_eq!(plain.cross_entropy, None);
            assert!((before.cross_entropy.unwrap() - plain.loss).abs() < 1e-4 && before.correct == plain.correct);
            let first = student.step(&batch(0)).unwrap();
            assert!((first.loss - before.mean_loss()).abs() < 1e-4, "{first:?} {before:?}");
            (0..60).for_each(|_| assert!(!student.step(&batch(0)).unwrap().skipped));
            let after = student.evaluate(&batch(0)).unwrap().mean_loss();
            assert!(after < 0.6 * before.mean_loss(), "{} {soft:?}: {} to {after}", recipe.name, before.mean_loss());
        }
        let network =
            LanguageModel::new(small.clone()).taught(Some(Teacher::new(small.clone(), dense(&small, 2), SOFT)));
        let store = ParameterStore::load(&small.weights(), &*dense(&small, 2), &Recipe::BASELINE).unwrap();
        let itself = trainer(network, store, Recipe::BASELINE, 1e-2).evaluate(&batch(0)).unwrap();
        // The teacher's hidden rows are kept in bf16.
        assert!(itself.mean_loss() < 2e-5, "{itself:?}");
    }
    let other = spec(16, VOCABULARY + 1, true);
    let network = LanguageModel::new(small.clone()).taught(Some(Teacher::new(other.clone(), dense(&other, 1), SOFT)));
    let store = ParameterStore::load(&small.weights(), &*dense(&small, 2), &Recipe::QUARTER).unwrap();
    let error = trainer(network, store, Recipe::QUARTER, 1e-2).step(&batch(0)).unwrap_err().to_string();
    assert!(error.contains("21 outputs") && error.contains("20"), "{error}");
}

/// The mean loss and the gradients of what is trained.
fn gradients(
    network: &LanguageModel,
    store: &mut ParameterStore,
    backend: &Arc<dyn Backward>,
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let batch = batch(0);
    let scored = batch.targets.iter().filter(|&&t| t < VOCABULARY).count() as f32;
    // Blocks are run anew, so that several parts of a tensor's gradient are added up.
    let recipe = Recipe { recompute: true, block_tokens: 8, loss_chunk: 5, ..Recipe::BASELINE };
    let run = Run { backend: backend.clone(), recipe: &recipe, counts: true, dropout: None };
    let mut found = BTreeMap::new();
    let loss = network.backward(store, &batch, 1.0 / scored, &run, &mut |_, gradients| {
        found.extend(gradients.take_all().into_iter().map(|(name, g)| (name, g.into_host())));
        Ok(())
    });
    (loss.unwrap() / f64::from(scored), found)
}

#[test]
fn gradients_of_scales_offsets_norms_and_biases_are_finite_differences() {
    let cpu = Cpu::new(CpuOptions { threads: 2, activations: Activations::F32, ..CpuOptions::default() }).unwrap();
    let backends: [Arc<dyn Backward>; 2] = [Arc::new(Reference), Arc::new(cpu)];
    for (backend, tied) in backends.iter().zip([true, false]) {
        let spec = spec(16, VOCABULARY, tied);
        let teacher = Teacher::new(spec.clone(), dense(&spec, 1), SoftTargets { temperature: 1.5, weight: 0.8 });
        let network = LanguageModel::new(spec.clone()).taught(Some(teacher));
        let base = packed(&spec, 1, DType::F32);
        let store = || ParameterStore::tune(&spec, base.clone(), Tune::Scales, &Recipe::BASELINE).unwrap();
        let (_, found) = gradients(&network, &mut store(), backend);
        assert_eq!(found.len(), spec.weights().len(), "every tensor has something to learn");
        for (name, gradient) in &found {
            let at = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
            let moved = |by: f32| {
                let mut store = store();
                for (info, entry) in store.entries_mut().filter(|(info, _)| info.name == *name) {
                    assert_eq!(entry.parameter.len(), gradient.len(), "{}", info.name);
                    let mut numbers = vec![0.0; gradient.len()];
                    let mut blocks = entry.parameter.blocks(gradient.len().next_multiple_of(128));
                    blocks[0].read(&mut numbers);
                    numbers[at] += by;
                    blocks[0].write(&numbers, None, 0);
                }
                gradients(&network, &mut store, backend).0
            };
            let step = 4e-3;
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            let gradient = f64::from(gradient[at]);
            assert!(gradient != 0.0, "{name}");
            assert!(
                (slope - gradient).abs() < 0.03 * gradient.abs() + 1e-4,
                "{} {name}: {slope} {gradient}",
                backend.name()
            );
        }
    }
}

fn tuned(spec: &ModelSpec, tune: Tune) -> Trainer<LanguageModel> {
    let network = LanguageModel::new(spec.clone()).taught(Some(Teacher::new(spec.clone(), dense(spec, 1), SOFT)));
    let store = ParameterStore::tune(spec, packed(spec, 1, DType::F16), tune, &Recipe::QUARTER).unwrap();
    trainer(network, store, Recipe::QUARTER, 5e-3)
}

#[test]
fn scales_learn_what_packing_lost_and_codes_and_bytes_stay() {
    let spec = spec(16, VOCABULARY, true);
    let mut lowest = f64::INFINITY;
    for tune in [Tune::Norms, Tune::Scales] {
        let mut trainer = tuned(&spec, tune);
        let before = trainer.evaluate(&batch(0)).unwrap().mean_loss();
        (0..60).for_each(|_| assert!(!trainer.step_accumulated(&[batch(0), batch(0)]).unwrap().skipped));
        let after = trainer.evaluate(&batch(0)).unwrap().mean_loss();
        assert!(after < 0.8 * before && after < lowest, "{tune:?}: {before} to {after}, others {lowest}");
        lowest = after;
        let base = packed(&spec, 1, DType::F16);
        let mut changed = 0;
        for weight in spec.weights() {
            let (was, is) = (base.load(&weight.name).unwrap(), trainer.store().load(&weight.name).unwrap());
            assert_eq!((Form::of(&was), was.byte_len()), (Form::of(&is), is.byte_len()), "{}", weight.name);
            changed += usize::from(was != is);
            if let (Weight::Quantized(was), Weight::Quantized(is)) = (&was, &is) {
                assert_eq!(was.packed, is.packed, "{}: codes", weight.name);
            }
        }
        let vectors = spec.weights().iter().filter(|w| w.shape.len() == 1).count();
        assert_eq!(changed, if tune == Tune::Norms { vectors } else { spec.weights().len() });
        let (weights, states) = trainer.store().byte_len();
        assert_eq!(states, 2 * weights, "f32 numbers, two f32 moments");
    }
}

#[test]
fn tuned_and_distilled_runs_resume_bit_by_bit_and_know_what_they_learned() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(16, VOCABULARY, false);
    let mut whole = tuned(&spec, Tune::Scales);
    (0..3).for_each(|s| assert!(!whole.step(&batch(s)).unwrap().skipped));
    let place = folder.path().join("checkpoint-3");
    let begun = State { objective: Some("scales, from teacher A".into()), ..State::begin(&Recipe::QUARTER, 3) };
    let mut state = begun.clone();
    whole.record(&mut state);
    checkpoint::save(&place, whole.store(), &state, &|_| Ok(())).unwrap();
    let mut resumed = tuned(&spec, Tune::Scales);
    let found = checkpoint::restore(&place, resumed.store_mut()).unwrap();
    resumed.resume(&found);
    (3..6).for_each(|s| assert_eq!(whole.step(&batch(s)).unwrap(), resumed.step(&batch(s)).unwrap()));
    assert!(whole.store().entries().zip(resumed.store().entries()).all(|((_, a), (_, b))| a == b));

    checkpoint::check_origin(&place, &begun).unwrap();
    let other = State { objective: None, ..begun };
    let error = checkpoint::check_origin(&place, &other).unwrap_err().to_string();
    assert!(error.contains("teacher A") && error.contains("the text alone"), "{error}");
}
