//! Convolutional networks by their formulas.

use std::ops::Range;

use super::Reference;
use crate::Tensor;
use crate::spatial::{Averages, Moments, Signs, Spatial, Window};

/// Calls `visit(patch row, patch column, pixel row of the batch, channel)` for every element of a patch that is not padding.
fn each_tap(
    window: &Window,
    channels: Range<usize>,
    lines: Range<usize>,
    mut visit: impl FnMut(usize, usize, usize, usize),
) {
    let [height, width] = window.places();
    let [h, w] = window.image;
    for line in lines.clone() {
        let (image, oy) = (line / height, line % height);
        for ox in 0..width {
            for (ky, kx) in (0..window.kernel[0]).flat_map(|ky| (0..window.kernel[1]).map(move |kx| (ky, kx))) {
                let (Some(y), Some(x)) = (window.pixel(0, oy, ky), window.pixel(1, ox, kx)) else { continue };
                for (c, channel) in channels.clone().enumerate() {
                    let col = c * window.taps() + ky * window.kernel[1] + kx;
                    visit((line - lines.start) * width + ox, col, (image * h + y) * w + x, channel);
                }
            }
        }
    }
}

/// Calls `visit(output row, pixel row, factor)` for every pixel of every average.
fn each_average(averages: &Averages, images: usize, mut visit: impl FnMut(usize, usize, f32)) {
    let [h, w] = averages.image;
    let mut output = 0;
    for image in 0..images {
        for rows in &averages.rows {
            for cols in &averages.cols {
                for (y, x) in rows.clone().flat_map(|y| cols.clone().map(move |x| (y, x))) {
                    visit(output, (image * h + y) * w + x, averages.factor(rows, cols));
                }
                output += 1;
            }
        }
    }
}

fn images(x: &Tensor, [height, width]: [usize; 2]) -> usize {
    assert!(x.rows().is_multiple_of(height * width), "{} rows are no images of {height}x{width}", x.rows());
    x.rows() / (height * width)
}

impl Spatial for Reference {
    fn patches(&self, x: &Tensor, window: &Window, channels: Range<usize>, lines: Range<usize>) -> Tensor {
        let cols = channels.len() * window.taps();
        let mut patches = Tensor::zeros(lines.len() * window.places()[1], cols);
        each_tap(window, channels, lines, |row, col, pixel, channel| {
            patches.host_mut()[row * cols + col] = x.row(pixel)[channel];
        });
        patches
    }

    fn add_patches(
        &self,
        patches: &Tensor,
        window: &Window,
        channels: Range<usize>,
        lines: Range<usize>,
        dx: &mut Tensor,
    ) {
        let width = dx.cols();
        each_tap(window, channels, lines, |row, col, pixel, channel| {
            dx.host_mut()[pixel * width + channel] += patches.row(row)[col];
        });
    }

    fn scale_shift(&self, x: &mut Tensor, scale: &Tensor, shift: &Tensor) {
        let cols = x.cols();
        for (i, v) in x.host_mut().iter_mut().enumerate() {
            *v = *v * scale.host()[i % cols] + shift.host()[i % cols];
        }
    }

    fn moments(&self, x: &Tensor) -> Moments {
        let n = x.rows().max(1) as f64;
        let column = |c: usize| (0..x.rows()).map(move |r| f64::from(x.row(r)[c]));
        let means: Vec<f64> = (0..x.cols()).map(|c| column(c).sum::<f64>() / n).collect();
        let variance = |(c, mean): (usize, &f64)| (column(c).map(|v| (v - mean).powi(2)).sum::<f64>() / n) as f32;
        Moments {
            variance: Tensor::new(1, x.cols(), means.iter().enumerate().map(variance).collect()),
            mean: Tensor::new(1, x.cols(), means.iter().map(|&m| m as f32).collect()),
        }
    }

    // With x̂ = (x − mean) r, r = 1/√(variance + eps):  dx = w r (dy − mean(dy) − x̂ mean(dy x̂)),  dw = Σ dy x̂,  db = Σ dy.
    fn batch_norm_backward(
        &self,
        x: &Tensor,
        moments: &Moments,
        eps: f32,
        weight: &Tensor,
        dy: &mut Tensor,
        dweight: &mut Tensor,
        dbias: &mut Tensor,
    ) {
        let (n, cols) = (x.rows() as f64, x.cols());
        for c in 0..cols {
            let r = 1.0 / (f64::from(moments.variance.host()[c]) + f64::from(eps)).sqrt();
            let normed = |row: usize| (f64::from(x.row(row)[c]) - f64::from(moments.mean.host()[c])) * r;
            let db: f64 = (0..x.rows()).map(|row| f64::from(dy.row(row)[c])).sum();
            let dw: f64 = (0..x.rows()).map(|row| f64::from(dy.row(row)[c]) * normed(row)).sum();
            for row in 0..x.rows() {
                let d = f64::from(dy.row(row)[c]) - db / n - normed(row) * dw / n;
                dy.host_mut()[row * cols + c] = (f64::from(weight.host()[c]) * r * d) as f32;
            }
            dweight.host_mut()[c] += dw as f32;
            dbias.host_mut()[c] += db as f32;
        }
    }

