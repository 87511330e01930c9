//! One block of queries against a run of positions.

mod few;

use std::ops::Range;

use crate::cpu::Isa;
use crate::cpu::dense::{Fma, Operands, product};
use crate::cpu::scratch::with_attention;
use crate::cpu::simd::{Element, MAX_LANES, Simd, for_isa, softmax_exp};
use crate::{AttentionSpec, Tensor};

/// Positions of a key block.
pub const KEYS: usize = 64;

/// Up to this many query rows, scores are dot products of rows as they lie, and lanes are positions (see `few`); above, keys are
/// broadcast to lanes that are queries.
const DOT_ROWS: usize = 8;

/// A score below all scores, of which no difference overflows.
pub const LOWEST: f32 = -1e30;

/// Queries and what they see.
pub struct Block<'a> {
    /// All queries.
    pub q: &'a Tensor,
    /// The attention.
    pub spec: AttentionSpec,
    /// Tokens of this block.
    pub tokens: Range<usize>,
    /// Query heads of this block, which share a key head.
    pub heads: Range<usize>,
    /// Positions to go over.
    pub positions: Range<usize>,
    /// Elements of a cached row of keys.
    pub key_width: usize,
    /// Elements of a cached row of values.
    pub value_width: usize,
}

/// What a block writes for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// The weighted mean of the values.
    Final,
    /// The weighted sum of the values, then the largest score and the sum of the exponentials relative to it.
    Partial,
}

/// Where a block writes: strides in elements.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first token's first head.
    pub first: *mut f32,
    /// From a token to the next.
    pub token: usize,
    /// From a head to the next.
    pub head: usize,
}

/// Computes a block and writes its rows to `to`, which nobody else writes.
pub fn run<E: Element>(isa: Isa, block: &Block, keys: &[E], values: &[E], scores: Scores, to: Target) {
    let sizes = block.scratch_sizes();
    with_attention(sizes.iter().sum(), |scratch| {
        let mut rest = scratch;
        let mut take = |len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        };
        let [queries, key_block, value_block, scores_t, sums, largest, totals, factors] = sizes.map(&mut take);
        let mut state = State { queries, key_block, value_block, scores_t, sums, largest, totals, factors };
        block.load_queries(&mut state);
        state.sums.fill(0.0);
        state.totals.fill(0.0);
        state.largest.fill(LOWEST);
        go_over_keys(isa, block, keys, values, &mut state);
        block.write(&state, scores, to);
    });
}

for_isa! {
    fn go_over_keys<E: Element>(block: &Block, keys: &[E], values: &[E], state: &mut State) = go_over_keys_with
}

#[inline(always)]
fn go_over_keys_with<S: Simd, E: Element>(s: S, block: &Block, keys: &[E], values: &[E], state: &mut State) {
    let mut start = block.positions.start;
    while start < block.positions.end {
        let positions = start..(start + KEYS).min(block.positions.end);
        start = positions.end;
        if block.by_dots() {
            few::score(s, block, keys, values, &positions, state);
            block.mask(&positions, state.scores_t, 1, KEYS);
            few::soften(s, block, positions.len(), state);
        } else {
            score(s, block, keys, &positions, state);
            block.mask(&positions, state.scores_t, padded(block.rows()), 1);
            soften(s, block, positions.len(), state);
        }
        add_values(s, block, values, &positions, state);
    }
}

/// The working memory's parts.
struct State<'a> {
    /// Scaled queries: `[key_dim][padded rows]`, or `[rows][padded key_dim]` for dot products.
    queries: &'a mut [f32],
    /// Keys as f32, `[positions][key stride]`.
    key_block: &'a mut [f32],
    /// Values as f32, `[positions][padded value_dim]`, where their rows are no whole vectors.
    value_block: &'a mut [f32],
    /// Scores, then their exponentials: `[positions][padded rows]`; for dot products `[rows][KEYS]`.
    scores_t: &'a mut [f32],
    /// Weighted sums of values, `[rows][padded value_dim]`.
    sums: &'a mut [f32],
    /// Largest score so far, for each row.
    largest: &'a mut [f32],
    /// Sum of exponentials relative to it.
    totals: &'a mut [f32],
    /// What the sums so far are multiplied with, now that `largest` has grown.
    factors: &'a mut [f32],
}

/// Rounded up to whole vectors of any instruction set.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

