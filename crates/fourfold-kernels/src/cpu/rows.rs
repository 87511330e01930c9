//! Operations that move, pick and add whole rows and columns. They are bound by memory; small ones are done by the caller alone.

use std::ops::Range;

use super::pool::{Pool, SendPtr};
use super::unwritten::Unwritten;
use crate::{Bf16Tensor, Tensor};

/// Elements below which threads do not pay.
const GRAIN: usize = 1 << 15;

/// Two tensors of `rows` rows, of `first` and `second` columns, which `write(rows, their elements)` writes whole, some rows at a time.
fn two_of(
    pool: &Pool,
    rows: usize,
    [first, second]: [usize; 2],
    write: impl Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync,
) -> [Tensor; 2] {
    let (mut a, mut b) = (Unwritten::<f32>::new(rows * first), Unwritten::<f32>::new(rows * second));
    let (to_a, to_b) = (a.target(), b.target());
    let part = |to: SendPtr<f32>, range: &Range<usize>, cols: usize| {
        // SAFETY: ranges of rows do not overlap, and `write` does not read what it has not written.
        unsafe { std::slice::from_raw_parts_mut(to.get().add(range.start * cols), range.len() * cols) }
    };
    pool.for_ranges(rows, GRAIN / (first + second).max(1), |range| {
        write(range.clone(), part(to_a, &range, first), part(to_b, &range, second));
    });
    // SAFETY: all rows were written.
    unsafe { [Tensor::new(rows, first, a.written()), Tensor::new(rows, second, b.written())] }
}

/// Of each token's heads `kv` their own part and the token's shared one as keys, the rest as values.
pub fn split_heads(pool: &Pool, kv: &Tensor, shared: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
    assert!(kv.rows() == shared.rows() * heads && 0 < own && own < kv.cols(), "split heads: shapes");
    let (tokens, key, value) = (shared.rows(), own + shared.cols(), kv.cols() - own);
    let [k, v] = two_of(pool, tokens, [heads * key, heads * value], |tokens, keys, values| {
        let heads_of = keys.chunks_exact_mut(key).zip(values.chunks_exact_mut(value));
        for (row, (key, value)) in (tokens.start * heads..).zip(heads_of) {
            let (first, rest) = kv.row(row).split_at(own);
            key[..own].copy_from_slice(first);
            key[own..].copy_from_slice(shared.row(row / heads));
            value.copy_from_slice(rest);
        }
    });
    [k.reshape(tokens * heads, key), v.reshape(tokens * heads, value)]
}

/// The way back: keys' own part beside values, and the sum of the heads' shared parts.
pub fn split_heads_backward(pool: &Pool, dk: &Tensor, dv: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
    assert!(dk.rows() == dv.rows() && dk.rows().is_multiple_of(heads) && own <= dk.cols(), "split heads: shapes");
    let (tokens, both, shared) = (dk.rows() / heads, own + dv.cols(), dk.cols() - own);
    let [d_kv, d_shared] = two_of(pool, tokens, [heads * both, shared], |tokens, kvs, sums| {
        for (row, kv) in (tokens.start * heads..).zip(kvs.chunks_exact_mut(both.max(1))) {
            kv[..own].copy_from_slice(&dk.row(row)[..own]);
            kv[own..].copy_from_slice(dv.row(row));
        }
        for (token, sum) in tokens.zip(sums.chunks_exact_mut(shared.max(1))) {
            sum.fill(0.0);
            for head in 0..heads {
                sum.iter_mut().zip(&dk.row(token * heads + head)[own..]).for_each(|(sum, d)| *sum += d);
            }
        }
    });
    [d_kv.reshape(tokens * heads, both), d_shared]
}

/// A `[rows, cols]` tensor whose rows `write(row, its elements)` writes, whole.
fn rows_of(pool: &Pool, rows: usize, cols: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Tensor {
    let mut y = Unwritten::<f32>::new(rows * cols);
    let to = y.target();
    pool.for_ranges(rows, GRAIN / cols.max(1), |range| {
        for row in range {
            // SAFETY: rows do not overlap, and `write` does not read what it has not written.
            write(row, unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols), cols) });
        }
    });
    // SAFETY: all rows were written.
    Tensor::new(rows, cols, unsafe { y.written() })
}

/// Columns `range` of each row.
pub fn columns(pool: &Pool, x: &Tensor, range: Range<usize>) -> Tensor {
    rows_of(pool, x.rows(), range.len(), |r, to| to.copy_from_slice(&x.row(r)[range.clone()]))
}

/// `a` and `b` side by side.
pub fn concat_columns(pool: &Pool, a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.rows(), b.rows(), "concatenating unequal numbers of rows");
    rows_of(pool, a.rows(), a.cols() + b.cols(), |r, to| {
        let (left, right) = to.split_at_mut(a.cols());
        left.copy_from_slice(a.row(r));
        right.copy_from_slice(b.row(r));
    })
}

