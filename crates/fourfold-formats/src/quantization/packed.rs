//! Reading packed weights from their parts.

use std::path::Path;

use fourfold_tensor::{
    Buffer, DType, Double, DoubleCodes, FloatBuffer, Offsets, Quantized, Scales, Weight, pack_row, packed_words_per_row,
};

use super::config::{Scheme, Strategy};
use super::parts::unpack_columns;
use crate::error::Failure;
use crate::safetensors::{DataFile, Entry, Store};
use crate::{FormatError, TensorError};

/// The parts of one packed weight, by suffix.
struct Parts<'a> {
    store: &'a Store,
    name: &'a str,
}

impl<'a> Parts<'a> {
    fn get(&self, suffix: &str) -> Option<(&'a DataFile, &'a Entry)> {
        self.store.get(&format!("{}{suffix}", self.name))
    }

    fn need(&self, suffix: &str) -> Result<(&'a DataFile, &'a Entry), TensorError> {
        self.get(suffix).ok_or_else(|| TensorError::PartMissing { part: format!("{}{suffix}", self.name) })
    }
}

/// The logical shape of a packed weight: its `shape` part, checked against its `packed` part.
pub(crate) fn packed_shape(store: &Store, name: &str, scheme: Scheme) -> Result<[usize; 2], FormatError> {
    at_tensor(store, name, "_packed", || shape(&Parts { store, name }, scheme))
}

/// The packed weight `name`.
pub(crate) fn load_packed(store: &Store, name: &str, scheme: Scheme) -> Result<Weight, FormatError> {
    at_tensor(store, name, "_packed", || {
        let parts = Parts { store, name };
        let [rows, cols] = shape(&parts, scheme)?;
        let (file, entry) = parts.need("_packed")?;
        let packed = file.read::<u32>(entry)?;
        assemble(&parts, scheme, rows, cols, packed).map(Weight::Quantized)
    })
}

/// The weight `name` whose codes stand one a byte, signed (`int-quantized`, `naive-quantized`): packed on the way in.
pub(crate) fn load_naive(store: &Store, name: &str, scheme: Scheme) -> Result<Weight, FormatError> {
    at_tensor(store, name, "", || {
        let parts = Parts { store, name };
        let (file, entry) = parts.need("")?;
        let &[rows, cols] = entry.shape.as_slice() else {
            return Err(TensorError::NotMatrix { shape: entry.shape.clone() }.into());
        };
        let codes = file.read::<i8>(entry)?;
        let words = packed_words_per_row(cols, scheme.bits);
        let mut packed = vec![0u32; rows * words];
        let mut line = vec![0u8; cols];
        for (row, out) in codes.chunks_exact(cols.max(1)).zip(packed.chunks_exact_mut(words.max(1))) {
            for (code, &value) in line.iter_mut().zip(row) {
                *code = unsigned(value, scheme.bits)?;
            }
            pack_row(&line, scheme.bits, out);
        }
        assemble(&parts, scheme, rows, cols, packed.into()).map(Weight::Quantized)
    })
}

/// A signed code as the packed form has it.
fn unsigned(value: i8, bits: u8) -> Result<u8, TensorError> {
    let code = i16::from(value) + (1 << (bits - 1));
    match u8::try_from(code) {
        Ok(code) if u16::from(code) < 1 << bits => Ok(code),
        _ => Err(TensorError::CodeRange { value, bits }),
    }
}

/// Names the tensor, and the file of its `suffix` part, in what goes wrong.
pub(super) fn at_tensor<T>(
    store: &Store,
    name: &str,
    suffix: &str,
    read: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, FormatError> {
    read().map_err(|failure| {
        let place = store.get(&format!("{name}{suffix}")).or_else(|| store.iter().next());
        failure.at(place.map_or(Path::new(""), |(file, _)| file.path()), name)
    })
}

/// The part of `name` with that suffix.
pub(super) fn part<'a>(
    store: &'a Store,
    name: &'a str,
    suffix: &str,
) -> Result<(&'a DataFile, &'a Entry), TensorError> {
    Parts { store, name }.need(suffix)
}

