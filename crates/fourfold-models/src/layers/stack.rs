//! Layers of a convolutional network one after another, with residual blocks nested.
//!
//! A stack is run in *segments*, each up to and with the next product (convolution or linear layer). With recomputation a segment
//! keeps its input alone, in bf16, and the batch's statistics: normalisation, rectification and pooling are done anew on the way
//! back, products never are, since a segment's gradient needs its last layer's input and not its output.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::spatial::{Averages, Moments, Signs, Window};
use fourfold_kernels::{Bf16Tensor, LinearArg, Tensor};

use super::{BatchNorm, BatchNormSpec, Conv2d, Conv2dSpec, Gradients, Linear, LinearSpec, Statistic};
use crate::loader::Loader;
use crate::{ModelError, Observer, WeightSpec};

/// A layer of a convolutional network.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerSpec {
    /// Convolution.
    Conv2d(Conv2dSpec),
    /// Batch normalisation.
    BatchNorm(BatchNormSpec),
    /// `max(x, 0)`.
    Relu,
    /// The largest value under a window.
    MaxPool(Window),
    /// The mean under a window.
    AveragePool(Window),
    /// Means of parts of the image, so many along each axis.
    AdaptiveAveragePool {
        /// Height and width of the image.
        image: [usize; 2],
        /// Parts along each.
        output: [usize; 2],
    },
    /// An image as one row, channels outermost.
    Flatten {
        /// Pixels of the image.
        pixels: usize,
    },
    /// A linear layer over flattened images.
    Linear(LinearSpec),
    /// `body(x) + shortcut(x)`; an empty shortcut is x itself (He et al. 2016).
    Residual {
        /// What its layers' names begin with, without the dot.
        name: String,
        /// What is learned.
        body: Vec<Self>,
        /// What it is added to.
        shortcut: Vec<Self>,
    },
}

impl LayerSpec {
    /// Its tensors.
    pub fn weights(&self) -> Vec<WeightSpec> {
        match self {
            Self::Conv2d(conv) => conv.weights().collect(),
            Self::BatchNorm(norm) => norm.weights().collect(),
            Self::Linear(linear) => linear.weights().collect(),
            Self::Residual { body, shortcut, .. } => body.iter().chain(shortcut).flat_map(Self::weights).collect(),
            Self::Relu
            | Self::MaxPool(_)
            | Self::AveragePool(_)
            | Self::AdaptiveAveragePool { .. }
            | Self::Flatten { .. } => Vec::new(),
        }
    }

    /// Rows (pixels) and columns (channels) of what it makes of an image of so many.
    pub fn output(&self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        let area = |size: [usize; 2]| size[0] * size[1];
        match self {
            Self::Conv2d(conv) => [conv.window.output().map_or(0, area), conv.outputs],
            Self::Linear(linear) => [rows, linear.outputs],
            Self::MaxPool(window) | Self::AveragePool(window) => [window.output().map_or(0, area), cols],
            Self::AdaptiveAveragePool { output, .. } => [area(*output), cols],
            Self::Flatten { .. } => [1, rows * cols],
            Self::Residual { body, .. } => body.iter().fold([rows, cols], |shape, layer| layer.output(shape)),
            Self::BatchNorm(_) | Self::Relu => [rows, cols],
        }
    }

    /// Whether a segment ends with it.
    fn ends_segment(&self) -> bool {
        match self {
            Self::Conv2d(_) | Self::Linear(_) | Self::Residual { .. } => true,
            Self::BatchNorm(_)
            | Self::Relu
            | Self::MaxPool(_)
            | Self::AveragePool(_)
            | Self::AdaptiveAveragePool { .. }
            | Self::Flatten { .. } => false,
        }
    }

    fn is_residual(&self) -> bool {
        matches!(self, Self::Residual { .. })
    }
}

/// The segments of a stack. A residual block is one of its own.
pub fn segments(layers: &[LayerSpec]) -> Vec<Range<usize>> {
    let mut segments = Vec::new();
    let mut start = 0;
    for (i, layer) in layers.iter().enumerate() {
        if layer.is_residual() && start < i {
            segments.push(start..i);
            start = i;
        }
        if layer.ends_segment() || i + 1 == layers.len() {
            segments.push(start..i + 1);
            start = i + 1;
        }
    }
    segments
}

