//! A `tokenizer.json` as metadata: tokens, their types and merges or scores, the way texts are split, special tokens.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use super::MetaValue;
use crate::gguf::GgufError;
use crate::gguf::tokenizer::split;
use crate::{SpecialTokens, TokenizerFiles};

/// The mark SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Longest piece whose cuts are tried one by one.
const MAX_PIECE: usize = 512;

/// Token types (`tokenizer.ggml.token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A tokenizer's metadata, and what of it llama.cpp does otherwise.
#[derive(Debug, Default)]
pub struct TokenizerMetadata {
    /// Keys and values.
    pub entries: Vec<(String, MetaValue)>,
    /// Differences that a user should know of.
    pub remarks: Vec<String>,
}

fn refuse<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError::Inexpressible(what.into()))
}

/// The metadata of a tokenizer for an embedding of `vocab_size` rows, with the files beside its `tokenizer.json`.
///
/// # Errors
/// [`GgufError::Inexpressible`]: a kind of tokenizer, a way to split, or tokens that llama.cpp has no words for.
pub fn metadata(
    tokenizer: &Value,
    special: &SpecialTokens,
    files: &TokenizerFiles,
    vocab_size: usize,
) -> Result<TokenizerMetadata, GgufError> {
    let model = &tokenizer["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" {
        return refuse(format!("a model of type {kind:?}; byte-level BPE and SentencePiece's BPE can be written"));
    }
    let mut tokens = Tokens::read(tokenizer, &added_beside(files), vocab_size)?;
    let mut out = TokenizerMetadata::default();
    let sentencepiece = model["byte_fallback"].as_bool().unwrap_or(false);
    let (name, pre) = if sentencepiece { ("llama", "default") } else { ("gpt2", split::name_of(tokenizer)?) };
    let mut put = |key: &str, value: MetaValue| out.entries.push((format!("tokenizer.ggml.{key}"), value));
    put("model", MetaValue::String(name.to_owned()));
    put("pre", MetaValue::String(pre.to_owned()));
    let merges = merges(model)?;
    let mut prefix = None;
    let scores = if sentencepiece {
        prefix = Some(space_prefix(tokenizer, &mut out.remarks)?);
        tokens.mark_bytes(model["unk_token"].as_str());
        Some(scores(&tokens, &merges)?)
    } else {
        None
    };
    let mut put = |key: &str, value: MetaValue| out.entries.push((format!("tokenizer.ggml.{key}"), value));
    let find = |text: &Option<String>| text.as_ref().and_then(|text| tokens.ids.get(text.as_str()).copied());
    let (front, back) = around(tokenizer);
    let bos = special.bos_id.or_else(|| find(&special.bos)).or(front);
    let eos = find(&special.eos).or(special.eos_ids.first().copied()).or(back);
    let (pad, unk) = (special.pad_id.or_else(|| find(&special.pad)), find(&special.unk));
    let add_bos = special.add_bos.unwrap_or(front.is_some());
    let add_eos = special.add_eos.unwrap_or(back.is_some());
    if let (Some(front), Some(bos), None) = (front, bos, special.add_bos)
        && front != bos
    {
        return refuse(format!("token {front} is put before every text, and BOS is token {bos}; llama.cpp puts BOS"));
    }
    put("tokens", MetaValue::Strings(tokens.texts));
    put("token_type", MetaValue::I32s(tokens.types));
    match scores {
        Some(scores) => put("scores", MetaValue::F32s(scores)),
        None => put("merges", MetaValue::Strings(merges.iter().map(|(l, r)| format!("{l} {r}")).collect())),
    }
    for (key, id) in [("bos", bos), ("eos", eos), ("padding", pad), ("unknown", unk)] {
        if let Some(id) = id {
            put(&format!("{key}_token_id"), MetaValue::U32(id));
        }
    }
    put("add_bos_token", MetaValue::Bool(add_bos && bos.is_some()));
    put("add_eos_token", MetaValue::Bool(add_eos && eos.is_some()));
    if let Some(prefix) = prefix {
        put("add_space_prefix", MetaValue::Bool(prefix));
    }
    if tokenizer["normalizer"]["type"] == "NFC" {
        out.remarks.push("texts are normalised (NFC) before they are split; llama.cpp does not do that".to_owned());
    }
    out.remarks.extend(tokens.remarks);
    Ok(out)
}

/// Tokens that files beside `tokenizer.json` name: id, text, and whether they are special.
fn added_beside(files: &TokenizerFiles) -> Vec<(u32, String, bool)> {
    if let Some(decoder) = files.config["added_tokens_decoder"].as_object() {
        let each = |(id, token): (&String, &Value)| {
            Some((id.parse().ok()?, token["content"].as_str()?.to_owned(), token["special"] == true))
        };
        return decoder.iter().filter_map(each).collect();
    }
    let named = |text: &str| {
        let of = |file: &Value| {
            let tokens = file.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
            tokens.map(|(_, v)| v).any(|v| v == text || v["content"] == text)
        };
        of(&files.config) || of(&files.special_tokens_map)
    };
    let each = |(text, id): (&String, &Value)| Some((u32::try_from(id.as_u64()?).ok()?, text.clone(), named(text)));
    files.added_tokens.as_object().into_iter().flatten().filter_map(each).collect()
}

/// The vocabulary by id.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
    ids: HashMap<String, u32>,
    remarks: Vec<String>,
}

