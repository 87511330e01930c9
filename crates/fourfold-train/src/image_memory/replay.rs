//! A training step of a convolutional network without its numbers: [`fourfold_models::layers::Stack`]'s passes over tensors that have a
//! size alone. A tensor counts from where it is made until nothing holds it any more, so that the most there is at once comes out of
//! the same order of making and dropping as in the step itself.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::{Add, Range, Sub};
use std::rc::Rc;

use fourfold_kernels::cpu::MAPPED_BYTES;
use fourfold_models::layers::{Conv2dSpec, LayerSpec, segments};
use fourfold_models::{ConvNetSpec, WeightSpec};

use super::heap::{Heap, Place};
use crate::memory::{BF16, F32, copy_bytes, optimizer_bytes, read_bytes, weight_bytes};
use crate::recipe::Recipe;

/// Bytes of the lanes of a weight gradient's input that are brought in at a time.
const STRIPS: u64 = 1 << 19;

/// Bytes of a step's tensors, by component.
#[derive(Clone, Copy, Default)]
pub(super) struct Alive {
    pub activations: u64,
    pub gradients: u64,
    pub copies: u64,
}

impl Alive {
    fn total(self) -> u64 {
        self.activations + self.gradients + self.copies
    }
}

impl Add for Alive {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            activations: self.activations + other.activations,
            gradients: self.gradients + other.gradients,
            copies: self.copies + other.copies,
        }
    }
}

impl Sub for Alive {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            activations: self.activations - other.activations,
            gradients: self.gradients - other.gradients,
            copies: self.copies - other.copies,
        }
    }
}

/// What is alive, and what there was when the heap was largest.
struct Tensors {
    now: Cell<Alive>,
    most: Cell<Alive>,
    heap: RefCell<Heap>,
    /// Bytes that are there before a step, and stay.
    stored: u64,
}

impl Tensors {
    /// With a store of new weights, whose values leave holes.
    fn beside(weights: &[WeightSpec], recipe: &Recipe) -> Self {
        let mut heap = Heap::new();
        for weight in weights {
            let values = heap.allocate(weight.elements() * F32);
            heap.allocate(weight_bytes(weight, recipe));
            for _ in 0..2 {
                heap.allocate(optimizer_bytes(weight, recipe) / 2);
            }
            heap.free(values);
        }
        heap.keep_freed();
        let stored = heap.resident();
        Self { now: Cell::default(), most: Cell::default(), heap: RefCell::new(heap), stored }
    }

    fn hold(&self, bytes: Alive) -> Held<'_> {
        self.now.set(self.now.get() + bytes);
        let mut heap = self.heap.borrow_mut();
        let place = heap.allocate(bytes.total());
        let taken = heap.resident() - self.stored;
        if taken > self.most.get().total() {
            let now = self.now.get();
            let holes = taken - now.total();
            self.most.set(now + Alive { activations: holes, ..Alive::default() });
        }
        Held { tensors: self, bytes, place: Some(place) }
    }

    /// As [`crate::memory::make_room`] does.
    fn make_room(&self, elements: usize) {
        if elements * size_of::<f32>() >= MAPPED_BYTES {
            self.heap.borrow_mut().give_back();
        }
    }
}

/// Bytes that are given back when it is dropped.
struct Held<'a> {
    tensors: &'a Tensors,
    bytes: Alive,
    place: Option<Place>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.tensors.now.set(self.tensors.now.get() - self.bytes);
        if let Some(place) = self.place.take() {
            self.tensors.heap.borrow_mut().free(place);
        }
    }
}

/// An f32 tensor of so many elements, perhaps held by several.
#[derive(Clone)]
struct Sized<'a> {
    elements: u64,
    held: Rc<Held<'a>>,
}

