//! SparseGPT (Frantar & Alistarh 2023, algorithm 1): columns are pruned one block after another, and the weights still to come make up
//! for what went. Kept values that are stored as codes are rounded in the same way (section 3.5), in a second pass.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_upper_triangular;
use faer::{Accum, MatMut, MatRef, Par};
use fourfold_tensor::{Form, Weight};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::store::{Scales, Values, code, fit_row};
use super::{Pattern, drop_lowest, kept_in_row, kept_of};
use crate::MethodError;
use crate::factor::{Factor, damped};
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "sparsegpt";

/// Columns whose mask is chosen together, the paper's B_s.
const BLOCK: usize = 128;
/// Rows of a task.
const ROWS: usize = 32;

/// SparseGPT.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SparseGpt {
    /// How much goes: of each block of 128 columns `⌊sparsity · elements⌋`, in whichever rows.
    pub pattern: Pattern,
    /// How the others are stored.
    #[serde(default)]
    pub values: Values,
    /// Added to H's diagonal, as a share of its mean.
    #[serde(default = "default_damping")]
    pub damping: f64,
}

fn default_damping() -> f64 {
    0.01
}

impl SparseGpt {
    /// Columns whose mask is chosen together.
    fn block(&self, cols: usize) -> usize {
        let block = match self.pattern {
            Pattern::Sparsity(_) => BLOCK,
            Pattern::Nm { m, .. } => BLOCK.next_multiple_of(m),
        };
        block.min(cols.max(1))
    }

    fn validate(&self) -> Result<(), MethodError> {
        self.pattern.validate()?;
        self.values.validate()
    }
}

impl Method for SparseGpt {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Hessian
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        self.validate()?;
        let kept = match self.pattern {
            Pattern::Nm { n, m } => rows * kept_in_row(cols, n, m),
            Pattern::Sparsity(s) => {
                let block = self.block(cols);
                let of = |width: usize| rows * width - (s * (rows * width) as f64) as usize;
                cols / block * of(block) + of(cols % block)
            }
        };
        Ok(Some(self.values.form(rows, cols, kept)))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        self.validate()?;
        let hessian = stats.hessian.ok_or(MethodError::NoStatistics { method: NAME, needs: "a Hessian" })?;
        let cols = weight.cols();
        if hessian.size() != cols {
            return Err(MethodError::Width { found: hessian.size(), expected: cols });
        }
        let original = matrix::read(weight)?;
        let (matrix_, damping) = damped(hessian, self.damping);
        let inverse = inverse_factor(&Factor::new(matrix_, (0..cols).collect(), damping)?);
        let mut job = Job {
            pattern: self.pattern,
            block: self.block(cols),
            cols,
            inverse: &inverse,
            w: original.clone(),
            keep: vec![true; original.len()],
            grid: None,
        };
        job.run();
        let stored = match self.values {
            Values::F32 | Values::F16 | Values::Bf16 => {
                self.values.store(&job.w, &job.keep, cols, Scales::Fit(None))?
            }
            Values::Int { bits, group_size } => {
                // Kept weights grow as they make up for those that went: scales fit what they become. With them and the mask fixed
                // a second pass rounds as it goes.
                let size = group_size.min(cols.max(1));
                let rows = job.w.par_chunks(cols.max(1)).zip(job.keep.par_chunks(cols.max(1)));
                let scales: Vec<f32> = rows.flat_map_iter(|(w, keep)| fit_row(w, keep, bits, size, None)).collect();
                job.w = original.clone();
                job.grid = Some(Grid { bits, size, groups: cols.div_ceil(size), scales: &scales });
                job.run();
                self.values.store(&job.w, &job.keep, cols, Scales::Given(&scales))?
            }
        };
        let error = matrix::relative_error(&original, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}

/// The upper triangular C with `H⁻¹ = Cᵀ·C`, `[n, n]`: from `H = R·Rᵀ` it is `R⁻¹`.
fn inverse_factor(factor: &Factor) -> Vec<f32> {
    let n = factor.order.len();
    let mut r = vec![0.0f64; n * n];
    for j in 0..n {
        let diagonal = f64::from(factor.costs[j]).sqrt();
        r[j * n + j] = diagonal;
        for i in 0..j {
            r[i * n + j] = f64::from(factor.upper[i * n + j]) * diagonal;
        }
    }
    let mut inverse = vec![0.0f64; n * n];
    let to = MatMut::from_row_major_slice_mut(&mut inverse, n, n);
    invert_upper_triangular(to, MatRef::from_row_major_slice(&r, n, n), Par::Seq);
    inverse.into_iter().map(|v| v as f32).collect()
}

/// Where kept values are rounded to.
#[derive(Clone, Copy)]
struct Grid<'a> {
    bits: u8,
    /// Columns that share a scale.
    size: usize,
    /// Scales of a row.
    groups: usize,
    /// `[rows, groups]`.
    scales: &'a [f32],
}

