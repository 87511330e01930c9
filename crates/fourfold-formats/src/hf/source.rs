//! Logical tensors over raw ones: parts of packed weights become one tensor.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use fourfold_tensor::{DType, Dense, FloatBuffer, SourceError, TensorInfo, Weight, WeightSource};

use crate::error::Failure;
use crate::quantization::{
    Build, PARTS, QuantizationConfig, Scheme, Strategy, load_blocks, load_composite, load_naive, load_packed,
    load_plain, packed_shape, read_floats,
};
use crate::safetensors::{DataFile, Entry, ForeignEntry, Store};
use crate::{FormatError, TensorError};

/// The weights of safetensors files.
pub struct HfSource {
    path: PathBuf,
    store: Store,
    infos: Vec<TensorInfo>,
    /// Place in `infos` and way to read, by logical name.
    recipes: HashMap<String, (usize, Recipe)>,
    /// How composite weights are built.
    builds: Vec<Build>,
}

/// How a logical tensor is read.
#[derive(Clone, Copy, Debug)]
enum Recipe {
    /// As it stands.
    Plain,
    /// Not at all: its type is none that is computed with.
    Foreign,
    /// From packed codes and their parts.
    Packed(Scheme),
    /// From one code a byte and its parts.
    Naive(Scheme),
    /// From FP8 codes and the part that holds a scale for each block of (rows, cols).
    Fp8 { scales: &'static str, block: (usize, usize) },
    /// From parts of their own forms: the place in `builds`.
    Composite(usize),
}

/// The part that holds DeepSeek's FP8 scales.
const SCALE_INV: &str = "_scale_inv";
/// The part that holds any other scales.
const SCALE: &str = "_scale";

impl HfSource {
    /// Finds the logical tensors of a store. Activation scales and other tensors that belong to no weight stay tensors of their
    /// own.
    ///
    /// # Errors
    /// A packed weight without scheme or of unknown shape, FP8 blocks of unknown size, a weight both packed and plain.
    pub fn new(path: &Path, store: Store, config: &QuantizationConfig) -> Result<Self, FormatError> {
        let mut composites = HashMap::new();
        let mut parts = HashSet::new();
        let mut builds = Vec::new();
        for composite in config.composites() {
            let build = composite.build(config).map_err(|e| Failure::from(e).at(path, &composite.name))?;
            let first = build.first_part(&composite.name);
            if store.get(&first).is_none() {
                return Err(Failure::from(TensorError::PartMissing { part: first }).at(path, &composite.name));
            }
            parts.extend(build.part_names(&composite.name));
            composites.insert(first, (composite.name.as_str(), Recipe::Composite(builds.len())));
            builds.push(build);
        }
        for (file, entry) in store.iter() {
            if parts.contains(&entry.name) {
                continue;
            }
            let recipe = recipe(&store, entry, config);
            if let Some((name, recipe)) = recipe.map_err(|e| Failure::from(e).at(file.path(), &entry.name))? {
                parts.extend(PARTS.iter().chain([&SCALE_INV]).map(|suffix| format!("{name}{suffix}")));
                composites.insert(entry.name.clone(), (name, recipe));
            }
        }
        let (mut infos, mut recipes) = (Vec::new(), HashMap::new());
        for (file, entry) in store.iter() {
            let (name, recipe) = match composites.get(entry.name.as_str()) {
                Some((name, recipe)) => (*name, *recipe),
                None if parts.contains(&entry.name) => continue,
                None => (entry.name.as_str(), Recipe::Plain),
            };
            if recipes.insert(name.to_owned(), (infos.len(), recipe)).is_some() {
                return Err(Failure::from(TensorError::PackedAndPlain).at(file.path(), name));
            }
            infos.push(describe(&store, entry, name, recipe, &builds)?);
        }
        for (file, entry) in store.foreign() {
            if recipes.insert(entry.name.clone(), (infos.len(), Recipe::Foreign)).is_some() {
                return Err(Failure::from(TensorError::PackedAndPlain).at(file.path(), &entry.name));
            }
            let (name, shape, storage) = (entry.name.clone(), entry.shape.clone(), entry.dtype.clone());
            infos.push(TensorInfo { name, shape, storage, bytes: entry.bytes });
        }
        Ok(Self { path: path.to_owned(), store, infos, recipes, builds })
    }

