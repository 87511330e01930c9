//! A GGUF file as a source of Hugging Face weights: [`open`] reads the header, [`GgufSource`] one tensor at a time, by
//! position, into memory of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fourfold_tensor::{DType, Dense, FloatBuffer, SourceError, TensorInfo, Weight, WeightSource};
use serde_json::Value;

use super::arch::{Arch, Place};
use super::config::{self, Keys, Sizes};
use super::header::TensorEntry;
use super::metadata::Metadata;
use super::split::{Part, open_parts};
use super::tokenizer::{self, Embedded};
use super::write::{MetaValue, tokenizer_of};
use super::{GgmlType, GgufError, blocks, blocks::Decoder};

/// Bytes read at a time, in whole rows.
const READ_BYTES: u64 = 1 << 20;

/// An opened GGUF model.
pub struct Gguf {
    /// `config.json`, made from the metadata.
    pub config: Value,
    /// The tokenizer, where the file has one.
    pub tokenizer: Option<Embedded>,
    /// The tokenizer's metadata as they are.
    pub tokenizer_metadata: Vec<(String, MetaValue)>,
    /// The chat template (Jinja), where the file has one.
    pub chat_template: Option<String>,
    /// The chat template for conversations with tools, if it has one.
    pub tool_template: Option<String>,
    /// The weights.
    pub source: GgufSource,
    /// Bytes of all tensor data.
    pub weight_bytes: u64,
    /// Bytes of the files.
    pub file_bytes: u64,
}

/// Opens a GGUF file, or the first file of a split model.
///
/// # Errors
/// The file concerned, and what is wrong with it.
pub fn open(path: &Path) -> Result<Gguf, (PathBuf, GgufError)> {
    let mut parts = open_parts(path)?;
    let metadata = std::mem::take(&mut parts[0].header.metadata);
    build(path, parts, &metadata).map_err(|error| (path.to_owned(), error))
}

fn build(path: &Path, parts: Vec<Part>, metadata: &Metadata) -> Result<Gguf, GgufError> {
    let name = metadata.string("general.architecture")?;
    let name = name.ok_or_else(|| GgufError::MissingKey("general.architecture".to_owned()))?;
    let keys = Keys { arch: Arch::from_name(name)?, metadata };
    super::keys::check(&keys)?;
    let sizes = Sizes::read(&keys)?;
    let mut files = Vec::with_capacity(parts.len());
    let mut table = Table::default();
    let mut file_bytes = 0;
    for part in parts {
        file_bytes += part.file.metadata()?.len();
        table.add(files.len(), part.header.tensors);
        files.push(DataFile { path: part.path, file: Mutex::new(part.file) });
    }
    let weight_bytes = table.entries.iter().map(|(_, entry)| entry.bytes).sum();

    let mut source = GgufSource::new(path.to_owned(), files);
    let rope_factors = match table.find("rope_freqs.weight") {
        Some((file, entry)) if entry.shape == [sizes.key_dim / 2] => {
            let mut bytes = vec![0; entry.bytes as usize];
            source.files[*file].read(entry.position, &mut bytes)?;
            Some(blocks::decode(entry.ggml_type, &[entry.cols() as usize], &bytes)?.to_f32())
        }
        Some((_, entry)) => return Err(wrong_shape(entry, format!("[{}]", sizes.key_dim / 2))),
        None => None,
    };
    let config = config::synthesise(&keys, &sizes, &table, rope_factors.as_deref())?;
    for (file, entry) in &table.entries {
        source.place(&keys, &sizes, *file, entry)?;
    }
    source.check_halves()?;
    Ok(Gguf {
        config: Value::Object(config),
        tokenizer: tokenizer::embedded(metadata)?,
        tokenizer_metadata: tokenizer_of(metadata),
        chat_template: metadata.string("tokenizer.chat_template")?.map(str::to_owned),
        tool_template: metadata.string("tokenizer.chat_template.tool_use")?.map(str::to_owned),
        source,
        weight_bytes,
        file_bytes,
    })
}

/// Every tensor of all files, by GGUF's name.
#[derive(Default)]
pub struct Table {
    entries: Vec<(usize, TensorEntry)>,
    index: HashMap<String, usize>,
}

impl Table {
    fn add(&mut self, file: usize, entries: Vec<TensorEntry>) {
        for entry in entries {
            self.index.insert(entry.name.clone(), self.entries.len());
            self.entries.push((file, entry));
        }
    }

