//! Writing GGUF files (version 3), whole or split as llama.cpp splits them, one tensor at a time.
//!
//! The way through: [`tokenizer`] turns a `tokenizer.json` into metadata, [`layout`] gives every tensor its name, type and place, and
//! [`GgufWriter`] takes tensors in any order. Files grow under other names and take theirs when all are whole.

mod layout;
mod meta;
pub mod tokenizer;

use std::collections::HashMap;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fourfold_disk::{PartialFile, sync_dir};
use fourfold_tensor::{BlockType, DType, FloatBuffer, Form, SourceError, Weight, WeightSink};

use super::arch::Arch;
use super::{GgmlType, GgufError, blocks};
use crate::{FormatError, OutputError};
use layout::{Layout, Piece};
pub use meta::{MetaValue, tokenizer_of};

/// Most files of a split model: the format counts them in 16 bits, their names in five digits.
const MAX_FILES: usize = 9_999;

/// What a file says beside its tensors, and what placing them needs.
#[derive(Clone, Debug, Default)]
pub struct GgufModel {
    /// The architecture.
    pub arch: Arch,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Experts of a layer, 0 where there are none.
    pub experts: usize,
    /// Elements of an MLA key head without position.
    pub nope_dim: usize,
    /// Elements of an MLA value head.
    pub value_dim: usize,
    /// Metadata in the order of the file, `general.architecture` first.
    pub metadata: Vec<(String, MetaValue)>,
    /// Vectors that no layer has: `rope_freqs.weight`.
    pub extra: Vec<(String, Vec<f32>)>,
}

impl GgufModel {
    /// Bytes that a tensor of this name and form takes in the files.
    ///
    /// # Errors
    /// A tensor without a place in the architecture, or a form that GGUF does not have.
    pub fn tensor_bytes(&self, tensor: &str, form: &Form) -> Result<u64, GgufError> {
        layout::tensor_bytes(self, tensor, form)
    }

    /// At most the bytes that tensors of these forms take in headers and padding.
    ///
    /// # Errors
    /// As [`GgufModel::tensor_bytes`].
    pub fn table_bytes(&self, tensors: &[(String, Form)]) -> Result<u64, GgufError> {
        layout::table_bytes(self, tensors)
    }

    /// At most the bytes of metadata, in a file that is not split, and of the tensors that no layer has.
    pub fn metadata_bytes(&self) -> u64 {
        let mut bytes = Vec::new();
        for (key, value) in &self.metadata {
            meta::put_string(key, &mut bytes);
            value.put(&mut bytes);
        }
        let extra = self.extra.iter().map(|(name, values)| (name.len() + 64 + 4 * values.len() + 32) as u64);
        bytes.len() as u64 + 64 + extra.sum::<u64>()
    }
}

/// A file's header for F32 tensors of these names and shapes, padded, and each tensor's place behind it.
pub(super) fn put_header(metadata: &[(String, MetaValue)], tensors: &[(&str, &[u64])]) -> (Vec<u8>, Vec<u64>) {
    layout::header(metadata, tensors)
}

/// The names of a model's files: `out` itself, or `NAME-00001-of-00003.gguf` and so on.
pub fn file_names(out: &Path, count: usize) -> Vec<PathBuf> {
    if count <= 1 {
        return vec![out.to_owned()];
    }
    let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name).to_owned();
    (1..=count).map(|part| out.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))).collect()
}

/// Writes a model as GGUF; see the module's text. Dropped before [`WeightSink::finish`], it leaves nothing.
pub struct GgufWriter {
    out: PathBuf,
    model: GgufModel,
    split: Option<u64>,
    overwrite: bool,
    layout: Layout,
    names: Vec<PathBuf>,
    files: Vec<PartialFile>,
    declared: HashMap<String, (Form, bool)>,
    order: Vec<String>,
}

impl GgufWriter {
    /// Begins an output at the file that [`fourfold_disk::output_file`] found; split into files of at most `split` bytes of tensors.
    pub fn new(out: &Path, model: GgufModel, split: Option<u64>, overwrite: bool) -> Self {
        Self {
            out: out.to_owned(),
            model,
            split,
            overwrite,
            layout: Layout::default(),
            names: Vec::new(),
            files: Vec::new(),
            declared: HashMap::new(),
            order: Vec::new(),
        }
    }

