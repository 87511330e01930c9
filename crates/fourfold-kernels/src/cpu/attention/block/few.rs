//! Few query rows, as in decoding: dot products of keys as they lie, softmax over lanes that are positions.

use std::ops::Range;

use super::{Block, KEYS, State, padded};
use crate::cpu::simd::{Element, MAX_LANES, Simd, softmax_exp};

/// `scores[row][p] = query[row] · key[p]`, −∞ beyond the positions. Meanwhile the values come into the cache.
#[inline(always)]
pub fn score<S: Simd, E: Element>(
    s: S,
    block: &Block,
    keys: &[E],
    values: &[E],
    positions: &Range<usize>,
    state: &mut State,
) {
    let (count, key_dim) = (positions.len(), block.spec.key_dim);
    for p in positions.clone() {
        let first = values.as_ptr().wrapping_add(p * block.value_width + block.value_column());
        for byte in (0..block.spec.value_dim * size_of::<E>()).step_by(64) {
            s.prefetch(first.wrapping_byte_add(byte));
        }
    }
    let keys = &keys[positions.start * block.key_width + block.kv_head() * key_dim..];
    assert!(keys.len() >= (count - 1) * block.key_width + key_dim);
    let mut row = 0;
    while row < block.rows() {
        let rows = (block.rows() - row).min(4);
        let part = Rows {
            queries: &state.queries[row * padded(key_dim)..(row + rows) * padded(key_dim)],
            key_dim,
            key_width: block.key_width,
            count,
        };
        let scores = &mut state.scores_t[row * KEYS..(row + rows) * KEYS];
        match rows {
            1 => score_rows::<S, E, 1>(s, &part, keys, scores),
            2 => score_rows::<S, E, 2>(s, &part, keys, scores),
            3 => score_rows::<S, E, 3>(s, &part, keys, scores),
            _ => score_rows::<S, E, 4>(s, &part, keys, scores),
        }
        row += rows;
    }
    for scores in state.scores_t.chunks_exact_mut(KEYS).take(block.rows()) {
        scores[count..].fill(f32::NEG_INFINITY);
    }
}

/// Some query rows and what they are multiplied with.
struct Rows<'a> {
    /// `[rows][padded key_dim]`.
    queries: &'a [f32],
    key_dim: usize,
    key_width: usize,
    /// Positions.
    count: usize,
}

/// Four positions at a time: their sums are made together.
#[inline(always)]
fn score_rows<S: Simd, E: Element, const ROWS: usize>(s: S, part: &Rows, keys: &[E], scores: &mut [f32]) {
    let (key_dim, stride) = (part.key_dim, padded(part.key_dim));
    let whole = key_dim / S::LANES * S::LANES;
    assert!(part.queries.len() >= ROWS * stride && scores.len() >= ROWS * KEYS && part.count <= KEYS);
    for p in (0..part.count).step_by(4) {
        let mut acc = [[s.splat(0.0); 4]; ROWS];
        // The last positions may be fewer than four: the last one stands in.
        let starts: [usize; 4] = std::array::from_fn(|i| (p + i).min(part.count - 1) * part.key_width);
        for d in (0..key_dim).step_by(S::LANES) {
            let mut four = [s.splat(0.0); 4];
            for (key, &start) in four.iter_mut().zip(&starts) {
                // SAFETY: the caller has checked that the keys hold `count` rows.
                *key = unsafe {
                    let from = keys.as_ptr().add(start + d);
                    if d < whole { E::load(s, from) } else { s.load_first(from, key_dim - whole) }
                };
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: queries are padded to whole vectors.
                let query = unsafe { s.load(part.queries.as_ptr().add(r * stride + d)) };
                for (acc, &key) in acc.iter_mut().zip(&four) {
                    *acc = s.mul_add(query, key, *acc);
                }
            }
        }
        for (r, &acc) in acc.iter().enumerate() {
            let sums = s.four_sums(acc);
            // All four: KEYS is a multiple of four, and what is beyond the positions is overwritten later.
            scores[r * KEYS + p..r * KEYS + p + 4].copy_from_slice(&sums);
        }
    }
}

/// Exponentials of the scores, relative to each row's largest score so far.
#[inline(always)]
pub fn soften<S: Simd>(s: S, block: &Block, count: usize, state: &mut State) {
    let rows = block.rows();
    let before: [f32; MAX_LANES] = std::array::from_fn(|r| state.largest[r]);
    let vectors = count.div_ceil(S::LANES);
    for (r, scores) in state.scores_t.chunks_exact(KEYS).enumerate().take(rows) {
        let mut most = s.splat(state.largest[r]);
        for v in 0..vectors {
            // SAFETY: KEYS is a multiple of LANES; what lies beyond the positions is −∞.
            most = s.max(most, unsafe { s.load(scores.as_ptr().add(v * S::LANES)) });
        }
        state.largest[r] = s.largest(most);
    }
    for lane in (0..MAX_LANES).step_by(S::LANES) {
        // SAFETY: rows are padded to MAX_LANES.
        unsafe {
            let change = s.sub(s.load(before.as_ptr().add(lane)), s.load(state.largest.as_ptr().add(lane)));
            s.store(state.factors.as_mut_ptr().add(lane), softmax_exp(s, change));
        }
    }
    for (r, scores) in state.scores_t.chunks_exact_mut(KEYS).enumerate().take(rows) {
        let largest = s.splat(state.largest[r]);
        let mut total = s.splat(0.0);
        for v in 0..vectors {
            // SAFETY: as above.
            unsafe {
                let at = scores.as_mut_ptr().add(v * S::LANES);
                let e = softmax_exp(s, s.sub(s.load(at), largest));
                total = s.add(total, e);
                s.store(at, e);
            }
        }
        state.totals[r] = state.totals[r] * state.factors[r] + s.sum(total);
    }
}
