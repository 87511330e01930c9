//! From what a user calls a MODEL to a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use fourfold_formats::quantization::quantization_remarks;
use fourfold_formats::{ADAPTER_CONFIG, Adaptable, Checkpoint};
use fourfold_infer::{ChatTemplate, Tokenizer};
use fourfold_kernels::{Backend, release_freed_memory};
use fourfold_models::{
    ConvNetSpec, Model, ModelError, ModelSpec, OwnHead, Role, WeightSpec, check_tensors, config_remarks,
    spec_from_config, with_model_names,
};
use fourfold_tensor::WeightSource;
use serde_json::{Value, json};

use crate::context::Context;
use crate::hub;
use crate::tokenizer::TokenizerText;
use crate::weights::{CheckedWeights, file_of};

/// A checkpoint and what its configuration says.
pub struct OpenModel {
    pub checkpoint: Checkpoint,
    pub spec: ModelSpec,
}

/// A convolutional network's checkpoint and what its configuration says.
pub struct OpenNetwork {
    pub checkpoint: Checkpoint,
    pub spec: ConvNetSpec,
}

/// How a MODEL is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// To be run, compressed or trained.
    Whole,
    /// To be trained as a classifier: another head will stand in the place of its own.
    WithoutHead,
    /// To be listed: with every tensor of the files.
    Listed,
}

/// Finds, opens and understands a MODEL; downloads it when it is a name on the hub. This is the one way to a language
/// model's weights: names, shapes and types of its tensors are checked here, and their numbers as they are read.
pub fn open(model: &str, context: &Context) -> Result<OpenModel> {
    open_for(model, Opening::Whole, context)
}

/// As [`open`], for some purpose.
pub fn open_for(model: &str, opening: Opening, context: &Context) -> Result<OpenModel> {
    let path = locate(model, context)?;
    let mut checkpoint = fourfold_formats::open(&path)?;
    let mut spec = spec_from_config(&checkpoint.config).with_context(|| config_name(&path))?;
    for remark in config_remarks(&checkpoint.config)?.into_iter().chain(quantization_remarks(&checkpoint.config)) {
        context.remark(&format!("{}: {remark}", config_name(&path)));
    }
    let named = || path.display().to_string();
    checkpoint.weights = with_model_names(&spec, checkpoint.weights).with_context(named)?;
    let mut read = spec.weights();
    if opening == Opening::WithoutHead {
        read.retain(|weight| weight.role != Role::LmHead);
    }
    check_tensors(&read, &*checkpoint.weights).map_err(|error| at_file(error, &path))?;
    if opening != Opening::WithoutHead
        && OwnHead::find(&spec, &*checkpoint.weights).with_context(named)? == OwnHead::Different
    {
        spec.tied = false;
        read = spec.weights();
        checkpoint.config["tie_word_embeddings"] = json!(false);
        context.remark(&format!(
            "{}: config.json ties the output projection to the embedding, and the checkpoint holds another one \
             (lm_head.weight): the one in the checkpoint is used",
            path.display()
        ));
    }
    let checkpoint = checked(checkpoint, &read, opening == Opening::Listed, context)?;
    Ok(OpenModel { checkpoint, spec })
}

/// Finds and opens a MODEL if it is a convolutional network; checked as by [`open`].
pub fn open_network(model: &str, context: &Context) -> Result<Option<OpenNetwork>> {
    let path = locate(model, context)?;
    let checkpoint = fourfold_formats::open(&path)?;
    if !ConvNetSpec::is_described_by(&checkpoint.config) {
        return Ok(None);
    }
    let spec = ConvNetSpec::from_config(&checkpoint.config).with_context(|| path.display().to_string())?;
    let checkpoint = checked(checkpoint, &spec.weights(), false, context)?;
    Ok(Some(OpenNetwork { checkpoint, spec }))
}

/// Names the file of a checkpoint that an error is about.
fn at_file(error: ModelError, path: &Path) -> anyhow::Error {
    let file = match &error {
        ModelError::Shape { tensor, .. } | ModelError::NotFloat { tensor, .. } => file_of(path, tensor),
        _ => path.to_owned(),
    };
    anyhow::Error::new(error).context(file.display().to_string())
}

