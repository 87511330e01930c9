//! A run's whole state on disk, so that a resumed run goes on bit by bit as if it had not stopped.
//!
//! `checkpoint-<step>/` holds `model.safetensors` (the weights under their Hugging Face names), `optimizer.safetensors` (moments as they
//! are stored, and the low bits of weights stored with a residual) and `trainer_state.json`. It is written under another
//! name and gets its own when it is whole and durable. Random numbers and batches are functions of seed and step: nothing else has to be kept.
//! `checksums.json` has the CRC-32C of every tensor that is read back: a damaged checkpoint is never gone on from.

mod checksums;
mod reader;
mod state;

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytemuck::allocation::pod_collect_to_vec;
use bytemuck::{cast_slice, cast_slice_mut};
use fourfold_disk::Identity;
use fourfold_tensor::{TensorInfo, mask_words_per_row};
use half::bf16;
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensorError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::checksums::{CHECKSUMS, Checksums};
use self::reader::Reader;
use crate::optim::OptimizerState;
use crate::optim::adamw::Moments;
use crate::optim::blockwise::{State4, State8};
use crate::optim::parameter::{Int8, Parameter};
use crate::optim::state::State as Vector;
use crate::recipe::Recipe;
use crate::run::{disk_error, publish};
use crate::store::{Entry, ParameterStore};

/// The weights, as any program reads them.
const MODEL: &str = "model.safetensors";
/// The weights of an adapter, as PEFT reads them.
const ADAPTER: &str = "adapter_model.safetensors";
/// The numbers that are trained of packed tensors, in f32: see [`fourfold_tensor::Tuning`].
const TUNING: &str = "tuning.safetensors";
/// What PEFT puts before every name in it.
const PEFT_PREFIX: &str = "base_model.model.";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";

/// What a run has to remember besides its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Name of the recipe.
    pub recipe: String,
    /// Seed of the run.
    pub seed: u64,
    /// Tokens learned from.
    pub tokens: u64,
    /// Lowest held-out loss so far, nats.
    pub best_loss: Option<f64>,
    /// Steps whose update was left out.
    #[serde(default)]
    pub skipped: u64,
    /// Whether the model of this step is still to be measured: the run was stopped meanwhile.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Loss of the run's first step, nats: what an exploding one is measured by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_loss: Option<f64>,
    /// What is learned where it is not the text alone, and of what model: a teacher and the model whose scales are tuned. Only a run with the
    /// same goes on from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// All that decides what is learned: settings, and the content of model and data. Only a run with the same goes on from here.
    #[serde(default, skip_serializing_if = "Identity::is_empty")]
    pub identity: Identity,
    /// What may be another when a run goes on: steps, intervals, the machine's kernels.
    #[serde(default, skip_serializing_if = "Identity::is_empty")]
    pub free: Identity,
    /// Factor of the loss, and good steps since it last moved, where the loss is scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<(f32, u32)>,
}

impl State {
    /// The state of a run before its first step.
    pub fn begin(recipe: &Recipe, seed: u64) -> Self {
        Self {
            step: 0,
            recipe: recipe.label(),
            seed,
            tokens: 0,
            best_loss: None,
            skipped: 0,
            evaluation_due: false,
            first_loss: None,
            objective: None,
            identity: Identity::default(),
            free: Identity::default(),
            loss_scale: None,
        }
    }
}

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file cannot be written or read.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Made by a run that stores its numbers otherwise or draws others.
    #[error("{}: made with preset {recipe}, --seed {seed}; resume with these", checkpoint.display())]
    Foreign {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Its recipe.
        recipe: String,
        /// Its seed.
        seed: u64,
    },
    /// Made by a run that learns something else.
    #[error("{}: made by learning {checkpoint_has}; this run learns {run_has}", checkpoint.display())]
    OtherObjective {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What it was made by.
        checkpoint_has: String,
        /// What this run learns.
        run_has: String,
    },
    /// Made by a run of other settings, or of other inputs.
    #[error(
        "{}: made by another run: {differs}. Resume with the same; or begin a new run, in another --output, from this model \
         (--model {})", checkpoint.display(), checkpoint.display()
    )]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What is not the same.
        differs: String,
    },
    /// A tensor is not there, does not fit or is damaged.
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    Tensor {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
}

