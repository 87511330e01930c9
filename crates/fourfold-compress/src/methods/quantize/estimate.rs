//! What a grid would cost a weight, without compressing it: for planners, who ask for many grids and need no more than the order.

use fourfold_tensor::{BlockType, Weight};
use rayon::prelude::*;

use super::blocks::BlockFitter;
use super::codebook;
use super::fit::Fitter;
use super::grid::{GridSpec, Levels, ScaleFormat, ZeroKind};
use super::lattice::{Group, Lattice};
use super::rtn::encode_row;
use super::store::{read_finite, round_row};
use crate::MethodError;
use crate::factor::Factor;
use crate::vector::vectorized;

/// A grid of this program's own, or ggml's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AnyGrid {
    /// Groups of any size.
    Spec(GridSpec),
    /// ggml's blocks.
    Blocks(BlockType),
}

/// Some rows of a weight, and how much an error in each of their columns costs.
pub struct Estimator {
    cols: usize,
    rows: Vec<f32>,
    /// Empty where all columns cost the same.
    costs: Vec<f32>,
    /// Energy of the rows' outputs.
    energy: f64,
    /// Rows of the whole weight for each one read.
    share: f64,
}

impl Estimator {
    /// Reads about `most` evenly spaced rows. With a `factor` a column's error costs what is left of it after GPTQ has let the columns
    /// behind it take it up; without one all columns cost the same.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn new(weight: &Weight, factor: Option<&Factor>, most: usize) -> Result<Self, MethodError> {
        let (all, cols) = (weight.rows(), weight.cols());
        let count = most.min(all);
        let mut rows = vec![0.0f32; count * cols];
        for (i, row) in rows.chunks_exact_mut(cols.max(1)).enumerate() {
            read_finite(weight, i * all / count, row)?;
        }
        let energy = rows.chunks_exact(cols.max(1)).map(|row| match factor {
            Some(factor) => factor.energy(row),
            None => row.iter().map(|&v| f64::from(v) * f64::from(v)).sum(),
        });
        let energy = energy.sum();
        Ok(Self {
            cols,
            rows,
            costs: factor.map(Factor::costs_by_column).unwrap_or_default(),
            energy,
            share: all as f64 / count.max(1) as f64,
        })
    }

    /// As [`Estimator::new`], with an error in a column weighted by its input's second moment.
    ///
    /// # Errors
    /// A value that is not finite, moments of another width.
    pub fn weighted(weight: &Weight, moments: &[f32], most: usize) -> Result<Self, MethodError> {
        let mut estimator = Self::new(weight, None, most)?;
        if moments.len() != estimator.cols {
            return Err(MethodError::Width { found: moments.len(), expected: estimator.cols });
        }
        let row = |row: &[f32]| {
            row.iter().zip(moments).map(|(&v, &m)| f64::from(m) * f64::from(v) * f64::from(v)).sum::<f64>()
        };
        estimator.energy = estimator.rows.chunks_exact(estimator.cols.max(1)).map(row).sum();
        estimator.costs = moments.to_vec();
        Ok(estimator)
    }

    /// Energy of the whole weight's outputs, `tr(W·H·Wᵀ)`, from the rows read.
    pub fn energy(&self) -> f64 {
        self.energy * self.share
    }

    /// `Σ w²` of the whole weight, from the rows read.
    pub fn row_energy(&self) -> f64 {
        self.share * self.rows.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
    }

    /// The expected error on a grid of either kind, relative to the output's energy.
    ///
    /// # Errors
    /// Settings that do not go together.
    pub fn error_of(&self, grid: &AnyGrid) -> Result<f64, MethodError> {
        match grid {
            AnyGrid::Spec(grid) => self.error(*grid),
            AnyGrid::Blocks(kind) => Ok(self.block_error(*kind)),
        }
    }

    /// The expected error in blocks of a type that divide the rows, relative to the output's energy.
    fn block_error(&self, kind: BlockType) -> f64 {
        let (fitter, size, len) = (BlockFitter::new(kind), kind.block_len(), kind.group_len());
        let errors: Vec<f64> = self
            .rows
            .par_chunks_exact(self.cols.max(1))
            .map(|row| {
                let mut error = 0.0f64;
                for (b, x) in row.chunks_exact(size).enumerate() {
                    let costs = self.costs.get(b * size..(b + 1) * size).unwrap_or(&[]);
                    let block = vectorized!(fitter.fit(x, costs));
                    for (i, &x) in x.iter().enumerate() {
                        let group = &block.groups[i / len];
                        let d = f64::from(x - fitter.lattice.value(fitter.lattice.encode(x, group), group));
                        error += f64::from(costs.get(i).copied().unwrap_or(1.0)) * d * d;
                    }
                }
                error
            })
            .collect();
        let error: f64 = errors.iter().sum();
        if self.energy > 0.0 { error / self.energy } else { 0.0 }
    }

    /// The expected error on a grid, relative to the output's energy. Learned levels are estimated by the Gaussian's.
    ///
    /// # Errors
    /// Settings that do not go together.
    pub fn error(&self, grid: GridSpec) -> Result<f64, MethodError> {
        grid.validate()?;
        let size = grid.group_size(self.cols);
        let lattice = match grid.levels {
            Levels::Uniform => Lattice::uniform(grid.bits),
            Levels::Learned => Lattice::codebook(codebook::start(grid.bits)),
        };
        let signed = grid.zero == ZeroKind::Symmetric && grid.scales != ScaleFormat::Double;
        let fitter = Fitter { lattice, bits: grid.bits, zero: grid.zero, rule: grid.rule, signed };
        let errors: Vec<f64> = self
            .rows
            .par_chunks_exact(self.cols.max(1))
            .map(|row| {
                let mut groups = vec![Group::default(); self.cols.div_ceil(size)];
                let mut codes = vec![0u8; self.cols];
                vectorized!({
                    for (g, (x, group)) in row.chunks(size).zip(groups.iter_mut()).enumerate() {
                        let costs = self.costs.get(g * size..g * size + x.len()).unwrap_or(&[]);
                        *group = fitter.fit(x, costs);
                    }
                    round_row(&mut groups, grid.scales);
                    encode_row(&fitter.lattice, row, &self.costs, size, &groups, &mut codes).0
                })
            })
            .collect();
        let error: f64 = errors.iter().sum();
        Ok(if self.energy > 0.0 { error / self.energy } else { 0.0 })
    }
}
