//! A run stopped in the middle and resumed ends with the files of one that was not.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fourfold_kernels::Reference;
use fourfold_models::{ModelSpec, WeightSpec, spec_from_config};
use fourfold_train::batch::Batch;
use fourfold_train::checkpoint::{CheckpointError, State};
use fourfold_train::data::{Batches, Corpus, Document};
use fourfold_train::language::LanguageModel;
use fourfold_train::network::{Apply, BatchError, BatchSource, Network, Run, Score};
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::recipe::Recipe;
use fourfold_train::run::{Events, Options, RunError, resume, run};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, StepReport, TrainError, Trainer};
use serde_json::json;

fn spec() -> ModelSpec {
    spec_from_config(&json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true,
        "hidden_act": "silu"
    }))
    .unwrap()
}

#[derive(Default)]
struct Watcher {
    stop_after: Option<u64>,
    step: u64,
    losses: Vec<f64>,
    rollbacks: Vec<u64>,
    skipped: Vec<u64>,
    full_disk: bool,
}

impl Events for Watcher {
    fn step(&mut self, report: &StepReport, _: Duration) {
        self.step = report.step;
        if report.skipped {
            self.skipped.push(report.step);
        }
    }
    fn rolled_back(&mut self, step: u64) {
        self.rollbacks.push(step);
    }
    fn evaluated(&mut self, _: u64, score: &Score, _: bool) {
        let loss = score.mean_loss();
        self.losses.push(loss);
    }
    fn saved(&mut self, _: &Path) {}
    fn stop(&mut self) -> bool {
        self.stop_after == Some(self.step)
    }
    fn describe(&self, place: &Path, _: &ParameterStore) -> io::Result<()> {
        if self.full_disk { Err(io::ErrorKind::StorageFull.into()) } else { fs::write(place.join("config.json"), "{}") }
    }
}

fn corpus() -> Corpus {
    let documents: Vec<_> = (0..30).map(|d| Document::whole((0..9).map(|i| (d * 3 + i * i) % 20).collect())).collect();
    Corpus::new("numbers", documents, 16, 4).unwrap()
}

/// What is wrong with one batch of the run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Its loss is NaN.
    Loss,
    /// The gradient of the last part, the embedding's, is NaN: by then the others have been updated.
    LastGradient,
}

/// A language model with a fault at batches of so many scored places.
struct Faulty {
    inner: LanguageModel,
    fault: Fault,
}

/// The batch with the fault.
const FAULTY: u64 = 5;

impl Network for Faulty {
    type Batch = Batch;

    fn weights(&self) -> Vec<WeightSpec> {
        self.inner.weights()
    }

    fn check(&self, batch: &Batch) -> Result<(), BatchError> {
        self.inner.check(batch)
    }

    fn evaluate(&self, store: &ParameterStore, batch: &Batch, run: &Run) -> Result<Score, BatchError> {
        self.inner.evaluate(store, batch, run)
    }

    fn backward(
        &self,
        store: &mut ParameterStore,
        batch: &Batch,
        factor: f32,
        run: &Run,
        apply: Apply,
    ) -> Result<f64, TrainError> {
        let is_faulty = *batch == Batches::new(corpus(), 2).get(FAULTY).unwrap();
        match self.fault {
            Fault::Loss if is_faulty => Ok(f64::NAN),
            Fault::LastGradient if is_faulty => {
                self.inner.backward(store, batch, factor, run, &mut |store, gradients| {
                    if let Some(mut gradient) = gradients.take("model.embed_tokens.weight") {
                        gradient.host_mut()[7] = f32::NAN;
                        gradients.add("model.embed_tokens.weight", || gradient, |_| {});
                    }
                    apply(store, gradients)
                })
            }
            Fault::None | Fault::Loss | Fault::LastGradient => self.inner.backward(store, batch, factor, run, apply),
        }
    }
}

/// Runs in `output`, from its latest checkpoint if there is one.
fn go(output: &Path, watcher: &mut Watcher, lr: f64) -> Result<State, RunError> {
    go_with(output, watcher, lr, Recipe::QUARTER, Fault::None)
}

fn go_with(output: &Path, watcher: &mut Watcher, lr: f64, recipe: Recipe, fault: Fault) -> Result<State, RunError> {
    let mut store = ParameterStore::initialize(&spec(), 0.1, 6, &recipe);
    let begin = State::begin(&recipe, 6);
    let state = resume(output, &mut store, &begin, &mut |_, _| {}).unwrap().map_or(begin, |(_, state)| state);
    let schedule = Schedule { warmup_steps: 2, total_steps: 12, decay: Decay::Cosine, floor: 0.0 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr,
        schedule,
        max_gradient_norm: None,
        seed: 6,
        lora_dropout: 0.0,
    };
    let network = Faulty { inner: LanguageModel::new(spec()), fault };
    let mut trainer = Trainer::new(network, store, Arc::new(Reference), recipe, hyper, state.step);
    let corpus = corpus();
    let options =
        Options { steps: 12, accumulation: 1, eval_every: 5, save_every: 4, keep: 2, output: output.to_path_buf() };
    run(&mut trainer, &mut Batches::new(&corpus, 2), &corpus.in_order(8), state, &options, watcher)
}

fn final_weights(output: &Path) -> Vec<u8> {
    fs::read(output.join("final/model.safetensors")).unwrap()
}

