//! The header: counts, metadata and the table of tensors. Nothing is allocated before the file is known to be long enough
//! to hold it, so a damaged count cannot exhaust memory.

use std::collections::HashSet;
use std::io::Read;

use super::metadata::{Metadata, Number, NumberType, Strings, Value};
use super::{GgmlType, GgufError};

/// Longest metadata key and tensor name, as the format's specification sets them.
const MAX_KEY: u64 = 65_535;
const MAX_TENSOR_NAME: u64 = 64;
const MAX_NESTING: usize = 4;
/// Bytes a metadata entry and a tensor's entry take at the least.
const MIN_ENTRY: u64 = 8 + 4 + 1;
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;
const DEFAULT_ALIGNMENT: u64 = 32;

/// One tensor of the table, checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// GGUF's name: `blk.0.attn_q.weight`.
    pub name: String,
    /// Shape, outermost first (the file lists it innermost first).
    pub shape: Vec<u64>,
    /// Element type.
    pub ggml_type: GgmlType,
    /// Position of its first byte in the file.
    pub position: u64,
    /// Bytes it takes.
    pub bytes: u64,
}

impl TensorEntry {
    /// Elements of a row.
    pub fn cols(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of a row: rows are whole blocks.
    pub fn row_bytes(&self) -> u64 {
        self.cols() / self.ggml_type.block_len() * self.ggml_type.block_bytes()
    }
}

/// A parsed header.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Metadata.
    pub metadata: Metadata,
    /// Tensors in the file's order.
    pub tensors: Vec<TensorEntry>,
}

/// Reads the header of a file of `file_len` bytes from its beginning.
///
/// # Errors
/// The first malformation: see [`GgufError`].
pub fn parse(input: impl Read, file_len: u64) -> Result<Header, GgufError> {
    let mut r = Reader { input, remaining: file_len };
    let mut magic = [0u8; 4];
    r.exact(&mut magic, || "the magic number".to_owned())?;
    if &magic != b"GGUF" {
        return Err(GgufError::Magic(magic));
    }
    let version = r.u32(|| "the version".to_owned())?;
    match version {
        2 | 3 => {}
        v if v & 0xffff == 0 && v != 0 => return Err(GgufError::BigEndian),
        v => return Err(GgufError::Version(v)),
    }
    let tensor_count = r.u64(|| "the tensor count".to_owned())?;
    let entry_count = r.u64(|| "the metadata count".to_owned())?;
    r.check_count(|| "tensors".to_owned(), tensor_count, MIN_TENSOR)?;
    r.check_count(|| "metadata entries".to_owned(), entry_count, MIN_ENTRY)?;

    let mut metadata = Metadata::default();
    for i in 0..entry_count {
        let key = r.string(|| format!("the key of metadata entry {i}"), MAX_KEY)?;
        let value = r.value(&key)?;
        if metadata.values.insert(key.clone(), value).is_some() {
            return Err(GgufError::DuplicateKey(key));
        }
    }

    let raw = r.tensor_table(tensor_count)?;
    let alignment = metadata.count("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() {
        return Err(GgufError::Alignment(alignment));
    }
    let data_start = (file_len - r.remaining).next_multiple_of(alignment);
    let tensors = place(raw, data_start, alignment, file_len)?;
    Ok(Header { version, metadata, tensors })
}

/// Turns offsets in the data section into positions in the file, and checks that every tensor lies inside it, aligned, and
/// that no two share a byte.
fn place(
    mut tensors: Vec<TensorEntry>,
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<Vec<TensorEntry>, GgufError> {
    let section = file_len.saturating_sub(data_start);
    for t in &mut tensors {
        let offset = t.position;
        if offset % alignment != 0 {
            return Err(GgufError::Misaligned { tensor: t.name.clone(), offset, alignment });
        }
        if offset.checked_add(t.bytes).is_none_or(|end| end > section) {
            let (tensor, shape, bytes) = (t.name.clone(), t.shape.clone(), t.bytes);
            return Err(GgufError::OutsideFile { tensor, shape, offset, bytes, section });
        }
        t.position = data_start + offset;
    }
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_by_key(|t| t.position);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].position + pair[0].bytes > pair[1].position) {
        return Err(GgufError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() });
    }
    Ok(tensors)
}

/// A reader that knows how many bytes the file still has.
struct Reader<R> {
    input: R,
    remaining: u64,
}

impl<R: Read> Reader<R> {
    fn need(&self, what: impl Fn() -> String, needed: u64) -> Result<(), GgufError> {
        if needed > self.remaining {
            return Err(GgufError::Truncated { what: what(), needed, remaining: self.remaining });
        }
        Ok(())
    }

    fn exact(&mut self, out: &mut [u8], what: impl Fn() -> String) -> Result<(), GgufError> {
        self.need(&what, out.len() as u64)?;
        self.input.read_exact(out)?;
        self.remaining -= out.len() as u64;
        Ok(())
    }

