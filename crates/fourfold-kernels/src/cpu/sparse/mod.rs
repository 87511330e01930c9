//! Linear layers whose weights are a bitmask and the values it keeps. A weight stays as it is stored, in a memory-mapped file perhaps.
//!
//! For few tokens each row is spread to its columns in registers ([`expand`]) and multiplied there, so that only mask and kept values
//! are read from memory. For many tokens some rows at a time are written out and multiplied as a dense weight.

#[cfg(target_arch = "x86_64")]
mod codes;
mod expand;
#[cfg(target_arch = "x86_64")]
mod packed;

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer, Sparse, SparseCodes, SparseValues};
use half::bf16;

use self::expand::{Expand, Row, row_dots, row_to_f32};
use super::dense::{self, DenseArg};
use super::pool::SendPtr;
use super::quant::Context;
use super::simd::{Element, for_isa};
use super::{Activations, FloatProducts, Isa};
use crate::Tensor;

/// From this many tokens on, rows are written out.
const MANY_TOKENS: usize = 12;

/// Elements that are written out at a time: a few times the second-level cache.
const CHUNK: usize = 1 << 19;

/// Bytes of mask and values that a thread takes at a time.
const GRAIN_BYTES: usize = 16 << 10;

/// `y = x · W[rows, :]ᵀ`: x `[tokens, in]`, y `[tokens, rows.len()]`.
pub fn linear_rows(context: Context, x: &Tensor, w: &Sparse, rows: Range<usize>) -> Tensor {
    assert_eq!(x.cols(), w.cols(), "an input of {} columns for a weight of {}", x.cols(), w.cols());
    assert!(rows.end <= w.rows(), "rows {rows:?} of a weight of {}", w.rows());
    let (tokens, outputs) = (x.rows(), rows.len());
    let mut y = Tensor::zeros(tokens, outputs);
    if tokens == 0 || outputs == 0 || x.cols() == 0 {
        return y;
    }
    if tokens >= MANY_TOKENS {
        let mut done = 0;
        for_chunks(context, w, rows, |chunk| {
            let arg = DenseArg { weight: &chunk, rows: 0..chunk.rows(), bias: None };
            let part = dense::linear(context, x, &[arg]).swap_remove(0);
            for (y, part) in y.host_mut().chunks_exact_mut(outputs).zip(part.host().chunks_exact(chunk.rows())) {
                y[done..done + part.len()].copy_from_slice(part);
            }
            done += chunk.rows();
        });
        return y;
    }
    let input = Input::new(context, x, w);
    let grain = (GRAIN_BYTES / (w.byte_len() / w.rows()).max(1)).max(1);
    let to = SendPtr::new(y.host_mut());
    context.pool.for_ranges(outputs, grain, |items| {
        let mut scratch = Scratch::default();
        let mut out = vec![0.0; tokens];
        for item in items {
            input.row(context.isa, w, rows.start + item, &mut scratch, &mut out);
            for (t, &value) in out.iter().enumerate() {
                // SAFETY: y is [tokens, outputs]; this row's results are this thread's alone.
                unsafe { *to.get().add(t * outputs + item) = value };
            }
        }
    });
    y
}

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, in]`.
pub fn linear_transposed(context: Context, x: &Tensor, w: &Sparse, rows: Range<usize>) -> Tensor {
    assert!(rows.end <= w.rows() && x.cols() == rows.len(), "{} columns for rows {rows:?}", x.cols());
    let mut y = Tensor::zeros(x.rows(), w.cols());
    let mut done = 0;
    for_chunks(context, w, rows, |chunk| {
        let part = super::rows::columns(context.pool, x, done..done + chunk.rows());
        let part = dense::linear_transposed(context, &part, &chunk, 0..chunk.rows());
        super::elementwise::add(context.pool, &mut y, &part);
        done += chunk.rows();
    });
    y
}

/// Writes out some of the rows at a time.
fn for_chunks(context: Context, w: &Sparse, rows: Range<usize>, mut body: impl FnMut(Dense)) {
    let cols = w.cols();
    let step = (CHUNK / cols.max(1)).max(16);
    // In bf16 where that is exact, or where activations are rounded more than that anyway.
    let narrow = match w.values() {
        SparseValues::Float(values) => matches!(values, FloatBuffer::Bf16(_)),
        SparseValues::Codes(_) => context.activations == Activations::Fast,
    };
    for first in rows.clone().step_by(step) {
        let count = step.min(rows.end - first);
        let mut wide = vec![0.0f32; if narrow { 0 } else { count * cols }];
        let mut half = vec![bf16::ZERO; if narrow { count * cols } else { 0 }];
        let read = |row: usize, out: &mut [f32], scratch: &mut Scratch| to_f32(context.isa, w, row, scratch, out);
        let grain = 8;
        context.pool.for_chunks_mut(&mut wide, cols.max(1), grain, |at, lines| {
            let (mut scratch, mut line) = (Scratch::default(), Vec::new());
            for (i, out) in lines.chunks_exact_mut(cols).enumerate() {
                line.resize(cols.next_multiple_of(64), 0.0);
                read(first + at + i, &mut line, &mut scratch);
                out.copy_from_slice(&line[..cols]);
            }
        });
        context.pool.for_chunks_mut(&mut half, cols.max(1), grain, |at, lines| {
            let (mut scratch, mut line) = (Scratch::default(), Vec::new());
            for (i, out) in lines.chunks_exact_mut(cols).enumerate() {
                line.resize(cols.next_multiple_of(64), 0.0);
                read(first + at + i, &mut line, &mut scratch);
                dense::round_to_bf16(context.isa, &line[..cols], out);
            }
        });
        let data = if narrow { FloatBuffer::Bf16(half.into()) } else { FloatBuffer::F32(wide.into()) };
        body(Dense::new(vec![count, cols], data));
    }
}

/// What a thread reuses from row to row.
#[derive(Default)]
struct Scratch {
    /// The row's codes, one a byte.
    codes: Vec<u8>,
    /// The row's values as f32, or the factors of its units.
    values: Vec<f32>,
    /// The row's scales, a group each, and 16 numbers more.
    groups: Vec<f32>,
    /// A scale for each word of the mask.
    scales: Vec<f32>,
}

impl Scratch {
    /// Unpacks the codes of a row, and 64 bytes more, and a scale for each word.
    fn read_codes(&mut self, isa: Isa, w: &Sparse, codes: &SparseCodes, row: usize) {
        let range = w.row_values(row);
        self.codes.clear();
        self.codes.resize(range.len() + 64, 0);
        self.spread_scales(w, codes, row);
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512 && codes::is_available() {
            // SAFETY: the instructions are there.
            unsafe { codes::unpack(codes.packed.as_bytes(), codes.bits, range.start, &mut self.codes[..range.len()]) };
            return;
        }
        let _ = isa;
        w.row_codes(row, &mut self.codes[..range.len()]);
    }

    /// The row's scales, and 16 numbers more.
    fn read_scales(&mut self, w: &Sparse, codes: &SparseCodes, row: usize) {
        let groups = w.cols().div_ceil(codes.group_size);
        self.groups.resize(groups + 16, 0.0);
        codes.scales.read_f32(row * groups, &mut self.groups[..groups]);
    }

    /// A scale for each word; 0 beyond the row.
    fn spread_scales(&mut self, w: &Sparse, codes: &SparseCodes, row: usize) {
        self.read_scales(w, codes, row);
        self.scales.clear();
        self.scales.resize(w.row_mask(row).len(), 0.0);
        let run = codes.group_size.div_ceil(64);
        for (scales, &scale) in self.scales.chunks_mut(run).zip(&self.groups) {
            scales.fill(scale);
        }
    }

    /// The row's codes, less the zero point, as f32.
    fn centre(&mut self, zero: f32) {
        self.values.clear();
        self.values.extend(self.codes.iter().map(|&code| f32::from(code) - zero));
    }
}

/// Whether every run of so many columns lies in one group.
fn has_whole(columns: usize, w: &Sparse, codes: &SparseCodes) -> bool {
    codes.group_size.is_multiple_of(columns) || codes.group_size >= w.cols()
}

/// The code that stands for 0.
fn zero_point(codes: &SparseCodes) -> u8 {
    1 << (codes.bits - 1)
}

/// Row `row` into `out`, of whole words.
fn to_f32(isa: Isa, w: &Sparse, row: usize, scratch: &mut Scratch, out: &mut [f32]) {
    let (mask, first) = (w.row_mask(row), w.row_values(row).start);
    match w.values() {
        SparseValues::Float(FloatBuffer::F32(v)) => {
            write_row(isa, Row { mask, values: &v[first..], scales: None }, out)
        }
        SparseValues::Float(FloatBuffer::F16(v)) => {
            write_row(isa, Row { mask, values: &v[first..], scales: None }, out)
        }
        SparseValues::Float(FloatBuffer::Bf16(v)) => {
            write_row(isa, Row { mask, values: &v[first..], scales: None }, out)
        }
        SparseValues::Codes(codes) if has_whole(64, w, codes) => {
            scratch.read_codes(isa, w, codes, row);
            scratch.centre(f32::from(zero_point(codes)));
            write_row(isa, Row { mask, values: &scratch.values[..], scales: Some(&scratch.scales) }, out);
        }
        SparseValues::Codes(_) => w.read_row(row, out),
    }
}

for_isa! {
    fn write_row<E: Element>(row: Row<E>, out: &mut [f32]) = row_to_f32
}

for_isa! {
    /// A row against up to eight tokens.
    fn dots<E: Element>(row: Row<E>, x: &[f32], stride: usize, out: &mut [f32]) = dots_with
}

#[inline(always)]
fn dots_with<S: Expand, E: Element>(s: S, row: Row<E>, x: &[f32], stride: usize, out: &mut [f32]) {
    for (t, out) in out.chunks_mut(4).enumerate() {
        let x = &x[t * 4 * stride..];
        match out.len() {
            1 => row_dots::<S, E, 1>(s, row, x, stride, out),
            2 => row_dots::<S, E, 2>(s, row, x, stride, out),
            3 => row_dots::<S, E, 3>(s, row, x, stride, out),
            _ => row_dots::<S, E, 4>(s, row, x, stride, out),
        }
    }
}

/// Few tokens as a row's kernel wants them, each padded with zeros to whole words.
enum Input {
    Floats {
        x: Vec<f32>,
        stride: usize,
    },
    #[cfg(target_arch = "x86_64")]
    Pairs {
        x: Vec<bf16>,
        stride: usize,
    },
    #[cfg(target_arch = "x86_64")]
    Int8 {
        tokens: codes::Int8Tokens,
        layout: Box<codes::Layout>,
    },
}

impl Input {
    fn new(context: Context, x: &Tensor, w: &Sparse) -> Self {
        let stride = x.cols().next_multiple_of(64);
        #[cfg(target_arch = "x86_64")]
        if context.isa == Isa::Avx512
            && context.activations == Activations::Fast
            && is_x86_feature_detected!("avx512vbmi2")
        {
            match w.values() {
                SparseValues::Float(FloatBuffer::Bf16(_)) if context.products == FloatProducts::Bf16 => {
                    let mut lanes = vec![bf16::ZERO; stride * x.rows()];
                    for (t, lanes) in lanes.chunks_exact_mut(stride).enumerate() {
                        dense::round_to_bf16(context.isa, x.row(t), &mut lanes[..x.cols()]);
                    }
                    return Self::Pairs { x: lanes, stride };
                }
                SparseValues::Codes(codes) if codes::is_available() && has_whole(32, w, codes) => {
                    let layout = codes::Layout::new(codes.bits);
                    let unit = if has_whole(64, w, codes) { 64 } else { 32 };
                    let units = codes::Units::new(unit, x.cols(), codes.group_size);
                    let tokens = codes::Int8Tokens::new((0..x.rows()).map(|t| x.row(t)), x.cols(), units, &layout);
                    return Self::Int8 { tokens, layout: Box::new(layout) };
                }
                SparseValues::Float(_) | SparseValues::Codes(_) => {}
            }
        }
        let _ = w;
        let mut lanes = vec![0.0; stride * x.rows()];
        for (t, lanes) in lanes.chunks_exact_mut(stride).enumerate() {
            lanes[..x.cols()].copy_from_slice(x.row(t));
        }
        Self::Floats { x: lanes, stride }
    }

    /// One row against all tokens.
    fn row(&self, isa: Isa, w: &Sparse, row: usize, scratch: &mut Scratch, out: &mut [f32]) {
        let (mask, first) = (w.row_mask(row), w.row_values(row).start);
        match self {
            Self::Floats { x, stride } => match w.values() {
                SparseValues::Float(FloatBuffer::F32(v)) => {
                    dots(isa, Row { mask, values: &v[first..], scales: None }, x, *stride, out)
                }
                SparseValues::Float(FloatBuffer::F16(v)) => {
                    dots(isa, Row { mask, values: &v[first..], scales: None }, x, *stride, out)
                }
                SparseValues::Float(FloatBuffer::Bf16(v)) => {
                    dots(isa, Row { mask, values: &v[first..], scales: None }, x, *stride, out)
                }
                SparseValues::Codes(codes) if has_whole(64, w, codes) => {
                    scratch.read_codes(isa, w, codes, row);
                    scratch.centre(f32::from(zero_point(codes)));
                    let row = Row { mask, values: &scratch.values[..], scales: Some(&scratch.scales) };
                    dots(isa, row, x, *stride, out)
                }
                SparseValues::Codes(_) => {
                    scratch.values.clear();
                    scratch.values.resize(mask.len() * 64, 0.0);
                    w.read_row(row, &mut scratch.values);
                    let all = vec![u64::MAX; mask.len()];
                    dots(isa, Row { mask: &all, values: &scratch.values[..], scales: None }, x, *stride, out)
                }
            },
            #[cfg(target_arch = "x86_64")]
            Self::Pairs { x, stride } => {
                let SparseValues::Float(FloatBuffer::Bf16(v)) = w.values() else { return };
                for (t, out) in out.chunks_mut(4).enumerate() {
                    let (values, x) = (&v[first..], &x[t * 4 * stride..]);
                    // SAFETY: the input has this kind only where the instructions are there.
                    unsafe {
                        match out.len() {
                            1 => packed::bf16_dots::<1>(mask, values, x, *stride, out),
                            2 => packed::bf16_dots::<2>(mask, values, x, *stride, out),
                            3 => packed::bf16_dots::<3>(mask, values, x, *stride, out),
                            _ => packed::bf16_dots::<4>(mask, values, x, *stride, out),
                        }
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Int8 { tokens: x, layout } => {
                let SparseValues::Codes(codes) = w.values() else { return };
                scratch.read_scales(w, codes, row);
                let (packed, scales) = (codes.packed.as_bytes(), &scratch.groups[..]);
                let row = codes::CodeRow { mask, packed, first, layout, scales };
                scratch.values.resize(x.factors(4), 0.0);
                let factors = &mut scratch.values[..];
                for (t, out) in out.chunks_mut(4).enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        match out.len() {
                            1 => codes::code_dots::<1>(row, x, t * 4, factors, out),
                            2 => codes::code_dots::<2>(row, x, t * 4, factors, out),
                            3 => codes::code_dots::<3>(row, x, t * 4, factors, out),
                            _ => codes::code_dots::<4>(row, x, t * 4, factors, out),
                        }
                    }
                }
            }
        }
    }
}
