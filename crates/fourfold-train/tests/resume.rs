//! A stopped run goes on bit by bit as if it had not stopped.

use std::fs;
use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::DType;
use fourfold_train::batch::Batch;
use fourfold_train::checkpoint::{self, CheckpointError, State};
use fourfold_train::language::LanguageModel;
use fourfold_train::optim::OptimizerKind;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::optim::sgd::Sgd;
use fourfold_train::recipe::{Recipe, Storage};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, Trainer};
use serde_json::json;

fn spec() -> ModelSpec {
    spec_from_config(&json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": false,
        "hidden_act": "silu"
    }))
    .unwrap()
}

fn trainer(recipe: Recipe, store: ParameterStore, steps_done: u64) -> Trainer<LanguageModel> {
    let schedule = Schedule { warmup_steps: 2, total_steps: 10, decay: Decay::Linear, floor: 0.0 };
    let optimizer = match recipe.optimizer {
        OptimizerKind::AdamW => AdamW::default().into(),
        OptimizerKind::Sgd => Sgd { momentum: 0.9, ..Sgd::default() }.into(),
    };
    let hyper = Hyperparameters { optimizer, lr: 1e-2, schedule, max_gradient_norm: None, seed: 3, lora_dropout: 0.0 };
    Trainer::new(LanguageModel::new(spec()), store, Arc::new(Reference), recipe, hyper, steps_done)
}

fn batch(step: u64) -> Batch {
    let tokens: Vec<u32> = (0..13).map(|i| ((i * 7 + step * 3) % 20) as u32).collect();
    Batch::from_sequences([&tokens[..7], &tokens[6..]])
}

fn state(step: u64, recipe: Recipe) -> State {
    State { step, tokens: 12 * step, best_loss: Some(0.25), ..State::begin(&recipe, 3) }
}

#[test]
fn resumed_is_bit_exact_for_every_storage() {
    let folder = tempfile::tempdir().unwrap();
    let residual = Recipe { name: "residual", storage: Storage::Bf16Residual, ..Recipe::QUARTER };
    let int8 = Recipe { name: "int8", storage: Storage::Int8, ..Recipe::EIGHTH };
    let fp16 = Recipe { name: "fp16", compute: DType::F16, ..Recipe::BASELINE };
    let sgd = Recipe { name: "sgd", optimizer: OptimizerKind::Sgd, ..Recipe::QUARTER };
    for recipe in Recipe::ALL.into_iter().chain([residual, int8, fp16, sgd]) {
        let mut whole = trainer(recipe, ParameterStore::initialize(&spec(), 0.1, 1, &recipe), 0);
        (0..3).for_each(|s| assert!(!whole.step(&batch(s)).unwrap().skipped));
        let place = folder.path().join(recipe.name);
        let mut saved = state(3, recipe);
        whole.record(&mut saved);
        checkpoint::save(&place, whole.store(), &saved, &|_| Ok(())).unwrap();
        (3..6).for_each(|s| assert!(!whole.step(&batch(s)).unwrap().skipped));

        // Another seed: everything must come from the checkpoint.
        let mut store = ParameterStore::initialize(&spec(), 0.1, 2, &recipe);
        let found = checkpoint::restore(&place, &mut store).unwrap();
        assert_eq!(found, saved);
        let mut resumed = trainer(recipe, store, found.step);
        resumed.resume(&found);
        (3..6).for_each(|s| assert!(!resumed.step(&batch(s)).unwrap().skipped));
        let pairs = whole.store().entries().zip(resumed.store().entries());
        for ((info, a), (_, b)) in pairs {
            assert!(a == b, "{}: {} differs", recipe.name, info.name);
        }
    }
}

#[test]
fn unwritable_truncated_and_foreign_checkpoints_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe::QUARTER;
    let store = ParameterStore::initialize(&spec(), 0.1, 1, &recipe);
    let place = folder.path().join("checkpoint-1");
    // A caller's file that cannot be written (a full disk, say) leaves nothing behind.
    let full = |_: &std::path::Path| Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
    assert!(matches!(checkpoint::save(&place, &store, &state(1, recipe), &full), Err(CheckpointError::Io { .. })));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    checkpoint::save(&place, &store, &state(1, recipe), &|_| Ok(())).unwrap();
    let mut other = ParameterStore::initialize(&spec(), 0.1, 1, &Recipe::BASELINE);
    let error = checkpoint::restore(&place, &mut other).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor model.embed_tokens.weight: 640 bytes"), "{error}");

    let file = place.join("optimizer.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let mut store = store;
    let error = checkpoint::restore(&place, &mut store).unwrap_err().to_string();
    assert!(error.contains("optimizer.safetensors") && error.contains("header describes"), "{error}");
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&file, huge).unwrap();
    assert!(checkpoint::restore(&place, &mut store).unwrap_err().to_string().contains("header of"));
    let mut flipped = bytes.clone();
    let middle = flipped.len() - 5;
    flipped[middle] ^= 1;
    fs::write(&file, flipped).unwrap();
    let error = checkpoint::restore(&place, &mut store).unwrap_err().to_string();
    assert!(error.contains("optimizer.safetensors: tensor") && error.contains("checksum"), "{error}");
    // A number changed, the file still well formed.
    let state = place.join("trainer_state.json");
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&file, &bytes).unwrap();
    checkpoint::restore(&place, &mut store).unwrap();
    fs::write(&state, text.replace("\"tokens\": 12", "\"tokens\": 13")).unwrap();
    let error = checkpoint::restore(&place, &mut store).unwrap_err().to_string();
    assert!(error.contains("trainer_state.json") && error.contains("checksum"), "{error}");
    fs::write(place.join("trainer_state.json"), "{").unwrap();
    assert!(checkpoint::restore(&place, &mut store).unwrap_err().to_string().contains("trainer_state.json"));
}
