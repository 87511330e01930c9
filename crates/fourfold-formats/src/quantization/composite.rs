//! Weights that are stored in parts of their own forms: a mask and values, two factors, the terms of a sum.
//!
//! `quantization_config.forms` of config.json says which weights these are, and how they are built:
//!
//! ```json
//! "forms": [{"targets": ["model.layers.0.mlp.up_proj.weight"], "form": {"sum": ["packed", {"low_rank": ["dense", "dense"]}]}}]
//! ```
//!
//! A form is `"dense"`, `"packed"`, `"sparse"` (kept values as floats), `{"sparse": {"num_bits": 4, "group_size": 128}}` (as codes),
//! `{"low_rank": [up, down]}` or `{"sum": [form, …]}`. Packed parts have their scheme among `config_groups`, by their own names.

use fourfold_tensor::{DType, Dense, Form, LowRank, Sparse, SparseCodes, SparseValues, SparseValuesForm, Sum, Weight};
use serde_json::{Value, json};

use super::config::{ConfigError, QuantizationConfig, Scheme, member};
use super::packed::{at_tensor, expect_shape, load_packed, packed_shape, part, read_floats, read_shape, wrong_dtype};
use super::parts::{DOWN, PARTS, SPARSE_PARTS, TERM, UP};
use crate::safetensors::Store;
use crate::{FormatError, TensorError};

/// Forms inside one another that are read.
const MOST_DEPTH: usize = 4;
/// Terms of a sum that are read.
const MOST_TERMS: usize = 16;

/// How a weight is built, with all that its parts do not say themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Build {
    /// A tensor of floats.
    Dense,
    /// A packed one.
    Packed(Scheme),
    /// A mask and floats.
    Sparse,
    /// A mask and codes.
    SparseCodes {
        /// Bits of a code.
        bits: u8,
        /// Columns that share a scale.
        group_size: usize,
    },
    /// `up · down`.
    LowRank(Box<[Build; 2]>),
    /// `Σ`.
    Sum(Vec<Build>),
}

/// A member of `forms`.
#[derive(Clone, Debug)]
pub struct Composite {
    /// The weight's full name.
    pub name: String,
    /// Its form, as config.json has it.
    form: Value,
}

/// Reads `forms`.
pub(super) fn composites(section: &Value) -> Result<Vec<Composite>, ConfigError> {
    let Some(entries) = section.get("forms").filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
    let Some(entries) = entries.as_array() else { return Err(member("forms", "no list")) };
    let mut all = Vec::new();
    for entry in entries {
        let form = entry.get("form").ok_or_else(|| member("forms", "an entry has no form"))?;
        check(form, 0)?;
        let targets = entry.get("targets").and_then(Value::as_array);
        for name in targets.ok_or_else(|| member("forms", "an entry has no list of targets"))? {
            let name = name.as_str().ok_or_else(|| member("forms", format!("target {name} is no string")))?;
            all.push(Composite { name: name.to_owned(), form: form.clone() });
        }
    }
    Ok(all)
}

/// Whether a form has a meaning.
fn check(form: &Value, depth: usize) -> Result<(), ConfigError> {
    let bad = || member("forms", format!("{form} is no form that is read"));
    if depth > MOST_DEPTH {
        return Err(member("forms", format!("more than {MOST_DEPTH} forms inside one another")));
    }
    match (form.as_str(), single(form)) {
        (Some("dense" | "packed" | "sparse"), _) => Ok(()),
        (None, Some(("sparse", codes))) => code_settings(codes).map(|_| ()).ok_or_else(bad),
        (None, Some(("low_rank", parts))) => match parts.as_array().map(Vec::as_slice) {
            Some([up, down]) => check(up, depth + 1).and_then(|()| check(down, depth + 1)),
            _ => Err(bad()),
        },
        (None, Some(("sum", parts))) => match parts.as_array() {
            Some(terms) if (1..=MOST_TERMS).contains(&terms.len()) => {
                terms.iter().try_for_each(|term| check(term, depth + 1))
            }
            _ => Err(bad()),
        },
        _ => Err(bad()),
    }
}

/// The only member of an object.
fn single(form: &Value) -> Option<(&str, &Value)> {
    let map = form.as_object().filter(|map| map.len() == 1)?;
    map.iter().next().map(|(name, value)| (name.as_str(), value))
}

/// Bits and group size of sparse codes.
fn code_settings(codes: &Value) -> Option<(u8, usize)> {
    let bits = codes.get("num_bits")?.as_u64().filter(|b| (2..=8).contains(b))? as u8;
    let group_size = usize::try_from(codes.get("group_size")?.as_u64()?).ok().filter(|&g| g > 0)?;
    Some((bits, group_size))
}

impl Composite {
    /// The form, with the schemes of its packed parts.
    ///
    /// # Errors
    /// [`TensorError::NoScheme`].
    pub fn build(&self, config: &QuantizationConfig) -> Result<Build, TensorError> {
        build(&self.form, &self.name, config)
    }
}

