//! A tiny model learns a pattern, with every recipe.

use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_kernels::backward::Backward;
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::DType;
use fourfold_train::batch::Batch;
use fourfold_train::checkpoint::State;
use fourfold_train::language::LanguageModel;
use fourfold_train::network::BatchError;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::random::Stream;
use fourfold_train::recipe::{Recipe, Storage};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, TrainError, Trainer};
use serde_json::json;

const VOCABULARY: u32 = 12;

fn spec(tied: bool) -> ModelSpec {
    spec_from_config(&json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": tied,
        "hidden_act": "silu"
    }))
    .unwrap()
}

/// Counting upwards from random beginnings: learnable, and not by frequency alone.
fn batch(step: u64) -> Batch {
    let stream = Stream::new(77, step, 0);
    let sequences: Vec<Vec<u32>> = (0..4)
        .map(|s| {
            let (begin, stride) = (stream.word(2 * s) % VOCABULARY, 1 + stream.word(2 * s + 1) % 2);
            (0..9).map(|i| (begin + i * stride) % VOCABULARY).collect()
        })
        .collect();
    Batch::from_sequences(sequences.iter().map(Vec::as_slice))
}

fn trainer(recipe: Recipe, steps: u64, max_gradient_norm: Option<f64>, tied: bool) -> Trainer<LanguageModel> {
    let spec = spec(tied);
    let store = ParameterStore::initialize(&spec, 0.1, 5, &recipe);
    let schedule = Schedule { warmup_steps: 5, total_steps: steps, decay: Decay::Cosine, floor: 0.1 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr: 1e-2,
        schedule,
        max_gradient_norm,
        seed: 9,
        lora_dropout: 0.0,
    };
    let backend: Arc<dyn Backward> = Arc::new(Reference);
    Trainer::new(LanguageModel::new(spec), store, backend, recipe, hyper, 0)
}

#[test]
fn every_recipe_learns_and_the_quarter_as_well_as_the_baseline() {
    let learn = |recipe: Recipe| {
        let mut trainer = trainer(recipe, 150, None, true);
        let before = trainer.evaluate(&batch(1_000_000)).unwrap().mean_loss();
        for step in 0..150 {
            assert!(!trainer.step(&batch(step)).unwrap().skipped);
        }
        (before, trainer.evaluate(&batch(1_000_000)).unwrap().mean_loss())
    };
    let (before, baseline) = learn(Recipe::BASELINE);
    assert!(baseline < 0.5 * before, "{before} to {baseline}");
    let fp16 = Recipe { compute: DType::F16, ..Recipe::BASELINE };
    let int8 = Recipe { storage: Storage::Int8, ..Recipe::QUARTER };
    for recipe in [Recipe::AMP, Recipe::QUARTER, Recipe::EIGHTH, fp16, int8] {
        let (_, after) = learn(recipe);
        assert!(after < baseline + 0.15, "{}: {after}, baseline {baseline}", recipe.label());
    }
}

#[test]
fn micro_batches_are_the_large_batch() {
    // Of different lengths, so that the mean of their means would be another number.
    let sequence = |begin: u32, len: u32| (0..len).map(|i| (begin + i) % VOCABULARY).collect::<Vec<u32>>();
    let sequences = [sequence(0, 9), sequence(3, 4), sequence(5, 12)];
    let batch = |which: &[usize]| Batch::from_sequences(which.iter().map(|&i| &sequences[i][..]));
    for (release, clip, bound) in
        [(false, None, 1e-5), (false, Some(0.1), 1e-5), (true, None, 1e-2), (true, Some(0.1), 1e-2)]
    {
        let recipe = Recipe { release, ..Recipe::BASELINE };
        let (mut whole, mut parts) = (trainer(recipe, 10, clip, true), trainer(recipe, 10, clip, true));
        for _ in 0..3 {
            let a = whole.step(&batch(&[0, 1, 2])).unwrap();
            let b = parts.step_accumulated(&[batch(&[0]), batch(&[1, 2])]).unwrap();
            assert_eq!((a.units, a.skipped), (b.units, b.skipped));
            assert!((a.loss - b.loss).abs() < bound, "{a:?} {b:?}");
            assert!((a.gradient_norm - b.gradient_norm).abs() < bound * a.gradient_norm, "{a:?} {b:?}");
        }
    }
}

