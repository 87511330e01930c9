//! A model as a GGUF file: its metadata, tokenizer and plan of types, for `export` and `compress`.

mod metadata;
pub mod modelfile;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use fourfold_compress::Plan;
use fourfold_compress::methods::quantize::blocks::Blocks;
use fourfold_compress::plan::{Entry, is_compressible, kept_in_gguf};
use fourfold_disk::output_file;
use fourfold_formats::gguf::imatrix::Imatrix;
use fourfold_formats::gguf::write::{GgufModel, MetaValue, file_names, tokenizer};
use fourfold_formats::{TokenizerSource, regular};
use fourfold_models::{ModelSpec, WeightSpec};
use fourfold_tensor::{BlockType, DType, Form};
use serde_json::json;

use crate::context::Context;
use crate::limits;
use crate::model::OpenModel;

pub use metadata::{architecture, describe};

/// An importance matrix for a model: mean squares of a weight's inputs, by its name and their number.
pub fn moments(file: &Path, spec: &ModelSpec) -> Result<impl Fn(&str, usize) -> Option<Vec<f32>> + use<>> {
    let (imatrix, arch) = (Imatrix::read(file)?, architecture(spec)?);
    for weight in spec.weights().iter().filter(|w| w.shape.len() == 2) {
        if imatrix.has(arch, &weight.name) && imatrix.of(arch, &weight.name, weight.shape[1]).is_none() {
            bail!(
                "{}: its entry for {} has another width than {:?}: it is of another model",
                file.display(),
                weight.name,
                weight.shape
            );
        }
    }
    let known =
        spec.weights().iter().filter(|w| w.shape.len() == 2).any(|w| imatrix.of(arch, &w.name, w.shape[1]).is_some());
    if !known {
        bail!("{}: it holds nothing of this model's weights", file.display());
    }
    Ok(move |name: &str, inputs: usize| imatrix.of(arch, name, inputs).map(<[f32]>::to_vec))
}

/// Whether an output's name asks for GGUF.
pub fn is_named(out: &Path) -> bool {
    out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// What the elements of matrices are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TypeArg {
    /// As they are, where GGUF has a type for that, else f16.
    Auto,
    /// Floats.
    Float(DType),
    /// Blocks.
    Blocks(BlockType),
}

/// Reads a type's name.
pub fn parse_type(text: &str) -> Result<TypeArg, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "auto" => TypeArg::Auto,
        "f32" => TypeArg::Float(DType::F32),
        "f16" => TypeArg::Float(DType::F16),
        "bf16" => TypeArg::Float(DType::Bf16),
        name => TypeArg::Blocks(BlockType::from_name(name).ok_or_else(|| {
            let known: Vec<String> = BlockType::all().map(|kind| kind.name().to_lowercase()).collect();
            format!("auto, f32, f16, bf16 or one of {} is expected; a mix of types is chosen by `fourfold compress MODEL OUT.gguf`", known.join(", "))
        })?),
    })
}

/// The type for rows that do not divide into a type's blocks: of blocks of 32 the next larger one, as llama.cpp chooses; `None` where
/// rows are not whole blocks of 32 either.
fn instead(kind: BlockType, cols: usize) -> Option<BlockType> {
    if cols.is_multiple_of(kind.block_len()) {
        return Some(kind);
    }
    let other = match kind {
        BlockType::Q2_K | BlockType::Q3_K | BlockType::IQ4_XS => BlockType::IQ4_NL,
        BlockType::Q4_K => BlockType::Q5_0,
        BlockType::Q5_K => BlockType::Q5_1,
        BlockType::Q6_K => BlockType::Q8_0,
        BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0 | BlockType::IQ4_NL => {
            kind
        }
    };
    cols.is_multiple_of(other.block_len()).then_some(other)
}

/// A plan that gives every matrix one type, and how many matrices had to have another.
pub fn plan_of_type(open: &OpenModel, kind: TypeArg) -> Result<(Plan, usize)> {
    let mut others = 0;
    let mut entry = |weight: &WeightSpec| -> Result<Entry> {
        let name = &weight.name;
        if !is_compressible(weight) {
            return Ok(Entry::keep(name));
        }
        let cast = |dtype: DType| Entry {
            method: "cast".to_owned(),
            settings: json!({"dtype": dtype.name().to_lowercase()}),
            ..Entry::keep(name)
        };
        Ok(match kind {
            TypeArg::Auto => {
                let info = open.checkpoint.weights.info(name);
                let dense =
                    info.is_some_and(|i| [DType::F32, DType::F16, DType::Bf16].iter().any(|d| d.name() == i.storage));
                if dense { Entry::keep(name) } else { kept_in_gguf(&open.checkpoint.weights.load(name)?, name) }
            }
            TypeArg::Float(dtype) => cast(dtype),
            TypeArg::Blocks(kind) => {
                let chosen = instead(kind, weight.shape.last().copied().unwrap_or(0));
                others += usize::from(chosen != Some(kind));
                match chosen {
                    Some(kind) => Entry {
                        method: "ggml".to_owned(),
                        settings: serde_json::to_value(Blocks::new(kind))?,
                        ..Entry::keep(name)
                    },
                    None => cast(DType::F16),
                }
            }
        })
    };
    let tensors = open.spec.weights().iter().map(&mut entry).collect::<Result<_>>()?;
    Ok((Plan { tensors }, others))
}