fn build(form: &Value, name: &str, config: &QuantizationConfig) -> Result<Build, TensorError> {
    Ok(match (form.as_str(), single(form)) {
        (Some("packed"), _) => Build::Packed(config.scheme_of(name).ok_or(TensorError::NoScheme)?),
        (Some("sparse"), _) => Build::Sparse,
        (None, Some(("sparse", codes))) => match code_settings(codes) {
            Some((bits, group_size)) => Build::SparseCodes { bits, group_size },
            None => return Err(TensorError::NoScheme),
        },
        (None, Some(("low_rank", parts))) => {
            let part = |i: usize, suffix| build(&parts[i], &format!("{name}{suffix}"), config);
            Build::LowRank(Box::new([part(0, UP)?, part(1, DOWN)?]))
        }
        (None, Some(("sum", parts))) => {
            let terms = parts.as_array().into_iter().flatten().enumerate();
            let terms = terms.map(|(i, term)| build(term, &format!("{name}{TERM}{i}"), config));
            Build::Sum(terms.collect::<Result<_, _>>()?)
        }
        _ => Build::Dense,
    })
}

/// `form` as config.json has it.
pub(super) fn to_json(form: &Form) -> Value {
    match form {
        Form::Dense { .. } => json!("dense"),
        Form::Quantized(_) => json!("packed"),
        Form::Sparse(form) => match form.values {
            SparseValuesForm::Float(_) => json!("sparse"),
            SparseValuesForm::Codes { bits, group_size, .. } => {
                json!({"sparse": {"num_bits": bits, "group_size": group_size}})
            }
        },
        Form::LowRank { up, down } => json!({"low_rank": [to_json(up), to_json(down)]}),
        Form::Sum(terms) => json!({"sum": terms.iter().map(to_json).collect::<Vec<_>>()}),
    }
}

impl Build {
    /// How a weight of a known form is built.
    pub fn of(form: &Form) -> Self {
        match form {
            Form::Dense { .. } => Self::Dense,
            Form::Quantized(form) => Self::Packed(Scheme::of(form)),
            Form::Sparse(form) => match form.values {
                SparseValuesForm::Float(_) => Self::Sparse,
                SparseValuesForm::Codes { bits, group_size, .. } => Self::SparseCodes { bits, group_size },
            },
            Form::LowRank { up, down } => Self::LowRank(Box::new([Self::of(up), Self::of(down)])),
            Form::Sum(terms) => Self::Sum(terms.iter().map(Self::of).collect()),
        }
    }

    /// The first raw tensor of a weight called `name`: where it stands in the file.
    pub fn first_part(&self, name: &str) -> String {
        match self {
            Self::Dense => name.to_owned(),
            Self::Packed(_) => format!("{name}_packed"),
            Self::Sparse | Self::SparseCodes { .. } => format!("{name}_mask"),
            Self::LowRank(parts) => parts[0].first_part(&format!("{name}{UP}")),
            Self::Sum(terms) => terms[0].first_part(&format!("{name}{TERM}0")),
        }
    }

    /// All names that its raw tensors may have.
    pub fn part_names(&self, name: &str) -> Vec<String> {
        let with = |suffixes: &[&str]| suffixes.iter().map(|s| format!("{name}{s}")).collect();
        match self {
            Self::Dense => vec![name.to_owned()],
            Self::Packed(_) => with(PARTS),
            Self::Sparse | Self::SparseCodes { .. } => with(SPARSE_PARTS),
            Self::LowRank(parts) => {
                let mut names = parts[0].part_names(&format!("{name}{UP}"));
                names.extend(parts[1].part_names(&format!("{name}{DOWN}")));
                names
            }
            Self::Sum(terms) => {
                terms.iter().enumerate().flat_map(|(i, term)| term.part_names(&format!("{name}{TERM}{i}"))).collect()
            }
        }
    }

    /// The shape, from headers and `shape` parts alone.
    pub fn shape(&self, store: &Store, name: &str) -> Result<[usize; 2], FormatError> {
        match self {
            Self::Dense => at_tensor(store, name, "", || {
                let (_, entry) = part(store, name, "")?;
                match *entry.shape {
                    [rows, cols] => Ok([rows, cols]),
                    _ => Err(TensorError::NotMatrix { shape: entry.shape.clone() }.into()),
                }
            }),
            Self::Packed(scheme) => packed_shape(store, name, *scheme),
            Self::Sparse | Self::SparseCodes { .. } => at_tensor(store, name, "_mask", || {
                let (_, mask) = part(store, name, "_mask")?;
                let dims = read_shape(store, name)?;
                let [rows, cols] = dims.map(|d| usize::try_from(d).ok().filter(|&d| d <= i32::MAX as usize));
                let fits = |rows: usize, cols: usize| *mask.shape == [rows, cols.div_ceil(64)];
                match (rows, cols) {
                    (Some(rows), Some(cols)) if fits(rows, cols) => Ok([rows, cols]),
                    _ => Err(TensorError::PackedShape { claimed: dims.to_vec(), packed: mask.shape.clone() }.into()),
                }
            }),
            Self::LowRank(parts) => {
                let up = parts[0].shape(store, &format!("{name}{UP}"))?;
                let down = parts[1].shape(store, &format!("{name}{DOWN}"))?;
                Ok([up[0], down[1]])
            }
            Self::Sum(terms) => terms[0].shape(store, &format!("{name}{TERM}0")),
        }
    }

