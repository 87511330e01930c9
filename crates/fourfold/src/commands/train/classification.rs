//! Texts with a class each, and the classifier that a language model becomes.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_infer::Tokenizer;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_train::data::rows::{RowFormat, Rows, Separated, Separator};
use fourfold_train::labelled::{Example, Label, LabelColumns, Labelled, LabelledText};
use serde_json::{Map, Value, json};

use super::data::Data;
use super::settings::{Settings, name_of};
use super::start::Description;
use crate::data_files::{DataFormat, files, open, parquet_rows, rows};

/// Texts to learn and to measure on, as their files have them.
pub struct LabelledTexts {
    learned: Vec<LabelledText>,
    measured: Vec<LabelledText>,
}

impl LabelledTexts {
    /// Reads the files that the settings name.
    pub fn read(settings: &Settings) -> Result<Self> {
        let read = |paths: &[PathBuf]| read_files(paths, settings.data_format, &settings.label_columns);
        Ok(Self { learned: read(&settings.data)?, measured: read(&settings.eval_data)? })
    }

    /// The configuration of a classifier of these texts over the model that `config` describes. A classifier keeps its classes;
    /// a language model gets those of the data.
    pub fn classifier(&self, config: &Value, name: &str) -> Result<(Value, ModelSpec)> {
        let spec = spec_from_config(config).with_context(|| name.to_owned())?;
        if spec.classes.is_some() {
            return Ok((config.clone(), spec));
        }
        let names = self.class_names()?;
        let mut config = config.clone();
        let Some(object) = config.as_object_mut() else { bail!("{name}: config.json holds no object") };
        let class = object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let Some(family) = class.and_then(|class| class.strip_suffix("ForCausalLM")) else {
            bail!("{name}: config.json names no causal language model in `architectures`")
        };
        let class = format!("{family}ForSequenceClassification");
        object.insert("architectures".to_owned(), json!([class]));
        let numbered = names.iter().enumerate();
        let by_id: Map<String, Value> = numbered.clone().map(|(i, name)| (i.to_string(), json!(name))).collect();
        let by_label: Map<String, Value> = numbered.map(|(i, name)| (name.clone(), json!(i))).collect();
        object.insert("id2label".to_owned(), by_id.into());
        object.insert("label2id".to_owned(), by_label.into());
        object.insert("problem_type".to_owned(), json!("single_label_classification"));
        // transformers looks for the last token that is no padding.
        if object.get("pad_token_id").is_none_or(Value::is_null)
            && let Some(end) = object.get("eos_token_id").cloned()
        {
            let end = end.get(0).cloned().unwrap_or(end);
            object.insert("pad_token_id".to_owned(), end);
        }
        let spec = spec_from_config(&config).with_context(|| name.to_owned())?;
        Ok((config, spec))
    }

    /// Names of the classes that occur, by number.
    fn class_names(&self) -> Result<Vec<String>> {
        let (mut most, mut names) = (None, BTreeSet::new());
        for text in self.learned.iter().chain(&self.measured) {
            match &text.label {
                Label::Number(number) => most = most.max(Some(*number)),
                Label::Name(name) => drop(names.insert(name.clone())),
            }
        }
        let names: Vec<String> = match most {
            Some(_) if !names.is_empty() => bail!("the data has classes by number and by name: one way is needed"),
            Some(most) => (0..=most).map(|i| format!("LABEL_{i}")).collect(),
            None => names.into_iter().collect(),
        };
        ensure!(names.len() >= 2, "the data has one class: there is nothing to tell apart");
        ensure!(names.len() <= 4096, "the data has {} classes, at most 4096 are supported", names.len());
        Ok(names)
    }