/// What the `shape` part says.
pub(super) fn read_shape(store: &Store, name: &str) -> Result<[i64; 2], Failure> {
    let (file, entry) = part(store, name, "_shape")?;
    expect_shape(entry, &[2])?;
    match entry.dtype {
        DType::I64 => file.read::<i64>(entry).map(|dims| [dims[0], dims[1]]).map_err(Failure::from),
        DType::I32 => {
            file.read::<i32>(entry).map(|dims| [i64::from(dims[0]), i64::from(dims[1])]).map_err(Failure::from)
        }
        found => Err(wrong_dtype(entry, "I64 or I32", found).into()),
    }
}

fn shape(parts: &Parts<'_>, scheme: Scheme) -> Result<[usize; 2], Failure> {
    let dims = read_shape(parts.store, parts.name)?;
    let (_, packed) = parts.need("_packed")?;
    let dim = |d: i64| usize::try_from(d).ok().filter(|&d| d <= i32::MAX as usize);
    let (Some(rows), Some(cols)) = (dim(dims[0]), dim(dims[1])) else {
        return Err(TensorError::PackedShape { claimed: dims.to_vec(), packed: packed.shape.clone() }.into());
    };
    if packed.dtype != DType::I32 {
        return Err(wrong_dtype(packed, "I32", packed.dtype).into());
    }
    let fits = *packed.shape == [rows, packed_words_per_row(cols, scheme.bits)];
    if fits {
        Ok([rows, cols])
    } else {
        Err(TensorError::PackedShape { claimed: dims.to_vec(), packed: packed.shape.clone() }.into())
    }
}

/// Joins the codes to scales, offsets and the rest.
fn assemble(
    parts: &Parts<'_>,
    scheme: Scheme,
    rows: usize,
    cols: usize,
    packed: Buffer<u32>,
) -> Result<Quantized, Failure> {
    let group_size = match scheme.strategy {
        Strategy::Tensor | Strategy::Channel => cols.max(1),
        Strategy::Group(size) => size,
        Strategy::Block(..) => return Err(TensorError::NoScheme.into()),
    };
    let groups = cols.div_ceil(group_size);
    let quantized = Quantized {
        rows,
        cols,
        bits: scheme.bits,
        group_size,
        packed,
        scales: scales(parts, scheme, rows, groups)?,
        offsets: offsets(parts, scheme, rows, groups)?,
        codebook: codebook(parts, scheme)?,
        g_idx: g_idx(parts, cols)?,
    };
    quantized.validate()?;
    Ok(quantized)
}

fn scales(parts: &Parts<'_>, scheme: Scheme, rows: usize, groups: usize) -> Result<Scales, Failure> {
    let (file, entry) = parts.need("_scale")?;
    let values = read_floats(file, entry)?;
    if let Some(codes) = parts.get("_scale_code") {
        return Ok(Scales::Double(double(values, entry, codes, rows, groups)?));
    }
    let expected = if scheme.strategy == Strategy::Tensor { vec![1] } else { vec![rows, groups] };
    // Vectors and matrices of the same elements are both seen: [N] for [N, 1], [] or [1, 1] for [1]. One scale serves any
    // number of groups.
    let found = entry.shape.iter().product::<usize>();
    if found == 1 || found == expected.iter().product::<usize>() {
        return Ok(Scales::Float(values));
    }
    Err(TensorError::PartShape { part: entry.name.clone(), expected, found: entry.shape.clone() }.into())
}

/// Floats for runs of groups, of `entry`, and the codes of the groups.
fn double(
    floats: FloatBuffer,
    entry: &Entry,
    (code_file, code_entry): (&DataFile, &Entry),
    rows: usize,
    groups: usize,
) -> Result<Double, Failure> {
    expect_shape(code_entry, &[rows, groups])?;
    let span = match entry.shape[..] {
        [r, spans] if r == rows => Double::span_of(groups, spans),
        _ => None,
    };
    let Some(span) = span else {
        let (part, found) = (entry.name.clone(), entry.shape.clone());
        return Err(TensorError::PartShape { part, expected: vec![rows, 1], found }.into());
    };
    let codes = match code_entry.dtype {
        DType::U8 => DoubleCodes::Unsigned(code_file.read(code_entry)?),
        DType::I8 => DoubleCodes::Signed(code_file.read(code_entry)?),
        found => return Err(wrong_dtype(code_entry, "U8 or I8", found).into()),
    };
    Ok(Double { floats, codes, span })
}