/// Everything of a GGUF file but its tensors.
pub fn model(open: &OpenModel, name: &str, file_type: u32, context: &Context) -> Result<GgufModel> {
    let named = || open.checkpoint.path.display().to_string();
    let mut described = metadata::describe(&open.spec, name, file_type).with_context(named)?;
    for remark in &described.remarks {
        context.remark(&format!("note: {remark}"));
    }
    described.model.metadata.extend(tokenizer_metadata(open, context).with_context(named)?);
    described.model.metadata.push(("general.quantization_version".to_owned(), MetaValue::U32(2)));
    Ok(described.model)
}

/// The tokenizer's part: a GGUF file's own is taken as it is.
fn tokenizer_metadata(open: &OpenModel, context: &Context) -> Result<Vec<(String, MetaValue)>> {
    let checkpoint = &open.checkpoint;
    let mut entries = checkpoint.gguf_tokenizer.clone();
    if entries.is_empty() {
        let text = match &checkpoint.tokenizer {
            TokenizerSource::Json(file) => regular::read_text(file, limits::MOST_BYTES)?,
            TokenizerSource::Embedded(text) => text.clone(),
            TokenizerSource::None => {
                context.remark("note: the model has no tokenizer; the file will have none either");
                return Ok(vec![("tokenizer.ggml.model".to_owned(), MetaValue::String("no_vocab".to_owned()))]);
            }
        };
        let json = serde_json::from_str(&text).context("tokenizer.json")?;
        let files = &checkpoint.tokenizer_files;
        let made = tokenizer::metadata(&json, &checkpoint.special, files, open.spec.vocab_size)?;
        for remark in made.remarks {
            context.remark(&format!("note: {remark}"));
        }
        entries = made.entries;
        if let Some(template) = &checkpoint.chat_template {
            entries.push(("tokenizer.chat_template".to_owned(), MetaValue::String(template.clone())));
        }
    }
    Ok(entries)
}

/// A job's sizes, as GGUF has them.
pub struct Sizes {
    model: GgufModel,
    metadata: u64,
}

impl Sizes {
    pub fn new(model: &GgufModel) -> Self {
        Self { metadata: model.metadata_bytes(), model: model.clone() }
    }

    /// Bytes of a tensor; forms that cannot be stored are found when they are declared.
    pub fn tensor(&self, name: &str, form: &Form) -> u64 {
        self.model.tensor_bytes(name, form).unwrap_or_else(|_| form.file_bytes())
    }

    /// Bytes of headers.
    pub fn header(&self, forms: &[(String, Form)]) -> u64 {
        self.metadata + self.model.table_bytes(forms).unwrap_or(0)
    }
}

/// Where a GGUF file may be written.
pub fn check_out(out: &Path, inputs: &[(String, PathBuf)], overwrite: bool) -> Result<PathBuf> {
    let place = output_file(out, inputs)?;
    if place.exists() && !overwrite {
        bail!("{}: exists already; name another file, or give --overwrite", out.display());
    }
    Ok(place)
}

/// The files that were written, by their headers' word.
pub fn written_files(place: &Path) -> Vec<PathBuf> {
    if place.exists() {
        return vec![place.to_owned()];
    }
    (2..=9_999).map(|count| file_names(place, count)).find(|names| names[0].exists()).unwrap_or_default()
}

/// `general.file_type`: llama.cpp's number for the type that most elements have.
pub fn file_type(spec: &ModelSpec, plan: &Plan) -> u32 {
    let mut votes: Vec<(u32, u64)> = Vec::new();
    for (entry, weight) in plan.tensors.iter().zip(spec.weights()) {
        if !is_compressible(&weight) {
            continue;
        }
        let number = match (entry.method.as_str(), entry.format().and_then(|name| BlockType::from_name(&name))) {
            (_, Some(kind)) => number_of(kind),
            ("cast", None) => match entry.settings["dtype"].as_str() {
                Some("f32") => 0,
                Some("bf16") => 32,
                _ => 1,
            },
            _ => GUESSED,
        };
        match votes.iter_mut().find(|(known, _)| *known == number) {
            Some((_, count)) => *count += weight.elements(),
            None => votes.push((number, weight.elements())),
        }
    }
    votes.into_iter().max_by_key(|(_, count)| *count).map_or(GUESSED, |(number, _)| number)
}

/// llama.cpp's "look at the tensors".
pub const GUESSED: u32 = 1024;

fn number_of(kind: BlockType) -> u32 {
    match kind {
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q5_1 => 9,
        BlockType::Q2_K => 10,
        BlockType::Q3_K => 12,
        BlockType::Q4_K => 15,
        BlockType::Q5_K => 17,
        BlockType::Q6_K => 18,
        BlockType::IQ4_NL => 25,
        BlockType::IQ4_XS => 30,
    }
}
