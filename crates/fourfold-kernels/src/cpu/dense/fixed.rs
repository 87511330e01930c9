//! Products in 16-bit integers, for CPUs whose integers multiply faster than their bf16 (Das et al. 2018, "Mixed Precision Training of
//! Convolutional Neural Networks using Integer Operations": dynamic fixed point).
//!
//! Both factors become integers of 12 bits and a sign, with a scale for each run of [`BLOCK`] terms of a sum: its largest magnitude
//! becomes [`LARGEST`]. `vpdpwssd` (AVX512-VNNI), or `vpmaddwd` and `vpaddd` (AVX2), multiply two of them a lane and add to a 32-bit integer,
//! which a block's terms cannot overflow; each block's sums are widened, scaled and added in f32, so that instruction sets come to the same
//! bits. A term is off by at most 2⁻¹³ of its block's largest on either side: for values that differ little in size that is more exact than
//! bf16, for a block with an outlier less.

use half::bf16;

use super::PANEL_ROWS;
use super::form::{Form, Matrices, two_vectors};
use super::panel::{RowProduct, pack};
use super::product::Fma;
use super::tile::{Operands, write_out};
use crate::cpu::simd::{Element, Kernel, MAX_LANES, Simd};

/// Terms of a sum that share a scale on either side.
pub const BLOCK: usize = 128;

/// Lanes of a block.
const STEPS: usize = BLOCK / 2;

/// What a block's largest magnitude becomes: `BLOCK · LARGEST²` is below 2³¹.
const LARGEST: f32 = 4095.0;

/// A block whose largest magnitude is below this is scaled as if it were this, so that its factor is finite.
const SMALLEST: f32 = 1e-30;

/// Lanes of a panel for sums of `terms`, and the scales that follow them, both by column.
pub fn panel_rows(terms: usize) -> usize {
    terms.div_ceil(2) + terms.div_ceil(BLOCK)
}

/// Pairs of integers with scales.
#[derive(Clone, Copy)]
pub struct Ints;

impl<S: Simd> Form<S> for Ints {
    const PER_LANE: usize = 2;

    fn rows(terms: usize) -> usize {
        panel_rows(terms)
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
        unsafe { quantize_steps(s, from, stride, rows, cols, to, to_row) }
    }

    #[inline(always)]
    unsafe fn lanes_of_row(s: S, from: *const f32, n: usize, to: *mut f32) -> f32 {
        debug_assert!(n <= BLOCK, "a scale for {n} terms");
        let mut largest = s.splat(0.0);
        for i in (0..n).step_by(S::LANES) {
            // SAFETY: the caller's promise.
            largest = s.largest_magnitudes(largest, unsafe { s.load_first(from.add(i), S::LANES.min(n - i)) });
        }
        let (factor, scale) = factor_and_scale(s.largest_bits(largest));
        let factor = s.splat(factor);
        for i in (0..n).step_by(2 * S::LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                let (first, second) = two_vectors(s, from.add(i), n - i);
                s.store(to.add(i / 2), s.int_neighbours(s.mul(first, factor), s.mul(second, factor)));
            }
        }
        scale
    }

    #[inline(always)]
    unsafe fn multiply(s: S, matrices: Matrices, rows: usize, cols: usize) {
        // SAFETY: the caller's promise.
        unsafe { product(s, matrices, rows, cols) }
    }
}

/// From a row and a column on.
#[inline(always)]
fn part(m: Matrices, row: usize, col: usize) -> Matrices {
    Matrices {
        lanes: m.lanes.at(row, col, 1),
        a_scales: m.a_scales.wrapping_add(row * m.a_scale_row),
        b_scales: m.b_scales.wrapping_add(col),
        ..m
    }
}

/// `c (+)= a · b`, tile by tile.
///
/// # Safety
/// As [`Form::multiply`].
#[inline(always)]
unsafe fn product<S: Simd>(s: S, matrices: Matrices, rows: usize, cols: usize) {
    struct Call {
        matrices: Matrices,
        rows: usize,
        cols: usize,
    }
    impl<S: Simd> Kernel<S> for Call {
        #[inline(always)]
        fn run(self, s: S) {
            let height = self.rows.div_ceil(self.rows.div_ceil(S::TILE_ROWS).max(1)).max(1);
            for col in (0..self.cols).step_by(2 * S::LANES) {
                for row in (0..self.rows).step_by(height) {
                    let part = part(self.matrices, row, col);
                    // SAFETY: a part of what `product`'s caller promises.
                    unsafe { of_height(s, part, height.min(self.rows - row), self.cols - col) };
                }
            }
        }
    }
    s.call(Call { matrices, rows, cols });
}

