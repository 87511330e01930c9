//! Text as tokens arrive, equal to what decoding all of them at once gives.

use super::Tokenizer;
use crate::InferError;

/// Tokens that are decoded together, at least: what a token's text may depend on before it.
const REACH: usize = 16;
/// Tokens after which the first ones are let go.
const MOST: usize = 64;

/// Turns a stream of tokens into text.
///
/// What a later token may still change is held back: bytes that do not make a whole character yet, and a run of byte tokens (`<0xE7>`),
/// which is one text or, where any byte of it is broken, all U+FFFD. Broken bytes come out as U+FFFD; no sequence of tokens is an error.
/// [`Detokenizer::finish`] gives what is held back at the end.
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens.
    window: Vec<u32>,
    /// Bytes of the window's text that have been given out.
    given: usize,
    /// Tokens at which the window is next tried to be cut.
    limit: usize,
}

impl<'a> Detokenizer<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), given: 0, limit: MOST }
    }

    /// The same for tokens that follow `before`, whose text is not given: a decoder may treat a text's beginning otherwise
    /// than its middle (SentencePiece's space).
    pub(super) fn after(mut self, before: &[u32]) -> Result<Self, InferError> {
        for &id in &before[before.len().saturating_sub(REACH)..] {
            self.push(id)?;
        }
        // Bytes that are held back are given too where they are whole.
        let text = self.tokenizer.decode(&self.window)?;
        self.given = text.trim_end_matches('\u{fffd}').len();
        Ok(self)
    }

    /// Text that is settled with this token; empty while a character is incomplete.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, InferError> {
        if self.tokenizer.is_silent(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        if self.is_byte(id) {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.window)?;
        let settled = text.strip_suffix('\u{fffd}').unwrap_or(&text).len();
        let new = self.new_text(&text, settled);
        if self.window.len() >= self.limit {
            self.shorten(&text)?;
        }
        Ok(new)
    }

    /// What is still held back. The stream begins anew after it.
    ///
    /// # Errors
    /// As [`Detokenizer::push`].
    pub fn finish(&mut self) -> Result<String, InferError> {
        let text = self.tokenizer.decode(&self.window)?;
        let new = self.new_text(&text, text.len());
        (self.given, self.limit) = (0, MOST);
        self.window.clear();
        Ok(new)
    }

    /// `text[given..settled]`, which then is given.
    fn new_text(&mut self, text: &str, settled: usize) -> String {
        if settled <= self.given {
            return String::new();
        }
        let begin = (self.given..=settled).find(|&i| text.is_char_boundary(i)).unwrap_or(settled);
        self.given = settled;
        text[begin..settled].to_owned()
    }

    /// Lets the first tokens go where the rest gives the end of the same text without them.
    fn shorten(&mut self, text: &str) -> Result<(), InferError> {
        for begin in (REACH..self.window.len() - REACH).rev() {
            if self.is_byte(self.window[begin - 1]) || self.is_byte(self.window[begin]) {
                continue;
            }
            let rest = self.tokenizer.decode(&self.window[begin..])?;
            let gone = text.len().saturating_sub(rest.len());
            if text.ends_with(&rest) && gone <= self.given && !rest.starts_with('\u{fffd}') {
                self.window.drain(..begin);
                self.given -= gone;
                self.limit = MOST;
                return Ok(());
            }
        }
        self.limit = self.window.len().saturating_mul(2);
        Ok(())
    }

    /// Whether a token stands for one byte, as SentencePiece spells it, and is joined with its neighbours.
    fn is_byte(&self, id: u32) -> bool {
        let is_hex = |token: String| {
            let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        self.tokenizer.joins_bytes() && self.tokenizer.id_to_token(id).is_some_and(is_hex)
    }
}
