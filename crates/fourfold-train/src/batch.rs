//! Tokens of one step, packed: documents side by side.

use std::ops::Range;

use fourfold_kernels::backward::IGNORE;

use crate::network::BatchSource;

/// A packed batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Input tokens.
    pub ids: Vec<u32>,
    /// The token to predict at each place; [`IGNORE`] where none is scored.
    pub targets: Vec<u32>,
    /// The documents: consecutive ranges that together are all tokens.
    pub documents: Vec<Range<usize>>,
    /// Position of each token in its document.
    pub positions: Vec<usize>,
}

impl Batch {
    /// Adds a document. `scored[i]` says whether `ids[i]` is learned: as the target of the token before it.
    pub fn push(&mut self, ids: &[u32], scored: impl Fn(usize) -> bool) {
        let begin = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.targets.extend((1..ids.len()).map(|i| if scored(i) { ids[i] } else { IGNORE }));
        self.targets.resize(self.ids.len(), IGNORE);
        self.positions.extend(0..ids.len());
        self.documents.push(begin..self.ids.len());
    }

    /// Adds a text of which the last token is scored, against a class.
    pub fn push_labelled(&mut self, ids: &[u32], label: u32) {
        self.push(ids, |_| false);
        if let (Some(last), false) = (self.targets.last_mut(), ids.is_empty()) {
            *last = label;
        }
    }

    /// A batch of sequences each scored at every place; `tokens` holds one more token than the sequence.
    pub fn from_sequences<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self::default();
        for tokens in sequences {
            let Some((_, inputs)) = tokens.split_last() else { continue };
            let begin = batch.ids.len();
            batch.ids.extend_from_slice(inputs);
            batch.targets.extend_from_slice(&tokens[1..]);
            batch.positions.extend(0..inputs.len());
            batch.documents.push(begin..batch.ids.len());
        }
        batch
    }

    /// Tokens that are scored.
    pub fn scored(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }
}

/// What the memory of a step depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Tokens of the batch.
    pub tokens: usize,
    /// Tokens of its largest part: see [`part_tokens`].
    pub part: usize,
}

impl Extent {
    /// That of documents of such lengths, which a block takes up to `block_tokens` tokens at a time.
    pub fn of(lengths: impl Iterator<Item = usize> + Clone, block_tokens: usize) -> Self {
        Self { tokens: lengths.clone().sum(), part: part_tokens(lengths, block_tokens) }
    }

    /// What holds either.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { tokens: self.tokens.max(other.tokens), part: self.part.max(other.part) }
    }
}

/// Tokens of the largest part where documents are taken together as long as they have at most `most` tokens: a longer one is a part by
/// itself.
fn part_tokens(lengths: impl Iterator<Item = usize>, most: usize) -> usize {
    let (mut part, mut largest) = (0usize, 0);
    for length in lengths {
        part = if part + length <= most { part + length } else { length };
        largest = largest.max(part);
    }
    largest
}

/// Batches of text, whose sizes are known before they are read.
pub trait TextSource: BatchSource<Batch> {
    /// The size of batch `number`, where a block takes whole documents of up to `block_tokens` tokens at a time.
    fn extent(&mut self, number: u64, block_tokens: usize) -> Extent;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_do_not_predict_each_other_and_masked_tokens_are_not_scored() {
        let mut batch = Batch::default();
        batch.push(&[10, 11, 12], |i| i != 1);
        batch.push(&[20, 21], |_| true);
        assert_eq!(batch.ids, [10, 11, 12, 20, 21]);
        assert_eq!(batch.targets, [IGNORE, 12, IGNORE, 21, IGNORE]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.documents, [0..3, 3..5]);
        assert_eq!(batch.scored(), 2);
        let batch = Batch::from_sequences([&[1u32, 2, 3][..], &[4, 5, 6][..]]);
        assert_eq!((batch.ids, batch.targets), (vec![1, 2, 4, 5], vec![2, 3, 5, 6]));
    }
}