#[test]
fn a_step_with_an_infinite_gradient_changes_nothing_also_when_gradients_are_released() {
    let folder = tempfile::tempdir().unwrap();
    for recipe in [Recipe::QUARTER, Recipe::BASELINE] {
        let of = |fault: Fault| {
            let (output, mut watcher) = (folder.path().join(format!("{}{fault:?}", recipe.name)), Watcher::default());
            go_with(&output, &mut watcher, 1e-2, recipe, fault).unwrap();
            (final_weights(&output), watcher)
        };
        let (left_out, watcher) = of(Fault::Loss);
        assert_eq!((watcher.skipped, watcher.rollbacks), (vec![FAULTY + 1], vec![]));
        let (torn, watcher) = of(Fault::LastGradient);
        // Without release nothing was applied, and nothing has to be taken back.
        let rollbacks = if recipe.release { vec![4] } else { vec![] };
        assert_eq!((watcher.skipped, watcher.rollbacks), (vec![FAULTY + 1], rollbacks));
        assert!(torn == left_out, "{}: something of the step is left", recipe.name);
        assert!(torn != of(Fault::None).0);
    }
}

#[test]
fn a_torn_step_without_a_checkpoint_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe::QUARTER;
    let store = ParameterStore::initialize(&spec(), 0.1, 6, &recipe);
    let schedule = Schedule { warmup_steps: 0, total_steps: 2, decay: Decay::Constant, floor: 0.0 };
    let optimizer = AdamW::default().into();
    let hyper = Hyperparameters { optimizer, lr: 1e-2, schedule, max_gradient_norm: None, seed: 6, lora_dropout: 0.0 };
    let network = Faulty { inner: LanguageModel::new(spec()), fault: Fault::LastGradient };
    let mut trainer = Trainer::new(network, store, Arc::new(Reference), recipe, hyper, 0);
    let corpus = corpus();
    let output = folder.path().to_path_buf();
    let options = Options { steps: 12, accumulation: 6, eval_every: 0, save_every: 0, keep: 2, output };
    let state = State::begin(&recipe, 6);
    let mut batches = Batches::new(&corpus, 2);
    let error = run(&mut trainer, &mut batches, &Vec::new(), state, &options, &mut Watcher::default()).unwrap_err();
    assert!(matches!(error, RunError::Torn { step: 1, .. }), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn stopped_and_resumed_equals_uninterrupted() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let mut watcher = Watcher::default();
    let end = go(&whole, &mut watcher, 1e-2).unwrap();
    assert_eq!((end.step, watcher.losses.len()), (12, 3));
    assert!(watcher.losses[2] < watcher.losses[0]);
    for stop_after in [3, 7] {
        let mut watcher = Watcher { stop_after: Some(stop_after), ..Watcher::default() };
        assert_eq!(go(&parts, &mut watcher, 1e-2).unwrap().step, stop_after);
    }
    assert_eq!(go(&parts, &mut Watcher::default(), 1e-2).unwrap(), end);
    for file in ["final/model.safetensors", "best/model.safetensors", "checkpoint-12/optimizer.safetensors"] {
        assert!(fs::read(whole.join(file)).unwrap() == fs::read(parts.join(file)).unwrap(), "{file} differs");
    }
    let mut left: Vec<_> = fs::read_dir(&whole).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["best", "checkpoint-12", "checkpoint-8", "final"]);
}

#[test]
fn a_full_disk_leaves_what_was_whole_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut watcher = Watcher { stop_after: Some(4), ..Watcher::default() };
    go(folder.path(), &mut watcher, 1e-2).unwrap();
    let mut watcher = Watcher { full_disk: true, ..Watcher::default() };
    let error = go(folder.path(), &mut watcher, 1e-2).unwrap_err();
    assert!(matches!(error, RunError::Checkpoint(_)), "{error}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["checkpoint-4"]);
}

#[test]
fn an_exploding_loss_ends_the_run_and_leaves_no_model_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut watcher = Watcher { stop_after: Some(4), ..Watcher::default() };
    go(folder.path(), &mut watcher, 1e-2).unwrap();
    let error = go(folder.path(), &mut Watcher::default(), 1e4).unwrap_err();
    assert!(matches!(error, RunError::Diverged { .. } | RunError::Torn { .. }), "{error}");
    assert!(error.to_string().contains("diverged"), "{error}");
    assert!(folder.path().join("checkpoint-4").exists() && !folder.path().join("final").exists());
}

#[test]
fn a_damaged_checkpoint_is_set_aside_for_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut watcher = Watcher { stop_after: Some(8), ..Watcher::default() };
    go(folder.path(), &mut watcher, 1e-2).unwrap();
    let (newest, older) = (folder.path().join("checkpoint-8"), folder.path().join("checkpoint-4"));
    let file = newest.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let begin = State::begin(&Recipe::QUARTER, 6);
    let mut store = ParameterStore::initialize(&spec(), 0.1, 6, &Recipe::QUARTER);
    let mut told = Vec::new();
    let mut go_on = |begin: &State, told: &mut Vec<String>| {
        resume(folder.path(), &mut store, begin, &mut |place, error| told.push(format!("{} {error}", place.display())))
    };
    // Another seed's: no fault of the disk, nothing is renamed.
    let foreign = State { seed: 7, ..begin.clone() };
    assert!(matches!(go_on(&foreign, &mut told), Err(CheckpointError::Foreign { seed: 6, .. })));
    assert!(newest.exists() && told.is_empty());
    // One bit of the data.
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 4;
    fs::write(&file, &flipped).unwrap();
    let (place, state) = go_on(&begin, &mut told).unwrap().unwrap();
    assert_eq!((place, state.step), (older.clone(), 4));
    assert!(told[0].contains("checkpoint-8") && told[0].contains("its checksum differs"), "{told:?}");
    assert!(!newest.exists() && folder.path().join("checkpoint-8.damaged").exists());
    // The older one too: an error that names it, and nothing is renamed.
    fs::write(older.join("trainer_state.json"), "{}").unwrap();
    let error = go_on(&begin, &mut told).unwrap_err().to_string();
    assert!(error.contains("checkpoint-4") && older.exists(), "{error}");
}
