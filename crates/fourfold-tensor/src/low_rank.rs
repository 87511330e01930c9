//! A matrix as the product of two thin ones, which are never multiplied out.

use thiserror::Error;

use crate::Weight;

/// `up · down`: up `[rows, rank]`, down `[rank, cols]`. The factors are weights of any form.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    up: Box<Weight>,
    down: Box<Weight>,
}

/// Two factors that have no product.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("low-rank factors [{rows}, {up_rank}] and [{down_rank}, {cols}] have no product")]
pub struct LowRankError {
    /// Rows of `up`.
    pub rows: usize,
    /// Columns of `up`.
    pub up_rank: usize,
    /// Rows of `down`.
    pub down_rank: usize,
    /// Columns of `down`.
    pub cols: usize,
}

impl LowRank {
    /// Joins two factors.
    ///
    /// # Errors
    /// Where the columns of `up` are not as many as the rows of `down`.
    pub fn new(up: Weight, down: Weight) -> Result<Self, LowRankError> {
        if up.cols() == down.rows() {
            return Ok(Self { up: Box::new(up), down: Box::new(down) });
        }
        Err(LowRankError { rows: up.rows(), up_rank: up.cols(), down_rank: down.rows(), cols: down.cols() })
    }

    /// `[rows, rank]`.
    pub fn up(&self) -> &Weight {
        &self.up
    }

    /// `[rank, cols]`.
    pub fn down(&self) -> &Weight {
        &self.down
    }

    /// Both factors, `up` first.
    pub fn into_factors(self) -> (Weight, Weight) {
        (*self.up, *self.down)
    }

    /// The inner dimension.
    pub fn rank(&self) -> usize {
        self.up.cols()
    }

    /// Row `r` of the product, into `out` of length `cols`. For more than a few rows see [`LowRank::to_f32`].
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let mut row = vec![0.0; self.down.cols()];
        self.combine(r, out, |k, add| {
            self.down.read_row(k, &mut row);
            add(&row);
        });
    }

    /// The product, `[rows, cols]` row-major: the values of [`LowRank::read_row`], with `down` read once.
    pub fn to_f32(&self) -> Vec<f32> {
        let (rows, cols) = (self.up.rows(), self.down.cols());
        let down = self.down.to_f32();
        let mut all = vec![0.0; rows * cols];
        for (r, out) in all.chunks_exact_mut(cols.max(1)).enumerate() {
            self.combine(r, out, |k, add| add(&down[k * cols..(k + 1) * cols]));
        }
        all
    }

    /// `Σ_k up[r, k] · down[k]` in f64, in the order of k; `row` gives `down[k]` to what it is handed.
    fn combine(&self, r: usize, out: &mut [f32], mut row: impl FnMut(usize, &mut dyn FnMut(&[f32]))) {
        let mut factors = vec![0.0; self.rank()];
        self.up.read_row(r, &mut factors);
        let mut sums = vec![0.0f64; out.len()];
        for (k, &factor) in factors.iter().enumerate() {
            row(k, &mut |values| {
                sums.iter_mut().zip(values).for_each(|(sum, &v)| *sum += f64::from(factor) * f64::from(v));
            });
        }
        out.iter_mut().zip(&sums).for_each(|(o, &sum)| *o = sum as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dense;

    #[test]
    fn rows_are_those_of_the_product() {
        let up = Dense::from_f32(vec![2, 2], vec![1.0, 2.0, 0.0, -1.0]);
        let down = Dense::from_f32(vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let product: Weight = LowRank::new(up.clone().into(), down.into()).unwrap().into();
        let mut row = [0.0; 3];
        product.read_row(1, &mut row);
        assert_eq!(row, [-4.0, -5.0, -6.0]);
        assert_eq!(product.to_f32(), [9.0, 12.0, 15.0, -4.0, -5.0, -6.0]);
        assert_eq!((product.shape(), product.byte_len()), (vec![2, 3], 40));
        let error = LowRank::new(up.into(), Dense::from_f32(vec![3, 1], vec![0.0; 3]).into()).unwrap_err();
        assert_eq!((error.up_rank, error.down_rank), (2, 3));
    }
}
