//! Attention by online softmax (Milakov & Gimelshein 2018; FlashAttention-2's loop order, Dao 2023): a block of queries goes
//! over blocks of keys and keeps, for each query, the largest score so far, the sum of exponentials and the weighted sum of
//! values. Nothing of size tokens x positions exists.

mod block;
mod forms;
mod gradient;
mod training;

use std::ops::Range;

pub use gradient::attention_backward;
pub use training::attention_forward;

use self::block::{Block, Scores};
use super::Isa;
use super::pool::{Pool, SendPtr};
use crate::{AttentionSpec, KvCache, KvData, Tensor, Values};

/// Query rows (tokens times heads that share a key head) of a block.
const QUERY_ROWS: usize = 64;

/// With fewer tokens than this, the keys are split among work items too.
const SPLIT_TOKENS: usize = 16;

/// Positions of a split. The splits depend on the shape alone, and so do the results.
const SPLIT: usize = 256;

/// Multiply-adds below which the caller works alone.
const ALONE: usize = 1 << 16;

/// Causal softmax attention; keys and values are stored in one type.
pub fn attention(pool: &Pool, isa: Isa, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
    let AttentionSpec { heads, kv_heads, key_dim, value_dim, first_position, .. } = *spec;
    assert_eq!(q.cols(), heads * key_dim, "queries of {} columns for {heads} heads of {key_dim}", q.cols());
    assert_eq!(keys.width(), kv_heads * key_dim, "keys of width {} for {kv_heads} heads", keys.width());
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads for {kv_heads} key heads");
    assert!(first_position + q.rows() <= keys.len(), "a query beyond the {} cached positions", keys.len());
    let values = match values {
        Values::Cache(cache) => {
            assert_eq!(cache.width(), kv_heads * value_dim, "values of width {} for {kv_heads} heads", cache.width());
            assert!(first_position + q.rows() <= cache.len(), "a query beyond the {} cached values", cache.len());
            cache
        }
        Values::PrefixOfKeys => {
            assert!(value_dim <= key_dim, "values of {value_dim} elements in keys of {key_dim}");
            keys
        }
    };
    let mut y = Tensor::zeros(q.rows(), heads * value_dim);
    if y.host().is_empty() {
        return y;
    }
    let plan = Plan::new(q.rows(), spec);
    let mut partials = vec![0.0; if plan.splits > 1 { plan.items() * plan.partial_len() } else { 0 }];
    let output = Output { y: SendPtr::new(y.host_mut()), partials: SendPtr::new(&mut partials) };
    let run = |items: Range<usize>| {
        // From the last queries, which see most keys, to the first: what is left at the end is short.
        for item in items.map(|item| plan.items() - 1 - item) {
            let block = plan.block(item, q, keys.width(), values.width());
            let scores = if plan.splits > 1 { Scores::Partial } else { Scores::Final };
            let to = output.of(&plan, item, &scores);
            match (keys.data(), values.data()) {
                (KvData::F32(k), KvData::F32(v)) => block::run(isa, &block, k, v, scores, to),
                (KvData::F16(k), KvData::F16(v)) => block::run(isa, &block, k, v, scores, to),
                (KvData::Bf16(k), KvData::Bf16(v)) => block::run(isa, &block, k, v, scores, to),
                _ => panic!("keys and values are cached in one type"),
            }
        }
    };
    let work = q.rows() * heads * (plan.positions.len()) * (key_dim + value_dim);
    if work < ALONE {
        run(0..plan.items())
    } else {
        pool.for_ranges(plan.items(), 1, run)
    }
    if plan.splits > 1 {
        plan.merge(&partials, &mut y);
    }
    y
}

/// How an attention is cut into work items: (tokens, heads, positions), positions fastest.
struct Plan {
    spec: AttentionSpec,
    tokens: usize,
    /// Tokens of a block.
    block_tokens: usize,
    /// Heads of a block; they share a key head.
    block_heads: usize,
    /// Blocks of heads to a key head.
    head_blocks: usize,
    /// Positions that some query sees.
    positions: Range<usize>,
    splits: usize,
}

