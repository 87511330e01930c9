//! Convolutional classifiers in training: what is counted beside what is learned.

use std::sync::Arc;

use fourfold_kernels::Reference;
use fourfold_models::ConvNetSpec;
use fourfold_tensor::WeightSource;
use fourfold_train::optim::adamw::AdamW;
use fourfold_train::random::Stream;
use fourfold_train::recipe::Recipe;
use fourfold_train::schedule::{Decay, Schedule};
use fourfold_train::trainer::{Hyperparameters, Trainer};
use fourfold_train::vision::{Classifier, ImageBatch, initialize};
use serde_json::json;

fn trainer(recipe: Recipe, max_gradient_norm: Option<f64>) -> Trainer<Classifier> {
    let config = json!({ "model_type": "convnet", "image_size": [1, 4, 4], "layers": [
        { "type": "batch_norm" }, { "type": "conv2d", "out_channels": 3, "kernel_size": 3 }, { "type": "relu" },
        { "type": "flatten" }, { "type": "linear", "out_features": 2 } ] });
    let spec = ConvNetSpec::from_config(&config).unwrap();
    let store = initialize(&spec, 3, &recipe);
    let schedule = Schedule { warmup_steps: 0, total_steps: 10, decay: Decay::Constant, floor: 1.0 };
    let hyper = Hyperparameters {
        optimizer: AdamW::default().into(),
        lr: 1e-3,
        schedule,
        max_gradient_norm,
        seed: 1,
        lora_dropout: 0.0,
    };
    Trainer::new(Classifier::new(spec), store, Arc::new(Reference), recipe, hyper, 0)
}

fn batch(number: u64) -> ImageBatch {
    let stream = Stream::new(5, number, 0);
    ImageBatch { pixels: (0..4 * 16).map(|i| stream.word(i) as u8).collect(), labels: vec![0, 1, 1, 0] }
}

fn mean_of(batch: &ImageBatch) -> f32 {
    batch.pixels.iter().map(|&p| f32::from(p) / 255.0).sum::<f32>() / batch.pixels.len() as f32
}

#[test]
fn every_batch_of_a_step_counts_once_in_the_running_statistics() {
    let batches = [batch(0), batch(1), batch(2)];
    let expected = batches.iter().fold(0.0, |mean, batch| 0.9 * mean + 0.1 * mean_of(batch));
    // With release and a global norm the last batch is run twice.
    for (release, clip) in [(false, None), (true, None), (true, Some(0.1))] {
        let mut trainer = trainer(Recipe { release, ..Recipe::BASELINE }, clip);
        trainer.step_accumulated(&batches).unwrap();
        let found = trainer.store().load("0.running_mean").unwrap().to_f32()[0];
        assert!((found - expected).abs() < 1e-6, "release {release}, clip {clip:?}: {found}, {expected} expected");
    }
}
