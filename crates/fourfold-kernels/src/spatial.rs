//! The operations of convolutional networks, forward and backward.
//!
//! A batch of images is a [`Tensor`] of one row a pixel, `[images · height · width, channels]`, so that a convolution is a linear
//! layer over patches ([`Spatial::patches`]) and reads a weight of any storage form. A *line* is one row of pixels of one image;
//! lines are counted through the batch.

use std::ops::Range;

use crate::Tensor;

/// A window that slides over an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width of the image.
    pub image: [usize; 2],
    /// Height and width of the window.
    pub kernel: [usize; 2],
    /// Pixels from one place to the next.
    pub stride: [usize; 2],
    /// Zeros around the image, at each side.
    pub padding: [usize; 2],
}

impl Window {
    /// Height and width of the output; `None` where the window is larger than the padded image, or is or moves by nothing.
    pub fn output(&self) -> Option<[usize; 2]> {
        let along = |axis: usize| {
            let room = (self.image[axis] + 2 * self.padding[axis]).checked_sub(self.kernel[axis])?;
            (self.kernel[axis] > 0).then_some(room.checked_div(self.stride[axis])? + 1)
        };
        Some([along(0)?, along(1)?])
    }

    /// Places inside the window.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Whether the patches are the image itself.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.padding == [0, 0]
    }

    /// Height and width of the output.
    ///
    /// # Panics
    /// Where there is none: layers check that when they are described.
    pub(crate) fn places(&self) -> [usize; 2] {
        self.output().expect("a window that fits the image")
    }

    /// The pixel along `axis` under `tap` at place `at`; `None` in the padding.
    pub(crate) fn pixel(&self, axis: usize, at: usize, tap: usize) -> Option<usize> {
        (at * self.stride[axis] + tap).checked_sub(self.padding[axis]).filter(|&p| p < self.image[axis])
    }
}

/// Averages over rectangles: windows, or a given number of parts of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Averages {
    /// Height and width of the image.
    pub image: [usize; 2],
    /// The lines of each output line.
    pub rows: Vec<Range<usize>>,
    /// The columns of each output column.
    pub cols: Vec<Range<usize>>,
    /// What a sum is divided by; the number of its pixels where absent.
    pub divisor: Option<usize>,
}

impl Averages {
    /// Each place of a window; padding counts as zeros (PyTorch's `count_include_pad`).
    pub fn windows(window: &Window) -> Self {
        let ranges = |axis: usize| {
            let places = 0..window.places()[axis];
            let clamp = |p: usize| p.saturating_sub(window.padding[axis]).min(window.image[axis]);
            let range = |at| {
                let start = at * window.stride[axis];
                clamp(start)..clamp(start + window.kernel[axis])
            };
            places.map(range).collect()
        };
        Self { image: window.image, rows: ranges(0), cols: ranges(1), divisor: Some(window.taps()) }
    }

    /// `output` parts along each axis, part i from ⌊i·n/parts⌋ to ⌈(i+1)·n/parts⌉ (PyTorch's adaptive average).
    pub fn adaptive(image: [usize; 2], output: [usize; 2]) -> Self {
        let ranges = |axis: usize| {
            let (n, parts) = (image[axis], output[axis]);
            (0..parts).map(|i| i * n / parts..((i + 1) * n).div_ceil(parts)).collect()
        };
        Self { image, rows: ranges(0), cols: ranges(1), divisor: None }
    }

    /// The factor of a pixel in an output's average.
    pub(crate) fn factor(&self, rows: &Range<usize>, cols: &Range<usize>) -> f32 {
        1.0 / self.divisor.unwrap_or(rows.len() * cols.len()).max(1) as f32
    }
}

/// Which elements of a tensor are positive, one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signs(pub(crate) Vec<u64>);

impl Signs {
    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        self.0.len() * size_of::<u64>()
    }
}

/// Mean and variance of each column.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// `[1, cols]`.
    pub mean: Tensor,
    /// Divided by the number of rows, `[1, cols]`.
    pub variance: Tensor,
}

/// A backend that runs convolutional networks. Results do not depend on the number of threads.
pub trait Spatial: Send + Sync {
    /// What the window sees (im2col) at the output lines `lines`, of the channels `channels`:
    /// `[lines · output width, channels · kernel height · kernel width]`, in the order of PyTorch's convolution weights.
    fn patches(&self, x: &Tensor, window: &Window, channels: Range<usize>, lines: Range<usize>) -> Tensor;

    /// The gradient of [`Spatial::patches`]: adds each patch to the pixels of `dx` it was taken from.
    fn add_patches(
        &self,
        patches: &Tensor,
        window: &Window,
        channels: Range<usize>,
        lines: Range<usize>,
        dx: &mut Tensor,
    );

    /// `x ← x · scale + shift`, by column.
    fn scale_shift(&self, x: &mut Tensor, scale: &Tensor, shift: &Tensor);

    /// Mean and variance of each column.
    fn moments(&self, x: &Tensor) -> Moments;

    /// The gradient of `(x − mean) / √(variance + eps) · weight + bias` with moments of `x` itself (Ioffe & Szegedy 2015), in
    /// place of `dy`; adds weight's and bias's.
    #[allow(clippy::too_many_arguments)]
    fn batch_norm_backward(
        &self,
        x: &Tensor,
        moments: &Moments,
        eps: f32,
        weight: &Tensor,
        dy: &mut Tensor,
        dweight: &mut Tensor,
        dbias: &mut Tensor,
    );

    /// `x ← max(x, 0)`.
    fn relu(&self, x: &mut Tensor);

    /// Which elements are positive.
    fn signs(&self, x: &Tensor) -> Signs;

    /// `dy ← 0` where the element was not positive: the gradient of [`Spatial::relu`].
    fn mask(&self, dy: &mut Tensor, signs: &Signs);

    /// The largest value under each window, and which tap it was under (the first of equal ones; windows of at most 256 taps).
    fn max_pool(&self, x: &Tensor, window: &Window) -> (Tensor, Vec<u8>);

    /// The gradient of [`Spatial::max_pool`]'s input.
    fn max_pool_backward(&self, dy: &Tensor, taps: &[u8], window: &Window) -> Tensor;

    /// Averages.
    fn average_pool(&self, x: &Tensor, averages: &Averages) -> Tensor;

    /// The gradient of [`Spatial::average_pool`]'s input.
    fn average_pool_backward(&self, dy: &Tensor, averages: &Averages) -> Tensor;

    /// `[images · pixels, channels]` to `[images, channels · pixels]`: an image as PyTorch flattens it.
    fn channels_first(&self, x: &Tensor, pixels: usize) -> Tensor;

    /// The way back, which is also the gradient.
    fn channels_last(&self, x: &Tensor, pixels: usize) -> Tensor;
}
