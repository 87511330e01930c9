//! Self-attention inside documents, forward and backward (FlashAttention-2, Dao 2023, section 3.1).
//!
//! Backward: with probabilities P, computed anew from the kept logarithms, and D_t = dy_t · y_t,
//! `dS = P (dy · vᵀ − D)`, `dq = scale · dS · k`, `dk = scale · dSᵀ · q`, `dv = Pᵀ · dy`. A work item is a document's key head:
//! all it adds to is its own.

use std::cell::RefCell;
use std::ops::Range;

use super::QUERY_ROWS;
use super::block::{self, Block, KEYS, Scores, Target, padded, widen};
use crate::backward::{AttentionGradient, AttentionOutput, SelfAttention};
use crate::cpu::Isa;
use crate::cpu::dense::{Fma, Operands, product};
use crate::cpu::pool::{Pool, SendPtr};
use crate::cpu::simd::{MAX_LANES, Simd, dot, exp, for_isa};
use crate::{AttentionSpec, Tensor};

/// Forward, with the logarithms that the way back needs.
pub fn attention_forward(
    pool: &Pool,
    isa: Isa,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: &SelfAttention,
) -> AttentionOutput {
    check(q, k, v, spec);
    let mut y = Tensor::zeros(q.rows(), spec.heads * spec.value_dim);
    let mut lse = Tensor::zeros(q.rows(), spec.heads);
    let (to, to_lse) = (SendPtr::new(y.host_mut()), SendPtr::new(lse.host_mut()));
    let heads = head_blocks(spec);
    let step = block_tokens(&heads[0]);
    // Tokens of a block, and where their document begins.
    let mut blocks: Vec<(Range<usize>, usize)> = Vec::new();
    for document in spec.documents {
        let starts = document.clone().step_by(step);
        blocks.extend(starts.map(|start| (start..(start + step).min(document.end), document.start)));
    }
    pool.for_ranges(blocks.len() * heads.len(), 1, |items| {
        for item in items {
            let ((tokens, document), heads) = (&blocks[item / heads.len()], &heads[item % heads.len()]);
            let block = block_of(q, spec, tokens.clone(), heads.clone(), *document);
            let target = Target {
                first: to.get().wrapping_add((tokens.start * spec.heads + heads.start) * spec.value_dim),
                token: spec.heads * spec.value_dim,
                head: spec.value_dim,
            };
            let lse = to_lse.get().wrapping_add(tokens.start * spec.heads + heads.start);
            block::run(isa, &block, k.host(), v.host(), Scores::Logged(lse), target);
        }
    });
    AttentionOutput { y, lse }
}

/// The gradients of queries, keys and values.
pub fn attention_backward(
    pool: &Pool,
    isa: Isa,
    inputs: [&Tensor; 3],
    output: &AttentionOutput,
    dy: &Tensor,
    spec: &SelfAttention,
) -> AttentionGradient {
    let [q, k, v] = inputs;
    check(q, k, v, spec);
    assert_eq!((dy.rows(), dy.cols()), (output.y.rows(), output.y.cols()), "a gradient of another shape");
    let mut dq = Tensor::zeros(q.rows(), q.cols());
    let mut dk = Tensor::zeros(k.rows(), k.cols());
    let mut dv = Tensor::zeros(v.rows(), v.cols());
    let gradients = [SendPtr::new(dq.host_mut()), SendPtr::new(dk.host_mut()), SendPtr::new(dv.host_mut())];
    let items = spec.documents.len() * spec.kv_heads;
    pool.for_ranges(items, 1, |items| {
        SCRATCH.with_borrow_mut(|scratch| {
            for item in items {
                let (document, kv_head) = (&spec.documents[item / spec.kv_heads], item % spec.kv_heads);
                let part = Part { q, k, v, output, dy, spec, document, kv_head, gradients };
                scratch.resize(scratch.len().max(part.sizes().iter().sum()), 0.0);
                backward(isa, &part, scratch);
            }
        });
    });
    AttentionGradient { dq, dk, dv }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, spec: &SelfAttention) {
    let SelfAttention { heads, kv_heads, key_dim, value_dim, documents, .. } = *spec;
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads for {kv_heads} key heads");
    assert_eq!(q.cols(), heads * key_dim, "queries of {} columns for {heads} heads of {key_dim}", q.cols());
    assert_eq!((k.rows(), k.cols()), (q.rows(), kv_heads * key_dim), "keys for {kv_heads} heads of {key_dim}");
    assert_eq!((v.rows(), v.cols()), (q.rows(), kv_heads * value_dim), "values for {kv_heads} heads of {value_dim}");
    let ends = documents.iter().try_fold(0, |end, d| (d.start == end && d.end >= end).then_some(d.end));
    assert_eq!(ends, Some(q.rows()), "documents {documents:?} of {} rows", q.rows());
}

