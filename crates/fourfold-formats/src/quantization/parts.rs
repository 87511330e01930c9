//! The parts a weight is stored as: names, types and shapes from its form, bytes from the weight itself.

use std::borrow::Cow;

use fourfold_tensor::{
    DType, DoubleForm, Form, Fp8, Offsets, OffsetsForm, Quantized, QuantizedForm, Scales, ScalesForm, Sparse,
    SparseForm, SparseValues, SparseValuesForm, Weight, mask_words_per_row, pack_row, packed_words_per_row,
};
use half::bf16;

/// Suffixes of the parts of a packed weight.
pub const PARTS: &[&str] =
    &["_packed", "_scale", "_scale_code", "_zero_point", "_min", "_min_code", "_codebook", "_g_idx", "_shape"];

/// Suffixes of the parts of a sparse weight.
pub const SPARSE_PARTS: &[&str] = &["_mask", "_values", "_values_packed", "_values_scale", "_shape"];

/// What the factors of a low-rank weight and the terms of a sum are called after the weight's name; terms are numbered from 0.
pub const UP: &str = "_up";
/// See [`UP`].
pub const DOWN: &str = "_down";
/// See [`UP`].
pub const TERM: &str = "_term";

/// One stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Part {
    /// Bytes it takes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.size() as u64
    }
}

/// The parts that a weight called `name` of that form is stored as.
pub fn parts(name: &str, form: &Form) -> Vec<Part> {
    match form {
        Form::Dense { shape, dtype } => vec![Part { name: name.to_owned(), dtype: *dtype, shape: shape.clone() }],
        Form::Quantized(form) => quantized_parts(name, form),
        Form::Sparse(form) => sparse_parts(name, form),
        Form::LowRank { up, down } => {
            let mut all = parts(&format!("{name}{UP}"), up);
            all.extend(parts(&format!("{name}{DOWN}"), down));
            all
        }
        Form::Sum(terms) => {
            terms.iter().enumerate().flat_map(|(i, term)| parts(&format!("{name}{TERM}{i}"), term)).collect()
        }
    }
}

fn sparse_parts(name: &str, form: &SparseForm) -> Vec<Part> {
    let part = |suffix, dtype, shape: Vec<usize>| Part { name: format!("{name}{suffix}"), dtype, shape };
    let mut parts = vec![part("_mask", DType::I64, vec![form.rows, mask_words_per_row(form.cols)])];
    match form.values {
        SparseValuesForm::Float(dtype) => parts.push(part("_values", dtype, vec![form.kept])),
        SparseValuesForm::Codes { bits, group_size, scales } => {
            parts.push(part("_values_packed", DType::I32, vec![packed_words_per_row(form.kept, bits)]));
            parts.push(part("_values_scale", scales, vec![form.rows, form.cols.div_ceil(group_size)]));
        }
    }
    parts.push(part("_shape", DType::I64, vec![2]));
    parts
}

fn quantized_parts(name: &str, form: &QuantizedForm) -> Vec<Part> {
    let (rows, groups) = (form.rows, form.groups());
    let mut parts = Vec::new();
    let mut push =
        |suffix, dtype, shape: Vec<usize>| parts.push(Part { name: format!("{name}{suffix}"), dtype, shape });
    push("_packed", DType::I32, vec![rows, packed_words_per_row(form.cols, form.bits)]);
    match form.scales {
        ScalesForm::PerTensor(dtype) => push("_scale", dtype, vec![1]),
        ScalesForm::PerGroup(dtype) => push("_scale", dtype, vec![rows, groups]),
        ScalesForm::Double(form) => {
            push("_scale", form.dtype, vec![rows, groups.div_ceil(form.span)]);
            push("_scale_code", code_dtype(form), vec![rows, groups]);
        }
    }
    match form.offsets {
        OffsetsForm::Symmetric => {}
        OffsetsForm::ZeroPointPerTensor => push("_zero_point", DType::I8, vec![1]),
        OffsetsForm::ZeroPoint => push("_zero_point", DType::I32, vec![packed_words_per_row(rows, form.bits), groups]),
        OffsetsForm::Min(dtype) => push("_min", dtype, vec![rows, groups]),
        OffsetsForm::Double(form) => {
            push("_min", form.dtype, vec![rows, groups.div_ceil(form.span)]);
            push("_min_code", code_dtype(form), vec![rows, groups]);
        }
    }
    if form.codebook {
        push("_codebook", DType::I8, vec![1 << form.bits]);
    }
    if form.g_idx {
        push("_g_idx", DType::I32, vec![form.cols]);
    }
    push("_shape", DType::I64, vec![2]);
    parts
}

fn code_dtype(form: DoubleForm) -> DType {
    if form.signed { DType::I8 } else { DType::U8 }
}

