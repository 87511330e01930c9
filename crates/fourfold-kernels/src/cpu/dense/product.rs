//! What one lane of a product does: f32 multiply-add of a widened weight, or two bf16 products at once.

use std::marker::PhantomData;

use half::bf16;

use super::form::two_vectors;
use crate::cpu::simd::{Element, PairDot, Simd};

/// How weights are loaded into lanes and multiplied. Activations are lanes of 32 bits too: an f32, or two bf16.
pub trait Product<S: Simd>: Copy {
    /// The stored element.
    type W: Element;
    /// The same product of lanes that have been loaded before (a packed panel).
    type Packed: Product<S, Packed = Self::Packed>;
    /// Elements of a lane.
    const PER_LANE: usize;

    /// `LANES` lanes of weights.
    ///
    /// # Safety
    /// `LANES · PER_LANE` elements are readable.
    unsafe fn load(s: S, from: *const Self::W) -> S::V;

    /// Lanes of the first `n` elements, zeros beyond.
    ///
    /// # Safety
    /// `n` elements are readable; `n ≤ LANES · PER_LANE`.
    unsafe fn load_first(s: S, from: *const Self::W, n: usize) -> S::V;

    /// The lanes of one step from its `PER_LANE` rows, of which a second one may be unused.
    ///
    /// # Safety
    /// `LANES` elements are readable at each.
    unsafe fn load_step<E: Element>(s: S, first: *const E, second: *const E) -> S::V;

    /// Brings `n` floats into lanes of neighbours, in whole vectors: zeros follow the last.
    ///
    /// # Safety
    /// `n` floats are readable, and so many lanes writable as `n.div_ceil(PER_LANE)` rounded up to whole vectors.
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32);

    /// `acc + a · b` in each lane.
    fn step(s: S, acc: S::V, a: S::V, b: S::V) -> S::V;
}

/// f32 activations times weights of type `E`, widened as they are loaded.
#[derive(Clone, Copy)]
pub struct Fma<E>(PhantomData<E>);

impl<S: Simd, E: Element> Product<S> for Fma<E> {
    type W = E;
    type Packed = Fma<f32>;
    const PER_LANE: usize = 1;

    #[inline(always)]
    unsafe fn load(s: S, from: *const E) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { E::load(s, from) }
    }

    #[inline(always)]
    unsafe fn load_first(s: S, from: *const E, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_first(from, n) }
    }

    #[inline(always)]
    unsafe fn load_step<T: Element>(s: S, first: *const T, _second: *const T) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { T::load(s, first) }
    }

    #[inline(always)]
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32) {
        for i in (0..n).step_by(S::LANES) {
            // SAFETY: the caller's promise.
            unsafe { s.store(to.add(i), s.load_first(from.add(i), S::LANES.min(n - i))) }
        }
    }

    #[inline(always)]
    fn step(s: S, acc: S::V, a: S::V, b: S::V) -> S::V {
        s.mul_add(a, b, acc)
    }
}

/// bf16 activations times bf16 weights, in pairs of neighbours.
#[derive(Clone, Copy)]
pub struct Pairs;

impl<S: PairDot> Product<S> for Pairs {
    type W = bf16;
    type Packed = Self;
    const PER_LANE: usize = 2;

    #[inline(always)]
    unsafe fn load(s: S, from: *const bf16) -> S::V {
        // SAFETY: the caller's promise; loads need no alignment.
        unsafe { s.load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_first(s: S, from: *const bf16, n: usize) -> S::V {
        let mut pairs = [bf16::ZERO; 2 * crate::cpu::simd::MAX_LANES];
        // SAFETY: the caller promises n elements; the array has enough for all lanes.
        unsafe {
            std::ptr::copy_nonoverlapping(from, pairs.as_mut_ptr(), n);
            s.load(pairs.as_ptr().cast())
        }
    }

    #[inline(always)]
    unsafe fn load_step<E: Element>(s: S, first: *const E, second: *const E) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { E::load_pairs(s, first, second) }
    }

    #[inline(always)]
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32) {
        for i in (0..n).step_by(2 * S::LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                let (first, second) = two_vectors(s, from.add(i), n - i);
                s.store(to.add(i / 2), s.round_neighbours(first, second));
            }
        }
    }

    #[inline(always)]
    fn step(s: S, acc: S::V, a: S::V, b: S::V) -> S::V {
        s.dot_pairs(acc, a, b)
    }
}
