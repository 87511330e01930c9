//! The factorization `H = (U + I)·D·(U + I)ᵀ`, U strictly upper triangular, that GPTQ's error feedback reads.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::{MatMut, Par, Spec};

use crate::MethodError;
use crate::hessian::Hessian;
use crate::vector::vectorized;

/// The most damping tried, as a share of the diagonal's mean.
const MOST_DAMPING: f64 = 1.0;

/// U and D of a damped H whose columns have been put in `order`.
pub struct Factor {
    /// `order[k]` is the column rounded k-th.
    pub order: Vec<usize>,
    /// U, `[n, n]` row-major, in rounding order.
    pub upper: Vec<f32>,
    /// D, `[n]`, in rounding order.
    pub costs: Vec<f32>,
    /// The damped H in its own order, `[n, n]`.
    pub matrix: Vec<f32>,
}

/// A damped matrix on its way to a factor: how to add more.
pub struct Damped {
    matrix: Vec<f32>,
    mean: f64,
}

impl Damped {
    /// The matrix, row-major.
    pub(crate) fn matrix(&self) -> &[f32] {
        &self.matrix
    }
}

/// H with its diagonal raised by `damping` times its mean, and that damping. An input that was always 0 gets the damping alone, so that its
/// weights are rounded to nearest.
pub fn damped(hessian: &Hessian, damping: f64) -> (Damped, f64) {
    let n = hessian.size();
    let mut matrix = hessian.data().to_vec();
    let mean = hessian.diagonal().iter().map(|&v| f64::from(v)).sum::<f64>() / n.max(1) as f64;
    // No input at all: every weight counts the same.
    let mean = if mean > 0.0 { mean } else { 1.0 };
    let damping = damping.max(1e-8);
    matrix.iter_mut().step_by(n + 1).for_each(|v| *v += (mean * damping) as f32);
    (Damped { matrix, mean }, damping)
}

impl Factor {
    /// Factors a damped matrix in an order of columns, damping it more where it is not positive definite.
    ///
    /// # Errors
    /// [`MethodError::Indefinite`].
    pub fn new(damped: Damped, order: Vec<usize>, damping: f64) -> Result<Self, MethodError> {
        let n = order.len();
        let Damped { mut matrix, mean } = damped;
        let mut damping = damping;
        loop {
            // A Cholesky factor of the reversed matrix, read backwards, is upper triangular: R·Rᵀ = H.
            let reversed = |i: usize| order[n - 1 - i];
            let mut lower = vec![0.0f64; n * n];
            for i in 0..n {
                for j in 0..=i {
                    lower[i * n + j] = f64::from(matrix[reversed(i) * n + reversed(j)]);
                }
            }
            if cholesky(&mut lower, n) {
                let mut upper = vec![0.0f32; n * n];
                let mut costs = vec![0.0f32; n];
                for j in 0..n {
                    let diagonal = lower[(n - 1 - j) * n + (n - 1 - j)];
                    costs[j] = (diagonal * diagonal) as f32;
                    for i in 0..j {
                        upper[i * n + j] = (lower[(n - 1 - i) * n + (n - 1 - j)] / diagonal) as f32;
                    }
                }
                return Ok(Self { order, upper, costs, matrix });
            }
            let next = damping * 10.0;
            if next > MOST_DAMPING {
                return Err(MethodError::Indefinite { damping });
            }
            matrix.iter_mut().step_by(n + 1).for_each(|v| *v += (mean * (next - damping)) as f32);
            damping = next;
        }
    }

    /// D by column of the weight.
    pub fn costs_by_column(&self) -> Vec<f32> {
        let mut costs = vec![0.0; self.order.len()];
        for (&column, &cost) in self.order.iter().zip(&self.costs) {
            costs[column] = cost;
        }
        costs
    }

    /// `w·H·wᵀ`.
    pub fn energy(&self, w: &[f32]) -> f64 {
        let n = self.order.len();
        vectorized!({
            let rows = self.matrix.chunks_exact(n.max(1));
            w.iter().zip(rows).map(|(&w_i, row)| f64::from(w_i) * f64::from(crate::vector::dot(row, w))).sum()
        })
    }
}

/// Factors the lower triangle in place, `[n, n]` row-major; false where the matrix is not positive definite.
pub(crate) fn cholesky(lower: &mut [f64], n: usize) -> bool {
    // Sequential: the result must not depend on the number of threads.
    let params = Spec::<LltParams, f64>::default();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, params));
    let matrix = MatMut::from_row_major_slice_mut(lower, n, n);
    cholesky_in_place(matrix, LltRegularization::default(), Par::Seq, MemStack::new(&mut memory), params).is_ok()
}
