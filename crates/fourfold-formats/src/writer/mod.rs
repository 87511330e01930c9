//! Writing a model directory: safetensors in shards, streamed one tensor at a time, beside config and tokenizer.
//!
//! Everything is written to `<out>.partial`, which becomes `<out>` by one rename when all is there. Sizes are declared first, so
//! headers are written before data, a full disk shows at once, and tensors may come in any order. A journal notes each finished
//! tensor: a run that was killed, or ended by an error of the disk, is taken up by the next run of the same settings and inputs, which loses
//! only what was in memory.

mod files;
mod journal;
mod layout;
mod staging;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use fourfold_disk::Identity;
use fourfold_tensor::{Dense, Form, OffsetsForm, ScalesForm, SourceError, Weight, WeightSink};

pub use files::{ModelFiles, TOKENIZER_FILES, tokenizer_config, without_unread_layers};
use journal::checksum;
use layout::Layout;
use staging::Staging;

use crate::error::Failure;
use crate::quantization::{
    Build, Scheme, inexpressible, load_composite, load_packed, odd_experts, part_bytes, read_floats,
};
use crate::safetensors::{DataFile, INDEX_NAME, Store};
use crate::{Access, FormatError, OutputError};

/// How an output is written.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Most bytes of tensors in a file; a larger tensor has a file of its own.
    pub max_shard_bytes: u64,
    /// Whether an existing model directory, or what an interrupted run of other settings left, is replaced.
    pub overwrite: bool,
    /// All that the output depends on beside the declared forms (settings, and the content of every input): a run takes up what an
    /// interrupted one left only where this is the same.
    pub identity: Identity,
    /// Whether a tensor that compressed-tensors has no words for is an error, instead of making the output this program's own.
    pub interchange: bool,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { max_shard_bytes: 5_000_000_000, overwrite: false, identity: Identity::default(), interchange: false }
    }
}

/// Bytes that the headers of all files take where tensors of these forms are written: what a file has beside its data.
///
/// # Errors
/// A form that cannot be stored, a name that stands twice.
pub fn header_bytes(tensors: &[(String, Form)], max_shard_bytes: u64) -> Result<u64, OutputError> {
    let declared: Vec<(String, Form)> = tensors.iter().map(|(name, form)| (name.clone(), normal(form))).collect();
    let layout = Layout::new(&declared, max_shard_bytes)?;
    Ok(layout.shards.iter().map(|shard| shard.header.len() as u64).sum())
}

/// Writes a model directory; see the module's text. Dropped before [`WeightSink::finish`], it leaves what it finished, to be taken up, as a
/// process that is killed does, unless [`WeightSink::discard`] said that it is of no use.
pub struct SafetensorsWriter {
    out: PathBuf,
    files: ModelFiles,
    options: WriteOptions,
    staging: Staging,
    declared: Vec<(String, Form)>,
    /// Place in `declared`, and whether it is written.
    by_name: HashMap<String, (usize, bool)>,
    layout: Layout,
    /// What an interrupted run left, while some of it may still be asked for.
    earlier: Option<Store>,
}

impl SafetensorsWriter {
    /// Starts an output at `out`, which must not exist yet (or be empty) unless it may be overwritten.
    ///
    /// # Errors
    /// [`OutputError::Exists`], [`OutputError::Busy`], [`FormatError::Io`].
    pub fn create(out: &Path, files: ModelFiles, options: WriteOptions) -> Result<Self, FormatError> {
        files.check_apart_from(out)?;
        let staging = Staging::open(out, options.overwrite, &options.identity)?;
        Ok(Self {
            out: out.to_owned(),
            files,
            options,
            staging,
            declared: Vec::new(),
            by_name: HashMap::new(),
            layout: Layout::default(),
            earlier: None,
        })
    }

