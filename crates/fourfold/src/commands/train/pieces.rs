//! A plain text to tokens piece by piece: the same tokens as the whole text gives, without the whole text in memory.
//!
//! A tokenizer may look beyond any cut. So a cut is taken only where it makes no difference, which is seen from the text that follows
//! it: the tokens of both together must end with those of what follows alone. From there on the rest of the text is read as if it
//! began there. Cuts are tried where the usual tokenizers split words: at line ends, and before a word's space. Where none agrees
//! (a tokenizer that puts a mark before every text, say), the pieces grow until they are the whole file.

use anyhow::{Result, bail};
use fourfold_infer::Tokenizer;
use fourfold_train::data::Source;

/// Bytes of a piece, at least.
pub const PIECE: usize = 1 << 16;
/// The part of a piece that has to agree after a cut.
const OVERLAP: usize = 16;
/// Most bytes without a space or a line end: no language has such a word.
const MOST_WORD: usize = 16 << 20;

/// The tokens of a text, some at a time.
pub struct TextPieces<'a> {
    source: Source<'a>,
    /// Text that has been read and not given out.
    text: String,
    /// Bytes of a piece, at least.
    least: usize,
    is_first: bool,
    is_done: bool,
}

impl<'a> TextPieces<'a> {
    /// Of what `source` gives, in pieces of at least `least` bytes.
    pub fn new(source: Source<'a>, least: usize) -> Self {
        Self { source, text: String::new(), least, is_first: true, is_done: false }
    }

    /// What the text came from.
    pub fn source(&self) -> &Source<'a> {
        &self.source
    }

    /// The next tokens; `None` at the end.
    ///
    /// # Errors
    /// The text cannot be read, is no UTF-8, goes on for 16 MiB without a space or a line end, or cannot be encoded.
    pub fn next(&mut self, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
        let mut wanted = self.least;
        while let Some(cut) = self.cut(wanted)? {
            let Some(end) = self.cut(cut + self.least / OVERLAP)? else { break };
            let mut ids = self.encode(tokenizer, &self.text[..end])?;
            let after = tokenizer.encode_fragment(&self.text[cut..end])?;
            if ids.ends_with(&after) {
                ids.truncate(ids.len() - after.len());
                self.text.drain(..cut);
                self.is_first = false;
                return Ok(Some(ids));
            }
            wanted = wanted.saturating_mul(2);
        }
        if self.is_done {
            return Ok(None);
        }
        let text = std::mem::take(&mut self.text);
        let mut ids = self.encode(tokenizer, &text)?;
        ids.extend(tokenizer.suffix());
        (self.is_first, self.is_done) = (false, true);
        Ok(Some(ids))
    }

    fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        Ok(if self.is_first { tokenizer.encode_beginning(text)? } else { tokenizer.encode_fragment(text)? })
    }

    /// The first place from byte `from` on where a cut is tried: before a line without spaces around its beginning, or before the space
    /// that leads a word. `None` where there is none until the end of the text, which then has been read.
    fn cut(&mut self, mut from: usize) -> Result<Option<usize>> {
        let begin = from;
        loop {
            let bytes = self.text.as_bytes();
            let is_space = |i: usize| bytes[i].is_ascii_whitespace();
            let found = (from.max(2)..bytes.len().saturating_sub(1)).find(|&i| {
                let begins_line = bytes[i - 1] == b'\n' && !is_space(i - 2) && !is_space(i);
                begins_line || bytes[i] == b' ' && !is_space(i + 1)
            });
            if found.is_some() {
                return Ok(found);
            }
            from = from.max(bytes.len().saturating_sub(1));
            if from - begin > MOST_WORD && !self.text.as_bytes()[begin..].iter().any(u8::is_ascii_whitespace) {
                bail!("{}: {} MiB without a space or a line end: no text", self.source.name(), MOST_WORD >> 20);
            }
            if !self.source.text(&mut self.text)? {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENIZER: &[u8] = include_bytes!("../../../assets/tokenizer.json");
    const TEXT: &[u8] = include_bytes!("../../../assets/eval.txt");

    fn source(bytes: &[u8]) -> Source<'_> {
        Source::new("a.txt", Box::new(bytes)).unwrap()
    }

    /// All pieces of `text` together, and how many there are.
    fn in_pieces(tokenizer: &Tokenizer, text: &str, least: usize) -> (Vec<u32>, usize) {
        let (mut pieces, mut ids, mut count) = (TextPieces::new(source(text.as_bytes()), least), Vec::new(), 0);
        while let Some(piece) = pieces.next(tokenizer).unwrap() {
            ids.extend(piece);
            count += 1;
        }
        (ids, count)
    }

    #[test]
    fn pieces_have_the_tokens_of_the_whole() {
        let tokenizer = Tokenizer::from_bytes(TOKENIZER).unwrap().with_bos(Some(0));
        let text = std::str::from_utf8(TEXT).unwrap();
        let whole = tokenizer.encode_text(text).unwrap();
        for least in [64, 500, 4096, 1 << 20] {
            let (ids, count) = in_pieces(&tokenizer, text, least);
            assert!(ids == whole, "pieces of {least} bytes");
            assert!(count <= text.len() / least + 1, "{count} pieces of {least} bytes");
            assert!(count > text.len() / least / 4, "{count} pieces of {least} bytes");
        }
        let spaced = text.replace('\n', " \n \n ");
        let (ids, count) = in_pieces(&tokenizer, &spaced, 500);
        assert!(ids == tokenizer.encode_text(&spaced).unwrap() && count > 100, "{count} pieces");
        for text in ["", "\n", "a", "a\n\n\n b\n\tc\nd\n", "no end of line"] {
            assert_eq!(in_pieces(&tokenizer, text, 1).0, tokenizer.encode_text(text).unwrap());
        }
    }

    /// A tokenizer that begins every text with a mark gives other tokens for pieces: the whole is read at once.
    #[test]
    fn a_tokenizer_that_marks_beginnings_is_given_the_whole() {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "decoder": null,
            "normalizer": {"type": "Prepend", "prepend": "_"}, "pre_tokenizer": null, "post_processor": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"_": 0, "a": 1, "\n": 2, "_a": 3}, "merges": ["_ a"]}}"#;
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let text = "a\n".repeat(100);
        let (ids, count) = in_pieces(&tokenizer, &text, 16);
        assert_eq!((ids, count), (tokenizer.encode_text(&text).unwrap(), 1));
    }

    #[test]
    fn what_is_no_text_is_an_error() {
        let tokenizer = Tokenizer::from_bytes(TOKENIZER).unwrap();
        let endless = Source::new("a.txt", Box::new(std::io::repeat(b'x'))).unwrap();
        let error = TextPieces::new(endless, PIECE).next(&tokenizer).unwrap_err().to_string();
        assert!(error.starts_with("a.txt: 16 MiB without a space"), "{error}");
        assert!(TextPieces::new(source(b"a\n\xff\n"), 1).next(&tokenizer).is_err());
    }
}
