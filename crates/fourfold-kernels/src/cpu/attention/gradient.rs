//! Self-attention inside documents, backward (FlashAttention-2, Dao 2023, section 3.1.2).
//!
//! With probabilities P, computed anew from the kept logarithms, and D_t = dy_t · y_t,
//! `dS = P (dy · vᵀ − D)`, `dq = scale · dS · k`, `dk = scale · dSᵀ · q`, `dv = Pᵀ · dy`. A work item is a document's key head:
//! all it adds to is its own.

use std::ops::Range;

use super::QUERY_ROWS;
use super::block::{Block, KEYS, padded};
use super::forms::{Scratch, in_pairs, lane_count, lanes, room, steps, transpose};
use super::training::{block_of, block_tokens, check, head_blocks};
use crate::backward::{AttentionGradient, AttentionOutput, SelfAttention};
use crate::cpu::dense::{Fma, Lanes, Operands, Pairs, Product, product};
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_attention;
use crate::cpu::simd::{Simd, dot, for_isa, for_pairs, softmax_exp};
use crate::cpu::unwritten::Unwritten;
use crate::{AttentionSpec, Tensor};

/// The gradients of queries, keys and values.
pub fn attention_backward(
    context: Context,
    inputs: [&Tensor; 3],
    output: &AttentionOutput,
    dy: &Tensor,
    spec: &SelfAttention,
) -> AttentionGradient {
    let [q, k, v] = inputs;
    check(q, k, v, spec);
    assert_eq!((dy.rows(), dy.cols()), (output.y.rows(), output.y.cols()), "a gradient of another shape");
    let pairs = in_pairs(context, spec.key_dim, spec.value_dim);
    let (keys, values) = (lanes(context, pairs, k), lanes(context, pairs, v));
    let [mut dq, mut dk, mut dv] = inputs.map(|x| Unwritten::new(x.rows() * x.cols()));
    let gradients = [dq.target(), dk.target(), dv.target()];
    let items = spec.documents.len() * spec.kv_heads;
    context.pool.for_ranges(items, 1, |items| {
        for item in items {
            let (document, kv_head) = (&spec.documents[item / spec.kv_heads], item % spec.kv_heads);
            let part = Part { q, k, keys: &keys, values: &values, output, dy, spec, document, kv_head, gradients };
            with_attention(part.room(), |scratch| {
                if pairs {
                    backward_pairs(&part, scratch);
                } else {
                    backward_floats(context.isa, &part, scratch);
                }
            });
        }
    });
    // SAFETY: the items are all key heads and, with them, query heads, for all tokens.
    let tensor = |x: &Tensor, t: Unwritten<f32>| Tensor::new(x.rows(), x.cols(), unsafe { t.written() });
    AttentionGradient { dq: tensor(q, dq), dk: tensor(k, dk), dv: tensor(v, dv) }
}

/// A key head of a document.
struct Part<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    keys: &'a Lanes,
    values: &'a Lanes,
    output: &'a AttentionOutput,
    dy: &'a Tensor,
    spec: &'a SelfAttention<'a>,
    document: &'a Range<usize>,
    kv_head: usize,
    /// Of q, k, v.
    gradients: [SendPtr<f32>; 3],
}

impl Part<'_> {
    /// Floats of the working memory.
    fn room(&self) -> usize {
        let (key_dim, value_dim) = (self.spec.key_dim, self.spec.value_dim);
        let rows = 5 * room(QUERY_ROWS, key_dim) + 4 * room(QUERY_ROWS, value_dim) + 2 * QUERY_ROWS;
        rows + 5 * room(KEYS, QUERY_ROWS) + room(KEYS, key_dim)
    }
}

/// The working memory.
struct State<'a> {
    /// Scaled queries, in the forms that products read.
    queries: Rows<'a>,
    /// `dy`.
    dy: Rows<'a>,
    /// A block's keys, as steps of a sum over positions.
    keys: &'a mut [f32],
    /// Scores, then probabilities, `[positions][rows]`; and as lanes along the rows.
    probabilities: [&'a mut [f32]; 2],
    /// Gradients of the probabilities, then of the scores; as lanes along the rows; as steps of a sum over positions.
    d_scores: [&'a mut [f32]; 3],
    /// Gradient of the scaled queries, `[rows][padded key_dim]`.
    dq: &'a mut [f32],
    /// Logarithms of the sums of exponentials.
    lse: &'a mut [f32],
    /// `dy · y`.
    delta: &'a mut [f32],
}

/// Rows of a block.
struct Rows<'a> {
    /// As they are, `[rows][padded dim]`.
    rows: &'a mut [f32],
    /// Lanes along a row: working memory.
    lanes: &'a mut [f32],
    /// Lanes along a row, transposed: `[lane][rows]`.
    transposed: &'a mut [f32],
    /// Steps of a sum over rows: `[step][padded dim]`.
    steps: &'a mut [f32],
}

