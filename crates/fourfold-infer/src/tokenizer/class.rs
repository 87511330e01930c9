//! The class of transformers that `tokenizer_config.json` names. Version 5 of transformers makes normalizer, splitting and decoder anew
//! for some classes, whatever `tokenizer.json` says of them; here they are `tokenizer.json`'s, as in version 4, and where the two differ it
//! is said.

use serde_json::{Map, Value, json};
use tokenizers::{
    AddedToken, AddedVocabulary, Decoder as _, ModelWrapper, OffsetReferential, OffsetType, PreTokenizer as _,
};

use super::bounds::Parts;
use super::pipeline::{Decoding, Normalizing, Splitting};

/// What a class makes of a `tokenizer.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Class {
    /// It takes the file as it is.
    #[default]
    Backend,
    /// `LlamaTokenizer`: SentencePiece's spaces, byte tokens.
    Llama,
    /// `GPT2Tokenizer`: bytes, GPT-2's expression.
    Gpt2,
    /// `Qwen2Tokenizer`: bytes, Qwen's expression, NFC.
    Qwen2,
    /// One that this program does not know.
    Unknown(String),
}

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Texts that tell pipelines apart; `PROBE` stands for a special token.
const PROBES: [&str; 8] = [
    "The cat",
    "12345 is 6.5",
    " two  spaces\n\n\tand  ",
    "don't I'LL  you've",
    "e\u{301} é 猫ﬁ½",
    "a_b-c/d(e).f\r\n!?",
    "aPROBEb",
    "a PROBE b PROBE",
];
const PROBE: &str = "PROBE";

impl Class {
    /// The class that transformers takes for `tokenizer_class` and the model's type.
    pub(super) fn of(name: Option<&str>, model_type: Option<&str>, is_byte_level: bool) -> Self {
        let name = name.map(|name| name.strip_suffix("Fast").unwrap_or(name));
        match (name, model_type) {
            (_, Some("qwen2")) | (None, Some("qwen3")) => Self::Qwen2,
            (Some("LlamaTokenizer"), _) if is_byte_level => Self::Backend,
            (Some("LlamaTokenizer"), _) => Self::Llama,
            (Some("GPT2Tokenizer"), _) => Self::Gpt2,
            (Some("Qwen2Tokenizer"), _) => Self::Qwen2,
            (None | Some("PreTrainedTokenizer" | "TokenizersBackend" | "PythonBackend"), _) => Self::Backend,
            (Some(name), _) => Self::Unknown(name.to_owned()),
        }
    }

    /// Special tokens that the class has where the files name none.
    pub(super) fn tokens(&self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Self::Gpt2 => {
                &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
            }
            Self::Qwen2 => {
                &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
            }
            Self::Backend | Self::Unknown(_) => &[],
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Backend => "PreTrainedTokenizerFast",
            Self::Llama => "LlamaTokenizer",
            Self::Gpt2 => "GPT2Tokenizer",
            Self::Qwen2 => "Qwen2Tokenizer",
            Self::Unknown(name) => name,
        }
    }

    /// The parts with `add_prefix_space` as `tokenizer_config.json` has it, where the class obeys it and the file says otherwise.
    pub(super) fn with_space(&self, parts: &Parts, space: Option<bool>, legacy: bool) -> Option<Parts> {
        let space = space?;
        let is_byte_level = parts.pre_tokenizer.to_string().contains("\"ByteLevel\"");
        let mut changed = parts.clone();
        match self {
            Self::Gpt2 | Self::Qwen2 if is_byte_level => {
                each(&mut changed.pre_tokenizer, &mut |part| {
                    if is_type(part, "ByteLevel") {
                        part.insert("add_prefix_space".to_owned(), space.into());
                    }
                });
            }
            Self::Llama if !is_byte_level => sentence_piece_space(&mut changed, space, legacy),
            _ => return None,
        }
        (changed != *parts).then_some(changed)
    }

    /// The parts that version 5 of transformers makes for the class.
    fn parts(&self, space: Option<bool>, legacy: bool) -> Option<Parts> {
        let bytes = |space: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex});
        let decoder = bytes(true, true);
        Some(match self {
            Self::Backend | Self::Unknown(_) => return None,
            Self::Llama => {
                let space = space.unwrap_or(true);
                let scheme = ["never", scheme(legacy)][usize::from(space)];
                let mut decoders = vec![
                    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                    json!({"type": "ByteFallback"}),
                    json!({"type": "Fuse"}),
                ];
                decoders.extend(space.then(strip));
                Parts {
                    pre_tokenizer: json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false}),
                    decoder: json!({"type": "Sequence", "decoders": decoders}),
                    ..Parts::default()
                }
            }
            Self::Gpt2 => Parts { pre_tokenizer: bytes(space.unwrap_or(false), true), decoder, ..Parts::default() },
            Self::Qwen2 => {
                let split =
                    json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
                Parts {
                    normalizer: json!({"type": "NFC"}),
                    pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [split, bytes(space.unwrap_or(false), false)]}),
                    decoder,
                    ..Parts::default()
                }
            }
        })
    }

    /// What the class makes of texts or tokens otherwise than `tokenizer.json` says, as a remark; `None` where nothing differs.
    pub(super) fn difference(
        &self,
        parts: &Parts,
        model: &ModelWrapper,
        space: Option<bool>,
        legacy: bool,
    ) -> Option<String> {
        let name = self.name();
        if let Self::Unknown(_) = self {
            return Some(format!(
                "tokenizer_class {name:?} is not known: texts are split and decoded as tokenizer.json says, which that \
                 class may do otherwise"
            ));
        }
        let theirs = self.parts(space, legacy)?;
        let what = first_difference(parts, &theirs, model).or_else(|| self.model_difference(model))?;
        Some(format!(
            "{what} is treated as tokenizer.json says, and otherwise by transformers 5, which makes {name} without it"
        ))
    }

    /// What the class changes of the model itself.
    fn model_difference(&self, model: &ModelWrapper) -> Option<String> {
        let ModelWrapper::BPE(bpe) = model else { return Some("a model other than BPE".to_owned()) };
        let is_llama = *self == Self::Llama;
        let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
        let flags = [
            ("byte_fallback", bpe.byte_fallback == is_llama),
            ("ignore_merges", !bpe.ignore_merges),
            ("continuing_subword_prefix", is_empty(&bpe.continuing_subword_prefix)),
            ("end_of_word_suffix", is_empty(&bpe.end_of_word_suffix)),
        ];
        flags.iter().find(|(_, same)| !same).map(|(name, _)| format!("{name} of the model"))
    }
}

