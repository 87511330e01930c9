//! What the files beside a `tokenizer.json` add to it: special tokens, and what is put around a text.
//!
//! The rules are those of Hugging Face transformers (`PreTrainedTokenizerBase.from_pretrained`, `TokenizersBackend`). The pipeline itself
//! (normalizer, splitting, model, decoder) is `tokenizer.json`'s; see [`super::class`] for what a class of transformers makes of it.

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::class::Class;
use crate::InferError;

/// What the files beside a `tokenizer.json` say.
#[derive(Clone, Debug, Default)]
pub struct TokenizerSettings {
    /// Beginning of sequence.
    pub bos: Option<String>,
    /// Its id, where the files give one.
    pub bos_id: Option<u32>,
    /// End of sequence.
    pub eos: Option<String>,
    /// Its id, where the files give one.
    pub eos_id: Option<u32>,
    /// Whether BOS is put before a text, and EOS after it; `None` leaves both to the tokenizer's own post-processor.
    pub around: Option<Around>,
    /// Every named special token, by its key: what a chat template may print.
    pub named: Vec<(String, String)>,
    /// Tokens that `tokenizer.json` may lack, with the ids that the files give them.
    pub(super) added: Vec<(Option<u32>, AddedToken)>,
    /// Whether special tokens spelled out in a text are split like any other text.
    pub(super) split_special_tokens: bool,
    /// Whether the file asks for spaces before punctuation to be taken out of decoded text.
    pub(super) cleans_spaces: bool,
    /// The class of transformers that is named.
    pub(super) class: Option<String>,
    /// The model's type.
    pub(super) model_type: Option<String>,
    /// Whether a space is put before a text, where the files say so.
    pub(super) add_prefix_space: Option<bool>,
    /// Whether SentencePiece's space is put after special tokens too.
    pub(super) legacy: bool,
    /// What is asked for and not done.
    pub(super) remarks: Vec<String>,
    /// Keys of special tokens that the files have, null ones too.
    pub(super) keys: Vec<String>,
    /// Whether `tokenizer_config.json` lists the added tokens itself.
    pub(super) lists_added: bool,
}

/// What is put around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Around {
    /// BOS before it.
    pub bos: bool,
    /// EOS after it.
    pub eos: bool,
}

