//! In which form matrices are multiplied: f32, pairs of bf16, pairs of integers with scales. A kernel that is generic over [`Form`] is
//! written once for all three.

use std::marker::PhantomData;

use super::product::Product;
use super::steps::pack_steps;
use super::tile::{Operands, product};
use crate::cpu::simd::{Element, Simd};

/// Two matrices in lanes, with scales where the form has them.
#[derive(Clone, Copy)]
pub struct Matrices {
    /// The lanes.
    pub lanes: Operands<f32>,
    /// Scales of `a`'s rows.
    pub a_scales: *const f32,
    /// From a row's scale to the next's.
    pub a_scale_row: usize,
    /// From the scale of a block of terms to the next block's.
    pub a_scale_block: usize,
    /// Scales of `b`'s columns: block after block, `lanes.b_step` apart.
    pub b_scales: *const f32,
}

/// A form.
pub trait Form<S: Simd>: Copy {
    /// Elements of a lane.
    const PER_LANE: usize;

    /// Rows that [`Form::steps`] writes for so many terms: lanes, and scales after them.
    fn rows(terms: usize) -> usize;

    /// Brings `rows` rows of `cols` elements, which are terms of a sum, into lanes `to[step][to_row]`, and the columns' scales after them.
    /// Columns up to whole vectors, and rows missing in a lane, become zeros.
    ///
    /// # Safety
    /// Row r has `cols` readable elements at `from + r · stride`; `to` has [`Form::rows`] rows of whole vectors.
    unsafe fn steps<E: Element>(
        s: S,
        from: *const E,
        stride: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_row: usize,
    );

    /// Brings a row of `n` floats, terms of a sum, into lanes of neighbours, in whole vectors: zeros follow the last. Gives the row's scale.
    /// Where the form has scales, `n` is no more than one covers.
    ///
    /// # Safety
    /// `n` floats are readable, and so many lanes writable as `n.div_ceil(PER_LANE)` rounded up to whole vectors.
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32) -> f32;

    /// `c (+)= a · b`.
    ///
    /// # Safety
    /// As [`product`], and where the form has scales there is one for each block of each row and of each column, these up to whole vectors.
    unsafe fn multiply(s: S, matrices: Matrices, rows: usize, cols: usize);
}

/// The lanes of a product, without scales.
#[derive(Clone, Copy)]
pub struct Plain<P>(PhantomData<P>);

impl<S: Simd, P: Product<S>> Form<S> for Plain<P> {
    const PER_LANE: usize = P::PER_LANE;

    fn rows(terms: usize) -> usize {
        terms.div_ceil(P::PER_LANE)
    }

    #[inline(always)]
    unsafe fn steps<E: Element>(
        s: S,
        from: *const E,
        stride: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_row: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { pack_steps::<S, P, E>(s, from, stride, rows, cols, to, to_row) }
    }

    #[inline(always)]
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { P::lanes_of_row(s, from, n, to) };
        1.0
    }

    #[inline(always)]
    unsafe fn multiply(s: S, matrices: Matrices, rows: usize, cols: usize) {
        // SAFETY: the caller's promise.
        unsafe { product::<S, P>(s, matrices.lanes.lanes::<S, P>(), rows, cols) }
    }
}

/// The first `left` elements of two vectors' worth, zeros beyond.
///
/// # Safety
/// So many are readable.
#[inline(always)]
pub unsafe fn two_vectors<S: Simd>(s: S, from: *const f32, left: usize) -> (S::V, S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        let first = s.load_first(from, S::LANES.min(left));
        match left.saturating_sub(S::LANES) {
            0 => (first, s.splat(0.0)),
            more => (first, s.load_first(from.add(S::LANES), S::LANES.min(more))),
        }
    }
}