/// A checkpoint whose tensors are those that a model reads. What nothing reads is said, and listed if that is asked
/// for.
fn checked(checkpoint: Checkpoint, read: &[WeightSpec], is_listed: bool, context: &Context) -> Result<Checkpoint> {
    const SHOWN: usize = 3;
    let Checkpoint { weights, path, .. } = checkpoint;
    let mut unread = check_tensors(read, &*weights).map_err(|error| at_file(error, &path))?;
    let weights: Box<dyn WeightSource> = match is_listed {
        true => weights,
        false => Box::new(CheckedWeights::new(weights, &unread, &path)),
    };
    // A tied projection that is the embedding once more is as good as read.
    unread.retain(|name| name != "lm_head.weight");
    if !unread.is_empty() && !is_listed {
        let more = if unread.len() > SHOWN { ", …" } else { "" };
        context.remark(&format!(
            "{}: no layer reads {} of its tensors: {}{more}",
            path.display(),
            unread.len(),
            unread[..unread.len().min(SHOWN)].join(", ")
        ));
    }
    if path.join(ADAPTER_CONFIG).is_file() {
        context.remark(&format!(
            "{0}: the directory holds an adapter as well, which is not applied without --adapter {0}",
            path.display()
        ));
    }
    Ok(Checkpoint { weights, path, ..checkpoint })
}

/// As [`open`], with an adapter in PEFT's format on it.
pub fn open_adapted(model: &str, adapter: Option<&Path>, context: &Context) -> Result<OpenModel> {
    let open = open(model, context)?;
    match adapter {
        Some(dir) => open.adapted(dir),
        None => Ok(open),
    }
}

/// Where a model's configuration stands, for errors.
fn config_name(path: &Path) -> String {
    if path.is_dir() { path.join("config.json").display().to_string() } else { path.display().to_string() }
}

/// The path of a MODEL.
pub fn locate(model: &str, context: &Context) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    match hub::parse_name(model) {
        Some((repo, revision)) => hub::fetch(repo, revision, context),
        None => bail!("{model}: no such file or directory"),
    }
}

impl OpenModel {
    /// Bytes of tensors that no layer reads: they are in the files, and not among the weights.
    pub fn unread_bytes(&self) -> u64 {
        let read: u64 = self.checkpoint.weights.tensors().iter().map(|tensor| tensor.bytes).sum();
        self.checkpoint.weight_bytes.saturating_sub(read)
    }

    /// With the adapter in the directory `dir`.
    pub fn adapted(self, dir: &Path) -> Result<Self> {
        let Self { checkpoint, spec } = self;
        Ok(Self { checkpoint: fourfold_formats::with_adapter(checkpoint, dir, &adaptable(&spec))?, spec })
    }

    /// Loads every weight.
    pub fn load(&self, backend: Arc<dyn Backend>, context: &Context) -> Result<Arc<Model>> {
        let bar = context.progress.spinner("loading");
        let model =
            Model::load(&self.spec, &*self.checkpoint.weights, backend, &mut |part| bar.set_message(part.to_owned()))?;
        bar.finish_and_clear();
        release_freed_memory();
        Ok(Arc::new(model))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        TokenizerText::of(&self.checkpoint)?.open(self.spec.vocab_size)
    }

    /// Tokens that end an answer.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let special = &self.checkpoint.special;
        let mut ids = special.eos_ids.clone();
        ids.extend(special.eos.as_deref().and_then(|eos| tokenizer.token_to_id(eos)));
        for config in [self.checkpoint.generation_config.as_ref(), Some(&self.checkpoint.config)].into_iter().flatten()
        {
            ids.extend(eos_ids(config));
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The chat template the model ships, or ChatML (and whether it was the model's own).
    pub fn chat_template(&self) -> Result<(ChatTemplate, bool)> {
        Ok(match TokenizerText::of(&self.checkpoint)?.template()? {
            Some(template) => (template, true),
            None => (ChatTemplate::chatml()?, false),
        })
    }
}

/// What of a model an adapter may change. Embeddings and routers have no factors; a matrix that two layers share would
/// be changed in one of them alone, which is none of these forms.
pub fn adaptable(spec: &ModelSpec) -> Adaptable {
    let mut adaptable = Adaptable::default();
    for weight in spec.weights() {
        let is_linear = match weight.role {
            Role::Attention | Role::Mlp | Role::SharedExpert | Role::RoutedExpert | Role::LmHead => true,
            Role::Embedding
            | Role::Router
            | Role::Norm
            | Role::Bias
            | Role::Convolution
            | Role::RunningMean
            | Role::RunningVariance => false,
        };
        if let ([rows, cols], Some(layer), true) =
            (weight.shape.as_slice(), weight.name.strip_suffix(".weight"), is_linear)
        {
            adaptable.layers.insert(layer.to_owned(), [*rows, *cols]);
        }
        if !(spec.tied && weight.role == Role::Embedding) {
            adaptable.tensors.insert(weight.name, weight.shape);
        }
    }
    adaptable
}

/// `eos_token_id`: a number or a list of them.
fn eos_ids(config: &Value) -> Vec<u32> {
    let as_id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(as_id).collect(),
        Some(id) => as_id(id).into_iter().collect(),
        None => Vec::new(),
    }
}