    /// Bytes of all tensor data.
    pub fn data_bytes(&self) -> u64 {
        self.store.data_bytes()
    }

    /// The raw tensor that holds the codes, or the first of a weight's parts.
    fn raw_name(&self, name: &str, recipe: Recipe) -> String {
        match recipe {
            Recipe::Packed(_) => format!("{name}_packed"),
            Recipe::Plain | Recipe::Foreign | Recipe::Naive(_) | Recipe::Fp8 { .. } => name.to_owned(),
            Recipe::Composite(place) => self.builds[place].first_part(name),
        }
    }

    /// Reads one logical tensor.
    ///
    /// # Errors
    /// What is wrong with its bytes, or that there is no such tensor.
    pub(crate) fn read_named(&self, name: &str) -> Result<Weight, FormatError> {
        let missing =
            || FormatError::NotACheckpoint { path: self.path.clone(), reason: format!("holds no tensor {name}") };
        let &(_, recipe) = self.recipes.get(name).ok_or_else(missing)?;
        if let Some((file, entry)) = self.foreign(name, recipe) {
            let (dtype, shape) = (entry.dtype.clone(), entry.shape.clone());
            return Err(Failure::from(TensorError::ForeignType { dtype, shape }).at(file.path(), name));
        }
        let (file, entry) = self.store.get(&self.raw_name(name, recipe)).ok_or_else(missing)?;
        self.read(file, entry, name, recipe)
    }

    fn foreign(&self, name: &str, recipe: Recipe) -> Option<(&DataFile, &ForeignEntry)> {
        match recipe {
            Recipe::Foreign => self.store.foreign().find(|(_, entry)| entry.name == name),
            Recipe::Plain | Recipe::Packed(_) | Recipe::Naive(_) | Recipe::Fp8 { .. } | Recipe::Composite(_) => None,
        }
    }

    fn read(&self, file: &DataFile, entry: &Entry, name: &str, recipe: Recipe) -> Result<Weight, FormatError> {
        match recipe {
            Recipe::Plain | Recipe::Foreign => read_plain(file, entry).map_err(|e| e.at(file.path(), name)),
            Recipe::Packed(scheme) => load_packed(&self.store, name, scheme),
            Recipe::Naive(scheme) => load_naive(&self.store, name, scheme),
            Recipe::Composite(place) => load_composite(&self.store, name, &self.builds[place]),
            Recipe::Fp8 { scales, block } => {
                let part = format!("{name}{scales}");
                let scales = self.store.get(&part).ok_or(Failure::Tensor(TensorError::PartMissing { part }));
                scales.and_then(|scales| load_blocks(file, entry, scales, block)).map_err(|e| e.at(file.path(), name))
            }
        }
    }
}

impl WeightSource for HfSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.recipes.get(name).map(|&(i, _)| &self.infos[i])
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        if self.recipes.contains_key(name) {
            return Ok(self.read_named(name)?);
        }
        Err(SourceError::Missing { file: self.path.clone(), tensor: name.to_owned() })
    }
}

/// The logical tensor that a raw one is the codes of, if it is any.
fn recipe<'a>(
    store: &Store,
    entry: &'a Entry,
    config: &QuantizationConfig,
) -> Result<Option<(&'a str, Recipe)>, TensorError> {
    let part = |suffix: &str| store.get(&format!("{}{suffix}", entry.name)).map(|(_, part)| part);
    if let Some(name) = entry.name.strip_suffix("_packed") {
        let is_ours = ["_scale", "_shape"].iter().any(|s| store.get(&format!("{name}{s}")).is_some());
        return match config.scheme_of(name) {
            Some(scheme) => Ok(Some((name, Recipe::Packed(scheme)))),
            None if is_ours => Err(TensorError::NoScheme),
            None => Ok(None),
        };
    }
    let (scales, suffix) = match (part(SCALE_INV), part(SCALE)) {
        (Some(scales), _) => (scales, SCALE_INV),
        (None, Some(scales)) => (scales, SCALE),
        (None, None) => return Ok(None),
    };
    match entry.dtype {
        DType::F8E4M3 => {
            let block = block(config, entry, scales).ok_or(TensorError::NoBlockSize)?;
            Ok(Some((&entry.name, Recipe::Fp8 { scales: suffix, block })))
        }
        DType::I8 if suffix == SCALE => match config.scheme_of(&entry.name) {
            Some(scheme) if !scheme.float => Ok(Some((&entry.name, Recipe::Naive(scheme)))),
            _ => Err(TensorError::NoScheme),
        },
        _ => Ok(None),
    }
}