impl<'a> Rows<'a> {
    fn take(scratch: &mut Scratch<'a>, dim: usize) -> Self {
        let [rows, lanes, transposed, steps] = [(); 4].map(|()| scratch.take(room(QUERY_ROWS, dim)));
        Self { rows, lanes, transposed, steps }
    }

    #[inline(always)]
    fn load<S: Simd, P: Product<S>>(&mut self, s: S, block: &Block, x: &Tensor, dim: usize, factor: f32) {
        let width = padded(block.tokens.len() * block.heads.len());
        block.rows_of(x, dim, factor, self.rows);
        transpose::<S, P>(s, self.rows, width, dim, self.lanes, self.transposed);
        if P::PER_LANE > 1 {
            steps::<S, P>(s, self.rows, padded(dim), width, padded(dim), self.steps);
        }
    }

    /// Steps of a sum over rows.
    #[inline(always)]
    fn steps<S: Simd, P: Product<S>>(&self) -> *const f32 {
        if P::PER_LANE > 1 { self.steps.as_ptr() } else { self.rows.as_ptr() }
    }
}

for_pairs! {
    fn backward_pairs(part: &Part, scratch: &mut [f32]) = backward_with::<_, Pairs>
}

for_isa! {
    fn backward_floats(part: &Part, scratch: &mut [f32]) = backward_floats_with
}

#[inline(always)]
fn backward_floats_with<S: Simd>(s: S, part: &Part, scratch: &mut [f32]) {
    backward_with::<S, Fma<f32>>(s, part, scratch);
}

#[inline(always)]
fn backward_with<S: Simd, P: Product<S>>(s: S, part: &Part, scratch: &mut [f32]) {
    let SelfAttention { key_dim, value_dim, scale, .. } = *part.spec;
    let mut scratch = Scratch(scratch);
    let mut state = State {
        queries: Rows::take(&mut scratch, key_dim),
        dy: Rows::take(&mut scratch, value_dim),
        keys: scratch.take(room(KEYS, key_dim)),
        probabilities: [(); 2].map(|()| scratch.take(room(KEYS, QUERY_ROWS))),
        d_scores: [(); 3].map(|()| scratch.take(room(KEYS, QUERY_ROWS))),
        dq: scratch.take(room(QUERY_ROWS, key_dim)),
        lse: scratch.take(QUERY_ROWS),
        delta: scratch.take(QUERY_ROWS),
    };
    for (gradient, dim) in [(part.gradients[1], key_dim), (part.gradients[2], value_dim)] {
        for token in part.document.clone() {
            // SAFETY: this head's keys (or values) of this document are this item's alone.
            unsafe { gradient.get().add((token * part.spec.kv_heads + part.kv_head) * dim).write_bytes(0, dim) };
        }
    }
    for heads in head_blocks(part.spec) {
        if heads.start * part.spec.kv_heads / part.spec.heads != part.kv_head {
            continue;
        }
        let step = block_tokens(&heads);
        let mut start = part.document.start;
        while start < part.document.end {
            let tokens = start..(start + step).min(part.document.end);
            start = tokens.end;
            let block = block_of(part.q, part.spec, tokens, heads.clone(), part.document.start);
            load::<S, P>(s, part, &block, &mut state);
            let mut first = block.positions.start;
            while first < block.positions.end {
                let positions = first..(first + KEYS).min(block.positions.end);
                first = positions.end;
                add_block::<S, P>(s, part, &block, &positions, &mut state);
            }
            for (t, token) in block.tokens.clone().enumerate() {
                for (h, head) in block.heads.clone().enumerate() {
                    let row = &state.dq[(t * block.heads.len() + h) * padded(key_dim)..][..key_dim];
                    // SAFETY: dq is [tokens, heads · key_dim]; this head's part is this item's alone.
                    let to = unsafe { part.gradients[0].get().add((token * part.spec.heads + head) * key_dim) };
                    for (i, from) in row.iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { *to.add(i) = from * scale };
                    }
                }
            }
        }
    }
}

/// Brings the block's queries and gradients into the working memory. Rows beyond the block's are zero: they add nothing.
#[inline(always)]
fn load<S: Simd, P: Product<S>>(s: S, part: &Part, block: &Block, state: &mut State) {
    let AttentionSpec { heads, key_dim, value_dim, scale, .. } = block.spec;
    state.queries.load::<S, P>(s, block, part.q, key_dim, scale);
    state.dy.load::<S, P>(s, block, part.dy, value_dim, 1.0);
    for memory in [&mut *state.dq, state.lse, state.delta] {
        memory.fill(0.0);
    }
    for (t, token) in block.tokens.clone().enumerate() {
        for (h, head) in block.heads.clone().enumerate() {
            let r = t * block.heads.len() + h;
            let value = head * value_dim..(head + 1) * value_dim;
            state.delta[r] = dot(s, &part.dy.row(token)[value.clone()], &part.output.y.row(token)[value]);
            state.lse[r] = part.output.lse.host()[token * heads + head];
        }
    }
}

