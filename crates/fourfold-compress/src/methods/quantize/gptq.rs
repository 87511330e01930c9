//! GPTQ (Frantar et al. 2022): columns are rounded one after another, and each column's error is taken up by the columns
//! that are still to come, so that the layer's OUTPUT changes least.
//!
//! It is written in the equivalent form of QuIP (Chee et al. 2023, section 3.1, "LDLQ"): with `H = (U + I)·D·(U + I)ᵀ`, U strictly
//! upper triangular, column k is rounded at `w_k + Σ_{j<k} (w_j − ŵ_j)·U_jk`. That needs one Cholesky factorization and no
//! inverse, and it says what an error in column k really costs: `D_k`, which therefore weights the search for scales.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use fourfold_tensor::{Form, Weight};
use serde::{Deserialize, Serialize};

use super::fit::Fitter;
use super::grid::{Granularity, GridSpec, ScaleFormat};
use super::lattice::Group;
use super::polish::Polish;
use super::rtn::{self, fitter};
use super::store::{Parts, ROWS, Slot, read_finite, round_group, round_row, row_scale};
use crate::MethodError;
use crate::factor::{Factor, damped};
use crate::hessian::Hessian;
use crate::methods::{Compressed, Method, Needs, Stats};
use crate::vector::vectorized;

/// The name in plans.
pub const NAME: &str = "gptq";

/// Columns of a block where a group is no block of its own.
const BLOCK: usize = 128;
/// Room that double quantization's row scale leaves for groups that grow while errors are carried into them.
const GROWTH: f32 = 1.25;

/// The order in which columns are rounded.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// From left to right.
    Natural,
    /// Groups by falling mean of H's diagonal, columns by falling diagonal within them: groups stay whole, so their scales are
    /// fitted to the weights as the errors have changed them.
    #[default]
    Groups,
    /// All columns by falling diagonal ("act-order"), with scales fixed beforehand ("static groups").
    Activation,
}

/// GPTQ on a grid.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct Gptq {
    /// The grid.
    #[serde(flatten)]
    pub grid: GridSpec,
    /// Added to H's diagonal, as a share of its mean; raised tenfold as often as H is not positive definite.
    #[serde(default = "default_damping")]
    pub damping: f64,
    /// The order of columns.
    #[serde(default)]
    pub order: Order,
    /// Rounds of coordinate descent on codes and scales afterwards (see [`super::polish`]); 0 for plain GPTQ.
    #[serde(default = "default_polish")]
    pub polish: usize,
}

fn default_damping() -> f64 {
    0.01
}

fn default_polish() -> usize {
    2
}

impl Gptq {
    /// The defaults on a grid.
    pub fn new(grid: GridSpec) -> Self {
        Self { grid, damping: default_damping(), order: Order::default(), polish: default_polish() }
    }
}

/// What every task reads.
struct Job<'a> {
    weight: &'a Weight,
    spec: GridSpec,
    fitter: Fitter,
    factor: &'a Factor,
    /// One group for the whole tensor.
    whole: Option<Group>,
    /// Whether scales are fixed before the first column is rounded.
    fixed: bool,
    polish: Option<Polish<'a>>,
}

impl Method for Gptq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Hessian
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        self.grid.validate()?;
        Ok(Some(Form::Quantized(self.grid.form(rows, cols))))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let spec = self.grid;
        spec.validate()?;
        let hessian = stats.hessian.ok_or(MethodError::NoStatistics { method: NAME, needs: "a Hessian" })?;
        let (rows, cols) = (weight.rows(), weight.cols());
        if hessian.size() != cols {
            return Err(MethodError::Width { found: hessian.size(), expected: cols });
        }
        let diagonal = hessian.diagonal();
        let size = spec.group_size(cols);
        let order = column_order(self.order, &diagonal, size);
        let (matrix, damping) = damped(hessian, self.damping);
        let factor = Factor::new(matrix, order, damping)?;
        let by_column = factor.costs_by_column();
        let (fitter, levels) = fitter(weight, &spec, &by_column)?;
        let whole = match spec.granularity {
            Granularity::Tensor => Some(rtn::fit_tensor(weight, &fitter, &by_column, spec.scales)?),
            Granularity::Channel | Granularity::Group(_) => None,
        };
        let polish = (self.polish > 0).then(|| Polish::new(&factor.matrix, cols, &fitter.lattice, spec, self.polish));
        let fixed = self.order == Order::Activation || whole.is_some();
        let job = Job { weight, spec, fitter: fitter.clone(), factor: &factor, whole, fixed, polish };
        let mut parts = Parts::new(spec, rows, cols);
        parts.fill(|slot| job.rows(slot))?;
        let error = parts.relative_error();
        Ok(Compressed { weight: parts.finish(levels)?, error })
    }
}