/// Rows and columns that share an FP8 scale.
fn block(config: &QuantizationConfig, entry: &Entry, scales: &Entry) -> Option<(usize, usize)> {
    let by_scheme = config.scheme_of(&entry.name).map(|scheme| match scheme.strategy {
        Strategy::Tensor => (usize::MAX, usize::MAX),
        Strategy::Channel => (1, usize::MAX),
        Strategy::Group(size) => (1, size),
        Strategy::Block(rows, cols) => (rows, cols),
    });
    let by_config = match config {
        QuantizationConfig::Fp8Blocks { rows, cols } => Some((*rows, *cols)),
        QuantizationConfig::None | QuantizationConfig::Fp8 | QuantizationConfig::Groups { .. } => None,
    };
    // A single scale, or one for each row, leaves no doubt.
    let by_count = match scales.shape.iter().product::<usize>() {
        1 => Some((usize::MAX, usize::MAX)),
        n if Some(&n) == entry.shape.first() && scales.shape.get(1).is_none_or(|&g| g == 1) => Some((1, usize::MAX)),
        _ => None,
    };
    by_scheme.or(by_config).or(by_count)
}

fn describe(
    store: &Store,
    entry: &Entry,
    name: &str,
    recipe: Recipe,
    builds: &[Build],
) -> Result<TensorInfo, FormatError> {
    let parts = |suffixes: &[&str]| -> u64 {
        suffixes.iter().filter_map(|s| store.get(&format!("{name}{s}"))).map(|(_, part)| part.bytes).sum()
    };
    let (shape, storage, bytes) = match recipe {
        Recipe::Plain | Recipe::Foreign => (entry.shape.clone(), entry.dtype.to_string(), entry.bytes),
        Recipe::Packed(scheme) => {
            let [rows, cols] = packed_shape(store, name, scheme)?;
            let mut storage = scheme.describe(cols);
            if store.get(&format!("{name}_codebook")).is_some() {
                storage = storage.replacen("int", "codebook", 1);
            }
            (vec![rows, cols], storage, parts(PARTS))
        }
        Recipe::Naive(scheme) => {
            let cols = entry.shape.last().copied().unwrap_or(0);
            (entry.shape.clone(), scheme.describe(cols), entry.bytes + parts(PARTS))
        }
        Recipe::Composite(place) => {
            let build = &builds[place];
            let names = build.part_names(name);
            let bytes = names.iter().filter_map(|n| store.get(n)).map(|(_, part)| part.bytes).sum();
            (build.shape(store, name)?.to_vec(), build.describe(store, name), bytes)
        }
        Recipe::Fp8 { scales, .. } => (entry.shape.clone(), entry.dtype.to_string(), entry.bytes + parts(&[scales])),
    };
    Ok(TensorInfo { name: name.to_owned(), shape, storage, bytes })
}

/// A tensor of floats as it stands. F64 is rounded to F32, which is the widest a weight has.
fn read_plain(file: &DataFile, entry: &Entry) -> Result<Weight, Failure> {
    let data = match entry.dtype {
        DType::F32 | DType::F16 | DType::Bf16 => read_floats(file, entry)?,
        DType::F64 => FloatBuffer::F32(file.read::<f64>(entry)?.iter().map(|&v| v as f32).collect::<Vec<_>>().into()),
        DType::F8E4M3 => return load_plain(file, entry),
        DType::F8E5M2
        | DType::F8E8M0
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::I8
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::Bool => {
            return Err(TensorError::NotFloat { dtype: entry.dtype, shape: entry.shape.clone() }.into());
        }
    };
    Ok(Weight::Dense(Dense::new(entry.shape.clone(), data)))
}