    fn relu(&self, x: &mut Tensor) {
        x.host_mut().iter_mut().for_each(|v| *v = v.max(0.0));
    }

    fn signs(&self, x: &Tensor) -> Signs {
        let word = |values: &[f32]| values.iter().enumerate().fold(0, |w, (i, &v)| w | (u64::from(v > 0.0) << i));
        Signs(x.host().chunks(64).map(word).collect())
    }

    fn mask(&self, dy: &mut Tensor, signs: &Signs) {
        for (i, d) in dy.host_mut().iter_mut().enumerate() {
            if signs.0[i / 64] >> (i % 64) & 1 == 0 {
                *d = 0.0;
            }
        }
    }

    fn max_pool(&self, x: &Tensor, window: &Window) -> (Tensor, Vec<u8>) {
        let lines = images(x, window.image) * window.places()[0];
        let mut y = Tensor::zeros(lines * window.places()[1], x.cols());
        y.host_mut().fill(f32::NEG_INFINITY);
        let mut taps = vec![0; y.host().len()];
        each_tap(window, 0..x.cols(), 0..lines, |row, col, pixel, channel| {
            let at = row * x.cols() + channel;
            if x.row(pixel)[channel] > y.host()[at] {
                y.host_mut()[at] = x.row(pixel)[channel];
                taps[at] = (col % window.taps()) as u8;
            }
        });
        (y, taps)
    }

    fn max_pool_backward(&self, dy: &Tensor, taps: &[u8], window: &Window) -> Tensor {
        let images = images(dy, window.places());
        let cols = dy.cols();
        let mut dx = Tensor::zeros(images * window.image[0] * window.image[1], cols);
        each_tap(window, 0..cols, 0..images * window.places()[0], |row, col, pixel, channel| {
            if usize::from(taps[row * cols + channel]) == col % window.taps() {
                dx.host_mut()[pixel * cols + channel] += dy.row(row)[channel];
            }
        });
        dx
    }

    fn average_pool(&self, x: &Tensor, averages: &Averages) -> Tensor {
        let (images, cols) = (images(x, averages.image), x.cols());
        let mut y = Tensor::zeros(images * averages.rows.len() * averages.cols.len(), cols);
        each_average(averages, images, |output, pixel, factor| {
            let y = &mut y.host_mut()[output * cols..(output + 1) * cols];
            y.iter_mut().zip(x.row(pixel)).for_each(|(y, &x)| *y += factor * x);
        });
        y
    }

    fn average_pool_backward(&self, dy: &Tensor, averages: &Averages) -> Tensor {
        let (images, cols) = (images(dy, [averages.rows.len(), averages.cols.len()]), dy.cols());
        let mut dx = Tensor::zeros(images * averages.image[0] * averages.image[1], cols);
        each_average(averages, images, |output, pixel, factor| {
            let dx = &mut dx.host_mut()[pixel * cols..(pixel + 1) * cols];
            dx.iter_mut().zip(dy.row(output)).for_each(|(dx, &dy)| *dx += factor * dy);
        });
        dx
    }

    fn channels_first(&self, x: &Tensor, pixels: usize) -> Tensor {
        let channels = x.cols();
        let mut y = Tensor::zeros(x.rows() / pixels, channels * pixels);
        for (i, &v) in x.host().iter().enumerate() {
            let (pixel, channel) = (i / channels, i % channels);
            y.host_mut()[(pixel / pixels * channels + channel) * pixels + pixel % pixels] = v;
        }
        y
    }

    fn channels_last(&self, x: &Tensor, pixels: usize) -> Tensor {
        let channels = x.cols() / pixels;
        let mut y = Tensor::zeros(x.rows() * pixels, channels);
        for (i, &v) in x.host().iter().enumerate() {
            let (image, channel, pixel) = (i / x.cols(), i % x.cols() / pixels, i % pixels);
            y.host_mut()[(image * pixels + pixel) * channels + channel] = v;
        }
        y
    }
}
