//! From text to batches: documents in tokens, held-out ones apart, packed into sequences, in an order that depends on seed and
//! epoch alone.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;

use crate::batch::Batch;
use crate::network::BatchSource;
use crate::random::{Stream, shuffled};

/// Why data cannot be learned from.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DataError {
    /// A line of a JSONL file is not what it should be.
    #[error("{file}:{line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// Its line, counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing to learn.
    #[error("{file}: {reason}")]
    Empty {
        /// The file, or several.
        file: String,
        /// What is missing.
        reason: String,
    },
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// One line of a JSONL file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// `{"text": …}`: every token is learned.
    Text(String),
    /// `{"prompt": …, "completion": …}`: the completion is learned.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// `{"messages": [{"role": …, "content": …}, …]}`: what the assistant says is learned.
    Chat(Vec<Message>),
}

/// Reads one line.
///
/// # Errors
/// It is no JSON object, or has none of the known sets of keys; the error names file and line.
pub fn parse_record(file: &str, line: usize, text: &str) -> Result<Record, DataError> {
    let fail = |reason: String| DataError::Line { file: file.to_owned(), line, reason };
    let value: Value = serde_json::from_str(text).map_err(|e| fail(e.to_string()))?;
    let object = value.as_object().ok_or_else(|| fail("not a JSON object".to_owned()))?;
    let string = |value: &Value, key: &str| {
        value
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or_else(|| fail(format!("`{key}` is not a string")))
    };
    if object.contains_key("messages") {
        let messages = value["messages"].as_array().ok_or_else(|| fail("`messages` is not a list".to_owned()))?;
        let messages: Result<Vec<_>, _> =
            messages.iter().map(|m| Ok(Message { role: string(m, "role")?, content: string(m, "content")? })).collect();
        return messages.map(Record::Chat);
    }
    if object.contains_key("prompt") || object.contains_key("completion") {
        return Ok(Record::Completion { prompt: string(&value, "prompt")?, completion: string(&value, "completion")? });
    }
    if object.contains_key("text") {
        return string(&value, "text").map(Record::Text);
    }
    Err(fail("none of `text`, `prompt` and `completion`, `messages`".to_owned()))
}

/// A document in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The first token that is learned; those before it are given. Tokens after it are all learned, but for `given`.
    pub learned_from: usize,
    /// More ranges that are given, not learned (a user's later turns).
    pub given: Vec<std::ops::Range<usize>>,
}

impl Document {
    /// A document learned from beginning to end.
    pub fn whole(ids: Vec<u32>) -> Self {
        Self { ids, learned_from: 0, given: Vec::new() }
    }

    fn learns(&self, i: usize) -> bool {
        i >= self.learned_from && !self.given.iter().any(|g| g.contains(&i))
    }
}

/// A piece of a document that fits the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    document: usize,
    begin: usize,
    end: usize,
}

/// Documents cut and packed for training.
#[derive(Clone, Debug)]
pub struct Corpus {
    documents: Vec<Document>,
    pieces: Vec<Piece>,
    context: usize,
    seed: u64,
}

impl Corpus {
    /// Cuts documents into pieces of at most `context` tokens. Pieces with nothing to learn are left out.
    ///
    /// # Errors
    /// Nothing is left; `name` is what the error calls the data.
    pub fn new(name: &str, documents: Vec<Document>, context: usize, seed: u64) -> Result<Self, DataError> {
        let context = context.max(2);
        let mut pieces = Vec::new();
        for (document, d) in documents.iter().enumerate() {
            for begin in (0..d.ids.len()).step_by(context) {
                let end = d.ids.len().min(begin + context);
                if (begin + 1..end).any(|i| d.learns(i)) {
                    pieces.push(Piece { document, begin, end });
                }
            }
        }
        if pieces.is_empty() {
            return Err(DataError::Empty { file: name.to_owned(), reason: "no text of two tokens or more".to_owned() });
        }
        Ok(Self { documents, pieces, context, seed })
    }

    /// Takes every `1/fraction`-th document out for evaluation, at least one; a single document gives its last part.
    pub fn split(mut documents: Vec<Document>, fraction: f64) -> (Vec<Document>, Vec<Document>) {
        if documents.len() < 2 {
            let mut held = documents.clone();
            for (train, held) in documents.iter_mut().zip(&mut held) {
                let cut = ((train.ids.len() as f64) * (1.0 - fraction)) as usize;
                held.ids.drain(..cut);
                held.learned_from = held.learned_from.saturating_sub(cut);
                train.ids.truncate(cut);
            }
            return (documents, held);
        }
        let every = (1.0 / fraction.clamp(1e-6, 0.5)).round() as usize;
        let last = documents.len() - 1;
        let mut i = 0;
        let (held, train): (Vec<_>, Vec<_>) = documents.into_iter().partition(|_| {
            i += 1;
            (i - 1) % every == every - 1 || (last < every && i - 1 == last)
        });
        (train, held)
    }

