//! Rounding rows to blocks: to nearest, or with errors fed back.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::super::store::ROWS;
use super::polish::Polish;
use super::{Block, BlockFitter, Rounded};
use crate::factor::Factor;
use crate::vector::vectorized;

/// Every weight to the nearest level, with scales weighted by `h` (all 1 where empty).
pub(super) fn nearest(fitter: &BlockFitter, values: &[f32], cols: usize, h: &[f32]) -> Rounded {
    let (size, group) = (fitter.kind.block_len(), fitter.kind.group_len());
    let mut codes = vec![0u8; values.len()];
    let mut blocks = vec![Block::default(); values.len() / size];
    let rows = values.par_chunks(cols).zip(codes.par_chunks_mut(cols)).zip(blocks.par_chunks_mut(cols / size));
    rows.for_each(|((row, codes), blocks)| {
        vectorized!({
            for (b, block) in blocks.iter_mut().enumerate() {
                let x = &row[b * size..(b + 1) * size];
                *block = fitter.fit(x, h.get(b * size..(b + 1) * size).unwrap_or(&[]));
                for (i, &x) in x.iter().enumerate() {
                    codes[b * size + i] = fitter.lattice.encode(x, &block.groups[i / group]);
                }
            }
        });
    });
    Rounded { codes, blocks }
}

/// With errors fed back through `factor`, whose order keeps blocks whole, and `polish` rounds of coordinate descent.
pub(super) fn gptq(fitter: &BlockFitter, values: &[f32], cols: usize, factor: &Factor, polish: usize) -> Rounded {
    let size = fitter.kind.block_len();
    let mut codes = vec![0u8; values.len()];
    let mut blocks = vec![Block::default(); values.len() / size];
    let polish = Polish::new(fitter, &factor.matrix, cols, polish);
    let rows = values
        .par_chunks(ROWS * cols)
        .zip(codes.par_chunks_mut(ROWS * cols))
        .zip(blocks.par_chunks_mut(ROWS * (cols / size)));
    rows.for_each(|((values, codes), blocks)| {
        Job { fitter, factor, cols }.rows(values, codes, blocks);
        polish.rows(values, codes, blocks);
    });
    Rounded { codes, blocks }
}

struct Job<'a> {
    fitter: &'a BlockFitter,
    factor: &'a Factor,
    cols: usize,
}

impl Job<'_> {
    /// At most [`ROWS`] rows side by side: column k's weights are neighbours.
    fn rows(&self, values: &[f32], codes: &mut [u8], blocks: &mut [Block]) {
        let (n, size) = (self.cols, self.fitter.kind.block_len());
        let count = values.len() / n;
        let mut w = vec![0.0f32; n * ROWS];
        for (i, row) in values.chunks_exact(n).enumerate() {
            for (k, &column) in self.factor.order.iter().enumerate() {
                w[k * ROWS + i] = row[column];
            }
        }
        let (mut target, mut error) = (w.clone(), vec![0.0f32; n * ROWS]);
        for start in (0..n).step_by(size) {
            let end = start + size;
            if start > 0 {
                let upper = MatRef::from_row_major_slice(&self.factor.upper, n, n);
                let left = upper.submatrix(0, start, start, size).transpose();
                let before = MatRef::from_row_major_slice(&error[..start * ROWS], start, ROWS);
                let to = MatMut::from_row_major_slice_mut(&mut target[start * ROWS..end * ROWS], size, ROWS);
                matmul(to, Accum::Add, left, before, 1.0, Par::Seq);
            }
            let index = self.factor.order[start] / size;
            vectorized!(self.fit(&w, &target, start, index, count, blocks));
            vectorized!(self.round(&w, &mut target, &mut error, start, count, blocks, codes));
        }
    }

    /// The scales of one block of every row, on its weights as errors have changed them and as they would go on changing if none of them
    /// were rounded.
    #[inline(always)]
    fn fit(&self, w: &[f32], target: &[f32], start: usize, index: usize, count: usize, blocks: &mut [Block]) {
        let (n, size) = (self.cols, self.fitter.kind.block_len());
        let end = start + size;
        let mut free = target[start * ROWS..end * ROWS].to_vec();
        let mut left = [0.0f32; ROWS];
        for k in start..end {
            let (done, ahead) = free.split_at_mut((k + 1 - start) * ROWS);
            let now = &done[(k - start) * ROWS..];
            for i in 0..ROWS {
                left[i] = w[k * ROWS + i] - now[i];
            }
            let factors = &self.factor.upper[k * n + k + 1..k * n + end];
            for (&factor, lane) in factors.iter().zip(ahead.chunks_exact_mut(ROWS)) {
                for i in 0..ROWS {
                    lane[i] += factor * left[i];
                }
            }
        }
        // The block's columns in their own order: its groups lie there side by side.
        let (mut x, mut costs) = (vec![0.0f32; size], vec![0.0f32; size]);
        for k in start..end {
            costs[self.factor.order[k] % size] = self.factor.costs[k];
        }
        for i in 0..count {
            for k in start..end {
                x[self.factor.order[k] % size] = free[(k - start) * ROWS + i];
            }
            blocks[i * (n / size) + index] = self.fitter.fit(&x, &costs);
        }
    }

    /// Rounds the columns of a block, carrying errors within it.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn round(
        &self,
        w: &[f32],
        target: &mut [f32],
        error: &mut [f32],
        start: usize,
        count: usize,
        blocks: &[Block],
        codes: &mut [u8],
    ) {
        let (n, size, group) = (self.cols, self.fitter.kind.block_len(), self.fitter.kind.group_len());
        let lattice = &self.fitter.lattice;
        for k in start..start + size {
            let column = self.factor.order[k];
            let (done, ahead) = target.split_at_mut((k + 1) * ROWS);
            let now = &done[k * ROWS..];
            let error = &mut error[k * ROWS..(k + 1) * ROWS];
            for i in 0..count {
                let group = &blocks[i * (n / size) + column / size].groups[column % size / group];
                let code = lattice.encode(now[i], group);
                codes[i * n + column] = code;
                error[i] = w[k * ROWS + i] - lattice.value(code, group);
            }
            let factors = &self.factor.upper[k * n + k + 1..k * n + start + size];
            for (&factor, lane) in factors.iter().zip(ahead.chunks_exact_mut(ROWS)) {
                for i in 0..ROWS {
                    lane[i] += factor * error[i];
                }
            }
        }
    }
}