/// Columns in the order they are rounded in.
fn column_order(order: Order, diagonal: &[f32], size: usize) -> Vec<usize> {
    let mut columns: Vec<usize> = (0..diagonal.len()).collect();
    match order {
        Order::Natural => {}
        Order::Activation => columns.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a])),
        Order::Groups => {
            let means: Vec<f32> = diagonal.chunks(size).map(|d| d.iter().sum::<f32>() / d.len() as f32).collect();
            columns.sort_by(|&a, &b| {
                let (ga, gb) = (a / size, b / size);
                means[gb].total_cmp(&means[ga]).then(ga.cmp(&gb)).then(diagonal[b].total_cmp(&diagonal[a]))
            });
        }
    }
    columns
}

/// [`ROWS`] rows side by side: column k's weights are neighbours, so that every step is a loop over rows.
struct Lanes {
    /// `[cols, ROWS]`, in rounding order: the weights.
    w: Vec<f32>,
    /// The same, with the errors so far.
    target: Vec<f32>,
    /// `w − ŵ`.
    error: Vec<f32>,
}

impl Job<'_> {
    fn rows(&self, slot: &mut Slot) -> Result<(), MethodError> {
        let cols = self.weight.cols();
        let size = self.spec.group_size(cols);
        let per_row = cols.div_ceil(size);
        let mut rows = vec![0.0f32; slot.count * cols];
        for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
            read_finite(self.weight, slot.row + i, row)?;
        }
        let mut codes = vec![0u8; slot.count * cols];
        let by_column = self.factor.costs_by_column();
        let mut lanes = Lanes::new(&rows, &self.factor.order);

        // Scales that must be known beforehand: all of them, or the row's under double quantization.
        if self.fixed || self.spec.scales == ScaleFormat::Double {
            for (i, row) in rows.chunks_exact(cols).enumerate() {
                let groups = &mut slot.groups[i * per_row..(i + 1) * per_row];
                self.fit_row(row, &by_column, size, groups);
                slot.row_scales[i] = if self.fixed {
                    round_row(groups, self.spec.scales)
                } else {
                    row_scale(groups.iter().fold(0.0f32, |m, g| m.max(g.scale)) * GROWTH)
                };
            }
        }
        let block = if self.fixed || size > 2 * BLOCK { BLOCK } else { size };
        let mut start = 0;
        while start < cols {
            // Groups stay whole in the two orders that fit scales on the way; the short last group may come anywhere.
            let end = if self.fixed {
                (start + block).min(cols)
            } else {
                let group = self.factor.order[start] / size;
                let group_end = start + size.min(cols - group * size);
                self.carry(&mut lanes, start, group_end);
                vectorized!(self.fit_group(slot, &lanes, start, group_end, group, per_row));
                group_end
            };
            let mut from = start;
            while from < end {
                let to = (from + 2 * BLOCK).min(end);
                if self.fixed || from > start {
                    self.carry(&mut lanes, from, to);
                }
                vectorized!(self.round_block(slot, &mut lanes, from, to, per_row, size, &mut codes));
                from = to;
            }
            start = end;
        }
        match &self.polish {
            Some(polish) => polish.rows(slot, &rows, &mut codes, per_row),
            None => Polish::new(&self.factor.matrix, cols, &self.fitter.lattice, self.spec, 0)
                .rows(slot, &rows, &mut codes, per_row),
        }
        for (i, codes) in codes.chunks_exact(cols).enumerate() {
            slot.pack(i, codes);
        }
        Ok(())
    }

    fn fit_row(&self, row: &[f32], h: &[f32], size: usize, groups: &mut [Group]) {
        match self.whole {
            Some(group) => groups.fill(group),
            None => {
                for (g, (x, group)) in row.chunks(size).zip(groups.iter_mut()).enumerate() {
                    *group = self.fitter.fit(x, &h[g * size..g * size + x.len()]);
                }
            }
        }
    }

    /// Adds to the targets of columns `start..end` what all columns before `start` left.
    fn carry(&self, lanes: &mut Lanes, start: usize, end: usize) {
        let n = self.factor.order.len();
        if start == 0 {
            return;
        }
        let factor = MatRef::from_row_major_slice(&self.factor.upper, n, n);
        let left = factor.submatrix(0, start, start, end - start).transpose();
        let errors = MatRef::from_row_major_slice(&lanes.error[..start * ROWS], start, ROWS);
        let block = &mut lanes.target[start * ROWS..end * ROWS];
        matmul(MatMut::from_row_major_slice_mut(block, end - start, ROWS), Accum::Add, left, errors, 1.0, Par::Seq);
    }

    /// Fits and rounds the scales of one group of every row, on the weights as errors have changed them.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn fit_group(&self, slot: &mut Slot, lanes: &Lanes, start: usize, end: usize, group: usize, per_row: usize) {
        let n = self.factor.order.len();
        let costs = &self.factor.costs[start..end];
        // Where the group's weights would go if none of them were rounded: each makes up for what is left to it, as in the
        // inverse-Hessian form of the algorithm.
        let mut free = lanes.target[start * ROWS..end * ROWS].to_vec();
        let mut left = [0.0f32; ROWS];
        for k in start..end {
            let (done, ahead) = free.split_at_mut((k + 1 - start) * ROWS);
            let now = &done[(k - start) * ROWS..];
            for i in 0..ROWS {
                left[i] = lanes.w[k * ROWS + i] - now[i];
            }
            let factors = &self.factor.upper[k * n + k + 1..k * n + end];
            for (&factor, lane) in factors.iter().zip(ahead.chunks_exact_mut(ROWS)) {
                for i in 0..ROWS {
                    lane[i] += factor * left[i];
                }
            }
        }
        let mut x = vec![0.0f32; end - start];
        for i in 0..slot.count {
            for (x, lane) in x.iter_mut().zip(free.chunks_exact(ROWS)) {
                *x = lane[i];
            }
            let mut fitted = self.fitter.fit(&x, costs);
            round_group(&mut fitted, self.spec.scales, slot.row_scales[i]);
            slot.groups[i * per_row + group] = fitted;
        }
    }

    /// Rounds columns `start..end` of the order, carrying errors within the block.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn round_block(
        &self,
        slot: &Slot,
        lanes: &mut Lanes,
        start: usize,
        end: usize,
        per_row: usize,
        size: usize,
        codes: &mut [u8],
    ) {
        let n = self.factor.order.len();
        for k in start..end {
            let column = self.factor.order[k];
            let group = column / size;
            let (done, ahead) = lanes.target.split_at_mut((k + 1) * ROWS);
            let target = &done[k * ROWS..];
            let error = &mut lanes.error[k * ROWS..(k + 1) * ROWS];
            for i in 0..slot.count {
                let group = &slot.groups[i * per_row + group];
                let code = self.fitter.lattice.encode(target[i], group);
                codes[i * n + column] = code;
                error[i] = lanes.w[k * ROWS + i] - self.fitter.lattice.value(code, group);
            }
            let factors = &self.factor.upper[k * n + k + 1..k * n + end];
            for (&factor, lane) in factors.iter().zip(ahead.chunks_exact_mut(ROWS)) {
                for i in 0..ROWS {
                    lane[i] += factor * error[i];
                }
            }
        }
    }
}

impl Lanes {
    fn new(rows: &[f32], order: &[usize]) -> Self {
        let cols = order.len();
        let mut w = vec![0.0f32; cols * ROWS];
        for (i, row) in rows.chunks_exact(cols).enumerate() {
            for (k, &column) in order.iter().enumerate() {
                w[k * ROWS + i] = row[column];
            }
        }
        let target = w.clone();
        let error = vec![0.0f32; cols * ROWS];
        Self { w, target, error }
    }
}

/// The factor of a Hessian in its natural order, for [`super::estimate`].
///
/// # Errors
/// A Hessian that is not positive definite at any damping.
pub fn factor_of(hessian: &Hessian, damping: f64) -> Result<Factor, MethodError> {
    let (matrix, damping) = damped(hessian, damping);
    Factor::new(matrix, (0..hessian.size()).collect(), damping)
}
