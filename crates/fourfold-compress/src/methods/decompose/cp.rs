//! CP decomposition of a convolution's kernel by alternating least squares (Lebedev et al. 2015, "Speeding-up Convolutional Neural
//! Networks Using Fine-tuned CP-Decomposition", section 3): a 1x1 convolution, a column and a row for each channel, and a 1x1
//! convolution.

use super::kernel::{Kernel, Matrix, leading, symmetric_eigen};
use crate::MethodError;

/// `K[o, i, h, w] ≈ Σ_r factors[0][o, r] · factors[1][i, r] · factors[2][h, r] · factors[3][w, r]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Cp {
    /// Along outputs, inputs, height and width, each `[length, rank]`.
    pub factors: [Matrix; 4],
    /// Energy of the error relative to the kernel's; 0 for a kernel of zeros.
    pub error: f64,
}

/// Sweeps of one start at most.
const SWEEPS: usize = 500;

/// Starts: the leading singular vectors, and random ones. The best end is taken.
const STARTS: u64 = 4;

/// Decomposes a kernel.
///
/// # Errors
/// A rank of 0, or above the product of the kernel's three smallest lengths, which is enough for an exact decomposition.
pub fn cp(kernel: &Kernel, rank: usize) -> Result<Cp, MethodError> {
    let largest = kernel.shape.into_iter().max().unwrap_or(1).max(1);
    let exact = kernel.values.len() / largest;
    if rank == 0 || rank > exact {
        return Err(MethodError::Settings(format!("rank {rank}: a kernel of {:?} has at most {exact}", kernel.shape)));
    }
    let mut best: Option<Cp> = None;
    for start in 0..STARTS {
        let found = descend(kernel, begin(kernel, rank, start));
        if best.as_ref().is_none_or(|best| found.error < best.error) {
            best = Some(found);
        }
    }
    best.ok_or_else(|| MethodError::Settings("no start".to_owned()))
}

/// Factors to begin with: leading singular vectors of the unfoldings at start 0 (columns beyond them random), random ones else.
fn begin(kernel: &Kernel, rank: usize, start: u64) -> [Matrix; 4] {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(start + 1);
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    [0, 1, 2, 3].map(|axis| {
        let n = kernel.shape[axis];
        let known = if start == 0 { rank.min(n) } else { 0 };
        let vectors = leading(&kernel.unfolded_gram(axis), known);
        let mut factor = Matrix::zeros(n, rank);
        for (r, row) in factor.values.chunks_exact_mut(rank).enumerate() {
            row.iter_mut().enumerate().for_each(|(c, v)| *v = if c < known { vectors.row(r)[c] } else { random() });
        }
        factor
    })
}

fn descend(kernel: &Kernel, mut factors: [Matrix; 4]) -> Cp {
    let rank = factors[0].cols;
    let energy = kernel.energy();
    let mut error = f64::INFINITY;
    for _ in 0..SWEEPS {
        for axis in 0..4 {
            // The least-squares factor: (unfolding · Khatri-Rao product of the others) · (∘ of their Gram matrices)⁺.
            let mut product = Matrix::zeros(kernel.shape[axis], rank);
            kernel.each(|index, value| {
                let to = &mut product.values[index[axis] * rank..(index[axis] + 1) * rank];
                let mut others = (0..4).filter(|&other| other != axis).map(|other| factors[other].row(index[other]));
                if let (Some(a), Some(b), Some(c)) = (others.next(), others.next(), others.next()) {
                    for (((t, &a), &b), &c) in to.iter_mut().zip(a).zip(b).zip(c) {
                        *t += value * a * b * c;
                    }
                }
            });
            let mut gram = Matrix { cols: rank, values: vec![1.0; rank * rank] };
            for other in (0..4).filter(|&other| other != axis) {
                gram.values.iter_mut().zip(factors[other].gram().values).for_each(|(g, h)| *g *= h);
            }
            factors[axis] = times_inverse(&product, &gram);
            if axis < 3 {
                normalise(&mut factors[axis]);
            }
        }
        let now = relative_error(kernel, &factors, energy);
        let done = error - now <= 1e-10;
        error = error.min(now);
        if done {
            break;
        }
    }
    Cp { error: relative_error(kernel, &factors, energy), factors }
}

/// `m · gram⁺`, by eigenvalues, tiny ones left out.
fn times_inverse(m: &Matrix, gram: &Matrix) -> Matrix {
    let n = gram.cols;
    let (values, vectors) = symmetric_eigen(gram);
    let least = 1e-12 * values.first().copied().unwrap_or(0.0);
    let mut result = Matrix::zeros(m.rows(), n);
    for (row, out) in m.values.chunks_exact(n).zip(result.values.chunks_exact_mut(n)) {
        for (k, &value) in values.iter().enumerate().filter(|(_, v)| **v > least) {
            let along: f64 = row.iter().enumerate().map(|(i, v)| v * vectors.row(i)[k]).sum::<f64>() / value;
            out.iter_mut().enumerate().for_each(|(i, o)| *o += along * vectors.row(i)[k]);
        }
    }
    result
}

/// Columns of length one; the last axis keeps the sizes.
fn normalise(factor: &mut Matrix) {
    for c in 0..factor.cols {
        let size = factor.values.iter().skip(c).step_by(factor.cols).map(|v| v * v).sum::<f64>().sqrt();
        if size > 0.0 {
            factor.values.iter_mut().skip(c).step_by(factor.cols).for_each(|v| *v /= size);
        }
    }
}

fn relative_error(kernel: &Kernel, factors: &[Matrix; 4], energy: f64) -> f64 {
    let [a, b, c, d] = factors;
    let mut sum = 0.0;
    kernel.each(|[o, i, h, w], value| {
        let terms = a.row(o).iter().zip(b.row(i)).zip(c.row(h)).zip(d.row(w));
        sum += (value - terms.map(|(((a, b), c), d)| a * b * c * d).sum::<f64>()).powi(2);
    });
    if energy > 0.0 { sum / energy } else { 0.0 }
}
