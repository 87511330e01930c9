//! Files to documents in tokens.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use fourfold_infer::{ChatTemplate, Message, Role, Tokenizer};
use fourfold_train::batch::Batch;
use fourfold_train::data::{Batches, Corpus, Document, Record, parse_record};
use fourfold_train::network::BatchSource;

use super::settings::Settings;

/// What a run learns from and is measured on.
pub struct Data {
    /// Tokens of a pass over the data.
    pub tokens_per_epoch: usize,
    /// Batches of a pass over the data.
    pub per_epoch: u64,
    /// What is learned.
    pub batches: Box<dyn BatchSource<Batch>>,
    /// What is measured on.
    pub held_out: Vec<Batch>,
}

/// Documents in tokens, packed.
pub fn batches(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    context: usize,
) -> Result<Data> {
    let (documents, held_out) = read(settings, tokenizer, template)?;
    let corpus = Corpus::new(&settings.data_name(), documents, context, settings.seed)?;
    let held_out = match held_out.is_empty() {
        true => Vec::new(),
        false => Corpus::new("the held-out text", held_out, context, settings.seed)?.in_order(settings.batch_size),
    };
    let tokens_per_epoch = corpus.tokens();
    let mut batches = Batches::new(corpus, settings.batch_size);
    let per_epoch = (1.0 / batches.epochs_of(1)).round() as u64;
    Ok(Data { tokens_per_epoch, per_epoch, batches: Box::new(batches), held_out })
}

/// The documents to learn, and those to measure on.
fn read(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<(Vec<Document>, Vec<Document>)> {
    let encoder = Encoder { tokenizer, template };
    let documents = encoder.documents(&settings.data)?;
    if !settings.eval_data.is_empty() {
        return Ok((documents, encoder.documents(&settings.eval_data)?));
    }
    if settings.held_out == 0.0 {
        return Ok((documents, Vec::new()));
    }
    Ok(Corpus::split(documents, settings.held_out))
}

/// Text to tokens.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
}

impl Encoder<'_> {
    fn documents(&self, paths: &[PathBuf]) -> Result<Vec<Document>> {
        let mut documents = Vec::new();
        for path in paths {
            if path.is_dir() {
                for file in files_below(path)? {
                    documents.push(self.plain(&file)?);
                }
            } else if path.extension().is_some_and(|e| e == "jsonl") {
                self.jsonl(path, &mut documents)?;
            } else {
                documents.push(self.plain(path)?);
            }
        }
        Ok(documents)
    }

    fn plain(&self, path: &Path) -> Result<Document> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let ids = self.tokenizer.encode_text(&text).with_context(|| path.display().to_string())?;
        Ok(Document::whole(ids))
    }

    fn jsonl(&self, path: &Path, documents: &mut Vec<Document>) -> Result<()> {
        let name = path.display().to_string();
        let reader = BufReader::new(File::open(path).with_context(|| name.clone())?);
        for (number, line) in reader.lines().enumerate() {
            let place = || format!("{name}:{}", number + 1);
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            documents.push(match parse_record(&name, number + 1, &line)? {
                Record::Text(text) => Document::whole(self.tokenizer.encode_text(&text)?),
                Record::Completion { prompt, completion } => {
                    let mut ids = self.tokenizer.encode_text(&prompt)?;
                    let learned_from = ids.len();
                    ids.extend(self.tokenizer.encode_fragment(&completion)?);
                    Document { ids, learned_from, given: Vec::new() }
                }
                Record::Chat(messages) => self.conversation(&messages).with_context(place)?,
            });
        }
        Ok(())
    }

    /// A conversation through the model's template: each answer is learned, everything between is given.
    fn conversation(&self, messages: &[fourfold_train::data::Message]) -> Result<Document> {
        let Some(template) = self.template else { bail!("conversations need a model with a chat template") };
        let messages = messages.iter().map(|m| Ok(Message { role: role(&m.role)?, content: m.content.clone() }));
        let messages: Vec<Message> = messages.collect::<Result<_>>()?;
        let mut document = Document::default();
        let mut done = String::new();
        for i in (0..messages.len()).filter(|&i| messages[i].role == Role::Assistant) {
            let open = template.render(&messages[..i], true)?;
            let closed = template.render(&messages[..=i], false)?;
            let (Some(given), Some(learned)) = (open.strip_prefix(&done), closed.strip_prefix(&open)) else {
                bail!("the chat template writes an answer differently once others follow")
            };
            let begin = document.ids.len();
            document.ids.extend(self.tokenizer.encode_fragment(given)?);
            document.given.push(begin..document.ids.len());
            document.ids.extend(self.tokenizer.encode_fragment(learned)?);
            done = closed;
        }
        Ok(document)
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

fn role(name: &str) -> Result<Role> {
    Ok(match name {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => bail!("role `{other}`: there are system, user, assistant"),
    })
}
