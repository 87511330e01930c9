//! Files to documents in tokens, which go to disk one by one.

use anyhow::{Context as _, Result, bail};
use fourfold_infer::Tokenizer;
use fourfold_train::batch::{Batch, TextSource};
use fourfold_train::data::rows::Rows;
use fourfold_train::data::{Batches, Corpus, DataError, Document, Documents, Record, Seen, Source, Spool};
use fourfold_train::network::HeldOut;

use super::encode::{RowEncoder, Template};
use super::pieces::{PIECE, TextPieces};
use super::settings::{Settings, name_of};
use crate::context::Context;
use crate::data_files::{DataFile, Opened, files, open_as};
use std::path::PathBuf;

/// What a run learns from and is measured on.
pub struct Data {
    /// Tokens of a pass over the data.
    pub tokens_per_epoch: usize,
    /// Batches of a pass over the data.
    pub per_epoch: u64,
    /// Bytes of it that stay in memory.
    pub bytes: u64,
    /// What is learned.
    pub batches: Box<dyn TextSource>,
    /// What is measured on.
    pub held_out: Box<dyn HeldOut<Batch>>,
}

/// Documents in tokens, packed. The tokens are in a file without a name in the output directory.
pub fn batches(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: &Template,
    length: usize,
    context: &Context,
) -> Result<Data> {
    let (documents, held_out) = read(settings, tokenizer, template, length, context)?;
    let corpus = Corpus::new(&settings.data_name(), documents, length, settings.seed)?;
    let mut bytes = corpus.byte_len() as u64;
    let held_out: Box<dyn HeldOut<Batch>> = match held_out {
        Some(documents) if !documents.is_empty() => {
            let held_out = Corpus::new("the held-out text", documents, length, settings.seed)?;
            bytes += held_out.byte_len() as u64;
            Box::new(held_out.in_order(settings.batch_size))
        }
        _ => Box::new(Vec::new()),
    };
    let tokens_per_epoch = corpus.tokens();
    let mut batches = Batches::new(corpus, settings.batch_size);
    let per_epoch = (1.0 / batches.epochs_of(1)).round() as u64;
    Ok(Data { tokens_per_epoch, per_epoch, bytes, batches: Box::new(batches), held_out })
}

/// The documents to learn, and those to measure on.
fn read(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: &Template,
    length: usize,
    context: &Context,
) -> Result<(Documents, Option<Documents>)> {
    let documents = |paths: &[PathBuf]| {
        let folder = &settings.output;
        let name = format!("{} (a file of tokens)", folder.display());
        let file = tempfile::tempfile_in(folder).with_context(|| name.clone())?;
        let mut encoder = Encoder::new(settings, tokenizer, template, length, Spool::new(name, file));
        encoder.documents(paths)?;
        encoder.seen.remark(context);
        if let Some(unwritten) = encoder.rows.unwritten() {
            context.remark(&unwritten);
        }
        Ok::<_, anyhow::Error>(encoder.spool.finish()?)
    };
    let learned = documents(&settings.data)?;
    if !settings.eval_data.is_empty() {
        return Ok((learned, Some(documents(&settings.eval_data)?)));
    }
    if settings.held_out == 0.0 {
        return Ok((learned, None));
    }
    let (learned, held_out) = learned.split(settings.held_out);
    if learned.len() == 1 && held_out.len() == 1 {
        // One document was cut in two, which may leave nothing to learn in one of them.
        for part in [&learned, &held_out] {
            if !part.document(0)?.teaches(length) {
                bail!(
                    "{}: one text with something to learn, and no part of it can be kept for measuring: --held-out 0 learns all of it, \
                     --eval-data FILE measures on another",
                    settings.data_name()
                );
            }
        }
    }
    Ok((learned, Some(held_out)))
}

/// The first document with something to learn, what its tokens came from and how it was read.
pub fn first(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: &Template,
    length: usize,
) -> Result<(String, Document)> {
    let spool = Spool::new("a temporary file of tokens".to_owned(), tempfile::tempfile()?);
    let mut encoder = Encoder::new(settings, tokenizer, template, length, spool);
    encoder.only_first = true;
    encoder.documents(&settings.data)?;
    let place = encoder.place.clone();
    Ok((place, encoder.spool.finish()?.document(0)?))
}

/// Text to tokens, a document at a time.
struct Encoder<'a> {
    settings: &'a Settings,
    tokenizer: &'a Tokenizer,
    rows: RowEncoder<'a>,
    /// Tokens of a sequence.
    length: usize,
    spool: Spool,
    seen: Account,
    only_first: bool,
    /// Where the last document is from.
    place: String,
}

impl<'a> Encoder<'a> {
    fn new(
        settings: &'a Settings,
        tokenizer: &'a Tokenizer,
        template: &'a Template,
        length: usize,
        spool: Spool,
    ) -> Self {
        let rows = RowEncoder::new(tokenizer, template);
        let (seen, place) = (Account::default(), String::new());
        Self { settings, tokenizer, rows, length, spool, seen, only_first: false, place }
    }

    fn is_done(&self) -> bool {
        self.only_first && !self.spool.is_empty()
    }