    /// Batches of `settings.batch_size` texts.
    pub(super) fn encode(
        self,
        settings: &Settings,
        tokenizer: &Tokenizer,
        start: &Description,
        spec: &ModelSpec,
    ) -> Result<Data> {
        let encoder = Encoder::new(tokenizer, &start.config, spec.outputs());
        let learned = encoder.encode(&settings.data, &self.learned)?;
        let (learned, measured) = match self.measured.is_empty() {
            true if settings.held_out == 0.0 => (learned, Vec::new()),
            true => Labelled::split(learned, settings.held_out),
            false => (learned, encoder.encode(&settings.eval_data, &self.measured)?),
        };
        let context = settings.length(spec.max_positions)?;
        let (size, seed) = (settings.batch_size, settings.seed);
        let bytes = learned.iter().chain(&measured).map(|e| (size_of::<Example>() + size_of_val(&*e.ids)) as u64).sum();
        let held_out = match measured.is_empty() {
            true => Vec::new(),
            false => Labelled::new("the held-out texts", measured, context, size, seed)?.in_order(),
        };
        let batches = Labelled::new(&name_of(&settings.data), learned, context, size, seed)?;
        Ok(Data {
            tokens_per_epoch: batches.tokens(),
            per_epoch: batches.per_epoch(),
            bytes,
            batches: Box::new(batches),
            held_out: Box::new(held_out),
        })
    }
}

/// Labelled texts to tokens and class numbers.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    label2id: Option<&'a Map<String, Value>>,
    classes: usize,
}

impl<'a> Encoder<'a> {
    /// With the class names of a classifier's configuration.
    pub fn new(tokenizer: &'a Tokenizer, config: &'a Value, classes: usize) -> Self {
        Self { tokenizer, label2id: config.get("label2id").and_then(Value::as_object), classes }
    }

    /// Tokens of each text of `files`, a pair's one after the other, and its class.
    pub fn encode(&self, files: &[PathBuf], texts: &[LabelledText]) -> Result<Vec<Example>> {
        let at = |line: usize| format!("{}: line {line}", name_of(files));
        texts.iter().map(|text| self.example(text).with_context(|| at(text.line))).collect()
    }

    fn example(&self, text: &LabelledText) -> Result<Example> {
        let mut ids = self.tokenizer.encode_beginning(&text.text)?;
        if let Some(pair) = &text.text_pair {
            ids.extend(self.tokenizer.encode_fragment(pair)?);
        }
        ids.extend(self.tokenizer.suffix());
        let label = match &text.label {
            Label::Number(number) => {
                ensure!((*number as usize) < self.classes, "class {number}, the model has {}", self.classes);
                *number
            }
            Label::Name(name) => {
                let id = self.label2id.and_then(|names| names.get(name)).and_then(Value::as_u64);
                match id.and_then(|id| u32::try_from(id).ok()) {
                    Some(id) => id,
                    None => bail!("the model has no class named {name}"),
                }
            }
        };
        Ok(Example { ids, label })
    }
}

/// Every labelled text of files of rows.
pub fn read_files(paths: &[PathBuf], format: Option<DataFormat>, columns: &LabelColumns) -> Result<Vec<LabelledText>> {
    let mut texts = Vec::new();
    for file in files(paths)?.0 {
        let name = file.path.display().to_string();
        let rows: Rows<'_> = match format.unwrap_or_else(|| DataFormat::of(&file.path)) {
            DataFormat::Rows(RowFormat::Tsv) => {
                named(Separated::new(open(&file.path)?, Separator::Tab)?, &name, columns)?
            }
            DataFormat::Rows(format) => rows(&file.path, format)?,
            DataFormat::Parquet => parquet_rows(&file.path)?,
            DataFormat::Text => bail!(
                "{name}: texts with a class stand in .jsonl, .json, .csv, .tsv or .parquet files; --data-format says what a file is \
                 that is named otherwise"
            ),
        };
        for row in rows {
            texts.push(columns.read(&name, &row?)?);
        }
    }
    Ok(texts)
}

/// Rows of tab-separated values: with a header, or without one a text, a tab and its class (SST-2's format).
fn named(rows: Separated<'static>, name: &str, columns: &LabelColumns) -> Result<Rows<'static>> {
    let header = rows.header();
    if header.is_empty() || header.iter().any(|column| column == columns.label()) {
        return Ok(Box::new(rows));
    }
    ensure!(
        header.len() == 2,
        "{name}:1: no header with a column `{}`, and no text, tab and class: {} columns; --label-column and --text-column name \
         those of a header",
        columns.label(),
        header.len()
    );
    Ok(Box::new(rows.unnamed(&["text", columns.label()])))
}
