//! Documents cut and packed: batches by number, in an order that depends on seed and epoch alone.
//!
//! In memory are 12 bytes a piece of a document, and 4 to 8 for its place in an epoch's order; its tokens are read with its batch.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::documents::Text;
use super::{DataError, Documents};
use crate::batch::{Batch, Extent, TextSource};
use crate::network::{BatchSource, HeldOut};
use crate::random::{Stream, shuffle};

/// Documents cut and packed for training.
#[derive(Clone, Debug)]
pub struct Corpus {
    text: Arc<Text>,
    /// Where each piece begins in the text.
    begins: Vec<u64>,
    /// Tokens of each piece.
    lengths: Vec<u32>,
    context: usize,
    seed: u64,
}

impl Corpus {
    /// Cuts documents into pieces of at most `context` tokens. Pieces with nothing to learn are left out.
    ///
    /// # Errors
    /// Nothing is left, or more pieces than can be counted in 32 bits; `name` is what the error calls the data.
    pub fn new(name: &str, documents: impl Into<Documents>, context: usize, seed: u64) -> Result<Self, DataError> {
        let Documents { text, places } = documents.into();
        let context = context.clamp(2, u32::MAX as usize);
        let (mut begins, mut lengths) = (Vec::new(), Vec::new());
        for place in places {
            for begin in place.clone().step_by(context) {
                let end = place.end.min(begin + context as u64);
                let given = text.given(begin + 1..end);
                let learned = |i: &u64| !given.iter().any(|g| g.contains(i));
                if (begin + 1..end).any(|i| learned(&i)) {
                    begins.push(begin);
                    lengths.push((end - begin) as u32);
                }
            }
        }
        let refused = |reason: &str| Err(DataError::Empty { file: name.to_owned(), reason: reason.to_owned() });
        if begins.is_empty() {
            return refused("no text of two tokens or more");
        }
        if u32::try_from(begins.len()).is_err() {
            return refused("more than 2^32 pieces of text; a larger --context makes fewer");
        }
        begins.shrink_to_fit();
        lengths.shrink_to_fit();
        Ok(Self { text, begins, lengths, context, seed })
    }

    /// Tokens of all pieces.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().map(|&l| l as usize).sum()
    }

    /// Longest sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of what is in memory.
    pub fn byte_len(&self) -> usize {
        // An epoch's order has a piece and, at most, a sequence's end for each.
        self.begins.len() * (size_of::<u64>() + 3 * size_of::<u32>())
    }

    /// The sequences of one pass over the data: pieces in shuffled order, as many to a sequence as fit.
    fn sequences(&self, epoch: u64) -> Order {
        let mut pieces: Vec<u32> = (0..self.lengths.len() as u32).collect();
        shuffle(&mut pieces, Stream::new(self.seed, epoch, 0x0da7a));
        let mut ends = Vec::new();
        let mut room = self.context;
        for (i, &piece) in pieces.iter().enumerate() {
            let length = self.lengths[piece as usize] as usize;
            if length > room {
                ends.push(i as u32);
                room = self.context;
            }
            room -= length;
        }
        ends.push(pieces.len() as u32);
        ends.shrink_to_fit();
        Order { pieces, ends }
    }

    fn pack(&self, pieces: impl IntoIterator<Item = u32>) -> Result<Batch, DataError> {
        let mut batch = Batch::default();
        let mut ids = Vec::new();
        for piece in pieces {
            let (begin, length) = (self.begins[piece as usize], self.lengths[piece as usize]);
            ids.resize(length as usize, 0);
            self.text.read(begin, &mut ids)?;
            let given = self.text.given(begin..begin + u64::from(length));
            batch.push(&ids, |i| !given.iter().any(|g| g.contains(&(begin + i as u64))));
        }
        Ok(batch)
    }

    /// All pieces in order, `size` sequences a batch: for evaluation.
    pub fn in_order(&self, size: usize) -> InOrder {
        InOrder { corpus: self.clone(), size: size.max(1) }
    }
}

/// The pieces of a corpus in order.
#[derive(Clone, Debug)]
pub struct InOrder {
    corpus: Corpus,
    size: usize,
}