impl Block<'_> {
    fn rows(&self) -> usize {
        self.tokens.len() * self.heads.len()
    }

    fn by_dots(&self) -> bool {
        self.rows() <= DOT_ROWS
    }

    /// Floats from a key to the next in `key_block`: no multiple of a page, so that a column's elements lie in many sets of the
    /// cache.
    fn key_stride(&self) -> usize {
        padded(self.spec.key_dim) + MAX_LANES
    }

    fn scratch_sizes(&self) -> [usize; 8] {
        let (rows, key_dim, value_dim) = (padded(self.rows()), self.spec.key_dim, self.spec.value_dim);
        let key_block = if self.by_dots() { 0 } else { KEYS * self.key_stride() };
        let value_block = if value_dim.is_multiple_of(MAX_LANES) { 0 } else { KEYS * padded(value_dim) };
        [rows * padded(key_dim), key_block, value_block, KEYS * rows, rows * padded(value_dim), rows, rows, rows]
    }

    /// The key head that all heads of the block read.
    fn kv_head(&self) -> usize {
        self.heads.start * self.spec.kv_heads / self.spec.heads
    }

    /// Where the block's values lie in a cached row. A cache of values holds heads of value_dim elements; the cache of keys (values
    /// being their beginnings) of key_dim.
    fn value_column(&self) -> usize {
        let AttentionSpec { kv_heads, key_dim, value_dim, .. } = self.spec;
        self.kv_head() * if self.value_width == kv_heads * value_dim { value_dim } else { key_dim }
    }

    fn load_queries(&self, state: &mut State) {
        let (rows, key_dim) = (padded(self.rows()), self.spec.key_dim);
        state.queries.fill(0.0);
        for (t, token) in self.tokens.clone().enumerate() {
            for (h, head) in self.heads.clone().enumerate() {
                let r = t * self.heads.len() + h;
                let query = &self.q.row(token)[head * key_dim..(head + 1) * key_dim];
                if self.by_dots() {
                    let to = &mut state.queries[r * padded(key_dim)..];
                    to.iter_mut().zip(query).for_each(|(to, q)| *to = q * self.spec.scale);
                } else {
                    let to = state.queries[r..].iter_mut().step_by(rows);
                    to.zip(query).for_each(|(to, q)| *to = q * self.spec.scale);
                }
            }
        }
    }

    /// Sets the scores that a query must not see to −∞; a position's and a row's scores are so many elements apart. Rows are
    /// ordered by token, so these are the first rows (tokens before the position) and the last ones (tokens that have the
    /// position behind their window).
    pub fn mask(&self, positions: &Range<usize>, scores: &mut [f32], position_stride: usize, row_stride: usize) {
        let first = self.spec.first_position + self.tokens.start;
        let last = self.spec.first_position + self.tokens.end - 1;
        let window = self.spec.window.unwrap_or(usize::MAX);
        if positions.end <= first + 1 && last < positions.start.saturating_add(window) {
            return;
        }
        let tokens_before = |position: usize| position.saturating_sub(first).min(self.tokens.len());
        for (i, p) in positions.clone().enumerate() {
            let too_early = tokens_before(p) * self.heads.len();
            let still_seen = tokens_before(p.saturating_add(window)) * self.heads.len();
            let at = i * position_stride;
            if row_stride == 1 {
                scores[at..at + too_early].fill(f32::NEG_INFINITY);
                scores[at + still_seen..at + self.rows()].fill(f32::NEG_INFINITY);
            } else {
                for r in (0..too_early).chain(still_seen..self.rows()) {
                    scores[at + r * row_stride] = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn write(&self, state: &State, scores: Scores, to: Target) {
        let value_dim = self.spec.value_dim;
        for t in 0..self.tokens.len() {
            for h in 0..self.heads.len() {
                let r = t * self.heads.len() + h;
                let sums = &state.sums[r * padded(value_dim)..][..value_dim];
                // SAFETY: the target has room for each row, which nobody else writes.
                unsafe {
                    let to = to.first.add(t * to.token + h * to.head);
                    let factor = match scores {
                        Scores::Final => 1.0 / state.totals[r],
                        Scores::Partial => {
                            *to.add(value_dim) = state.largest[r];
                            *to.add(value_dim + 1) = state.totals[r];
                            1.0
                        }
                    };
                    for (i, sum) in sums.iter().enumerate() {
                        *to.add(i) = sum * factor;
                    }
                }
            }
        }
    }
}

/// `scores_t[p][row] = key[p] · query[row]`.
#[inline(always)]
fn score<S: Simd, E: Element>(s: S, block: &Block, keys: &[E], positions: &Range<usize>, state: &mut State) {
    let key_dim = block.spec.key_dim;
    let column = block.kv_head() * key_dim;
    let rows = padded(block.rows());
    let keys = &keys[positions.start * block.key_width + column..];
    assert!(keys.len() >= (positions.len() - 1) * block.key_width + key_dim);
    widen(s, keys, block.key_width, key_dim, state.key_block, block.key_stride(), positions.len());
    let operands = Operands {
        a: state.key_block.as_ptr(),
        a_row: block.key_stride(),
        a_step: 1,
        b: state.queries.as_ptr(),
        b_step: rows,
        c: state.scores_t.as_mut_ptr(),
        c_row: rows,
        steps: key_dim,
        accumulate: false,
    };
    // SAFETY: the parts of the working memory have these sizes; rows are padded to whole vectors.
    unsafe { product::<S, Fma<f32>>(s, operands, positions.len(), rows) }
}

/// Exponentials of the scores, relative to each row's largest score so far.
#[inline(always)]
fn soften<S: Simd>(s: S, block: &Block, positions: usize, state: &mut State) {
    let State { scores_t, largest, totals, factors, .. } = state;
    soften_rows(s, scores_t, padded(block.rows()), positions, Softmax { largest, totals, factors });
}

/// The running softmax of some rows.
pub struct Softmax<'a> {
    /// Largest score so far.
    pub largest: &'a mut [f32],
    /// Sum of exponentials relative to it.
    pub totals: &'a mut [f32],
    /// What sums so far are to be multiplied with, now that the largest has grown.
    pub factors: &'a mut [f32],
}

/// Scores `[positions][rows]` become exponentials relative to each row's largest score so far; `rows` are whole vectors.
#[inline(always)]
pub fn soften_rows<S: Simd>(s: S, scores: &mut [f32], rows: usize, positions: usize, softmax: Softmax) {
    let Softmax { largest: largest_of, totals, factors } = softmax;
    assert!(rows.is_multiple_of(MAX_LANES) && scores.len() >= positions * rows);
    assert!(largest_of.len() >= rows && totals.len() >= rows && factors.len() >= rows);
    for lane in (0..rows).step_by(S::LANES) {
        // SAFETY: as asserted.
        unsafe {
            let scores = scores.as_mut_ptr().add(lane);
            let before = s.load(largest_of.as_ptr().add(lane));
            let mut largest = before;
            for p in 0..positions {
                largest = s.max(largest, s.load(scores.add(p * rows)));
            }
            let factor = softmax_exp(s, s.sub(before, largest));
            let mut total = s.mul(s.load(totals.as_ptr().add(lane)), factor);
            for p in 0..positions {
                let e = softmax_exp(s, s.sub(s.load(scores.add(p * rows)), largest));
                total = s.add(total, e);
                s.store(scores.add(p * rows), e);
            }
            s.store(largest_of.as_mut_ptr().add(lane), largest);
            s.store(totals.as_mut_ptr().add(lane), total);
            s.store(factors.as_mut_ptr().add(lane), factor);
        }
    }
}

/// `sums[row] = sums[row] · factor[row] + Σ_p exponential[p][row] · value[p]`.
#[inline(always)]
fn add_values<S: Simd, E: Element>(s: S, block: &Block, values: &[E], positions: &Range<usize>, state: &mut State) {
    let value_dim = block.spec.value_dim;
    let stride = padded(value_dim);
    scale_rows(state.sums, stride, &state.factors[..block.rows()]);
    let values = &values[positions.start * block.value_width + block.value_column()..];
    assert!(values.len() >= (positions.len() - 1) * block.value_width + value_dim);
    let (a, c) = (state.scores_t.as_ptr(), state.sums.as_mut_ptr());
    let (a_row, a_step) = if block.by_dots() { (KEYS, 1) } else { (1, padded(block.rows())) };
    let (c_row, steps, accumulate) = (stride, positions.len(), true);
    // SAFETY: scores and sums have these sizes. Values are read in whole vectors: they are whole vectors as they lie, or are
    // copied to where they are padded.
    unsafe {
        if value_dim.is_multiple_of(S::LANES) {
            let (b, b_step) = (values.as_ptr(), block.value_width);
            let operands = Operands { a, a_row, a_step, b, b_step, c, c_row, steps, accumulate };
            product::<S, Fma<E>>(s, operands, block.rows(), value_dim);
        } else {
            widen(s, values, block.value_width, value_dim, state.value_block, stride, positions.len());
            let (b, b_step) = (state.value_block.as_ptr(), stride);
            let operands = Operands { a, a_row, a_step, b, b_step, c, c_row, steps, accumulate };
            product::<S, Fma<f32>>(s, operands, block.rows(), value_dim);
        }
    }
}

/// Multiplies each row of `stride` elements with its factor.
#[inline(always)]
pub fn scale_rows(rows: &mut [f32], stride: usize, factors: &[f32]) {
    for (row, &factor) in rows.chunks_exact_mut(stride).zip(factors) {
        if factor != 1.0 {
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

/// Copies `count` rows of `len` elements as f32.
#[inline(always)]
fn widen<S: Simd, E: Element>(
    s: S,
    from: &[E],
    from_row: usize,
    len: usize,
    to: &mut [f32],
    to_row: usize,
    count: usize,
) {
    assert!(
        count > 0 && from.len() >= (count - 1) * from_row + len && to.len() >= count * to_row && padded(len) <= to_row
    );
    for i in 0..count {
        // SAFETY: as asserted; a row of `to` has room for whole vectors.
        unsafe {
            let (from, to) = (from.as_ptr().add(i * from_row), to.as_mut_ptr().add(i * to_row));
            let mut c = 0;
            while c < len {
                let v = if c + S::LANES <= len { E::load(s, from.add(c)) } else { s.load_first(from.add(c), len - c) };
                s.store(to.add(c), v);
                c += S::LANES;
            }
        }
    }
}