/// What a layer keeps for its gradient.
enum Saved<'a> {
    Nothing,
    Input(Sized<'a>),
    Bytes(Held<'a>),
    Residual { body: Vec<Vec<Self>>, shortcut: Vec<Vec<Self>> },
}

/// The most that tensors of a step of `images` images of `pixels` values take.
pub(super) fn most_alive(spec: &ConvNetSpec, recipe: &Recipe, images: u64) -> Alive {
    let tensors = Tensors::beside(&spec.weights(), recipe);
    let replay = Replay { tensors: &tensors, recipe, images, inputs: RefCell::default() };
    // The second step finds the holes that the first one leaves.
    replay.step(spec);
    replay.step(spec);
    tensors.most.get()
}

/// Elements of the largest tensor of each part with so many images: what passes through it, or a weight's gradient.
pub(crate) fn rooms(spec: &ConvNetSpec, images: u64) -> Vec<usize> {
    let mut input = pixels(spec);
    let room = |part: Range<usize>| {
        let layers = &spec.layers[part];
        let [largest, output] = largest(layers, input);
        input = output;
        let weights = layers.iter().flat_map(LayerSpec::weights).map(|w| w.elements());
        weights.max().unwrap_or(0).max(images * largest) as usize
    };
    spec.parts().into_iter().map(room).collect()
}

/// Values of an image.
pub(super) fn pixels(spec: &ConvNetSpec) -> u64 {
    spec.image.iter().map(|&side| side as u64).product()
}

/// Elements of the largest tensor that comes out of a layer of a stack with `input` values an image; and the elements of the last.
fn largest(layers: &[LayerSpec], input: u64) -> [u64; 2] {
    let mut most = input;
    let last = layers.iter().fold(input, |input, layer| {
        let output = output_elements(layer, input);
        most = most.max(output);
        if let LayerSpec::Residual { body, shortcut, .. } = layer {
            most = most.max(largest(body, input)[0]).max(largest(shortcut, input)[0]);
        }
        output
    });
    [most, last]
}

struct Replay<'a> {
    tensors: &'a Tensors,
    recipe: &'a Recipe,
    images: u64,
    /// Memory for the inputs that segments keep.
    inputs: RefCell<VecDeque<Held<'a>>>,
}

