//! Peak memory of training a convolutional network, predicted from its shape, as [`crate::memory`] does for language models.
//!
//! A step is followed as [`crate::vision`] runs it: forward segment by segment, each keeping what its gradient needs (its input in bf16
//! alone, where it is recomputed), then backward, where a segment's layers are run anew and its product's gradients are made.

use fourfold_models::layers::{LayerSpec, segments};
use fourfold_models::{ConvNetSpec, Role, WeightSpec};

use crate::memory::{BF16, F32, TrainMemory, copy_bytes, optimizer_bytes, weight_bytes};
use crate::recipe::Recipe;

/// Resident pages of the program, its threads' stacks and packing buffers: measured.
const PROGRAM: u64 = 15_000_000;
/// Elements of a convolution's patches that are held at once.
const TILE: u64 = 1 << 20;

/// Peak memory of steps of `images` images each, without the images that wait outside of a step.
pub fn image_memory(spec: &ConvNetSpec, recipe: &Recipe, images: u64, accumulation: u64) -> TrainMemory {
    let weights = spec.weights();
    let is_trained = |w: &&WeightSpec| !matches!(w.role, Role::RunningMean | Role::RunningVariance);
    let sum = |of: &dyn Fn(&WeightSpec) -> u64| weights.iter().map(of).sum::<u64>();
    let trained: u64 = weights.iter().filter(is_trained).map(WeightSpec::elements).sum();
    let pixels: u64 = spec.image.iter().map(|&side| side as u64).product();
    let fixed = TrainMemory {
        weights: sum(&|w| weight_bytes(w, recipe)),
        optimizer: weights.iter().filter(is_trained).map(|w| optimizer_bytes(w, recipe)).sum(),
        gradients: if accumulation > 1 && recipe.release { trained * BF16 } else { 0 },
        data: accumulation * images * (pixels + F32),
        program: PROGRAM,
        ..TrainMemory::default()
    };
    let mut walk = Walk { recipe, images, kept: 0, moments: Vec::new(), gathered: 0 };
    walk.run(&spec.layers, pixels);
    let mut peak = fixed;
    for moment in walk.moments {
        let at = TrainMemory {
            gradients: fixed.gradients + moment.gradients * F32,
            activations: moment.activations,
            copies: moment.weights * copy_bytes(recipe),
            ..fixed
        };
        if at.total() > peak.total() {
            peak = at;
        }
    }
    peak
}

/// What is alive at some moment.
struct Moment {
    /// Elements.
    gradients: u64,
    /// Elements of the weights in use.
    weights: u64,
    /// Bytes.
    activations: u64,
}

struct Walk<'a> {
    recipe: &'a Recipe,
    images: u64,
    /// Bytes kept for the backward pass so far.
    kept: u64,
    moments: Vec<Moment>,
    /// Elements of the gradients that wait, where they are not released.
    gathered: u64,
}

/// A layer of a segment: what goes in and comes out, elements of all images.
struct Flow<'a> {
    layer: &'a LayerSpec,
    input: u64,
    output: u64,
}

