//! Where each tensor lies in the files: names, types and places, from the forms that are declared.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use fourfold_tensor::{BlockType, DType, Form};

use super::meta::put_string;
use super::{GgufModel, MetaValue};
use crate::gguf::arch::Target;
use crate::gguf::{GgmlType, GgufError};

/// Tensor data begin at multiples of this; the format's default.
pub(super) const ALIGNMENT: u64 = 32;

/// A tensor of the files.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub ggml_type: GgmlType,
    /// Place in the data section of its file.
    pub offset: u64,
    pub file: usize,
    pub bytes: u64,
}

/// What a declared tensor becomes.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// Its rows, in order.
    Rows,
    /// Its rows, interleaved within each of so many heads.
    Heads(usize),
    /// One matrix of a stack.
    Expert(u64),
    /// The key half of `kv_b_proj`, transposed.
    Keys,
    /// The value half.
    Values,
}

/// A tensor that a declared one goes to: name, shape, type, and what of it.
type Part = (String, Vec<u64>, GgmlType, Piece);

/// The files' headers and where tensors go.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub entries: Vec<Entry>,
    /// Index of entry and piece, by Hugging Face name.
    pub places: HashMap<String, Vec<(usize, Piece)>>,
    /// Header of each file, padded.
    pub headers: Vec<Vec<u8>>,
    /// Bytes of each file.
    pub sizes: Vec<u64>,
}

/// How the elements of a declared form are stored in a tensor of this name and rank.
fn stored(target: &str, tensor: &str, matrix: bool, form: &Form) -> Result<GgmlType, GgufError> {
    // llama.cpp adds and multiplies these as floats.
    if !matrix || target.ends_with("ffn_gate_inp.weight") {
        return Ok(GgmlType::F32);
    }
    let refused = || GgufError::NotStorable { tensor: tensor.to_owned(), form: form.describe() };
    match form {
        Form::Dense { dtype: DType::F32, .. } => Ok(GgmlType::F32),
        Form::Dense { dtype: DType::F16, .. } => Ok(GgmlType::F16),
        Form::Dense { dtype: DType::Bf16, .. } => Ok(GgmlType::BF16),
        Form::Quantized(form) => BlockType::of_form(form).map(GgmlType::of_blocks).ok_or_else(refused),
        Form::Dense { .. } | Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => Err(refused()),
    }
}

fn shape_of(form: &Form) -> Vec<u64> {
    match form {
        Form::Dense { shape, .. } => shape.iter().map(|&d| d as u64).collect(),
        Form::Quantized(form) => vec![form.rows as u64, form.cols as u64],
        Form::Sparse(form) => vec![form.rows as u64, form.cols as u64],
        Form::LowRank { up, down } => {
            let cols = shape_of(down).last().copied().unwrap_or(0);
            vec![up.rows() as u64, cols]
        }
        Form::Sum(terms) => terms.first().map(shape_of).unwrap_or_default(),
    }
}

/// Bytes of a tensor.
fn bytes_of(kind: GgmlType, shape: &[u64]) -> u64 {
    shape.iter().product::<u64>() / kind.block_len() * kind.block_bytes()
}