/// Where SentencePiece's space is put: version 5 takes "legacy" for false where it is not said.
fn scheme(legacy: bool) -> &'static str {
    if legacy { "always" } else { "first" }
}

fn strip() -> Value {
    json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})
}

fn is_type(part: &Map<String, Value>, name: &str) -> bool {
    part.get("type").and_then(Value::as_str) == Some(name)
}

/// Each part of a part, itself first.
fn each(value: &mut Value, change: &mut dyn FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Object(map) => {
            change(map);
            map.values_mut().for_each(|value| each(value, change));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| each(value, change)),
        _ => {}
    }
}

/// Puts SentencePiece's space before a text, or takes it away.
fn sentence_piece_space(parts: &mut Parts, space: bool, legacy: bool) {
    let to = if space { scheme(legacy) } else { "never" };
    let mut has_metaspace = false;
    each(&mut parts.pre_tokenizer, &mut |part| {
        if is_type(part, "Metaspace") {
            has_metaspace = true;
            let now = part.get("prepend_scheme").and_then(Value::as_str);
            if (now == Some("never")) == space {
                part.insert("prepend_scheme".to_owned(), to.into());
            }
        }
    });
    let prepend = || json!({"type": "Prepend", "prepend": "▁"});
    let is_prepend = |part: &Value| part.as_object().is_some_and(|part| is_type(part, "Prepend"));
    if let Some(normalizers) = parts.normalizer.get_mut("normalizers").and_then(Value::as_array_mut) {
        if !space {
            normalizers.retain(|part| !is_prepend(part));
        } else if !has_metaspace && !normalizers.iter().any(is_prepend) {
            normalizers.insert(0, prepend());
        }
    }
    let is_strip = |part: &Value| part.as_object().is_some_and(|part| is_type(part, "Strip"));
    if let Some(decoders) = parts.decoder.get_mut("decoders").and_then(Value::as_array_mut) {
        if !space {
            decoders.retain(|part| !is_strip(part));
        } else if !decoders.iter().any(is_strip) {
            decoders.push(strip());
        }
    }
}

/// The first text that two pipelines split otherwise, or that they decode otherwise.
fn first_difference(ours: &Parts, theirs: &Parts, model: &ModelWrapper) -> Option<String> {
    let (a, b) = (Pipeline::of(ours), Pipeline::of(theirs));
    let (Some(a), Some(b)) = (a, b) else { return Some("a part that cannot be compared".to_owned()) };
    let text = PROBES.iter().find(|text| a.split(text, model) != b.split(text, model));
    if let Some(text) = text {
        return Some(match text.contains(PROBE) {
            true => "text that follows a special token".to_owned(),
            false => format!("a text such as {text:?}"),
        });
    }
    let sequences = [["▁the", "▁cat", "<0xC3>", "<0xA9>"], ["Ġthe", "Ã", "©", "▁"]];
    sequences.iter().any(|tokens| a.decode(tokens) != b.decode(tokens)).then(|| "the decoding of tokens".to_owned())
}

/// Parts that can be tried.
struct Pipeline {
    normalizer: Option<Normalizing>,
    pre_tokenizer: Option<Splitting>,
    decoder: Option<Decoding>,
}

impl Pipeline {
    fn of(parts: &Parts) -> Option<Self> {
        Some(Self {
            normalizer: serde_json::from_value(parts.normalizer.clone()).ok()?,
            pre_tokenizer: serde_json::from_value(parts.pre_tokenizer.clone()).ok()?,
            decoder: serde_json::from_value(parts.decoder.clone()).ok()?,
        })
    }

    /// The pieces of a text.
    fn split(&self, text: &str, model: &ModelWrapper) -> Option<Vec<String>> {
        let mut special = AddedVocabulary::new();
        special.add_special_tokens(&[AddedToken::from(PROBE, true)], model, self.normalizer.as_ref());
        let mut pieces = special.extract_and_normalize(self.normalizer.as_ref(), text);
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces).ok()?;
        }
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
        Some(pieces.into_iter().map(|(piece, ..)| piece.to_owned()).collect())
    }

    fn decode(&self, tokens: &[&str]) -> Option<String> {
        let tokens = tokens.iter().map(|&token| token.to_owned()).collect();
        match &self.decoder {
            Some(decoder) => decoder.decode(tokens).ok(),
            None => Some(tokens.join(" ")),
        }
    }
}
