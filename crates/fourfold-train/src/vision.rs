//! A convolutional classifier as a [`Network`].

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Bf16Tensor, Tensor};
use fourfold_models::layers::{Gradients, LayerSpec, Running, StackPass, Trained};
use fourfold_models::{ConvNet, ConvNetSpec, Role, WeightSpec};

use crate::image_memory::rooms;
use crate::memory::make_room;
use crate::network::{Apply, BatchError, Examples, Network, Run, Score};
use crate::random::Stream;
use crate::recipe::Recipe;
use crate::store::ParameterStore;
use crate::trainer::TrainError;

/// Images of one step, as they are stored: a byte a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageBatch {
    /// `[images, height, width, channels]`.
    pub pixels: Vec<u8>,
    /// The class of each image.
    pub labels: Vec<u32>,
}

impl Examples for ImageBatch {
    fn units(&self) -> usize {
        self.labels.len()
    }

    fn scored(&self) -> usize {
        self.labels.len()
    }
}

/// A convolutional classifier with cross-entropy.
pub struct Classifier {
    spec: ConvNetSpec,
    /// What the batches of this step add to the running statistics, in their order.
    pending: Mutex<Running>,
}

impl Classifier {
    /// The classifier that `spec` describes.
    pub fn new(spec: ConvNetSpec) -> Self {
        Self { spec, pending: Mutex::new(Vec::new()) }
    }

    /// What it is made of.
    pub fn spec(&self) -> &ConvNetSpec {
        &self.spec
    }
}

/// Pixels as a network takes them, `[images · height · width, channels]`: scaled to [0, 1] and normalised.
pub fn normalized(spec: &ConvNetSpec, pixels: &[u8]) -> Tensor {
    let channels = spec.image[0];
    let value = |(i, &v): (usize, &u8)| (f32::from(v) / 255.0 - spec.mean[i % channels]) / spec.std[i % channels];
    Tensor::new(pixels.len() / channels, channels, pixels.iter().enumerate().map(value).collect())
}

/// A new classifier, initialised as PyTorch's layers are: weights and biases uniform in ±1/√(inputs of an output) (LeCun et al. 1998),
/// norms one and zero. Where one product follows another at once, the two being factors of one, the first keeps its input's
/// variance (±√3 as much), so that both together begin as the one would.
pub fn initialize(spec: &ConvNetSpec, seed: u64, recipe: &Recipe) -> ParameterStore {
    let weights = spec.weights();
    let mut factors = HashSet::new();
    first_factors(&spec.layers, &mut factors);
    let mut spread = 0.0;
    ParameterStore::new(&weights, recipe, |tensor, weight| {
        let (len, stream) = (weight.elements() as usize, Stream::new(seed, 0, tensor as u64));
        // A bias follows its weight, whose inputs are its own too; a norm's bias is the one that follows a norm's weight.
        let after_norm = tensor > 0 && weights[tensor - 1].role == Role::Norm;
        match weight.role {
            Role::Norm | Role::RunningVariance => vec![1.0; len],
            Role::RunningMean => vec![0.0; len],
            Role::Bias if after_norm => vec![0.0; len],
            Role::Bias => (0..len).map(|i| spread * (2.0 * stream.unit(i) - 1.0)).collect(),
            Role::Embedding
            | Role::LmHead
            | Role::Attention
            | Role::Mlp
            | Role::SharedExpert
            | Role::RoutedExpert
            | Role::Router
            | Role::Convolution => {
                spread = 1.0 / (weight.shape[1..].iter().product::<usize>().max(1) as f32).sqrt();
                let bound = if factors.contains(&weight.name) { 3f32.sqrt() * spread } else { spread };
                (0..len).map(|i| bound * (2.0 * stream.unit(i) - 1.0)).collect()
            }
        }
    })
}

/// Names of the weights whose output is another product's input.
fn first_factors(layers: &[LayerSpec], found: &mut HashSet<String>) {
    let is_product = |layer: &LayerSpec| matches!(layer, LayerSpec::Conv2d(_) | LayerSpec::Linear(_));
    for pair in layers.windows(2).filter(|pair| pair.iter().all(is_product)) {
        found.extend(pair[0].weights().into_iter().next().map(|weight| weight.name));
    }
    for layer in layers {
        if let LayerSpec::Residual { body, shortcut, .. } = layer {
            first_factors(body, found);
            first_factors(shortcut, found);
        }
    }
}

