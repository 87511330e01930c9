//! Linear layers whose weights are 8-bit floats with block scales. A weight stays as it is stored, in a memory-mapped file perhaps.
//!
//! For few tokens a row's codes are widened in registers and multiplied there, so that only codes are read from memory. For many tokens
//! some rows at a time are written out and multiplied as a dense weight.

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer, Fp8};
use half::bf16;

use super::dense::{self, DenseArg};
use super::pool::SendPtr;
use super::quant::Context;
use super::simd::{MAX_LANES, Simd, for_isa};
use super::{Activations, FloatProducts, elementwise, rows};
use crate::Tensor;

/// From this many tokens on, rows are written out.
const MANY_TOKENS: usize = 12;

/// Elements that are written out at a time: a few times the second-level cache.
const CHUNK: usize = 1 << 19;

/// Columns of a transposed product of few tokens that a thread takes at a time.
const COLUMNS: usize = 64;

/// Bytes of codes that a thread takes at a time.
const GRAIN_BYTES: usize = 16 << 10;

/// `y = x · W[rows, :]ᵀ`: x `[tokens, in]`, y `[tokens, rows.len()]`.
pub fn linear_rows(context: Context, x: &Tensor, w: &Fp8, rows: Range<usize>) -> Tensor {
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
    let grain = (GRAIN_BYTES / w.cols()).max(1);
    let to = SendPtr::new(y.host_mut());
    context.pool.for_ranges(outputs, grain, |items| {
        let mut out = vec![0.0; tokens];
        for item in items {
            row_dots(context.isa, Piece::row(w, rows.start + item), x.host(), &mut out);
            for (t, &value) in out.iter().enumerate() {
                // SAFETY: y is [tokens, outputs]; this row's results are this thread's alone.
                unsafe { *to.get().add(t * outputs + item) = value };
            }
        }
    });
    y
}

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, in]`.
pub fn linear_transposed(context: Context, x: &Tensor, w: &Fp8, rows: Range<usize>) -> Tensor {
    assert!(rows.end <= w.rows() && x.cols() == rows.len(), "{} columns for rows {rows:?}", x.cols());
    let mut y = Tensor::zeros(x.rows(), w.cols());
    if x.rows() < MANY_TOKENS {
        few_transposed(context, x, w, rows, &mut y);
        return y;
    }
    let mut done = 0;
    for_chunks(context, w, rows, |chunk| {
        let part = rows::columns(context.pool, x, done..done + chunk.rows());
        let part = dense::linear_transposed(context, &part, &chunk, 0..chunk.rows());
        elementwise::add(context.pool, &mut y, &part);
        done += chunk.rows();
    });
    y
}

/// [`linear_transposed`] of few tokens: some columns at a time, of every row in turn.
fn few_transposed(context: Context, x: &Tensor, w: &Fp8, rows: Range<usize>, y: &mut Tensor) {
    let (tokens, cols) = (x.rows(), w.cols());
    let to = SendPtr::new(y.host_mut());
    context.pool.for_ranges(cols.div_ceil(COLUMNS), 1, |items| {
        let (mut row, mut sums) = (vec![0.0; COLUMNS], vec![0.0; tokens * COLUMNS]);
        for item in items {
            let columns = item * COLUMNS..((item + 1) * COLUMNS).min(cols);
            let row = &mut row[..columns.len()];
            sums.fill(0.0);
            for (i, r) in rows.clone().enumerate() {
                add_row(
                    context.isa,
                    Piece { w, row: r, first: columns.start },
                    row,
                    &x.host()[i..],
                    rows.len(),
                    &mut sums,
                );
            }
            for (t, sums) in sums.chunks_exact(COLUMNS).enumerate() {
                for (c, &sum) in columns.clone().zip(sums) {
                    // SAFETY: y is [tokens, cols]; these columns are this thread's alone.
                    unsafe { *to.get().add(t * cols + c) = sum };
                }
            }
        }
    });
}

/// Writes out some of the rows at a time: in bf16 where products round both factors, as DeepSeek's own conversion does, else in f32.
fn for_chunks(context: Context, w: &Fp8, rows: Range<usize>, mut body: impl FnMut(Dense)) {
    let cols = w.cols();
    if cols == 0 {
        return;
    }
    let step = (CHUNK / cols).max(16);
    let narrow = context.activations == Activations::Fast && context.products != FloatProducts::F32;
    let read = |r: usize, out: &mut [f32]| widen(context.isa, Piece::row(w, r), out);
    for first in rows.clone().step_by(step) {
        let count = step.min(rows.end - first);
        let mut wide = vec![0.0f32; if narrow { 0 } else { count * cols }];
        let mut half = vec![bf16::ZERO; if narrow { count * cols } else { 0 }];
        context.pool.for_chunks_mut(&mut wide, cols, 8, |at, lines| {
            lines.chunks_exact_mut(cols).enumerate().for_each(|(i, out)| read(first + at + i, out));
        });
        context.pool.for_chunks_mut(&mut half, cols, 8, |at, lines| {
            let mut line = vec![0.0; cols];
            for (i, out) in lines.chunks_exact_mut(cols).enumerate() {
                read(first + at + i, &mut line);
                dense::round_to_bf16(context.isa, &line, out);
            }
        });
        let data = if narrow { FloatBuffer::Bf16(half.into()) } else { FloatBuffer::F32(wide.into()) };
        body(Dense::new(vec![count, cols], data));
    }
}

/// Some columns of a row: as many as are written.
#[derive(Clone, Copy)]
struct Piece<'a> {
    w: &'a Fp8,
    row: usize,
    /// The first column.
    first: usize,
}

impl<'a> Piece<'a> {
    /// All of row `row`.
    fn row(w: &'a Fp8, row: usize) -> Self {
        Self { w, row, first: 0 }
    }
}

for_isa! {
    /// A row's columns as f32.
    fn widen(piece: Piece, out: &mut [f32]) = widen_with
}

for_isa! {
    /// A row against every token of `x`, whose rows follow each other.
    fn row_dots(piece: Piece, x: &[f32], out: &mut [f32]) = row_dots_with
}

for_isa! {
    /// A row's columns, written to `row`, times every `stride`-th number of `x`, added to each [`COLUMNS`] of `sums`.
    fn add_row(piece: Piece, row: &mut [f32], x: &[f32], stride: usize, sums: &mut [f32]) = add_row_with
}

/// What [`Simd::load_e4m3`] leaves out.
const FACTOR: f32 = 256.0;

/// Runs `$body` for the vectors of a piece of `$len` columns: `$w` has the weights of `$n` columns from `$at` on, zeros beyond. `$j` counts
/// vectors, 0 to 3, for as many sums that do not wait for each other.
macro_rules! for_vectors {
    ($s:ident, $piece:ident, $len:expr, |$at:ident, $n:ident, $w:ident, $j:ident| $body:block) => {
        let Piece { w, row, first } = $piece;
        let codes = &w.row_codes(row)[first..first + $len];
        let block = w.block().1;
        let mut $at = 0;
        while $at < codes.len() {
            let column = first + $at;
            let end = codes.len().min($at + block - column % block);
            let factor = $s.splat(w.scale(row, column) * FACTOR);
            while $at + 4 * S::LANES <= end {
                for $j in 0..4 {
                    let $n = S::LANES;
                    // SAFETY: 4 · LANES codes follow.
                    let $w = $s.mul(unsafe { $s.load_e4m3(codes.as_ptr().add($at)) }, factor);
                    $body
                    $at += S::LANES;
                }
            }
            while $at < end {
                let ($n, $j) = ((end - $at).min(S::LANES), 0);
                let mut lanes = [0u8; MAX_LANES];
                let from = if $n == S::LANES {
                    codes[$at..$at + S::LANES].as_ptr()
                } else {
                    lanes[..$n].copy_from_slice(&codes[$at..$at + $n]);
                    lanes.as_ptr()
                };
                // SAFETY: LANES codes follow, or the array has LANES elements or more.
                let $w = $s.mul(unsafe { $s.load_e4m3(from) }, factor);
                $body
                $at += $n;
            }
        }
    };
}

#[inline(always)]
fn widen_with<S: Simd>(s: S, piece: Piece, out: &mut [f32]) {
    for_vectors!(s, piece, out.len(), |at, n, w, _j| {
        // SAFETY: n columns from `at` on are the piece's.
        unsafe { s.store_first(out.as_mut_ptr().add(at), w, n) };
    });
}

#[inline(always)]
fn row_dots_with<S: Simd>(s: S, piece: Piece, x: &[f32], out: &mut [f32]) {
    let stride = piece.w.cols();
    for (t, out) in out.chunks_mut(4).enumerate() {
        let x = &x[t * 4 * stride..];
        match out.len() {
            1 => dots::<S, 1>(s, piece, x, stride, out),
            2 => dots::<S, 2>(s, piece, x, stride, out),
            3 => dots::<S, 3>(s, piece, x, stride, out),
            _ => dots::<S, 4>(s, piece, x, stride, out),
        }
    }
}

/// A whole row against N tokens, `stride` numbers apart.
#[inline(always)]
fn dots<S: Simd, const N: usize>(s: S, piece: Piece, x: &[f32], stride: usize, out: &mut [f32]) {
    assert!(x.len() >= N * stride && stride == piece.w.cols() && out.len() == N);
    let mut sums = [[s.splat(0.0); N]; 4];
    for_vectors!(s, piece, stride, |at, n, w, j| {
        for (t, sum) in sums[j].iter_mut().enumerate() {
            // SAFETY: x has N tokens of `stride` columns, and at + n ≤ stride.
            *sum = s.mul_add(w, unsafe { s.load_first(x.as_ptr().add(t * stride + at), n) }, *sum);
        }
    });
    for (t, out) in out.iter_mut().enumerate() {
        *out = s.sum(s.add(s.add(sums[0][t], sums[1][t]), s.add(sums[2][t], sums[3][t])));
    }
}

#[inline(always)]
fn add_row_with<S: Simd>(s: S, piece: Piece, row: &mut [f32], x: &[f32], stride: usize, sums: &mut [f32]) {
    widen_with(s, piece, row);
    for (&x, sums) in x.iter().step_by(stride).zip(sums.chunks_exact_mut(COLUMNS)) {
        for (sum, &w) in sums.iter_mut().zip(&*row) {
            *sum += x * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use fourfold_tensor::E4M3;

    use super::*;
    use crate::Isa;

    #[test]
    fn every_code_is_widened_to_what_it_stands_for() {
        let codes: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
        let scales = FloatBuffer::F32(vec![0.37, 3e-5, 1e5].into());
        let w = Fp8::new(1, codes.len(), codes.clone().into(), (1, 100), scales).unwrap();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let expected: Vec<f32> =
            codes.iter().enumerate().map(|(c, &code)| E4M3[usize::from(code)] * [0.37, 3e-5, 1e5][c / 100]).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for first in [0, 1, 99, 130] {
                let mut out = vec![0.0; codes.len() - first];
                widen(isa, Piece { w: &w, row: 0, first }, &mut out);
                assert_eq!(bits(&out), bits(&expected[first..]), "{} from {first}", isa.name());
            }
        }
    }
}