    fn find(&self, name: &str) -> Option<&(usize, TensorEntry)> {
        self.index.get(name).map(|&i| &self.entries[i])
    }

    /// Shape of a tensor, outermost first.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        self.find(name).map(|(_, entry)| entry.shape.as_slice())
    }

    /// Whether a tensor's name has a property.
    pub fn any(&self, has: impl Fn(&str) -> bool) -> bool {
        self.index.keys().any(|name| has(name))
    }
}

/// A file of tensor data.
struct DataFile {
    path: PathBuf,
    file: Mutex<File>,
}

impl DataFile {
    /// Fills `out` from a position; the header's check has found the bytes inside the file.
    fn read(&self, position: u64, out: &mut [u8]) -> Result<(), GgufError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(position))?;
        Ok(file.read_exact(out)?)
    }

    /// A tensor, decoded some pieces of `unit` bytes at a time; `reorder` changes each piece before that.
    fn load(&self, rows: &Rows, shape: &[usize], unit: u64, reorder: impl Fn(&mut [u8])) -> Result<Weight, GgufError> {
        let mut decoder = Decoder::new(rows.ggml_type, shape);
        let step = unit * (READ_BYTES / unit).max(1);
        let mut buffer = vec![0; step.min(rows.bytes) as usize];
        let mut done = 0;
        while done < rows.bytes {
            let part = &mut buffer[..step.min(rows.bytes - done) as usize];
            self.read(rows.position + done, part)?;
            part.chunks_exact_mut(unit as usize).for_each(&reorder);
            decoder.push(part)?;
            done += part.len() as u64;
        }
        Ok(decoder.finish())
    }
}

/// A run of whole rows in a file.
#[derive(Clone, Debug)]
struct Rows {
    file: usize,
    ggml_type: GgmlType,
    position: u64,
    bytes: u64,
    shape: Vec<usize>,
}

impl Rows {
    /// Bytes of a row.
    fn row_bytes(&self) -> u64 {
        let rows: usize = self.shape[..self.shape.len() - 1].iter().product();
        self.bytes / rows as u64
    }
}

/// How a logical tensor comes from the file's.
#[derive(Clone, Debug)]
enum Recipe {
    /// The rows as they lie.
    AsIs(Rows),
    /// The rows of each of `heads` heads with their two halves interleaved.
    Interleaved { rows: Rows, heads: usize },
    /// `kv_b_proj` from its halves: keys `[heads · rank, nope]`, values `[heads · value, rank]`.
    KeyValueUp { keys: Option<Rows>, values: Option<Rows>, heads: usize },
}

/// The weights of a GGUF model under Hugging Face names.
pub struct GgufSource {
    path: PathBuf,
    files: Vec<DataFile>,
    tensors: Vec<TensorInfo>,
    recipes: Vec<Recipe>,
    index: HashMap<String, usize>,
}

impl GgufSource {
    fn new(path: PathBuf, files: Vec<DataFile>) -> Self {
        Self { path, files, tensors: Vec::new(), recipes: Vec::new(), index: HashMap::new() }
    }

    /// Adds the logical tensors of one entry.
    fn place(&mut self, keys: &Keys, sizes: &Sizes, file: usize, entry: &TensorEntry) -> Result<(), GgufError> {
        let shape: Vec<usize> = entry.shape.iter().map(|&d| d as usize).collect();
        let (position, bytes) = (entry.position, entry.bytes);
        let rows = Rows { file, ggml_type: entry.ggml_type, position, bytes, shape };
        match keys.arch.place(&entry.name, sizes.layers)? {
            Place::RopeFactors | Place::Nothing => Ok(()),
            Place::Tensor(_) if entry.shape.len() > 2 => Err(wrong_shape(entry, "at most two dimensions".to_owned())),
            Place::Tensor(name) => self.add(name, rows.shape.clone(), Recipe::AsIs(rows)),
            Place::QueryRows(name) => self.add_heads(entry, name, rows, sizes.heads, sizes.key_dim),
            Place::KeyRows(name) => self.add_heads(entry, name, rows, sizes.kv_heads, sizes.key_dim),
            Place::Experts { prefix, suffix } => {
                if entry.shape.len() != 3 || entry.shape[0] != sizes.experts {
                    return Err(wrong_shape(entry, format!("[{}, _, _]", sizes.experts)));
                }
                let one = Rows { bytes: bytes / sizes.experts, shape: rows.shape[1..].to_vec(), ..rows };
                for expert in 0..sizes.experts {
                    let rows = Rows { position: position + expert * one.bytes, ..one.clone() };
                    self.add(format!("{prefix}{expert}{suffix}"), one.shape.clone(), Recipe::AsIs(rows))?;
                }
                Ok(())
            }
            Place::KeyUp(name) => {
                if entry.shape.len() != 3 || entry.shape[0] != sizes.heads || entry.shape[2] != sizes.nope_dim {
                    return Err(wrong_shape(entry, format!("[{}, _, {}]", sizes.heads, sizes.nope_dim)));
                }
                self.add_half(entry, name, sizes, rows, true)
            }
            Place::ValueUp(name) => {
                if entry.shape.len() != 3 || entry.shape[0] != sizes.heads || entry.shape[1] != sizes.value_dim {
                    return Err(wrong_shape(entry, format!("[{}, {}, _]", sizes.heads, sizes.value_dim)));
                }
                self.add_half(entry, name, sizes, rows, false)
            }
        }
    }

