//! Rows that are JSON objects.

use serde_json::{Map, Value};

use super::{Row, kind};
use crate::data::DataError;
use crate::data::source::{MOST_ROW, Source, too_long, utf8};

/// A JSON object a line; empty lines are none.
pub struct JsonLines<'a> {
    source: Source<'a>,
    line: Vec<u8>,
    is_done: bool,
}

impl<'a> JsonLines<'a> {
    /// The lines of `source`.
    pub fn new(source: Source<'a>) -> Self {
        Self { source, line: Vec::new(), is_done: false }
    }

    fn row(&mut self) -> Result<Option<Row>, DataError> {
        while let Some(line) = self.source.line(&mut self.line)? {
            if self.line.trim_ascii().is_empty() {
                continue;
            }
            let values = object(self.source.name(), line, &self.line).map_err(|error| match error {
                DataError::Line { file, line, reason } if reason.contains("a list where") => {
                    let reason = format!("{reason}; a JSON list of rows is read from a .json file");
                    DataError::Line { file, line, reason }
                }
                other => other,
            })?;
            return Ok(Some(Row { line, values, is_untyped: false }));
        }
        Ok(None)
    }
}

impl Iterator for JsonLines<'_> {
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

/// The objects of a JSON list, or objects one after the other, over as many lines as they like.
pub struct JsonValues<'a> {
    source: Source<'a>,
    value: Vec<u8>,
    state: State,
    is_done: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Begin,
    /// Objects one after the other.
    Stream,
    /// In a list: before its first value, after a value, after a comma.
    First,
    After,
    Comma,
    End,
}

impl<'a> JsonValues<'a> {
    /// The objects of `source`.
    pub fn new(source: Source<'a>) -> Self {
        Self { source, value: Vec::new(), state: State::Begin, is_done: false }
    }

    fn fail<T>(&self, line: usize, reason: impl Into<String>) -> Result<T, DataError> {
        Err(DataError::Line { file: self.source.name().to_owned(), line, reason: reason.into() })
    }

    fn row(&mut self) -> Result<Option<Row>, DataError> {
        let mut last = 1;
        loop {
            let next = self.source.peek()?;
            if let Some((byte, line)) = next {
                last = line;
                if byte.is_ascii_whitespace() {
                    self.source.take(byte);
                    continue;
                }
            }
            self.state = match (self.state, next.map(|(byte, _)| byte)) {
                (State::Begin, Some(b'[')) => State::First,
                (State::First | State::After, Some(b']')) => State::End,
                (State::After, Some(b',')) => State::Comma,
                (State::Begin | State::Stream | State::End, None) => return Ok(None),
                (State::Begin | State::Stream, Some(_)) => return self.value(last, State::Stream).map(Some),
                (State::Comma, Some(b']')) => return self.fail(last, "a comma before the list's end"),
                (State::First | State::Comma, Some(_)) => return self.value(last, State::After).map(Some),
                (State::First | State::After | State::Comma, None) => {
                    return self.fail(last, "the list has no end: the file is cut");
                }
                (State::After, Some(_)) => return self.fail(last, "no comma between two values of the list"),
                (State::End, Some(_)) => return self.fail(last, "more text after the list's end"),
            };
            if let Some((byte, _)) = next {
                self.source.take(byte);
            }
        }
    }

    /// Reads a value from its first byte on: an object up to its brace, or whatever else stands there for the error.
    fn value(&mut self, first: usize, then: State) -> Result<Row, DataError> {
        self.value.clear();
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        while let Some((byte, _)) = self.source.peek()? {
            if depth == 0 && !self.value.is_empty() && (byte.is_ascii_whitespace() || b",]".contains(&byte)) {
                break;
            }
            self.source.take(byte);
            self.value.push(byte);
            if self.value.len() > MOST_ROW {
                return Err(too_long(self.source.name(), first));
            }
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => depth += 1,
                b'}' | b']' if !in_string => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        break;
                    }
                }
                _ => {}
            }
        }
        let values = object(self.source.name(), first, &self.value)?;
        self.state = then;
        Ok(Row { line: first, values, is_untyped: false })
    }
}