    fn refuse(&self, problem: GgufError) -> FormatError {
        FormatError::Gguf { file: self.out.clone(), problem }
    }

    fn declare(&mut self, tensors: &[(String, Form)]) -> Result<(), FormatError> {
        self.layout = Layout::new(&self.model, tensors, self.split).map_err(|e| self.refuse(e))?;
        let count = self.layout.headers.len();
        if count > MAX_FILES {
            return Err(self.refuse(GgufError::Split(format!("{count} files; a larger --split-size makes fewer"))));
        }
        self.names = file_names(&self.out, count);
        if let Some(there) = self.names.iter().find(|name| !self.overwrite && name.exists() && is_regular(name)) {
            return Err(FormatError::Output { path: there.clone(), problem: OutputError::Exists });
        }
        self.files = self.names.iter().map(|name| PartialFile::create(name)).collect::<Result<_, _>>()?;
        for (i, file) in self.files.iter_mut().enumerate() {
            let written = file.write_all(&self.layout.headers[i]);
            written.map_err(FormatError::io(&self.names[i]))?;
        }
        let extra = std::mem::take(&mut self.model.extra);
        for (i, (_, values)) in extra.iter().enumerate() {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.write_at(i, 0, &bytes)?;
        }
        self.model.extra = extra;
        self.order = tensors.iter().map(|(name, _)| name.clone()).collect();
        self.declared = tensors.iter().map(|(name, form)| (name.clone(), (form.clone(), false))).collect();
        Ok(())
    }

    /// Writes bytes of a tensor, and the padding behind its last.
    fn write_at(&mut self, entry: usize, within: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let entry = &self.layout.entries[entry];
        let (offset, file) = (self.layout.headers[entry.file].len() as u64 + entry.offset + within, entry.file);
        let padding = if within + bytes.len() as u64 == entry.bytes {
            (entry.bytes.next_multiple_of(layout::ALIGNMENT) - entry.bytes) as usize
        } else {
            0
        };
        let out = &mut self.files[file];
        let written = move || -> io::Result<()> {
            out.seek(SeekFrom::Start(offset))?;
            out.write_all(bytes)?;
            out.write_all(&[0; layout::ALIGNMENT as usize][..padding])
        }();
        written.map_err(FormatError::io(&self.names[file]))
    }

    fn put(&mut self, name: &str, weight: &Weight) -> Result<(), FormatError> {
        let Some((form, _)) = self.declared.get(name) else {
            let problem = OutputError::NotDeclared { tensor: name.to_owned() };
            return Err(FormatError::Output { path: self.out.clone(), problem });
        };
        let found = Form::of(weight);
        if found != *form {
            let (tensor, found, declared) = (name.to_owned(), format!("{found:?}"), format!("{form:?}"));
            let problem = OutputError::OtherForm { tensor, found, declared };
            return Err(FormatError::Output { path: self.out.clone(), problem });
        }
        for (entry, piece) in self.layout.places.get(name).cloned().unwrap_or_default() {
            let kind = self.layout.entries[entry].ggml_type;
            let rows = weight.rows();
            let bytes = match piece {
                Piece::Rows | Piece::Expert(_) => encode(kind, weight, name, 0..rows),
                Piece::Heads(heads) => {
                    encode(kind, weight, name, 0..rows).map(|bytes| interleaved(&bytes, heads, rows))
                }
                Piece::Keys => Ok(self.keys(kind, weight)),
                Piece::Values => {
                    let (nope, value) = (self.model.nope_dim, self.model.value_dim);
                    let mut all = Vec::new();
                    (0..self.model.heads)
                        .try_for_each(|head| {
                            let from = head * (nope + value) + nope;
                            all.extend(encode(kind, weight, name, from..from + value)?);
                            Ok(())
                        })
                        .map(|()| all)
                }
            };
            let bytes = bytes.map_err(|e| self.refuse(e))?;
            let within = match piece {
                Piece::Expert(index) => index * bytes.len() as u64,
                Piece::Rows | Piece::Heads(_) | Piece::Keys | Piece::Values => 0,
            };
            self.write_at(entry, within, &bytes)?;
        }
        if let Some((_, written)) = self.declared.get_mut(name) {
            *written = true;
        }
        Ok(())
    }

