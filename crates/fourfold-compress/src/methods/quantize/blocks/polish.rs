//! Coordinate descent on the output's error: scales, offsets and codes are moved one at a time where `tr(E·H·Eᵀ)` falls, E being
//! the weight less what is stored.
//!
//! With `g = H·e` of a row, a change `t·v` of what is stored lowers the error by `2·t·(v·g) − t²·(v·H·v)`. What scales and
//! offsets move by is rounded to what their storage holds before the gain is counted, so that the error never rises.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use fourfold_tensor::{BlockGrid, BlockScales};

use super::fit::to_half;
use super::{Block, BlockFitter};
use crate::vector::{axpy, dot, vectorized};

/// What the rows of a weight share.
pub(super) struct Polish<'a> {
    fitter: &'a BlockFitter,
    /// H, `[cols, cols]`.
    matrix: &'a [f32],
    cols: usize,
    rounds: usize,
}

/// A row on its way.
struct Row<'r> {
    values: &'r [f32],
    codes: &'r mut [u8],
    /// What the codes stand for.
    stored: Vec<f32>,
    /// H·(values − stored).
    gradient: Vec<f32>,
}

impl<'a> Polish<'a> {
    pub fn new(fitter: &'a BlockFitter, matrix: &'a [f32], cols: usize, rounds: usize) -> Self {
        Self { fitter, matrix, cols, rounds }
    }

    /// Some rows, each by itself.
    pub fn rows(&self, values: &[f32], codes: &mut [u8], blocks: &mut [Block]) {
        if self.rounds == 0 {
            return;
        }
        let (n, kind) = (self.cols, self.fitter.kind);
        let (size, group) = (kind.block_len(), kind.group_len());
        let rows = values.len() / n;
        let mut stored = vec![0.0f32; values.len()];
        for (r, stored) in stored.chunks_exact_mut(n).enumerate() {
            for (c, stored) in stored.iter_mut().enumerate() {
                let block = &blocks[r * (n / size) + c / size];
                *stored = self.fitter.lattice.value(codes[r * n + c], &block.groups[c % size / group]);
            }
        }
        let errors: Vec<f32> = values.iter().zip(&stored).map(|(w, s)| w - s).collect();
        let mut gradients = vec![0.0f32; values.len()];
        let left = MatRef::from_row_major_slice(&errors, rows, n);
        let h = MatRef::from_row_major_slice(self.matrix, n, n);
        matmul(MatMut::from_row_major_slice_mut(&mut gradients, rows, n), Accum::Replace, left, h, 1.0, Par::Seq);
        for (r, codes) in codes.chunks_exact_mut(n).enumerate() {
            let of_row = r * n..(r + 1) * n;
            let mut row = Row {
                values: &values[of_row.clone()],
                codes,
                stored: stored[of_row.clone()].to_vec(),
                gradient: gradients[of_row].to_vec(),
            };
            let blocks = &mut blocks[r * (n / size)..(r + 1) * (n / size)];
            for _ in 0..self.rounds {
                let mut moved = false;
                for (b, block) in blocks.iter_mut().enumerate() {
                    vectorized!({
                        moved |= self.move_scales(&mut row, block, b);
                        moved |= self.move_codes(&mut row, block, b);
                    });
                }
                if !moved {
                    break;
                }
            }
        }
    }

    fn h(&self, column: usize) -> &[f32] {
        &self.matrix[column * self.cols..(column + 1) * self.cols]
    }

    /// Codes of one block to the level nearest to where the gradient points.
    #[inline(always)]
    fn move_codes(&self, row: &mut Row, block: &Block, b: usize) -> bool {
        let (size, group) = (self.fitter.kind.block_len(), self.fitter.kind.group_len());
        let lattice = &self.fitter.lattice;
        let mut moved = false;
        for c in b * size..(b + 1) * size {
            let h = self.h(c);
            let group = &block.groups[c % size / group];
            let code = lattice.encode(row.stored[c] + row.gradient[c] / h[c], group);
            if code == row.codes[c] {
                continue;
            }
            let value = lattice.value(code, group);
            let step = value - row.stored[c];
            if 2.0 * step * row.gradient[c] > step * step * h[c] {
                (row.codes[c], row.stored[c]) = (code, value);
                axpy(-step, h, &mut row.gradient);
                moved = true;
            }
        }
        moved
    }

    /// `v·g` and `v·H·v` for a vector that lies in columns from `from` on.
    #[inline(always)]
    fn along(&self, row: &Row, v: &[f32], from: usize) -> (f32, f32) {
        let range = from..from + v.len();
        let slope = dot(v, &row.gradient[range.clone()]);
        let mut curve = 0.0;
        for (i, &v_i) in v.iter().enumerate() {
            if v_i != 0.0 {
                curve += v_i * dot(v, &self.h(from + i)[range.clone()]);
            }
        }
        (slope, curve)
    }