/// The bytes of [`parts`], in its order.
pub fn part_bytes(weight: &Weight) -> Vec<Cow<'_, [u8]>> {
    match weight {
        Weight::Dense(w) => vec![w.data().as_bytes().into()],
        Weight::Quantized(w) => quantized_bytes(w),
        Weight::Fp8(w) => vec![bf16_bytes(w)],
        Weight::Sparse(w) => sparse_bytes(w),
        Weight::LowRank(w) => {
            let mut bytes = part_bytes(w.up());
            bytes.extend(part_bytes(w.down()));
            bytes
        }
        Weight::Sum(w) => w.terms().iter().flat_map(part_bytes).collect(),
    }
}

/// Products of code and scale, each rounded to BF16: see [`Form::of`].
fn bf16_bytes(w: &Fp8) -> Cow<'_, [u8]> {
    let (mut row, mut bytes) = (vec![0.0; w.cols()], Vec::with_capacity(2 * w.rows() * w.cols()));
    for r in 0..w.rows() {
        w.read_row(r, &mut row);
        bytes.extend(row.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
    }
    bytes.into()
}

fn sparse_bytes(w: &Sparse) -> Vec<Cow<'_, [u8]>> {
    let mut bytes: Vec<Cow<'_, [u8]>> = vec![w.mask().words().as_bytes().into()];
    match w.values() {
        SparseValues::Float(values) => bytes.push(values.as_bytes().into()),
        SparseValues::Codes(codes) => {
            bytes.push(codes.packed.as_bytes().into());
            bytes.push(codes.scales.as_bytes().into());
        }
    }
    bytes.push(shape_bytes(w.rows(), w.cols()));
    bytes
}

/// The bytes of a `shape` part.
fn shape_bytes<'a>(rows: usize, cols: usize) -> Cow<'a, [u8]> {
    [rows as u64, cols as u64].map(u64::to_le_bytes).concat().into()
}

fn quantized_bytes(w: &Quantized) -> Vec<Cow<'_, [u8]>> {
    let mut bytes: Vec<Cow<'_, [u8]>> = vec![w.packed.as_bytes().into()];
    match &w.scales {
        Scales::Float(scales) => bytes.push(scales.as_bytes().into()),
        Scales::Double(double) => {
            bytes.push(double.floats.as_bytes().into());
            bytes.push(double.codes.as_bytes().into());
        }
    }
    match &w.offsets {
        Offsets::Symmetric => {}
        // Alone it is stored unpacked, as compressed-tensors stores a signed code.
        Offsets::ZeroPoint(zeros) if zeros.len() == 1 => {
            bytes.push(vec![(i16::from(zeros[0]) - (1 << (w.bits - 1))) as i8 as u8].into());
        }
        Offsets::ZeroPoint(zeros) => {
            let words = pack_columns(zeros, w.rows, w.groups(), w.bits);
            bytes.push(bytemuck::cast_slice(&words).to_vec().into());
        }
        Offsets::Min(min) => bytes.push(min.as_bytes().into()),
        Offsets::Double(double) => {
            bytes.push(double.floats.as_bytes().into());
            bytes.push(double.codes.as_bytes().into());
        }
    }
    if let Some(codebook) = &w.codebook {
        bytes.push(bytemuck::cast_slice(codebook).into());
    }
    if let Some(g_idx) = &w.g_idx {
        bytes.push(g_idx.as_bytes().into());
    }
    bytes.push(shape_bytes(w.rows, w.cols));
    bytes
}

/// Packs the columns of a `[rows, groups]` matrix of codes: `[ceil(rows·bits/32), groups]` words.
fn pack_columns(codes: &[u8], rows: usize, groups: usize, bits: u8) -> Vec<u32> {
    let words = packed_words_per_row(rows, bits);
    let mut packed = vec![0; words * groups];
    let (mut column, mut line) = (vec![0; rows], vec![0; words]);
    for g in 0..groups {
        column.iter_mut().enumerate().for_each(|(r, code)| *code = codes[r * groups + g]);
        pack_row(&column, bits, &mut line);
        line.iter().enumerate().for_each(|(w, &word)| packed[w * groups + g] = word);
    }
    packed
}

/// Inverse of [`pack_columns`].
pub(super) fn unpack_columns(packed: &[u32], rows: usize, groups: usize, bits: u8) -> Vec<u8> {
    let words = packed_words_per_row(rows, bits);
    let mut codes = vec![0; rows * groups];
    let (mut column, mut line) = (vec![0; rows], vec![0; words]);
    for g in 0..groups {
        line.iter_mut().enumerate().for_each(|(w, word)| *word = packed[w * groups + g]);
        fourfold_tensor::unpack_row(&line, bits, &mut column);
        column.iter().enumerate().for_each(|(r, &code)| codes[r * groups + g] = code);
    }
    codes
}