/// An array as a file holds it.
#[derive(Clone)]
struct Part<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes<'a>,
}

/// Where its bytes come from.
#[derive(Clone)]
enum Bytes<'a> {
    /// They lie in memory so.
    Stored(&'a [u8]),
    /// A few, made for the file.
    Made(Vec<u8>),
    /// bf16 made of codes when the file is written, one tensor at a time.
    Rounded(&'a Int8),
}

impl<'a> Part<'a> {
    fn new(dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes: Bytes::Stored(bytes) }
    }

    fn flat(dtype: Dtype, bytes: &'a [u8]) -> Self {
        let size = if dtype == Dtype::F32 { 4 } else { 1 };
        Self::new(dtype, &[bytes.len() / size], bytes)
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match &self.bytes {
            Bytes::Stored(bytes) => Cow::Borrowed(bytes),
            Bytes::Made(bytes) => Cow::Borrowed(bytes),
            Bytes::Rounded(int8) => Cow::Owned(pod_collect_to_vec(&int8.to_bf16())),
        }
    }
    fn data_len(&self) -> usize {
        match &self.bytes {
            Bytes::Stored(bytes) => bytes.len(),
            Bytes::Made(bytes) => bytes.len(),
            Bytes::Rounded(int8) => int8.len() * size_of::<bf16>(),
        }
    }
}

/// A tensor's weights as other programs read them.
fn weights<'a>(entry: &'a Entry, shape: &[usize]) -> Part<'a> {
    match &entry.parameter {
        Parameter::F32(w) => Part::new(Dtype::F32, shape, cast_slice(w)),
        Parameter::Bf16(w) | Parameter::Bf16Nearest(w) | Parameter::Bf16Residual { high: w, .. } => {
            Part::new(Dtype::BF16, shape, cast_slice(w))
        }
        Parameter::Int8(int8) => Part { dtype: Dtype::BF16, shape: shape.to_vec(), bytes: Bytes::Rounded(int8) },
    }
}

/// Suffixes of what a pruned tensor is written as: the same parts that a compressed model has.
const MASK: &str = "_mask";
const VALUES: &str = "_values";
const SHAPE: &str = "_shape";

/// The weights of a tensor, by a suffix of its name.
fn weight_parts<'a>(entry: &'a Entry, shape: &[usize]) -> Vec<(&'static str, Part<'a>)> {
    if entry.tuning.is_some() {
        return vec![("", weights(entry, &[entry.parameter.len()]))];
    }
    let Some(mask) = &entry.mask else { return vec![("", weights(entry, shape))] };
    let words = [mask.rows(), mask_words_per_row(mask.cols())];
    let size: Vec<u8> = [mask.rows(), mask.cols()].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
    vec![
        (MASK, Part::new(Dtype::I64, &words, mask.words().as_bytes())),
        (VALUES, weights(entry, &[mask.kept()])),
        (SHAPE, Part { dtype: Dtype::I64, shape: vec![2], bytes: Bytes::Made(size) }),
    ]
}

/// The rest of a tensor's state, by a suffix of its name.
fn state_parts(entry: &Entry) -> Vec<(&'static str, Part<'_>)> {
    let mut parts = match &entry.state {
        OptimizerState::AdamW(Moments { m, v }) => [vector_parts(m, ADAM_FIRST), vector_parts(v, ADAM_SECOND)].concat(),
        OptimizerState::Sgd(momentum) => vector_parts(momentum, MOMENTUM),
    };
    match &entry.parameter {
        Parameter::Bf16Residual { low, .. } => parts.push(("low", Part::flat(Dtype::U8, low))),
        Parameter::Int8(int8) => {
            parts.push(("codes", Part::flat(Dtype::U8, cast_slice(&int8.codes))));
            parts.push(("scales", Part::flat(Dtype::F32, cast_slice(&int8.scales))));
        }
        Parameter::F32(_) | Parameter::Bf16(_) | Parameter::Bf16Nearest(_) => {}
    }
    parts
}

