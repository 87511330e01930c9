//! Linear layers whose weights are packed codes.

use std::ops::Range;

use fourfold_tensor::Quantized;

use super::pool::Pool;
use super::{Activations, Isa};
use crate::{KernelError, Tensor};

/// What every call needs: threads, instruction set and precision.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The threads.
    pub pool: &'a Pool,
    /// The instruction set; must be available.
    pub isa: Isa,
    /// Precision of the input.
    pub activations: Activations,
}

/// A quantized weight in the kernels' layout.
pub struct QuantWeight {
    source: Quantized,
}

impl QuantWeight {
    /// Takes `source` into the kernels' layout and frees it.
    ///
    /// # Errors
    /// When its parts do not fit together.
    pub fn prepare(source: Quantized, _pool: &Pool) -> Result<Self, KernelError> {
        source.validate()?;
        Ok(Self { source })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.source.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.source.cols
    }

    /// Bytes it takes in memory.
    pub fn byte_len(&self) -> usize {
        self.source.byte_len()
    }

    /// Row `row` as f32, into `out` of length `cols`.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        self.source.dequantize_row(row, out);
    }
}

/// `y_i = x · W_iᵀ` for each weight, in one parallel region: x `[tokens, in]`, y_i `[tokens, out_i]`.
pub fn linear(context: Context, x: &Tensor, weights: &[&QuantWeight]) -> Vec<Tensor> {
    weights.iter().map(|w| linear_rows(context, x, w, 0..w.rows())).collect()
}

/// `y = x · W[rows, :]ᵀ`: x `[tokens, in]`, y `[tokens, rows.len()]`.
pub fn linear_rows(_context: Context, x: &Tensor, weight: &QuantWeight, rows: Range<usize>) -> Tensor {
    let mut y = Tensor::zeros(x.rows(), rows.len());
    let mut w = vec![0.0; weight.cols()];
    for (i, r) in rows.clone().enumerate() {
        weight.read_row(r, &mut w);
        for t in 0..x.rows() {
            y.host_mut()[t * rows.len() + i] = x.row(t).iter().zip(&w).map(|(a, b)| a * b).sum();
        }
    }
    y
}

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, in]`.
pub fn linear_transposed(_context: Context, x: &Tensor, weight: &QuantWeight, rows: Range<usize>) -> Tensor {
    let cols = weight.cols();
    let mut y = Tensor::zeros(x.rows(), cols);
    let mut w = vec![0.0; cols];
    for (i, r) in rows.enumerate() {
        weight.read_row(r, &mut w);
        for t in 0..x.rows() {
            let a = x.row(t)[i];
            y.host_mut()[t * cols..(t + 1) * cols].iter_mut().zip(&w).for_each(|(y, b)| *y += a * b);
        }
    }
    y
}