/// The tensors that a declared one goes to. A packed `kv_b_proj` keeps its values' rows as they are; its keys,
/// transposed, lie on no grid any more and become f16.
fn parts(model: &GgufModel, tensor: &str, form: &Form) -> Result<Vec<Part>, GgufError> {
    let target = model
        .arch
        .target(tensor)
        .ok_or_else(|| GgufError::NoTarget { tensor: tensor.to_owned(), architecture: model.arch.name() })?;
    let mut shape = shape_of(form);
    if tensor.ends_with(".bias") || tensor.ends_with("norm.weight") || tensor.ends_with("e_score_correction_bias") {
        // A packed bias is a matrix of one row.
        shape = vec![shape.iter().product()];
    }
    let matrix = shape.len() > 1;
    let kind = |name: &str| stored(name, tensor, matrix, form);
    let wrong = |expected: String| GgufError::TensorShape { tensor: tensor.to_owned(), found: shape.clone(), expected };
    let rows = shape.first().copied().unwrap_or(0);
    let heads = |name: String, heads: usize| {
        if heads == 0 || !rows.is_multiple_of(2 * heads as u64) {
            return Err(wrong(format!("rows of {heads} heads")));
        }
        Ok(vec![(name.clone(), shape.clone(), kind(&name)?, Piece::Heads(heads))])
    };
    match target {
        Target::Tensor(name) => Ok(vec![(name.clone(), shape.clone(), kind(&name)?, Piece::Rows)]),
        Target::QueryRows(name) => heads(name, model.heads),
        Target::KeyRows(name) => heads(name, model.kv_heads),
        Target::Expert(name, index) => {
            if index >= model.experts as u64 || shape.len() != 2 {
                return Err(wrong(format!("a matrix of one of {} experts", model.experts)));
            }
            let stack = vec![model.experts as u64, shape[0], shape[1]];
            Ok(vec![(name.clone(), stack, kind(&name)?, Piece::Expert(index))])
        }
        Target::KeyValueUp { keys, values } => {
            let (heads, nope, value) = (model.heads as u64, model.nope_dim as u64, model.value_dim as u64);
            if shape.len() != 2 || rows != heads * (nope + value) {
                return Err(wrong(format!("[{}, _]", heads * (nope + value))));
            }
            let of_values = kind(&values)?;
            let of_keys = if of_values.block_len() > 1 { GgmlType::F16 } else { of_values };
            let rank = shape[1];
            Ok(vec![
                (keys, vec![heads, rank, nope], of_keys, Piece::Keys),
                (values, vec![heads, value, rank], of_values, Piece::Values),
            ])
        }
    }
}

/// Bytes that a tensor takes in the files.
///
/// # Errors
/// A tensor without a place, or a form that GGUF does not have.
pub(super) fn tensor_bytes(model: &GgufModel, tensor: &str, form: &Form) -> Result<u64, GgufError> {
    let parts = parts(model, tensor, form)?;
    Ok(parts
        .iter()
        .map(|(_, shape, kind, piece)| match piece {
            Piece::Expert(_) => bytes_of(*kind, &shape[1..]),
            Piece::Rows | Piece::Heads(_) | Piece::Keys | Piece::Values => bytes_of(*kind, shape),
        })
        .sum())
}

impl Layout {
    /// Lays out tensors in files of at most `split` bytes of data; a larger tensor has a file of its own.
    ///
    /// # Errors
    /// A tensor without a place, a form that GGUF does not have, experts of one stack in several forms.
    pub fn new(model: &GgufModel, tensors: &[(String, Form)], split: Option<u64>) -> Result<Self, GgufError> {
        let mut layout = Self::default();
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut add = |layout: &mut Self, name: &str, shape: &[u64], ggml_type: GgmlType| {
            let bytes = bytes_of(ggml_type, shape);
            if shape.last().is_some_and(|&cols| cols % ggml_type.block_len() != 0) {
                let (tensor, block) = (name.to_owned(), ggml_type.block_len());
                return Err(GgufError::RowLength { tensor, shape: shape.to_vec(), ggml_type: ggml_type.name(), block });
            }
            layout.entries.push(Entry {
                name: name.to_owned(),
                shape: shape.to_vec(),
                ggml_type,
                offset: 0,
                file: 0,
                bytes,
            });
            known.insert(name.to_owned(), layout.entries.len() - 1);
            Ok(layout.entries.len() - 1)
        };
        let mut stacks: HashMap<String, usize> = HashMap::new();
        for (name, values) in &model.extra {
            add(&mut layout, name, &[values.len() as u64], GgmlType::F32)?;
        }
        for (tensor, form) in tensors {
            let mut places = Vec::new();
            for (name, shape, kind, piece) in parts(model, tensor, form)? {
                let index = match stacks.get(&name) {
                    Some(&index) => {
                        let entry = &layout.entries[index];
                        if entry.shape != shape || entry.ggml_type != kind {
                            return Err(GgufError::MixedExperts {
                                tensor: tensor.clone(),
                                stack: name,
                                found: kind.name(),
                                others: entry.ggml_type.name(),
                            });
                        }
                        index
                    }
                    None => {
                        let index = add(&mut layout, &name, &shape, kind)?;
                        if matches!(piece, Piece::Expert(_)) {
                            stacks.insert(name, index);
                        }
                        index
                    }
                };
                places.push((index, piece));
            }
            if layout.places.insert(tensor.clone(), places).is_some() {
                return Err(GgufError::DuplicateTensor(tensor.clone()));
            }
        }
        layout.assign(split);
        layout.write_headers(model);
        Ok(layout)
    }

