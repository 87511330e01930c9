//! Two-dimensional convolution: a linear layer over the patches of an image.

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::spatial::Window;
use fourfold_kernels::{DeviceWeight, LinearArg, Tensor};

use super::Gradients;
use crate::loader::Loader;
use crate::{ModelError, Observer, Role, WeightSpec};

/// Elements of patches that are held at once: 4 MB.
const TILE: usize = 1 << 20;

/// The shape and name of a convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2dSpec {
    /// Name without `.weight`.
    pub name: String,
    /// Channels of the input.
    pub inputs: usize,
    /// Channels of the output.
    pub outputs: usize,
    /// Parts of the channels that do not see one another.
    pub groups: usize,
    /// The sliding window; it fits the image.
    pub window: Window,
    /// Whether a bias is added.
    pub bias: bool,
}

impl Conv2dSpec {
    /// PyTorch's shape of the weight, `[outputs, inputs / groups, kernel height, kernel width]`.
    pub fn shape(&self) -> Vec<usize> {
        vec![self.outputs, self.inputs / self.groups, self.window.kernel[0], self.window.kernel[1]]
    }

    /// Lines of the output whose patches are held at once.
    pub fn tile_lines(&self) -> usize {
        let columns = self.inputs / self.groups.max(1) * self.window.taps();
        let [_, width] = self.window.output().unwrap_or_default();
        (TILE / (width * columns).max(1)).max(1)
    }

    /// Its tensors.
    pub fn weights(&self) -> impl Iterator<Item = WeightSpec> {
        let spec =
            |part: &str, shape, role| WeightSpec { name: format!("{}.{part}", self.name), shape, role, block: None };
        let bias = self.bias.then(|| spec("bias", vec![self.outputs], Role::Bias));
        std::iter::once(spec("weight", self.shape(), Role::Convolution)).chain(bias)
    }
}

/// A convolution. Its weight is read as the matrix `[outputs, inputs / groups · kernel height · kernel width]`, in whatever form
/// it is stored. Patches are made tile by tile.
pub struct Conv2d {
    spec: Conv2dSpec,
    name: String,
    weight: Arc<DeviceWeight>,
    bias: Option<Tensor>,
}

impl Conv2d {
    pub(crate) fn load(spec: &Conv2dSpec, loader: &Loader) -> Result<Self, ModelError> {
        let name = format!("{}.weight", spec.name);
        let weight = loader.convolution(&name, &spec.shape())?;
        let bias = if spec.bias { Some(loader.vector(&format!("{}.bias", spec.name), spec.outputs)?) } else { None };
        Ok(Self { spec: spec.clone(), name, weight, bias })
    }

    /// Bytes of weight and bias in memory.
    pub fn byte_len(&self) -> usize {
        self.weight.byte_len() + self.bias.as_ref().map_or(0, |b| b.cols() * size_of::<f32>())
    }

    fn output(&self) -> [usize; 2] {
        self.spec.window.output().unwrap_or_default()
    }

    /// Output lines of `x`'s images, in tiles.
    fn tiles(&self, x: &Tensor) -> impl Iterator<Item = Range<usize>> + use<> {
        let (window, tile) = (&self.spec.window, self.spec.tile_lines());
        let lines = x.rows() / (window.image[0] * window.image[1]) * self.output()[0];
        (0..lines).step_by(tile).map(move |start| start..(start + tile).min(lines))
    }

    /// Input and output channels of a group.
    fn group(&self, group: usize) -> (Range<usize>, Range<usize>) {
        let of = |channels: usize| group * channels / self.spec.groups..(group + 1) * channels / self.spec.groups;
        (of(self.spec.inputs), of(self.spec.outputs))
    }

    /// x `[images · height · width, inputs]` to `[images · output height · output width, outputs]`.
    pub fn forward(&self, x: &Tensor, backend: &dyn Backward, observer: &mut dyn Observer) -> Tensor {
        if self.spec.groups == 1 && self.spec.window.is_pointwise() {
            observer.linear_input(&self.name, x);
            return self.product(x, backend);
        }
        let width = self.output()[1];
        let rows = self.tiles(x).last().map_or(0, |tile| tile.end * width);
        let mut y = Tensor::zeros(rows, self.spec.outputs);
        for lines in self.tiles(x) {
            let first = lines.start * width;
            if self.spec.groups == 1 {
                let patches = backend.patches(x, &self.spec.window, 0..self.spec.inputs, lines);
                observer.linear_input(&self.name, &patches);
                backend.set_rows(&mut y, first, &self.product(&patches, backend));
                continue;
            }
            let mut tile = Tensor::zeros(lines.len() * width, self.spec.outputs);
            for group in 0..self.spec.groups {
                let (inputs, outputs) = self.group(group);
                let patches = backend.patches(x, &self.spec.window, inputs, lines.clone());
                observer.linear_input(&self.name, &patches);
                let part = backend.linear_rows(&patches, &self.weight, outputs.clone());
                backend.set_columns(&mut tile, outputs.start, &part);
            }
            if let Some(bias) = &self.bias {
                let ones = Tensor::new(1, bias.cols(), vec![1.0; bias.cols()]);
                backend.scale_shift(&mut tile, &ones, bias);
            }
            backend.set_rows(&mut y, first, &tile);
        }
        y
    }

    fn product(&self, patches: &Tensor, backend: &dyn Backward) -> Tensor {
        let arg = LinearArg { weight: &self.weight, bias: self.bias.as_ref() };
        backend.linear(patches, &[arg]).pop().unwrap_or_else(|| unreachable!("one output a weight"))
    }

    /// Adds the gradients of weight and bias, and returns that of `x` where it is wanted.
    pub fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        wants_input: bool,
        backend: &dyn Backward,
        gradients: &mut Gradients,
    ) -> Option<Tensor> {
        let (window, width) = (&self.spec.window, self.output()[1]);
        if let (Some(bias), Some(stem)) = (&self.bias, self.name.strip_suffix(".weight"))
            && let Some(db) = gradients.of(&format!("{stem}.bias"), 1, bias.cols())
        {
            backend.bias_gradient(dy, db);
        }
        let shape = [self.weight.rows(), self.weight.cols()];
        let mut dx = wants_input.then(|| Tensor::zeros(x.rows(), x.cols()));
        for lines in self.tiles(x) {
            let rows = lines.start * width..lines.end * width;
            let dy = backend.rows(dy, rows);
            for group in 0..self.spec.groups {
                let (inputs, outputs) = self.group(group);
                let part = (self.spec.groups > 1).then(|| backend.columns(&dy, outputs.clone()));
                let dy = part.as_ref().unwrap_or(&dy);
                if gradients.wants(&self.name) {
                    let patches = backend.patches(x, window, inputs.clone(), lines.clone());
                    gradients.add_product(&self.name, shape, outputs.clone(), [(&patches).into(), dy.into()], backend);
                }
                if let Some(dx) = &mut dx {
                    let patches = backend.linear_transposed(dy, &self.weight, outputs);
                    backend.add_patches(&patches, window, inputs, lines.clone(), dx);
                }
            }
        }
        dx
    }
}