/// Names of a state vector: in f32, and of its codes and scales.
type Names = [&'static str; 3];
const ADAM_FIRST: Names = ["exp_avg", "exp_avg.codes", "exp_avg.scales"];
const ADAM_SECOND: Names = ["exp_avg_sq", "exp_avg_sq.codes", "exp_avg_sq.scales"];
const MOMENTUM: Names = ["momentum_buffer", "momentum_buffer.codes", "momentum_buffer.scales"];

fn vector_parts(vector: &Vector, [whole, in_codes, in_scales]: Names) -> Vec<(&'static str, Part<'_>)> {
    let (codes, scales) = match vector {
        Vector::F32(values) => return vec![(whole, Part::flat(Dtype::F32, cast_slice(values)))],
        Vector::Bits8(State8 { codes, scales }) | Vector::Bits4(State4 { codes, scales }) => (codes, scales),
    };
    vec![(in_codes, Part::flat(Dtype::U8, codes)), (in_scales, Part::flat(Dtype::F32, cast_slice(scales)))]
}

fn vector_parts_mut(vector: &mut Vector, [whole, in_codes, in_scales]: Names) -> Vec<(&'static str, &mut [u8])> {
    let (codes, scales) = match vector {
        Vector::F32(values) => return vec![(whole, cast_slice_mut(values))],
        Vector::Bits8(State8 { codes, scales }) | Vector::Bits4(State4 { codes, scales }) => (codes, scales),
    };
    vec![(in_codes, codes), (in_scales, cast_slice_mut(scales))]
}

/// Arrays to read into: a tensor's weights where the model's file holds them as they are stored, and its other parts.
type PartsMut<'a> = (Option<&'a mut [u8]>, Vec<(&'static str, &'a mut [u8])>);

/// The arrays of [`weights`] and [`state_parts`], to read into, in the same order.
fn parts_mut(entry: &mut Entry) -> PartsMut<'_> {
    let mut parts = match &mut entry.state {
        OptimizerState::AdamW(Moments { m, v }) => {
            let mut parts = vector_parts_mut(m, ADAM_FIRST);
            parts.extend(vector_parts_mut(v, ADAM_SECOND));
            parts
        }
        OptimizerState::Sgd(momentum) => vector_parts_mut(momentum, MOMENTUM),
    };
    let weights = match &mut entry.parameter {
        Parameter::F32(w) => cast_slice_mut(w.make_mut()),
        Parameter::Bf16(w) | Parameter::Bf16Nearest(w) => cast_slice_mut(w.make_mut()),
        Parameter::Bf16Residual { high, low } => {
            parts.push(("low", low));
            cast_slice_mut(high.make_mut())
        }
        Parameter::Int8(int8) => {
            parts.push(("codes", cast_slice_mut(int8.codes.make_mut())));
            parts.push(("scales", cast_slice_mut(int8.scales.make_mut())));
            return (None, parts);
        }
    };
    (Some(weights), parts)
}

/// Name of the file that holds what is trained: a model's weights, an adapter's where the model itself is frozen, or the numbers of
/// packed tensors that are tuned.
pub fn weights_file(store: &ParameterStore) -> &'static str {
    match (store.is_tuned(), store.has_frozen_base()) {
        (true, _) => TUNING,
        (false, true) => ADAPTER,
        (false, false) => MODEL,
    }
}

/// A tensor's name in that file.
fn published(store: &ParameterStore, name: &str) -> String {
    if weights_file(store) == ADAPTER { format!("{PEFT_PREFIX}{name}") } else { name.to_owned() }
}