    fn add(&mut self, name: String, shape: Vec<usize>, recipe: Recipe) -> Result<(), GgufError> {
        let (storage, bytes) = match &recipe {
            Recipe::AsIs(rows) | Recipe::Interleaved { rows, .. } => (rows.ggml_type.name(), rows.bytes),
            Recipe::KeyValueUp { keys, values, .. } => {
                let halves = || keys.iter().chain(values);
                (halves().next().map_or("", |h| h.ggml_type.name()), halves().map(|h| h.bytes).sum())
            }
        };
        if self.index.insert(name.clone(), self.tensors.len()).is_some() {
            return Err(GgufError::DuplicateTensor(name));
        }
        self.tensors.push(TensorInfo { name, shape, storage: storage.to_owned(), bytes });
        self.recipes.push(recipe);
        Ok(())
    }

    fn add_heads(
        &mut self,
        entry: &TensorEntry,
        name: String,
        rows: Rows,
        heads: u64,
        dim: u64,
    ) -> Result<(), GgufError> {
        if entry.shape.len() > 2 || entry.shape[0] != heads * dim {
            return Err(wrong_shape(entry, format!("{} rows", heads * dim)));
        }
        if entry.shape.len() == 1 && entry.ggml_type.block_len() != 1 {
            return Err(wrong_shape(entry, "a bias of plain floats".to_owned()));
        }
        self.add(name, rows.shape.clone(), Recipe::Interleaved { rows, heads: heads as usize })
    }

    /// Adds one half of a `kv_b_proj`, whichever the file has first.
    fn add_half(
        &mut self,
        entry: &TensorEntry,
        name: String,
        sizes: &Sizes,
        rows: Rows,
        is_keys: bool,
    ) -> Result<(), GgufError> {
        let rank = if is_keys { rows.shape[1] } else { rows.shape[2] };
        let shape = vec![(sizes.heads * (sizes.nope_dim + sizes.value_dim)) as usize, rank];
        let Some(&at) = self.index.get(&name) else {
            let (keys, values) = if is_keys { (Some(rows), None) } else { (None, Some(rows)) };
            return self.add(name, shape, Recipe::KeyValueUp { keys, values, heads: sizes.heads as usize });
        };
        if self.tensors[at].shape != shape {
            return Err(wrong_shape(entry, format!("a rank of {}", self.tensors[at].shape[1])));
        }
        self.tensors[at].bytes += rows.bytes;
        match &mut self.recipes[at] {
            Recipe::KeyValueUp { keys: slot @ None, .. } if is_keys => *slot = Some(rows),
            Recipe::KeyValueUp { values: slot @ None, .. } if !is_keys => *slot = Some(rows),
            // Files that keep `attn_kv_b` beside its halves: the whole serves.
            _ => self.tensors[at].bytes -= rows.bytes,
        }
        Ok(())
    }

    /// Finds a `kv_b_proj` of which one half is missing.
    fn check_halves(&self) -> Result<(), GgufError> {
        for (tensor, recipe) in self.tensors.iter().zip(&self.recipes) {
            if let Recipe::KeyValueUp { keys, values, .. } = recipe
                && (keys.is_none() || values.is_none())
            {
                let missing = if keys.is_none() { "attn_k_b" } else { "attn_v_b" };
                return Err(GgufError::MissingTensor(format!("{missing} of {}", tensor.name)));
            }
        }
        Ok(())
    }