#[test]
fn an_overflow_leaves_the_whole_step_out_and_halves_the_scale() {
    for release in [false, true] {
        let recipe = Recipe { compute: DType::F16, release, ..Recipe::BASELINE };
        let mut trainer = trainer(recipe, 10, None, true);
        let before: Vec<_> = trainer.store().entries().map(|(_, entry)| entry.clone()).collect();
        trainer.resume(&State { loss_scale: Some((2f32.powi(40), 7)), ..State::begin(&recipe, 0) });
        assert!(trainer.step(&batch(0)).unwrap().skipped);
        assert!(trainer.store().entries().zip(&before).all(|((_, now), before)| now == before), "release {release}");
        let mut state = State::begin(&recipe, 0);
        trainer.record(&mut state);
        assert_eq!((state.step, state.skipped, state.loss_scale), (1, 1, Some((2f32.powi(39), 0))));
        // It falls until gradients fit, and then there is an update.
        let skipped = (1..40).take_while(|&step| trainer.step(&batch(step)).unwrap().skipped).count();
        assert!((5..39).contains(&skipped), "{skipped}");
        assert!(trainer.store().entries().zip(&before).any(|((_, now), before)| now != before));
    }
}

#[test]
fn release_and_recompute_change_memory_and_not_the_result() {
    for (tied, clip) in [(true, None), (false, Some(0.5))] {
        // Documents have 8 tokens: 17 are two of them.
        let run = |release, recompute, loss_chunk, block_tokens| {
            let recipe = Recipe { release, recompute, loss_chunk, block_tokens, ..Recipe::BASELINE };
            let mut trainer = trainer(recipe, 10, clip, tied);
            let reports: Vec<_> = (0..4).map(|step| trainer.step(&batch(step)).unwrap()).collect();
            (reports.last().unwrap().loss, reports[0].gradient_norm)
        };
        let (loss, norm) = run(false, false, usize::MAX, usize::MAX);
        let all = usize::MAX;
        for (release, recompute, chunk, part) in
            [(true, false, all, all), (false, true, 5, all), (true, true, 5, 17), (true, true, all, 1)]
        {
            let (l, n) = run(release, recompute, chunk, part);
            // Recomputed blocks start from inputs rounded to bf16.
            let bound = if recompute { 2e-2 } else { 1e-6 };
            assert!((l - loss).abs() < bound && (n - norm).abs() < bound * norm.max(1.0), "{l} {loss}, {n} {norm}");
        }
    }
}

#[test]
fn steps_are_reproducible_and_bad_batches_change_nothing() {
    let mut a = trainer(Recipe::QUARTER, 10, None, true);
    let mut b = trainer(Recipe::QUARTER, 10, None, true);
    (0..3).for_each(|step| assert_eq!(a.step(&batch(step)).unwrap(), b.step(&batch(step)).unwrap()));
    let unknown = Batch::from_sequences([&[1u32, 2, VOCABULARY][..], &[VOCABULARY, 1][..]]);
    assert!(matches!(a.step(&unknown), Err(TrainError::Batch { step: 4, source: BatchError::Token { .. } })));
    assert!(matches!(a.step(&Batch::default()), Err(TrainError::Batch { step: 4, source: BatchError::Empty })));
    assert_eq!(a.step(&batch(3)).unwrap(), b.step(&batch(3)).unwrap());
}

/// A checkpoint's tensor of another shape is refused by name, whatever its size.
#[test]
fn tensors_of_another_shape_are_not_learned_from() {
    let spec = spec(false);
    for weight in spec.weights() {
        let larger: Vec<usize> = weight.shape.iter().map(|&d| d + 1).collect();
        let smaller: Vec<usize> = weight.shape.iter().map(|&d| d - 1).collect();
        let turned: Vec<usize> = weight.shape.iter().rev().copied().collect();
        for shape in [larger, smaller, turned].iter().filter(|shape| **shape != weight.shape) {
            let source = RandomWeights::new(&spec, 1).with(&weight.name, shape);
            let error = ParameterStore::load(&spec.weights(), &source, &Recipe::QUARTER).err().unwrap().to_string();
            assert!(error.contains(&weight.name) && error.contains(&format!("{shape:?}")), "{error}");
        }
    }
}
