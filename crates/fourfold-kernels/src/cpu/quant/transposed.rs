//! The transposed product `y = x · W[rows, :]`: MLA's absorbed projections (one token or a few), and the gradient of a linear
//! layer's input (many).
//!
//! Lanes are rows here as everywhere, so a column's result is the sum over a vector's lanes, taken once at the end. For a few
//! tokens the codes themselves are multiplied, with `x · scale`, and the offsets are collected apart: four instructions for
//! sixteen products. For many a panel of weights is written out in f32 and used for a tile of tokens, or in bf16 ([`turned`]).

use std::ops::Range;

use super::exact::{ColumnKernel, PANEL, TOKENS, column_kernel};
use super::factors::{OffsetKind, Spot};
use super::kernel::{BlockKernel, PanelKernel, block_kernel, operands, panel_kernel};
use super::layout::{BLOCK, Grouping, QUAD, QUADS, STRIP};
use super::simd::Simd;
use super::{Context, QuantWeight, turned};
use crate::Tensor;
use crate::cpu::pool::SendPtr;

/// Blocks of a panel.
const PANEL_BLOCKS: usize = PANEL / 4;

/// Strips of rows whose input is laid out at a time.
const STRIPS: usize = 128;

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, cols]`.
pub(super) fn linear_transposed(context: Context, x: &Tensor, w: &QuantWeight, rows: Range<usize>) -> Tensor {
    let (tokens, cols) = (x.rows(), w.cols());
    if turned::is_wanted(context, tokens) {
        return turned::linear_transposed(context, x, w, rows);
    }
    let mut y = Tensor::zeros(tokens, cols);
    if tokens == 0 || rows.is_empty() {
        return y;
    }
    let all = rows.start / STRIP..rows.end.div_ceil(STRIP);
    for first in all.clone().step_by(STRIPS) {
        let strips = first..all.end.min(first + STRIPS);
        // x in strips, zeros for rows outside the range: [strips][tokens][16].
        let mut streamed = vec![[0.0; STRIP]; strips.len() * tokens];
        let wanted = rows.start.max(strips.start * STRIP)..rows.end.min(strips.end * STRIP);
        for t in 0..tokens {
            for (row, &value) in wanted.clone().zip(&x.row(t)[wanted.start - rows.start..]) {
                streamed[(row / STRIP - strips.start) * tokens + t][row % STRIP] = value;
            }
        }
        let job = Job { w, strips, streamed: &streamed, tokens, output: SendPtr::new(y.host_mut()) };
        if tokens < TOKENS {
            let kernel = block_kernel(context.isa, w);
            context.pool.for_ranges(w.columns.blocks, 1, |blocks| job.each_block(kernel, blocks));
        } else {
            let (panel_of, add_of) = (panel_kernel(context.isa, w), column_kernel(context.isa));
            let panels = w.columns.blocks.div_ceil(PANEL_BLOCKS);
            context.pool.for_ranges(panels, 1, |panels| job.each_panel(panel_of, add_of, panels));
        }
    }
    y
}

/// What the threads share.
struct Job<'a> {
    w: &'a QuantWeight,
    strips: Range<usize>,
    /// The input, `[strips][tokens][16]`.
    streamed: &'a [[f32; STRIP]],
    tokens: usize,
    output: SendPtr<f32>,
}

impl Job<'_> {
    /// Token by token, straight from the codes.
    fn each_block(&self, kernel: BlockKernel, blocks: Range<usize>) {
        let mut result = [0.0; BLOCK];
        for block in blocks {
            for t in 0..self.tokens {
                // SAFETY: strips and block exist, the input has a vector for each strip and token, and the instruction set is
                // available.
                unsafe {
                    let x = self.streamed.as_ptr().add(t);
                    kernel(self.w, self.strips.clone(), block, x, self.tokens, &mut result);
                }
                self.write(t, block..block + 1, &result);
            }
        }
    }

    /// Tiles of tokens, from panels of f32.
    fn each_panel(&self, panel_of: PanelKernel, add_of: ColumnKernel, panels: Range<usize>) {
        let mut panel = vec![[0.0; STRIP]; PANEL_BLOCKS * BLOCK];
        let mut sums = vec![[0.0; STRIP]; PANEL_BLOCKS * BLOCK * TOKENS];
        let mut columns = vec![0.0; PANEL_BLOCKS * BLOCK];
        for p in panels {
            let first = p * PANEL_BLOCKS;
            let blocks = PANEL_BLOCKS.min(self.w.columns.blocks - first);
            let width = blocks * BLOCK;
            for t in (0..self.tokens).step_by(TOKENS) {
                let of_tile = TOKENS.min(self.tokens - t);
                sums.fill([0.0; STRIP]);
                for strip in self.strips.clone() {
                    let from = (strip - self.strips.start) * self.tokens + t;
                    // SAFETY: strip and blocks exist, the panel has room, and the instruction set is available.
                    unsafe {
                        panel_of(self.w, strip, first, blocks, panel.as_mut_ptr());
                        add_of(&panel[..width], &self.streamed[from..from + of_tile], &mut sums);
                    }
                }
                for i in 0..of_tile {
                    for (column, sums) in columns.iter_mut().zip(&sums[i * width..(i + 1) * width]) {
                        *column = sums.iter().sum();
                    }
                    self.write(t + i, first..first + blocks, &columns);
                }
            }
        }
    }

    /// Adds to a token's result for some blocks, which are the calling thread's.
    fn write(&self, token: usize, blocks: Range<usize>, values: &[f32]) {
        let cols = self.w.cols();
        self.w.columns.scatter(blocks, values, |c, value| {
            // SAFETY: within the output; each column is one thread's.
            unsafe { *self.output.get().add(token * cols + c) += value }
        });
    }
}

/// See [`BlockKernel`].
#[inline(always)]
pub(super) unsafe fn block<S: Simd, const BITS: u32, const TABLE: bool>(
    w: &QuantWeight,
    strips: Range<usize>,
    block: usize,
    x: *const [f32; STRIP],
    stride: usize,
    out: &mut [f32; BLOCK],
) {
    // Half a block's sixteen sums fit into the registers.
    // SAFETY: promised by the caller.
    unsafe {
        half::<S, BITS, TABLE, 0>(w, strips.clone(), block, x, stride, out);
        half::<S, BITS, TABLE, 4>(w, strips, block, x, stride, out);
    }
}

#[inline(always)]
unsafe fn half<S: Simd, const BITS: u32, const TABLE: bool, const FIRST: usize>(
    w: &QuantWeight,
    strips: Range<usize>,
    block: usize,
    x: *const [f32; STRIP],
    stride: usize,
    out: &mut [f32; BLOCK],
) {
    const HALF: usize = QUADS / 2;
    // SAFETY: promised by the caller.
    unsafe {
        let columns = &w.columns;
        let is_min = w.offsets.kind() == OffsetKind::Min;
        let uniform = matches!(columns.grouping, Grouping::Uniform(_));
        let mut sums = [[S::splat(0.0); QUAD]; HALF];
        let mut minus = [S::splat(0.0); HALF];
        for strip in strips.clone() {
            let x = S::load((*x.add((strip - strips.start) * stride)).as_ptr());
            let lines = w.codes.as_ptr().add((strip * columns.blocks + block) * BITS as usize);
            let codes = operands::<S, BITS, TABLE>(w, lines);
            let mut scaled = x;
            for q in 0..HALF {
                if q == 0 || !uniform {
                    let spot = Spot::new(strip, columns.quad_group(block, FIRST + q), columns.groups);
                    scaled = S::mul(x, w.scales.load::<S>(spot));
                    let offset = w.offsets.load::<S>(spot);
                    minus[q] = S::fma(if is_min { x } else { scaled }, offset, minus[q]);
                }
                for (i, sum) in sums[q].iter_mut().enumerate() {
                    *sum = S::fma(S::byte_to_float(codes[FIRST + q], i as u32), scaled, *sum);
                }
            }
        }
        for q in 0..HALF {
            let minus = S::sum(minus[if uniform { 0 } else { q }]);
            for (i, sum) in sums[q].into_iter().enumerate() {
                out[(FIRST + q) * QUAD + i] = S::sum(sum) - minus;
            }
        }
    }
}
