//! The header: parsed, and every claim in it checked against the file's length before anything is allocated for a tensor.

use std::fmt;

use fourfold_tensor::DType;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use thiserror::Error;

/// Most bytes of a header, as in the reference implementation.
pub const HEADER_LIMIT: u64 = 100_000_000;

/// Most dimensions of a tensor: PyTorch's own limit.
const MOST_DIMENSIONS: usize = 64;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many they are: always elements times size.
    pub bytes: u64,
}

/// One tensor of a type that the format knows and this program does not compute with. Such a tensor is no fault of a
/// file while nothing reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignEntry {
    /// Its name.
    pub name: String,
    /// The type's name.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many they are.
    pub bytes: u64,
}

/// Types of the format that [`DType`] has no word for, with the bits of an element, as the reference implementation has
/// them.
const FOREIGN_TYPES: &[(&str, u64)] =
    &[("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("C64", 64)];

/// A checked header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors, in the order of their bytes. With the foreign ones they cover the file's data without gap or
    /// overlap.
    pub entries: Vec<Entry>,
    /// Tensors of types that this program does not compute with, in the order of their bytes.
    pub foreign: Vec<ForeignEntry>,
    /// `__metadata__`.
    pub metadata: Vec<(String, String)>,
}

/// What is wrong with a header: one variant a malformation.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// No room for the header's length.
    #[error("{length} bytes: too short for a safetensors file, which begins with an 8-byte header length")]
    TooShort {
        /// Length of the file.
        length: u64,
    },
    /// A length beyond [`HEADER_LIMIT`].
    #[error("the header claims {claimed} bytes, the limit is {HEADER_LIMIT}")]
    HeaderTooLarge {
        /// Its length by its own word.
        claimed: u64,
    },
    /// A header that runs past the end.
    #[error(
        "the header claims {claimed} bytes and the file has {available} after the length: truncated, or no safetensors file"
    )]
    HeaderBeyondFile {
        /// Its length by its own word.
        claimed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// No JSON of the header's form.
    #[error("header: {0}")]
    Json(String),
    /// Two entries of one name.
    #[error("tensor {tensor} is in the header twice")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// An element type this program has no word for.
    #[error("tensor {tensor}: unknown dtype {dtype:?} (shape {shape:?})")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The type's name.
        dtype: String,
        /// The claimed shape.
        shape: Vec<u64>,
    },
    /// A number of bytes that no machine can hold, or that is no whole number.
    #[error("tensor {tensor}: shape {shape:?} of {dtype} overflows, or ends inside a byte")]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// The claimed shape.
        shape: Vec<u64>,
    },
    /// An end before its begin.
    #[error("tensor {tensor}: data_offsets [{begin}, {end}] run backwards")]
    OffsetsReversed {
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// One past the last.
        end: u64,
    },
    /// A length that is not elements times size.
    #[error("tensor {tensor}: {dtype} {shape:?} takes {expected} bytes, data_offsets hold {found}")]
    LengthMismatch {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes by type and shape.
        expected: u64,
        /// Bytes by offsets.
        found: u64,
    },
    /// Data that the file does not have.
    #[error("tensor {tensor} {shape:?}: its data end at byte {end} of {available}: the file is truncated")]
    BeyondFile {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// One past its last byte, from the begin of the data.
        end: u64,
        /// Bytes of data there are.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("tensor {tensor}: its data begin at byte {begin}, inside those of tensor {other}, which end at {end}")]
    Overlap {
        /// The later tensor.
        tensor: String,
        /// The earlier one.
        other: String,
        /// Where the later begins.
        begin: u64,
        /// Where the earlier ends.
        end: u64,
    },
    /// Bytes before a tensor that belong to none.
    #[error("tensor {tensor}: bytes {from} to {begin} before its data belong to no tensor")]
    Hole {
        /// The tensor after the hole.
        tensor: String,
        /// First byte of the hole.
        from: u64,
        /// One past its last.
        begin: u64,
    },
    /// Bytes after the last tensor.
    #[error("{extra} bytes after the last tensor{} belong to none", last.as_ref().map(|l| format!(", {l},")).unwrap_or_default())]
    Trailing {
        /// The last tensor, where there is any.
        last: Option<String>,
        /// How many bytes.
        extra: u64,
    },
}

/// The header's length from a file's first 8 bytes, checked against the file's length.
///
/// # Errors
/// [`HeaderError::TooShort`], [`HeaderError::HeaderTooLarge`], [`HeaderError::HeaderBeyondFile`].
pub(super) fn header_length(first: [u8; 8], file_len: u64) -> Result<u64, HeaderError> {
    let claimed = u64::from_le_bytes(first);
    let available = file_len.checked_sub(8).ok_or(HeaderError::TooShort { length: file_len })?;
    if claimed > available {
        // Said first: a text or zip file read as a length gives an absurd number, and this is what is wrong with it.
        return Err(HeaderError::HeaderBeyondFile { claimed, available });
    }
    if claimed > HEADER_LIMIT {
        return Err(HeaderError::HeaderTooLarge { claimed });
    }
    Ok(claimed)
}

