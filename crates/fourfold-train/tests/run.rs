//! A run stopped in the middle and resumed ends with the files of one that was not.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fourfold_kernels::Reference;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_train::checkpoint::{self, State};
use fourfold_train::data::{Batches, Corpus, Document};
use fourfold_train::language::LanguageModel;
use fourfold_train::network::Score;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::recipe::Recipe;
use fourfold_train::run::{Events, Options, RunError, latest_checkpoint, run};
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::store::ParameterStore;
use fourfold_train::trainer::{Hyperparameters, StepReport, Trainer};
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
    full_disk: bool,
}

impl Events for Watcher {
    fn step(&mut self, report: &StepReport, _: Duration) {
        self.step = report.step;
    }
    fn evaluated(&mut self, _: u64, score: &Score, _: bool) {
        let loss = score.mean_loss();
        self.losses.push(loss);
    }
    fn saved(&mut self, _: &Path) {}
    fn stop(&mut self) -> bool {
        self.stop_after == Some(self.step)
    }
    fn describe(&self, place: &Path) -> io::Result<()> {
        if self.full_disk { Err(io::ErrorKind::StorageFull.into()) } else { fs::write(place.join("config.json"), "{}") }
    }
}

fn corpus() -> Corpus {
    let documents = (0..30).map(|d| Document::whole((0..9).map(|i| (d * 3 + i * i) % 20).collect())).collect();
    Corpus::new("numbers", documents, 16, 4).unwrap()
}

/// Runs in `output`, from its latest checkpoint if there is one.
fn go(output: &Path, watcher: &mut Watcher, lr: f64) -> Result<State, RunError> {
    let recipe = Recipe::QUARTER;
    let mut store = ParameterStore::initialize(&spec(), 0.1, 6, &recipe);
    let state = match latest_checkpoint(output) {
        Some(place) => checkpoint::restore(&place, &mut store).unwrap(),
        None => State::begin(&recipe, 6),
    };
    let schedule = Schedule { warmup_steps: 2, total_steps: 12, decay: Decay::Cosine, floor: 0.0 };
    let hyper = Hyperparameters { optimizer: AdamW::default().into(), lr, schedule, max_gradient_norm: None, seed: 6 };
    let mut trainer = Trainer::new(LanguageModel::new(spec()), store, Arc::new(Reference), recipe, hyper, state.step);
    let corpus = corpus();
    let options =
        Options { steps: 12, accumulation: 1, eval_every: 5, save_every: 4, keep: 2, output: output.to_path_buf() };
    run(&mut trainer, &mut Batches::new(&corpus, 2), &corpus.in_order(8), state, &options, watcher)
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
fn an_exploding_loss_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let error = go(folder.path(), &mut Watcher::default(), f64::from(f32::MAX)).map(|s| s.step);
    // Twelve steps are fewer than the patience: the steps are skipped, and nothing infinite is written.
    assert!(error.is_ok() || matches!(error, Err(RunError::Diverged { .. })), "{error:?}");
}
