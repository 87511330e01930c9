//! The second-moment matrix of a linear layer's input, `H = 2/n · Σ x xᵀ` (Frantar et al. 2022, section 3): the Hessian of the
//! layer's squared output error in any row of its weight.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows of H that one task updates.
const STRIP: usize = 96;

/// Accumulates and holds H, `[n, n]` f32, symmetric.
#[derive(Clone, Debug)]
pub struct Hessian {
    n: usize,
    data: Vec<f32>,
    tokens: u64,
    finished: bool,
}

impl Hessian {
    /// An empty accumulator for inputs of `n` columns.
    pub fn new(n: usize) -> Self {
        Self { n, data: vec![0.0; n * n], tokens: 0, finished: false }
    }

    /// A given matrix, for tests and for callers who have one.
    ///
    /// # Panics
    /// When `data` is not `[n, n]`.
    pub fn from_matrix(n: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), n * n, "[{n}, {n}] does not hold {} values", data.len());
        Self { n, data, tokens: 1, finished: true }
    }

    /// The identity: every input equally strong and none related.
    pub fn identity(n: usize) -> Self {
        let mut data = vec![0.0; n * n];
        data.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
        Self::from_matrix(n, data)
    }

    /// Columns.
    pub fn size(&self) -> usize {
        self.n
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds inputs `x`, `[tokens, n]` row-major: a blocked symmetric update of the lower triangle. Each strip is one sequential
    /// product, so the sum does not depend on the number of threads.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows, or after [`Hessian::finish`].
    pub fn accumulate(&mut self, x: &[f32]) {
        let n = self.n;
        assert!(!self.finished && x.len().is_multiple_of(n), "inputs of {n} columns, before finish");
        let tokens = x.len() / n;
        let x = MatRef::from_row_major_slice(x, tokens, n);
        self.data.par_chunks_mut(STRIP * n).enumerate().for_each(|(i, strip)| {
            let first = i * STRIP;
            let rows = strip.len() / n;
            let strip = MatMut::from_row_major_slice_mut(strip, rows, n);
            let left = x.subcols(first, rows).transpose();
            matmul(strip.subcols_mut(0, first + rows), Accum::Add, left, x.subcols(0, first + rows), 1.0, Par::Seq);
        });
        self.tokens += tokens as u64;
    }

    /// Divides by the tokens and fills the upper triangle. To be called once, after the last [`Hessian::accumulate`].
    pub fn finish(&mut self) {
        if self.finished {
            return;
        }
        self.finished = true;
        let factor = if self.tokens == 0 { 0.0 } else { (2.0 / self.tokens as f64) as f32 };
        let n = self.n;
        for i in 0..n {
            for j in 0..=i {
                let value = self.data[i * n + j] * factor;
                self.data[i * n + j] = value;
                self.data[j * n + i] = value;
            }
        }
    }

    /// Shrinks toward another matrix of the same inputs, seen by more tokens:
    /// `(t·H + prior·other) / (t + prior)`. For experts that few tokens reached: `other` is their layer's, and `prior` is the
    /// number of tokens that the layer's matrix counts for.
    ///
    /// # Panics
    /// When sizes differ or either is unfinished.
    pub fn shrink(&mut self, other: &Self, prior: f64) {
        assert!(self.finished && other.finished && self.n == other.n, "two finished matrices of one size");
        let own = self.tokens as f64 / (self.tokens as f64 + prior);
        let (own, rest) = (own as f32, (1.0 - own) as f32);
        self.data.iter_mut().zip(&other.data).for_each(|(a, &b)| *a = *a * own + b * rest);
    }

    /// The token-weighted mean of several finished matrices; `None` where there is none, or none saw a token.
    pub fn pooled<'a>(matrices: impl Iterator<Item = &'a Self>) -> Option<Self> {
        let mut pooled: Option<Self> = None;
        for matrix in matrices.filter(|m| m.tokens > 0) {
            match &mut pooled {
                None => pooled = Some(matrix.clone()),
                Some(sum) => {
                    let before = sum.tokens;
                    sum.shrink(matrix, matrix.tokens as f64);
                    sum.tokens = before + matrix.tokens;
                }
            }
        }
        pooled
    }

    /// The matrix, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The diagonal: twice the second moments.
    pub fn diagonal(&self) -> Vec<f32> {
        self.data.iter().step_by(self.n + 1).copied().collect()
    }
}
