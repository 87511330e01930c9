//! Files to documents in tokens, which go to disk one by one.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result};
use fourfold_infer::{ChatTemplate, Tokenizer};
use fourfold_train::batch::{Batch, TextSource};
use fourfold_train::data::{Batches, Corpus, Documents, Spool, parse_record};
use fourfold_train::network::HeldOut;

use super::encode::RowEncoder;
use super::pieces::{PIECE, TextPieces};
use super::settings::Settings;

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
    template: Option<&ChatTemplate>,
    context: usize,
) -> Result<Data> {
    let (documents, held_out) = read(settings, tokenizer, template)?;
    let corpus = Corpus::new(&settings.data_name(), documents, context, settings.seed)?;
    let mut bytes = corpus.byte_len() as u64;
    let held_out: Box<dyn HeldOut<Batch>> = match held_out {
        Some(documents) if !documents.is_empty() => {
            let held_out = Corpus::new("the held-out text", documents, context, settings.seed)?;
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
    template: Option<&ChatTemplate>,
) -> Result<(Documents, Option<Documents>)> {
    let documents = |paths: &[PathBuf]| {
        let folder = &settings.output;
        let name = format!("{} (a file of tokens)", folder.display());
        let file = tempfile::tempfile_in(folder).with_context(|| name.clone())?;
        let rows = RowEncoder::new(tokenizer, template);
        let mut encoder = Encoder { tokenizer, rows, spool: Spool::new(name, file) };
        encoder.documents(paths)?;
        Ok::<_, Error>(encoder.spool.finish()?)
    };
    let learned = documents(&settings.data)?;
    if !settings.eval_data.is_empty() {
        return Ok((learned, Some(documents(&settings.eval_data)?)));
    }
    if settings.held_out == 0.0 {
        return Ok((learned, None));
    }
    let (learned, held_out) = learned.split(settings.held_out);
    Ok((learned, Some(held_out)))
}

/// Text to tokens, a document at a time.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    rows: RowEncoder<'a>,
    spool: Spool,
}

impl Encoder<'_> {
    fn documents(&mut self, paths: &[PathBuf]) -> Result<()> {
        for path in paths {
            if path.is_dir() {
                files_below(path)?.iter().try_for_each(|file| self.plain(file))?;
            } else if path.extension().is_some_and(|e| e == "jsonl") {
                self.jsonl(path)?;
            } else {
                self.plain(path)?;
            }
        }
        Ok(())
    }

    fn plain(&mut self, path: &Path) -> Result<()> {
        let name = || path.display().to_string();
        let mut pieces = TextPieces::new(BufReader::new(File::open(path).with_context(name)?), PIECE);
        while let Some(ids) = pieces.next(self.tokenizer).with_context(name)? {
            self.spool.extend(&ids)?;
        }
        self.spool.end();
        Ok(())
    }

    fn jsonl(&mut self, path: &Path) -> Result<()> {
        let name = path.display().to_string();
        let reader = BufReader::new(File::open(path).with_context(|| name.clone())?);
        for (number, line) in reader.lines().enumerate() {
            let place = || format!("{name}:{}", number + 1);
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            let row = parse_record(&name, number + 1, &line)?;
            for document in self.rows.documents(&row).with_context(place)? {
                self.spool.push(&document)?;
            }
        }
        Ok(())
    }
}

/// Every file below a directory, in order of name.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}
