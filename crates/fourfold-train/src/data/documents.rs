//! Documents in tokens, in a file: what stays in memory of a document is where it lies, and which of its tokens are given.
//!
//! Tokens are read where they are needed by positioned reads. A mapped file would count as the process's memory page by page.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::sync::Arc;

use super::DataError;

/// A document in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The first token that is learned; those before it are given. Tokens after it are all learned, but for `given`.
    pub learned_from: usize,
    /// More ranges that are given, not learned (a user's later turns).
    pub given: Vec<Range<usize>>,
}

impl Document {
    /// A document learned from beginning to end.
    pub fn whole(ids: Vec<u32>) -> Self {
        Self { ids, learned_from: 0, given: Vec::new() }
    }

    /// Whether token `i` is learned: every one but the first of its sequence is predicted.
    pub fn is_learned(&self, i: usize) -> bool {
        i >= self.learned_from && !self.given.iter().any(|g| g.contains(&i))
    }

    /// Whether there is anything to learn once the document is cut into sequences of `context` tokens.
    pub fn teaches(&self, context: usize) -> bool {
        let context = context.max(2);
        (self.learned_from..self.ids.len()).any(|i| i % context != 0 && self.is_learned(i))
    }
}

/// Where tokens lie.
#[derive(Debug)]
enum Tokens {
    Memory(Vec<u32>),
    File(File),
}

/// The tokens of all documents, one after the other.
#[derive(Debug)]
pub(super) struct Text {
    name: String,
    tokens: Tokens,
    /// Tokens that are not learned: ascending, none overlaps another.
    given: Vec<Range<u64>>,
}

impl Text {
    /// The tokens from `first` on.
    pub(super) fn read(&self, first: u64, ids: &mut [u32]) -> Result<(), DataError> {
        match &self.tokens {
            Tokens::Memory(all) => ids.copy_from_slice(&all[first as usize..][..ids.len()]),
            Tokens::File(file) => {
                let bytes = bytemuck::cast_slice_mut(ids);
                read_at(file, first * size_of::<u32>() as u64, bytes).map_err(|e| failed(&self.name, &e))?;
            }
        }
        Ok(())
    }

    /// The given ranges that reach into `range`.
    pub(super) fn given(&self, range: Range<u64>) -> &[Range<u64>] {
        let begin = self.given.partition_point(|g| g.end <= range.start);
        let end = self.given.partition_point(|g| g.start < range.end);
        &self.given[begin..end.max(begin)]
    }
}

/// Documents of one text, in order.
#[derive(Clone, Debug)]
pub struct Documents {
    pub(super) text: Arc<Text>,
    /// Tokens of the text.
    pub(super) places: Vec<Range<u64>>,
}

impl Documents {
    /// Number of documents.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The tokens of document `i`.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn ids(&self, i: usize) -> Result<Vec<u32>, DataError> {
        let place = &self.places[i];
        let mut ids = vec![0; (place.end - place.start) as usize];
        self.text.read(place.start, &mut ids)?;
        Ok(ids)
    }

    /// Document `i`.
    ///
    /// # Errors
    /// Its tokens cannot be read.
    pub fn document(&self, i: usize) -> Result<Document, DataError> {
        let place = &self.places[i];
        let local = |at: u64| (at.clamp(place.start, place.end) - place.start) as usize;
        let given = self.text.given(place.clone()).iter().map(|g| local(g.start)..local(g.end)).collect();
        Ok(Document { ids: self.ids(i)?, learned_from: 0, given })
    }

    /// Takes every `1/fraction`-th document out for evaluation, at least one; a single document gives its last part.
    pub fn split(self, fraction: f64) -> (Self, Self) {
        let Self { text, mut places } = self;
        let of = |places: Vec<Range<u64>>| Self { text: text.clone(), places };
        if places.len() < 2 {
            let mut held = places.clone();
            for (train, held) in places.iter_mut().zip(&mut held) {
                let cut = train.start + ((train.end - train.start) as f64 * (1.0 - fraction)) as u64;
                // A text of one token has nothing to predict.
                let cut = cut.min(train.end.saturating_sub(2)).max(train.start);
                (train.end, held.start) = (cut, cut);
            }
            return (of(places), of(held));
        }
        let every = (1.0 / fraction.clamp(1e-6, 0.5)).round() as usize;
        let last = places.len() - 1;
        let mut i = 0;
        let (held, train) = places.into_iter().partition(|_| {
            i += 1;
            (i - 1) % every == every - 1 || (last < every && i - 1 == last)
        });
        (of(train), of(held))
    }
}