    fn u32(&mut self, what: impl Fn() -> String) -> Result<u32, GgufError> {
        let mut bytes = [0; 4];
        self.exact(&mut bytes, what)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self, what: impl Fn() -> String) -> Result<u64, GgufError> {
        let mut bytes = [0; 8];
        self.exact(&mut bytes, what)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn check_count(&self, what: impl Fn() -> String, count: u64, min_bytes: u64) -> Result<(), GgufError> {
        if count.checked_mul(min_bytes).is_none_or(|bytes| bytes > self.remaining) {
            return Err(GgufError::Count { what: what(), count, remaining: self.remaining });
        }
        Ok(())
    }

    /// `len` bytes; the caller has bounded `len` by what is left.
    fn bytes(&mut self, len: u64, what: impl Fn() -> String) -> Result<Vec<u8>, GgufError> {
        self.need(&what, len)?;
        let mut bytes = vec![0; len as usize];
        self.exact(&mut bytes, what)?;
        Ok(bytes)
    }

    fn string(&mut self, what: impl Fn() -> String, limit: u64) -> Result<String, GgufError> {
        let length = self.u64(|| format!("the length of {}", what()))?;
        if length > limit {
            return Err(GgufError::NameTooLong { what: what(), length, limit });
        }
        let bytes = self.bytes(length, &what)?;
        String::from_utf8(bytes).map_err(|_| GgufError::Utf8 { what: what() })
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let id = self.u32(|| format!("the value type of {key}"))?;
        let what = || format!("the value of {key}");
        match id {
            STRING => Ok(Value::String(self.string(what, u64::MAX)?)),
            ARRAY => self.array(key, 1),
            _ => {
                let kind = number_type(key, id)?;
                let mut bytes = [0; 8];
                let bytes = &mut bytes[..kind.size()];
                self.exact(bytes, what)?;
                check_bools(key, kind, bytes)?;
                Ok(Value::Number(Number::from_le(kind, bytes)))
            }
        }
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Value, GgufError> {
        if depth > MAX_NESTING {
            return Err(GgufError::Nesting { key: key.to_owned(), limit: MAX_NESTING });
        }
        let what = || format!("elements of {key}");
        let id = self.u32(|| format!("the element type of {key}"))?;
        let count = self.u64(|| format!("the length of {key}"))?;
        match id {
            STRING => {
                self.check_count(what, count, 8)?;
                let mut strings = Strings::default();
                for i in 0..count {
                    strings.push(&self.string(|| format!("element {i} of {key}"), u64::MAX)?);
                }
                Ok(Value::Strings(strings))
            }
            ARRAY => {
                self.check_count(what, count, 4 + 8)?;
                (0..count).map(|_| self.array(key, depth + 1)).collect::<Result<_, _>>().map(Value::Arrays)
            }
            _ => {
                let kind = number_type(key, id)?;
                self.check_count(what, count, kind.size() as u64)?;
                let bytes = self.bytes(count * kind.size() as u64, what)?;
                check_bools(key, kind, &bytes)?;
                Ok(Value::Numbers(kind, bytes))
            }
        }
    }

    /// The table of tensors. `position` is still the offset in the data section.
    fn tensor_table(&mut self, count: u64) -> Result<Vec<TensorEntry>, GgufError> {
        // Metadata have been read since the count was checked.
        self.check_count(|| "tensors".to_owned(), count, MIN_TENSOR)?;
        let mut names = HashSet::new();
        let mut tensors = Vec::with_capacity(count as usize);
        for i in 0..count {
            let name = self.string(|| format!("the name of tensor {i}"), MAX_TENSOR_NAME)?;
            let entry = self.tensor_entry(name)?;
            if !names.insert(entry.name.clone()) {
                return Err(GgufError::DuplicateTensor(entry.name));
            }
            tensors.push(entry);
        }
        Ok(tensors)
    }

    fn tensor_entry(&mut self, name: String) -> Result<TensorEntry, GgufError> {
        let what = || format!("the description of tensor {name}");
        let dims = self.u32(what)?;
        if !(1..=4).contains(&dims) {
            return Err(GgufError::Dims { tensor: name, dims });
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dims {
            shape.push(self.u64(what)?);
        }
        shape.reverse();
        let id = self.u32(what)?;
        let offset = self.u64(what)?;
        let ggml_type = match GgmlType::from_id(id) {
            Ok(t) => t,
            Err(Some(known)) => return Err(GgufError::UnsupportedType { tensor: name, name: known }),
            Err(None) => return Err(GgufError::UnknownType { tensor: name, id }),
        };
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0);
        let block = ggml_type.block_len();
        let bytes = elements.and_then(|n| (n / block).checked_mul(ggml_type.block_bytes()));
        // What is counted must also be addressable.
        let Some(bytes) = bytes.filter(|&b| b <= isize::MAX as u64 / 8) else {
            return Err(GgufError::Shape { tensor: name, shape });
        };
        let entry = TensorEntry { name, shape, ggml_type, position: offset, bytes };
        if !entry.cols().is_multiple_of(block) {
            let TensorEntry { name: tensor, shape, .. } = entry;
            return Err(GgufError::RowLength { tensor, shape, ggml_type: ggml_type.name(), block });
        }
        Ok(entry)
    }
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn number_type(key: &str, id: u32) -> Result<NumberType, GgufError> {
    Ok(match id {
        0 => NumberType::U8,
        1 => NumberType::I8,
        2 => NumberType::U16,
        3 => NumberType::I16,
        4 => NumberType::U32,
        5 => NumberType::I32,
        6 => NumberType::F32,
        7 => NumberType::Bool,
        10 => NumberType::U64,
        11 => NumberType::I64,
        12 => NumberType::F64,
        _ => return Err(GgufError::ValueType { key: key.to_owned(), id }),
    })
}

fn check_bools(key: &str, kind: NumberType, bytes: &[u8]) -> Result<(), GgufError> {
    match bytes.iter().find(|&&b| kind == NumberType::Bool && b > 1) {
        Some(&byte) => Err(GgufError::Bool { key: key.to_owned(), byte }),
        None => Ok(()),
    }
}
