//! Rows of a data file: JSON objects, one a line or in a list, and records of comma- or tab-separated values.

mod json;
mod separated;

use serde_json::{Map, Value};

pub use self::json::{JsonLines, JsonValues};
pub use self::separated::{Separated, Separator};
use super::DataError;
use super::source::Source;

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it begins, counted from 1: a line, in formats without lines the row's number.
    pub line: usize,
    /// Its columns.
    pub values: Map<String, Value>,
    /// Whether every value is a string because the format has no other type.
    pub is_untyped: bool,
}

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// A JSON object a line.
    JsonLines,
    /// A JSON list of objects, or objects one after the other.
    Json,
    /// Comma-separated values with a header.
    Csv,
    /// Tab-separated values with a header.
    Tsv,
}

/// The rows of a source, in order, each read when it is asked for.
pub type Rows<'a> = Box<dyn Iterator<Item = Result<Row, DataError>> + 'a>;

impl RowFormat {
    /// The rows of `source`.
    ///
    /// # Errors
    /// There is no header where the format needs one.
    pub fn rows(self, source: Source<'_>) -> Result<Rows<'_>, DataError> {
        Ok(match self {
            Self::JsonLines => Box::new(JsonLines::new(source)),
            Self::Json => Box::new(JsonValues::new(source)),
            Self::Csv => Box::new(Separated::new(source, Separator::Comma)?),
            Self::Tsv => Box::new(Separated::new(source, Separator::Tab)?),
        })
    }
}

/// What a JSON value is, for errors.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