/// Query heads of the blocks: at most [`QUERY_ROWS`], of one key head.
fn head_blocks(spec: &SelfAttention) -> Vec<Range<usize>> {
    let group = spec.heads / spec.kv_heads;
    let size = group.div_ceil(group.div_ceil(QUERY_ROWS));
    let of_group = |start: usize| (start..start + group).step_by(size).map(move |h| h..(h + size).min(start + group));
    (0..spec.kv_heads).flat_map(|kv| of_group(kv * group)).collect()
}

fn block_tokens(heads: &Range<usize>) -> usize {
    (QUERY_ROWS / heads.len()).max(1)
}

fn block_of<'a>(
    q: &'a Tensor,
    spec: &SelfAttention,
    tokens: Range<usize>,
    heads: Range<usize>,
    document: usize,
) -> Block<'a> {
    let first = spec.window.map_or(0, |w| (tokens.start + 1).saturating_sub(w)).max(document);
    Block {
        q,
        spec: AttentionSpec {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            key_dim: spec.key_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            first_position: 0,
            window: spec.window,
        },
        positions: first..tokens.end,
        tokens,
        heads,
        key_width: spec.kv_heads * spec.key_dim,
        value_width: spec.kv_heads * spec.value_dim,
    }
}

/// A key head of a document, backward.
struct Part<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    output: &'a AttentionOutput,
    dy: &'a Tensor,
    spec: &'a SelfAttention<'a>,
    document: &'a Range<usize>,
    kv_head: usize,
    /// Of q, k, v.
    gradients: [SendPtr<f32>; 3],
}

impl Part<'_> {
    /// Floats of the working memory's parts, in the order of [`State`].
    fn sizes(&self) -> [usize; 11] {
        let (rows, key, value) = (QUERY_ROWS, padded(self.spec.key_dim), padded(self.spec.value_dim));
        [
            rows * key,
            rows * key,
            rows * value,
            rows * value,
            KEYS * (key + MAX_LANES),
            KEYS * (value + MAX_LANES),
            KEYS * rows,
            KEYS * rows,
            rows * key,
            rows,
            rows,
        ]
    }
}

/// The working memory.
struct State<'a> {
    /// Scaled queries `[key_dim][rows]`.
    queries_t: &'a mut [f32],
    /// Scaled queries `[rows][key_dim]`.
    queries: &'a mut [f32],
    /// `dy`, `[value_dim][rows]`.
    dy_t: &'a mut [f32],
    /// `dy`, `[rows][value_dim]`.
    dy: &'a mut [f32],
    /// A block's keys.
    keys: &'a mut [f32],
    /// A block's values.
    values: &'a mut [f32],
    /// Scores, then probabilities, `[positions][rows]`.
    probabilities: &'a mut [f32],
    /// Gradients of the probabilities, then of the scores, `[positions][rows]`.
    d_scores: &'a mut [f32],
    /// Gradient of the scaled queries, `[rows][key_dim]`.
    dq: &'a mut [f32],
    /// Logarithms of the sums of exponentials.
    lse: &'a mut [f32],
    /// `dy · y`.
    delta: &'a mut [f32],
}

for_isa! {
    fn backward(part: &Part, scratch: &mut [f32]) = backward_with
}

#[inline(always)]
fn backward_with<S: Simd>(s: S, part: &Part, scratch: &mut [f32]) {
    let mut rest = scratch;
    let mut parts: [&mut [f32]; 11] = Default::default();
    for (slot, len) in parts.iter_mut().zip(part.sizes()) {
        let (taken, after) = rest.split_at_mut(len);
        (*slot, rest) = (taken, after);
    }
    let [queries_t, queries, dy_t, dy, keys, values, probabilities, d_scores, dq, lse, delta] = parts;
    let mut state = State { queries_t, queries, dy_t, dy, keys, values, probabilities, d_scores, dq, lse, delta };
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
            load_rows(s, part, &block, &mut state);
            let mut first = block.positions.start;
            while first < block.positions.end {
                let positions = first..(first + KEYS).min(block.positions.end);
                first = positions.end;
                add_block(s, part, &block, &positions, &mut state);
            }
            let key_dim = part.spec.key_dim;
            for (t, token) in block.tokens.clone().enumerate() {
                for (h, head) in block.heads.clone().enumerate() {
                    let row = &state.dq[(t * block.heads.len() + h) * padded(key_dim)..][..key_dim];
                    // SAFETY: dq is [tokens, heads · key_dim]; this head's part is this item's alone.
                    let to = unsafe {
                        let first = (token * part.spec.heads + head) * key_dim;
                        std::slice::from_raw_parts_mut(part.gradients[0].get().add(first), key_dim)
                    };
                    for (to, from) in to.iter_mut().zip(row) {
                        *to = from * part.spec.scale;
                    }
                }
            }
        }
    }
}

