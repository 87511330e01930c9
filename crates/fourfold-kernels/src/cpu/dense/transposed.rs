//! `y = x · W[rows, :]`: the weight's rows are already as wide as the result.

use std::ops::Range;

use fourfold_tensor::{Dense, FloatBuffer};

use super::product::{Fma, Product};
use super::shares;
use super::tile::{Operands, product, tile};
use crate::Tensor;
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::simd::{Element, MAX_LANES, Simd, for_isa};

/// Columns of a work item.
const COLUMNS: usize = 8 * MAX_LANES;

/// Tokens of a work item.
const TOKENS: usize = 14 * 10;

/// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, weight.cols()]`.
pub fn linear_transposed(context: Context, x: &Tensor, weight: &Dense, rows: Range<usize>) -> Tensor {
    assert_eq!(x.cols(), rows.len(), "an input of {} columns for {} rows of a weight", x.cols(), rows.len());
    assert!(rows.end <= weight.rows(), "rows {rows:?} of a weight of {}", weight.rows());
    let cols = weight.cols();
    let mut y = Tensor::zeros(x.rows(), cols);
    if x.rows() == 0 || cols == 0 || rows.is_empty() {
        return y;
    }
    let to = SendPtr::new(y.host_mut());
    let strips = cols.div_ceil(COLUMNS);
    let chunks = x.rows().div_ceil(TOKENS);
    context.pool.for_ranges(strips * chunks, 1, |items| {
        for item in items {
            let strip = item / chunks * COLUMNS;
            let columns = strip..(strip + COLUMNS).min(cols);
            let tokens = shares(x.rows(), chunks, item % chunks);
            let part = Part { x, cols, columns, tokens, y: &to };
            match weight.data() {
                FloatBuffer::F32(w) => strip_product(context.isa, &part, &w[rows.start * cols..rows.end * cols]),
                FloatBuffer::F16(w) => strip_product(context.isa, &part, &w[rows.start * cols..rows.end * cols]),
                FloatBuffer::Bf16(w) => strip_product(context.isa, &part, &w[rows.start * cols..rows.end * cols]),
            }
        }
    });
    y
}

/// Some columns for some tokens.
struct Part<'a> {
    x: &'a Tensor,
    cols: usize,
    columns: Range<usize>,
    tokens: Range<usize>,
    y: &'a SendPtr<f32>,
}

for_isa! {
    /// One work item.
    fn strip_product<E: Element>(part: &Part, w: &[E]) = strip_product_with
}

#[inline(always)]
fn strip_product_with<S: Simd, E: Element>(s: S, part: &Part, w: &[E]) {
    let Part { x, cols, ref columns, ref tokens, y } = *part;
    let steps = x.cols();
    // Whole vectors straight from the weight; the rest by a padded copy, for a load may not pass the last row's end.
    let whole = columns.len() / S::LANES * S::LANES;
    let at = |column: usize| Operands {
        a: x.host()[tokens.start * steps..].as_ptr(),
        a_row: steps,
        a_step: 1,
        b: w[column..].as_ptr(),
        b_step: cols,
        c: y.get().wrapping_add(tokens.start * cols + column),
        c_row: cols,
        steps,
        accumulate: false,
    };
    // SAFETY: x and w are as long as their shapes say; items write disjoint parts of y; `padded` has whole vectors.
    unsafe {
        if tokens.len() == 1 && whole == 8 * S::LANES {
            // One token is bound by memory: wide reads.
            tile::<S, Fma<E>, 1, 8>(s, at(columns.start), whole);
        } else {
            product::<S, Fma<E>>(s, at(columns.start), tokens.len(), whole);
        }
        let rest = columns.len() - whole;
        if rest > 0 {
            let first = columns.start + whole;
            let mut padded = vec![0.0f32; steps * S::LANES];
            for (padded, row) in padded.chunks_exact_mut(S::LANES).zip(w.chunks_exact(cols)) {
                let lanes = s.load_first(row[first..].as_ptr(), rest);
                s.store(padded.as_mut_ptr(), lanes);
            }
            let operands = at(first);
            let padded = Operands {
                a: operands.a,
                a_row: operands.a_row,
                a_step: operands.a_step,
                b: padded.as_ptr(),
                b_step: S::LANES,
                c: operands.c,
                c_row: operands.c_row,
                steps,
                accumulate: false,
            };
            product::<S, Fma<f32>>(s, padded, tokens.len(), rest);
        }
    }
    debug_assert_eq!(<Fma<E> as Product<S>>::PER_LANE, 1);
}