struct Job<'a> {
    pattern: Pattern,
    block: usize,
    cols: usize,
    /// [`inverse_factor`].
    inverse: &'a [f32],
    /// The weights as they have become, `[rows, cols]`.
    w: Vec<f32>,
    keep: Vec<bool>,
    /// With a grid the mask is what it is; without one it is chosen on the way.
    grid: Option<Grid<'a>>,
}

impl Job<'_> {
    fn run(&mut self) {
        for start in (0..self.cols).step_by(self.block) {
            self.block(start..(start + self.block).min(self.cols));
        }
    }

    /// Prunes some columns and carries what is lost to all later ones.
    fn block(&mut self, columns: Range<usize>) {
        let (n, width) = (self.cols, columns.len());
        if let (Pattern::Sparsity(s), None) = (self.pattern, self.grid) {
            let diagonal: Vec<f32> = columns.clone().map(|c| self.inverse[c * n + c]).collect();
            let scores = self
                .w
                .par_chunks(n)
                .flat_map_iter(|w| w[columns.clone()].iter().zip(&diagonal).map(|(w, d)| (w / d) * (w / d)));
            let scores: Vec<f32> = scores.collect();
            let mut keep = vec![true; scores.len()];
            drop_lowest(&scores, (s * scores.len() as f64) as usize, &mut keep);
            for (all, part) in self.keep.chunks_exact_mut(n).zip(keep.chunks_exact(width)) {
                all[columns.clone()].copy_from_slice(part);
            }
        }
        let (inverse, pattern, grid) = (self.inverse, self.pattern, self.grid);
        let chunks = self.w.par_chunks_mut(n * ROWS).zip(self.keep.par_chunks_mut(n * ROWS)).enumerate();
        chunks.for_each(|(chunk, (w, keep))| {
            let rows = w.len() / n;
            let mut errors = vec![0.0f32; rows * width];
            let lines = w.chunks_exact_mut(n).zip(keep.chunks_exact_mut(n)).zip(errors.chunks_exact_mut(width));
            for (i, ((w, keep), errors)) in lines.enumerate() {
                let mut row = Row { inverse, n, w, keep, errors, start: columns.start };
                for c in columns.clone() {
                    if let (Pattern::Nm { n, m }, None) = (pattern, grid)
                        && c.is_multiple_of(m)
                    {
                        row.choose(c, n, m);
                    }
                    let round = grid.map(|g| (g.bits, g.scales[(chunk * ROWS + i) * g.groups + c / g.size]));
                    row.column(c, columns.end, round);
                }
            }
            let later = n - columns.end;
            if later > 0 {
                let factor = MatRef::from_row_major_slice(inverse, n, n);
                let factor = factor.submatrix(columns.start, columns.end, width, later);
                let errors = MatRef::from_row_major_slice(&errors, rows, width);
                let to = MatMut::from_row_major_slice_mut(w, rows, n).subcols_mut(columns.end, later);
                matmul(to, Accum::Add, errors, factor, -1.0, Par::Seq);
            }
        });
    }
}

/// One row in a block.
struct Row<'a> {
    inverse: &'a [f32],
    n: usize,
    w: &'a mut [f32],
    keep: &'a mut [bool],
    /// Each column's error over the factor's diagonal.
    errors: &'a mut [f32],
    start: usize,
}

impl Row<'_> {
    /// Chooses which of the `m` columns from `c` on stay.
    fn choose(&mut self, c: usize, stay: usize, m: usize) {
        let end = (c + m).min(self.n);
        let scores: Vec<f32> = (c..end).map(|c| (self.w[c] / self.inverse[c * self.n + c]).powi(2)).collect();
        drop_lowest(&scores, scores.len() - kept_of(scores.len(), stay, m), &mut self.keep[c..end]);
    }

    /// Prunes or rounds column `c`, and makes up for it in the columns up to `end`.
    fn column(&mut self, c: usize, end: usize, round: Option<(u8, f32)>) {
        let value = match (self.keep[c], round) {
            (false, _) => 0.0,
            (true, None) => self.w[c],
            (true, Some((bits, scale))) => scale * code(self.w[c], scale, bits) as f32,
        };
        let error = (self.w[c] - value) / self.inverse[c * self.n + c];
        self.errors[c - self.start] = error;
        let factors = &self.inverse[c * self.n + c + 1..c * self.n + end];
        self.w[c + 1..end].iter_mut().zip(factors).for_each(|(w, f)| *w -= error * f);
        self.w[c] = value;
    }
}