/// Writes the weights alone, under their Hugging Face names; nothing of a packed model that is tuned, which its description writes whole.
///
/// # Errors
/// The file cannot be written.
pub fn save_weights(file: &Path, store: &ParameterStore) -> Result<(), CheckpointError> {
    if store.is_tuned() { Ok(()) } else { write(file, model_parts(store)) }
}

/// What the weights' file holds, by name.
fn model_parts(store: &ParameterStore) -> Vec<(String, Part<'_>)> {
    let of = |(info, entry): (&'_ TensorInfo, _)| {
        let name = published(store, &info.name);
        weight_parts(entry, &info.shape).into_iter().map(move |(suffix, part)| (format!("{name}{suffix}"), part))
    };
    store.entries().flat_map(of).collect()
}

/// What the optimizer's file holds, by name.
fn optimizer_parts(store: &ParameterStore) -> Vec<(String, Part<'_>)> {
    let parts = store.entries().flat_map(|(info, entry)| {
        state_parts(entry).into_iter().map(move |(suffix, part)| (format!("{}.{suffix}", info.name), part))
    });
    parts.collect()
}

fn write_text(file: &Path, text: &str) -> Result<(), CheckpointError> {
    fourfold_disk::write_file(file, text.as_bytes()).map_err(disk_error)
}

fn write(file: &Path, parts: Vec<(String, Part<'_>)>) -> Result<(), CheckpointError> {
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(parts, metadata, file).map_err(|error| match error {
        SafeTensorError::IoError(source) => CheckpointError::Io { file: file.to_path_buf(), source },
        error => CheckpointError::Malformed { file: file.to_path_buf(), reason: error.to_string() },
    })
}

/// Writes `checkpoint`, a directory that does not exist yet, whole or not at all. `describe` adds files of the caller's
/// (configuration, tokenizer) to the directory before it gets its name.
///
/// # Errors
/// The disk is full or the place cannot be written; nothing is left behind then.
pub fn save(
    checkpoint: &Path,
    store: &ParameterStore,
    state: &State,
    describe: &dyn Fn(&Path) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    publish(checkpoint, |temporary| {
        let model = model_parts(store);
        let optimizer = optimizer_parts(store);
        let text = state::to_json(state)
            .map_err(|e| CheckpointError::Malformed { file: temporary.join(STATE), reason: e.to_string() })?;
        let mut sums = Checksums::default();
        sums.add_file(STATE, text.as_bytes());
        for (file, parts) in [(weights_file(store), &model), (OPTIMIZER, &optimizer)] {
            parts.iter().for_each(|(name, part)| sums.add_tensor(file, name, &part.data()));
        }
        write(&temporary.join(weights_file(store)), model)?;
        write(&temporary.join(OPTIMIZER), optimizer)?;
        write_text(&temporary.join(STATE), &text)?;
        write_text(&temporary.join(CHECKSUMS), &sums.to_json())?;
        let io = |source| CheckpointError::Io { file: temporary.to_path_buf(), source };
        describe(temporary).map_err(io)
    })
}

/// What [`verify`] has looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Files that were compared.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// File, and what is wrong with it.
    pub findings: Vec<(String, String)>,
}

/// Reads every file of a checkpoint that a run goes on from and compares it with its checksums.
///
/// # Errors
/// Its checksums cannot be read.
pub fn verify(checkpoint: &Path) -> Result<Verified, CheckpointError> {
    let sums = Checksums::read(&checkpoint.join(CHECKSUMS))?;
    let (mut found, mut files) = (Vec::new(), vec![STATE]);
    if let Err(error) = read_state(checkpoint, &sums) {
        found.push((STATE.to_owned(), error.to_string()));
    }
    for file in sums.tensor_files() {
        let checked = Reader::open(&checkpoint.join(file), &sums).and_then(|mut reader| reader.check());
        found.extend(checked.err().map(|error| (file.to_owned(), error.to_string())));
        files.push(file);
    }
    let length = |file: &&str| fs::metadata(checkpoint.join(file)).map_or(0, |meta| meta.len());
    Ok(Verified { files: files.len(), bytes: files.iter().map(length).sum(), findings: found })
}

