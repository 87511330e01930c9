//! Activations as products read them.

use std::ops::Range;

use half::bf16;

use super::fixed::{BLOCK, TokenScales, quantize_row};
use super::product::{Pairs, Product};
use crate::Tensor;
use crate::cpu::FloatProducts;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_panel;
use crate::cpu::simd::{MAX_LANES, PairDot, Simd, for_isa, for_pairs};
use crate::cpu::unwritten::Unwritten;

/// Activations as 32-bit lanes, rows padded with zeros to whole vectors.
pub struct Lanes {
    /// All rows.
    pub data: Vec<f32>,
    /// Lanes from a row to the next.
    pub row: usize,
    /// Of integers: each block's scale, row after row.
    pub scales: Vec<f32>,
}

impl Lanes {
    /// Lanes from a row to the next: whole vectors, and an odd number of cache lines, so that many rows at one column do not
    /// meet in one set of the first cache.
    fn stride(lanes: usize) -> usize {
        let vectors = lanes.div_ceil(MAX_LANES);
        (vectors | 1) * MAX_LANES
    }

    /// All columns for a kind of product, integers with a scale for each run of `dim`.
    pub fn by_head(context: Context, kind: FloatProducts, x: &Tensor, dim: usize) -> Self {
        match kind {
            FloatProducts::Int16 => Self::ints_of(context, x, 0..x.cols(), dim),
            kind => Self::of(context, kind, x, 0..x.cols()),
        }
    }

    /// Some columns, for a kind of product.
    pub fn of(context: Context, kind: FloatProducts, x: &Tensor, cols: Range<usize>) -> Self {
        match kind {
            FloatProducts::F32 => Self::floats_of(context, x, cols),
            FloatProducts::Bf16 => Self::pairs_of(context, x, cols),
            FloatProducts::Int16 => Self::ints_of(context, x, cols, BLOCK),
        }
    }

    /// Some columns.
    pub fn floats_of(context: Context, x: &Tensor, cols: Range<usize>) -> Self {
        let row = Self::stride(cols.len());
        Self::fill(context, x.rows(), row, cols.len(), |t, lanes| {
            lanes[..cols.len()].copy_from_slice(&x.row(t)[cols.clone()]);
        })
    }

    /// Some columns.
    pub fn pairs_of(context: Context, x: &Tensor, cols: Range<usize>) -> Self {
        let row = Self::stride(cols.len().div_ceil(2));
        Self::fill(context, x.rows(), row, cols.len() / 2, |t, lanes| write_pairs(&x.row(t)[cols.clone()], lanes))
    }

    /// Some columns, with a scale for each run of `run`, at most a block and even.
    fn ints_of(context: Context, x: &Tensor, cols: Range<usize>, run: usize) -> Self {
        assert!(run <= BLOCK && (run.is_multiple_of(2) || run >= cols.len()), "a scale for {run} columns");
        let row = Self::stride(cols.len().div_ceil(2));
        let runs = cols.len().div_ceil(run);
        let mut scales = Unwritten::<f32>::new(x.rows() * runs);
        let to = scales.target();
        let lanes = Self::fill(context, x.rows(), row, cols.len() / 2, |t, lanes| {
            let halves: &mut [bf16] = &mut bytemuck::cast_slice_mut(lanes)[..cols.len()];
            // SAFETY: row t's scales are inside the memory and this item's alone; they are written and not read.
            let scales = unsafe { std::slice::from_raw_parts_mut(to.get().add(t * runs), runs) };
            quantize(context.isa, &x.row(t)[cols.clone()], halves, scales, run);
        });
        // SAFETY: every row's scales have been written.
        Self { scales: unsafe { scales.written() }, ..lanes }
    }

    /// The named rows, in pairs of bf16.
    pub fn gathered_pairs(context: Context, x: &Tensor, rows: &[usize]) -> Self {
        let row = Self::stride(x.cols().div_ceil(2));
        Self::fill(context, rows.len(), row, x.cols() / 2, |t, lanes| write_pairs(x.row(rows[t]), lanes))
    }

    /// Rows of `cols` columns in pairs of bf16, of which `write(row, its elements)` writes the f32s.
    pub fn rounded_rows(context: Context, rows: usize, cols: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let row = Self::stride(cols.div_ceil(2));
        Self::fill(context, rows, row, cols / 2, |t, lanes| {
            with_panel(cols, |panel| {
                write(t, &mut panel[..cols]);
                write_pairs(&panel[..cols], lanes);
            });
        })
    }

