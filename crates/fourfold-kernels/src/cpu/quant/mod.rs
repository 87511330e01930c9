//! Linear layers whose weights are packed codes.
//!
//! A weight stays packed: [`QuantWeight::prepare`] only reorders it ([`layout`]). A product rounds its input to int8
//! ([`activations`]) and multiplies integers ([`kernel`]), or writes some rows at a time out as
//! f32 or bf16 ([`exact`], [`transposed`], [`turned`]). Work is shared
//! between threads by strips of sixteen rows, each computed by one thread alone and always in the same order: results do not depend
//! on the number of threads, nor (but for the transposed product) on how many tokens are multiplied together.

mod activations;
pub(super) mod arena;
mod exact;
mod factors;
mod kernel;
pub(super) mod layout;
mod simd;
#[cfg(test)]
mod tests;
mod transposed;
mod turned;

use std::ops::Range;

use fourfold_tensor::{Offsets, Quantized, Scales};

use self::activations::Rounded;
use self::arena::Lines;
use self::factors::{OffsetKind, Spot, StripOffsets, StripScales};
use self::kernel::{TileKernel, tile_kernel, widest_tile};
use self::layout::{BLOCK, Columns, Line, STRIP, pack_block, quad_at};
use super::pool::{Pool, SendPtr};
use super::{Activations, FloatProducts, Isa};
use crate::{KernelError, Tensor};

/// Bytes of rounded activations that a thread goes through for strip after strip: half of a second-level cache.
const TOKEN_BYTES: usize = 512 << 10;

/// What every call needs: threads, instruction set and precision.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The threads.
    pub pool: &'a Pool,
    /// The instruction set; must be available.
    pub isa: Isa,
    /// Precision of the input.
    pub activations: Activations,
    /// What products of floats are made in; must be the instruction set's.
    pub products: FloatProducts,
}

/// A quantized weight in the kernels' layout.
pub struct QuantWeight {
    rows: usize,
    bits: u32,
    columns: Columns,
    /// `[strips, blocks, bits]`.
    codes: Lines,
    scales: StripScales,
    offsets: StripOffsets,
    /// The codebook's values plus 128.
    table: [u8; 16],
    has_table: bool,
}

impl QuantWeight {
    /// Takes `source` into the kernels' layout and frees it.
    ///
    /// # Errors
    /// When its parts do not fit together.
    pub fn prepare(source: Quantized, pool: &Pool) -> Result<Self, KernelError> {
        source.validate()?;
        let one_scale = matches!(&source.scales, Scales::Float(s) if s.len() == 1);
        let one_zero = match &source.offsets {
            Offsets::Symmetric => true,
            Offsets::ZeroPoint(zeros) => zeros.len() == 1,
            Offsets::Min(_) | Offsets::Double(_) => false,
        };
        let columns = Columns::new(&source, one_scale && one_zero);
        let mut table = [0; 16];
        for (entry, &value) in table.iter_mut().zip(source.codebook.iter().flatten()) {
            *entry = (i16::from(value) + 128) as u8;
        }
        Ok(Self {
            rows: source.rows,
            bits: u32::from(source.bits),
            codes: pack(&source, &columns, pool),
            scales: StripScales::new(&source, columns.groups),
            offsets: StripOffsets::new(&source, columns.groups),
            table,
            has_table: source.codebook.is_some(),
            columns,
        })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.columns.cols
    }

    /// Bytes it takes in memory.
    pub fn byte_len(&self) -> usize {
        self.codes.len() * size_of::<Line>()
            + self.scales.byte_len()
            + self.offsets.byte_len()
            + self.columns.byte_len()
            + size_of::<Self>()
    }

    /// Strips of sixteen rows.
    fn strips(&self) -> usize {
        self.rows.div_ceil(STRIP)
    }