/// The inputs that segments keep where they are recomputed, in their order: rows and columns for an image of so many.
pub fn kept_inputs(layers: &[LayerSpec], image: [usize; 2]) -> Vec<[usize; 2]> {
    let mut shape = image;
    let mut all = Vec::new();
    for segment in segments(layers) {
        let layers = &layers[segment];
        match layers {
            [LayerSpec::Residual { body, shortcut, .. }] => {
                all.append(&mut kept_inputs(shortcut, shape));
                all.append(&mut kept_inputs(body, shape));
            }
            _ => all.push(shape),
        }
        shape = layers.iter().fold(shape, |shape, layer| layer.output(shape));
    }
    all
}

/// What a training pass carries through a stack.
pub struct StackPass<'a> {
    /// Runs the operations.
    pub backend: &'a dyn Backward,
    /// Keep a segment's input alone, in bf16.
    pub recompute: bool,
    /// Memory for these inputs, in the order of [`kept_inputs`]; where there is none left it is taken as it is needed.
    pub inputs: RefCell<VecDeque<Bf16Tensor>>,
}

impl StackPass<'_> {
    fn keep(&self, x: &Tensor) -> Bf16Tensor {
        let mut inputs = self.inputs.borrow_mut();
        let fits = |input: &Bf16Tensor| (input.rows(), input.cols()) == (x.rows(), x.cols());
        if !inputs.front().is_some_and(fits) {
            return self.backend.to_bf16(x);
        }
        let mut input = inputs.pop_front().unwrap_or_else(|| unreachable!("just seen"));
        self.backend.write_bf16(x, &mut input);
        input
    }
}

/// What a batch adds to the running statistics of all norms.
pub type Running = Vec<Statistic>;

enum Layer {
    Conv2d(Conv2d),
    BatchNorm(BatchNorm),
    Relu,
    MaxPool(Window),
    AveragePool(Averages),
    Flatten { pixels: usize },
    Linear(Linear),
    Residual { body: Stack, shortcut: Stack },
}

/// What a layer keeps for its gradient.
enum LayerSaved {
    Nothing,
    Input(Arc<Tensor>),
    Normed(Arc<Tensor>, Moments),
    Signs(Signs),
    Taps(Vec<u8>),
    Residual { body: StackSaved, shortcut: StackSaved },
}

enum SegmentSaved {
    Layers(Vec<LayerSaved>),
    Input { input: Bf16Tensor, moments: Vec<Moments> },
}

/// What [`Stack::train_forward`] keeps for [`Stack::backward`].
pub struct StackSaved(Vec<SegmentSaved>);

/// Layers one after another.
pub struct Stack {
    layers: Vec<Layer>,
    segments: Vec<Range<usize>>,
}

impl Stack {
    pub(crate) fn load(specs: &[LayerSpec], loader: &Loader) -> Result<Self, ModelError> {
        let layer = |spec: &LayerSpec| {
            Ok(match spec {
                LayerSpec::Conv2d(conv) => Layer::Conv2d(Conv2d::load(conv, loader)?),
                LayerSpec::BatchNorm(norm) => Layer::BatchNorm(BatchNorm::load(norm, loader)?),
                LayerSpec::Relu => Layer::Relu,
                LayerSpec::MaxPool(window) => Layer::MaxPool(*window),
                LayerSpec::AveragePool(window) => Layer::AveragePool(Averages::windows(window)),
                LayerSpec::AdaptiveAveragePool { image, output } => {
                    Layer::AveragePool(Averages::adaptive(*image, *output))
                }
                LayerSpec::Flatten { pixels } => Layer::Flatten { pixels: *pixels },
                LayerSpec::Linear(linear) => Layer::Linear(Linear::load(linear, loader)?),
                LayerSpec::Residual { body, shortcut, .. } => {
                    Layer::Residual { body: Self::load(body, loader)?, shortcut: Self::load(shortcut, loader)? }
                }
            })
        };
        let layers = specs.iter().map(layer).collect::<Result<_, ModelError>>()?;
        Ok(Self { layers, segments: segments(specs) })
    }

    /// Bytes of the weights in memory.
    pub fn byte_len(&self) -> usize {
        let bytes = |layer: &Layer| match layer {
            Layer::Conv2d(conv) => conv.byte_len(),
            Layer::BatchNorm(norm) => norm.byte_len(),
            Layer::Linear(linear) => linear.byte_len(),
            Layer::Residual { body, shortcut } => body.byte_len() + shortcut.byte_len(),
            Layer::Relu | Layer::MaxPool(_) | Layer::AveragePool(_) | Layer::Flatten { .. } => 0,
        };
        self.layers.iter().map(bytes).sum()
    }

