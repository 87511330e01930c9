//! The bytes of a data file: whatever mark they begin with, in UTF-8 or refused by name, never more of them in memory than a bound.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use serde_json::Value;

use super::DataError;
use super::rows::Row;

/// Most bytes of one row: a line, a JSON object, a CSV record.
pub const MOST_ROW: usize = 64 << 20;
/// Bytes looked at to tell what a file is.
const HEAD: usize = 1 << 16;
/// Bytes of text read at a time.
const CHUNK: usize = 1 << 16;

/// What JSON a text is.
#[derive(Clone, Debug, PartialEq)]
pub enum JsonShape {
    /// None.
    None,
    /// An object with members, and no other.
    One(Row),
    /// A list of objects, several of them, or one that is long.
    Rows,
}

/// What was looked at, and what follows it.
type Whole<'a> = Chain<Cursor<Vec<u8>>, Box<dyn Read + 'a>>;

/// An open data file behind its byte-order mark.
pub struct Source<'a> {
    name: String,
    head: Vec<u8>,
    whole: bool,
    has_mark: bool,
    reader: BufReader<Whole<'a>>,
    /// The line that is read next, counted from 1.
    line: usize,
    /// Bytes of that line that text was read of.
    column: usize,
    /// Carriage returns before line ends that text was read without.
    carriage_returns: u64,
    /// Bytes of a character that the last chunk ended in, and a carriage return that may be part of a line end.
    rest: Vec<u8>,
}

impl<'a> Source<'a> {
    /// Looks at the beginning; `name` is what errors call the file.
    ///
    /// # Errors
    /// It cannot be read, or its first bytes say that it is not UTF-8: UTF-16, UTF-32, Parquet, an archive.
    pub fn new(name: &str, mut reader: Box<dyn Read + 'a>) -> Result<Self, DataError> {
        let mut head = Vec::new();
        (&mut reader).take(HEAD as u64).read_to_end(&mut head).map_err(|e| unreadable(name, 1, &e))?;
        if let Some(what) = other_encoding(&head) {
            let reason = format!("{what} text: data files are UTF-8 (`iconv -f {what} -t UTF-8` makes one)");
            return Err(DataError::Line { file: name.to_owned(), line: 1, reason });
        }
        if let Some(what) = other_format(&head) {
            let reason = format!("{what}, whatever its name says: not text");
            return Err(DataError::Line { file: name.to_owned(), line: 1, reason });
        }
        let has_mark = head.starts_with(&[0xef, 0xbb, 0xbf]);
        if has_mark {
            head.drain(..3);
        }
        let whole = head.len() + 3 * usize::from(has_mark) < HEAD;
        let reader = BufReader::with_capacity(CHUNK, Cursor::new(head.clone()).chain(reader));
        let name = name.to_owned();
        Ok(Self { name, head, whole, has_mark, reader, line: 1, column: 0, carriage_returns: 0, rest: Vec::new() })
    }

    /// What errors call the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it began with a byte-order mark, which is not part of its text.
    pub fn has_mark(&self) -> bool {
        self.has_mark
    }

    /// The first bytes, at most 64 KiB.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Carriage returns before line ends that [`Source::text`] has left out so far.
    pub fn carriage_returns(&self) -> u64 {
        self.carriage_returns
    }

    /// Whether the text is JSON, by its beginning.
    pub fn json_shape(&self) -> JsonShape {
        let begin = self.head.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(self.head.len());
        let text = &self.head[begin..];
        let (text, is_list) = match text.first() {
            Some(b'{') => (text, false),
            Some(b'[') => (text[1..].trim_ascii_start(), true),
            _ => return JsonShape::None,
        };
        if text.first() != Some(&b'{') {
            return JsonShape::None;
        }
        let mut values = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
        match values.next() {
            Some(Ok(Value::Object(values_of_first))) if !values_of_first.is_empty() => {
                let rest = &text[values.byte_offset()..];
                if is_list || rest.trim_ascii_start().first() == Some(&b'{') {
                    return JsonShape::Rows;
                }
                JsonShape::One(Row { line: 1, values: values_of_first, is_untyped: false })
            }
            // Longer than what was looked at, and JSON so far; a character may be cut at its end.
            Some(Err(_)) if !self.whole && cut_json(text) => JsonShape::Rows,
            _ => JsonShape::None,
        }
    }

    /// Fills `line` with the next line, without what ends it, and gives its number; `None` at the end.
    ///
    /// # Errors
    /// It cannot be read, is longer than [`MOST_ROW`], or is not UTF-8.
    pub(super) fn line(&mut self, line: &mut Vec<u8>) -> Result<Option<usize>, DataError> {
        line.clear();
        let number = self.line;
        let read = (&mut self.reader).take(MOST_ROW as u64 + 1).read_until(b'\n', line);
        if read.map_err(|e| unreadable(&self.name, number, &e))? == 0 {
            return Ok(None);
        }
        if line.len() > MOST_ROW {
            return Err(too_long(&self.name, number));
        }
        self.line += 1;
        if line.pop_if(|b| *b == b'\n').is_some() {
            line.pop_if(|b| *b == b'\r');
        }
        utf8(&self.name, number, line)?;
        Ok(Some(number))
    }