impl HeldOut<Batch> for InOrder {
    fn count(&self) -> usize {
        self.corpus.lengths.len().div_ceil(self.size)
    }

    fn batch(&self, i: usize) -> Result<Batch, DataError> {
        let begin = i * self.size;
        let end = self.corpus.lengths.len().min(begin + self.size);
        self.corpus.pack(begin as u32..end as u32)
    }
}

/// An epoch's order: pieces, and where in it each sequence ends.
#[derive(Debug, PartialEq, Eq)]
struct Order {
    pieces: Vec<u32>,
    ends: Vec<u32>,
}

impl Order {
    /// Sequences.
    fn len(&self) -> usize {
        self.ends.len()
    }

    /// The pieces of these sequences.
    fn of(&self, sequences: Range<usize>) -> &[u32] {
        let end = |i: usize| if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.pieces[end(sequences.start)..end(sequences.end)]
    }
}

/// Batches by number, the same for the same seed.
pub struct Batches<C: Borrow<Corpus>> {
    corpus: C,
    size: usize,
    /// Orders of the epochs in use, at most two.
    epochs: HashMap<u64, Arc<Order>>,
    /// The number of the first batch after each epoch that has been looked at.
    ends: Vec<u64>,
}

impl<C: Borrow<Corpus>> Batches<C> {
    /// Batches of `size` sequences.
    pub fn new(corpus: C, size: usize) -> Self {
        Self { corpus, size: size.max(1), epochs: HashMap::new(), ends: Vec::new() }
    }

    /// Batch `number`, counted from 0. The last batch of an epoch may be smaller.
    ///
    /// # Errors
    /// Its tokens cannot be read.
    pub fn batch(&mut self, number: u64) -> Result<Batch, DataError> {
        let (order, sequences) = self.find(number);
        self.corpus.borrow().pack(order.of(sequences).iter().copied())
    }

    /// The order that batch `number` is of, and its sequences in it.
    fn find(&mut self, number: u64) -> (Arc<Order>, Range<usize>) {
        let mut known = self.ends.last().copied().unwrap_or(0);
        while known <= number {
            let count = self.order(self.ends.len() as u64).len().div_ceil(self.size) as u64;
            known += count.max(1);
            self.ends.push(known);
        }
        let epoch = self.ends.partition_point(|&end| end <= number);
        let first = epoch.checked_sub(1).map_or(0, |before| self.ends[before]);
        let begin = (number - first) as usize * self.size;
        let order = self.order(epoch as u64);
        let end = order.len().min(begin + self.size);
        (order, begin..end)
    }

    /// Passes over the data that `batches` batches make.
    pub fn epochs_of(&mut self, batches: u64) -> f64 {
        let count = self.order(0).len().div_ceil(self.size);
        batches as f64 / count.max(1) as f64
    }

    /// The order of an epoch; it is shared, so that the corpus can be read beside it.
    fn order(&mut self, epoch: u64) -> Arc<Order> {
        self.epochs.retain(|&e, _| e == epoch || e + 1 == epoch);
        let corpus = self.corpus.borrow();
        let order = self.epochs.entry(epoch).or_insert_with(|| Arc::new(corpus.sequences(epoch)));
        Arc::clone(order)
    }
}

impl<C: Borrow<Corpus>> BatchSource<Batch> for Batches<C> {
    fn get(&mut self, number: u64) -> Result<Batch, DataError> {
        self.batch(number)
    }
}