    /// With the running statistics.
    pub fn forward(&self, mut x: Tensor, backend: &dyn Backward, observer: &mut dyn Observer) -> Tensor {
        for layer in &self.layers {
            x = layer.forward(x, backend, observer);
        }
        x
    }

    /// With statistics of the batch, which are added to `running`.
    pub fn train_forward(&self, x: Arc<Tensor>, pass: &StackPass, running: &mut Running) -> (Arc<Tensor>, StackSaved) {
        let mut x = x;
        let mut all = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let layers = &self.layers[segment.clone()];
            let is_residual = matches!(layers, [Layer::Residual { .. }]);
            let input = (pass.recompute && !is_residual).then(|| pass.keep(&x));
            let mut saved = Vec::new();
            let mut moments = Vec::new();
            for layer in layers {
                let (y, kept) = layer.train_forward(x, pass, input.is_none(), running);
                x = y;
                match kept {
                    // Without its input a norm keeps its statistics.
                    LayerSaved::Normed(_, batch) if input.is_some() => moments.push(batch),
                    kept => saved.push(kept),
                }
            }
            all.push(match input {
                Some(input) => SegmentSaved::Input { input, moments },
                None => SegmentSaved::Layers(saved),
            });
        }
        (x, StackSaved(all))
    }

    /// The gradient of the input, where it is wanted; adds those of the weights.
    pub fn backward(
        &self,
        saved: StackSaved,
        dy: Tensor,
        wants_input: bool,
        pass: &StackPass,
        gradients: &mut Gradients,
    ) -> Option<Tensor> {
        let mut dy = Some(dy);
        for (segment, saved) in self.segments.iter().zip(saved.0).rev() {
            let layers = &self.layers[segment.clone()];
            let saved = match saved {
                SegmentSaved::Layers(saved) => saved,
                SegmentSaved::Input { input, moments } => recompute(layers, input, moments, pass),
            };
            for (i, (layer, saved)) in layers.iter().zip(saved).enumerate().rev() {
                let wants = wants_input || segment.start + i > 0;
                dy = layer.backward(saved, dy?, wants, pass, gradients);
            }
        }
        dy
    }
}

/// What the layers of a segment would have kept.
fn recompute(layers: &[Layer], input: Bf16Tensor, moments: Vec<Moments>, pass: &StackPass) -> Vec<LayerSaved> {
    let mut x = Arc::new(pass.backend.rows_of_bf16(&input, 0..input.rows()));
    drop(input);
    let mut moments = moments.into_iter();
    let mut saved = Vec::with_capacity(layers.len());
    for layer in layers {
        match layer {
            Layer::Conv2d(_) | Layer::Linear(_) => saved.push(LayerSaved::Input(Arc::clone(&x))),
            Layer::BatchNorm(norm) => {
                let batch = moments.next().unwrap_or_else(|| unreachable!("one for each norm"));
                let y = norm.train_forward(Tensor::clone(&x), &batch, pass.backend);
                saved.push(LayerSaved::Normed(std::mem::replace(&mut x, Arc::new(y)), batch));
            }
            Layer::Relu
            | Layer::MaxPool(_)
            | Layer::AveragePool(_)
            | Layer::Flatten { .. }
            | Layer::Residual { .. } => {
                let (y, kept) = layer.train_forward(x, pass, true, &mut Vec::new());
                x = y;
                saved.push(kept);
            }
        }
    }
    saved
}

impl Layer {
    fn forward(&self, mut x: Tensor, backend: &dyn Backward, observer: &mut dyn Observer) -> Tensor {
        match self {
            Self::Conv2d(conv) => conv.forward(&x, backend, observer),
            Self::BatchNorm(norm) => norm.forward(x, backend),
            Self::Relu => {
                backend.relu(&mut x);
                x
            }
            Self::MaxPool(window) => backend.max_pool(&x, window).0,
            Self::AveragePool(averages) => backend.average_pool(&x, averages),
            Self::Flatten { pixels } => backend.channels_first(&x, *pixels),
            Self::Linear(linear) => {
                observer.linear_input(linear.name(), &x);
                product(linear, &x, backend)
            }
            Self::Residual { body, shortcut } => {
                let aside = shortcut.forward(x.clone(), backend, observer);
                let mut y = body.forward(x, backend, observer);
                backend.add(&mut y, &aside);
                y
            }
        }
    }