    /// As [`Lanes::rounded_rows`], of two tensors at once.
    pub fn two_rounded_rows(
        context: Context,
        rows: usize,
        cols: usize,
        write: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) -> [Self; 2] {
        let row = Self::stride(cols.div_ceil(2));
        let mut seconds = Unwritten::<f32>::new(rows * row);
        let to = seconds.target();
        let firsts = Self::fill(context, rows, row, cols / 2, |t, lanes| {
            // SAFETY: row t is inside the memory and this item's alone; it is written and not read.
            let second_lanes = unsafe { std::slice::from_raw_parts_mut(to.get().add(t * row), row) };
            second_lanes[cols / 2..].fill(0.0);
            with_panel(2 * cols, |panel| {
                let (first, second) = panel[..2 * cols].split_at_mut(cols);
                write(t, first, second);
                write_pairs(first, lanes);
                write_pairs(second, second_lanes);
            });
        });
        // SAFETY: every row has been written.
        [firsts, Self { data: unsafe { seconds.written() }, row, scales: Vec::new() }]
    }

    /// Pairs of bf16 as the elements they are, and how many there are from a row to the next.
    pub fn rounded(&self) -> (&[bf16], usize) {
        (bytemuck::cast_slice(&self.data), 2 * self.row)
    }

    /// Some columns of rows in pairs of bf16, in f32.
    pub fn widened(&self, rows: usize, cols: Range<usize>) -> Tensor {
        let (data, stride) = self.rounded();
        let row = |t: usize| data[t * stride..][cols.clone()].iter().map(|v| v.to_f32());
        Tensor::new(rows, cols.len(), (0..rows).flat_map(row).collect())
    }

    /// The scales of run `run` from a token on.
    pub fn run_scales(&self, token: usize, run: usize) -> TokenScales {
        let scales = self.scales_from(token);
        TokenScales { at: scales.at.wrapping_add(run), ..scales }
    }

    /// The scales from a token on.
    pub(super) fn scales_from(&self, token: usize) -> TokenScales {
        let row = self.scales.len() * self.row / self.data.len().max(1);
        TokenScales { at: self.scales[token * row..].as_ptr(), row }
    }

    /// Rows of `row` lanes, of which `write` writes the first `whole`, or some more; the others are zero.
    fn fill(context: Context, rows: usize, row: usize, whole: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut data = Unwritten::<f32>::new(rows * row);
        let to = data.target();
        context.pool.for_ranges(rows, (1 << 14) / row + 1, |range| {
            for t in range {
                // SAFETY: row t is inside the memory and this item's alone; `write` does not read it.
                let lanes = unsafe { std::slice::from_raw_parts_mut(to.get().add(t * row), row) };
                lanes[whole..].fill(0.0);
                write(t, lanes);
            }
        });
        // SAFETY: every row has been written.
        Self { data: unsafe { data.written() }, row, scales: Vec::new() }
    }
}

/// Rounds to nearest, ties to even.
pub fn write_bf16(context: Context, values: &[f32], rounded: &mut [bf16]) {
    context.pool.for_chunks_mut(rounded, 1, 1 << 14, |first, rounded| {
        round_to_bf16(context.isa, &values[first..first + rounded.len()], rounded);
    });
}

for_isa! {
    /// Rounds to nearest, ties to even.
    pub fn round_to_bf16(from: &[f32], to: &mut [bf16]) = round_to_bf16_with
}

#[inline(always)]
fn round_to_bf16_with<S: Simd>(_s: S, from: &[f32], to: &mut [bf16]) {
    for (to, &from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        // NaN must not round up to infinity's neighbour zero: it keeps its sign and a quiet bit.
        let rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        *to = bf16::from_bits(if from.is_nan() { quiet as u16 } else { rounded as u16 });
    }
}

for_pairs! {
    /// Brings a row into pairs of bf16.
    fn write_pairs(from: &[f32], to: &mut [f32]) = write_pairs_with
}

#[inline(always)]
fn write_pairs_with<S: PairDot>(s: S, from: &[f32], to: &mut [f32]) {
    assert!(from.len().div_ceil(2).next_multiple_of(S::LANES) <= to.len());
    // SAFETY: as asserted.
    unsafe { Pairs::lanes_of_row(s, from.as_ptr(), from.len(), to.as_mut_ptr()) }
}

for_isa! {
    /// Brings a row into integers, with a scale for each run of `run`.
    fn quantize(from: &[f32], to: &mut [bf16], scales: &mut [f32], run: usize) = quantize_runs
}

#[inline(always)]
fn quantize_runs<S: Simd>(s: S, from: &[f32], to: &mut [bf16], scales: &mut [f32], run: usize) {
    if run == BLOCK {
        return quantize_row(s, from, to, scales);
    }
    for ((from, to), scale) in from.chunks(run).zip(to.chunks_mut(run)).zip(scales) {
        quantize_row(s, from, to, std::slice::from_mut(scale));
    }
}
