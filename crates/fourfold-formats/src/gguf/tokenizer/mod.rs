//! The tokenizer a GGUF file embeds, rebuilt as the text of a `tokenizer.json`.

mod bpe;
mod pre;
pub(super) mod split;
pub(super) mod spm;

use serde_json::{Map, Value, json};

use super::GgufError;
use super::metadata::{Metadata, Number, Strings};
use crate::SpecialTokens;

/// A rebuilt tokenizer.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// Text of the `tokenizer.json`.
    pub json: String,
    /// Tokens with a meaning of their own.
    pub special: SpecialTokens,
}

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary as the file lists it.
struct Vocabulary<'a> {
    tokens: &'a Strings,
    kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, GgufError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata.strings(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))?;
        let kinds = match metadata.numbers("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; tokens.len()],
            Some(numbers) => numbers.iter().map(|n| kind(*n)).collect::<Result<_, _>>()?,
        };
        if kinds.len() != tokens.len() {
            return Err(GgufError::Tokenizer(format!("{} tokens, {} token types", tokens.len(), kinds.len())));
        }
        Ok(Self { tokens, kinds })
    }

    /// Id, text and kind of every token.
    fn iter(&self) -> impl Iterator<Item = (usize, &'a str, Kind)> {
        self.tokens.iter().zip(&self.kinds).enumerate().map(|(id, (text, &kind))| (id, text, kind))
    }

    /// The model's `vocab`: text to id. Of two tokens with one text the first is meant.
    fn ids(&self) -> Map<String, Value> {
        let mut ids = Map::new();
        for (id, text, _) in self.iter() {
            ids.entry(text).or_insert(json!(id));
        }
        ids
    }

    /// `added_tokens`: what is cut out of a text before anything else.
    fn added(&self) -> Vec<Value> {
        let added = |kind| matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown);
        self.iter()
            .filter(|&(_, text, kind)| added(kind) && !text.is_empty())
            .map(|(id, content, kind)| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": kind != Kind::UserDefined,
                })
            })
            .collect()
    }

    /// The token of an id in the metadata; `None` where the key is absent.
    fn named(&self, metadata: &Metadata, name: &str) -> Result<Option<(u32, String)>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = metadata.count(&key)? else { return Ok(None) };
        match self.tokens.get(id as usize) {
            Some(text) => Ok(Some((id as u32, text.to_owned()))),
            None => Err(GgufError::BadValue { key, found: id.to_string(), expected: "the id of a token" }),
        }
    }
}

fn kind(n: Number) -> Result<Kind, GgufError> {
    Ok(match n {
        Number::Unsigned(0 | 1) => Kind::Normal,
        Number::Unsigned(2) => Kind::Unknown,
        Number::Unsigned(3) => Kind::Control,
        Number::Unsigned(4) => Kind::UserDefined,
        Number::Unsigned(5) => Kind::Unused,
        Number::Unsigned(6) => Kind::Byte,
        other => return Err(GgufError::Tokenizer(format!("unknown token type {other:?}"))),
    })
}

/// Control tokens that end a turn or a text, for files that name only one of several.
const ENDS: &[&str] = &["<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", "<|EOT|>"];

/// Rebuilds the tokenizer; `None` where the file has none.
///
/// # Errors
/// A kind of tokenizer or of splitting that is not read, or a vocabulary that contradicts itself.
pub fn embedded(metadata: &Metadata) -> Result<Option<Embedded>, GgufError> {
    let model = match metadata.string("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some(model) => model,
    };
    let vocabulary = Vocabulary::read(metadata)?;
    let (parts, add_bos_default) = match model {
        "gpt2" => bpe::parts(metadata, &vocabulary)?,
        "llama" => (spm::parts(metadata, &vocabulary)?, true),
        other => return Err(GgufError::Tokenizer(format!("the model {other:?} is not supported: gpt2 and llama are"))),
    };
    let special = special(metadata, &vocabulary, add_bos_default)?;
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(&special, parts.post_processor),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    Ok(Some(Embedded { json: json.to_string(), special }))
}

/// The parts that differ between kinds of tokenizers, as `tokenizer.json` spells them.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Value,
}

fn special(metadata: &Metadata, vocabulary: &Vocabulary, add_bos_default: bool) -> Result<SpecialTokens, GgufError> {
    let named = |name: &str| vocabulary.named(metadata, name);
    let (bos, eos, pad) = (named("bos")?, named("eos")?, named("padding")?);
    let mut eos_ids: Vec<u32> = eos.iter().map(|(id, _)| *id).collect();
    let further = [named("eot")?, named("eom")?].into_iter().flatten().map(|(id, _)| id);
    let known = vocabulary.iter().filter(|(_, text, kind)| *kind == Kind::Control && ENDS.contains(text));
    for id in further.chain(known.map(|(id, _, _)| id as u32)) {
        if !eos_ids.contains(&id) {
            eos_ids.push(id);
        }
    }
    let add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos_default && bos.is_some());
    Ok(SpecialTokens {
        bos_id: bos.as_ref().map(|(id, _)| *id),
        bos: bos.map(|(_, text)| text),
        eos: eos.map(|(_, text)| text),
        eos_ids,
        pad_id: pad.as_ref().map(|(id, _)| *id),
        pad: pad.map(|(_, text)| text),
        unk: named("unknown")?.map(|(_, text)| text),
        add_bos: Some(add_bos),
        add_eos: Some(metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false)),
    })
}

/// The processor that puts BOS before a text and EOS after it, where the file asks for that.
fn post_processor(special: &SpecialTokens, otherwise: Value) -> Value {
    let bos = special.bos.as_ref().zip(special.bos_id).filter(|_| special.add_bos == Some(true));
    let eos = special.eos.as_ref().zip(special.eos_ids.first().copied()).filter(|_| special.add_eos == Some(true));
    if bos.is_none() && eos.is_none() {
        return otherwise;
    }
    let token = |(text, _): (&String, u32), sequence: u8| json!({"SpecialToken": {"id": text, "type_id": sequence}});
    let around = |name: &str, sequence: u8| {
        let text = json!({"Sequence": {"id": name, "type_id": sequence}});
        let parts = [bos.map(|t| token(t, sequence)), Some(text), eos.map(|t| token(t, sequence))];
        parts.into_iter().flatten().collect::<Vec<_>>()
    };
    let mut tokens = Map::new();
    for (text, id) in bos.into_iter().chain(eos) {
        tokens.insert(text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    let (single, pair) = (around("A", 0), [around("A", 0), around("B", 1)].concat());
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}
