//! The register tile: the inner loop of every matrix product here.

use super::product::Product;
use crate::cpu::simd::{Kernel, MAX_LANES, Simd};

/// From so many steps on a tile asks for its results' memory before it sums: fewer steps are over before it has come, and belong to
/// attention, whose results are near.
const PREFETCH_STEPS: usize = 64;

/// `c[m, n] = Σ_k a[m, k] · b[k, n]` by pointers. `b`'s rows are contiguous; `a` has any strides.
#[derive(Clone, Copy)]
pub struct Operands<W> {
    /// Lanes of `a`.
    pub a: *const f32,
    /// Lanes from a row of `a` to the next.
    pub a_row: usize,
    /// Lanes from a step (column of `a`) to the next.
    pub a_step: usize,
    /// Elements of `b`.
    pub b: *const W,
    /// Elements from a step (row of `b`) to the next.
    pub b_step: usize,
    /// `c`.
    pub c: *mut f32,
    /// Elements from a row of `c` to the next.
    pub c_row: usize,
    /// Steps to sum over, in lanes.
    pub steps: usize,
    /// Whether to add to what is in `c`.
    pub accumulate: bool,
}

impl Operands<f32> {
    /// The same with `b`, lanes so far, as the elements of a product: `b_step` counts lanes before and elements after.
    #[inline(always)]
    pub fn lanes<S: Simd, P: Product<S>>(self) -> Operands<P::W> {
        let Self { a, a_row, a_step, b, b_step, c, c_row, steps, accumulate } = self;
        Operands { a, a_row, a_step, b: b.cast(), b_step: b_step * P::PER_LANE, c, c_row, steps, accumulate }
    }
}

impl<W> Operands<W> {
    /// From row `row` and column `col` (of `c`) on; a column of `b` has `per_lane` elements.
    #[inline(always)]
    pub fn at(self, row: usize, col: usize, per_lane: usize) -> Self {
        // `wrapping_add`: computing an address is no access; the accesses are the caller's promise.
        Self {
            a: self.a.wrapping_add(row * self.a_row),
            b: self.b.wrapping_add(col * per_lane),
            c: self.c.wrapping_add(row * self.c_row + col),
            ..self
        }
    }
}

/// A product of any size, as a function of its own: its tiles are many, and callers share them.
///
/// # Safety
/// As [`product_with`].
#[inline(always)]
pub unsafe fn product<S: Simd, P: Product<S>>(s: S, operands: Operands<P::W>, rows: usize, cols: usize) {
    struct Call<S: Simd, P: Product<S>> {
        operands: Operands<P::W>,
        rows: usize,
        cols: usize,
    }
    impl<S: Simd, P: Product<S>> Kernel<S> for Call<S, P> {
        #[inline(always)]
        fn run(self, s: S) {
            // SAFETY: the promise made to `product`, which alone makes a `Call`.
            unsafe { product_with::<S, P>(s, self.operands, self.rows, self.cols) }
        }
    }
    s.call(Call::<S, P> { operands, rows, cols });
}

/// A product of any size, tile by tile. Where `cols` is no multiple of the lanes, `b` must be readable up to one.
///
/// # Safety
/// `a` holds `rows` by `steps` lanes, `b` `steps` rows of `cols` lanes rounded up to whole vectors, `c` `rows` by `cols` elements,
/// at the strides given; nobody else writes `c`.
#[inline(always)]
unsafe fn product_with<S: Simd, P: Product<S>>(s: S, o: Operands<P::W>, rows: usize, cols: usize) {
    if rows == 0 {
        return;
    }
    // Tiles of equal height: a low last tile would leave the multipliers idle.
    let height = rows.div_ceil(rows.div_ceil(S::TILE_ROWS));
    let width = 2 * S::LANES;
    let mut col = 0;
    // Few rows are wide tiles, so that enough sums run side by side.
    while rows <= 4 && S::LANES == 16 && col + 4 * S::LANES <= cols {
        let o = o.at(0, col, P::PER_LANE);
        // SAFETY: a part of what the caller promises.
        unsafe {
            match rows {
                1 => tile::<S, P, 1, 4>(s, o, 4 * S::LANES),
                2 => tile::<S, P, 2, 4>(s, o, 4 * S::LANES),
                3 => tile::<S, P, 3, 4>(s, o, 4 * S::LANES),
                _ => tile::<S, P, 4, 4>(s, o, 4 * S::LANES),
            }
        }
        col += 4 * S::LANES;
    }
    while col < cols {
        let wide = cols - col > S::LANES;
        let mut row = 0;
        while row < rows {
            let o = o.at(row, col, P::PER_LANE);
            let cols = cols - col;
            // SAFETY: a part of what the caller promises.
            unsafe {
                if wide {
                    of_height::<S, P, 2>(s, o, height.min(rows - row), cols.min(width));
                } else {
                    of_height::<S, P, 1>(s, o, height.min(rows - row), cols);
                }
            }
            row += height;
        }
        col += width;
    }
}

