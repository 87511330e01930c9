//! Self-attention inside documents, forward (FlashAttention-2, Dao 2023, section 3.1), and what the way back shares with it. With
//! fast activations both factors of every product are rounded, to bf16 as mixed-precision training does or to integers with scales
//! (`FloatProducts`); softmax and sums are f32.

use std::ops::Range;

use super::QUERY_ROWS;
use super::block::{Block, KEYS, LOWEST, Softmax, padded, scale_rows, soften_rows};
use super::forms::{Scratch, over_steps, products, room, rows_by_rows, steps, transpose};
use crate::backward::{AttentionOutput, SelfAttention};
use crate::cpu::FloatProducts;
use crate::cpu::dense::{Fma, Form, Ints, Lanes, Pairs, Plain};
use crate::cpu::pool::SendPtr;
use crate::cpu::quant::Context;
use crate::cpu::scratch::with_attention;
use crate::cpu::simd::{Simd, for_isa, for_pairs};
use crate::cpu::unwritten::Unwritten;
use crate::{AttentionSpec, Tensor};

/// Forward, with the logarithms that the way back needs.
pub fn attention_forward(
    context: Context,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: &SelfAttention,
) -> AttentionOutput {
    check(q, k, v, spec);
    let (y_row, lse_row) = (spec.heads * spec.value_dim, spec.heads);
    let (mut y, mut lse) = (Unwritten::new(q.rows() * y_row), Unwritten::new(q.rows() * lse_row));
    let products = products(context, spec.key_dim, spec.value_dim);
    let keys = Lanes::by_head(context, products, k, spec.key_dim);
    let heads = head_blocks(spec);
    let step = block_tokens(&heads[0]);
    // Tokens of a block, and where their document begins.
    let mut blocks: Vec<(Range<usize>, usize)> = Vec::new();
    for document in spec.documents {
        let starts = document.clone().step_by(step);
        blocks.extend(starts.map(|start| (start..(start + step).min(document.end), document.start)));
    }
    let (to, to_lse) = (y.target(), lse.target());
    context.pool.for_ranges(blocks.len() * heads.len(), 1, |items| {
        with_attention(Forward::sizes(spec).iter().sum(), |scratch| {
            for item in items {
                let ((tokens, document), heads) = (&blocks[item / heads.len()], &heads[item % heads.len()]);
                let block = block_of(q, spec, tokens.clone(), heads.clone(), *document);
                let part = Forward { block, keys: &keys, v, y: to, lse: to_lse };
                match products {
                    FloatProducts::F32 => forward_floats(context.isa, &part, scratch),
                    FloatProducts::Bf16 => forward_pairs(&part, scratch),
                    FloatProducts::Int16 => forward_ints(context.isa, &part, scratch),
                }
            }
        });
    });
    // SAFETY: the items are all heads of all tokens.
    let (y, lse) = unsafe { (y.written(), lse.written()) };
    AttentionOutput { y: Tensor::new(q.rows(), y_row, y), lse: Tensor::new(q.rows(), lse_row, lse) }
}

/// A block of queries.
struct Forward<'a> {
    block: Block<'a>,
    keys: &'a Lanes,
    v: &'a Tensor,
    y: SendPtr<f32>,
    lse: SendPtr<f32>,
}

impl Forward<'_> {
    /// Floats of the working memory's parts, in the order in which they are taken.
    fn sizes(spec: &SelfAttention) -> [usize; 9] {
        let rows = QUERY_ROWS;
        let (queries, sums) = (room(rows, spec.key_dim), room(rows, spec.value_dim));
        [
            queries,
            queries,
            queries,
            room(KEYS, rows),
            room(KEYS, rows),
            room(KEYS, spec.value_dim),
            sums,
            rows,
            2 * rows,
        ]
    }
}

for_pairs! {
    fn forward_pairs(part: &Forward, scratch: &mut [f32]) = forward_with::<_, Plain<Pairs>>
}

for_isa! {
    fn forward_ints(part: &Forward, scratch: &mut [f32]) = forward_with::<_, Ints>
}

for_isa! {
    fn forward_floats(part: &Forward, scratch: &mut [f32]) = forward_with::<_, Plain<Fma<f32>>>
}

