//! Products with a stored weight, which is read one row at a time.

use std::ops::Range;

use fourfold_tensor::Weight;

use crate::Tensor;

/// `y = x · W[rows, :]ᵀ + b`.
pub fn linear(x: &Tensor, weight: &Weight, rows: Range<usize>, bias: Option<&Tensor>) -> Tensor {
    // Factors are never multiplied out: that would be another number of operations, and other roundings.
    if let Weight::LowRank(w) = weight {
        return linear(&linear(x, w.down(), 0..w.rank(), None), w.up(), rows, bias);
    }
    assert_eq!(x.cols(), weight.cols(), "an input of {} columns for a weight of {}", x.cols(), weight.cols());
    let mut y = Tensor::zeros(x.rows(), rows.len());
    let mut row = vec![0.0; weight.cols()];
    for (o, r) in rows.clone().enumerate() {
        weight.read_row(r, &mut row);
        let b = bias.map_or(0.0, |b| f64::from(b.host()[r]));
        for t in 0..x.rows() {
            let dot: f64 = x.row(t).iter().zip(&row).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            y.host_mut()[t * rows.len() + o] = (dot + b) as f32;
        }
    }
    y
}

/// `y = x · W[rows, :]`.
pub fn linear_transposed(x: &Tensor, weight: &Weight, rows: Range<usize>) -> Tensor {
    if let Weight::LowRank(w) = weight {
        return linear_transposed(&linear_transposed(x, w.up(), rows), w.down(), 0..w.rank());
    }
    assert_eq!(x.cols(), rows.len(), "an input of {} columns for {} rows of a weight", x.cols(), rows.len());
    let cols = weight.cols();
    let mut sums = vec![0.0f64; x.rows() * cols];
    let mut row = vec![0.0; cols];
    for (i, r) in rows.enumerate() {
        weight.read_row(r, &mut row);
        for (t, sums) in sums.chunks_exact_mut(cols).enumerate() {
            let factor = f64::from(x.row(t)[i]);
            for (sum, &w) in sums.iter_mut().zip(&row) {
                *sum += factor * f64::from(w);
            }
        }
    }
    Tensor::new(x.rows(), cols, sums.into_iter().map(|s| s as f32).collect())
}