impl<C: Borrow<Corpus>> TextSource for Batches<C> {
    fn extent(&mut self, number: u64, block_tokens: usize) -> Extent {
        let (order, sequences) = self.find(number);
        let lengths = &self.corpus.borrow().lengths;
        Extent::of(order.of(sequences).iter().map(|&piece| lengths[piece as usize] as usize), block_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Document, Spool};
    use fourfold_kernels::backward::IGNORE;

    fn documents() -> Vec<Document> {
        (0..20).map(|d| Document::whole((0..3 + d % 7).map(|i| 100 * d + i).collect())).collect()
    }

    #[test]
    fn an_epoch_holds_every_token_once_and_never_mixes_documents() {
        let corpus = Corpus::new("d", documents(), 8, 1).unwrap();
        let mut batches = Batches::new(&corpus, 2);
        let count = corpus.sequences(0).len().div_ceil(2) as u64;
        let mut seen: Vec<u32> = Vec::new();
        for number in 0..count {
            let batch = batches.batch(number).unwrap();
            assert!(batch.ids.len() <= 16);
            for document in &batch.documents {
                assert!(batch.ids[document.clone()].windows(2).all(|w| w[1] == w[0] + 1));
                assert_eq!(batch.targets[document.end - 1], IGNORE);
            }
            assert_eq!(batches.extent(number, 8).tokens, batch.ids.len());
            seen.extend(&batch.ids);
        }
        seen.sort_unstable();
        let mut all: Vec<u32> = documents().into_iter().flat_map(|d| d.ids).collect();
        all.sort_unstable();
        // Pieces of one token teach nothing and are left out.
        let lost = all.iter().filter(|id| seen.binary_search(id).is_err()).count();
        assert_eq!(seen.len() + lost, all.len());
        assert_eq!(lost, documents().iter().filter(|d| d.ids.len() == 9).count());
    }

    #[test]
    fn order_depends_on_seed_and_epoch_alone() {
        let corpus = Corpus::new("d", documents(), 8, 1).unwrap();
        let all: Vec<Batch> = (0..30).map(|n| Batches::new(&corpus, 2).batch(n).unwrap()).collect();
        let mut forward = Batches::new(&corpus, 2);
        assert!((0..30).all(|n| forward.batch(n).unwrap() == all[n as usize]));
        assert!(forward.batch(2).unwrap() == all[2], "going back");
        let other = Corpus::new("d", documents(), 8, 2).unwrap();
        assert_ne!(Batches::new(&other, 2).batch(0).unwrap(), all[0]);
        assert_ne!(corpus.sequences(0), corpus.sequences(1));
    }

    /// The order is part of what a resumed run relies on: these are the batches of the first version.
    #[test]
    fn the_order_is_what_it_was() {
        let corpus = Corpus::new("d", documents(), 8, 1).unwrap();
        let mut batches = Batches::new(&corpus, 2);
        let firsts: Vec<Vec<u32>> = (0..3)
            .map(|n| {
                let batch = batches.batch(n).unwrap();
                batch.documents.iter().map(|d| batch.ids[d.start]).collect()
            })
            .collect();
        assert_eq!(firsts, FIRSTS);
    }

    const FIRSTS: [&[u32]; 3] = [&[1800, 700], &[600, 900], &[1600, 300]];

    #[test]
    fn batches_read_from_a_file_are_those_from_memory() {
        let mut documents = documents();
        documents[3].learned_from = 2;
        documents[6].given.push(4..7);
        let mut spool = Spool::new("spool".into(), tempfile::tempfile().unwrap());
        documents.iter().for_each(|d| spool.push(d).unwrap());
        let file = Corpus::new("d", spool.finish().unwrap(), 8, 1).unwrap();
        let memory = Corpus::new("d", documents, 8, 1).unwrap();
        let (mut a, mut b) = (Batches::new(&file, 2), Batches::new(&memory, 2));
        assert!((0..30).all(|n| a.batch(n).unwrap() == b.batch(n).unwrap()));
        let (a, b) = (file.in_order(3), memory.in_order(3));
        assert!((0..b.count()).all(|i| a.batch(i).unwrap() == b.batch(i).unwrap()));
    }

    #[test]
    fn prompts_are_given_and_completions_learned() {
        let mut document = Document::whole(vec![1, 2, 3, 4, 5, 6]);
        document.learned_from = 2;
        document.given.push(4..5);
        let corpus = Corpus::new("d", vec![document], 8, 0).unwrap();
        assert_eq!(corpus.in_order(1).batch(0).unwrap().targets, [IGNORE, 3, 4, IGNORE, 6, IGNORE]);
        assert!(Corpus::new("empty.txt", vec![], 8, 0).unwrap_err().to_string().contains("empty.txt"));
    }
}