    /// Tokens of all pieces.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|p| p.end - p.begin).sum()
    }

    /// Longest sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The sequences of one pass over the data: pieces in shuffled order, as many to a sequence as fit.
    fn sequences(&self, epoch: u64) -> Vec<Vec<Piece>> {
        let order = shuffled(self.pieces.len(), Stream::new(self.seed, epoch, 0x0da7a));
        let mut sequences: Vec<Vec<Piece>> = Vec::new();
        let mut room = 0;
        for piece in order.into_iter().map(|i| self.pieces[i]) {
            let len = piece.end - piece.begin;
            match sequences.last_mut() {
                Some(sequence) if len <= room => sequence.push(piece),
                _ => {
                    sequences.push(vec![piece]);
                    room = self.context;
                }
            }
            room -= len;
        }
        sequences
    }

    fn pack<'a>(&self, sequences: impl IntoIterator<Item = &'a Vec<Piece>>) -> Batch {
        let mut batch = Batch::default();
        for piece in sequences.into_iter().flatten() {
            let document = &self.documents[piece.document];
            batch.push(&document.ids[piece.begin..piece.end], |i| document.learns(piece.begin + i));
        }
        batch
    }

    /// All pieces in order, `size` sequences a batch: for evaluation.
    pub fn in_order(&self, size: usize) -> Vec<Batch> {
        let sequences: Vec<Vec<Piece>> = self.pieces.iter().map(|&p| vec![p]).collect();
        sequences.chunks(size.max(1)).map(|chunk| self.pack(chunk)).collect()
    }
}

/// Batches by number, the same for the same seed.
pub struct Batches<C: Borrow<Corpus>> {
    corpus: C,
    size: usize,
    /// Sequences of the epochs in use, at most two.
    epochs: HashMap<u64, Arc<Vec<Vec<Piece>>>>,
    per_epoch: Vec<u64>,
}

impl<C: Borrow<Corpus>> Batches<C> {
    /// Batches of `size` sequences.
    pub fn new(corpus: C, size: usize) -> Self {
        Self { corpus, size: size.max(1), epochs: HashMap::new(), per_epoch: Vec::new() }
    }

    /// Batch `number`, counted from 0. The last batch of an epoch may be smaller.
    pub fn batch(&mut self, number: u64) -> Batch {
        let (mut epoch, mut first) = (0u64, 0u64);
        loop {
            if self.per_epoch.len() as u64 <= epoch {
                let count = self.sequences(epoch).len().div_ceil(self.size) as u64;
                self.per_epoch.push(count.max(1));
            }
            let count = self.per_epoch[epoch as usize];
            if number < first + count {
                break;
            }
            first += count;
            epoch += 1;
        }
        let begin = (number - first) as usize * self.size;
        let sequences = self.sequences(epoch);
        let end = sequences.len().min(begin + self.size);
        self.corpus.borrow().pack(&sequences[begin..end])
    }

    /// Passes over the data that `batches` batches make.
    pub fn epochs_of(&mut self, batches: u64) -> f64 {
        let count = self.sequences(0).len().div_ceil(self.size);
        batches as f64 / count.max(1) as f64
    }

    /// Sequences of an epoch; they are shared, so that the corpus can be read beside them.
    fn sequences(&mut self, epoch: u64) -> Arc<Vec<Vec<Piece>>> {
        self.epochs.retain(|&e, _| e == epoch || e + 1 == epoch);
        let corpus = self.corpus.borrow();
        let sequences = self.epochs.entry(epoch).or_insert_with(|| Arc::new(corpus.sequences(epoch)));
        Arc::clone(sequences)
    }
}

impl<C: Borrow<Corpus>> BatchSource<Batch> for Batches<C> {
    fn get(&mut self, number: u64) -> Result<Batch, DataError> {
        Ok(self.batch(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let batch = batches.batch(number);
            assert!(batch.ids.len() <= 16);
            for document in &batch.documents {
                assert!(batch.ids[document.clone()].windows(2).all(|w| w[1] == w[0] + 1));
                assert_eq!(batch.targets[document.end - 1], IGNORE);
            }
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
        let all: Vec<Batch> = (0..30).map(|n| Batches::new(&corpus, 2).batch(n)).collect();
        let mut forward = Batches::new(&corpus, 2);
        assert!((0..30).all(|n| forward.batch(n) == all[n as usize]));
        assert!(forward.batch(2) == all[2], "going back");
        let other = Corpus::new("d", documents(), 8, 2).unwrap();
        assert_ne!(Batches::new(&other, 2).batch(0), all[0]);
        assert_ne!(corpus.sequences(0), corpus.sequences(1));
    }

    #[test]
    fn prompts_are_given_and_completions_learned() {
        let mut document = Document::whole(vec![1, 2, 3, 4, 5, 6]);
        document.learned_from = 2;
        document.given.push(4..5);
        let corpus = Corpus::new("d", vec![document], 8, 0).unwrap();
        assert_eq!(corpus.in_order(1)[0].targets, [IGNORE, 3, 4, IGNORE, 6, IGNORE]);
    }

    #[test]
    fn held_out_documents_are_not_learned() {
        let (train, held) = Corpus::split(documents(), 0.1);
        assert_eq!((train.len(), held.len()), (18, 2));
        assert!(held.iter().all(|h| !train.contains(h)));
        let (train, held) = Corpus::split(vec![Document::whole((0..100).collect())], 0.1);
        assert_eq!((train[0].ids.len(), held[0].ids[0]), (90, 90));
    }

    #[test]
    fn malformed_lines_are_named() {
        let reason = |text: &str| parse_record("a.jsonl", 7, text).unwrap_err().to_string();
        assert!(reason("{\"text\": ").starts_with("a.jsonl:7: "));
        assert!(reason("[1]").contains("not a JSON object"));
        assert!(reason("{\"text\": 3}").contains("`text` is not a string"));
        assert!(reason("{\"prompt\": \"a\"}").contains("`completion`"));
        assert!(reason("{\"x\": 1}").contains("none of"));
        assert_eq!(parse_record("a", 1, "{\"text\": \"hi\"}").unwrap(), Record::Text("hi".into()));
        assert!(Corpus::new("empty.txt", vec![], 8, 0).unwrap_err().to_string().contains("empty.txt"));
    }
}