    /// How it is stored, in a few words, from headers alone.
    pub fn describe(&self, store: &Store, name: &str) -> String {
        let dtype = |suffix: &str| {
            store.get(&format!("{name}{suffix}")).map_or_else(|| "?".to_owned(), |(_, part)| part.dtype.to_string())
        };
        let all = self.shape(store, name).map_or(1, |[rows, cols]| (rows * cols).max(1)) as f64;
        let elements = |suffix: &str| {
            store.get(&format!("{name}{suffix}")).map_or(0, |(_, part)| part.shape.iter().product::<usize>())
        };
        match self {
            Self::Dense => dtype(""),
            Self::Packed(scheme) => scheme.describe(self.shape(store, name).map_or(0, |[_, cols]| cols)),
            Self::Sparse => {
                let gone = 100.0 * (1.0 - elements("_values") as f64 / all);
                format!("sparse {gone:.0} % {}", dtype("_values"))
            }
            Self::SparseCodes { bits, group_size } => {
                let kept = elements("_values_packed") as f64 * 32.0 / f64::from(*bits);
                format!("sparse {:.0} % int{bits} g{group_size}", 100.0 * (1.0 - kept / all).max(0.0))
            }
            Self::LowRank(parts) => {
                let (up_name, down_name) = (format!("{name}{UP}"), format!("{name}{DOWN}"));
                let rank = parts[1].shape(store, &down_name).map_or(0, |[rank, _]| rank);
                let (up, down) = (parts[0].describe(store, &up_name), parts[1].describe(store, &down_name));
                if up == down { format!("rank {rank} ({up})") } else { format!("rank {rank} ({up}, {down})") }
            }
            Self::Sum(terms) => {
                let words = terms.iter().enumerate().map(|(i, term)| term.describe(store, &format!("{name}{TERM}{i}")));
                words.collect::<Vec<_>>().join(" + ")
            }
        }
    }
}

/// The weight called `name`.
pub(crate) fn load(store: &Store, name: &str, build: &Build) -> Result<Weight, FormatError> {
    match build {
        Build::Dense => at_tensor(store, name, "", || {
            let (file, entry) = part(store, name, "")?;
            Ok(Dense::new(entry.shape.clone(), read_floats(file, entry)?).into())
        }),
        Build::Packed(scheme) => load_packed(store, name, *scheme),
        Build::Sparse | Build::SparseCodes { .. } => load_sparse(store, name, build),
        Build::LowRank(parts) => {
            let up = load(store, &format!("{name}{UP}"), &parts[0])?;
            let down = load(store, &format!("{name}{DOWN}"), &parts[1])?;
            let joined = || Ok(LowRank::new(up, down).map_err(TensorError::from)?.into());
            at_tensor(store, name, "", joined)
        }
        Build::Sum(terms) => {
            let terms = terms.iter().enumerate().map(|(i, term)| load(store, &format!("{name}{TERM}{i}"), term));
            let terms = terms.collect::<Result<Vec<_>, _>>()?;
            at_tensor(store, name, "", || Ok(Sum::new(terms).map_err(TensorError::from)?.into()))
        }
    }
}

fn load_sparse(store: &Store, name: &str, build: &Build) -> Result<Weight, FormatError> {
    let [rows, cols] = build.shape(store, name)?;
    at_tensor(store, name, "_mask", || {
        let (file, entry) = part(store, name, "_mask")?;
        if entry.dtype != DType::I64 {
            return Err(wrong_dtype(entry, "I64", entry.dtype).into());
        }
        let mask = file.read::<u64>(entry)?;
        let values = match *build {
            Build::SparseCodes { bits, group_size } => {
                let (file, entry) = part(store, name, "_values_packed")?;
                if entry.dtype != DType::I32 {
                    return Err(wrong_dtype(entry, "I32", entry.dtype).into());
                }
                let packed = file.read::<u32>(entry)?;
                let (file, entry) = part(store, name, "_values_scale")?;
                expect_shape(entry, &[rows, cols.div_ceil(group_size)])?;
                SparseValues::Codes(SparseCodes { bits, group_size, packed, scales: read_floats(file, entry)? })
            }
            Build::Dense | Build::Packed(_) | Build::Sparse | Build::LowRank(_) | Build::Sum(_) => {
                let (file, entry) = part(store, name, "_values")?;
                SparseValues::Float(read_floats(file, entry)?)
            }
        };
        Ok(Sparse::new(rows, cols, mask, values).map_err(TensorError::from)?.into())
    })
}