/// The named rows.
pub fn gather_rows(pool: &Pool, x: &Tensor, rows: &[usize]) -> Tensor {
    rows_of(pool, rows.len(), x.cols(), |i, to| to.copy_from_slice(x.row(rows[i])))
}

/// Rows `range`, widened.
pub fn rows_of_bf16(pool: &Pool, x: &Bf16Tensor, range: Range<usize>) -> Tensor {
    let cols = x.cols();
    let from = &x.host()[range.start * cols..range.end * cols];
    rows_of(pool, range.len(), cols, |r, to| {
        // bf16 is the upper half of an f32.
        for (to, v) in to.iter_mut().zip(&from[r * cols..]) {
            *to = f32::from_bits(u32::from(v.to_bits()) << 16);
        }
    })
}

/// Rows `range`.
pub fn rows(pool: &Pool, x: &Tensor, range: Range<usize>) -> Tensor {
    assert!(range.end <= x.rows(), "rows {range:?} of {}", x.rows());
    rows_of(pool, range.len(), x.cols(), |r, to| to.copy_from_slice(x.row(range.start + r)))
}

/// Writes `rows` over those of `x` from `first` on.
pub fn set_rows(pool: &Pool, x: &mut Tensor, first: usize, rows: &Tensor) {
    assert_eq!(x.cols(), rows.cols(), "rows of another width");
    let cols = rows.cols();
    let to = &mut x.host_mut()[first * cols..(first + rows.rows()) * cols];
    pool.for_chunks_mut(to, cols, GRAIN / cols.max(1), |first, to| {
        to.copy_from_slice(&rows.host()[first * cols..first * cols + to.len()]);
    });
}

/// Writes `columns` over those of `x` from `first` on.
pub fn set_columns(pool: &Pool, x: &mut Tensor, first: usize, columns: &Tensor) {
    assert_eq!(x.rows(), columns.rows(), "columns of another height");
    let (cols, width) = (x.cols().max(1), columns.cols());
    pool.for_chunks_mut(x.host_mut(), cols, GRAIN / width.max(1), |start, rows| {
        for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
            row[first..first + width].copy_from_slice(columns.row(start + i));
        }
    });
}

/// Multiplies each row by its factor.
pub fn scale_rows(pool: &Pool, x: &mut Tensor, factors: &[f32]) {
    assert_eq!(x.rows(), factors.len(), "factors for another number of rows");
    let cols = x.cols();
    pool.for_chunks_mut(x.host_mut(), cols, GRAIN / cols.max(1), |first, rows| {
        for (row, factor) in rows.chunks_exact_mut(cols).zip(&factors[first..]) {
            row.iter_mut().for_each(|v| *v *= factor);
        }
    });
}

/// `x[rows[i]] += factors[i] · y[i]`. Rows may repeat: threads take columns, not rows.
pub fn scatter_add_rows(pool: &Pool, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
    /// Columns of a cache line.
    const LINE: usize = 16;
    assert_eq!((x.cols(), y.rows(), y.rows()), (y.cols(), rows.len(), factors.len()), "scatter of unequal shapes");
    let (cols, of_x) = (x.cols(), x.rows());
    assert!(rows.iter().all(|&r| r < of_x), "a row beyond {of_x}");
    let to = SendPtr::new(x.host_mut());
    pool.for_ranges(cols.div_ceil(LINE), GRAIN / (LINE * rows.len().max(1)), |lines| {
        let columns = lines.start * LINE..(lines.end * LINE).min(cols);
        for (i, (&r, &factor)) in rows.iter().zip(factors).enumerate() {
            // SAFETY: the row lies in x, and the columns are this thread's alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(r * cols + columns.start), columns.len()) };
            to.iter_mut().zip(&y.row(i)[columns.clone()]).for_each(|(x, y)| *x += factor * y);
        }
    });
}

/// `a[i] · b[i]` of each row.
pub fn row_dots(pool: &Pool, a: &Tensor, b: &Tensor) -> Vec<f32> {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "row dots: shapes");
    let mut dots = vec![0.0; a.rows()];
    pool.for_chunks_mut(&mut dots, 1, GRAIN / a.cols().max(1), |first, dots| {
        for (i, dot) in dots.iter_mut().enumerate() {
            // Sums of sixteen: one after another they would wait for each other.
            let mut sums = [0.0f32; 16];
            let (a, b) = (a.row(first + i), b.row(first + i));
            for (a, b) in a.chunks(16).zip(b.chunks(16)) {
                for ((sum, &x), &y) in sums.iter_mut().zip(a).zip(b) {
                    *sum += x * y;
                }
            }
            *dot = sums.iter().map(|&sum| f64::from(sum)).sum::<f64>() as f32;
        }
    });
    dots
}