    /// Files and offsets.
    fn assign(&mut self, split: Option<u64>) {
        let (mut file, mut offset) = (0, 0u64);
        for entry in &mut self.entries {
            if split.is_some_and(|most| offset > 0 && offset + entry.bytes > most) {
                (file, offset) = (file + 1, 0);
            }
            (entry.file, entry.offset) = (file, offset);
            offset += entry.bytes.next_multiple_of(ALIGNMENT);
        }
    }

    /// Entries of a file.
    fn of_file(&self, file: usize) -> Range<usize> {
        let first = self.entries.partition_point(|e| e.file < file);
        first..self.entries.partition_point(|e| e.file <= file)
    }

    fn write_headers(&mut self, model: &GgufModel) {
        let count = self.entries.last().map_or(1, |e| e.file + 1);
        for file in 0..count {
            let entries = &self.entries[self.of_file(file)];
            let mut metadata: Vec<(String, MetaValue)> = if file == 0 { model.metadata.clone() } else { Vec::new() };
            if count > 1 {
                metadata.push(("split.no".to_owned(), MetaValue::U16(file as u16)));
                metadata.push(("split.count".to_owned(), MetaValue::U16(count as u16)));
                metadata.push(("split.tensors.count".to_owned(), MetaValue::I32(self.entries.len() as i32)));
            }
            let mut out = b"GGUF".to_vec();
            out.extend(3u32.to_le_bytes());
            out.extend((entries.len() as u64).to_le_bytes());
            out.extend((metadata.len() as u64).to_le_bytes());
            for (key, value) in &metadata {
                put_string(key, &mut out);
                value.put(&mut out);
            }
            for entry in entries {
                put_string(&entry.name, &mut out);
                out.extend((entry.shape.len() as u32).to_le_bytes());
                entry.shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
                out.extend(entry.ggml_type.id().to_le_bytes());
                out.extend(entry.offset.to_le_bytes());
            }
            out.resize((out.len() as u64).next_multiple_of(ALIGNMENT) as usize, 0);
            let data = entries.last().map_or(0, |e| e.offset + e.bytes.next_multiple_of(ALIGNMENT));
            self.sizes.push(out.len() as u64 + data);
            self.headers.push(out);
        }
    }
}

/// A header for F32 tensors, and where each of them goes behind it.
pub(super) fn header(metadata: &[(String, MetaValue)], tensors: &[(&str, &[u64])]) -> (Vec<u8>, Vec<u64>) {
    let entry = |(name, shape): &(&str, &[u64])| Entry {
        name: (*name).to_owned(),
        shape: shape.to_vec(),
        ggml_type: GgmlType::F32,
        offset: 0,
        file: 0,
        bytes: bytes_of(GgmlType::F32, shape),
    };
    let mut layout = Layout { entries: tensors.iter().map(entry).collect(), ..Layout::default() };
    layout.assign(None);
    layout.write_headers(&GgufModel { metadata: metadata.to_vec(), ..GgufModel::default() });
    (layout.headers.swap_remove(0), layout.entries.iter().map(|e| e.offset).collect())
}

/// At most the bytes that tensors of these forms take in headers and padding, metadata apart.
///
/// # Errors
/// As [`tensor_bytes`].
pub(super) fn table_bytes(model: &GgufModel, tensors: &[(String, Form)]) -> Result<u64, GgufError> {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for (tensor, form) in tensors {
        for (name, shape, _, piece) in parts(model, tensor, form)? {
            if matches!(piece, Piece::Expert(index) if index > 0) || !seen.insert(name.clone()) {
                continue;
            }
            bytes += 8 + name.len() as u64 + 4 + 8 * shape.len() as u64 + 4 + 8 + (ALIGNMENT - 1);
        }
    }
    Ok(bytes)
}