/// The tile of the right height and width, known to the compiler.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn of_height<S: Simd>(s: S, m: Matrices, height: usize, cols: usize) {
    macro_rules! heights {
        ($($h:literal)*) => {
            match height.min(S::TILE_ROWS) {
                // SAFETY: as the caller promises.
                $($h => if const { $h <= S::TILE_ROWS } { unsafe {
                    if cols > S::LANES {
                        tile::<S, $h, 2>(s, m, cols.min(2 * S::LANES));
                    } else {
                        tile::<S, $h, 1>(s, m, cols);
                    }
                } },)*
                _ => unreachable!("tiles have 1 to {} rows", S::TILE_ROWS),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
}

/// `ROWS` by `VECTORS · LANES` results.
///
/// # Safety
/// As [`product`], for `ROWS` and `cols ≤ VECTORS · LANES`, more than `(VECTORS − 1) · LANES`.
#[inline(always)]
unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(s: S, m: Matrices, cols: usize) {
    let o = m.lanes;
    // SAFETY: as the caller promises.
    unsafe {
        if o.steps <= STEPS {
            // Attention's products, mostly.
            let sums = block_sums::<S, ROWS, VECTORS>(s, m, 0, o.steps);
            write_out(s, sums, o.c, o.c_row, cols, o.accumulate);
            return;
        }
        for r in 0..ROWS {
            for v in 0..VECTORS {
                s.prefetch(o.c.wrapping_add(r * o.c_row + v * S::LANES));
            }
        }
        // Beside the registers of a block's loop, but near: rows of `c` often meet in one set of the first cache.
        let mut totals = [[s.splat(0.0); VECTORS]; ROWS];
        for block in 0..o.steps.div_ceil(STEPS) {
            let sums = block_sums::<S, ROWS, VECTORS>(s, m, block, STEPS.min(o.steps - block * STEPS));
            for (total, sum) in totals.iter_mut().zip(&sums) {
                for (total, &sum) in total.iter_mut().zip(sum) {
                    *total = s.add(*total, sum);
                }
            }
        }
        write_out(s, totals, o.c, o.c_row, cols, o.accumulate);
    }
}

/// A block's sums, made of integers in registers and scaled.
///
/// # Safety
/// As [`tile`]; the block has so many steps.
#[inline(always)]
unsafe fn block_sums<S: Simd, const ROWS: usize, const VECTORS: usize>(
    s: S,
    m: Matrices,
    block: usize,
    steps: usize,
) -> [[S::V; VECTORS]; ROWS] {
    let o = m.lanes;
    let mut a = o.a.wrapping_add(block * STEPS * o.a_step);
    let mut b = o.b.wrapping_add(block * STEPS * o.b_step);
    let mut acc = [[s.splat(0.0); VECTORS]; ROWS];
    for _ in 0..steps {
        let mut right = [s.splat(0.0); VECTORS];
        for (v, right) in right.iter_mut().enumerate() {
            // SAFETY: `b` is readable up to whole vectors.
            *right = unsafe { s.load(b.add(v * S::LANES)) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: row r of this step.
            let left = s.splat(unsafe { *a.add(r * o.a_row) });
            for (acc, &right) in acc.iter_mut().zip(&right) {
                *acc = s.dot_ints(*acc, left, right);
            }
        }
        a = a.wrapping_add(o.a_step);
        b = b.wrapping_add(o.b_step);
    }
    let (a_scales, b_scales) =
        (m.a_scales.wrapping_add(block * m.a_scale_block), m.b_scales.wrapping_add(block * o.b_step));
    let mut columns = [s.splat(0.0); VECTORS];
    for (v, columns) in columns.iter_mut().enumerate() {
        // SAFETY: columns have scales up to whole vectors.
        *columns = unsafe { s.load(b_scales.add(v * S::LANES)) };
    }
    for (r, acc) in acc.iter_mut().enumerate() {
        // SAFETY: each row has its scale.
        let row = s.splat(unsafe { *a_scales.add(r * m.a_scale_row) });
        for (acc, &column) in acc.iter_mut().zip(&columns) {
            *acc = s.mul(s.mul(s.of_ints(*acc), column), row);
        }
    }
    acc
}

/// The factor that makes a block's values integers, and the scale that makes them values again, from its largest magnitude. A NaN or an
/// infinity makes the scale NaN: every sum with it is one.
#[inline(always)]
fn factor_and_scale(largest: f32) -> (f32, f32) {
    let bounded = if largest > SMALLEST { largest } else { SMALLEST };
    (LARGEST / bounded, (bounded + 0.0 * largest) / LARGEST)
}

/// The same of each lane.
#[inline(always)]
fn factors_and_scales<S: Simd>(s: S, largest: S::V) -> (S::V, S::V) {
    let (most, bounded) = (s.splat(LARGEST), s.max(largest, s.splat(SMALLEST)));
    (s.div(most, bounded), s.div(s.add(bounded, s.mul(s.splat(0.0), largest)), most))
}

/// Brings a row into integers, with a scale for each block: those of columns beyond `from` are left as they are.
#[inline(always)]
pub fn quantize_row<S: Simd, E: Element>(s: S, from: &[E], to: &mut [bf16], scales: &mut [f32]) {
    assert!(to.len() >= from.len() && scales.len() >= from.len().div_ceil(BLOCK));
    for (block, scale) in scales.iter_mut().enumerate().take(from.len().div_ceil(BLOCK)) {
        let (first, count) = (block * BLOCK, BLOCK.min(from.len() - block * BLOCK));
        if count == BLOCK {
            // SAFETY: the block is inside both.
            *scale = unsafe { quantize_block(s, from.as_ptr().add(first), to.as_mut_ptr().add(first)) };
        } else {
            let (mut whole, mut ints) = ([E::default(); BLOCK], [bf16::ZERO; BLOCK]);
            whole[..count].copy_from_slice(&from[first..]);
            // SAFETY: both are a block.
            *scale = unsafe { quantize_block(s, whole.as_ptr(), ints.as_mut_ptr()) };
            to[first..from.len()].copy_from_slice(&ints[..count]);
        }
    }
}

/// Brings a block into integers: its scale.
///
/// # Safety
/// [`BLOCK`] elements are readable, and as many places writable.
#[inline(always)]
unsafe fn quantize_block<S: Simd, E: Element>(s: S, from: *const E, to: *mut bf16) -> f32 {
    /// Of the narrowest vectors.
    const VECTORS: usize = BLOCK / 8;
    const { assert!(S::LANES >= 8, "a block has at most 16 vectors") };
    let vectors = BLOCK / S::LANES;
    // Read once: a block's vectors stay in registers.
    let mut values = [s.splat(0.0); VECTORS];
    let mut largest = [s.splat(0.0); 2];
    for (i, value) in values.iter_mut().enumerate().take(vectors) {
        // SAFETY: the caller's promise.
        *value = unsafe { E::load(s, from.add(i * S::LANES)) };
        largest[i % 2] = s.largest_magnitudes(largest[i % 2], *value);
    }
    let (factor, scale) = factor_and_scale(s.largest_bits(s.largest_magnitudes(largest[0], largest[1])));
    let factor = s.splat(factor);
    for i in 0..vectors / 2 {
        let lanes = s.int_neighbours(s.mul(values[2 * i], factor), s.mul(values[2 * i + 1], factor));
        // SAFETY: the caller's promise; stores need no alignment.
        unsafe { s.store(to.add(2 * i * S::LANES).cast(), lanes) };
    }
    scale
}

/// Brings `rows` rows of `cols` elements, which are terms of a sum, into lanes `to[step][to_row]` of two rows each, with the columns'
/// scales after them, block by block. Columns up to whole vectors, and a missing second row, become zeros.
///
/// # Safety
/// Row r has `cols` readable elements at `from + r · stride`; `to` has [`panel_rows`] rows, whole vectors long.
#[inline(always)]
unsafe fn quantize_steps<S: Simd, E: Element>(
    s: S,
    from: *const E,
    stride: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_row: usize,
) {
    let scales = to.wrapping_add(rows.div_ceil(2) * to_row);
    // Rows far apart meet in one set of the first cache: they are read once and kept side by side.
    let mut near = [0.0f32; 2 * MAX_LANES * BLOCK];
    for (block, first) in (0..rows).step_by(BLOCK).enumerate() {
        let count = BLOCK.min(rows - first);
        for col in (0..cols).step_by(2 * S::LANES) {
            let vectors = (cols - col).div_ceil(S::LANES).min(2);
            // SAFETY: so many elements are left in each row; steps and scales have room for whole vectors, `near` for a block's.
            unsafe {
                let near = near.as_mut_ptr();
                let mut largest = [s.splat(0.0); 2];
                for row in 0..count {
                    for (v, largest) in largest.iter_mut().enumerate().take(vectors) {
                        let col = col + v * S::LANES;
                        let value = s.load_first(from.add((first + row) * stride + col), S::LANES.min(cols - col));
                        *largest = s.largest_magnitudes(*largest, value);
                        s.store(near.add((2 * row + v) * S::LANES), value);
                    }
                }
                if count % 2 == 1 {
                    s.store(near.add(2 * count * S::LANES), s.splat(0.0));
                    s.store(near.add((2 * count + 1) * S::LANES), s.splat(0.0));
                }
                for (v, &largest) in largest.iter().enumerate().take(vectors) {
                    let (factors, lane_scales) = factors_and_scales(s, largest);
                    let col = col + v * S::LANES;
                    s.store(scales.add(block * to_row + col), lane_scales);
                    for row in (0..count).step_by(2) {
                        let above = s.load(near.add((2 * row + v) * S::LANES).cast_const());
                        let below = s.load(near.add((2 * row + 2 + v) * S::LANES).cast_const());
                        let lanes = s.int_pairs(s.mul(above, factors), s.mul(below, factors));
                        s.store(to.add((first + row) / 2 * to_row + col), lanes);
                    }
                }
            }
        }
    }
}

/// A token's lanes and scales.
#[derive(Clone, Copy)]
pub struct TokenScales {
    /// Of the first token's first block.
    pub at: *const f32,
    /// From a token's to the next's.
    pub row: usize,
}

/// `y[t, r] (+)= Σ_c x[t, c] · w[r, c]` for a panel's rows of a weight: see `panel::panel_product`. `panel` has room for
/// [`panel_rows`] of [`PANEL_ROWS`].
///
/// # Safety
/// The pointers hold what [`RowProduct`] says of them, the tokens' lanes have scales, and nobody else writes these parts of `y`.
#[inline(always)]
pub unsafe fn panel_product<S: Simd>(s: S, p: RowProduct<bf16>, x_scales: TokenScales, panel: &mut [f32]) {
    /// Elements of a row that are brought in at a time.
    const COLUMNS: usize = 2 * super::panel::PANEL_STEPS;
    assert!(p.rows <= PANEL_ROWS && panel.len() >= PANEL_ROWS * panel_rows(p.cols.min(COLUMNS)));
    let mut near = [0.0f32; PANEL_ROWS * STEPS];
    for start in (0..p.cols).step_by(COLUMNS) {
        let cols = COLUMNS.min(p.cols - start);
        let steps = cols.div_ceil(2);
        let (lanes, scales) = panel.split_at_mut(PANEL_ROWS * steps);
        for (block, first) in (0..cols).step_by(BLOCK).enumerate() {
            let count = BLOCK.min(cols - first);
            let scales = &mut scales[block * PANEL_ROWS..(block + 1) * PANEL_ROWS];
            scales[p.rows..].fill(0.0);
            let ints: &mut [bf16] = bytemuck::cast_slice_mut(&mut near);
            // SAFETY: the rows are the caller's promise; the panel holds the block's steps.
            unsafe {
                for (r, (ints, scale)) in ints.chunks_exact_mut(BLOCK).zip(&mut *scales).take(p.rows).enumerate() {
                    let at = p.weights.add(r * p.cols + start + first);
                    s.prefetch(at.wrapping_add(2 * BLOCK));
                    s.prefetch(at.wrapping_add(2 * BLOCK + BLOCK / 2));
                    let row = std::slice::from_raw_parts(at, count);
                    quantize_row(s, row, ints, std::slice::from_mut(scale));
                    // The last lane's second half.
                    ints[count..].iter_mut().take(1).for_each(|beyond| *beyond = bf16::ZERO);
                }
                let to = lanes[first / 2 * PANEL_ROWS..].as_mut_ptr();
                let steps = count.div_ceil(2);
                pack::<S, Fma<f32>>(s, near.as_ptr(), STEPS, p.rows, steps, steps, to);
            }
        }
        let matrices = Matrices {
            lanes: Operands {
                a: p.x.wrapping_add(start / 2),
                a_row: p.x_row,
                a_step: 1,
                b: lanes.as_ptr(),
                b_step: PANEL_ROWS,
                c: p.y,
                c_row: p.y_row,
                steps,
                accumulate: p.accumulate || start > 0,
            },
            a_scales: x_scales.at.wrapping_add(start / BLOCK),
            a_scale_row: x_scales.row,
            a_scale_block: 1,
            b_scales: scales.as_ptr(),
        };
        // SAFETY: the panel's lanes and scales have just been written, the tokens' are the caller's promise.
        unsafe { product(s, matrices, p.tokens, p.rows) };
    }
}
