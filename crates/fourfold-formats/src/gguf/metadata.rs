//! Metadata values as the file holds them, and typed access to them.

use std::collections::BTreeMap;

use super::GgufError;

/// The type of a number in a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say all")]
pub enum NumberType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl NumberType {
    /// Bytes a number takes.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

/// A number of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Not negative.
    Unsigned(u64),
    /// Negative.
    Negative(i64),
    /// A float; one of 32 bits is the shortest decimal that rounds to it, so that 1e-5 reads as 1e-5.
    Float(f64),
    /// A truth value.
    Bool(bool),
}

impl Number {
    /// Reads a number of type `kind` from exactly its bytes, little-endian.
    pub(super) fn from_le(kind: NumberType, bytes: &[u8]) -> Self {
        let mut wide = [0u8; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        let signed = |v: i64| if v < 0 { Self::Negative(v) } else { Self::Unsigned(v as u64) };
        match kind {
            NumberType::U8 | NumberType::U16 | NumberType::U32 | NumberType::U64 => Self::Unsigned(unsigned),
            NumberType::I8 => signed(i64::from(unsigned as u8 as i8)),
            NumberType::I16 => signed(i64::from(unsigned as u16 as i16)),
            NumberType::I32 => signed(i64::from(unsigned as u32 as i32)),
            NumberType::I64 => signed(unsigned as i64),
            NumberType::F32 => Self::Float(decimal(f32::from_bits(unsigned as u32))),
            NumberType::F64 => Self::Float(f64::from_bits(unsigned)),
            NumberType::Bool => Self::Bool(unsigned != 0),
        }
    }
}

/// The f64 nearest to the shortest decimal that names `v`.
fn decimal(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}

/// Strings of an array, end to end: a vocabulary has hundreds of thousands of short ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    ends: Vec<usize>,
}

impl Strings {
    /// Appends a string.
    pub fn push(&mut self, s: &str) {
        self.text.push_str(s);
        self.ends.push(self.text.len());
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `i`.
    pub fn get(&self, i: usize) -> Option<&str> {
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        self.text.get(start..end)
    }

    /// All strings, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).filter_map(|i| self.get(i))
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number or truth value.
    Number(Number),
    /// A string.
    String(String),
    /// An array of numbers, as the file's bytes: a hostile file must not grow in memory.
    Numbers(NumberType, Vec<u8>),
    /// An array of strings.
    Strings(Strings),
    /// An array of arrays.
    Arrays(Vec<Value>),
}

impl Value {
    /// What it is, for an error.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Number(n) => format!("{n:?}"),
            Self::String(s) => format!("the string {s:?}"),
            Self::Numbers(kind, bytes) => format!("an array of {} {kind:?}", bytes.len() / kind.size()),
            Self::Strings(s) => format!("an array of {} strings", s.len()),
            Self::Arrays(a) => format!("an array of {} arrays", a.len()),
        }
    }
}

/// All metadata of a file, by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pub(super) values: BTreeMap<String, Value>,
}

impl Metadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A count; `None` where the key is absent.
    ///
    /// # Errors
    /// The value is no count.
    pub fn count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            // So small that the product of two cannot overflow.
            Some(Value::Number(Number::Unsigned(v))) if *v < 1 << 31 => Ok(Some(*v)),
            Some(other) => Err(bad(key, other, "a count")),
        }
    }

    /// A count that must be there.
    ///
    /// # Errors
    /// The key is absent, or its value is no count.
    pub fn need_count(&self, key: &str) -> Result<u64, GgufError> {
        self.count(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
    }

    /// A finite float.
    ///
    /// # Errors
    /// The value is none.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Number(Number::Float(v))) if v.is_finite() => Ok(Some(*v)),
            Some(Value::Number(Number::Unsigned(v))) => Ok(Some(*v as f64)),
            Some(other) => Err(bad(key, other, "a finite number")),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    /// The value is none.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Number(Number::Bool(v))) => Ok(Some(*v)),
            Some(other) => Err(bad(key, other, "a boolean")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// The value is none.
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(bad(key, other, "a string")),
        }
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The value is none.
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Strings(v)) => Ok(Some(v)),
            Some(other) => Err(bad(key, other, "an array of strings")),
        }
    }

    /// An array of numbers, one by one.
    ///
    /// # Errors
    /// The value is none.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<Number>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Numbers(kind, bytes)) => {
                Ok(Some(bytes.chunks_exact(kind.size()).map(|b| Number::from_le(*kind, b)).collect()))
            }
            Some(other) => Err(bad(key, other, "an array of numbers")),
        }
    }
}

fn bad(key: &str, found: &Value, expected: &'static str) -> GgufError {
    GgufError::BadValue { key: key.to_owned(), found: found.describe(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_of_32_bits_keep_their_decimals() {
        assert_eq!(Number::from_le(NumberType::F32, &1e-5f32.to_le_bytes()), Number::Float(1e-5));
        assert_eq!(Number::from_le(NumberType::F32, &0.1f32.to_le_bytes()), Number::Float(0.1));
        assert_eq!(Number::from_le(NumberType::I8, &[0xff]), Number::Negative(-1));
        assert_eq!(Number::from_le(NumberType::I32, &7i32.to_le_bytes()), Number::Unsigned(7));
    }

    #[test]
    fn strings_come_back() {
        let mut s = Strings::default();
        for word in ["a", "", "ünï"] {
            s.push(word);
        }
        assert_eq!(s.iter().collect::<Vec<_>>(), ["a", "", "ünï"]);
        assert_eq!(s.get(3), None);
    }

    #[test]
    fn a_value_of_another_type_is_named() {
        let mut m = Metadata::default();
        m.values.insert("k".into(), Value::String("x".into()));
        let error = m.count("k").unwrap_err().to_string();
        assert_eq!(error, "metadata k: the string \"x\", expected a count");
        assert!(matches!(m.need_count("absent"), Err(GgufError::MissingKey(_))));
    }
}
