//! Activations.

use half::bf16;

/// A matrix of f32 activations, row-major, held by a backend. Rows are tokens, most often; a tensor of heads is the same
/// data seen as `[tokens · heads, head_dim]` ([`Tensor::reshape`]).
///
/// Layers do not look inside: they pass tensors to [`crate::Backend`] operations. [`Tensor::host`] is for the ends of the
/// program (logits for a sampler, activations for calibration) and for backends.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Tensor {
    /// A tensor of given values.
    ///
    /// # Panics
    /// When `data.len() != rows · cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(rows * cols, data.len(), "[{rows}, {cols}] does not hold {} values", data.len());
        Self { rows, cols, data }
    }

    /// A tensor of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, vec![0.0; rows * cols])
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same values in another shape of as many elements.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, self.data)
    }

    /// The values.
    pub fn host(&self) -> &[f32] {
        &self.data
    }

    /// The values, to change.
    pub fn host_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// The values themselves.
    pub fn into_host(self) -> Vec<f32> {
        self.data
    }
}

/// Activations in bf16: what training keeps of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Bf16Tensor {
    rows: usize,
    cols: usize,
    data: Vec<bf16>,
}

impl Bf16Tensor {
    /// A tensor of given values.
    ///
    /// # Panics
    /// When `data.len() != rows · cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<bf16>) -> Self {
        assert_eq!(rows * cols, data.len(), "[{rows}, {cols}] does not hold {} values", data.len());
        Self { rows, cols, data }
    }

    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![bf16::ZERO; rows * cols] }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values.
    pub fn host(&self) -> &[bf16] {
        &self.data
    }

    /// The values, to change.
    pub fn host_mut(&mut self) -> &mut [bf16] {
        &mut self.data
    }
}