    /// Row `row` as f32, into `out` of length `cols`. Rounds as [`Quantized::dequantize_row`] does.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let columns = &self.columns;
        let (strip, lane, bits) = (row / STRIP, row % STRIP, self.bits as usize);
        let is_min = self.offsets.kind() == OffsetKind::Min;
        let mut values = [0.0; BLOCK];
        for block in 0..columns.blocks {
            let at = (strip * columns.blocks + block) * bits;
            let lines = &self.codes[at..at + bits];
            for (quad, values) in values.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let spot = Spot::new(strip, columns.quad_group(block, quad), columns.groups);
                let (scale, offset) = (self.scales.get(spot, lane), self.offsets.get(spot, lane));
                let codes = quad_at(lines, self.bits, lane, quad);
                for (value, mut code) in values.iter_mut().zip(codes) {
                    if self.has_table {
                        code = self.table[usize::from(code)];
                    }
                    let code = f32::from(code);
                    *value = if is_min { scale * code - offset } else { scale * (code - offset) };
                }
            }
            columns.scatter(block..block + 1, &values, |c, value| out[c] = value);
        }
    }
}

/// The codes in strips, blocks and planes: see [`layout`].
fn pack(source: &Quantized, columns: &Columns, pool: &Pool) -> Lines {
    let bits = u32::from(source.bits);
    let lines_of_strip = columns.blocks * bits as usize;
    let mut lines = Lines::zeros(source.rows.div_ceil(STRIP) * lines_of_strip);
    pool.for_chunks_mut(&mut lines, lines_of_strip, 4, |first, lines| {
        let mut codes = vec![0; source.cols];
        let mut stream = vec![0; columns.blocks * BLOCK];
        let mut blocks = vec![[[0; BLOCK]; STRIP]; columns.blocks];
        for (strip, lines) in (first..).zip(lines.chunks_exact_mut(lines_of_strip)) {
            for lane in 0..STRIP {
                let row = strip * STRIP + lane;
                if row < source.rows {
                    source.row_codes(row, &mut codes);
                    columns.gather(&codes, &mut stream);
                } else {
                    stream.fill(0);
                }
                for (block, codes) in blocks.iter_mut().zip(stream.as_chunks::<BLOCK>().0) {
                    block[lane] = *codes;
                }
            }
            for (codes, lines) in blocks.iter().zip(lines.chunks_exact_mut(bits as usize)) {
                pack_block(codes, bits, lines);
            }
        }
    });
    lines
}

/// Some rows of a weight, and where their products go.
struct Job<'a> {
    weight: &'a QuantWeight,
    rows: Range<usize>,
    input: usize,
    /// The kernels for tiles of 1, 4 and 16, as far as there are any.
    kernels: [TileKernel; 3],
    output: SendPtr<f32>,
}

/// `y_i = x · W_iᵀ` for each weight, in one parallel region: x `[tokens, in]`, y_i `[tokens, out_i]`.
pub fn linear(context: Context, x: &Tensor, weights: &[&QuantWeight]) -> Vec<Tensor> {
    let parts: Vec<_> = weights.iter().map(|w| (*w, 0..w.rows())).collect();
    multiply(context, x, &parts)
}