    /// Whether an output may be made at `out`, before anything is read or made.
    ///
    /// # Errors
    /// [`OutputError::Exists`], [`FormatError::Io`].
    pub fn check(out: &Path, overwrite: bool) -> Result<(), FormatError> {
        staging::check_free(out, overwrite)
    }

    /// Names of the tensors that an interrupted run had finished, once the output is declared.
    pub fn resumed(&self) -> impl Iterator<Item = &str> {
        self.staging.journal().map(|(name, _)| name)
    }

    fn output_error(&self, problem: OutputError) -> FormatError {
        FormatError::Output { path: self.out.clone(), problem }
    }

    fn declare(&mut self, tensors: &[(String, Form)]) -> Result<(), FormatError> {
        if !self.declared.is_empty() {
            return Err(self.output_error(OutputError::DeclaredAlready));
        }
        if let Some(tensor) = inexpressible(tensors).filter(|_| self.options.interchange) {
            let reason = "compressed-tensors has no words for it: it knows weights, evenly spaced levels, a float scale for each \
                          group, groups that divide the row"
                .to_owned();
            return Err(self.output_error(OutputError::NotStorable { tensor: tensor.to_owned(), reason }));
        }
        if let Some((tensor, other)) = odd_experts(tensors).filter(|_| self.options.interchange) {
            let divides = common_group(tensors);
            let reason = format!(
                "transformers decodes all routed experts of a model by one format, and {other} has another: give all experts the same \
                 bits and groups (--group-size {divides} divides their rows), and none of them dense"
            );
            return Err(self.output_error(OutputError::NotStorable { tensor: tensor.to_owned(), reason }));
        }
        self.declared = tensors.iter().map(|(name, form)| (name.clone(), normal(form))).collect();
        self.layout = Layout::new(&self.declared, self.options.max_shard_bytes).map_err(|e| self.output_error(e))?;
        self.by_name = tensors.iter().enumerate().map(|(i, (name, _))| (name.clone(), (i, false))).collect();
        let plan = checksum(&[self.layout.digest()]);
        self.staging.begin(plan, &self.layout, self.options.overwrite)?;
        if self.staging.journal().next().is_some() {
            let files: Result<Vec<DataFile>, FormatError> =
                self.layout.shards.iter().map(|s| DataFile::open(&self.staging.path(&s.name), Access::Read)).collect();
            self.earlier = Some(Store::of_files(files?));
        }
        Ok(())
    }