    /// The next byte and the line it is on, without taking it.
    pub(super) fn peek(&mut self) -> Result<Option<(u8, usize)>, DataError> {
        let buffer = self.reader.fill_buf().map_err(|e| unreadable(&self.name, self.line, &e))?;
        Ok(buffer.first().map(|&b| (b, self.line)))
    }

    /// Takes a byte that [`Source::peek`] gave.
    pub(super) fn take(&mut self, byte: u8) {
        self.reader.consume(1);
        self.line += usize::from(byte == b'\n');
    }

    /// Adds some more text to `text`, line ends as `\n`; whether there was any.
    ///
    /// # Errors
    /// It cannot be read, is not UTF-8, or holds a NUL byte; the error names the line.
    pub fn text(&mut self, text: &mut String) -> Result<bool, DataError> {
        loop {
            let buffer = self.reader.fill_buf().map_err(|e| unreadable(&self.name, self.line, &e))?;
            let taken = buffer.len();
            let is_end = taken == 0;
            let mut bytes = std::mem::take(&mut self.rest);
            bytes.extend_from_slice(buffer);
            self.reader.consume(taken);
            if bytes.is_empty() {
                return Ok(false);
            }
            let mut end = match std::str::from_utf8(&bytes) {
                Ok(_) => bytes.len(),
                Err(e) if e.error_len().is_none() && !is_end => e.valid_up_to(),
                Err(_) => return Err(self.not_utf8(&bytes)),
            };
            if !is_end && bytes[..end].ends_with(b"\r") {
                end -= 1;
            }
            self.rest = bytes.split_off(end);
            if let Some(at) = bytes.iter().position(|&b| b == 0) {
                let line = self.line + lines(&bytes[..at]);
                let reason = "a NUL byte: this is no UTF-8 text (another encoding, or a binary file)".to_owned();
                return Err(DataError::Line { file: self.name.clone(), line, reason });
            }
            self.line += lines(&bytes);
            self.column = match bytes.iter().rposition(|&b| b == b'\n') {
                Some(last) => bytes.len() - last - 1,
                None => self.column + bytes.len(),
            };
            // What is valid stays valid: it was cut where a character ends.
            let part = String::from_utf8_lossy(&bytes);
            let returns = part.matches("\r\n").count() as u64;
            self.carriage_returns += returns;
            if returns > 0 {
                text.push_str(&part.replace("\r\n", "\n"))
            } else {
                text.push_str(&part)
            }
            if !part.is_empty() {
                return Ok(true);
            }
        }
    }

    fn not_utf8(&self, bytes: &[u8]) -> DataError {
        let valid = std::str::from_utf8(bytes).map_or_else(|e| e.valid_up_to(), str::len);
        let line = self.line + lines(&bytes[..valid]);
        let begin = bytes[..valid].iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        let end = bytes[valid..].iter().position(|&b| b == b'\n').map_or(bytes.len(), |i| valid + i);
        let before = if begin == 0 { self.column } else { 0 };
        not_utf8(&self.name, line, before + valid - begin + 1, bytes[valid.min(end.saturating_sub(1))])
    }
}

/// Gives the bytes as they are, without lines: for readers that have their own.
impl Read for Source<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.reader.read(out)
    }
}

/// `bytes` as text.
pub(super) fn utf8<'b>(file: &str, line: usize, bytes: &'b [u8]) -> Result<&'b str, DataError> {
    std::str::from_utf8(bytes).map_err(|e| not_utf8(file, line, e.valid_up_to() + 1, bytes[e.valid_up_to()]))
}

fn not_utf8(file: &str, line: usize, at: usize, byte: u8) -> DataError {
    let reason = format!(
        "byte {at} of the line (0x{byte:02x}) is no UTF-8; of Latin-1 text `iconv -f ISO-8859-1 -t UTF-8` makes UTF-8"
    );
    DataError::Line { file: file.to_owned(), line, reason }
}

/// Whether text that was cut is JSON up to where it was cut.
fn cut_json(text: &[u8]) -> bool {
    let valid = match std::str::from_utf8(text) {
        Ok(_) => text,
        Err(e) if e.error_len().is_none() => &text[..e.valid_up_to()],
        Err(_) => return false,
    };
    serde_json::from_slice::<serde::de::IgnoredAny>(valid).is_err_and(|e| e.is_eof())
}

/// A row beyond [`MOST_ROW`].
pub(super) fn too_long(file: &str, line: usize) -> DataError {
    let reason = format!("more than {} MiB without an end: no row of data", MOST_ROW >> 20);
    DataError::Line { file: file.to_owned(), line, reason }
}

pub(super) fn unreadable(file: &str, line: usize, error: &io::Error) -> DataError {
    DataError::Line { file: file.to_owned(), line, reason: error.to_string() }
}

fn lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&b| b == b'\n').count()
}