/// `y = x · W[rows, :]ᵀ`: x `[tokens, in]`, y `[tokens, rows.len()]`.
pub fn linear_rows(context: Context, x: &Tensor, weight: &QuantWeight, rows: Range<usize>) -> Tensor {
    multiply(context, x, &[(weight, rows)]).swap_remove(0)
}

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, in]`.
pub fn linear_transposed(context: Context, x: &Tensor, weight: &QuantWeight, rows: Range<usize>) -> Tensor {
    assert!(rows.end <= weight.rows && x.cols() == rows.len(), "{} columns for rows {rows:?}", x.cols());
    transposed::linear_transposed(context, x, weight, rows)
}

fn multiply(context: Context, x: &Tensor, parts: &[(&QuantWeight, Range<usize>)]) -> Vec<Tensor> {
    let Context { pool, isa, activations, .. } = context;
    assert!(isa.is_available(), "{} kernels on a machine without", isa.name());
    for (weight, rows) in parts {
        assert_eq!(x.cols(), weight.cols(), "input of {} columns for a weight of {}", x.cols(), weight.cols());
        assert!(rows.start <= rows.end && rows.end <= weight.rows, "rows {rows:?} of {}", weight.rows);
    }
    if activations == Activations::F32 {
        return parts.iter().map(|(w, rows)| exact::linear_rows(context, x, w, rows.clone())).collect();
    }
    let mut outputs: Vec<_> = parts.iter().map(|(_, rows)| Tensor::zeros(x.rows(), rows.len())).collect();
    let mut inputs: Vec<(&Columns, Rounded)> = Vec::new();
    let mut jobs = Vec::with_capacity(parts.len());
    for ((weight, rows), output) in parts.iter().zip(&mut outputs) {
        let known = inputs.iter().position(|(columns, _)| columns.same_stream(&weight.columns));
        let input = known.unwrap_or_else(|| {
            inputs.push((&weight.columns, Rounded::new(pool, x, &weight.columns, widest_tile(isa, &weight.columns))));
            inputs.len() - 1
        });
        let kernels = [1, 4, 16].map(|width| tile_kernel(isa, weight, width));
        jobs.push(Job { weight, rows: rows.clone(), input, kernels, output: SendPtr::new(output.host_mut()) });
    }
    // The strips of all jobs, one after the other.
    let strips = |job: &Job| job.rows.start / STRIP..job.rows.end.div_ceil(STRIP);
    let items = jobs.iter().map(|job| strips(job).len()).sum();
    // About 1 µs of reading or computing, so that claims cost little.
    let bytes_of_strip = parts.iter().map(|(w, _)| w.byte_len() / w.strips().max(1)).max().unwrap_or(0);
    let grain = (16 << 10) / (bytes_of_strip.max(1) * x.rows().max(1)).max(1);
    pool.for_ranges(items, grain, |range| {
        let mut first = 0;
        for job in &jobs {
            let of_job = strips(job);
            let here = range.start.max(first)..range.end.min(first + of_job.len());
            if !here.is_empty() {
                let strips = of_job.start + here.start - first..of_job.start + here.end - first;
                // SAFETY: the strips lie within the job's rows, and are this thread's alone.
                unsafe { job.run(&inputs[job.input].1, strips) };
            }
            first += of_job.len();
        }
    });
    outputs
}

impl Job<'_> {
    /// Multiplies some strips with all tokens.
    ///
    /// # Safety
    /// The strips hold rows of the job's, and no other thread writes these rows' outputs.
    unsafe fn run(&self, input: &Rounded, strips: Range<usize>) {
        let width = self.rows.len();
        let mut result = [[0.0; STRIP]; 16];
        // As many tokens at a time as stay in a cache while strips pass by.
        let tokens = (TOKEN_BYTES / input.bytes_of_token().max(1)).max(16);
        for tiles in input.tiles.chunk_by(|a, b| a.first / tokens == b.first / tokens) {
            for strip in strips.clone() {
                let first = (strip * STRIP).max(self.rows.start);
                let end = ((strip + 1) * STRIP).min(self.rows.end);
                let lanes = first - strip * STRIP..end - strip * STRIP;
                for &tile in tiles {
                    let kernel = match tile.width {
                        1 => self.kernels[0],
                        4 => self.kernels[1],
                        _ => self.kernels[2],
                    };
                    // SAFETY: the kernel was chosen for this weight, an available instruction set and this width; the strip
                    // exists; the rows written lie within the output and are ours.
                    unsafe {
                        let (blocks, sums) = (input.blocks(tile), input.piece_sums(tile));
                        kernel(self.weight, strip, blocks, sums, result.as_mut_ptr());
                        for (t, result) in result.iter().enumerate().take(tile.tokens) {
                            let to = self.output.get().add((tile.first + t) * width + first - self.rows.start);
                            let from = &result[lanes.clone()];
                            to.copy_from_nonoverlapping(from.as_ptr(), from.len());
                        }
                    }
                }
            }
        }
    }
}
