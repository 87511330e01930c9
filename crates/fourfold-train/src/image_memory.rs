//! Peak memory of training a convolutional network, predicted from its shape, as [`crate::memory`] does for language models.

mod heap;
mod replay;

use fourfold_models::{ConvNetSpec, Role, WeightSpec};

pub(crate) use self::replay::rooms;
use crate::memory::{BF16, F32, TrainMemory, optimizer_bytes, weight_bytes};
use crate::recipe::Recipe;

/// The program's pages, threads' stacks and packing buffers, and what else its heap has. Measured.
const PROGRAM: u64 = 17_000_000;

/// Peak memory of steps of `images` images each, without the images that wait outside of a step.
pub fn image_memory(spec: &ConvNetSpec, recipe: &Recipe, images: u64, accumulation: u64) -> TrainMemory {
    let weights = spec.weights();
    let is_trained = |w: &&WeightSpec| !matches!(w.role, Role::RunningMean | Role::RunningVariance);
    let trained: u64 = weights.iter().filter(is_trained).map(WeightSpec::elements).sum();
    let most = replay::most_alive(spec, recipe, images);
    let sums = if accumulation > 1 && recipe.release { trained * BF16 } else { 0 };
    TrainMemory {
        weights: weights.iter().map(|w| weight_bytes(w, recipe)).sum(),
        optimizer: weights.iter().filter(is_trained).map(|w| optimizer_bytes(w, recipe)).sum(),
        gradients: sums + most.gradients,
        activations: most.activations,
        copies: most.copies,
        data: accumulation * images * (replay::pixels(spec) + F32),
        program: PROGRAM,
        ..TrainMemory::default()
    }
}