#[inline(always)]
fn forward_with<S: Simd, F: Form<S>>(s: S, part: &Forward, scratch: &mut [f32]) {
    let block = &part.block;
    let AttentionSpec { heads, kv_heads, key_dim, value_dim, scale, .. } = block.spec;
    let rows = block.tokens.len() * block.heads.len();
    let (width, value_row) = (padded(rows), padded(value_dim));
    let mut scratch = Scratch(scratch);
    let [query_rows, query_lanes, queries] = [(); 3].map(|()| scratch.take(room(QUERY_ROWS, key_dim)));
    let [scores, exponentials] = [(); 2].map(|()| scratch.take(room(KEYS, QUERY_ROWS)));
    let values = scratch.take(room(KEYS, value_dim));
    let sums = scratch.take(room(QUERY_ROWS, value_dim));
    let (largest, rest) = (scratch.take(QUERY_ROWS), scratch.take(2 * QUERY_ROWS));
    let (totals, factors) = rest.split_at_mut(QUERY_ROWS);
    block.rows_of(block.q, key_dim, scale, query_rows);
    transpose::<S, F>(s, query_rows, width, key_dim, query_lanes, queries);
    sums[..width * value_row].fill(0.0);
    totals.fill(0.0);
    largest.fill(LOWEST);
    let kv_head = block.heads.start * kv_heads / heads;
    let mut first = block.positions.start;
    while first < block.positions.end {
        let positions = first..(first + KEYS).min(block.positions.end);
        let count = positions.len();
        first = positions.end;
        let scored = rows_by_rows::<S, F>(part.keys, positions.start, kv_head, key_dim, queries, width, scores);
        // SAFETY: keys are lanes of all positions; queries and scores have this width, whole vectors.
        unsafe { F::multiply(s, scored, count, width) };
        block.mask(&positions, scores, width, 1);
        soften_rows(s, scores, width, count, Softmax { largest, totals, factors });
        scale_rows(sums, value_row, &factors[..rows]);
        let weights = steps::<S, F>(s, scores, width, count, width, exponentials);
        let value_at = positions.start * block.value_width + kv_head * value_dim;
        let values = steps::<S, F>(s, &part.v.host()[value_at..], block.value_width, count, value_dim, values);
        let weighted = over_steps::<S, F>(weights, values, count, sums, value_row);
        // SAFETY: both have so many steps; values are whole vectors, as sums are.
        unsafe { F::multiply(s, weighted, rows, value_dim) };
    }
    for (t, token) in block.tokens.clone().enumerate() {
        for (h, head) in block.heads.clone().enumerate() {
            let r = t * block.heads.len() + h;
            // SAFETY: y and lse have a place for each head of each token, which is this item's alone.
            unsafe {
                *part.lse.get().add(token * heads + head) = largest[r] + totals[r].ln();
                let to = part.y.get().add((token * heads + head) * value_dim);
                for (i, sum) in sums[r * value_row..][..value_dim].iter().enumerate() {
                    *to.add(i) = sum / totals[r];
                }
            }
        }
    }
}

impl Block<'_> {
    /// The block's rows of `x` (whose heads have `dim` elements) times `factor`: `[rows][padded dim]`, zeros up to whole vectors
    /// both ways.
    #[inline(always)]
    pub fn rows_of(&self, x: &Tensor, dim: usize, factor: f32, to: &mut [f32]) {
        let row = padded(dim);
        to[..padded(self.tokens.len() * self.heads.len()) * row].fill(0.0);
        let places = self.tokens.clone().flat_map(|token| self.heads.clone().map(move |head| (token, head)));
        for ((token, head), to) in places.zip(to.chunks_exact_mut(row)) {
            let from = &x.row(token)[head * dim..(head + 1) * dim];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
        }
    }
}

pub(super) fn check(q: &Tensor, k: &Tensor, v: &Tensor, spec: &SelfAttention) {
    let SelfAttention { heads, kv_heads, key_dim, value_dim, documents, .. } = *spec;
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads for {kv_heads} key heads");
    assert_eq!(q.cols(), heads * key_dim, "queries of {} columns for {heads} heads of {key_dim}", q.cols());
    assert_eq!((k.rows(), k.cols()), (q.rows(), kv_heads * key_dim), "keys for {kv_heads} heads of {key_dim}");
    assert_eq!((v.rows(), v.cols()), (q.rows(), kv_heads * value_dim), "values for {kv_heads} heads of {value_dim}");
    let ends = documents.iter().try_fold(0, |end, d| (d.start == end && d.end >= end).then_some(d.end));
    assert_eq!(ends, Some(q.rows()), "documents {documents:?} of {} rows", q.rows());
}

/// Query heads of the blocks: at most [`QUERY_ROWS`], of one key head.
pub(super) fn head_blocks(spec: &SelfAttention) -> Vec<Range<usize>> {
    let group = spec.heads / spec.kv_heads;
    let size = group.div_ceil(group.div_ceil(QUERY_ROWS));
    let of_group = |start: usize| (start..start + group).step_by(size).map(move |h| h..(h + size).min(start + group));
    (0..spec.kv_heads).flat_map(|kv| of_group(kv * group)).collect()
}

pub(super) fn block_tokens(heads: &Range<usize>) -> usize {
    (QUERY_ROWS / heads.len()).max(1)
}

pub(super) fn block_of<'a>(
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
