//! A convolution or linear layer as a chain of smaller ones: what a decomposition of its weight is as layers. The network's description
//! holds them like any others, so they run, train and compress like any others.

use fourfold_kernels::spatial::Window;
use fourfold_models::layers::{Conv2dSpec, LayerSpec, LinearSpec};
use fourfold_tensor::{Dense, Weight};
use serde::{Deserialize, Serialize};

use crate::MethodError;
use crate::methods::decompose::cp::cp;
use crate::methods::decompose::kernel::{Kernel, Matrix};
use crate::methods::decompose::svd::truncate;
use crate::methods::decompose::tucker::{Ranks, tucker2};

/// A rank, or a share of the largest useful one.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// So many.
    Rank(usize),
    /// This share of the largest, 0 < s < 1, rounded, at least one.
    Share(f64),
}

impl Amount {
    /// The rank where `most` is the largest.
    fn of(self, most: usize) -> usize {
        match self {
            Self::Rank(rank) => rank.clamp(1, most.max(1)),
            Self::Share(share) => ((share * most as f64).round() as usize).clamp(1, most.max(1)),
        }
    }
}

/// How a weight is decomposed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Decomposition {
    /// Truncated SVD of the weight as a matrix: two linear layers; for a convolution the kernel to `rank` channels, then 1x1.
    Svd(Amount),
    /// Tucker-2, a share of the channels on both sides: 1x1, the core, 1x1.
    Tucker(Amount),
    /// CP: 1x1, a column and a row for each channel, 1x1. Shares are of the larger number of channels.
    Cp(Amount),
}

impl Decomposition {
    /// Whether there is such a decomposition of the layer: convolutions without groups and, by SVD, linear layers.
    pub fn suits(self, layer: &LayerSpec) -> bool {
        match (self, layer) {
            (_, LayerSpec::Conv2d(conv)) => {
                conv.groups == 1 && (matches!(self, Self::Svd(_)) || conv.window.taps() > 1)
            }
            (Self::Svd(_), LayerSpec::Linear(_)) => true,
            (Self::Tucker(_) | Self::Cp(_), LayerSpec::Linear(_))
            | (
                _,
                LayerSpec::BatchNorm(_)
                | LayerSpec::Relu
                | LayerSpec::MaxPool(_)
                | LayerSpec::AveragePool(_)
                | LayerSpec::AdaptiveAveragePool { .. }
                | LayerSpec::Flatten { .. }
                | LayerSpec::Residual { .. },
            ) => false,
        }
    }

    /// The layers in place of `layer`, where [`Decomposition::suits`] and they have fewer weights.
    pub fn layers(self, layer: &LayerSpec) -> Option<Vec<LayerSpec>> {
        let elements =
            |layers: &[LayerSpec]| -> u64 { layers.iter().flat_map(LayerSpec::weights).map(|w| w.elements()).sum() };
        if !self.suits(layer) {
            return None;
        }
        let chain = match layer {
            LayerSpec::Linear(linear) => self.linear(linear),
            LayerSpec::Conv2d(conv) => self.convolution(conv),
            LayerSpec::BatchNorm(_)
            | LayerSpec::Relu
            | LayerSpec::MaxPool(_)
            | LayerSpec::AveragePool(_)
            | LayerSpec::AdaptiveAveragePool { .. }
            | LayerSpec::Flatten { .. }
            | LayerSpec::Residual { .. } => return None,
        };
        (elements(&chain) < elements(std::slice::from_ref(layer))).then_some(chain)
    }

    fn amount(self) -> Amount {
        match self {
            Self::Svd(amount) | Self::Tucker(amount) | Self::Cp(amount) => amount,
        }
    }

    fn linear(self, linear: &LinearSpec) -> Vec<LayerSpec> {
        let rank = self.amount().of(linear.inputs.min(linear.outputs));
        let name = |part: &str| format!("{}.{part}", linear.name);
        let down = LinearSpec { name: name("down"), outputs: rank, bias: false, ..linear.clone() };
        let up = LinearSpec { name: name("up"), inputs: rank, ..linear.clone() };
        vec![LayerSpec::Linear(down), LayerSpec::Linear(up)]
    }

