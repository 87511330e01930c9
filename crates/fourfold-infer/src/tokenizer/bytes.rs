//! The bytes that each token stands for, as grammars and lists of probabilities need them.

use super::Tokenizer;

/// What a token adds to a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBytes {
    /// Its bytes: not always whole characters. Those of a special token are its name.
    pub bytes: Vec<u8>,
    /// Whether it stands for no text: the end of a turn, say.
    pub special: bool,
}

/// How a vocabulary spells bytes.
#[derive(Clone, Copy)]
enum Spelling {
    /// Each byte as one printable character (GPT-2's table).
    ByteLevel,
    /// As text with `▁` for spaces; bytes that are no text as `<0xNN>` (SentencePiece).
    SentencePiece,
    /// As text.
    Plain,
}

impl Tokenizer {
    /// What each of the first `size` ids stands for; `None` for ids without a token.
    pub fn vocabulary(&self, size: usize) -> Vec<Option<TokenBytes>> {
        let decoder = self.parts.decoder.to_string();
        let spelling = if decoder.contains("\"ByteLevel\"") {
            Spelling::ByteLevel
        } else if decoder.contains("\"ByteFallback\"") || decoder.contains("\u{2581}") {
            Spelling::SentencePiece
        } else {
            Spelling::Plain
        };
        let added = self.inner.get_added_tokens_decoder();
        let one = |id: u32| {
            if let Some(token) = added.get(&id) {
                return Some(TokenBytes { bytes: token.content.clone().into_bytes(), special: token.special });
            }
            let token = self.id_to_token(id)?;
            let bytes = match spelling {
                Spelling::ByteLevel => token.chars().map(byte_of).collect::<Option<_>>(),
                Spelling::SentencePiece => spelled_byte(&token).map(|byte| vec![byte]),
                Spelling::Plain => None,
            };
            let text = || match spelling {
                Spelling::SentencePiece => token.replace('\u{2581}', " ").into_bytes(),
                Spelling::ByteLevel | Spelling::Plain => token.clone().into_bytes(),
            };
            Some(TokenBytes { bytes: bytes.unwrap_or_else(text), special: false })
        };
        (0..size as u32).map(one).collect()
    }
}

/// `<0xNN>`.
fn spelled_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok()
}

/// The byte of a character of GPT-2's table: printable ones of Latin-1 stand for themselves, the others come in order from
/// U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    if is_printable(code) {
        return Some(code as u8);
    }
    (0..=255_u32).filter(|&byte| !is_printable(byte)).nth(code.checked_sub(256)? as usize).map(|byte| byte as u8)
}

fn is_printable(code: u32) -> bool {
    matches!(code, 33..=126 | 161..=172 | 174..=255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_byte_level_tokens() {
        let text: Vec<u8> = "Ġcafé".chars().map(|c| byte_of(c).unwrap()).collect();
        assert_eq!(text, b" caf\xe9");
        assert_eq!((byte_of('Ā'), byte_of('Ċ'), byte_of('Ń'), byte_of('ń')), (Some(0), Some(10), Some(173), None));
        let all: std::collections::BTreeSet<u8> = (0..512).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn spelled_bytes() {
        assert_eq!((spelled_byte("<0x0A>"), spelled_byte("<0xFF>"), spelled_byte("<0x>")), (Some(10), Some(255), None));
    }
}
