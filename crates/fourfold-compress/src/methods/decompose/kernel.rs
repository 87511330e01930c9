//! A convolution's kernel as a 4-way tensor, and what its decompositions share.

use crate::MethodError;

/// A kernel `[outputs, inputs, height, width]`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Its four lengths.
    pub shape: [usize; 4],
    /// Its elements.
    pub values: Vec<f64>,
}

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Columns of a row.
    pub cols: usize,
    /// Its elements.
    pub values: Vec<f64>,
}

impl Matrix {
    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { cols, values: vec![0.0; rows * cols] }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.cols.max(1)
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[f64] {
        &self.values[r * self.cols..(r + 1) * self.cols]
    }

    /// `selfᵀ · self`.
    pub fn gram(&self) -> Self {
        let mut gram = Self::zeros(self.cols, self.cols);
        for row in self.values.chunks_exact(self.cols) {
            for (i, &a) in row.iter().enumerate() {
                gram.values[i * self.cols..].iter_mut().zip(row).for_each(|(g, &b)| *g += a * b);
            }
        }
        gram
    }
}

impl Kernel {
    /// A kernel of finite values.
    ///
    /// # Errors
    /// A value that is not finite, or another number of values.
    pub fn new(shape: [usize; 4], values: &[f32]) -> Result<Self, MethodError> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(MethodError::Width { found: values.len(), expected: shape.iter().product() });
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let cols = (values.len() / shape[0].max(1)).max(1);
            return Err(MethodError::NotFinite { row: at / cols, col: at % cols, value: values[at] });
        }
        Ok(Self { shape, values: values.iter().map(|&v| f64::from(v)).collect() })
    }

    /// Σ of the squares.
    pub fn energy(&self) -> f64 {
        self.values.iter().map(|v| v * v).sum()
    }

    /// Calls `visit(index along each axis, value)` for every element.
    pub fn each(&self, mut visit: impl FnMut([usize; 4], f64)) {
        let [_, i, h, w] = self.shape;
        for (at, &value) in self.values.iter().enumerate() {
            visit([at / (i * h * w), at / (h * w) % i, at / w % h, at % w], value);
        }
    }

    /// `X Xᵀ` of the unfolding along `axis`.
    pub fn unfolded_gram(&self, axis: usize) -> Matrix {
        let n = self.shape[axis];
        let inner: usize = self.shape[axis + 1..].iter().product();
        let mut gram = Matrix::zeros(n, n);
        for slab in self.values.chunks_exact((n * inner).max(1)) {
            for a in 0..n {
                let row = &slab[a * inner..(a + 1) * inner];
                for b in 0..=a {
                    let dot: f64 = row.iter().zip(&slab[b * inner..(b + 1) * inner]).map(|(x, y)| x * y).sum();
                    gram.values[a * n + b] += dot;
                }
            }
        }
        for a in 0..n {
            (0..a).for_each(|b| gram.values[b * n + a] = gram.values[a * n + b]);
        }
        gram
    }

    /// The tensor with `axis` multiplied by `mᵀ`: `m` is `[length of the axis, new length]`.
    pub fn project(&self, axis: usize, m: &Matrix) -> Self {
        let n = self.shape[axis];
        let inner: usize = self.shape[axis + 1..].iter().product();
        let mut shape = self.shape;
        shape[axis] = m.cols;
        let mut values = vec![0.0; shape.iter().product()];
        let slabs = self.values.chunks_exact((n * inner).max(1)).zip(values.chunks_exact_mut((m.cols * inner).max(1)));
        for (from, to) in slabs {
            for (a, from) in from.chunks_exact(inner).enumerate() {
                for (&factor, to) in m.row(a).iter().zip(to.chunks_exact_mut(inner)) {
                    to.iter_mut().zip(from).for_each(|(t, &f)| *t += factor * f);
                }
            }
        }
        Self { shape, values }
    }
}

/// Eigenvalues of a symmetric matrix, largest first, and its eigenvectors as columns in that order (cyclic Jacobi: Golub & Van Loan,
/// "Matrix Computations", section 8.5). For the few hundred channels that a convolution has.
pub fn symmetric_eigen(matrix: &Matrix) -> (Vec<f64>, Matrix) {
    const SWEEPS: usize = 60;
    let n = matrix.cols;
    let mut a = matrix.values.clone();
    let mut v = Matrix::zeros(n, n);
    (0..n).for_each(|i| v.values[i * n + i] = 1.0);
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..SWEEPS {
        let off: f64 = (0..n * n).filter(|at| at / n != at % n).map(|at| a[at] * a[at]).sum();
        if off <= 1e-30 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = a[p * n + q];
                if apq * apq <= 1e-36 * total {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let (c, s) = (1.0 / (t * t + 1.0).sqrt(), t / (t * t + 1.0).sqrt());
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v.values[k * n + p], v.values[k * n + q]);
                    (v.values[k * n + p], v.values[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    let mut vectors = Matrix::zeros(n, n);
    for (to, &from) in order.iter().enumerate() {
        (0..n).for_each(|k| vectors.values[k * n + to] = v.values[k * n + from]);
    }
    (order.iter().map(|&i| a[i * n + i]).collect(), vectors)
}

/// The leading eigenvectors of a symmetric matrix, as columns.
pub fn leading(matrix: &Matrix, count: usize) -> Matrix {
    let (_, vectors) = symmetric_eigen(matrix);
    let mut kept = Matrix::zeros(matrix.cols, count);
    for r in 0..matrix.cols {
        kept.values[r * count..(r + 1) * count].copy_from_slice(&vectors.row(r)[..count]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_give_the_matrix_back() {
        let base = Matrix { cols: 5, values: (0..35).map(|i| f64::from(i * i % 11) - 4.0).collect() };
        let gram = base.gram();
        let (values, vectors) = symmetric_eigen(&gram);
        assert!(values.windows(2).all(|w| w[0] >= w[1]), "{values:?}");
        for (r, c) in (0..5).flat_map(|r| (0..5).map(move |c| (r, c))) {
            let sum: f64 = (0..5).map(|k| vectors.row(r)[k] * values[k] * vectors.row(c)[k]).sum();
            assert!((sum - gram.row(r)[c]).abs() < 1e-9, "[{r}, {c}]: {sum}");
        }
    }
}
