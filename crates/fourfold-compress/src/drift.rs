//! How far a layer's input has drifted from the original model's, and the weight that makes up for it.
//!
//! Behind compressed layers a weight W sees x̂ where the original saw x. The weight with the least `‖W·x − W̃·x̂‖²` is
//! `W̃ = W + W·E[(x − x̂)·x̂ᵀ]·E[x̂·x̂ᵀ]⁻¹`; compressing W̃ instead of W corrects, in each layer, errors of all layers before it
//! (asymmetric calibration: Li et al. 2025, "GPTAQ").

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use fourfold_tensor::{Dense, Weight};
use rayon::prelude::*;

use crate::MethodError;
use crate::factor;
use crate::hessian::Hessian;

/// Rows that one task updates.
const STRIP: usize = 96;

/// Accumulates `2/n · Σ x̂·(x − x̂)ᵀ`, `[n, n]`.
pub struct Drift {
    n: usize,
    data: Vec<f32>,
    tokens: u64,
}

impl Drift {
    /// An empty accumulator for inputs of `n` columns.
    pub fn new(n: usize) -> Self {
        Self { n, data: vec![0.0; n * n], tokens: 0 }
    }

    /// Adds inputs as they are now and as the original model has them, both `[tokens, n]`.
    ///
    /// # Panics
    /// When their sizes differ.
    pub fn accumulate(&mut self, now: &[f32], original: &[f32]) {
        let n = self.n;
        assert_eq!(now.len(), original.len(), "inputs of the same tokens");
        let difference: Vec<f32> = original.iter().zip(now).map(|(o, n)| o - n).collect();
        let tokens = now.len() / n;
        let now = MatRef::from_row_major_slice(now, tokens, n);
        let difference = MatRef::from_row_major_slice(&difference, tokens, n);
        self.data.par_chunks_mut(STRIP * n).enumerate().for_each(|(i, strip)| {
            let rows = strip.len() / n;
            let strip = MatMut::from_row_major_slice_mut(strip, rows, n);
            matmul(strip, Accum::Add, now.subcols(i * STRIP, rows).transpose(), difference, 1.0, Par::Seq);
        });
        self.tokens += tokens as u64;
    }

    /// The weight that stands for `weight` on the drifted input whose Hessian is `hessian`. `damping`, a share of the mean
    /// diagonal, holds back where the text says little.
    ///
    /// # Errors
    /// A Hessian that is not positive definite.
    pub fn target(&self, weight: &Weight, hessian: &Hessian, damping: f64) -> Result<Weight, MethodError> {
        let (n, rows) = (self.n, weight.rows());
        if weight.cols() != n || self.tokens == 0 {
            return Ok(weight.clone());
        }
        let mut w = weight.to_f32();
        // D·Wᵀ, [n, rows].
        let mut right = vec![0.0f32; n * rows];
        let scale = 2.0 / self.tokens as f32;
        let matrix = MatRef::from_row_major_slice(&self.data, n, n);
        let columns = MatRef::from_row_major_slice(&w, rows, n).transpose();
        right.par_chunks_mut(STRIP * rows).enumerate().for_each(|(i, strip)| {
            let count = strip.len() / rows;
            let strip = MatMut::from_row_major_slice_mut(strip, count, rows);
            matmul(strip, Accum::Replace, matrix.subrows(i * STRIP, count), columns, scale, Par::Seq);
        });
        factor::solve(hessian, damping, &mut right, rows)?;
        for (r, row) in w.chunks_exact_mut(n).enumerate() {
            for (c, value) in row.iter_mut().enumerate() {
                *value += right[c * rows + r];
            }
        }
        Ok(Dense::from_f32(vec![rows, n], w).into())
    }
}