    fn cook(&self, recipe: &Recipe, shape: &[usize]) -> Result<Weight, (usize, GgufError)> {
        let load = |rows: &Rows, shape: &[usize], unit: u64, reorder: &dyn Fn(&mut [u8])| {
            self.files[rows.file].load(rows, shape, unit, reorder).map_err(|e| (rows.file, e))
        };
        match recipe {
            Recipe::AsIs(rows) => load(rows, &rows.shape, rows.row_bytes(), &|_| {}),
            Recipe::Interleaved { rows, heads } => {
                let dim = rows.shape[0] / heads;
                load(rows, &rows.shape, rows.bytes / *heads as u64, &|head| {
                    let sorted = halves_together(head, dim);
                    head.copy_from_slice(&sorted);
                })
            }
            Recipe::KeyValueUp { keys: Some(k), values: Some(v), heads } => {
                let flat = |rows: &Rows| {
                    load(rows, &[rows.shape[0] * rows.shape[1], rows.shape[2]], rows.row_bytes(), &|_| {})
                };
                let rank = shape[1];
                let values = key_value_up(&flat(k)?.to_f32(), &flat(v)?.to_f32(), *heads, rank);
                let dtype = match (k.ggml_type, v.ggml_type) {
                    (GgmlType::BF16, GgmlType::BF16) => DType::Bf16,
                    (GgmlType::F16, GgmlType::F16) => DType::F16,
                    _ => DType::F32,
                };
                Ok(Dense::new(shape.to_vec(), FloatBuffer::from_f32(values, dtype)).into())
            }
            // `check_halves` has refused the file.
            Recipe::KeyValueUp { .. } => Err((0, GgufError::MissingTensor("half of kv_b_proj".to_owned()))),
        }
    }
}

impl WeightSource for GgufSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let Some(&at) = self.index.get(name) else {
            return Err(SourceError::Missing { file: self.path.clone(), tensor: name.to_owned() });
        };
        self.cook(&self.recipes[at], &self.tensors[at].shape).map_err(|(file, error)| SourceError::Tensor {
            file: self.files[file].path.clone(),
            tensor: name.to_owned(),
            reason: Box::new(error),
        })
    }
}

/// Puts the `dim` rows of a head back into two halves: the file's row `2·j + p` is row `p · dim/2 + j`.
fn halves_together(head: &[u8], dim: usize) -> Vec<u8> {
    let row_bytes = head.len() / dim;
    let mut out = Vec::with_capacity(head.len());
    for row in (0..2).flat_map(|parity| (0..dim / 2).map(move |j| 2 * j + parity)) {
        out.extend_from_slice(&head[row * row_bytes..][..row_bytes]);
    }
    out
}

/// `kv_b_proj` `[heads · (nope + value), rank]` from keys `[heads, rank, nope]` and values `[heads, value, rank]`.
fn key_value_up(keys: &[f32], values: &[f32], heads: usize, rank: usize) -> Vec<f32> {
    let nope = keys.len() / (heads * rank);
    let mut out = Vec::with_capacity(keys.len() + values.len());
    for (k, v) in keys.chunks_exact(rank * nope).zip(values.chunks_exact(values.len() / heads)) {
        for n in 0..nope {
            out.extend((0..rank).map(|r| k[r * nope + n]));
        }
        out.extend_from_slice(v);
    }
    out
}

fn wrong_shape(entry: &TensorEntry, expected: String) -> GgufError {
    GgufError::TensorShape { tensor: entry.name.clone(), found: entry.shape.clone(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_return_to_halves() {
        // Four rows of one byte and of two, as the converter interleaves 0 1 | 2 3.
        assert_eq!(halves_together(&[0, 2, 1, 3], 4), [0, 1, 2, 3]);
        assert_eq!(halves_together(&[0, 0, 2, 2, 1, 1, 3, 3], 4), [0, 0, 1, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn halves_of_kv_b_join() {
        // One head, rank 2, nope 3, value 1.
        let keys = [1., 2., 3., 10., 20., 30.];
        assert_eq!(key_value_up(&keys, &[7., 8.], 1, 2), [1., 10., 2., 20., 3., 30., 7., 8.]);
    }
}
