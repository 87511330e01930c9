//! From what a user calls a MODEL to a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use fourfold_formats::{Checkpoint, TokenizerSource};
use fourfold_infer::{ChatTemplate, Tokenizer};
use fourfold_kernels::{Backend, release_freed_memory};
use fourfold_models::{Model, ModelSpec, spec_from_config};
use serde_json::Value;

use crate::context::Context;
use crate::hub;

/// A checkpoint and what its configuration says.
pub struct OpenModel {
    pub checkpoint: Checkpoint,
    pub spec: ModelSpec,
}

/// Finds, opens and understands a MODEL; downloads it when it is a name on the hub.
pub fn open(model: &str, context: &Context) -> Result<OpenModel> {
    let path = locate(model, context)?;
    let checkpoint = fourfold_formats::open(&path)?;
    let spec = spec_from_config(&checkpoint.config).with_context(|| config_name(&path))?;
    Ok(OpenModel { checkpoint, spec })
}

/// As [`open`], with an adapter in PEFT's format on it.
pub fn open_adapted(model: &str, adapter: Option<&Path>, context: &Context) -> Result<OpenModel> {
    let OpenModel { mut checkpoint, spec } = open(model, context)?;
    if let Some(dir) = adapter {
        checkpoint = fourfold_formats::with_adapter(checkpoint, dir)?;
    }
    Ok(OpenModel { checkpoint, spec })
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
    /// Loads every weight.
    pub fn load(&self, backend: Arc<dyn Backend>, context: &Context) -> Result<Arc<Model>> {
        let bar = context.progress.spinner("loading");
        let model =
            Model::load(&self.spec, &*self.checkpoint.weights, backend, &mut |part| bar.set_message(part.to_owned()))?;
        bar.finish_and_clear();
        release_freed_memory();
        Ok(Arc::new(model))
    }

    /// The tokenizer, checked against the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let path = &self.checkpoint.path;
        let tokenizer = match &self.checkpoint.tokenizer {
            TokenizerSource::Json(file) => Tokenizer::from_file(file)?,
            TokenizerSource::Embedded(json) => {
                Tokenizer::from_bytes(json.as_bytes()).with_context(|| path.display().to_string())?
            }
            TokenizerSource::None => bail!("{}: there is no tokenizer (tokenizer.json)", path.display()),
        };
        tokenizer.check_fits(self.spec.vocab_size).with_context(|| match &self.checkpoint.tokenizer {
            TokenizerSource::Json(file) => file.display().to_string(),
            TokenizerSource::Embedded(_) | TokenizerSource::None => path.display().to_string(),
        })?;
        let special = &self.checkpoint.special;
        let named = || special.bos_id.or_else(|| tokenizer.token_to_id(special.bos.as_deref()?));
        let bos = match special.add_bos {
            Some(true) => named(),
            Some(false) => None,
            None => tokenizer.prefix_token()?,
        };
        // Its text, its parts and what they were built from are many times what is left.
        release_freed_memory();
        Ok(tokenizer.with_bos(bos))
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
        let special = &self.checkpoint.special;
        match &self.checkpoint.chat_template {
            Some(source) => {
                let (bos, eos) = (special.bos.as_deref().unwrap_or(""), special.eos.as_deref().unwrap_or(""));
                Ok((ChatTemplate::new(source, bos, eos)?, true))
            }
            None => Ok((ChatTemplate::chatml()?, false)),
        }
    }
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