impl From<Vec<Document>> for Documents {
    fn from(documents: Vec<Document>) -> Self {
        let mut index = Index::default();
        let mut all = Vec::new();
        for document in documents {
            all.extend_from_slice(&document.ids);
            index.end(all.len() as u64, document.learned_from, &document.given);
        }
        index.over("memory".to_owned(), Tokens::Memory(all))
    }
}

/// Writes the tokens of documents into a file, which is read again by [`Documents`].
#[derive(Debug)]
pub struct Spool {
    name: String,
    file: BufWriter<File>,
    written: u64,
    index: Index,
}

impl Spool {
    /// Into an empty file that can be written and read; `name` is what errors call it.
    pub fn new(name: String, file: File) -> Self {
        Self { name, file: BufWriter::with_capacity(1 << 16, file), written: 0, index: Index::default() }
    }

    /// Adds tokens to the document at hand.
    ///
    /// # Errors
    /// The file cannot be written: the disk is full.
    pub fn extend(&mut self, ids: &[u32]) -> Result<(), DataError> {
        self.written += ids.len() as u64;
        self.file.write_all(bytemuck::cast_slice(ids)).map_err(|e| failed(&self.name, &e))
    }

    /// Ends the document at hand, which is learned from beginning to end.
    pub fn end(&mut self) {
        self.index.end(self.written, 0, &[]);
    }

    /// Tokens of the document at hand.
    pub fn open_tokens(&self) -> u64 {
        self.written - self.index.begin
    }

    /// Leaves the document at hand out.
    pub fn discard(&mut self) {
        self.index.begin = self.written;
    }

    /// Adds a document.
    ///
    /// # Errors
    /// As [`Spool::extend`].
    pub fn push(&mut self, document: &Document) -> Result<(), DataError> {
        self.extend(&document.ids)?;
        self.index.end(self.written, document.learned_from, &document.given);
        Ok(())
    }

    /// Documents so far.
    pub fn len(&self) -> usize {
        self.index.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.index.places.is_empty()
    }

    /// All documents.
    ///
    /// # Errors
    /// As [`Spool::extend`].
    pub fn finish(self) -> Result<Documents, DataError> {
        let Self { name, file, index, .. } = self;
        let file = file.into_inner().map_err(|e| failed(&name, e.error()))?;
        Ok(index.over(name, Tokens::File(file)))
    }
}

/// Where documents lie, while they are written.
#[derive(Debug, Default)]
struct Index {
    places: Vec<Range<u64>>,
    given: Vec<Range<u64>>,
    /// Where the document at hand begins.
    begin: u64,
}

impl Index {
    /// Ends a document; `learned_from` and `given` are counted from its beginning.
    fn end(&mut self, end: u64, learned_from: usize, given: &[Range<usize>]) {
        let begin = std::mem::replace(&mut self.begin, end);
        let absolute = |i: usize| end.min(begin + i as u64);
        let known = self.given.len();
        let mut ranges: Vec<Range<u64>> = std::iter::once(&(0..learned_from))
            .chain(given)
            .map(|g| absolute(g.start)..absolute(g.end))
            .filter(|g| !g.is_empty())
            .collect();
        ranges.sort_by_key(|g| g.start);
        for range in ranges {
            match self.given[known..].last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => self.given.push(range),
            }
        }
        self.places.push(begin..end);
    }

    fn over(self, name: String, tokens: Tokens) -> Documents {
        let Self { mut places, mut given, .. } = self;
        places.shrink_to_fit();
        given.shrink_to_fit();
        Documents { text: Arc::new(Text { name, tokens, given }), places }
    }
}

fn failed(name: &str, error: &io::Error) -> DataError {
    DataError::Spool { file: name.to_owned(), reason: error.to_string() }
}