impl Plan {
    fn new(tokens: usize, spec: &AttentionSpec) -> Self {
        let group = spec.heads / spec.kv_heads;
        let head_blocks = group.div_ceil(QUERY_ROWS);
        let block_heads = group.div_ceil(head_blocks);
        let last = spec.first_position + tokens;
        let positions = spec.window.map_or(0, |w| (spec.first_position + 1).saturating_sub(w))..last;
        Self {
            spec: *spec,
            tokens,
            block_tokens: (QUERY_ROWS / block_heads).clamp(1, tokens),
            block_heads,
            head_blocks,
            splits: if tokens < SPLIT_TOKENS { positions.len().div_ceil(SPLIT).max(1) } else { 1 },
            positions,
        }
    }

    fn items(&self) -> usize {
        self.tokens.div_ceil(self.block_tokens) * self.spec.kv_heads * self.head_blocks * self.splits
    }

    /// The tokens and query heads of an item.
    fn rows(&self, item: usize) -> (Range<usize>, Range<usize>) {
        let place = item / self.splits;
        let (token_block, head_block) =
            (place / (self.spec.kv_heads * self.head_blocks), place % (self.spec.kv_heads * self.head_blocks));
        let start = token_block * self.block_tokens;
        let group = self.spec.heads / self.spec.kv_heads;
        let kv_head = head_block / self.head_blocks;
        let within = head_block % self.head_blocks * self.block_heads;
        let first = kv_head * group + within;
        (
            start..(start + self.block_tokens).min(self.tokens),
            first..(first + self.block_heads).min((kv_head + 1) * group),
        )
    }

    fn block<'a>(&self, item: usize, q: &'a Tensor, key_width: usize, value_width: usize) -> Block<'a> {
        let (tokens, heads) = self.rows(item);
        let positions = if self.splits > 1 {
            let split = item % self.splits;
            let start = self.positions.start + split * SPLIT;
            start..(start + SPLIT).min(self.positions.end)
        } else {
            // This block's own queries see from their first one's window to their last one.
            let first = self.spec.first_position + tokens.start;
            let last = self.spec.first_position + tokens.end;
            self.spec.window.map_or(0, |w| (first + 1).saturating_sub(w))..last
        };
        Block { q, spec: self.spec, tokens, heads, positions, key_width, value_width }
    }

    /// Floats of an item's partial result: for each row its weighted values, its largest score and its sum.
    fn partial_len(&self) -> usize {
        self.block_tokens * self.block_heads * (self.spec.value_dim + 2)
    }

    /// Joins the splits of each row, in order.
    fn merge(&self, partials: &[f32], y: &mut Tensor) {
        let value_dim = self.spec.value_dim;
        for place in 0..self.items() / self.splits {
            let (tokens, heads) = self.rows(place * self.splits);
            for (t, token) in tokens.clone().enumerate() {
                for (h, head) in heads.clone().enumerate() {
                    let row = (t * heads.len() + h) * (value_dim + 2);
                    let parts = (0..self.splits).map(|split| {
                        let start = (place * self.splits + split) * self.partial_len() + row;
                        partials[start..start + value_dim + 2].split_at(value_dim)
                    });
                    let largest = parts.clone().map(|(_, end)| end[0]).fold(f32::NEG_INFINITY, f32::max);
                    let total: f32 = parts.clone().map(|(_, end)| end[1] * (end[0] - largest).exp()).sum();
                    let column = (token * self.spec.heads + head) * value_dim;
                    let to = &mut y.host_mut()[column..column + value_dim];
                    for (sums, end) in parts {
                        let factor = (end[0] - largest).exp() / total;
                        to.iter_mut().zip(sums).for_each(|(y, s)| *y += factor * s);
                    }
                }
            }
        }
    }
}

/// Where blocks write.
struct Output {
    y: SendPtr<f32>,
    partials: SendPtr<f32>,
}

impl Output {
    /// Where the rows of an item go: its part of `y`, or its partial result.
    fn of(&self, plan: &Plan, item: usize, scores: &Scores) -> block::Target {
        let (tokens, heads) = plan.rows(item);
        let value_dim = plan.spec.value_dim;
        match scores {
            Scores::Final => block::Target {
                first: self.y.get().wrapping_add((tokens.start * plan.spec.heads + heads.start) * value_dim),
                token: plan.spec.heads * value_dim,
                head: value_dim,
            },
            Scores::Partial => block::Target {
                first: self.partials.get().wrapping_add(item * plan.partial_len()),
                token: heads.len() * (value_dim + 2),
                head: value_dim + 2,
            },
        }
    }
}