    fn documents(&mut self, paths: &[PathBuf]) -> Result<()> {
        let (files, hidden) = files(paths)?;
        self.seen.hidden += hidden;
        for file in &files {
            if self.is_done() {
                break;
            }
            self.file(file)?;
        }
        if self.spool.is_empty() {
            let reason = "no row has an answer to learn".to_owned();
            return Err(DataError::Empty { file: name_of(paths), reason }.into());
        }
        Ok(())
    }

    fn file(&mut self, file: &DataFile) -> Result<()> {
        let name = file.path.display().to_string();
        match open_as(file, self.settings.data_format, &self.settings.columns)? {
            Opened::Text(source, is_json) => {
                self.seen.json_as_text += u64::from(is_json);
                self.seen.marks += u64::from(source.has_mark());
                self.plain(&name, source)
            }
            Opened::Rows(rows, has_mark) => {
                self.seen.marks += u64::from(has_mark);
                self.rows(&name, rows)
            }
        }
    }

    fn plain(&mut self, name: &str, source: Source<'_>) -> Result<()> {
        let mut pieces = TextPieces::new(source, PIECE);
        while let Some(ids) = pieces.next(self.tokenizer).with_context(|| name.to_owned())? {
            self.spool.extend(&ids)?;
            if self.only_first {
                break;
            }
        }
        let returns = pieces.source().carriage_returns();
        self.seen.carriage_returns += u64::from(returns > 0);
        if self.spool.open_tokens() < 2 {
            self.seen.drop(name.to_owned());
            self.spool.discard();
        } else {
            self.place = format!("{name}, a plain text");
            self.spool.end();
        }
        Ok(())
    }

    fn rows(&mut self, name: &str, rows: Rows<'_>) -> Result<()> {
        for row in rows {
            let row = row?;
            let record = self.settings.columns.record(name, &row, &mut self.seen.rows)?;
            let place = || format!("{name}:{}", row.line);
            let documents =
                if is_empty(&record) { Vec::new() } else { self.rows.documents(&record).with_context(place)? };
            let before = self.spool.len();
            for document in documents.iter().filter(|document| document.teaches(self.length)) {
                self.spool.push(document)?;
            }
            self.seen.rows_read += 1;
            if self.spool.len() == before {
                self.seen.drop(place());
            }
            if self.is_done() {
                self.place = format!("{}, {}", place(), self.rows.describe(&record));
                break;
            }
        }
        Ok(())
    }
}

/// Whether a row has no answer: not even its end is learned then.
fn is_empty(record: &Record) -> bool {
    match record {
        Record::Text(text) => text.is_empty(),
        Record::Completion { completion, .. } => completion.trim().is_empty(),
        Record::Instruction(instruction) => instruction.output.trim().is_empty(),
        Record::Chat(conversation) => {
            let turns = conversation.messages.iter().enumerate();
            !turns.into_iter().any(|(i, turn)| turn["role"] == "assistant" && !conversation.given.contains(&i))
        }
    }
}

/// What was found in data files besides what is learned.
#[derive(Default)]
struct Account {
    rows: Seen,
    rows_read: u64,
    /// Rows and files with nothing to learn, and the first of them.
    dropped: u64,
    first_dropped: String,
    hidden: u64,
    marks: u64,
    carriage_returns: u64,
    json_as_text: u64,
}

impl Account {
    fn drop(&mut self, place: String) {
        if self.dropped == 0 {
            self.first_dropped = place;
        }
        self.dropped += 1;
    }

    /// Says what a user might not expect.
    fn remark(&self, context: &Context) {
        let layouts: Vec<String> = self.rows.layouts.iter().map(|(name, n)| format!("{n} of {name}")).collect();
        match layouts.len() {
            0 => {}
            1 => context.remark(&format!("rows: {}", layouts.join(", "))),
            n => context.remark(&format!("rows of {n} layouts, each learned as its own: {}", layouts.join(", "))),
        }
        if self.dropped > 0 {
            let of = if self.rows_read > 0 { format!(" of {} rows", self.rows_read) } else { String::new() };
            let (n, place) = (self.dropped, &self.first_dropped);
            context.remark(&format!("{n}{of} have nothing to learn and are left out, the first: {place}"));
        }
        if !self.rows.unread.is_empty() {
            let columns: Vec<String> = self.rows.unread.iter().map(|(name, n)| format!("{name} ({n} rows)")).collect();
            context.remark(&format!("columns that are not read: {}", columns.join(", ")));
        }
        if self.marks > 0 {
            context.remark(&format!("{} begin with a byte-order mark, which is left out", count(self.marks, "file")));
        }
        if self.carriage_returns > 0 {
            let files = count(self.carriage_returns, "text");
            context.remark(&format!("{files} with line ends CR LF: learned as LF"));
        }
        if self.json_as_text > 0 {
            let files = count(self.json_as_text, "JSON file");
            context.remark(&format!("{files} in a directory, with no layout of rows: learned as plain text"));
        }
        if self.hidden > 0 {
            context.remark(&format!("{} (.*) left out", count(self.hidden, "hidden file")));
        }
    }
}

fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