/// Brings the block's queries and gradients into the working memory. Rows beyond the block's are zero: they add nothing.
#[inline(always)]
fn load_rows<S: Simd>(s: S, part: &Part, block: &Block, state: &mut State) {
    let AttentionSpec { heads, key_dim, value_dim, scale, .. } = block.spec;
    let rows = padded(block.tokens.len() * block.heads.len());
    for memory in [&mut *state.queries_t, state.queries, state.dy_t, state.dy, state.dq, state.lse, state.delta] {
        memory.fill(0.0);
    }
    for (t, token) in block.tokens.clone().enumerate() {
        for (h, head) in block.heads.clone().enumerate() {
            let r = t * block.heads.len() + h;
            let query = &part.q.row(token)[head * key_dim..(head + 1) * key_dim];
            for (i, q) in query.iter().enumerate() {
                state.queries[r * padded(key_dim) + i] = q * scale;
                state.queries_t[i * rows + r] = q * scale;
            }
            let value = head * value_dim..(head + 1) * value_dim;
            let dy = &part.dy.row(token)[value.clone()];
            for (i, &d) in dy.iter().enumerate() {
                state.dy[r * padded(value_dim) + i] = d;
                state.dy_t[i * rows + r] = d;
            }
            state.delta[r] = dot(s, dy, &part.output.y.row(token)[value]);
            state.lse[r] = part.output.lse.host()[token * heads + head];
        }
    }
}

/// Adds what these positions give to the gradients.
#[inline(always)]
fn add_block<S: Simd>(s: S, part: &Part, block: &Block, positions: &Range<usize>, state: &mut State) {
    let AttentionSpec { key_dim, value_dim, .. } = block.spec;
    let (count, rows) = (positions.len(), block.tokens.len() * block.heads.len());
    let width = padded(rows);
    let (key_row, value_row) = (padded(key_dim) + MAX_LANES, padded(value_dim) + MAX_LANES);
    let key_at = positions.start * block.key_width + part.kv_head * key_dim;
    let value_at = positions.start * block.value_width + part.kv_head * value_dim;
    widen(s, &part.k.host()[key_at..], block.key_width, key_dim, state.keys, key_row, count);
    widen(s, &part.v.host()[value_at..], block.value_width, value_dim, state.values, value_row, count);
    // SAFETY: every matrix has the rows, columns and strides named here, padded to whole vectors where it is read in vectors;
    // the gradients of this key head in these positions are this item's alone.
    unsafe {
        // Scores, and the gradients of the probabilities: [positions][rows].
        let into_rows = |a: &[f32], a_row, b: &[f32], c: &mut [f32], steps| {
            let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
            Operands { a, a_row, a_step: 1, b, b_step: width, c, c_row: width, steps, accumulate: false }
        };
        let scores = into_rows(state.keys, key_row, state.queries_t, state.probabilities, key_dim);
        product::<S, Fma<f32>>(s, scores, count, width);
        let d_probabilities = into_rows(state.values, value_row, state.dy_t, state.d_scores, value_dim);
        product::<S, Fma<f32>>(s, d_probabilities, count, width);
        block.mask(positions, state.probabilities, width, 1);
        for lane in (0..width).step_by(S::LANES) {
            let lse = s.load(state.lse.as_ptr().add(lane));
            let delta = s.load(state.delta.as_ptr().add(lane));
            for p in 0..count {
                let score = state.probabilities.as_mut_ptr().add(p * width + lane);
                let d_score = state.d_scores.as_mut_ptr().add(p * width + lane);
                let probability = exp(s, s.sub(s.load(score), lse));
                s.store(score, probability);
                s.store(d_score, s.mul(probability, s.sub(s.load(d_score), delta)));
            }
        }
        // dv and dk: sums over rows.
        let over_rows = |a: &[f32], b: &[f32], b_step, c: *mut f32, c_row| {
            let (a, b) = (a.as_ptr(), b.as_ptr());
            Operands { a, a_row: width, a_step: 1, b, b_step, c, c_row, steps: rows, accumulate: true }
        };
        let to_dv = part.gradients[2].get().add(value_at);
        let dv = over_rows(state.probabilities, state.dy, padded(value_dim), to_dv, block.value_width);
        product::<S, Fma<f32>>(s, dv, count, value_dim);
        let to_dk = part.gradients[1].get().add(key_at);
        let dk = over_rows(state.d_scores, state.queries, padded(key_dim), to_dk, block.key_width);
        product::<S, Fma<f32>>(s, dk, count, key_dim);
        // dq: a sum over positions.
        let dq = Operands {
            a: state.d_scores.as_ptr(),
            a_row: 1,
            a_step: width,
            b: state.keys.as_ptr(),
            b_step: key_row,
            c: state.dq.as_mut_ptr(),
            c_row: padded(key_dim),
            steps: count,
            accumulate: true,
        };
        product::<S, Fma<f32>>(s, dq, rows, key_dim);
    }
}
