//! A gradient that waits in bf16 until the rest of its tensor's gradient is known: that of a tied projection, which is known first,
//! while the embedding's share of the same tensor comes last. In between it would be the largest thing in memory.
//!
//! It is narrowed and widened where it lies, so that the two forms never exist side by side.

use fourfold_kernels::Tensor;
use half::bf16;

/// Elements converted at a time.
const CHUNK: usize = 1 << 10;

/// A gradient `[rows, cols]` in bf16, rounded to nearest.
pub struct Waiting {
    rows: usize,
    cols: usize,
    /// Two elements in each.
    pairs: Vec<f32>,
}

impl Waiting {
    /// Narrows a gradient, and gives half of its memory back.
    pub fn new(gradient: Tensor) -> Self {
        let (rows, cols) = (gradient.rows(), gradient.cols());
        let mut pairs = gradient.into_host();
        let len = pairs.len();
        let mut narrow = [bf16::ZERO; CHUNK];
        for start in (0..len).step_by(CHUNK) {
            let chunk = start..len.min(start + CHUNK);
            let narrow = &mut narrow[..chunk.len()];
            for (narrow, &wide) in narrow.iter_mut().zip(&pairs[chunk]) {
                *narrow = bf16::from_f32(wide);
            }
            bytemuck::cast_slice_mut(&mut pairs)[start..start + narrow.len()].copy_from_slice(narrow);
        }
        pairs.truncate(len.div_ceil(2));
        pairs.shrink_to_fit();
        Self { rows, cols, pairs }
    }

    /// The gradient in f32 again.
    pub fn widen(self) -> Tensor {
        let Self { rows, cols, mut pairs } = self;
        let len = rows * cols;
        pairs.reserve_exact(len - pairs.len());
        pairs.resize(len, 0.0);
        let mut narrow = [bf16::ZERO; CHUNK];
        // From the end: what is written lies behind what is yet to be read.
        for start in (0..len).step_by(CHUNK).rev() {
            let chunk = start..len.min(start + CHUNK);
            let narrow = &mut narrow[..chunk.len()];
            narrow.copy_from_slice(&bytemuck::cast_slice(&pairs)[chunk.clone()]);
            for (wide, narrow) in pairs[chunk].iter_mut().zip(narrow) {
                *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
            }
        }
        Tensor::new(rows, cols, pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_rounded_to_bf16() {
        for (rows, cols) in [(1, 1), (3, 5), (1, CHUNK), (7, 1000), (129, 64)] {
            let value = |i: usize| (i as f32 * 0.37).sin() * 10f32.powi(i as i32 % 9 - 4);
            let gradient = Tensor::new(rows, cols, (0..rows * cols).map(value).collect());
            let expected: Vec<f32> = gradient.host().iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
            let waiting = Waiting::new(gradient);
            assert!(waiting.pairs.capacity() <= (rows * cols).div_ceil(2));
            let back = waiting.widen();
            assert_eq!((back.rows(), back.cols(), back.into_host()), (rows, cols, expected));
        }
    }
}
