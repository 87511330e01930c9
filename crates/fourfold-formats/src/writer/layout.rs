//! Where everything goes: shards, headers and offsets, all from declared forms.

use std::collections::{BTreeMap, HashSet};

use fourfold_tensor::{DType, Form, QuantizedForm, SparseValuesForm};
use serde_json::{Value, json};

use crate::OutputError;
use crate::quantization::{Part, is_own, parts};

/// The output's files before any data.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// The shards, in order.
    pub shards: Vec<Shard>,
    /// For each declared tensor the places of its parts, in the order of [`parts`].
    pub places: Vec<Vec<Place>>,
}

/// One safetensors file.
#[derive(Clone, Debug)]
pub(super) struct Shard {
    /// Its name.
    pub name: String,
    /// Length and JSON, padded: all that precedes the data.
    pub header: Vec<u8>,
    /// Bytes of data.
    pub data_bytes: u64,
    /// Names of its stored tensors.
    pub tensors: Vec<String>,
}

/// Where a part's bytes go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Which shard.
    pub shard: usize,
    /// From the file's begin.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

impl Shard {
    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }
}

impl Layout {
    /// Lays out declared tensors. A weight's parts share a shard.
    pub fn new(declared: &[(String, Form)], max_shard_bytes: u64) -> Result<Self, OutputError> {
        let mut all = Vec::with_capacity(declared.len());
        let mut names = HashSet::new();
        for (name, form) in declared {
            check(name, form)?;
            let parts = parts(name, form);
            for part in &parts {
                if !names.insert(part.name.clone()) {
                    return Err(OutputError::DeclaredTwice { tensor: part.name.clone() });
                }
            }
            all.push(parts);
        }
        let shard_of = split(&all, max_shard_bytes);
        let count = shard_of.last().map_or(1, |last| last + 1);
        // transformers 4 refuses tensors of a format that it does not know, and must refuse these.
        let format = if is_own(declared) { "fourfold" } else { "pt" };
        let mut layout = Self { shards: Vec::with_capacity(count), places: vec![Vec::new(); all.len()] };
        for shard in 0..count {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
            };
            let members: Vec<usize> = (0..all.len()).filter(|&i| shard_of[i] == shard).collect();
            layout.lay_shard(shard, name, format, &members, &all);
        }
        Ok(layout)
    }

    /// Lays out one file. Elements of 8 bytes come first, then 4, 2 and 1: every tensor is aligned for its type without a gap,
    /// which the format does not allow.
    fn lay_shard(&mut self, shard: usize, name: String, format: &str, members: &[usize], all: &[Vec<Part>]) {
        let mut order: Vec<(usize, usize)> =
            members.iter().flat_map(|&i| (0..all[i].len()).map(move |p| (i, p))).collect();
        order.sort_by_key(|&(i, p)| std::cmp::Reverse(all[i][p].dtype.size()));
        for &i in members {
            self.places[i] = vec![Place { shard, offset: 0, bytes: 0 }; all[i].len()];
        }
        let mut text = format!("{{\"__metadata__\":{{\"format\":\"{format}\"}}");
        let (mut at, mut tensors) = (0, Vec::with_capacity(order.len()));
        for (i, p) in order {
            let part = &all[i][p];
            let end = at + part.bytes();
            let entry = json!({"dtype": part.dtype.name(), "shape": part.shape, "data_offsets": [at, end]});
            text += &format!(",{}:{entry}", Value::String(part.name.clone()));
            self.places[i][p] = Place { shard, offset: at, bytes: part.bytes() };
            tensors.push(part.name.clone());
            at = end;
        }
        text.push('}');
        while text.len() % 8 != 0 {
            text.push(' ');
        }
        let header = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        for &i in members {
            self.places[i].iter_mut().for_each(|place| place.offset += header.len() as u64);
        }
        self.shards.push(Shard { name, header, data_bytes: at, tensors });
    }

    /// All headers: what two runs must agree on to share files.
    pub fn digest(&self) -> Vec<u8> {
        self.shards.iter().flat_map(|s| [s.name.as_bytes(), &s.header].concat()).collect()
    }

    /// `model.safetensors.index.json`.
    pub fn index(&self) -> Vec<u8> {
        let total: u64 = self.shards.iter().map(|s| s.data_bytes).sum();
        let map: BTreeMap<&str, &str> =
            self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| (t.as_str(), s.name.as_str()))).collect();
        format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": map})).into_bytes()
    }
}

/// Shard of each tensor, in the declared order.
fn split(all: &[Vec<Part>], max_shard_bytes: u64) -> Vec<usize> {
    let (mut shard, mut filled) = (0, 0u64);
    let mut shard_of = Vec::with_capacity(all.len());
    for parts in all {
        let bytes: u64 = parts.iter().map(Part::bytes).sum();
        if filled > 0 && filled.saturating_add(bytes) > max_shard_bytes {
            (shard, filled) = (shard + 1, 0);
        }
        filled = filled.saturating_add(bytes);
        shard_of.push(shard);
    }
    shard_of
}

/// Whether a form can be stored and its sizes computed.
fn check(name: &str, form: &Form) -> Result<(), OutputError> {
    let not = |reason: String| Err(OutputError::NotStorable { tensor: name.to_owned(), reason });
    match form {
        Form::Dense { shape, dtype } => {
            if !matches!(dtype, DType::F32 | DType::F16 | DType::Bf16) {
                return not(format!("{dtype} is no type of weights"));
            }
            match shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)) {
                Some(_) => Ok(()),
                None => not(format!("shape {shape:?} overflows")),
            }
        }
        Form::Quantized(QuantizedForm { rows, cols, bits, group_size, codebook, .. }) => {
            if !(2..=8).contains(bits) || (*codebook && *bits > 4) {
                return not(format!("{bits} bits"));
            }
            if *group_size == 0 {
                return not("groups of no columns".to_owned());
            }
            match rows.checked_mul(*cols).and_then(|n| n.checked_mul(8)) {
                Some(_) => Ok(()),
                None => not(format!("shape [{rows}, {cols}] overflows")),
            }
        }
        Form::Sparse(form) => {
            if let SparseValuesForm::Codes { bits, group_size, .. } = form.values
                && (!(2..=8).contains(&bits) || group_size == 0)
            {
                return not(format!("{bits} bits in groups of {group_size} columns"));
            }
            match form.rows.checked_mul(form.cols).and_then(|n| n.checked_mul(8)) {
                Some(_) => Ok(()),
                None => not(format!("shape [{}, {}] overflows", form.rows, form.cols)),
            }
        }
        Form::LowRank { up, down } => check(name, up).and_then(|()| check(name, down)),
        Form::Sum(terms) if terms.is_empty() => not("a sum of no terms".to_owned()),
        Form::Sum(terms) => terms.iter().try_for_each(|term| check(name, term)),
    }
}
