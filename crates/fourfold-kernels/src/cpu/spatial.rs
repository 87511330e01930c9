//! Convolutional networks on the CPU: lines and blocks of rows in parallel. Sums go by blocks of fixed size, so that they do not
//! depend on the number of threads.

use std::ops::Range;

use super::Cpu;
use super::simd::{Simd, for_isa};
use crate::spatial::{Averages, Moments, Signs, Spatial, Window};
use crate::{Reference, Tensor};

/// Elements below which a work item is not worth a thread.
const GRAIN: usize = 1 << 14;

/// Rows whose sums are taken in f32.
const SUM_ROWS: usize = 256;

/// Taps of a window that are gathered without a heap.
const MOST_TAPS: usize = 64;

fn grain(elements: usize) -> usize {
    GRAIN / elements.max(1) + 1
}

impl Spatial for Cpu {
    fn patches(&self, x: &Tensor, window: &Window, channels: Range<usize>, lines: Range<usize>) -> Tensor {
        if window.taps() > MOST_TAPS {
            return Reference.patches(x, window, channels, lines);
        }
        let [height, width] = window.places();
        let cols = channels.len() * window.taps();
        let line_len = width * cols;
        let mut patches = Tensor::zeros(lines.len() * width, cols);
        let zeros = vec![0.0; channels.len()];
        self.pool.for_chunks_mut(patches.host_mut(), line_len, grain(line_len), |first, out| {
            for (i, out) in out.chunks_exact_mut(line_len).enumerate() {
                let line = lines.start + first + i;
                let (image, oy) = (line / height, line % height);
                for (ox, patch) in out.chunks_exact_mut(cols).enumerate() {
                    let mut taps: [&[f32]; MOST_TAPS] = [&zeros; MOST_TAPS];
                    for_taps(window, image, oy, ox, |tap, pixel| taps[tap] = &x.row(pixel)[channels.clone()]);
                    gather(self.isa, &taps[..window.taps()], patch);
                }
            }
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
        let ([height, width], [h, w]) = (window.places(), window.image);
        let ([kh, kw], taps) = (window.kernel, window.taps());
        let line_len = w * dx.cols();
        // Input lines below the first image of the range or above its last get nothing.
        let (begin, end) = (lines.start / height * h, lines.end.div_ceil(height) * h);
        let pixels = dx.cols();
        let touched = &mut dx.host_mut()[begin * line_len..end * line_len];
        self.pool.for_chunks_mut(touched, line_len, grain(line_len), |first, out| {
            for (i, out) in out.chunks_exact_mut(line_len).enumerate() {
                let line = begin + first + i;
                let (image, y) = (line / h, line % h);
                for ky in 0..kh {
                    let Some(from) = (y + window.padding[0]).checked_sub(ky) else { continue };
                    let oy = from / window.stride[0];
                    let output = image * height + oy;
                    if from % window.stride[0] != 0 || oy >= height || !lines.contains(&output) {
                        continue;
                    }
                    for ox in 0..width {
                        let patch = patches.row((output - lines.start) * width + ox);
                        for kx in 0..kw {
                            let Some(x) = window.pixel(1, ox, kx) else { continue };
                            let to = &mut out[x * pixels..][channels.clone()];
                            let tap = ky * kw + kx;
                            to.iter_mut().enumerate().for_each(|(c, d)| *d += patch[c * taps + tap]);
                        }
                    }
                }
            }
        });
    }

    fn scale_shift(&self, x: &mut Tensor, scale: &Tensor, shift: &Tensor) {
        let cols = x.cols().max(1);
        let (scale, shift) = (scale.host(), shift.host());
        self.pool.for_chunks_mut(x.host_mut(), cols, grain(cols), |_, rows| affine(self.isa, rows, scale, shift));
    }

    fn moments(&self, x: &Tensor) -> Moments {
        let (rows, cols) = (x.rows(), x.cols().max(1));
        // Around the first row, so that a large mean does not swallow a small variance.
        let origin = if rows > 0 { x.row(0).to_vec() } else { vec![0.0; cols] };
        let sums = self.sums(rows, cols, |block, sums| centred_sums(self.isa, &x.host()[block], &origin, sums));
        let n = rows.max(1) as f64;
        let mean = |c: usize| sums[c] / n;
        let variance = |c: usize| (sums[cols + c] / n - mean(c).powi(2)).max(0.0) as f32;
        Moments {
            mean: Tensor::new(1, cols, (0..cols).map(|c| (mean(c) + f64::from(origin[c])) as f32).collect()),
            variance: Tensor::new(1, cols, (0..cols).map(variance).collect()),
        }
    }

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
        let (rows, cols) = (x.rows(), x.cols().max(1));
        let mean = moments.mean.host();
        let sums = self.sums(rows, cols, |block, sums| {
            gradient_sums(self.isa, &x.host()[block.clone()], &dy.host()[block], mean, sums);
        });
        // dx = a · dy + b · x + c, by column.
        let mut terms = vec![0.0f32; 3 * cols];
        let n = rows.max(1) as f64;
        for c in 0..cols {
            let r = 1.0 / (f64::from(moments.variance.host()[c]) + f64::from(eps)).sqrt();
            let (db, dw) = (sums[c], sums[cols + c] * r);
            let a = f64::from(weight.host()[c]) * r;
            let b = -a * r * dw / n;
            terms[c] = a as f32;
            terms[cols + c] = b as f32;
            terms[2 * cols + c] = (-a * db / n - b * f64::from(mean[c])) as f32;
            dweight.host_mut()[c] += dw as f32;
            dbias.host_mut()[c] += db as f32;
        }
        self.pool.for_chunks_mut(dy.host_mut(), cols, grain(cols), |first, dy| {
            let x = &x.host()[first * cols..first * cols + dy.len()];
            combine(self.isa, x, dy, &terms);
        });
    }

    fn relu(&self, x: &mut Tensor) {
        self.pool.for_chunks_mut(x.host_mut(), 64, grain(64), |_, x| relu_slice(self.isa, x));
    }

    fn signs(&self, x: &Tensor) -> Signs {
        let mut words = vec![0; x.host().len().div_ceil(64)];
        self.pool.for_chunks_mut(&mut words, 1, grain(64), |first, words| {
            let end = ((first + words.len()) * 64).min(x.host().len());
            sign_words(self.isa, &x.host()[first * 64..end], words);
        });
        Signs(words)
    }

    fn mask(&self, dy: &mut Tensor, signs: &Signs) {
        self.pool.for_chunks_mut(dy.host_mut(), 64, grain(64), |first, dy| {
            let words = &signs.0[first..first + dy.len().div_ceil(64)];
            mask_slice(self.isa, dy, words);
        });
    }

    fn max_pool(&self, x: &Tensor, window: &Window) -> (Tensor, Vec<u8>) {
        let ([height, width], [h, w]) = (window.places(), window.image);
        let cols = x.cols();
        let images = x.rows() / (h * w);
        let mut y = Tensor::zeros(images * height * width, cols);
        y.host_mut().fill(f32::NEG_INFINITY);
        let mut taps = vec![0u8; y.host().len()];
        let line_len = width * cols;
        let mut both: Vec<(&mut [f32], &mut [u8])> =
            y.host_mut().chunks_exact_mut(line_len).zip(taps.chunks_exact_mut(line_len)).collect();
        self.pool.for_chunks_mut(&mut both, 1, grain(line_len), |first, lines| {
            for (i, (y, taps)) in lines.iter_mut().enumerate() {
                let (image, oy) = ((first + i) / height, (first + i) % height);
                for (ox, (y, taps)) in y.chunks_exact_mut(cols).zip(taps.chunks_exact_mut(cols)).enumerate() {
                    for_taps(window, image, oy, ox, |tap, pixel| {
                        for ((y, t), &v) in y.iter_mut().zip(taps.iter_mut()).zip(x.row(pixel)) {
                            let larger = v > *y;
                            *y = if larger { v } else { *y };
                            *t = if larger { tap as u8 } else { *t };
                        }
                    });
                }
            }
        });
        drop(both);
        (y, taps)
    }

    fn max_pool_backward(&self, dy: &Tensor, taps: &[u8], window: &Window) -> Tensor {
        let ([height, width], [h, w]) = (window.places(), window.image);
        let cols = dy.cols();
        let images = dy.rows() / (height * width);
        let mut dx = Tensor::zeros(images * h * w, cols);
        let image_len = h * w * cols;
        self.pool.for_chunks_mut(dx.host_mut(), image_len, grain(image_len), |first, out| {
            for (i, out) in out.chunks_exact_mut(image_len).enumerate() {
                let image = first + i;
                for (oy, ox) in (0..height).flat_map(|oy| (0..width).map(move |ox| (oy, ox))) {
                    let row = (image * height + oy) * width + ox;
                    let (dy, taps) = (dy.row(row), &taps[row * cols..(row + 1) * cols]);
                    for_taps(window, 0, oy, ox, |tap, pixel| {
                        let to = &mut out[pixel * cols..(pixel + 1) * cols];
                        for ((to, &d), &t) in to.iter_mut().zip(dy).zip(taps) {
                            *to += if usize::from(t) == tap { d } else { 0.0 };
                        }
                    });
                }
            }
        });
        dx
    }

    fn average_pool(&self, x: &Tensor, averages: &Averages) -> Tensor {
        let [h, w] = averages.image;
        let cols = x.cols();
        let output = averages.rows.len() * averages.cols.len() * cols;
        let mut y = Tensor::zeros(x.rows() / (h * w) * averages.rows.len() * averages.cols.len(), cols);
        self.pool.for_chunks_mut(y.host_mut(), output, grain(h * w * cols), |first, out| {
            for (i, out) in out.chunks_exact_mut(output).enumerate() {
                let places = averages.rows.iter().flat_map(|rows| averages.cols.iter().map(move |cols| (rows, cols)));
                for ((rows, columns), to) in places.zip(out.chunks_exact_mut(cols)) {
                    for (py, px) in rows.clone().flat_map(|y| columns.clone().map(move |x| (y, x))) {
                        let from = x.row(((first + i) * h + py) * w + px);
                        to.iter_mut().zip(from).for_each(|(to, &v)| *to += v);
                    }
                    let factor = averages.factor(rows, columns);
                    to.iter_mut().for_each(|v| *v *= factor);
                }
            }
        });
        y
    }

    fn average_pool_backward(&self, dy: &Tensor, averages: &Averages) -> Tensor {
        let [h, w] = averages.image;
        let (cols, outputs) = (dy.cols(), averages.rows.len() * averages.cols.len());
        let mut dx = Tensor::zeros(dy.rows() / outputs.max(1) * h * w, cols);
        let image_len = h * w * cols;
        self.pool.for_chunks_mut(dx.host_mut(), image_len, grain(image_len), |first, out| {
            for (i, out) in out.chunks_exact_mut(image_len).enumerate() {
                let places = averages.rows.iter().flat_map(|rows| averages.cols.iter().map(move |cols| (rows, cols)));
                for (place, (rows, columns)) in places.enumerate() {
                    let (from, factor) = (dy.row((first + i) * outputs + place), averages.factor(rows, columns));
                    for (py, px) in rows.clone().flat_map(|y| columns.clone().map(move |x| (y, x))) {
                        let to = &mut out[(py * w + px) * cols..][..cols];
                        to.iter_mut().zip(from).for_each(|(to, &d)| *to += factor * d);
                    }
                }
            }
        });
        dx
    }

    fn channels_first(&self, x: &Tensor, pixels: usize) -> Tensor {
        if pixels == 1 { x.clone() } else { Reference.channels_first(x, pixels) }
    }

    fn channels_last(&self, x: &Tensor, pixels: usize) -> Tensor {
        if pixels == 1 { x.clone() } else { Reference.channels_last(x, pixels) }
    }
}

impl Cpu {
    /// Two sums a column over all rows: `add(elements of some rows, sums)` for blocks of rows, then over blocks in f64.
    fn sums(&self, rows: usize, cols: usize, add: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Vec<f64> {
        let mut blocks = vec![0.0f32; rows.div_ceil(SUM_ROWS) * 2 * cols];
        self.pool.for_chunks_mut(&mut blocks, 2 * cols, grain(SUM_ROWS * cols), |first, blocks| {
            for (i, sums) in blocks.chunks_exact_mut(2 * cols).enumerate() {
                let start = (first + i) * SUM_ROWS;
                add(start * cols..(start + SUM_ROWS).min(rows) * cols, sums);
            }
        });
        let mut total = vec![0.0f64; 2 * cols];
        for block in blocks.chunks_exact(2 * cols) {
            total.iter_mut().zip(block).for_each(|(total, &s)| *total += f64::from(s));
        }
        total
    }
}

/// Calls `visit(tap, pixel row of the batch)` for each tap of a place that is not padding.
#[inline]
fn for_taps(window: &Window, image: usize, oy: usize, ox: usize, mut visit: impl FnMut(usize, usize)) {
    let [h, w] = window.image;
    for ky in 0..window.kernel[0] {
        let Some(y) = window.pixel(0, oy, ky) else { continue };
        for kx in 0..window.kernel[1] {
            let Some(x) = window.pixel(1, ox, kx) else { continue };
            visit(ky * window.kernel[1] + kx, (image * h + y) * w + x);
        }
    }
}

for_isa! {
    /// Channels of some taps, taps fastest.
    fn gather(taps: &[&[f32]], patch: &mut [f32]) = gather_with
}

#[inline(always)]
fn gather_with<S: Simd>(_s: S, taps: &[&[f32]], patch: &mut [f32]) {
    if let &[only] = taps {
        patch.copy_from_slice(only);
    } else if let Ok(nine) = <&[&[f32]; 9]>::try_from(taps) {
        for (c, patch) in patch.chunks_exact_mut(9).enumerate() {
            for (to, from) in patch.iter_mut().zip(nine) {
                *to = from[c];
            }
        }
    } else {
        for (c, patch) in patch.chunks_exact_mut(taps.len()).enumerate() {
            for (to, from) in patch.iter_mut().zip(taps) {
                *to = from[c];
            }
        }
    }
}

for_isa! {
    fn affine(rows: &mut [f32], scale: &[f32], shift: &[f32]) = affine_with
}

#[inline(always)]
fn affine_with<S: Simd>(_s: S, rows: &mut [f32], scale: &[f32], shift: &[f32]) {
    for row in rows.chunks_exact_mut(scale.len()) {
        row.iter_mut().zip(scale).zip(shift).for_each(|((v, &a), &b)| *v = *v * a + b);
    }
}

for_isa! {
    /// Adds Σ (x − origin) and Σ (x − origin)² of each column.
    fn centred_sums(rows: &[f32], origin: &[f32], sums: &mut [f32]) = centred_sums_with
}

#[inline(always)]
fn centred_sums_with<S: Simd>(_s: S, rows: &[f32], origin: &[f32], sums: &mut [f32]) {
    let (first, second) = sums.split_at_mut(origin.len());
    for row in rows.chunks_exact(origin.len()) {
        for (((&v, &o), a), b) in row.iter().zip(origin).zip(&mut *first).zip(&mut *second) {
            *a += v - o;
            *b += (v - o) * (v - o);
        }
    }
}

for_isa! {
    /// Adds Σ dy and Σ dy · (x − mean) of each column.
    fn gradient_sums(x: &[f32], dy: &[f32], mean: &[f32], sums: &mut [f32]) = gradient_sums_with
}

#[inline(always)]
fn gradient_sums_with<S: Simd>(_s: S, x: &[f32], dy: &[f32], mean: &[f32], sums: &mut [f32]) {
    let (first, second) = sums.split_at_mut(mean.len());
    for (x, dy) in x.chunks_exact(mean.len()).zip(dy.chunks_exact(mean.len())) {
        for ((((&x, &d), &m), a), b) in x.iter().zip(dy).zip(mean).zip(&mut *first).zip(&mut *second) {
            *a += d;
            *b += d * (x - m);
        }
    }
}

for_isa! {
    /// `dy ← a · dy + b · x + c`, by column; `terms` is a, b and c.
    fn combine(x: &[f32], dy: &mut [f32], terms: &[f32]) = combine_with
}

#[inline(always)]
fn combine_with<S: Simd>(_s: S, x: &[f32], dy: &mut [f32], terms: &[f32]) {
    let cols = terms.len() / 3;
    let (a, b, c) = (&terms[..cols], &terms[cols..2 * cols], &terms[2 * cols..]);
    for (x, dy) in x.chunks_exact(cols).zip(dy.chunks_exact_mut(cols)) {
        for ((((d, &x), &a), &b), &c) in dy.iter_mut().zip(x).zip(a).zip(b).zip(c) {
            *d = a * *d + b * x + c;
        }
    }
}

for_isa! {
    fn relu_slice(x: &mut [f32]) = relu_slice_with
}

#[inline(always)]
fn relu_slice_with<S: Simd>(_s: S, x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = v.max(0.0));
}

for_isa! {
    fn sign_words(x: &[f32], words: &mut [u64]) = sign_words_with
}

#[inline(always)]
fn sign_words_with<S: Simd>(_s: S, x: &[f32], words: &mut [u64]) {
    for (word, x) in words.iter_mut().zip(x.chunks(64)) {
        *word = x.iter().enumerate().fold(0, |w, (i, &v)| w | (u64::from(v > 0.0) << i));
    }
}

for_isa! {
    fn mask_slice(dy: &mut [f32], words: &[u64]) = mask_slice_with
}

#[inline(always)]
fn mask_slice_with<S: Simd>(_s: S, dy: &mut [f32], words: &[u64]) {
    for (&word, dy) in words.iter().zip(dy.chunks_mut(64)) {
        for (i, d) in dy.iter_mut().enumerate() {
            *d = if word >> i & 1 == 0 { 0.0 } else { *d };
        }
    }
}
