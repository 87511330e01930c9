//! Coordinate descent on what GPTQ leaves: the true error of a row, `(ŵ − w)·H·(ŵ − w)ᵀ`, with every other code as it now is.
//!
//! GPTQ fixes a column before it has seen the rounding of the ones behind. Here each code, then each group's scale (and
//! offset), moves to the value that is best given all others; a move is made only where it lowers the error as stored, scale
//! rounding included. So the error never rises.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::grid::{Granularity, GridSpec, ScaleFormat, ZeroKind};
use super::lattice::{Group, Lattice};
use super::store::{Slot, round_group};
use crate::vector::{axpy, dot, vectorized};

/// What every row shares.
pub(crate) struct Polish<'a> {
    h: &'a [f32],
    cols: usize,
    lattice: &'a Lattice,
    spec: GridSpec,
    rounds: usize,
    /// Sums of H's rows over each group, `[groups, cols]`: the direction of an offset.
    sums: Vec<f32>,
}

impl<'a> Polish<'a> {
    pub fn new(h: &'a [f32], cols: usize, lattice: &'a Lattice, spec: GridSpec, rounds: usize) -> Self {
        let mut sums = Vec::new();
        if spec.zero == ZeroKind::Min {
            for rows in h.chunks(spec.group_size(cols) * cols) {
                let mut sum = vec![0.0f32; cols];
                rows.chunks_exact(cols).for_each(|row| axpy(1.0, row, &mut sum));
                sums.extend(sum);
            }
        }
        Self { h, cols, lattice, spec, rounds, sums }
    }

    /// Improves every row of a slot and adds up its error and its output's energy. With no rounds it only does the latter.
    pub fn rows(&self, slot: &mut Slot, w: &[f32], codes: &mut [u8], per_row: usize) {
        let cols = self.cols;
        let size = self.spec.group_size(cols);
        let mut values = vec![0.0f32; w.len()];
        for i in 0..slot.count {
            for c in 0..cols {
                let group = &slot.groups[i * per_row + c / size];
                values[i * cols + c] = self.lattice.value(codes[i * cols + c], group);
            }
        }
        let errors: Vec<f32> = values.iter().zip(w).map(|(v, w)| v - w).collect();
        let mut gradients = self.times_h(&errors, slot.count);
        let outputs = self.times_h(w, slot.count);
        for i in 0..slot.count {
            let at = i * cols..(i + 1) * cols;
            let mut row = Row {
                codes: &mut codes[at.clone()],
                values: &mut values[at.clone()],
                gradient: &mut gradients[at.clone()],
                groups: &mut slot.groups[i * per_row..(i + 1) * per_row],
                row_scale: slot.row_scales[i],
            };
            let w = &w[at.clone()];
            let (error, energy) = vectorized!({
                for _ in 0..self.rounds {
                    self.move_codes(&mut row);
                    if !self.move_groups(&mut row, size) {
                        break;
                    }
                }
                // A few sweeps are enough, and the bound keeps rounding from moving codes to and fro for ever.
                for _ in 0..self.rounds {
                    if !self.move_codes(&mut row) {
                        break;
                    }
                }
                let error: Vec<f32> = row.values.iter().zip(w).map(|(v, w)| v - w).collect();
                (dot(&error, row.gradient), dot(w, &outputs[at.clone()]))
            });
            slot.error.0 += f64::from(error).max(0.0);
            slot.error.1 += f64::from(energy);
        }
    }

    fn times_h(&self, rows: &[f32], count: usize) -> Vec<f32> {
        let n = self.cols;
        let mut out = vec![0.0f32; rows.len()];
        let h = MatRef::from_row_major_slice(self.h, n, n);
        let left = MatRef::from_row_major_slice(rows, count, n);
        matmul(MatMut::from_row_major_slice_mut(&mut out, count, n), Accum::Replace, left, h, 1.0, Par::Seq);
        out
    }

