//! Importance matrices (llama.cpp's `imatrix`): the mean square of each input of a weight, over some text. Read and written as GGUF
//! and in the older `.dat` form.

use std::collections::BTreeMap;
use std::path::Path;

use super::arch::{Arch, Target};
use super::header::{self, TensorEntry};
use super::write::{MetaValue, put_header};
use super::{GgmlType, GgufError};
use crate::{FormatError, regular};

/// Largest file that is read: some hundred times what a model of 671 G parameters has.
const MOST_BYTES: u64 = 4 << 30;
/// Longest name of a weight.
const MOST_NAME: usize = 256;

/// The statistics of one weight, or of the stacked experts of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance {
    /// Mean squares, `[matrices, inputs]`.
    pub means: Vec<f32>,
    /// Tokens that each matrix saw.
    pub counts: Vec<f32>,
}

/// A file of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By GGUF's name of the weight.
    pub entries: BTreeMap<String, Importance>,
    /// Where the text came from.
    pub datasets: Vec<String>,
    /// Chunks of text.
    pub chunks: u32,
    /// Tokens of a chunk.
    pub chunk_size: u32,
}

impl Imatrix {
    /// Reads a file of either form.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(path: &Path) -> Result<Self, FormatError> {
        let bytes = regular::read(path, MOST_BYTES).map_err(FormatError::io(path))?;
        Self::parse(&bytes).map_err(|problem| FormatError::Gguf { file: path.to_owned(), problem })
    }

    /// The content of a file of either form.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let found = if bytes.starts_with(b"GGUF") { Self::of_gguf(bytes)? } else { Self::of_dat(bytes)? };
        for (name, entry) in &found.entries {
            if entry.means.iter().any(|v| !v.is_finite() || *v < 0.0) {
                return wrong(format!("{name} has a mean square that is negative, infinite or no number"));
            }
        }
        if found.entries.is_empty() {
            return wrong("it has no entries");
        }
        Ok(found)
    }

    fn of_gguf(bytes: &[u8]) -> Result<Self, GgufError> {
        let header = header::parse(bytes, bytes.len() as u64)?;
        let kind = header.metadata.string("general.type")?.unwrap_or("model");
        if kind != "imatrix" {
            return wrong(format!("general.type is {kind:?}, not \"imatrix\""));
        }
        let values = |entry: &TensorEntry| -> Result<Vec<f32>, GgufError> {
            if entry.ggml_type != GgmlType::F32 {
                return wrong(format!("{} is not F32", entry.name));
            }
            let data = bytes.get(entry.position as usize..(entry.position + entry.bytes) as usize).unwrap_or_default();
            Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let tensors: BTreeMap<&str, &TensorEntry> = header.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let mut entries = BTreeMap::new();
        for (name, sums) in tensors.iter().filter_map(|(name, t)| Some((name.strip_suffix(".in_sum2")?, t))) {
            let Some(counts) = tensors.get(format!("{name}.counts").as_str()) else {
                return wrong(format!("{name}.counts is missing"));
            };
            let (mut means, counts) = (values(sums)?, values(counts)?);
            if counts.is_empty() || !means.len().is_multiple_of(counts.len()) {
                return wrong(format!("{name}: {} sums for {} matrices", means.len(), counts.len()));
            }
            let inputs = means.len() / counts.len();
            for (row, &count) in means.chunks_exact_mut(inputs.max(1)).zip(&counts) {
                // As llama.cpp reads them: a matrix that no token reached has equal inputs.
                row.iter_mut().for_each(|v| *v = if count > 0.0 { *v / count } else { 1.0 });
            }
            entries.insert(name.to_owned(), Importance { means, counts });
        }
        let datasets = header.metadata.strings("imatrix.datasets")?;
        Ok(Self {
            entries,
            datasets: datasets.map(|all| all.iter().map(str::to_owned).collect()).unwrap_or_default(),
            chunks: header.metadata.count("imatrix.chunk_count")?.unwrap_or(0) as u32,
            chunk_size: header.metadata.count("imatrix.chunk_size")?.unwrap_or(0) as u32,
        })
    }

    fn of_dat(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut at = Cursor { bytes };
        let count = at.number()?;
        let mut found = Self::default();
        for _ in 0..count {
            let length = at.number()?;
            if length == 0 || length > MOST_NAME {
                return wrong(format!("it is no imatrix: a name of {length} bytes"));
            }
            let name = String::from_utf8(at.take(length)?.to_vec());
            let name = name.map_err(|_| GgufError::Utf8 { what: "the name of an entry".to_owned() })?;
            let calls = at.number()?;
            let values = at.number()?;
            let data = at.take(values.saturating_mul(4))?;
            let per_call = if calls > 0 { calls as f32 } else { 1.0 };
            let means = data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) / per_call).collect();
            let entry = Importance { means, counts: vec![calls as f32] };
            if found.entries.insert(name.clone(), entry).is_some() {
                return wrong(format!("{name} stands twice"));
            }
        }
        // Older files end here.
        if let Ok(chunks) = at.number() {
            found.chunks = chunks as u32;
            let length = at.number()?;
            found.datasets.push(String::from_utf8_lossy(at.take(length)?).into_owned());
        }
        Ok(found)
    }

    /// The mean squares for a weight of Hugging Face's name with so many inputs; `None` where the file has none of it, or of another width.
    pub fn of(&self, arch: Arch, tensor: &str, inputs: usize) -> Option<&[f32]> {
        let (entry, expert) = self.find(arch, tensor)?;
        let Some(expert) = expert else { return (entry.means.len() == inputs).then_some(&entry.means) };
        let fits = entry.counts.len() == 1 || entry.means.len() == inputs.checked_mul(entry.counts.len())?;
        let from = expert.checked_mul(inputs)?;
        entry
            .means
            .get(from..from.checked_add(inputs)?)
            .filter(|_| fits && entry.means.len().is_multiple_of(inputs.max(1)))
    }

    /// Whether the file has anything for a weight.
    pub fn has(&self, arch: Arch, tensor: &str) -> bool {
        self.find(arch, tensor).is_some()
    }

    fn find(&self, arch: Arch, tensor: &str) -> Option<(&Importance, Option<usize>)> {
        let (name, index) = match arch.target(tensor)? {
            Target::Tensor(name) | Target::QueryRows(name) | Target::KeyRows(name) => (name, None),
            Target::Expert(name, index) => (name, Some(index as usize)),
            // Its halves are multiplied with other inputs.
            Target::KeyValueUp { .. } => return None,
        };
        Some((self.entries.get(&name)?, index))
    }

    /// The file as GGUF.
    pub fn to_gguf(&self) -> Vec<u8> {
        let text = |v: &str| MetaValue::String(v.to_owned());
        let metadata = [
            ("general.type".to_owned(), text("imatrix")),
            ("imatrix.datasets".to_owned(), MetaValue::Strings(self.datasets.clone())),
            ("imatrix.chunk_count".to_owned(), MetaValue::U32(self.chunks)),
            ("imatrix.chunk_size".to_owned(), MetaValue::U32(self.chunk_size)),
        ];
        let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = Vec::new();
        for (name, entry) in &self.entries {
            let (matrices, inputs) = (entry.counts.len(), entry.means.len() / entry.counts.len().max(1));
            let sums = entry.means.chunks_exact(inputs.max(1)).zip(&entry.counts);
            let sums = sums.flat_map(|(row, &count)| row.iter().map(move |v| v * count)).collect();
            tensors.push((format!("{name}.in_sum2"), vec![matrices as u64, inputs as u64], sums));
            tensors.push((format!("{name}.counts"), vec![matrices as u64, 1], entry.counts.clone()));
        }
        let shapes: Vec<(&str, &[u64])> =
            tensors.iter().map(|(name, shape, _)| (name.as_str(), shape.as_slice())).collect();
        let (mut out, offsets) = put_header(&metadata, &shapes);
        let start = out.len();
        for ((_, _, values), offset) in tensors.iter().zip(offsets) {
            out.resize(start + offset as usize, 0);
            out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }

    /// The file in the older form, which knows no counts of single experts.
    pub fn to_dat(&self) -> Vec<u8> {
        let number = |n: usize| (n as i32).to_le_bytes();
        let mut out = number(self.entries.len()).to_vec();
        let chunk = self.chunk_size.max(1) as f32;
        for (name, entry) in &self.entries {
            let most = entry.counts.iter().fold(0.0f32, |m, &v| m.max(v));
            let calls = (most / chunk).ceil().max(1.0);
            out.extend(number(name.len()));
            out.extend(name.as_bytes());
            out.extend(number(calls as usize));
            out.extend(number(entry.means.len()));
            out.extend(entry.means.iter().flat_map(|v| (v * calls).to_le_bytes()));
        }
        let dataset = self.datasets.last().map(String::as_str).unwrap_or_default();
        out.extend(number(self.chunks as usize));
        out.extend(number(dataset.len()));
        out.extend(dataset.as_bytes());
        out
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError::Imatrix(what.into()))
}