/// The tile of the right height, known to the compiler.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn of_height<S: Simd, P: Product<S>, const VECTORS: usize>(s: S, o: Operands<P::W>, height: usize, cols: usize) {
    macro_rules! heights {
        ($($h:literal)*) => {
            match height.min(S::TILE_ROWS) {
                // Heights above this instruction set's are not even compiled.
                // SAFETY: as the caller promises.
                $($h => if const { $h <= S::TILE_ROWS } { unsafe { tile::<S, P, $h, VECTORS>(s, o, cols) } },)*
                _ => unreachable!("tiles have 1 to {} rows", S::TILE_ROWS),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
}

/// `ROWS` by `VECTORS · LANES` results in registers.
///
/// # Safety
/// As [`product`], for `ROWS` and `cols ≤ VECTORS · LANES`, more than `(VECTORS − 1) · LANES`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub unsafe fn tile<S: Simd, P: Product<S>, const ROWS: usize, const VECTORS: usize>(
    s: S,
    o: Operands<P::W>,
    cols: usize,
) {
    if o.steps >= PREFETCH_STEPS {
        // Where `c` is far away, as a large gradient is, it comes while the sums are made.
        for r in 0..ROWS {
            let row = o.c.wrapping_add(r * o.c_row);
            for v in 0..VECTORS {
                s.prefetch(row.wrapping_add(v * S::LANES));
            }
            s.prefetch(row.wrapping_add(VECTORS * S::LANES - 1));
        }
    }
    let mut acc = [[s.splat(0.0); VECTORS]; ROWS];
    let (mut a, mut b) = (o.a, o.b);
    for _ in 0..o.steps {
        let mut right = [s.splat(0.0); VECTORS];
        for (v, right) in right.iter_mut().enumerate() {
            // SAFETY: `b` is readable up to whole vectors.
            *right = unsafe { P::load(s, b.add(v * S::LANES * P::PER_LANE)) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: row r of this step.
            let left = s.splat(unsafe { *a.add(r * o.a_row) });
            for (acc, &right) in acc.iter_mut().zip(&right) {
                *acc = P::step(s, *acc, left, right);
            }
        }
        a = a.wrapping_add(o.a_step);
        b = b.wrapping_add(o.b_step);
    }
    // SAFETY: as the caller promises.
    unsafe { write_out(s, acc, o.c, o.c_row, cols, o.accumulate) };
}

/// Writes a tile's sums, or adds them to what is there.
///
/// # Safety
/// `cols` columns of `ROWS` rows, `c_row` apart, are writable at `c`; `cols` as for [`tile`].
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub unsafe fn write_out<S: Simd, const ROWS: usize, const VECTORS: usize>(
    s: S,
    acc: [[S::V; VECTORS]; ROWS],
    c: *mut f32,
    c_row: usize,
    cols: usize,
    accumulate: bool,
) {
    let whole = cols == VECTORS * S::LANES;
    // Each way out names the sums by constants alone, so that they never leave their registers.
    let to = |r: usize, v: usize| c.wrapping_add(r * c_row + v * S::LANES);
    if !whole {
        let mut sums = [[[0.0f32; MAX_LANES]; VECTORS]; ROWS];
        for (sums, acc) in sums.iter_mut().zip(&acc) {
            for (sums, &acc) in sums.iter_mut().zip(acc) {
                // SAFETY: the array has LANES elements or more.
                unsafe { s.store(sums.as_mut_ptr(), acc) };
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sums) in sums.iter().enumerate() {
                for (i, &sum) in sums.iter().enumerate().take(S::LANES.min(cols - v * S::LANES)) {
                    // SAFETY: `cols` columns of row r are `c`'s.
                    unsafe {
                        let to = to(r, v).add(i);
                        *to = if accumulate { *to + sum } else { sum };
                    }
                }
            }
        }
    } else if accumulate {
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                // SAFETY: row r has all vectors.
                unsafe { s.store(to(r, v), s.add(s.load(to(r, v).cast_const()), acc)) };
            }
        }
    } else {
        // By number: of iterators over registers that are only stored, the compiler makes a copy in memory first.
        for r in 0..ROWS {
            for v in 0..VECTORS {
                // SAFETY: row r has all vectors.
                unsafe { s.store(to(r, v), acc[r][v]) };
            }
        }
    }
}