impl Tokens {
    fn read(tokenizer: &Value, added: &[(u32, String, bool)], vocab_size: usize) -> Result<Self, GgufError> {
        let vocab = tokenizer["model"]["vocab"].as_object();
        let Some(vocab) = vocab else { return refuse("its model has no vocabulary") };
        let mut by_id: BTreeMap<u64, (String, i32)> = BTreeMap::new();
        for (text, id) in vocab {
            let Some(id) = id.as_u64() else { return refuse(format!("token {text:?} has no id")) };
            if let Some((other, _)) = by_id.insert(id, (text.clone(), NORMAL)) {
                return refuse(format!("tokens {other:?} and {text:?} have one id, {id}"));
            }
        }
        let mut remarks = Vec::new();
        let listed = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let mut around = 0;
        for token in listed {
            let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str()) else {
                return refuse(format!("an added token without id or content: {token}"));
            };
            around += usize::from(["lstrip", "rstrip", "single_word"].iter().any(|key| token[*key] == true));
            by_id.insert(id, added_token(text, token["special"] == true));
        }
        if around > 0 {
            remarks.push(format!(
                "{around} added tokens take the spaces around them along, or match whole words alone; llama.cpp does neither"
            ));
        }
        for (id, text, special) in added {
            by_id.insert(u64::from(*id), added_token(text, *special));
        }
        if let Some((&id, (text, _))) = by_id.range(vocab_size as u64..).next() {
            return refuse(format!("token {id}, {text:?}, lies beyond the embedding's {vocab_size} rows"));
        }
        let (mut texts, mut types, mut ids) = (Vec::new(), Vec::new(), HashMap::new());
        for id in 0..vocab_size as u64 {
            let (text, kind) = by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
            if kind != UNUSED {
                ids.entry(text.clone()).or_insert(id as u32);
            }
            texts.push(text);
            types.push(kind);
        }
        Ok(Self { texts, types, ids, remarks })
    }

    /// Byte tokens, and the unknown one.
    fn mark_bytes(&mut self, unknown: Option<&str>) {
        for (text, kind) in self.texts.iter().zip(&mut self.types) {
            let byte = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
            if *kind == NORMAL && byte.is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok()) {
                *kind = BYTE;
            }
            if unknown == Some(text.as_str()) {
                *kind = UNKNOWN;
            }
        }
    }
}

/// Tokens that are not marked special and that llama.cpp's converter takes for such.
fn looks_special(text: &str) -> bool {
    let within = |front: &str, back: &str| text.starts_with(front) && text.ends_with(back);
    text == "<pad>" || text == "<mask>" || within("<|", "|>") || within("<｜", "｜>")
}

fn added_token(text: &str, special: bool) -> (String, i32) {
    if special || looks_special(text) { (text.to_owned(), CONTROL) } else { (text.replace(SPACE, " "), USER_DEFINED) }
}

/// The merges, best first.
fn merges(model: &Value) -> Result<Vec<(String, String)>, GgufError> {
    let Some(listed) = model["merges"].as_array() else { return refuse("its model has no merges") };
    let pair = |(i, merge): (usize, &Value)| {
        let found = match merge {
            Value::String(text) => text.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned())),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(l), Value::String(r)] => Some((l.clone(), r.clone())),
                _ => None,
            },
            _ => None,
        };
        match found {
            Some((left, right)) if !left.contains(' ') && !right.contains(' ') => Ok((left, right)),
            _ => refuse(format!("merge {i}, {merge}, is not a pair of tokens without spaces")),
        }
    };
    listed.iter().enumerate().map(pair).collect()
}