/// The names of special tokens that every tokenizer of transformers has.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl TokenizerSettings {
    /// Reads `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, each null where there is none.
    ///
    /// Where `tokenizer_config.json` has `added_tokens_decoder`, the other two are older than it and not read, as in transformers.
    ///
    /// # Errors
    /// [`InferError::TokenizerConfig`]: a value is not what it should be, or asks for what is not done.
    pub fn from_files(config: &Value, tokens_map: &Value, added_tokens: &Value) -> Result<Self, InferError> {
        let empty = Map::new();
        let config = object(config, "tokenizer_config.json")?.unwrap_or(&empty);
        let mut settings = Self {
            around: around(config)?,
            split_special_tokens: flag(config, "split_special_tokens")?.unwrap_or(false),
            cleans_spaces: flag(config, "clean_up_tokenization_spaces")?.unwrap_or(false),
            add_prefix_space: flag(config, "add_prefix_space")?,
            legacy: flag(config, "legacy")?.unwrap_or(false),
            class: match config.get("tokenizer_class") {
                None | Some(Value::Null) => None,
                Some(Value::String(name)) => Some(name.clone()),
                Some(_) => return Err(refused("tokenizer_class", "is no name")),
            },
            ..Self::default()
        };
        if let Some(true) = flag(config, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")? {
            return Err(refused(
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
                "true is not done: set it to false",
            ));
        }
        if let Some(true) = flag(config, "fix_mistral_regex")? {
            return Err(refused(
                "fix_mistral_regex",
                "true is not done: write the corrected splitting into tokenizer.json",
            ));
        }
        if config.get("auto_map").is_some_and(|map| !map.is_null()) {
            let remark = "auto_map names code of the model's own, which is not run: tokenizer.json is used as it is";
            settings.remarks.push(remark.to_owned());
        }
        let mut tokens = Tokens::default();
        tokens.read(config, "tokenizer_config.json", false)?;
        if let Some(decoder) = config.get("added_tokens_decoder").filter(|v| !v.is_null()) {
            let listed = decoder.as_object().ok_or_else(|| refused("added_tokens_decoder", "is not an object"))?;
            for (id, token) in listed {
                let wrong = || refused("added_tokens_decoder", &format!("`{id}` is not the id of a token"));
                let id: u32 = id.parse().map_err(|_| wrong())?;
                let token = token_of(token, false, "added_tokens_decoder")?.ok_or_else(wrong)?;
                settings.added.push((Some(id), token));
            }
            settings.added.sort_by_key(|(id, _)| *id);
            settings.lists_added = true;
        } else {
            if let Some(map) = object(tokens_map, "special_tokens_map.json")? {
                tokens.read(map, "special_tokens_map.json", true)?;
            }
            if let Some(map) = object(added_tokens, "added_tokens.json")? {
                for (content, id) in map {
                    let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                    let id = id.ok_or_else(|| refused("added_tokens.json", &format!("`{content}` has no id")))?;
                    let special = tokens.is_special(content);
                    settings.added.push((Some(id), AddedToken::from(content.clone(), special)));
                }
                settings.added.sort_by_key(|(id, _)| *id);
            }
        }
        let place = |key: &String| NAMED.iter().position(|named| named == key).unwrap_or(NAMED.len());
        tokens.named.sort_by_key(|(key, _)| place(key));
        settings.keys = tokens.keys;
        for token in tokens.named.iter().map(|(_, t)| t).chain(&tokens.extra) {
            if !settings.added.iter().any(|(_, known)| known.content == token.content) {
                settings.added.push((None, token.clone()));
            }
        }
        settings.named = tokens.named.into_iter().map(|(key, token)| (key, token.content)).collect();
        settings.bos = settings.named("bos_token");
        settings.eos = settings.named("eos_token");
        Ok(settings)
    }

    /// The same, with the ids that BOS and EOS have where the tokenizer does not know their names.
    #[must_use]
    pub fn with_ids(self, bos: Option<u32>, eos: Option<u32>) -> Self {
        Self { bos_id: bos, eos_id: eos, ..self }
    }

    /// The same, for a model of this type whose `tokenizer.json` is byte-level or not: with the special tokens that its class has by itself.
    #[must_use]
    pub fn for_model(mut self, model_type: Option<&str>, is_byte_level: bool) -> Self {
        self.model_type = model_type.map(str::to_owned);
        let class = Class::of(self.class.as_deref(), model_type, is_byte_level);
        for (key, token) in class.tokens() {
            if !self.keys.iter().any(|known| known == key) {
                self.named.push(((*key).to_owned(), (*token).to_owned()));
            }
        }
        self.bos = self.named("bos_token");
        self.eos = self.named("eos_token");
        self
    }

    /// Whether [`TokenizerSettings::for_model`] depends on whether `tokenizer.json` is byte-level.
    pub fn asks_for_bytes(&self) -> bool {
        let named = ["bos_token", "eos_token", "unk_token"];
        self.class.as_deref().is_some_and(|class| class.starts_with("LlamaTokenizer"))
            && !named.iter().all(|key| self.keys.iter().any(|known| known == key))
    }

    /// The token of a key such as `bos_token`.
    pub fn named(&self, key: &str) -> Option<String> {
        self.named.iter().find(|(k, _)| k == key).map(|(_, token)| token.clone())
    }
}

/// Special tokens as the files list them.
#[derive(Default)]
struct Tokens {
    named: Vec<(String, AddedToken)>,
    extra: Vec<AddedToken>,
    keys: Vec<String>,
}

impl Tokens {
    fn is_special(&self, content: &str) -> bool {
        self.named.iter().map(|(_, t)| t).chain(&self.extra).any(|t| t.content == content)
    }