/// The encoding that a byte-order mark or a pattern of NUL bytes shows.
fn other_encoding(head: &[u8]) -> Option<&'static str> {
    match head {
        [0xff, 0xfe, 0, 0, ..] => return Some("UTF-32LE"),
        [0, 0, 0xfe, 0xff, ..] => return Some("UTF-32BE"),
        [0xff, 0xfe, ..] => return Some("UTF-16LE"),
        [0xfe, 0xff, ..] => return Some("UTF-16BE"),
        _ => {}
    }
    // Of letters below U+0100 every second byte is NUL.
    let some = &head[..head.len().min(4096) & !1];
    let nuls = |odd: usize| some.iter().skip(odd).step_by(2).filter(|&&b| b == 0).count();
    let (even, odd, half) = (nuls(0), nuls(1), some.len() / 2);
    match () {
        () if half == 0 => None,
        () if odd * 4 >= half * 3 && even * 4 <= half => Some("UTF-16LE"),
        () if even * 4 >= half * 3 && odd * 4 <= half => Some("UTF-16BE"),
        () if odd == half && even * 2 >= half => Some("UTF-32LE"),
        () if even == half && odd * 2 >= half => Some("UTF-32BE"),
        () => None,
    }
}

/// A well-known binary format by its first bytes.
fn other_format(head: &[u8]) -> Option<&'static str> {
    Some(match head {
        [b'P', b'A', b'R', b'1', ..] => "a Parquet file",
        [b'P', b'K', 3, 4, ..] => "a ZIP archive (or an office document)",
        [b'%', b'P', b'D', b'F', b'-', ..] => "a PDF document",
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] => "an Arrow file",
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, ..] => "a bzip2 archive",
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "an xz archive",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(bytes: &[u8]) -> Result<Source<'_>, DataError> {
        Source::new("a.txt", Box::new(bytes))
    }

    fn all(bytes: &[u8]) -> Result<String, DataError> {
        let (mut source, mut text) = (open(bytes)?, String::new());
        while source.text(&mut text)? {}
        Ok(text)
    }

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn text_is_read_without_mark_and_carriage_returns() {
        assert_eq!(all("\u{feff}a\r\nb\rc\r\n".as_bytes()).unwrap(), "a\nb\rc\n");
        assert_eq!(all(b"").unwrap(), "");
        assert_eq!(all(b"\r").unwrap(), "\r");
        // Characters and line ends that lie across the places where it is read in parts.
        let long = "aä€😀\r\n".repeat(40_000);
        assert_eq!(all(long.as_bytes()).unwrap(), long.replace("\r\n", "\n"));
        let (mut source, mut text) = (open(long.as_bytes()).unwrap(), String::new());
        while source.text(&mut text).unwrap() {}
        assert_eq!((source.carriage_returns(), source.line), (40_000, 40_001));
    }

    #[test]
    fn other_encodings_and_formats_are_named() {
        let reason = |bytes: &[u8]| all(bytes).unwrap_err().to_string();
        assert!(reason(&[&[0xff, 0xfe][..], &utf16("hello")].concat()).contains("UTF-16LE"));
        assert!(reason(&utf16("{\"text\": \"hello\"}\n")).contains("UTF-16LE"));
        let mut big = utf16("hello there");
        big.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
        assert!(reason(&big).contains("UTF-16BE"));
        let wide: Vec<u8> = "hello".chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        assert!(reason(&wide).contains("UTF-32LE"), "{}", reason(&wide));
        assert!(reason(b"PAR1....").contains("Parquet"));
        assert!(reason(b"fine\nbad \0 here\n").starts_with("a.txt:2: a NUL byte"));
        let latin = reason(b"fine\ncaf\xe9 au lait\n");
        assert!(latin.starts_with("a.txt:2: byte 4 of the line (0xe9)") && latin.contains("ISO-8859-1"), "{latin}");
        assert!(reason(b"fine\ncut \xc3").starts_with("a.txt:2: byte 5"));
        let late = [vec![b'x'; 200_000], b"\n\xff".to_vec()].concat();
        assert!(reason(&late).starts_with("a.txt:2: byte 1 "));
    }

    #[test]
    fn json_is_told_from_text_that_has_brackets() {
        let long = format!("{{\"text\": \"{}\"}}", "x".repeat(1 << 17));
        let shape = |text: &str| open(text.as_bytes()).unwrap().json_shape();
        for json in [" \n[\n {\"a\": {}}]", "{\"a\": 1}\n{\"a\": 2}", &long] {
            assert_eq!(shape(json), JsonShape::Rows, "{}", &json[..8]);
        }
        assert!(matches!(shape("{\"a\": 1}\n"), JsonShape::One(row) if row.values["a"] == 1));
        for text in ["", "[1] A reference", "{ int x; }", "{}", "[]", "{'a': 1}", "[[1, 2]]", "{\"a\": 1", "\"a\""] {
            assert_eq!(shape(text), JsonShape::None, "{text}");
        }
    }

    #[test]
    fn an_endless_line_is_an_error() {
        let mut source = Source::new("a.jsonl", Box::new(io::repeat(b'x'))).unwrap();
        let error = source.line(&mut Vec::new()).unwrap_err().to_string();
        assert!(error.starts_with("a.jsonl:1: more than 64 MiB"), "{error}");
    }
}