/// Parses the JSON `text` of a header whose data begin at byte `data_start` of a file of `file_len` bytes, and checks all of it.
///
/// # Errors
/// The first malformation found.
pub fn parse_header(text: &[u8], data_start: u64, file_len: u64) -> Result<Header, HeaderError> {
    let raw: RawHeader = serde_json::from_slice(text).map_err(|e| HeaderError::Json(e.to_string()))?;
    let available = file_len.saturating_sub(data_start);
    let (mut entries, mut foreign) = (Vec::with_capacity(raw.tensors.len()), Vec::new());
    for (name, tensor) in raw.tensors {
        match check(name, tensor, data_start, available)? {
            Checked::Known(entry) => entries.push(entry),
            Checked::Foreign(entry) => foreign.push(entry),
        }
    }
    let known = entries.iter().map(|e: &Entry| Span { offset: e.offset, bytes: e.bytes, name: &e.name });
    let mut spans: Vec<Span> = known
        .chain(foreign.iter().map(|e: &ForeignEntry| Span { offset: e.offset, bytes: e.bytes, name: &e.name }))
        .collect();
    let mut names: Vec<&str> = spans.iter().map(|span| span.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(HeaderError::Duplicate { tensor: pair[0].to_owned() });
    }
    spans.sort_unstable();
    covers_all(&spans, data_start, available)?;
    entries.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    foreign.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    Ok(Header { entries, foreign, metadata: raw.metadata })
}

/// The bytes of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Span<'a> {
    offset: u64,
    bytes: u64,
    name: &'a str,
}

/// An entry whose own claims hold.
enum Checked {
    Known(Entry),
    Foreign(ForeignEntry),
}

/// One entry's own claims.
fn check(name: String, raw: RawTensor, data_start: u64, available: u64) -> Result<Checked, HeaderError> {
    let Shape(shape) = raw.shape;
    let [begin, end] = raw.data_offsets;
    let dtype = dtype_of(&raw.dtype);
    let foreign = || FOREIGN_TYPES.iter().find(|(known, _)| *known == raw.dtype).map(|&(_, bits)| bits);
    let Some(bits) = dtype.map(|dtype| 8 * dtype.size() as u64).or_else(foreign) else {
        return Err(HeaderError::UnknownDtype { tensor: name, dtype: raw.dtype, shape });
    };
    // All dimensions must be representable, even beside a zero: `usize` holds what the machine can index.
    let dims: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let expected = elements.and_then(|n| n.checked_mul(bits)).filter(|n| n % 8 == 0).map(|n| n / 8);
    let (Some(dims), Some(expected)) = (dims, expected.filter(|&n| n <= isize::MAX as u64)) else {
        return Err(HeaderError::ShapeOverflow { tensor: name, dtype: raw.dtype, shape });
    };
    if end < begin {
        return Err(HeaderError::OffsetsReversed { tensor: name, begin, end });
    }
    if end - begin != expected {
        let (dtype, found) = (raw.dtype, end - begin);
        return Err(HeaderError::LengthMismatch { tensor: name, dtype, shape, expected, found });
    }
    if end > available {
        return Err(HeaderError::BeyondFile { tensor: name, shape, end, available });
    }
    let (offset, bytes) = (data_start + begin, expected);
    Ok(match dtype {
        Some(dtype) => Checked::Known(Entry { name, dtype, shape: dims, offset, bytes }),
        None => Checked::Foreign(ForeignEntry { name, dtype: raw.dtype, shape: dims, offset, bytes }),
    })
}

/// Whether sorted spans cover the data once.
fn covers_all(spans: &[Span], data_start: u64, available: u64) -> Result<(), HeaderError> {
    let mut at = data_start;
    let mut last: Option<&str> = None;
    for span in spans {
        let (begin, end) = (span.offset - data_start, at - data_start);
        match (span.offset.cmp(&at), last) {
            (std::cmp::Ordering::Less, Some(other)) => {
                let (tensor, other) = (span.name.to_owned(), other.to_owned());
                return Err(HeaderError::Overlap { tensor, other, begin, end });
            }
            (std::cmp::Ordering::Equal, _) => {}
            (_, _) => return Err(HeaderError::Hole { tensor: span.name.to_owned(), from: end, begin }),
        }
        at = span.offset + span.bytes;
        last = Some(span.name);
    }
    match data_start + available - at {
        0 => Ok(()),
        extra => Err(HeaderError::Trailing { last: last.map(str::to_owned), extra }),
    }
}

/// The type a header's name stands for.
fn dtype_of(name: &str) -> Option<DType> {
    use DType::{Bf16, Bool, F8E4M3, F8E5M2, F8E8M0, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64};
    let all = [F32, F16, Bf16, F8E4M3, F8E5M2, F8E8M0, F64, U8, U16, U32, U64, I8, I16, I32, I64, Bool];
    all.into_iter().find(|d| d.name() == name)
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Shape,
    data_offsets: [u64; 2],
}

/// A shape of at most [`MOST_DIMENSIONS`]: a header of 100 MB must not become 50 million dimensions.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MOST_DIMENSIONS} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MOST_DIMENSIONS {
                        return Err(A::Error::invalid_length(dims.len() + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// The header as written: every entry kept, so that a name that stands twice is seen.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: Vec<(String, String)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: Vec::new() };
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(A::Error::duplicate_field("__metadata__"));
                        }
                        let pairs: Option<serde_json::Map<String, serde_json::Value>> = map.next_value()?;
                        for (key, value) in pairs.into_iter().flatten() {
                            let serde_json::Value::String(value) = value else {
                                return Err(A::Error::custom(format!("__metadata__.{key} is no string")));
                            };
                            header.metadata.push((key, value));
                        }
                    } else {
                        let tensor = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}