/// Whether a space is put before a text, as far as normalizer and pre-tokenizer of a SentencePiece model say.
fn space_prefix(tokenizer: &Value, remarks: &mut Vec<String>) -> Result<bool, GgufError> {
    let mut prefix = false;
    let mut marks = false;
    let normalizer = &tokenizer["normalizer"];
    let parts: Vec<&Value> = match normalizer["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => normalizer["normalizers"].as_array().into_iter().flatten().collect(),
        Some(_) => vec![normalizer],
    };
    for part in parts {
        match part["type"].as_str() {
            Some("Prepend") if part["prepend"] == SPACE => prefix = true,
            Some("Replace") if part["pattern"]["String"] == " " && part["content"] == SPACE => marks = true,
            other => return refuse(format!("a normalizer of type {other:?} in a SentencePiece model")),
        }
    }
    let pre = &tokenizer["pre_tokenizer"];
    match pre["type"].as_str() {
        None => {}
        Some("Metaspace") if !marks => {
            if pre["split"] == true {
                return refuse("a Metaspace pre-tokenizer that splits at spaces: llama.cpp merges across them");
            }
            marks = true;
            match pre["prepend_scheme"].as_str() {
                Some("never") => {}
                Some("first") => {
                    prefix = true;
                    remarks.push("a space is put before the first piece of a text alone; llama.cpp puts one behind every special token too".to_owned());
                }
                Some(_) => prefix = true,
                None => prefix = pre["add_prefix_space"].as_bool().unwrap_or(true),
            }
        }
        other => return refuse(format!("a pre-tokenizer of type {other:?} in a SentencePiece model")),
    }
    if !marks {
        return refuse("a model with byte fallback that does not write spaces as \u{2581}");
    }
    Ok(prefix)
}

/// SentencePiece's scores from merges: merging the pair whose token scores highest is merging by rank where the merges of each token
/// stand together and are all there are.
fn scores(tokens: &Tokens, merges: &[(String, String)]) -> Result<Vec<f32>, GgufError> {
    let mut scores: Vec<f32> = vec![0.0; tokens.texts.len()];
    let mut ranks: HashMap<String, f32> = HashMap::new();
    let mut last = String::new();
    let mut known: HashSet<(&str, &str)> = HashSet::with_capacity(merges.len());
    for (left, right) in merges {
        let joined = [left.as_str(), right].concat();
        if joined != last {
            let rank = -(ranks.len() as f32) - 1.0;
            if ranks.insert(joined.clone(), rank).is_some() {
                return refuse(format!(
                    "the merges to {joined:?} do not stand together, as a SentencePiece model's do"
                ));
            }
            last = joined;
        }
        known.insert((left, right));
    }
    for (id, text) in tokens.texts.iter().enumerate().filter(|(id, _)| tokens.types[*id] == NORMAL) {
        if text.len() > MAX_PIECE {
            return refuse(format!("token {id} is {} bytes long", text.len()));
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            let normal = |t: &str| tokens.ids.get(t).is_some_and(|&id| tokens.types[id as usize] == NORMAL);
            if normal(left) && normal(right) && !known.contains(&(left, right)) {
                return refuse(format!(
                    "{left:?} and {right:?} make a token and are no merge, as they are in a SentencePiece model"
                ));
            }
        }
        scores[id] = ranks.get(text).copied().unwrap_or(0.0);
    }
    Ok(scores)
}

/// The tokens that a post-processor puts before and after a text.
fn around(tokenizer: &Value) -> (Option<u32>, Option<u32>) {
    let post = &tokenizer["post_processor"];
    let parts: Vec<&Value> = match post["type"].as_str() {
        Some("Sequence") => post["processors"].as_array().into_iter().flatten().collect(),
        _ => vec![post],
    };
    let Some(template) = parts.into_iter().find(|part| part["type"] == "TemplateProcessing") else {
        return (None, None);
    };
    let id = |piece: Option<&Value>| {
        let name = piece?["SpecialToken"]["id"].as_str()?;
        let id = template["special_tokens"][name]["ids"].as_array()?.first()?.as_u64()?;
        u32::try_from(id).ok()
    };
    let single = template["single"].as_array();
    let pieces = single.map(Vec::as_slice).unwrap_or_default();
    (id(pieces.first()), if pieces.len() > 1 { id(pieces.last()) } else { None })
}