impl Iterator for JsonValues<'_> {
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

/// A JSON object; its text begins on line `first`.
fn object(file: &str, first: usize, text: &[u8]) -> Result<Map<String, Value>, DataError> {
    let text = utf8(file, first, text)?;
    let fail = |line: usize, reason: String| DataError::Line { file: file.to_owned(), line, reason };
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(fail(first, format!("{} where a JSON object is expected", kind(&other)))),
        Err(error) => {
            let what = error.to_string();
            let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
            let line = first + error.line().saturating_sub(1);
            Err(fail(line, format!("not JSON at column {}: {what}", error.column())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::rows::RowFormat;

    fn rows(format: RowFormat, text: &str) -> Result<Vec<(usize, String)>, String> {
        let source = Source::new("a", Box::new(text.as_bytes())).map_err(|e| e.to_string())?;
        let rows = format.rows(source).map_err(|e| e.to_string())?;
        rows.map(|row| row.map(|r| (r.line, Value::Object(r.values).to_string())).map_err(|e| e.to_string())).collect()
    }

    #[test]
    fn lists_streams_and_lines_are_the_same_rows() {
        let expected: Vec<String> = (0..3).map(|i| format!("{{\"text\":\"a ]}}{i}\\\"\"}}")).collect();
        let values = |rows: Vec<(usize, String)>| rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>();
        let list = format!("\u{feff}[\r\n {}\r\n]\r\n", expected.join(",\n "));
        let lines = expected.join("\r\n\r\n");
        assert_eq!(values(rows(RowFormat::Json, &list).unwrap()), expected);
        assert_eq!(values(rows(RowFormat::Json, &lines).unwrap()), expected);
        assert_eq!(values(rows(RowFormat::Json, &expected.concat()).unwrap()), expected);
        assert_eq!(values(rows(RowFormat::JsonLines, &format!("\u{feff}{lines}")).unwrap()), expected);
        assert_eq!(rows(RowFormat::Json, "[\n{\n\"a\": [1,\n{}]},\n\n{}]").unwrap().last().unwrap().0, 6);
        assert!(rows(RowFormat::Json, " [ ] ").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_row_is_named_by_its_line() {
        let reason = |format, text: &str| rows(format, text).unwrap_err();
        for (text, expected) in [
            ("[{}, {}", "a:1: the list has no end"),
            ("[{},\n]", "a:2: a comma before"),
            ("[{}\n{}]", "a:2: no comma"),
            ("[{}]\n\nx", "a:3: more text"),
            ("[{},\n3]", "a:2: a number where a JSON object"),
            ("{}\n\"x\"", "a:2: a string where a JSON object"),
            ("[{},\n{\"a\":\n tru}]", "a:3: not JSON at column"),
            ("{\"a\": 1", "a:1: not JSON at column 7: EOF"),
            ("x", "a:1: not JSON"),
        ] {
            let found = reason(RowFormat::Json, text);
            assert!(found.starts_with(expected), "{text}: {found}");
        }
        assert!(reason(RowFormat::JsonLines, "{}\n[{}]").starts_with("a:2: a list where a JSON object"));
        assert!(reason(RowFormat::JsonLines, "{}\n[{}]").ends_with(".json file"));
        assert!(reason(RowFormat::JsonLines, "{}\n{\"a\": NaN}").starts_with("a:2: not JSON at column 7"));
    }

    #[test]
    fn deep_and_endless_values_end() {
        let deep = "[".repeat(100_000);
        assert!(rows(RowFormat::Json, &format!("[{{\"a\": {deep}")).unwrap_err().contains("recursion limit"));
        let endless = std::io::Read::chain(&b"[{\"a\": \""[..], std::io::repeat(b'x'));
        let source = Source::new("a", Box::new(endless)).unwrap();
        let error = JsonValues::new(source).next().unwrap().unwrap_err();
        assert!(error.to_string().contains("64 MiB"), "{error}");
    }
}