/// Bytes still to be read.
struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], GgufError> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else {
            return wrong(format!("truncated, or no imatrix: {count} bytes are needed, {} are left", self.bytes.len()));
        };
        self.bytes = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<usize, GgufError> {
        let bytes = self.take(4)?;
        let number = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        usize::try_from(number).or_else(|_| wrong(format!("it is no imatrix: a count of {number}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Imatrix {
        let entries = [
            ("blk.0.attn_q.weight", Importance { means: vec![1.0, 2.0, 0.5], counts: vec![1024.0] }),
            ("blk.1.ffn_up_exps.weight", Importance { means: vec![1.0, 2.0, 3.0, 4.0], counts: vec![8.0, 16.0] }),
        ];
        Imatrix {
            entries: entries.map(|(name, entry)| (name.to_owned(), entry)).into(),
            datasets: vec!["wiki.txt".to_owned()],
            chunks: 2,
            chunk_size: 512,
        }
    }

    #[test]
    fn both_forms_come_back() {
        assert_eq!(Imatrix::parse(&example().to_gguf()).unwrap(), example());
        let old = Imatrix::parse(&example().to_dat()).unwrap();
        assert_eq!(old.entries["blk.0.attn_q.weight"].means, [1.0, 2.0, 0.5]);
        assert_eq!((old.chunks, old.datasets), (2, vec!["wiki.txt".to_owned()]));
        let both = example();
        assert_eq!(both.of(Arch::Llama, "model.layers.0.self_attn.q_proj.weight", 3), Some(&[1.0, 2.0, 0.5][..]));
        assert_eq!(both.of(Arch::Llama, "model.layers.0.self_attn.q_proj.weight", 4), None);
        let expert = "model.layers.1.mlp.experts.1.up_proj.weight";
        assert_eq!(both.of(Arch::DeepSeek2, expert, 2), Some(&[3.0, 4.0][..]));
    }

    #[test]
    fn damage_is_an_error() {
        for bytes in [example().to_gguf(), example().to_dat()] {
            for end in (0..bytes.len()).step_by(3) {
                // What lacks no more than the padding, or the older form's last lines, may be read.
                let _ = Imatrix::parse(&bytes[..end]);
            }
            assert!(Imatrix::parse(&bytes[..20]).is_err());
        }
        let mut negative = example();
        negative.entries.get_mut("blk.0.attn_q.weight").unwrap().means[1] = -1.0;
        for bytes in [negative.to_gguf(), negative.to_dat(), vec![0; 4], b"hello".to_vec(), vec![0xff; 64]] {
            assert!(matches!(Imatrix::parse(&bytes), Err(GgufError::Imatrix(_))), "{bytes:?}");
        }
    }
}
