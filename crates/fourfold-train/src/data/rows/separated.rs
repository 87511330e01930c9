//! Rows of comma- or tab-separated values, named by a header.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use csv::{ByteRecord, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::Row;
use crate::data::DataError;
use crate::data::source::{MOST_ROW, Source, too_long, unreadable, utf8};

/// What stands between two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Separator {
    /// A comma; values may be quoted (RFC 4180).
    Comma,
    /// A tab; quotes are part of a value (text/tab-separated-values, as GLUE's files are).
    Tab,
}

/// Stands after the end of the file: a quote that is never closed swallows it.
const END: &[u8] = b"\r\n\x01end of fourfold's data\x01\n";

/// Rows behind a header.
pub struct Separated<'a> {
    name: String,
    reader: Reader<Bounded<'a>>,
    room: Rc<Cell<usize>>,
    header: Vec<String>,
    record: ByteRecord,
    separator: Separator,
    /// Whether lines end in a carriage return and a line feed, of which the first ends a record.
    has_returns: bool,
    /// The first record, where it is no header.
    first: Option<Row>,
    is_done: bool,
}

impl<'a> Separated<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// It cannot be read, or names two columns alike.
    pub fn new(source: Source<'a>, separator: Separator) -> Result<Self, DataError> {
        let name = source.name().to_owned();
        let end = source.head().iter().position(|&b| b == b'\n');
        let has_returns = end.is_some_and(|end| source.head()[..end].ends_with(b"\r"));
        let room = Rc::new(Cell::new(0));
        let reader = ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(if separator == Separator::Comma { b',' } else { b'\t' })
            .quoting(separator == Separator::Comma)
            .from_reader(Bounded { source, room: room.clone(), end: if has_returns { END } else { &END[1..] } });
        let record = ByteRecord::new();
        let mut rows = Self {
            name,
            reader,
            room,
            header: Vec::new(),
            record,
            separator,
            has_returns,
            first: None,
            is_done: false,
        };
        if let Some(line) = rows.read()? {
            let names = rows.record.iter().map(|field| Ok(utf8(&rows.name, line, field)?.trim().to_owned()));
            rows.header = names.collect::<Result<_, _>>()?;
            let twice = rows.header.iter().enumerate().find(|(i, n)| !n.is_empty() && rows.header[..*i].contains(n));
            if let Some((_, column)) = twice {
                return rows.fail(line, format!("two columns are named `{column}`"));
            }
        }
        Ok(rows)
    }

    /// Names of the columns.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// As a file without a header, whose columns have these names: the first record is a row.
    #[must_use]
    pub fn unnamed(mut self, names: &[&str]) -> Self {
        let values = std::mem::replace(&mut self.header, names.iter().map(|&n| n.to_owned()).collect());
        let values = self.header.iter().cloned().zip(values.into_iter().map(Value::from)).collect();
        self.first = Some(Row { line: 1, values, is_untyped: true });
        self
    }

    fn fail<T>(&self, line: usize, reason: String) -> Result<T, DataError> {
        Err(DataError::Line { file: self.name.clone(), line, reason })
    }

    /// Reads the next record that has a value, and gives its line; `None` at the end.
    fn read(&mut self) -> Result<Option<usize>, DataError> {
        loop {
            self.room.set(MOST_ROW);
            let before = self.reader.position().line() as usize;
            let more = self.reader.read_byte_record(&mut self.record).map_err(|error| match error.into_kind() {
                csv::ErrorKind::Io(e) if e.kind() == io::ErrorKind::FileTooLarge => too_long(&self.name, before),
                csv::ErrorKind::Io(e) => unreadable(&self.name, before, &e),
                other => DataError::Line { file: self.name.clone(), line: before, reason: format!("{other:?}") },
            })?;
            if !more {
                return Ok(None);
            }
            // Where it ended, less the lines in it.
            let inside =
                self.record.as_slice().iter().filter(|&&b| b == b'\n').count() + usize::from(!self.has_returns);
            let line = (self.reader.position().line() as usize).saturating_sub(inside).max(1);
            let mark = END.trim_ascii();
            match self.record.iter().next_back() {
                Some(last) if self.record.len() == 1 && last == mark => return Ok(None),
                Some(last) if last.windows(mark.len()).any(|w| w == mark) => {
                    let begin = self.record.position().map_or(before, |p| p.line() as usize);
                    let line = begin + usize::from(self.has_returns);
                    return self.fail(line, "a quote is opened in this row and never closed".to_owned());
                }
                _ if self.record.iter().all(<[u8]>::is_empty) => {}
                _ => return Ok(Some(line)),
            }
        }
    }

    fn row(&mut self) -> Result<Option<Row>, DataError> {
        if let Some(row) = self.first.take() {
            return Ok(Some(row));
        }
        let Some(line) = self.read()? else { return Ok(None) };
        if self.record.len() != self.header.len() {
            let what = if self.separator == Separator::Comma { "commas" } else { "tabs" };
            return self.fail(
                line,
                format!(
                    "{} values between {what}, the header names {} columns ({})",
                    self.record.len(),
                    self.header.len(),
                    self.header.join(", ")
                ),
            );
        }
        let named = self.header.iter().zip(&self.record).filter(|(name, _)| !name.is_empty());
        let values: Result<Map<String, Value>, DataError> =
            named.map(|(name, field)| Ok((name.clone(), utf8(&self.name, line, field)?.into()))).collect();
        Ok(Some(Row { line, values: values?, is_untyped: true }))
    }
}