#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                offset += n as u64;
                out = &mut out[n..];
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_what_memory_does() {
        let mut documents: Vec<Document> = (0..9).map(|d| Document::whole((0..d * 40).collect())).collect();
        documents[3].learned_from = 7;
        documents[4].given = vec![9..20, 3..12, 50..60, 159..400];
        let mut spool = Spool::new("spool".into(), tempfile::tempfile().unwrap());
        documents.iter().for_each(|d| spool.push(d).unwrap());
        let (file, memory) = (spool.finish().unwrap(), Documents::from(documents.clone()));
        assert_eq!((&file.places, &file.text.given), (&memory.places, &memory.text.given));
        for (i, document) in documents.iter().enumerate() {
            assert_eq!(file.ids(i).unwrap(), document.ids);
            let again = file.document(i).unwrap();
            assert!((0..document.ids.len()).all(|t| again.is_learned(t) == document.is_learned(t)), "document {i}");
            let first = file.places[i].start;
            for token in 0..document.ids.len() {
                let at = first + token as u64;
                let given = token < document.learned_from || document.given.iter().any(|g| g.contains(&token));
                assert_eq!(file.text.given(at..at + 1).len(), usize::from(given), "document {i}, token {token}");
            }
        }
    }

    #[test]
    fn a_document_teaches_where_a_learned_token_follows_another_of_its_sequence() {
        let mut document = Document::whole((0..9).collect());
        document.learned_from = 8;
        assert!(document.teaches(16) && document.teaches(3));
        assert!(!document.teaches(8), "the last token is alone in its sequence");
        document.given.push(8..9);
        assert!(!document.teaches(16));
        assert!(!Document::whole(vec![1]).teaches(8) && !Document::default().teaches(8));
        let mut spool = Spool::new("spool".into(), tempfile::tempfile().unwrap());
        spool.extend(&[1]).unwrap();
        assert_eq!(spool.open_tokens(), 1);
        spool.discard();
        spool.push(&Document::whole(vec![2, 3])).unwrap();
        assert_eq!(spool.finish().unwrap().ids(0).unwrap(), [2, 3]);
        let (train, held) = Documents::from(vec![Document::whole((0..4).collect())]).split(0.05);
        assert_eq!((train.ids(0).unwrap().len(), held.ids(0).unwrap().len()), (2, 2));
    }

    #[test]
    fn held_out_documents_are_not_learned() {
        let documents: Vec<_> =
            (0..20).map(|d| Document::whole((0..3 + d % 7).map(|i| 100 * d + i).collect())).collect();
        let (train, held) = Documents::from(documents).split(0.1);
        assert_eq!((train.len(), held.len()), (18, 2));
        let all = |d: &Documents| (0..d.len()).map(|i| d.ids(i).unwrap()).collect::<Vec<_>>();
        assert!(all(&held).iter().all(|h| !all(&train).contains(h)));
        let mut one = Document::whole((0..100).collect());
        one.given.push(92..95);
        let (train, held) = Documents::from(vec![one]).split(0.1);
        assert_eq!((train.ids(0).unwrap().len(), held.ids(0).unwrap()[0]), (90, 90));
        assert_eq!(
            held.text.given(held.places[0].clone()),
            std::slice::from_ref(&(92..95)),
            "what is given stays where it is"
        );
    }

    #[test]
    fn a_file_that_is_cut_or_cannot_be_written_is_named() {
        let file = tempfile::tempfile().unwrap();
        let other = file.try_clone().unwrap();
        let mut spool = Spool::new("out/tokens".into(), file);
        spool.push(&Document::whole((0..100).collect())).unwrap();
        let documents = spool.finish().unwrap();
        other.set_len(80).unwrap();
        assert!(documents.ids(0).unwrap_err().to_string().starts_with("out/tokens: "));
        let place = tempfile::NamedTempFile::new().unwrap();
        let mut spool = Spool::new("out/tokens".into(), File::open(place.path()).unwrap());
        spool.extend(&[1, 2]).unwrap();
        spool.end();
        assert!(spool.finish().unwrap_err().to_string().starts_with("out/tokens: "));
    }
}