/// Adds what these positions give to the gradients.
#[inline(always)]
fn add_block<S: Simd, P: Product<S>>(s: S, part: &Part, block: &Block, positions: &Range<usize>, state: &mut State) {
    let AttentionSpec { key_dim, value_dim, .. } = block.spec;
    let (count, rows) = (positions.len(), block.tokens.len() * block.heads.len());
    let width = padded(rows);
    let [probabilities, probability_lanes] = &mut state.probabilities;
    let [d_scores, d_score_lanes, d_score_steps] = &mut state.d_scores;
    // Scores, and the gradients of the probabilities: [positions][rows].
    let into_rows = |of: &Lanes, dim: usize, b: &[f32], c: &mut [f32]| Operands {
        a: of.data[positions.start * of.row + lane_count::<S, P>(part.kv_head * dim)..].as_ptr(),
        a_row: of.row,
        a_step: 1,
        b: b.as_ptr(),
        b_step: width,
        c: c.as_mut_ptr(),
        c_row: width,
        steps: lane_count::<S, P>(dim),
        accumulate: false,
    };
    let scored = into_rows(part.keys, key_dim, state.queries.transposed, probabilities);
    let d_probabilities = into_rows(part.values, value_dim, state.dy.transposed, d_scores);
    // SAFETY: lanes of all positions; the other matrices have this width, whole vectors.
    unsafe {
        product::<S, P>(s, scored.lanes::<S, P>(), count, width);
        product::<S, P>(s, d_probabilities.lanes::<S, P>(), count, width);
    }
    block.mask(positions, probabilities, width, 1);
    for lane in (0..width).step_by(S::LANES) {
        // SAFETY: both matrices are [count][width], the others [width], whole vectors.
        unsafe {
            let lse = s.load(state.lse.as_ptr().add(lane));
            let delta = s.load(state.delta.as_ptr().add(lane));
            for p in 0..count {
                let score = probabilities.as_mut_ptr().add(p * width + lane);
                let d_score = d_scores.as_mut_ptr().add(p * width + lane);
                let probability = softmax_exp(s, s.sub(s.load(score), lse));
                s.store(score, probability);
                s.store(d_score, s.mul(probability, s.sub(s.load(d_score), delta)));
            }
        }
    }
    // dv and dk: sums over rows.
    let key_at = positions.start * block.key_width + part.kv_head * key_dim;
    let value_at = positions.start * block.value_width + part.kv_head * value_dim;
    let [_, to_dk, to_dv] = part.gradients.map(|gradient| gradient.get());
    let (dv, dk) = (to_dv.wrapping_add(value_at), to_dk.wrapping_add(key_at));
    let over_rows = |b: *const f32, dim: usize, c: *mut f32, c_row: usize| Operands {
        a: std::ptr::null(),
        a_row: lane_count::<S, P>(width),
        a_step: 1,
        b,
        b_step: padded(dim),
        c,
        c_row,
        steps: lane_count::<S, P>(rows),
        accumulate: true,
    };
    let dv = over_rows(state.dy.steps::<S, P>(), value_dim, dv, block.value_width);
    let dk = over_rows(state.queries.steps::<S, P>(), key_dim, dk, block.key_width);
    // SAFETY: the steps are those of the rows; the gradients of this key head in these positions are this item's alone.
    unsafe {
        let a = along_rows::<S, P>(s, probabilities, count * width, probability_lanes);
        product::<S, P>(s, Operands { a, ..dv }.lanes::<S, P>(), count, value_dim);
        let a = along_rows::<S, P>(s, d_scores, count * width, d_score_lanes);
        product::<S, P>(s, Operands { a, ..dk }.lanes::<S, P>(), count, key_dim);
    }
    // dq: a sum over positions.
    let (weights, weights_row) = steps::<S, P>(s, d_scores, width, count, width, d_score_steps);
    let (keys, keys_row) = steps::<S, P>(s, &part.k.host()[key_at..], block.key_width, count, key_dim, state.keys);
    let dq = Operands {
        a: weights.as_ptr(),
        a_row: 1,
        a_step: weights_row,
        b: keys.as_ptr(),
        b_step: keys_row,
        c: state.dq.as_mut_ptr(),
        c_row: padded(key_dim),
        steps: lane_count::<S, P>(count),
        accumulate: true,
    };
    // SAFETY: both have so many steps; keys are whole vectors.
    unsafe { product::<S, P>(s, dq.lanes::<S, P>(), rows, key_dim) };
}

/// The first `n` floats as lanes of neighbours, where they lie if those are floats. The rows are whole vectors, so that no lane has
/// two positions.
#[inline(always)]
fn along_rows<S: Simd, P: Product<S>>(s: S, from: &[f32], n: usize, lanes: &mut [f32]) -> *const f32 {
    if P::PER_LANE == 1 {
        return from.as_ptr();
    }
    assert!(from.len() >= n && lanes.len() >= padded(n));
    // SAFETY: as asserted; there are not more lanes than floats.
    unsafe { P::lanes_of_row(s, from.as_ptr(), n, lanes.as_mut_ptr()) };
    lanes.as_ptr()
}