    /// Puts new scales into a block where they lower the error: `v` is what a step of 1 changes in the columns from `from` on.
    #[inline(always)]
    fn take(&self, row: &mut Row, block: &mut Block, b: usize, other: Block, groups: std::ops::Range<usize>) -> bool {
        let (size, len) = (self.fitter.kind.block_len(), self.fitter.kind.group_len());
        let from = b * size + groups.start * len;
        let count = groups.len() * len;
        let mut change = vec![0.0f32; count];
        for (i, change) in change.iter_mut().enumerate() {
            let c = from + i;
            let value = self.fitter.lattice.value(row.codes[c], &other.groups[c % size / len]);
            *change = value - row.stored[c];
        }
        let (slope, curve) = self.along(row, &change, from);
        // Beyond what rounding of the sums may pretend.
        if 2.0 * slope - curve <= 1e-6 * curve {
            return false;
        }
        for (i, &step) in change.iter().enumerate() {
            row.stored[from + i] += step;
            if step != 0.0 {
                axpy(-step, self.h(from + i), &mut row.gradient);
            }
        }
        *block = other;
        // What is stored is what the kernels compute, not a sum of steps.
        for (i, stored) in row.stored[from..from + count].iter_mut().enumerate() {
            let c = from + i;
            *stored = self.fitter.lattice.value(row.codes[c], &block.groups[c % size / len]);
        }
        true
    }

    /// The scale and offset of each group, or the floats of the block.
    #[inline(always)]
    fn move_scales(&self, row: &mut Row, block: &mut Block, b: usize) -> bool {
        let kind = self.fitter.kind;
        let (size, len, groups) = (kind.block_len(), kind.group_len(), kind.groups());
        debug_assert_eq!(row.values.len(), self.cols);
        let has_min = kind.grid() == BlockGrid::Min;
        let double = kind.scales() != BlockScales::Float;
        let (low, high) = self.fitter.code_range();
        let mut moved = false;
        for g in 0..groups {
            let from = b * size + g * len;
            let levels: Vec<f32> = row.codes[from..from + len]
                .iter()
                .map(|&code| self.fitter.lattice.level(code, &block.groups[g]))
                .collect();
            let (slope, curve) = self.along(row, &levels, from);
            if curve > 0.0 {
                let wanted = block.groups[g].scale + slope / curve;
                let mut other = *block;
                if double && block.scale != 0.0 {
                    other.scale_codes[g] = (wanted / block.scale).round().clamp(f32::from(low), f32::from(high)) as i16;
                } else if !double {
                    other.scale = to_half(wanted);
                }
                moved |= self.changed(row, block, b, other, g..g + 1);
            }
            if has_min {
                let ones = vec![-1.0f32; len];
                let (slope, curve) = self.along(row, &ones, from);
                if curve > 0.0 {
                    let wanted = block.groups[g].min + slope / curve;
                    let mut other = *block;
                    if double && block.min > 0.0 {
                        other.min_codes[g] = (wanted / block.min).round().clamp(0.0, f32::from(high)) as u8;
                    } else if !double {
                        other.min = to_half(wanted);
                    }
                    moved |= self.changed(row, block, b, other, g..g + 1);
                }
            }
        }
        if double {
            let mut along = vec![0.0f32; size];
            for (i, along) in along.iter_mut().enumerate() {
                let g = i / len;
                let level = self.fitter.lattice.level(row.codes[b * size + i], &block.groups[g]);
                *along = f32::from(block.scale_codes[g]) * level;
            }
            let (slope, curve) = self.along(row, &along, b * size);
            if curve > 0.0 {
                let other = Block { scale: to_half(block.scale + slope / curve), ..*block };
                moved |= self.changed(row, block, b, other, 0..groups);
            }
            if has_min {
                for (i, along) in along.iter_mut().enumerate() {
                    *along = -f32::from(block.min_codes[i / len]);
                }
                let (slope, curve) = self.along(row, &along, b * size);
                let wanted = block.min + slope / curve;
                if curve > 0.0 && wanted > 0.0 {
                    let other = Block { min: to_half(wanted), ..*block };
                    moved |= self.changed(row, block, b, other, 0..groups);
                }
            }
        }
        moved
    }

    /// [`Polish::take`], where anything is different and is a number that f16 holds.
    #[inline(always)]
    fn changed(
        &self,
        row: &mut Row,
        block: &mut Block,
        b: usize,
        mut other: Block,
        groups: std::ops::Range<usize>,
    ) -> bool {
        let holds = |v: f32| v.is_finite();
        let same = other.scale == block.scale
            && other.min == block.min
            && other.scale_codes == block.scale_codes
            && other.min_codes == block.min_codes;
        if same || !holds(other.scale) || !holds(other.min) {
            return false;
        }
        self.fitter.spread(&mut other);
        self.take(row, block, b, other, groups)
    }
}