/// Summed losses of logits, and how many were right. The logits become gradients, as
/// [`Backward::cross_entropy`] makes them.
pub fn score(backend: &dyn Backward, logits: &mut Tensor, labels: &[u32], factor: f32) -> Score {
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(class, _)| class as u32);
    let correct = (0..logits.rows()).filter(|&i| best(logits.row(i)) == Some(labels[i])).count();
    let losses = backend.cross_entropy(logits, labels, factor);
    let loss = losses.iter().map(|&l| f64::from(l)).sum();
    Score { loss, scored: labels.len(), cross_entropy: None, correct: Some(correct) }
}

impl Network for Classifier {
    type Batch = ImageBatch;

    fn weights(&self) -> Vec<WeightSpec> {
        self.spec.weights()
    }

    fn check(&self, batch: &ImageBatch) -> Result<(), BatchError> {
        let (classes, image_len) = (self.spec.classes, self.spec.image.iter().product::<usize>());
        if batch.labels.is_empty() {
            return Err(BatchError::Empty);
        }
        if batch.pixels.len() != image_len * batch.labels.len() {
            return Err(BatchError::Image { expected: image_len, found: batch.pixels.len() / batch.labels.len() });
        }
        match batch.labels.iter().position(|&label| label as usize >= classes) {
            Some(image) => Err(BatchError::Label { image, label: batch.labels[image], classes }),
            None => Ok(()),
        }
    }

    fn evaluate(&self, store: &ParameterStore, batch: &ImageBatch, run: &Run) -> Result<Score, BatchError> {
        let net = ConvNet::load(&self.spec, store, run.backend.clone())?;
        let mut logits = net.logits(normalized(&self.spec, &batch.pixels));
        Ok(score(&*run.backend, &mut logits, &batch.labels, 0.0))
    }

    fn backward(
        &self,
        store: &mut ParameterStore,
        batch: &ImageBatch,
        factor: f32,
        run: &Run,
        apply: Apply,
    ) -> Result<f64, TrainError> {
        let images = batch.labels.len();
        // Side by side before anything that is freed again, as a language model's: between a step's buffers they would lie where a few
        // bytes decide, and leave holes there.
        let inputs = match run.recipe.recompute {
            true => {
                self.spec.kept_inputs().into_iter().map(|[rows, cols]| Bf16Tensor::zeros(images * rows, cols)).collect()
            }
            false => VecDeque::new(),
        };
        let pass = StackPass { backend: &*run.backend, recompute: run.recipe.recompute, inputs: inputs.into() };
        let parts = self.spec.parts();
        let mut running = Vec::new();
        let mut kept = Vec::with_capacity(parts.len());
        let rooms = rooms(&self.spec, images as u64);
        let mut x = Arc::new(normalized(&self.spec, &batch.pixels));
        for (part, &room) in parts.iter().zip(&rooms) {
            make_room(room);
            let stack = ConvNet::load_part(&self.spec, part.clone(), store, &run.backend)?;
            let (y, saved) = stack.train_forward(x, &pass, &mut running);
            kept.push(saved);
            x = y;
        }
        let mut logits = Arc::unwrap_or_clone(x);
        let loss = score(&*run.backend, &mut logits, &batch.labels, factor).loss;
        if !loss.is_finite() {
            return Ok(loss);
        }
        if run.counts {
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).append(&mut running);
        }
        let mut gradients = Gradients::new(Trained::All).masked(store.masks());
        let mut dy = Some(logits);
        for (i, (part, saved)) in parts.iter().zip(kept).enumerate().rev() {
            let Some(gradient) = dy.take() else { break };
            make_room(rooms[i]);
            let stack = ConvNet::load_part(&self.spec, part.clone(), store, &run.backend)?;
            dy = stack.backward(saved, gradient, i > 0, &pass, &mut gradients);
            drop(stack);
            apply(store, &mut gradients)?;
        }
        Ok(loss)
    }

    fn step_done(&self, store: &mut ParameterStore, applied: bool) {
        for statistic in self.pending.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if applied {
                store.count(&statistic.name, |before| statistic.after(before));
            }
        }
    }
}