    /// Moves every code to the level nearest the minimum along its coordinate.
    #[inline(always)]
    fn move_codes(&self, row: &mut Row) -> bool {
        let n = self.cols;
        let size = self.spec.group_size(n);
        let mut moved = false;
        for c in 0..n {
            let group = &row.groups[c / size];
            let curvature = self.h[c * n + c];
            let code = self.lattice.encode(row.values[c] - row.gradient[c] / curvature, group);
            if code == row.codes[c] {
                continue;
            }
            let value = self.lattice.value(code, group);
            let step = value - row.values[c];
            if 2.0 * step * row.gradient[c] + step * step * curvature < 0.0 {
                axpy(step, &self.h[c * n..(c + 1) * n], row.gradient);
                row.codes[c] = code;
                row.values[c] = value;
                moved = true;
            }
        }
        moved
    }

    /// Moves every group's scale, and offset, to its least-squares value, rounded as stored.
    #[inline(always)]
    fn move_groups(&self, row: &mut Row, size: usize) -> bool {
        if self.spec.granularity == Granularity::Tensor {
            return false;
        }
        let n = self.cols;
        let mut moved = false;
        let mut direction = vec![0.0f32; n];
        for g in 0..row.groups.len() {
            let at = g * size..(g * size + size).min(n);
            let group = row.groups[g];
            direction.fill(0.0);
            let levels: Vec<f32> = at.clone().map(|c| self.lattice.level(row.codes[c], &group)).collect();
            combine(&levels, &self.h[at.start * n..at.end * n], &mut direction);
            let slope = dot(&levels, &row.gradient[at.clone()]);
            let curvature = dot(&levels, &direction[at.clone()]);
            if curvature > 0.0 {
                let mut next = Group { scale: group.scale - slope / curvature, ..group };
                let allowed = self.spec.scales != ScaleFormat::Double || next.scale > 0.0;
                round_group(&mut next, self.spec.scales, row.row_scale);
                let step = next.scale - group.scale;
                if allowed && step != 0.0 && 2.0 * step * slope + step * step * curvature < 0.0 {
                    axpy(step, &direction, row.gradient);
                    row.groups[g] = next;
                    moved = true;
                }
            }
            if self.spec.zero == ZeroKind::Min {
                moved |= self.move_offset(row, g, at.clone());
            }
            for c in at {
                row.values[c] = self.lattice.value(row.codes[c], &row.groups[g]);
            }
        }
        moved
    }

    #[inline(always)]
    fn move_offset(&self, row: &mut Row, g: usize, at: std::ops::Range<usize>) -> bool {
        let n = self.cols;
        let direction = &self.sums[g * n..(g + 1) * n];
        let slope: f32 = row.gradient[at.clone()].iter().sum();
        let curvature: f32 = direction[at].iter().sum();
        if curvature <= 0.0 {
            return false;
        }
        let group = row.groups[g];
        // A larger offset lowers every value of the group.
        let mut next = Group { min: group.min + slope / curvature, ..group };
        round_group(&mut next, self.spec.scales, row.row_scale);
        let step = group.min - next.min;
        if next.scale != group.scale || step == 0.0 || 2.0 * step * slope + step * step * curvature >= 0.0 {
            return false;
        }
        axpy(step, direction, row.gradient);
        row.groups[g] = next;
        true
    }
}

/// Adds to `y` the rows of `h`, `[a.len(), y.len()]`, each times its `a`: four at a time, so that `y` is read and written once for four.
#[inline(always)]
fn combine(a: &[f32], h: &[f32], y: &mut [f32]) {
    let n = y.len();
    for (a, rows) in a.chunks(4).zip(h.chunks(4 * n)) {
        let [a0, a1, a2, a3] = *a else {
            a.iter().zip(rows.chunks_exact(n)).for_each(|(&a, row)| axpy(a, row, y));
            continue;
        };
        let (r0, rest) = rows.split_at(n);
        let (r1, rest) = rest.split_at(n);
        let (r2, r3) = rest.split_at(n);
        for ((((y, &v0), &v1), &v2), &v3) in y.iter_mut().zip(r0).zip(r1).zip(r2).zip(r3) {
            *y += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3);
        }
    }
}

/// A row under change.
struct Row<'a> {
    codes: &'a mut [u8],
    values: &'a mut [f32],
    /// `H·(ŵ − w)`: half the error's gradient.
    gradient: &'a mut [f32],
    groups: &'a mut [Group],
    row_scale: f32,
}
