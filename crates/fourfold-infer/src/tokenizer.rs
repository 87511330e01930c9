//! Text to token ids and back, over the `tokenizers` crate.

use std::path::Path;

use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use crate::InferError;

/// A model's tokenizer, and the ids that begin and end its texts.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
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

    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// It is not a tokenizer.
    pub fn from_bytes(json: &[u8]) -> Result<Self, InferError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| InferError::Tokenizer(e.to_string()))?;
        // A file may ask for truncation or padding, meant for training batches.
        inner.with_truncation(None).map_err(|e| InferError::Tokenizer(e.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner, bos: None })
    }

    /// Names the token that [`Tokenizer::encode_text`] puts first; `None` when the model's texts have none.
    pub fn with_bos(mut self, bos: Option<u32>) -> Self {
        self.bos = bos;
        self
    }

    /// The token that begins a text, where the model wants one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that the tokenizer's own post-processor puts before a text, where it does.
    ///
    /// # Errors
    /// The tokenizer cannot encode a letter.
    pub fn prefix_token(&self) -> Result<Option<u32>, InferError> {
        let failed = |e: tokenizers::Error| InferError::Tokenizer(e.to_string());
        let plain = self.inner.encode_fast("a", false).map_err(failed)?;
        let processed = self.inner.encode_fast("a", true).map_err(failed)?;
        let first = |ids: &[u32]| ids.first().copied();
        Ok(first(processed.get_ids()).filter(|id| first(plain.get_ids()) != Some(*id)))
    }

    /// Token ids of a text from its beginning: with BOS in front where the model wants one (and never twice).
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let mut ids = self.encode_fragment(text)?;
        if let Some(bos) = self.bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Token ids of a piece of text, with nothing added. Special tokens spelled out in it become their ids.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode_fragment(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| InferError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Like [`Tokenizer::encode_text`], but stops reading the text once there are `limit` tokens: a long text costs only
    /// the memory of what is used of it.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode_prefix(&self, text: &str, limit: usize) -> Result<Vec<u32>, InferError> {
        // Text is cut at line ends; the last lines before a cut might have been split otherwise had more followed, so some
        // more text than needed is encoded and its tokens dropped.
        const MARGIN: usize = 64;
        let mut bytes = limit.saturating_add(MARGIN).saturating_mul(6);
        loop {
            let cut = text.get(..bytes.min(text.len())).map_or_else(|| floor_char_boundary(text, bytes), str::len);
            let cut = if cut == text.len() { cut } else { text[..cut].rfind('\n').map_or(cut, |i| i + 1) };
            let mut ids = self.encode_text(&text[..cut])?;
            if cut == text.len() || ids.len() >= limit.saturating_add(MARGIN) {
                ids.truncate(limit);
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(2);
        }
    }

    /// The text of some ids, special tokens left out.
    ///
    /// # Errors
    /// The tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String, InferError> {
        self.inner.decode(ids, true).map_err(|e| InferError::Tokenizer(e.to_string()))
    }

    /// A decoder that gives out text as tokens arrive.
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer { stream: self.inner.decode_stream(true) }
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

    /// Checks that every id has a row in the model's embedding. Embeddings may have more rows than the tokenizer has ids:
    /// many are padded.
    ///
    /// # Errors
    /// [`InferError::WrongTokenizer`].
    pub fn check_fits(&self, vocab_size: usize) -> Result<(), InferError> {
        // Ids are dense in practice; walk down from the count, and up past it for holes.
        let count = self.vocab_size() as u32;
        let largest = (0..count.saturating_add(1024)).rev().find_map(|id| self.id_to_token(id).map(|t| (id, t)));
        match largest {
            Some((largest, token)) if largest as usize >= vocab_size => {
                Err(InferError::WrongTokenizer { largest, token, vocab_size })
            }
            _ => Ok(()),
        }
    }
}

/// The largest char boundary at or below `index`.
fn floor_char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// Turns a stream of tokens into text, holding back bytes that do not make a whole character yet.
pub struct Detokenizer<'a> {
    stream:
        DecodeStream<'a, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>,
}

impl Detokenizer<'_> {
    /// Text that this token completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// The tokenizer cannot decode the token.
    pub fn push(&mut self, id: u32) -> Result<String, InferError> {
        let text = self.stream.step(id).map_err(|e| InferError::Tokenizer(e.to_string()))?;
        Ok(text.unwrap_or_default())
    }
}