    /// What the journal says is there, read back and checked against its checksum.
    fn read_back(&self, name: &str) -> Result<Option<Weight>, FormatError> {
        let (Some(store), Some(sum)) = (&self.earlier, self.staging.finished(name)) else { return Ok(None) };
        let Some(&(i, _)) = self.by_name.get(name) else { return Ok(None) };
        // A tensor that the machine lost with its power, journal first, is written again. The bytes are looked at as they lie there.
        let places = self.layout.places[i].iter();
        let runs = places.map(|place| self.staging.read_at(place.shard, place.offset, place.bytes));
        if checksum(&runs.collect::<Result<Vec<_>, _>>()?) != sum {
            return Ok(None);
        }
        let weight = match &self.declared[i].1 {
            Form::Dense { shape, .. } => {
                let Some((file, entry)) = store.get(name) else { return Ok(None) };
                let data = read_floats(file, entry).map_err(|e: Failure| e.at(file.path(), name))?;
                Ok(Weight::Dense(Dense::new(shape.clone(), data)))
            }
            Form::Quantized(form) => load_packed(store, name, Scheme::of(form)),
            form @ (Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_)) => {
                load_composite(store, name, &Build::of(form))
            }
        };
        Ok(weight.ok())
    }

    fn put(&mut self, name: &str, weight: &Weight) -> Result<(), FormatError> {
        let Some(&(i, _)) = self.by_name.get(name) else {
            return Err(self.output_error(OutputError::NotDeclared { tensor: name.to_owned() }));
        };
        let (found, declared) = (normal(&Form::of(weight)), &self.declared[i].1);
        if found != *declared {
            let (found, declared) = (format!("{found:?}"), format!("{declared:?}"));
            return Err(self.output_error(OutputError::OtherForm { tensor: name.to_owned(), found, declared }));
        }
        let bytes = part_bytes(weight);
        let places = &self.layout.places[i];
        let fits = bytes.len() == places.len() && bytes.iter().zip(places).all(|(b, p)| b.len() as u64 == p.bytes);
        if !fits {
            let reason = "its parts do not have the sizes its form says".to_owned();
            return Err(self.output_error(OutputError::NotStorable { tensor: name.to_owned(), reason }));
        }
        for (bytes, place) in bytes.iter().zip(places) {
            self.staging.write_at(place.shard, place.offset, bytes)?;
        }
        self.staging.note(name, checksum(&bytes))?;
        self.by_name.insert(name.to_owned(), (i, true));
        Ok(())
    }

    fn complete(mut self) -> Result<(), FormatError> {
        let mut missing = Vec::new();
        for (name, _) in &self.declared {
            // What was read back is there; what was neither read nor written is looked at now.
            if !self.by_name[name].1 && self.read_back(name)?.is_none() {
                missing.push(name);
            }
        }
        if let Some(first) = missing.first() {
            let (tensor, missing) = ((*first).clone(), missing.len());
            self.staging.discard();
            return Err(self.output_error(OutputError::Incomplete { tensor, missing }));
        }
        if self.layout.shards.len() > 1 {
            self.staging.write_file(INDEX_NAME, &self.layout.index())?;
        }
        for (name, bytes) in self.files.written(&self.declared) {
            self.staging.write_file(&name, &bytes)?;
        }
        for file in self.files.copied() {
            self.staging.copy_file(file)?;
        }
        self.staging.commit()
    }
}

impl WeightSink for SafetensorsWriter {
    fn begin(&mut self, tensors: &[(String, Form)]) -> Result<(), SourceError> {
        Ok(self.declare(tensors)?)
    }

    fn written(&self, name: &str) -> Result<Option<Weight>, SourceError> {
        Ok(self.read_back(name)?)
    }

    fn write(&mut self, name: &str, weight: &Weight) -> Result<(), SourceError> {
        Ok(self.put(name, weight)?)
    }

    fn attach(&mut self, name: &str, text: &str) -> Result<(), SourceError> {
        self.files.add(name, text);
        Ok(())
    }

    fn discard(&mut self) {
        self.staging.discard();
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(self.complete()?)
    }
}

/// The largest group of at most 64 columns that divides every packed row.
fn common_group(tensors: &[(String, Form)]) -> usize {
    let packed = tensors.iter().filter_map(|(_, form)| match form {
        Form::Quantized(form) => Some(form.cols),
        Form::Dense { .. } | Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => None,
    });
    let cols: Vec<usize> = packed.collect();
    (1..=64).rev().find(|&size| cols.iter().all(|cols| cols.is_multiple_of(size))).unwrap_or(1)
}

/// The form with one spelling for a single scale or zero point: per tensor.
fn normal(form: &Form) -> Form {
    let form = match form {
        Form::Dense { .. } | Form::Sparse(_) => return form.clone(),
        Form::LowRank { up, down } => {
            return Form::LowRank { up: Box::new(normal(up)), down: Box::new(normal(down)) };
        }
        Form::Sum(terms) => return Form::Sum(terms.iter().map(normal).collect()),
        Form::Quantized(form) => form,
    };
    let mut form = form.clone();
    if form.group_size > 0 && form.rows * form.groups() == 1 {
        if let ScalesForm::PerGroup(dtype) = form.scales {
            form.scales = ScalesForm::PerTensor(dtype);
        }
        if form.offsets == OffsetsForm::ZeroPoint {
            form.offsets = OffsetsForm::ZeroPointPerTensor;
        }
    }
    Form::Quantized(form)
}