    /// Takes over what one file names; a later file replaces an earlier one's word.
    fn read(&mut self, file: &Map<String, Value>, name: &str, is_map: bool) -> Result<(), InferError> {
        for (key, value) in file.iter().filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_")) {
            self.keys.push(key.clone());
            let is_known = NAMED.contains(&key.as_str());
            // An object that is not marked as a token is one for a known name alone.
            if !is_known && !is_map && value.is_object() && value.get("__type").is_none() {
                continue;
            }
            match token_of(value, true, key)? {
                Some(token) => {
                    self.named.retain(|(k, _)| k != key);
                    self.named.push((key.clone(), token));
                }
                None if value.is_null() || value.as_bool() == Some(false) || !is_known => {}
                None => return Err(refused(key, &format!("in {name} is no token"))),
            }
        }
        if let Some(tokens) = object(file.get("model_specific_special_tokens").unwrap_or(&Value::Null), name)? {
            self.read_roles("model_specific_special_tokens", tokens, name)?;
        }
        // The older key counts where the newer one has no list.
        let key = match file.get("extra_special_tokens") {
            Some(Value::Object(roles)) => {
                self.read_roles("extra_special_tokens", roles, name)?;
                "additional_special_tokens"
            }
            Some(extra) if !is_empty(extra) => "extra_special_tokens",
            _ => "additional_special_tokens",
        };
        match file.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Array(tokens)) => {
                for token in tokens {
                    let token = token_of(token, true, key)?;
                    self.extra.push(token.ok_or_else(|| refused(key, &format!("in {name} is no list of tokens")))?);
                }
            }
            Some(Value::Object(tokens)) => self.read_roles(key, tokens, name)?,
            Some(_) => return Err(refused(key, &format!("in {name} is neither a list nor an object of tokens"))),
        }
        Ok(())
    }

    /// Tokens by their roles.
    fn read_roles(&mut self, key: &str, tokens: &Map<String, Value>, name: &str) -> Result<(), InferError> {
        for (role, token) in tokens {
            let token = token_of(token, true, key)?;
            let token = token.ok_or_else(|| refused(key, &format!("in {name}: `{role}` is no token")))?;
            self.named.retain(|(known, _)| known != role);
            self.named.push((role.clone(), token));
        }
        Ok(())
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// A token given as a string, or as an object with its `content`; `None` for anything else.
fn token_of(value: &Value, special: bool, key: &str) -> Result<Option<AddedToken>, InferError> {
    let Some(object) = value.as_object() else {
        return Ok(value.as_str().filter(|t| !t.is_empty()).map(|t| AddedToken::from(t, special).normalized(false)));
    };
    let Some(content) = object.get("content").and_then(Value::as_str).filter(|t| !t.is_empty()) else {
        return Ok(None);
    };
    let flag = |name: &str, otherwise: bool| match object.get(name) {
        None | Some(Value::Null) => Ok(otherwise),
        Some(Value::Bool(b)) => Ok(*b),
        Some(_) => Err(refused(key, &format!("`{name}` of {content:?} is neither true nor false"))),
    };
    let special = special || flag("special", false)?;
    let token = AddedToken::from(content, special)
        .normalized(flag("normalized", !special)?)
        .lstrip(flag("lstrip", false)?)
        .rstrip(flag("rstrip", false)?)
        .single_word(flag("single_word", false)?);
    Ok(Some(token))
}

/// `add_bos_token` and `add_eos_token`. One of them alone means that the other is false.
fn around(config: &Map<String, Value>) -> Result<Option<Around>, InferError> {
    let (bos, eos) = (flag(config, "add_bos_token")?, flag(config, "add_eos_token")?);
    Ok((bos.is_some() || eos.is_some()).then(|| Around { bos: bos == Some(true), eos: eos == Some(true) }))
}

fn flag(config: &Map<String, Value>, key: &str) -> Result<Option<bool>, InferError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(refused(key, "is neither true nor false")),
    }
}

fn object<'a>(value: &'a Value, file: &str) -> Result<Option<&'a Map<String, Value>>, InferError> {
    match value {
        Value::Null => Ok(None),
        Value::Object(map) => Ok(Some(map)),
        _ => Err(refused(file, "is no JSON object")),
    }
}

fn refused(key: &str, reason: &str) -> InferError {
    InferError::TokenizerConfig { key: key.to_owned(), reason: reason.to_owned() }
}