impl<'a> Replay<'a> {
    fn keep(&self) -> Held<'a> {
        self.inputs.borrow_mut().pop_front().unwrap_or_else(|| unreachable!("one for each segment"))
    }

    fn tensor(&self, elements: u64) -> Sized<'a> {
        Sized { elements, held: Rc::new(self.activations(elements * F32)) }
    }

    fn activations(&self, activations: u64) -> Held<'a> {
        self.tensors.hold(Alive { activations, ..Alive::default() })
    }

    /// What is written in place, unless something else holds it.
    fn own(&self, x: Sized<'a>) -> Sized<'a> {
        if Rc::strong_count(&x.held) == 1 { x } else { self.tensor(x.elements) }
    }

    /// Buffers of so many bytes that are held for a moment.
    fn pass_through<const N: usize>(&self, buffers: [u64; N]) {
        drop(buffers.map(|bytes| self.activations(bytes)));
    }

    /// As [`crate::vision::Classifier`] runs it: part by part, whose weights are loaded for their turn.
    fn step(&self, spec: &ConvNetSpec) {
        let parts: Vec<&[LayerSpec]> = spec.parts().into_iter().map(|part| &spec.layers[part]).collect();
        let rooms = rooms(spec, self.images);
        let copies = |part: &[LayerSpec]| {
            self.tensors.hold(Alive { copies: elements(part) * copy_bytes(self.recipe), ..Alive::default() })
        };
        let inputs = if self.recipe.recompute { spec.kept_inputs() } else { Vec::new() };
        let bytes = |[rows, cols]: [usize; 2]| self.images * (rows * cols) as u64 * BF16;
        self.inputs.borrow_mut().extend(inputs.into_iter().map(|shape| self.activations(bytes(shape))));
        let mut x = self.tensor(self.images * pixels(spec));
        let mut kept = Vec::with_capacity(parts.len());
        for (part, &room) in parts.iter().zip(&rooms) {
            self.tensors.make_room(room);
            let _weights = copies(part);
            let (y, saved) = self.forward(part, x);
            kept.push(saved);
            x = y;
        }
        let (mut dy, mut gradients) = (Some(x), Vec::new());
        for (i, (part, saved)) in parts.iter().zip(kept).enumerate().rev() {
            let Some(gradient) = dy.take() else { break };
            self.tensors.make_room(rooms[i]);
            let weights = copies(part);
            dy = self.backward(part, saved, gradient, i > 0, &mut gradients);
            drop(weights);
            if self.recipe.release {
                gradients.clear();
            }
        }
    }

    fn forward(&self, layers: &[LayerSpec], x: Sized<'a>) -> (Sized<'a>, Vec<Vec<Saved<'a>>>) {
        let mut x = x;
        let mut all = Vec::new();
        for segment in segments(layers) {
            let layers = &layers[segment];
            let is_residual = matches!(layers, [LayerSpec::Residual { .. }]);
            let input = (self.recipe.recompute && !is_residual).then(|| self.keep());
            let mut saved = Vec::new();
            for layer in layers {
                let (y, kept) = self.layer_forward(layer, x, input.is_none());
                x = y;
                saved.push(kept);
            }
            all.push(match input {
                Some(input) => vec![Saved::Bytes(input)],
                None => saved,
            });
        }
        (x, all)
    }

    fn backward(
        &self,
        layers: &[LayerSpec],
        saved: Vec<Vec<Saved<'a>>>,
        dy: Sized<'a>,
        wants_input: bool,
        gradients: &mut Vec<Held<'a>>,
    ) -> Option<Sized<'a>> {
        let mut dy = Some(dy);
        for (segment, saved) in segments(layers).into_iter().zip(saved).rev() {
            let (start, layers) = (segment.start, &layers[segment]);
            let is_residual = matches!(layers, [LayerSpec::Residual { .. }]);
            let saved = if self.recipe.recompute && !is_residual { self.recompute(layers, saved) } else { saved };
            for (i, (layer, saved)) in layers.iter().zip(saved).enumerate().rev() {
                dy = self.layer_backward(layer, saved, dy?, wants_input || start + i > 0, gradients);
            }
        }
        dy
    }

    /// What the layers of a segment would have kept.
    fn recompute(&self, layers: &[LayerSpec], input: Vec<Saved<'a>>) -> Vec<Saved<'a>> {
        let bytes = input.iter().map(|kept| if let Saved::Bytes(held) = kept { held.bytes.activations } else { 0 });
        let mut x = self.tensor(bytes.sum::<u64>() / BF16);
        drop(input);
        let mut saved = Vec::with_capacity(layers.len());
        for layer in layers {
            saved.push(match layer {
                LayerSpec::Conv2d(_) | LayerSpec::Linear(_) => Saved::Input(x.clone()),
                _ => {
                    let (y, kept) = self.layer_forward(layer, x, true);
                    x = y;
                    kept
                }
            });
        }
        saved
    }

    fn layer_forward(&self, layer: &LayerSpec, x: Sized<'a>, keeps: bool) -> (Sized<'a>, Saved<'a>) {
        let output = self.images * output_elements(layer, x.elements / self.images);
        let input = |x| if keeps { Saved::Input(x) } else { Saved::Nothing };
        match layer {
            LayerSpec::Conv2d(conv) => {
                let y = self.tensor(output);
                if is_pointwise(conv) {
                    self.pass_through([self.lanes(x.elements / conv.inputs as u64, conv.inputs as u64)]);
                } else {
                    let (tiles, cols) = tiles(conv, output);
                    for rows in tiles {
                        let _outputs = self.tile_forward(conv, rows, cols);
                    }
                }
                (y, input(x))
            }
            LayerSpec::Linear(_) => {
                let y = self.tensor(output);
                self.pass_through([self.lanes(self.images, x.elements / self.images)]);
                (y, input(x))
            }
            LayerSpec::BatchNorm(_) if keeps => (self.tensor(output), Saved::Input(x)),
            LayerSpec::BatchNorm(_) => (self.own(x), Saved::Nothing),
            LayerSpec::Relu => {
                let y = self.own(x);
                // A bit each.
                let saved = if keeps { Saved::Bytes(self.activations(output / 8)) } else { Saved::Nothing };
                (y, saved)
            }
            // A byte for each place: where the largest value was.
            LayerSpec::MaxPool(_) => (self.tensor(output), Saved::Bytes(self.activations(output))),
            LayerSpec::AveragePool(_) | LayerSpec::AdaptiveAveragePool { .. } | LayerSpec::Flatten { .. } => {
                (self.tensor(output), Saved::Nothing)
            }
            LayerSpec::Residual { body, shortcut, .. } => {
                let (_aside, shortcut) = self.forward(shortcut, x.clone());
                let (y, body) = self.forward(body, x);
                (self.own(y), Saved::Residual { body, shortcut })
            }
        }
    }

    fn layer_backward(
        &self,
        layer: &LayerSpec,
        saved: Saved<'a>,
        dy: Sized<'a>,
        wants_input: bool,
        gradients: &mut Vec<Held<'a>>,
    ) -> Option<Sized<'a>> {
        match (layer, saved) {
            (LayerSpec::Residual { body, shortcut, .. }, Saved::Residual { body: in_body, shortcut: in_shortcut }) => {
                let _aside = self.backward(shortcut, in_shortcut, self.tensor(dy.elements), true, gradients)?;
                self.backward(body, in_body, dy, true, gradients)
            }
            (LayerSpec::Conv2d(conv), Saved::Input(x)) => {
                let dx = wants_input.then(|| self.tensor(x.elements));
                let (outputs, (tiles, cols)) = (conv.outputs as u64, tiles(conv, dy.elements));
                gradients.push(self.gradients(layer));
                for rows in tiles {
                    let _dy = self.activations(rows * outputs * F32);
                    let outputs = outputs / conv.groups.max(1) as u64;
                    let _of_group = (conv.groups > 1).then(|| self.activations(rows * outputs * F32));
                    self.pass_through([rows * cols * F32, STRIPS]);
                    if wants_input {
                        self.pass_through([rows * cols * F32, self.lanes(rows, outputs)]);
                    }
                }
                dx
            }
            (LayerSpec::Linear(linear), Saved::Input(x)) => {
                gradients.push(self.gradients(layer));
                self.pass_through([STRIPS]);
                let dx = self.tensor(x.elements);
                self.pass_through([self.lanes(self.images, linear.outputs as u64)]);
                Some(dx)
            }
            (LayerSpec::BatchNorm(_), _saved) => {
                gradients.push(self.gradients(layer));
                Some(dy)
            }
            (LayerSpec::Relu, _saved) => Some(dy),
            (_, saved) => {
                // A pooling's input, or a flattened one, has the elements that came in.
                let _ = saved;
                let input = input_elements(layer, dy.elements / self.images);
                Some(self.tensor(self.images * input))
            }
        }
    }

    /// The outputs of `rows` patches, of several groups one after the other.
    fn tile_forward(&self, conv: &Conv2dSpec, rows: u64, cols: u64) -> Held<'a> {
        let outputs = |groups: usize| self.activations(rows * (conv.outputs / groups.max(1)) as u64 * F32);
        let all = (conv.groups > 1).then(|| outputs(1));
        let _patches = self.activations(rows * cols * F32);
        let part = outputs(conv.groups);
        self.pass_through([self.lanes(rows, cols)]);
        all.unwrap_or(part)
    }

    fn gradients(&self, layer: &LayerSpec) -> Held<'a> {
        self.tensors.hold(Alive { gradients: elements(std::slice::from_ref(layer)) * F32, ..Alive::default() })
    }

    /// Bytes of `rows` rows of `cols` elements as products read them.
    fn lanes(&self, rows: u64, cols: u64) -> u64 {
        let lanes = (cols * read_bytes(self.recipe)).div_ceil(F32);
        // Whole vectors, an odd number of them.
        rows * (lanes.div_ceil(16) | 1) * 16 * F32
    }
}