impl Iterator for Separated<'_> {
    type Item = Result<Row, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let row = self.row().transpose();
        self.is_done = !matches!(row, Some(Ok(_)));
        row
    }
}

/// A source that gives up after so many bytes, and ends in a mark of ours.
struct Bounded<'a> {
    source: Source<'a>,
    room: Rc<Cell<usize>>,
    end: &'static [u8],
}

impl Read for Bounded<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.room.get() == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let read = match self.source.read(out)? {
            0 => self.end.read(out)?,
            read => read,
        };
        self.room.set(self.room.get().saturating_sub(read));
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(separator: Separator, text: &[u8]) -> Result<Vec<(usize, Vec<String>)>, String> {
        let source = Source::new("a", Box::new(text)).map_err(|e| e.to_string())?;
        let rows = Separated::new(source, separator).map_err(|e| e.to_string())?;
        rows.map(|row| {
            let row = row.map_err(|e| e.to_string())?;
            Ok((row.line, row.values.into_iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap())).collect()))
        })
        .collect()
    }

    #[test]
    fn values_are_named_by_the_header() {
        let text = "\u{feff}text,label\r\n\"a, \"\"b\"\"\r\nc\",1\r\n\r\nd,2".as_bytes();
        let found = rows(Separator::Comma, text).unwrap();
        assert_eq!(found[0], (2, vec!["text=a, \"b\"\r\nc".into(), "label=1".into()]));
        assert_eq!(found[1], (5, vec!["text=d".into(), "label=2".into()]));
        let found = rows(Separator::Tab, b"text\tlabel\n\"a\t1\nb\"\t2\n").unwrap();
        assert_eq!(
            found,
            [(2, vec!["text=\"a".into(), "label=1".into()]), (3, vec!["text=b\"".into(), "label=2".into()])]
        );
        assert!(rows(Separator::Comma, b"").unwrap().is_empty());
        assert!(rows(Separator::Comma, b"text\n").unwrap().is_empty());
    }

    #[test]
    fn malformed_records_are_named_by_line() {
        let reason = |text: &[u8]| rows(Separator::Comma, text).unwrap_err();
        assert_eq!(reason(b"a,b\n1,2\n3\n"), "a:3: 1 values between commas, the header names 2 columns (a, b)");
        assert!(reason(b"a,b\n1,\"2\n3,4\n").starts_with("a:2: a quote is opened"));
        assert!(reason(b"a,b\n1,\"2").starts_with("a:2: a quote is opened"));
        assert!(reason(b"a,a\n").contains("two columns are named `a`"));
        assert!(reason(b"a,b\n1,caf\xe9\n").starts_with("a:2: byte 4 of the line (0xe9)"));
        let endless = b"a\n\"".chain(io::repeat(b'x'));
        let source = Source::new("a", Box::new(endless)).unwrap();
        let error = Separated::new(source, Separator::Comma).unwrap().next().unwrap().unwrap_err();
        assert!(error.to_string().contains("64 MiB"), "{error}");
    }
}