impl Walk<'_> {
    /// Follows layers from an input of `input` elements an image, forward and then back; the elements of what comes out.
    fn run(&mut self, layers: &[LayerSpec], input: u64) -> u64 {
        let before = self.kept;
        let mut last = input;
        let mut followed = Vec::new();
        for segment in segments(layers) {
            let flows = self.flows(&layers[segment], last);
            let below = self.kept;
            last = flows.last().map_or(last, |flow| flow.output / self.images);
            let weights = flows.iter().map(|flow| elements(flow.layer)).sum::<u64>();
            if let [Flow { layer: LayerSpec::Residual { body, shortcut, .. }, input, output }] = &flows[..] {
                // The block's input waits for its second branch, and what came out of the first for the sum.
                self.kept += (input + output) * F32;
                let input = input / self.images;
                self.run(shortcut, input);
                self.run(body, input);
                self.kept = below + self.saved(&flows);
            } else {
                // A product's input and output, and its patches, on the way forward.
                let widest = flows.iter().map(|f| (f.input + f.output) * F32 + tile(f)).max().unwrap_or(0);
                self.note(0, weights, widest);
                self.kept += self.saved(&flows);
            }
            followed.push((flows, below, weights));
        }
        for (flows, below, weights) in followed.iter().rev() {
            self.kept = *below;
            if !self.recipe.release {
                self.gathered += weights;
            }
            let gradients = if self.recipe.release { *weights } else { self.gathered };
            // Everything that the segment's gradients need, the gradient of its output and that of its product's input.
            let held: u64 = flows.iter().map(saved_in_full).sum();
            let ends = flows.last().map_or(0, |f| (f.input + f.output) * F32 + tile(f));
            self.note(gradients, *weights, held + ends);
        }
        self.kept = before;
        last
    }

    fn note(&mut self, gradients: u64, weights: u64, activations: u64) {
        self.moments.push(Moment { gradients, weights, activations: self.kept + activations });
    }

    /// Bytes that a segment keeps.
    fn saved(&self, flows: &[Flow]) -> u64 {
        match flows {
            [Flow { layer: LayerSpec::Residual { body, shortcut, .. }, input, .. }] => {
                let of = |layers: &[LayerSpec]| {
                    let mut last = input / self.images;
                    let mut sum = 0;
                    for segment in segments(layers) {
                        let flows = self.flows(&layers[segment], last);
                        last = flows.last().map_or(last, |flow| flow.output / self.images);
                        sum += self.saved(&flows);
                    }
                    sum
                };
                of(body) + of(shortcut)
            }
            [first, ..] if self.recipe.recompute => first.input * BF16,
            flows => flows.iter().map(saved_in_full).sum(),
        }
    }

    fn flows<'a>(&self, layers: &'a [LayerSpec], input: u64) -> Vec<Flow<'a>> {
        let mut last = input;
        let mut flow = |layer| {
            let input = last;
            last = output_elements(layer, input);
            Flow { layer, input: input * self.images, output: last * self.images }
        };
        layers.iter().map(&mut flow).collect()
    }
}

/// Elements that a layer makes of `input` ones, an image.
fn output_elements(layer: &LayerSpec, input: u64) -> u64 {
    let area = |size: [usize; 2]| size[0] as u64 * size[1] as u64;
    match layer {
        LayerSpec::Conv2d(conv) => conv.outputs as u64 * conv.window.output().map_or(0, area),
        LayerSpec::Linear(linear) => linear.outputs as u64,
        LayerSpec::MaxPool(window) | LayerSpec::AveragePool(window) => {
            input / area(window.image).max(1) * window.output().map_or(0, area)
        }
        LayerSpec::AdaptiveAveragePool { image, output } => input / area(*image).max(1) * area(*output),
        LayerSpec::Residual { body, .. } => body.iter().fold(input, |elements, layer| output_elements(layer, elements)),
        LayerSpec::BatchNorm(_) | LayerSpec::Relu | LayerSpec::Flatten { .. } => input,
    }
}

/// Bytes that a layer keeps for its gradient where nothing is recomputed.
fn saved_in_full(flow: &Flow) -> u64 {
    match flow.layer {
        LayerSpec::Conv2d(_) | LayerSpec::Linear(_) | LayerSpec::BatchNorm(_) => flow.input * F32,
        LayerSpec::Relu => flow.input / 8,
        // A byte for each place: where the largest value was.
        LayerSpec::MaxPool(_) => flow.output,
        LayerSpec::AveragePool(_)
        | LayerSpec::AdaptiveAveragePool { .. }
        | LayerSpec::Flatten { .. }
        | LayerSpec::Residual { .. } => 0,
    }
}

/// Bytes of a convolution's patches and of the outputs that belong to them.
fn tile(flow: &Flow) -> u64 {
    let LayerSpec::Conv2d(conv) = flow.layer else { return 0 };
    let columns = (conv.inputs / conv.groups * conv.window.taps()) as u64;
    let rows = flow.output / (conv.outputs as u64).max(1);
    let rows = rows.min(TILE / columns.max(1));
    rows * (columns + conv.outputs as u64) * F32
}

fn elements(layer: &LayerSpec) -> u64 {
    layer.weights().iter().map(WeightSpec::elements).sum()
}