/// Whether it is a product with the pixels themselves.
fn is_pointwise(conv: &Conv2dSpec) -> bool {
    conv.groups == 1 && conv.window.is_pointwise()
}

/// Rows of a convolution's tiles of patches on the way to `outputs` elements, all but the last of one size, and their columns.
fn tiles(conv: &Conv2dSpec, outputs: u64) -> (Vec<u64>, u64) {
    let columns = (conv.inputs / conv.groups.max(1) * conv.window.taps()) as u64;
    let width = conv.window.output().map_or(1, |[_, width]| width).max(1);
    let rows = outputs / (conv.outputs as u64).max(1);
    let tile = (conv.tile_lines() * width) as u64;
    ([rows.min(tile), rows % tile].into_iter().filter(|&rows| rows > 0).collect(), columns)
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

/// Elements that a pooling made `output` ones of.
fn input_elements(layer: &LayerSpec, output: u64) -> u64 {
    let area = |size: [usize; 2]| size[0] as u64 * size[1] as u64;
    match layer {
        LayerSpec::MaxPool(window) | LayerSpec::AveragePool(window) => {
            output / window.output().map_or(1, area).max(1) * area(window.image)
        }
        LayerSpec::AdaptiveAveragePool { image, output: to } => output / area(*to).max(1) * area(*image),
        _ => output,
    }
}

fn elements(layers: &[LayerSpec]) -> u64 {
    layers.iter().flat_map(LayerSpec::weights).map(|w: WeightSpec| w.elements()).sum()
}