    fn convolution(self, conv: &Conv2dSpec) -> Vec<LayerSpec> {
        let amount = self.amount();
        let output = conv.window.output().unwrap_or_default();
        let layer = |part: &str, inputs, outputs, window, bias| {
            let name = format!("{}.{part}", conv.name);
            LayerSpec::Conv2d(Conv2dSpec { name, inputs, outputs, groups: 1, window, bias })
        };
        let pointwise = |image| Window { image, kernel: [1, 1], stride: [1, 1], padding: [0, 0] };
        match self {
            Self::Svd(_) => {
                let rank = amount.of(conv.outputs.min(conv.inputs * conv.window.taps()));
                vec![
                    layer("down", conv.inputs, rank, conv.window, false),
                    layer("up", rank, conv.outputs, pointwise(output), conv.bias),
                ]
            }
            Self::Tucker(_) => {
                let (of_inputs, of_outputs) = (amount.of(conv.inputs), amount.of(conv.outputs));
                vec![
                    layer("inputs", conv.inputs, of_inputs, pointwise(conv.window.image), false),
                    layer("core", of_inputs, of_outputs, conv.window, false),
                    layer("outputs", of_outputs, conv.outputs, pointwise(output), conv.bias),
                ]
            }
            Self::Cp(_) => {
                let [a, b] = conv.window.kernel;
                let most = conv.inputs.max(conv.outputs).min(conv.inputs * a * b);
                let rank = amount.of(most);
                let ([down, along], [top, left]) = (conv.window.stride, conv.window.padding);
                let image = conv.window.image;
                let column = Window { image, kernel: [a, 1], stride: [down, 1], padding: [top, 0] };
                let row =
                    Window { image: [output[0], image[1]], kernel: [1, b], stride: [1, along], padding: [0, left] };
                let depthwise = |part: &str, window| match layer(part, rank, rank, window, false) {
                    LayerSpec::Conv2d(conv) => LayerSpec::Conv2d(Conv2dSpec { groups: rank, ..conv }),
                    other => other,
                };
                vec![
                    layer("inputs", conv.inputs, rank, pointwise(image), false),
                    depthwise("column", column),
                    depthwise("row", row),
                    layer("outputs", rank, conv.outputs, pointwise(output), conv.bias),
                ]
            }
        }
    }

    /// The weights of [`Decomposition::layers`], in their order.
    ///
    /// # Errors
    /// A weight that is not finite.
    pub fn factors(self, values: &[f32], shape: &[usize], chain: &[LayerSpec]) -> Result<Vec<Weight>, MethodError> {
        let shapes: Vec<Vec<usize>> =
            chain.iter().filter_map(|layer| layer.weights().into_iter().next()).map(|w| w.shape).collect();
        let rank = |layer: usize| shapes.get(layer).and_then(|s| s.first().copied()).unwrap_or(0);
        let kernel = || match *shape {
            [o, i, h, w] => Kernel::new([o, i, h, w], values),
            _ => Err(MethodError::Settings(format!("a kernel of {shape:?} has no {self:?}"))),
        };
        let parts: Vec<Vec<f32>> = match self {
            Self::Svd(_) => {
                // Refuses what is not finite.
                Kernel::new([values.len(), 1, 1, 1], values)?;
                let factors = truncate(values, shape[1..].iter().product(), None, rank(0))?;
                vec![factors.down, factors.up]
            }
            Self::Tucker(_) => {
                let found = tucker2(&kernel()?, Ranks::Given { inputs: rank(0), outputs: rank(1) })?;
                let core = found.core.values.iter().map(|&v| v as f32).collect();
                vec![transposed(&found.inputs), core, flat(&found.outputs)]
            }
            Self::Cp(_) => {
                let [outputs, inputs, column, row] = cp(&kernel()?, rank(0))?.factors;
                vec![transposed(&inputs), transposed(&column), transposed(&row), flat(&outputs)]
            }
        };
        Ok(parts.into_iter().zip(shapes).map(|(part, shape)| Dense::from_f32(shape, part).into()).collect())
    }
}

fn flat(m: &Matrix) -> Vec<f32> {
    m.values.iter().map(|&v| v as f32).collect()
}

fn transposed(m: &Matrix) -> Vec<f32> {
    (0..m.cols).flat_map(|c| (0..m.rows()).map(move |r| m.row(r)[c] as f32)).collect()
}