fn offsets(parts: &Parts<'_>, scheme: Scheme, rows: usize, groups: usize) -> Result<Offsets, Failure> {
    if let Some((file, entry)) = parts.get("_min") {
        if let Some(codes) = parts.get("_min_code") {
            return Ok(Offsets::Double(double(read_floats(file, entry)?, entry, codes, rows, groups)?));
        }
        expect_shape(entry, &[rows, groups])?;
        return Ok(Offsets::Min(read_floats(file, entry)?));
    }
    if scheme.symmetric {
        return Ok(Offsets::Symmetric);
    }
    let (file, entry) = parts.need("_zero_point")?;
    let zeros = match entry.dtype {
        DType::I8 => {
            let found = entry.shape.iter().product::<usize>();
            if found != 1 && found != rows * groups {
                let expected = vec![rows, groups];
                return Err(
                    TensorError::PartShape { part: entry.name.clone(), expected, found: entry.shape.clone() }.into()
                );
            }
            let signed = file.read::<i8>(entry)?;
            signed.iter().map(|&z| unsigned(z, scheme.bits)).collect::<Result<Vec<u8>, _>>()?
        }
        DType::I32 => {
            expect_shape(entry, &[packed_words_per_row(rows, scheme.bits), groups])?;
            unpack_columns(&file.read::<u32>(entry)?, rows, groups, scheme.bits)
        }
        found => return Err(wrong_dtype(entry, "I32 or I8", found).into()),
    };
    Ok(Offsets::ZeroPoint(zeros.into()))
}

fn codebook(parts: &Parts<'_>, scheme: Scheme) -> Result<Option<Vec<i8>>, Failure> {
    let Some((file, entry)) = parts.get("_codebook") else { return Ok(None) };
    expect_dtype(entry, DType::I8)?;
    expect_shape(entry, &[1 << scheme.bits])?;
    Ok(Some(file.read::<i8>(entry)?.to_vec()))
}

fn g_idx(parts: &Parts<'_>, cols: usize) -> Result<Option<Buffer<u32>>, Failure> {
    let Some((file, entry)) = parts.get("_g_idx") else { return Ok(None) };
    expect_dtype(entry, DType::I32)?;
    expect_shape(entry, &[cols])?;
    // All −1 is how compressed-tensors writes that there is no order. Other negatives fail the range check as huge.
    let g_idx = file.read::<u32>(entry)?;
    Ok(if g_idx.iter().all(|&g| g == u32::MAX) { None } else { Some(g_idx) })
}

/// A tensor of one of the three float types.
pub(crate) fn read_floats(file: &DataFile, entry: &Entry) -> Result<FloatBuffer, Failure> {
    Ok(match entry.dtype {
        DType::F32 => FloatBuffer::F32(file.read(entry)?),
        DType::F16 => FloatBuffer::F16(file.read(entry)?),
        DType::Bf16 => FloatBuffer::Bf16(file.read(entry)?),
        found => return Err(wrong_dtype(entry, "F32, F16 or BF16", found).into()),
    })
}

fn expect_dtype(entry: &Entry, dtype: DType) -> Result<(), TensorError> {
    if entry.dtype == dtype { Ok(()) } else { Err(wrong_dtype(entry, dtype.name(), entry.dtype)) }
}

pub(super) fn wrong_dtype(entry: &Entry, expected: &'static str, found: DType) -> TensorError {
    TensorError::PartDtype { part: entry.name.clone(), expected, found }
}

pub(super) fn expect_shape(entry: &Entry, expected: &[usize]) -> Result<(), TensorError> {
    if entry.shape == expected {
        return Ok(());
    }
    let (part, found) = (entry.name.clone(), entry.shape.clone());
    Err(TensorError::PartShape { part, expected: expected.to_vec(), found })
}