    /// `keeps`: whether the layer is to keep what its gradient needs; a norm's statistics are returned in any case.
    fn train_forward(
        &self,
        x: Arc<Tensor>,
        pass: &StackPass,
        keeps: bool,
        running: &mut Running,
    ) -> (Arc<Tensor>, LayerSaved) {
        let backend = pass.backend;
        let input = |x| if keeps { LayerSaved::Input(x) } else { LayerSaved::Nothing };
        match self {
            Self::Conv2d(conv) => (Arc::new(conv.forward(&x, backend, &mut crate::NoObserver)), input(x)),
            Self::Linear(linear) => (Arc::new(product(linear, &x, backend)), input(x)),
            Self::BatchNorm(norm) => {
                let moments = backend.moments(&x);
                running.extend(norm.statistics(&moments, x.rows()));
                let kept = if keeps { Arc::clone(&x) } else { Arc::new(Tensor::zeros(0, x.cols())) };
                let y = norm.train_forward(Arc::unwrap_or_clone(x), &moments, backend);
                (Arc::new(y), LayerSaved::Normed(kept, moments))
            }
            Self::Relu => {
                let mut y = Arc::unwrap_or_clone(x);
                backend.relu(&mut y);
                let saved = if keeps { LayerSaved::Signs(backend.signs(&y)) } else { LayerSaved::Nothing };
                (Arc::new(y), saved)
            }
            Self::MaxPool(window) => {
                let (y, taps) = backend.max_pool(&x, window);
                (Arc::new(y), LayerSaved::Taps(taps))
            }
            Self::AveragePool(averages) => (Arc::new(backend.average_pool(&x, averages)), LayerSaved::Nothing),
            Self::Flatten { pixels } => (Arc::new(backend.channels_first(&x, *pixels)), LayerSaved::Nothing),
            Self::Residual { body, shortcut } => {
                let (aside, shortcut) = shortcut.train_forward(Arc::clone(&x), pass, running);
                let (y, body) = body.train_forward(x, pass, running);
                let mut y = Arc::unwrap_or_clone(y);
                backend.add(&mut y, &aside);
                (Arc::new(y), LayerSaved::Residual { body, shortcut })
            }
        }
    }

    fn backward(
        &self,
        saved: LayerSaved,
        mut dy: Tensor,
        wants_input: bool,
        pass: &StackPass,
        gradients: &mut Gradients,
    ) -> Option<Tensor> {
        let backend = pass.backend;
        match (self, saved) {
            (Self::Conv2d(conv), LayerSaved::Input(x)) => conv.backward(&x, &dy, wants_input, backend, gradients),
            (Self::Linear(linear), LayerSaved::Input(x)) => {
                let pass = super::TrainPass { backend, documents: &[], positions: &[], dropout: None };
                Some(linear.backward(&*x, &dy, &pass, gradients))
            }
            (Self::BatchNorm(norm), LayerSaved::Normed(x, moments)) => {
                Some(norm.backward(&x, &moments, dy, backend, gradients))
            }
            (Self::Relu, LayerSaved::Signs(signs)) => {
                backend.mask(&mut dy, &signs);
                Some(dy)
            }
            (Self::MaxPool(window), LayerSaved::Taps(taps)) => Some(backend.max_pool_backward(&dy, &taps, window)),
            (Self::AveragePool(averages), LayerSaved::Nothing) => Some(backend.average_pool_backward(&dy, averages)),
            (Self::Flatten { pixels }, LayerSaved::Nothing) => Some(backend.channels_last(&dy, *pixels)),
            (Self::Residual { body, shortcut }, LayerSaved::Residual { body: in_body, shortcut: in_shortcut }) => {
                let aside = shortcut.backward(in_shortcut, dy.clone(), true, pass, gradients)?;
                let mut dx = body.backward(in_body, dy, true, pass, gradients)?;
                backend.add(&mut dx, &aside);
                Some(dx)
            }
            _ => unreachable!("a layer gets back what it kept"),
        }
    }
}

fn product(linear: &Linear, x: &Tensor, backend: &dyn Backward) -> Tensor {
    let arg: LinearArg = linear.arg();
    backend.linear(x, &[arg]).pop().unwrap_or_else(|| unreachable!("one output a weight"))
}
