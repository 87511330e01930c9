//! Rows of a Parquet file.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result};
use fourfold_train::data::DataError;
use fourfold_train::data::rows::{Row, Rows};
use parquet::file::reader::SerializedFileReader;
use parquet::record::{Field, Row as Record, reader::RowIter};
use serde_json::{Map, Number, Value};

/// The rows of a file; errors count them from 1.
pub fn rows(path: &Path) -> Result<Rows<'static>> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| name.clone())?;
    let reader = SerializedFileReader::new(file).with_context(|| format!("{name}: no Parquet file"))?;
    let rows = RowIter::from_file_into(Box::new(reader));
    Ok(Box::new(rows.enumerate().map(move |(i, record)| match record {
        Ok(record) => Ok(Row { line: i + 1, values: object(&record), is_untyped: false }),
        Err(error) => Err(DataError::Line { file: name.clone(), line: i + 1, reason: error.to_string() }),
    })))
}

fn object(record: &Record) -> Map<String, Value> {
    record.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

/// A field as the JSON that the same row would be in a .jsonl file. Bytes that no annotation calls text become a list of numbers, which is
/// no text either.
fn value(field: &Field) -> Value {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => (*b).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(n) => float(n.to_f64()),
        Field::Float(n) => float(f64::from(*n)),
        Field::Double(n) => float(*n),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => bytes.data().iter().map(|&b| Value::from(b)).collect(),
        Field::Group(group) => object(group).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(key, field)| (key.to_string().trim_matches('"').to_owned(), value(field)))
            .collect(),
        other => other.to_string().into(),
    }
}
