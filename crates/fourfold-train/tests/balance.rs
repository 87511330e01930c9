//! Experts that get unequal loads become balanced by their routers' biases, and without that stay as they are.

use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_train::batch::Batch;
use fourfold_train::checkpoint::{self, State};
use fourfold_train::language::LanguageModel;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::recipe::Recipe;
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, Trainer};
use serde_json::json;

const BIAS: &str = "model.layers.0.mlp.gate.e_score_correction_bias";
const EXPERTS: usize = 8;

fn spec() -> ModelSpec {
    spec_from_config(&json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 16,
        "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "first_k_dense_replace": 0,
        "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": null, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
        "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "hidden_act": "silu", "moe_layer_freq": 1
    }))
    .unwrap()
}

/// A trainer of a model whose first two experts are preferred by every token, with γ = `rate`.
fn trainer(rate: f32, recipe: Recipe) -> Trainer<LanguageModel> {
    let mut store = ParameterStore::initialize(&spec(), 0.2, 3, &recipe);
    store.count(BIAS, |_| vec![0.6, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let schedule = Schedule { warmup_steps: 0, total_steps: 1000, decay: Decay::Constant, floor: 1.0 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr: 1e-4,
        schedule,
        max_gradient_norm: None,
        seed: 3,
        lora_dropout: 0.0,
    };
    Trainer::new(LanguageModel::new(spec()).balanced(rate), store, Arc::new(Reference), recipe, hyper, 0)
}

fn batch(step: u64) -> Batch {
    let tokens: Vec<u32> = (0..65).map(|i| ((i * i * 7 + i * 13 + step * 29) % 64) as u32).collect();
    Batch::from_sequences([&tokens[..33], &tokens[32..]])
}

/// Mean imbalance over steps `from..to`.
fn imbalance(trainer: &mut Trainer<LanguageModel>, from: u64, to: u64) -> f64 {
    let sum: f64 = (from..to).map(|step| trainer.step(&batch(step)).unwrap().expert_imbalance.unwrap()).sum();
    sum / (to - from) as f64
}

#[test]
fn an_unbalanced_router_becomes_balanced() {
    for recipe in [Recipe::BASELINE, Recipe::QUARTER] {
        let (mut with, mut without) = (trainer(0.01, recipe), trainer(0.0, recipe));
        let before = [&mut with, &mut without].map(|trainer| imbalance(trainer, 0, 4));
        with_steps(&mut with, 4, 80);
        with_steps(&mut without, 4, 80);
        let after = [&mut with, &mut without].map(|trainer| imbalance(trainer, 80, 90));
        // Two of eight experts get all tokens at first: three times more than the mean.
        assert!(before[0] > 2.0, "{}: {before:?}", recipe.name);
        assert!(after[0] < 1.0, "{}: {after:?}", recipe.name);
        // γ = 0: nothing moves, and nothing is balanced.
        assert!(after[1] > 2.0, "{}: {after:?}", recipe.name);
        let untouched = without.store().values(BIAS).unwrap();
        assert_eq!(untouched, [0.6, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}

fn with_steps(trainer: &mut Trainer<LanguageModel>, from: u64, to: u64) {
    for step in from..to {
        trainer.step(&batch(step)).unwrap();
    }
}

/// One step moves each bias by γ, by the tokens of the whole step, however it is run.
#[test]
fn a_step_counts_every_token_once() {
    let moved = |recipe: Recipe, parts: &[Batch], clip: Option<f64>| {
        let mut store = ParameterStore::initialize(&spec(), 0.2, 3, &recipe);
        store.count(BIAS, |_| vec![0.0; EXPERTS]);
        let schedule = Schedule { warmup_steps: 0, total_steps: 9, decay: Decay::Constant, floor: 1.0 };
        let hyper = Hyperparameters {
            optimizer: AdamW::default().into(),
            lr: 1e-4,
            schedule,
            max_gradient_norm: clip,
            seed: 3,
            lora_dropout: 0.0,
        };
        let network = LanguageModel::new(spec()).balanced(0.25);
        let mut trainer = Trainer::new(network, store, Arc::new(Reference), recipe, hyper, 0);
        let report = trainer.step_accumulated(parts).unwrap();
        (trainer.store().values(BIAS).unwrap(), report.expert_imbalance)
    };
    let tokens: Vec<u32> = (0..65).map(|i| (i * i * 7 + i * 13) % 64).collect();
    let whole = [Batch::from_sequences([&tokens[..33], &tokens[32..]])];
    let halves = [Batch::from_sequences([&tokens[..33]]), Batch::from_sequences([&tokens[32..]])];
    let expected = moved(Recipe::BASELINE, &whole, None);
    assert!(expected.0.iter().all(|b| [-0.25, 0.0, 0.25].contains(b)) && expected.0.contains(&-0.25), "{expected:?}");
    assert!(expected.0.contains(&0.25));
    let recompute = Recipe { recompute: true, release: true, block_tokens: 32, ..Recipe::BASELINE };
    for (recipe, parts, clip) in [
        (Recipe::BASELINE, &halves[..], None),
        (recompute, &whole[..], None),
        (recompute, &halves[..], None),
        (recompute, &whole[..], Some(1.0)),
    ] {
        assert_eq!(moved(recipe, parts, clip), expected);
    }
}

#[test]
fn a_resumed_run_goes_on_with_the_same_biases() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe::QUARTER;
    let mut whole = trainer(0.005, recipe);
    with_steps(&mut whole, 0, 5);
    let mut state = State::begin(&recipe, 3);
    whole.record(&mut state);
    let place = folder.path().join("checkpoint-5");
    checkpoint::save(&place, whole.store(), &state, &|_| Ok(())).unwrap();
    with_steps(&mut whole, 5, 9);
    let mut resumed = trainer(0.005, recipe);
    let found = checkpoint::restore(&place, resumed.store_mut()).unwrap();
    resumed.resume(&found);
    with_steps(&mut resumed, 5, 9);
    assert_eq!(whole.store().values(BIAS), resumed.store().values(BIAS));
    assert!(whole.store().entries().zip(resumed.store().entries()).all(|((_, a), (_, b))| a == b));
}
