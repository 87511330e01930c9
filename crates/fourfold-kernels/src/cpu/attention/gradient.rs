//! Self-attention inside documents, backward (FlashAttention-2, Dao 2023, section 3.1.2).
//!
//! With probabilities P, computed anew from the kept logarithms, and D_t = dy_t · y_t,
//! `dS = P (dy · vᵀ − D)`, `dq = scale · dS · k`, `dk = scale · dSᵀ · q`, `dv = Pᵀ · dy`. A work item is a document's key head:
//! all it adds to is its own.

use std::ops::Range;

use super::QUERY_ROWS;
use super::block::{Block, KEYS, padded};
use super::forms::{Scratch, Steps, lane_count, over_steps, products, room, rows_by_rows, steps, transpose};
use super::training::{block_of, block_tokens, check, head_blocks};
use crate::backward::{AttentionGradient, AttentionOutput, SelfAttention};
use crate::cpu::FloatProducts;
use crate::cpu::dense::{Fma, Form, Ints, Lanes, Matrices, Operands, Pairs, Plain};
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_attention;
use crate::cpu::simd::{MAX_LANES, Simd, dot, for_isa, for_pairs, softmax_exp};
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
    let products = products(context, spec.key_dim, spec.value_dim);
    let [keys, values] =
        [(k, spec.key_dim), (v, spec.value_dim)].map(|(x, dim)| Lanes::by_head(context, products, x, dim));
    let [mut dq, mut dk, mut dv] = inputs.map(|x| Unwritten::new(x.rows() * x.cols()));
    let gradients = [dq.target(), dk.target(), dv.target()];
    let items = spec.documents.len() * spec.kv_heads;
    context.pool.for_ranges(items, 1, |items| {
        for item in items {
            let (document, kv_head) = (&spec.documents[item / spec.kv_heads], item % spec.kv_heads);
            let part = Part { q, k, keys: &keys, values: &values, output, dy, spec, document, kv_head, gradients };
            with_attention(part.room(), |scratch| match products {
                FloatProducts::F32 => backward_floats(context.isa, &part, scratch),
                FloatProducts::Bf16 => backward_pairs(&part, scratch),
                FloatProducts::Int16 => backward_ints(context.isa, &part, scratch),
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
    fn load<S: Simd, F: Form<S>>(&mut self, s: S, block: &Block, x: &Tensor, dim: usize, factor: f32) {
        let width = padded(block.tokens.len() * block.heads.len());
        block.rows_of(x, dim, factor, self.rows);
        transpose::<S, F>(s, self.rows, width, dim, self.lanes, self.transposed);
        if F::PER_LANE > 1 {
            steps::<S, F>(s, self.rows, padded(dim), width, padded(dim), self.steps);
        }
    }

    /// Steps of a sum over rows, of which [`Rows::load`] has loaded `width`.
    #[inline(always)]
    fn steps<S: Simd, F: Form<S>>(&self, width: usize, dim: usize) -> Steps {
        let row = padded(dim);
        let data = if F::PER_LANE > 1 { &*self.steps } else { &*self.rows };
        Steps { data: data.as_ptr(), row, scales: data[lane_count::<S, F>(width) * row..].as_ptr() }
    }
}

for_pairs! {
    fn backward_pairs(part: &Part, scratch: &mut [f32]) = backward_with::<_, Plain<Pairs>>
}

for_isa! {
    fn backward_ints(part: &Part, scratch: &mut [f32]) = backward_with::<_, Ints>
}

for_isa! {
    fn backward_floats(part: &Part, scratch: &mut [f32]) = backward_with::<_, Plain<Fma<f32>>>
}

#[inline(always)]
fn backward_with<S: Simd, F: Form<S>>(s: S, part: &Part, scratch: &mut [f32]) {
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
            load::<S, F>(s, part, &block, &mut state);
            let mut first = block.positions.start;
            while first < block.positions.end {
                let positions = first..(first + KEYS).min(block.positions.end);
                first = positions.end;
                add_block::<S, F>(s, part, &block, &positions, &mut state);
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
fn load<S: Simd, F: Form<S>>(s: S, part: &Part, block: &Block, state: &mut State) {
    let AttentionSpec { heads, key_dim, value_dim, scale, .. } = block.spec;
    state.queries.load::<S, F>(s, block, part.q, key_dim, scale);
    state.dy.load::<S, F>(s, block, part.dy, value_dim, 1.0);
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
fn add_block<S: Simd, F: Form<S>>(s: S, part: &Part, block: &Block, positions: &Range<usize>, state: &mut State) {
    let AttentionSpec { key_dim, value_dim, .. } = block.spec;
    let (count, rows) = (positions.len(), block.tokens.len() * block.heads.len());
    let width = padded(rows);
    let [probabilities, probability_lanes] = &mut state.probabilities;
    let [d_scores, d_score_lanes, d_score_steps] = &mut state.d_scores;
    // Scores, and the gradients of the probabilities: [positions][rows].
    let (first, head) = (positions.start, part.kv_head);
    let queries = &state.queries.transposed;
    let scored = rows_by_rows::<S, F>(part.keys, first, head, key_dim, queries, width, probabilities);
    let dy = &state.dy.transposed;
    let d_probabilities = rows_by_rows::<S, F>(part.values, first, head, value_dim, dy, width, d_scores);
    // SAFETY: lanes of all positions; the other matrices have this width, whole vectors.
    unsafe {
        F::multiply(s, scored, count, width);
        F::multiply(s, d_probabilities, count, width);
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
    let over_rows = |a: Along, b: Steps, c: *mut f32, c_row: usize| Matrices {
        lanes: Operands {
            a: a.lanes,
            a_row: lane_count::<S, F>(width),
            a_step: 1,
            b: b.data,
            b_step: b.row,
            c,
            c_row,
            steps: lane_count::<S, F>(rows),
            accumulate: true,
        },
        a_scales: a.scales,
        a_scale_row: 1,
        a_scale_block: 0,
        b_scales: b.scales,
    };
    // SAFETY: the steps are those of the rows; the gradients of this key head in these positions are this item's alone.
    unsafe {
        let a = along_rows::<S, F>(s, probabilities, count, width, probability_lanes);
        let b = state.dy.steps::<S, F>(width, value_dim);
        F::multiply(s, over_rows(a, b, dv, block.value_width), count, value_dim);
        let a = along_rows::<S, F>(s, d_scores, count, width, d_score_lanes);
        let b = state.queries.steps::<S, F>(width, key_dim);
        F::multiply(s, over_rows(a, b, dk, block.key_width), count, key_dim);
    }
    // dq: a sum over positions.
    let weights = steps::<S, F>(s, d_scores, width, count, width, d_score_steps);
    let keys = steps::<S, F>(s, &part.k.host()[key_at..], block.key_width, count, key_dim, state.keys);
    let dq = over_steps::<S, F>(weights, keys, count, state.dq, padded(key_dim));
    // SAFETY: both have so many steps; keys are whole vectors.
    unsafe { F::multiply(s, dq, rows, key_dim) };
}

/// Rows as lanes along them.
#[derive(Clone, Copy)]
struct Along {
    lanes: *const f32,
    scales: *const f32,
}

/// `count` rows of `width` floats, whole vectors, as lanes of neighbours, their scales after the last; where they lie if lanes are floats.
#[inline(always)]
fn along_rows<S: Simd, F: Form<S>>(s: S, from: &[f32], count: usize, width: usize, lanes: &mut [f32]) -> Along {
    if F::PER_LANE == 1 {
        return Along { lanes: from.as_ptr(), scales: from.as_ptr() };
    }
    let lane_row = lane_count::<S, F>(width);
    let end = count * lane_row;
    assert!(from.len() >= count * width && count <= KEYS && lanes.len() >= end + count.max(MAX_LANES));
    let mut scales = [0.0; KEYS];
    for (row, scale) in scales.iter_mut().enumerate().take(count) {
        // SAFETY: as asserted; what a row's last vector writes beyond its lanes is the next row's or follows the last.
        unsafe {
            let to = lanes.as_mut_ptr().add(row * lane_row);
            *scale = F::lanes_of_row(s, from.as_ptr().add(row * width), width, to);
        }
    }
    lanes[end..end + count].copy_from_slice(&scales[..count]);
    Along { lanes: lanes.as_ptr(), scales: lanes[end..].as_ptr() }
}
