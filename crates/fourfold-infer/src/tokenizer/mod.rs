//! Text to token ids and back, over the `tokenizers` crate.

mod bounds;
mod bytes;
mod charsmap;
mod class;
mod detokenizer;
mod pattern;
mod pipeline;
mod settings;

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, ModelWrapper};

use self::bounds::Parts;
pub use self::bytes::TokenBytes;
use self::class::Class;
pub use self::detokenizer::Detokenizer;
use self::pipeline::{Decoding, Inner, Normalizing, Splitting};
pub use self::settings::{Around, TokenizerSettings};
use crate::{InferError, guarded};

/// A model's tokenizer, and the ids that begin and end its texts.
pub struct Tokenizer {
    inner: Inner,
    /// What `tokenizer.json` says of all but the model.
    parts: Parts,
    /// Put before a text.
    prefix: Vec<u32>,
    /// Put after a text.
    suffix: Vec<u32>,
    /// The token that ends a text, where one is named.
    eos: Option<u32>,
    /// Rows of the model's embedding, where a model is known.
    rows: Option<usize>,
    /// Whether the decoder joins byte tokens to text.
    joins_bytes: bool,
    /// Whether a text's beginning is encoded otherwise than its middle (SentencePiece's space in front).
    marks_beginning: bool,
    /// What the files ask for and is done otherwise.
    remarks: Vec<String>,
    /// The token that `tokenizer.json` pads batches with.
    padding: Option<String>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` file.
    ///
    /// # Errors
    /// The file cannot be read, or is not a tokenizer.
    pub fn from_file(path: &Path) -> Result<Self, InferError> {
        let named = |e: &dyn std::fmt::Display| InferError::Tokenizer(format!("{}: {e}", path.display()));
        let text = std::fs::read(path).map_err(|e| named(&e))?;
        Self::from_bytes(&text).map_err(|e| match e {
            InferError::Tokenizer(reason) => named(&reason),
            other => other,
        })
    }

    /// Parses the text of a `tokenizer.json`. Its own post-processor says what is put around a text.
    ///
    /// # Errors
    /// It is not a tokenizer.
    pub fn from_bytes(json: &[u8]) -> Result<Self, InferError> {
        let parts = bounds::check(json).map_err(InferError::Tokenizer)?;
        let mut inner = library(|| Inner::from_bytes(json))?;
        let mut remarks = Vec::new();
        // A file may ask for merges that are left out by chance, meant for training.
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some_and(|share| share != 0.0)
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(ModelWrapper::BPE(bpe));
            remarks.push("tokenizer.json: the model's dropout is left out: no merge is skipped by chance".to_owned());
        }
        // A file may ask for truncation or padding, meant for training batches.
        library(|| inner.with_truncation(None).map(|_| ()))?;
        let padding = inner.get_padding().map(|padding| padding.pad_token.clone());
        inner.with_padding(None);
        let joins_bytes = parts.decoder.to_string().contains("\"ByteFallback\"");
        let mut tokenizer = Self {
            inner,
            parts,
            prefix: Vec::new(),
            suffix: Vec::new(),
            eos: None,
            rows: None,
            joins_bytes,
            marks_beginning: false,
            remarks,
            padding,
        };
        (tokenizer.prefix, tokenizer.suffix) = tokenizer.processed()?;
        tokenizer.marks_beginning =
            tokenizer.after_newline("a")?.is_some_and(|ids| tokenizer.ids("a").ok() != Some(ids));
        Ok(tokenizer)
    }

    /// Adds the tokens that the files beside `tokenizer.json` name, and obeys what they say of the tokens around a text:
    /// `add_bos_token` and `add_eos_token` go before the post-processor of `tokenizer.json`.
    ///
    /// # Errors
    /// The files contradict `tokenizer.json`.
    pub fn with_settings(mut self, settings: &TokenizerSettings) -> Result<Self, InferError> {
        let refused = |key: &str, reason: String| InferError::TokenizerConfig { key: key.to_owned(), reason };
        self.inner.set_encode_special_tokens(settings.split_special_tokens);
        let class = self.obey_class(settings)?;
        let is_bpe = matches!(self.inner.get_model(), ModelWrapper::BPE(_));
        if settings.cleans_spaces && !is_bpe {
            let reason = "true is not done for a model other than BPE, whose decoded text it changes: set it to false";
            return Err(refused("clean_up_tokenization_spaces", reason.to_owned()));
        }
        let known = self.inner.get_added_vocabulary().get_added_tokens_decoder().clone();
        let count = self.vocab_size();
        if let Some(token) = &self.padding
            && !settings.keys.iter().any(|key| key == "pad_token")
            && self.token_to_id(token).is_none()
        {
            let token = AddedToken::from(token.clone(), true);
            library(|| Ok(self.inner.add_tokens(&[token])))?;
        }
        for (id, token) in &settings.added {
            // As transformers does: a token that stands there with the same properties is not added again.
            let same = known.values().any(|k| k == token || id.is_none() && k.content == token.content);
            if !same {
                library(|| Ok(self.inner.add_tokens(std::slice::from_ref(token))))?;
            }
            let found = self.inner.token_to_id(&token.content);
            if let Some(id) = id
                && found != Some(*id)
            {
                let found = found.map_or_else(|| "none".to_owned(), |f| f.to_string());
                let reason = format!("gives {:?} the id {id}, tokenizer.json gives it {found}", token.content);
                return Err(refused("the list of added tokens", reason));
            }
        }
        // A class that makes the tokenizer anew has the tokens that it is told of, and its own.
        let listed: HashSet<&str> = settings.added.iter().map(|(_, token)| token.content.as_str()).collect();
        let is_remade = settings.lists_added && !class.tokens().is_empty();
        let unlisted = known.values().find(|token| is_remade && !listed.contains(token.content.as_str()));
        let is_missing = |(key, token): &&(&str, &str)| {
            !settings.keys.iter().any(|known| known == key) && self.token_to_id(token).is_none()
        };
        let own = class.tokens().iter().find(is_missing).filter(|_| self.vocab_size() > count);
        if let Some(token) = unlisted {
            self.remarks.push(format!(
                "tokenizer_config.json: added_tokens_decoder lacks {:?} of tokenizer.json, which is kept: transformers 5 drops it",
                token.content
            ));
        }
        if let Some((_, token)) = own {
            self.remarks.push(format!(
                "tokenizer_config.json: transformers 5 adds the token {token:?} of its own, so that tokens which tokenizer.json \
                 lacks have other ids there"
            ));
        }
        let id_of = |text: &Option<String>| text.as_deref().and_then(|t| self.inner.token_to_id(t));
        let bos = id_of(&settings.bos).or(settings.bos_id);
        self.eos = id_of(&settings.eos).or(settings.eos_id);
        if let Some(around) = settings.around {
            self.prefix = bos.filter(|_| around.bos).into_iter().collect();
            self.suffix = self.eos.filter(|_| around.eos).into_iter().collect();
        }
        Ok(self)
    }

    /// Takes over what the class of transformers changes by a key, and remarks what it does otherwise than `tokenizer.json` says.
    fn obey_class(&mut self, settings: &TokenizerSettings) -> Result<Class, InferError> {
        let is_byte_level = [&self.parts.pre_tokenizer, &self.parts.decoder, &self.parts.post_processor]
            .iter()
            .any(|part| part.to_string().contains("\"ByteLevel\""));
        let class = Class::of(settings.class.as_deref(), settings.model_type.as_deref(), is_byte_level);
        let (space, legacy) = (settings.add_prefix_space, settings.legacy);
        if let Some(parts) = class.with_space(&self.parts, space, legacy) {
            self.inner.with_normalizer(part::<Normalizing>(&parts.normalizer)?);
            self.inner.with_pre_tokenizer(part::<Splitting>(&parts.pre_tokenizer)?);
            self.inner.with_decoder(part::<Decoding>(&parts.decoder)?);
            self.parts = parts;
        }
        let difference = library(|| Ok(class.difference(&self.parts, self.inner.get_model(), space, legacy)))?;
        self.remarks.extend(difference.map(|what| format!("tokenizer_config.json: {what}")));
        self.remarks.extend(settings.remarks.iter().map(|remark| format!("tokenizer_config.json: {remark}")));
        self.marks_beginning = self.after_newline("a")?.is_some_and(|ids| self.ids("a").ok() != Some(ids));
        Ok(class)
    }

    /// What the files ask for and is done otherwise, or is done otherwise by transformers: for the person to know.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Names the token that [`Tokenizer::encode_text`] puts first; `None` when the model's texts have none.
    pub fn with_bos(mut self, bos: Option<u32>) -> Self {
        self.prefix = bos.into_iter().collect();
        self
    }

    /// For a model whose embedding has `rows` rows: a text with an id beyond them is an error that names the token.
    pub fn with_rows(mut self, rows: usize) -> Self {
        self.rows = Some(rows);
        self
    }

    /// The token that begins a text, where the model wants one.
    pub fn bos(&self) -> Option<u32> {
        self.prefix.first().copied()
    }

    /// The token that ends a text, where the files name one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// What is put after a text.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// What the tokenizer's own post-processor puts before a text and after it.
    fn processed(&self) -> Result<(Vec<u32>, Vec<u32>), InferError> {
        let plain = library(|| self.inner.encode_fast("a", false))?;
        let processed = library(|| self.inner.encode_fast("a", true))?;
        let (plain, processed) = (plain.get_ids(), processed.get_ids());
        let begin = (0..=processed.len().saturating_sub(plain.len())).find(|&i| processed[i..].starts_with(plain));
        Ok(match begin {
            Some(begin) if !plain.is_empty() => {
                (processed[..begin].to_vec(), processed[begin + plain.len()..].to_vec())
            }
            _ => (Vec::new(), Vec::new()),
        })
    }

    /// Token ids of a whole text: with BOS in front and EOS behind where the model wants them (BOS never twice).
    ///
    /// # Errors
    /// The tokenizer cannot encode the text, or it has a token that the model has no row for.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let mut ids = self.encode_beginning(text)?;
        ids.extend(&self.suffix);
        Ok(ids)
    }

    /// Token ids of the beginning of a text: with BOS in front where the model wants it, and never twice.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_text`].
    pub fn encode_beginning(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let mut ids = self.encode_fragment(text)?;
        if !ids.starts_with(&self.prefix) {
            ids.splice(0..0, self.prefix.iter().copied());
        }
        self.check_rows(&self.prefix)?;
        self.check_rows(&self.suffix)?;
        Ok(ids)
    }

    /// Token ids of a piece of text, with nothing added. Special tokens spelled out in it become their ids.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_text`].
    pub fn encode_fragment(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let ids = self.ids(text)?;
        self.check_rows(&ids)?;
        Ok(ids)
    }

    /// Token ids of a text that follows another: without the space that SentencePiece puts before the beginning of a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_text`].
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let inside = if self.marks_beginning { self.after_newline(text)? } else { None };
        match inside {
            Some(ids) => self.check_rows(&ids).map(|()| ids),
            None => self.encode_fragment(text),
        }
    }

    /// Token ids and the bytes of the text that each stands for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_text`].
    pub fn encode_with_places(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, InferError> {
        let encoding = library(|| self.inner.encode(text, false))?;
        self.check_rows(encoding.get_ids())?;
        Ok(encoding.get_ids().iter().zip(encoding.get_offsets()).map(|(&id, &(a, b))| (id, a..b)).collect())
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>, InferError> {
        Ok(library(|| self.inner.encode_fast(text, false))?.get_ids().to_vec())
    }

    /// The tokens of a text behind a line end, without the line end; `None` where the two cannot be told apart.
    fn after_newline(&self, text: &str) -> Result<Option<Vec<u32>>, InferError> {
        let newline = self.ids("\n")?;
        let both = self.ids(&format!("\n{text}"))?;
        Ok(both.strip_prefix(newline.as_slice()).filter(|_| !newline.is_empty()).map(<[u32]>::to_vec))
    }

    /// Every id has a row in the embedding.
    fn check_rows(&self, ids: &[u32]) -> Result<(), InferError> {
        let Some(rows) = self.rows else { return Ok(()) };
        match ids.iter().find(|&&id| id as usize >= rows) {
            None => Ok(()),
            Some(&id) => {
                Err(InferError::NoRow { id, token: self.id_to_token(id).unwrap_or_default(), vocab_size: rows })
            }
        }
    }

    /// Like [`Tokenizer::encode_text`], but stops reading the text once there are `limit` tokens: a long text costs only
    /// the memory of what is used of it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_text`].
    pub fn encode_prefix(&self, text: &str, limit: usize) -> Result<Vec<u32>, InferError> {
        // Text is cut at line ends; the last lines before a cut might have been split otherwise had more followed, so some
        // more text than needed is encoded and its tokens dropped.
        const MARGIN: usize = 64;
        let mut bytes = limit.saturating_add(MARGIN).saturating_mul(6);
        loop {
            let cut = text.get(..bytes.min(text.len())).map_or_else(|| floor_char_boundary(text, bytes), str::len);
            let cut = if cut == text.len() { cut } else { text[..cut].rfind('\n').map_or(cut, |i| i + 1) };
            let mut ids = self.encode_beginning(&text[..cut])?;
            if cut == text.len() {
                ids.extend(&self.suffix);
            }
            if cut == text.len() || ids.len() >= limit.saturating_add(MARGIN) {
                ids.truncate(limit);
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(2);
        }
    }

    /// The text of some ids, special tokens left out. Bytes that make no character become U+FFFD.
    ///
    /// # Errors
    /// The tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String, InferError> {
        library(|| self.inner.decode(ids, true))
    }

    /// A decoder that gives out text as tokens arrive.
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer::new(self)
    }

    /// The same for tokens that go on from `before`.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn detokenizer_after(&self, before: &[u32]) -> Result<Detokenizer<'_>, InferError> {
        Detokenizer::new(self).after(before)
    }

    /// Whether byte tokens are joined to text.
    fn joins_bytes(&self) -> bool {
        self.joins_bytes
    }

    /// Whether an id leaves no trace in decoded text: a special token, or none at all.
    fn is_silent(&self, id: u32) -> bool {
        match self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            Some(token) => token.special,
            None => self.inner.id_to_token(id).is_none(),
        }
    }

    /// The id of a token spelled exactly so.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones counted.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The tokens that an embedding of `rows` rows has no row for, at most `most` of them, lowest ids first. Embeddings may have more
    /// rows than the tokenizer has ids: many are padded.
    pub fn beyond(&self, rows: usize, most: usize) -> Vec<(u32, String)> {
        // Ids are dense in practice; a few holes are looked past.
        let end = (self.vocab_size() as u32).saturating_add(1024);
        let begin = u32::try_from(rows).unwrap_or(u32::MAX);
        (begin..end.max(begin)).filter_map(|id| Some((id, self.id_to_token(id)?))).take(most).collect()
    }
}

/// A call of the `tokenizers` crate. What a normalizer failed at is an error too.
fn library<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, InferError> {
    let result = guarded("tokenizers", call);
    match (pattern::failure(), result) {
        (Some(reason), _) | (None, Err(reason)) => Err(InferError::Tokenizer(reason)),
        (None, Ok(result)) => result.map_err(|e| failed(&e)),
    }
}

/// A part from its JSON; `None` from null.
fn part<P: serde::de::DeserializeOwned>(json: &Value) -> Result<Option<P>, InferError> {
    library(|| Ok(serde_json::from_value(json.clone())?))
}

fn failed(error: &dyn std::fmt::Display) -> InferError {
    InferError::Tokenizer(error.to_string())
}

/// The largest char boundary at or below `index`.
fn floor_char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