    /// `[heads, rank, nope]` from `[heads · (nope + value), rank]`.
    fn keys(&self, kind: GgmlType, weight: &Weight) -> Vec<u8> {
        let (nope, value, rank) = (self.model.nope_dim, self.model.value_dim, weight.cols());
        let (mut values, mut row) = (vec![0.0f32; self.model.heads * rank * nope], vec![0.0f32; rank]);
        for (head, keys) in values.chunks_exact_mut(rank * nope).enumerate() {
            for n in 0..nope {
                weight.read_row(head * (nope + value) + n, &mut row);
                row.iter().enumerate().for_each(|(r, &v)| keys[r * nope + n] = v);
            }
        }
        floats(kind, values)
    }

    fn complete(mut self) -> Result<(), FormatError> {
        let missing: Vec<&String> = self.order.iter().filter(|name| !self.declared[*name].1).collect();
        if let Some(first) = missing.first() {
            let problem = OutputError::Incomplete { tensor: (*first).clone(), missing: missing.len() };
            return Err(FormatError::Output { path: self.out.clone(), problem });
        }
        let mut files = std::mem::take(&mut self.files);
        if files.len() > 1 {
            // The first file is what a model is opened by: without it there is none, so that a crash shows no mixture of two.
            let first = &self.names[0];
            if first.exists() {
                std::fs::remove_file(first).map_err(FormatError::io(first))?;
                let dir = first.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                sync_dir(dir).map_err(FormatError::io(dir))?;
            }
        }
        while let Some(file) = files.pop() {
            file.finish()?;
        }
        Ok(())
    }
}

fn is_regular(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() || meta.is_dir())
}

/// Rows of a weight as a type's bytes.
fn encode(kind: GgmlType, weight: &Weight, tensor: &str, rows: std::ops::Range<usize>) -> Result<Vec<u8>, GgufError> {
    let mut out = Vec::new();
    if let Some(block) = kind.blocks() {
        match weight {
            Weight::Quantized(q) if BlockType::of(q) == Some(block) => blocks::encode(block, q, rows, &mut out),
            _ => return Err(GgufError::NotStorable { tensor: tensor.to_owned(), form: weight.describe() }),
        }
        return Ok(out);
    }
    let mut row = vec![0.0f32; weight.cols()];
    for r in rows {
        weight.read_row(r, &mut row);
        out.extend(floats(kind, row.clone()));
    }
    Ok(out)
}

/// Values as floats of a type.
fn floats(kind: GgmlType, values: Vec<f32>) -> Vec<u8> {
    let dtype = match kind {
        GgmlType::F16 => DType::F16,
        GgmlType::BF16 => DType::Bf16,
        _ => DType::F32,
    };
    match FloatBuffer::from_f32(values, dtype) {
        FloatBuffer::F32(v) => v.as_bytes().to_vec(),
        FloatBuffer::F16(v) => v.as_bytes().to_vec(),
        FloatBuffer::Bf16(v) => v.as_bytes().to_vec(),
    }
}

/// The rows of each head with its two halves interleaved: row `2·j + p` is row `p · dim/2 + j` of the head.
fn interleaved(rows: &[u8], heads: usize, count: usize) -> Vec<u8> {
    // A vector's elements are its rows.
    let count = if count == 1 { rows.len() / 4 } else { count };
    let (dim, row) = (count / heads, rows.len() / count);
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(dim * row) {
        for j in 0..dim / 2 {
            for p in 0..2 {
                out.extend_from_slice(&head[(p * dim / 2 + j) * row..][..row]);
            }
        }
    }
    out
}

impl WeightSink for GgufWriter {
    fn begin(&mut self, tensors: &[(String, Form)]) -> Result<(), SourceError> {
        Ok(self.declare(tensors)?)
    }

    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError> {
        Ok(self.put(name, weight)?)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(self.complete()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_are_interleaved() {
        // Two heads of four rows of one byte.
        assert_eq!(interleaved(&[0, 1, 2, 3, 4, 5, 6, 7], 2, 8), [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn parts_have_llama_cpps_names() {
        let names = file_names(Path::new("dir/m.gguf"), 12);
        assert_eq!(names[0], Path::new("dir/m-00001-of-00012.gguf"));
        assert_eq!(names.len(), 12);
        assert_eq!(file_names(Path::new("m.gguf"), 1), [Path::new("m.gguf")]);
    }
}