fn read_state(checkpoint: &Path, sums: &Checksums) -> Result<State, CheckpointError> {
    let file = checkpoint.join(STATE);
    let text = fs::read_to_string(&file).map_err(|source| CheckpointError::Io { file: file.clone(), source })?;
    let malformed = |reason: String| CheckpointError::Malformed { file: file.clone(), reason };
    let state = state::from_json(&text).map_err(|e| malformed(e.to_string()))?;
    if sums.is_file(STATE, text.as_bytes()) { Ok(state) } else { Err(malformed(checksums::DIFFERS.to_owned())) }
}

/// Whether `checkpoint` was made by a run of this recipe and seed, so that `begun`, its first state, leads to it.
///
/// # Errors
/// [`CheckpointError::Foreign`] where it was not. A state that cannot be read is no matter here.
pub fn check_origin(checkpoint: &Path, begun: &State) -> Result<(), CheckpointError> {
    let Ok(sums) = Checksums::read(&checkpoint.join(CHECKSUMS)) else { return Ok(()) };
    match read_state(checkpoint, &sums) {
        Ok(state) if state.recipe != begun.recipe || state.seed != begun.seed => {
            let (checkpoint, recipe, seed) = (checkpoint.to_path_buf(), state.recipe, state.seed);
            Err(CheckpointError::Foreign { checkpoint, recipe, seed })
        }
        Ok(state) if state.objective != begun.objective => {
            let named = |objective: Option<String>| objective.unwrap_or_else(|| "the text alone".to_owned());
            let (checkpoint_has, run_has) = (named(state.objective), named(begun.objective.clone()));
            Err(CheckpointError::OtherObjective { checkpoint: checkpoint.to_path_buf(), checkpoint_has, run_has })
        }
        // A checkpoint of a version that noted nothing is gone on from as it is.
        Ok(state) if !state.identity.is_empty() && state.identity != begun.identity => {
            let differs = begun.identity.told(&state.identity, begun.identity.differing(&state.identity));
            Err(CheckpointError::OtherRun { checkpoint: checkpoint.to_path_buf(), differs })
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Reads `checkpoint` into a store of the same model and recipe. Tensors are read in place: nothing is held twice.
///
/// # Errors
/// A file is missing, malformed, damaged, or belongs to another model or recipe. The store must not be used then.
pub fn restore(checkpoint: &Path, store: &mut ParameterStore) -> Result<State, CheckpointError> {
    let sums = Checksums::read(&checkpoint.join(CHECKSUMS))?;
    let state = read_state(checkpoint, &sums)?;
    let mut model = Reader::open(&checkpoint.join(weights_file(store)), &sums)?;
    let names: Vec<String> = store.entries().map(|(info, _)| published(store, &info.name)).collect();
    let mut optimizer = Reader::open(&checkpoint.join(OPTIMIZER), &sums)?;
    for ((info, entry), name) in store.entries_mut().zip(&names) {
        let mask = entry.mask.clone();
        let (weights, parts) = parts_mut(entry);
        if let Some(mask) = &mask {
            let mut words = vec![0; mask.byte_len()];
            model.read(&format!("{name}{MASK}"), &mut words)?;
            if words != mask.words().as_bytes() {
                let (file, reason) = (checkpoint.join(MODEL), "other elements of it are pruned".to_owned());
                return Err(CheckpointError::Tensor { file, tensor: name.clone(), reason });
            }
        }
        if let Some(weights) = weights {
            model.read(&format!("{name}{}", if mask.is_some() { VALUES } else { "" }), weights)?;
        }
        for (suffix, bytes) in parts {
            optimizer.read(&format!("{}.{suffix}", info.name), bytes)?;
        }
    }
    Ok(state)
}
