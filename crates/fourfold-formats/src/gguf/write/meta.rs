//! Metadata values to be written.

use super::super::metadata::Number;
use super::super::metadata::{Metadata, NumberType, Value};

/// A metadata value with the type that it is written in.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names say all")]
pub enum MetaValue {
    U16(u16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Numbers as another file has them: the format's number of their type, how many there are, and their bytes.
    Numbers {
        kind: u32,
        count: u64,
        bytes: Vec<u8>,
    },
}

impl MetaValue {
    /// A value of another file. `None` for arrays of arrays, which no tokenizer has.
    pub fn copied(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Number(Number::Unsigned(v)) => u32::try_from(*v).map_or(Self::U64(*v), Self::U32),
            Value::Number(Number::Negative(v)) => i32::try_from(*v).map_or(Self::I64(*v), Self::I32),
            Value::Number(Number::Float(v)) if f64::from(*v as f32) == *v || decimal(*v) => Self::F32(*v as f32),
            Value::Number(Number::Float(v)) => Self::F64(*v),
            Value::Number(Number::Bool(v)) => Self::Bool(*v),
            Value::String(v) => Self::String(v.clone()),
            Value::Strings(v) => Self::Strings(v.iter().map(str::to_owned).collect()),
            Value::Numbers(kind, bytes) => {
                let count = (bytes.len() / kind.size()) as u64;
                Self::Numbers { kind: number_id(*kind), count, bytes: bytes.clone() }
            }
            Value::Arrays(_) => return None,
        })
    }

    /// Type and value, little-endian.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend(ARRAY.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        macro_rules! number {
            ($id:expr, $v:expr) => {{
                out.extend(u32::to_le_bytes($id));
                out.extend($v.to_le_bytes());
            }};
        }
        match self {
            Self::U16(v) => number!(2, v),
            Self::U32(v) => number!(4, v),
            Self::I32(v) => number!(5, v),
            Self::F32(v) => number!(6, v),
            Self::U64(v) => number!(10, v),
            Self::I64(v) => number!(11, v),
            Self::F64(v) => number!(12, v),
            Self::Bool(v) => number!(7, u8::from(*v)),
            Self::String(v) => {
                out.extend(STRING.to_le_bytes());
                put_string(v, out);
            }
            Self::Strings(v) => {
                array(out, STRING, v.len());
                v.iter().for_each(|v| put_string(v, out));
            }
            Self::I32s(v) => {
                array(out, 5, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::F32s(v) => {
                array(out, 6, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::Numbers { kind, count, bytes } => {
                array(out, *kind, *count as usize);
                out.extend(bytes);
            }
        }
    }
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Whether a double is the shortest decimal of an f32, as the reader makes it.
fn decimal(v: f64) -> bool {
    (v as f32).to_string().parse() == Ok(v)
}

fn number_id(kind: NumberType) -> u32 {
    match kind {
        NumberType::U8 => 0,
        NumberType::I8 => 1,
        NumberType::U16 => 2,
        NumberType::I16 => 3,
        NumberType::U32 => 4,
        NumberType::I32 => 5,
        NumberType::F32 => 6,
        NumberType::Bool => 7,
        NumberType::U64 => 10,
        NumberType::I64 => 11,
        NumberType::F64 => 12,
    }
}

/// Length and bytes.
pub(super) fn put_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Everything that a file says of its tokenizer, for a file that is made from it.
pub fn tokenizer_of(metadata: &Metadata) -> Vec<(String, MetaValue)> {
    let own = metadata.values.iter().filter(|(key, _)| key.starts_with("tokenizer."));
    own.filter_map(|(key, value)| Some((key.clone(), MetaValue::copied(value)?))).collect()
}
