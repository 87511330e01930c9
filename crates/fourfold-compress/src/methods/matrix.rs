//! What methods share that see a weight as a matrix of floats.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use fourfold_tensor::Weight;
use rayon::prelude::*;

use super::Stats;
use super::quantize::store::read_finite;
use crate::MethodError;

/// Rows of a task.
const ROWS: usize = 32;

/// The weight, `[rows, cols]` row-major.
///
/// # Errors
/// A value that is not finite, by its place.
pub(crate) fn read(weight: &Weight) -> Result<Vec<f32>, MethodError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut all = vec![0.0f32; rows * cols];
    let lines = all.par_chunks_mut(cols.max(1)).enumerate();
    let results: Vec<_> = lines.map(|(r, row)| read_finite(weight, r, row)).collect();
    results.into_iter().collect::<Result<(), _>>()?;
    Ok(all)
}

/// What is known of each input's strength, E[x_i²] up to a factor; nothing where nothing is known.
///
/// # Errors
/// Moments of another width.
pub(crate) fn moments<'a>(stats: &Stats<'a>, cols: usize) -> Result<Option<&'a [f32]>, MethodError> {
    match stats.moments {
        Some(m) if m.len() != cols => Err(MethodError::Width { found: m.len(), expected: cols }),
        moments => Ok(moments),
    }
}

/// `tr(D·H·Dᵀ)` of `[rows, cols]` D, with the best H known: see [`super::Compressed::error`].
pub(crate) fn energy(d: &[f32], cols: usize, stats: &Stats) -> f64 {
    let parts = d.par_chunks(ROWS * cols.max(1)).map(|d| {
        let rows = d.len() / cols.max(1);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        match (stats.hessian, stats.moments) {
            (Some(h), _) => {
                let mut product = vec![0.0f32; d.len()];
                let h = MatRef::from_row_major_slice(h.data(), cols, cols);
                let left = MatRef::from_row_major_slice(d, rows, cols);
                let to = MatMut::from_row_major_slice_mut(&mut product, rows, cols);
                matmul(to, Accum::Replace, left, h, 1.0, Par::Seq);
                dot(&product, d)
            }
            (None, Some(m)) => {
                d.chunks(cols.max(1)).map(|d| d.iter().zip(m).map(|(&d, &m)| f64::from(m * d * d)).sum::<f64>()).sum()
            }
            (None, None) => dot(d, d),
        }
    });
    parts.collect::<Vec<f64>>().into_iter().sum()
}

/// Energy of the error relative to the output's: see [`super::Compressed::error`].
pub(crate) fn relative_error(original: &[f32], approximation: &Weight, stats: &Stats) -> f64 {
    let cols = approximation.cols();
    let total = energy(original, cols, stats);
    if total <= 0.0 {
        return 0.0;
    }
    let mut difference = approximation.to_f32();
    difference.iter_mut().zip(original).for_each(|(d, &w)| *d = w - *d);
    energy(&difference, cols, stats) / total
}
