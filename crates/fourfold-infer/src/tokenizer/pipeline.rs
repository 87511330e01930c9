//! The parts of a tokenizer as the `tokenizers` crate has them, with regular expressions that report their failure.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::normalizers::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    Decoder, DecoderWrapper, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, SplitDelimiterBehavior, TokenizerImpl,
};

use super::pattern::CheckedRegex;

/// A tokenizer of these parts.
pub(super) type Inner = TokenizerImpl<ModelWrapper, Normalizing, Splitting, PostProcessorWrapper, Decoding>;

/// GPT-2's expression, which `ByteLevel` splits by.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How a text is normalized. It never fails: what goes wrong is kept for [`super::pattern::failure`].
#[derive(Debug)]
pub(super) enum Normalizing {
    Sequence(Vec<Self>),
    Replace { regex: CheckedRegex, content: String },
    Other(NormalizerWrapper),
}

/// How a text is split.
#[derive(Debug)]
pub(super) enum Splitting {
    Sequence(Vec<Self>),
    Split { regex: CheckedRegex, behavior: SplitDelimiterBehavior, invert: bool },
    ByteLevel { regex: CheckedRegex, space: bool, spelled: ByteLevel },
    Other(PreTokenizerWrapper),
}

/// How tokens become text.
#[derive(Debug)]
pub(super) enum Decoding {
    Sequence(Vec<Self>),
    Replace { regex: CheckedRegex, content: String },
    Other(DecoderWrapper),
}

impl Normalizer for Normalizing {
    fn normalize(&self, text: &mut NormalizedString) -> Result<()> {
        match self {
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.normalize(text)),
            // Callers drop or unwrap what is returned; the failure is kept.
            Self::Replace { regex, content } => text.replace(regex, content).or(Ok(())),
            Self::Other(part) => part.normalize(text),
        }
    }
}

impl PreTokenizer for Splitting {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        match self {
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.pre_tokenize(text)),
            Self::Split { regex, behavior, invert: false } => text.split(|_, piece| piece.split(regex, *behavior)),
            Self::Split { regex, behavior, invert: true } => {
                text.split(|_, piece| piece.split(tokenizers::pattern::Invert(regex), *behavior))
            }
            Self::ByteLevel { regex, space, spelled } => {
                text.split(|_, mut piece| {
                    if *space && !piece.get().starts_with(' ') {
                        piece.prepend(" ");
                    }
                    piece.split(regex, SplitDelimiterBehavior::Isolated)
                })?;
                spelled.pre_tokenize(text)
            }
            Self::Other(part) => part.pre_tokenize(text),
        }
    }
}

impl Decoder for Decoding {
    fn decode_chain(&self, mut tokens: Vec<String>) -> Result<Vec<String>> {
        match self {
            Self::Sequence(parts) => {
                for part in parts {
                    tokens = part.decode_chain(tokens)?;
                }
                Ok(tokens)
            }
            Self::Replace { regex, content } => tokens.iter().map(|token| replaced(regex, content, token)).collect(),
            Self::Other(part) => part.decode_chain(tokens),
        }
    }
}

/// A token with every match of `regex` replaced.
fn replaced(regex: &CheckedRegex, content: &str, token: &str) -> Result<String> {
    use tokenizers::pattern::Pattern as _;
    let pieces = regex.find_matches(token)?;
    Ok(pieces.into_iter().map(|((begin, end), found)| if found { content } else { &token[begin..end] }).collect())
}

/// The expression and the content of a part that replaces by a regular expression.
fn replace_by_regex(part: &impl Serialize) -> Option<(String, String)> {
    let part = serde_json::to_value(part).ok()?;
    let text = |pointer: &str| part.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    Some((text("/pattern/Regex")?, text("/content")?))
}

impl TryFrom<NormalizerWrapper> for Normalizing {
    type Error = tokenizers::Error;

    fn try_from(part: NormalizerWrapper) -> Result<Self> {
        match part {
            NormalizerWrapper::Sequence(parts) => {
                let parts: &[NormalizerWrapper] = NormalizerSequence::as_ref(&parts);
                Ok(Self::Sequence(parts.iter().cloned().map(Self::try_from).collect::<Result<_>>()?))
            }
            NormalizerWrapper::Replace(replace) => match replace_by_regex(&replace) {
                Some((regex, content)) => Ok(Self::Replace { regex: CheckedRegex::new(&regex)?, content }),
                None => Ok(Self::Other(NormalizerWrapper::Replace(replace))),
            },
            other => Ok(Self::Other(other)),
        }
    }
}

impl TryFrom<PreTokenizerWrapper> for Splitting {
    type Error = tokenizers::Error;

    fn try_from(part: PreTokenizerWrapper) -> Result<Self> {
        use tokenizers::pre_tokenizers::split::SplitPattern;
        match part {
            PreTokenizerWrapper::Sequence(parts) => {
                Ok(Self::Sequence(parts.as_ref().iter().cloned().map(Self::try_from).collect::<Result<_>>()?))
            }
            PreTokenizerWrapper::Split(split) => match &split.pattern {
                SplitPattern::Regex(regex) => {
                    Ok(Self::Split { regex: CheckedRegex::new(regex)?, behavior: split.behavior, invert: split.invert })
                }
                SplitPattern::String(_) => Ok(Self::Other(PreTokenizerWrapper::Split(split))),
            },
            PreTokenizerWrapper::ByteLevel(bytes) if bytes.use_regex => Ok(Self::ByteLevel {
                regex: CheckedRegex::new(GPT2)?,
                space: bytes.add_prefix_space,
                spelled: bytes.add_prefix_space(false).use_regex(false),
            }),
            other => Ok(Self::Other(other)),
        }
    }
}

impl TryFrom<DecoderWrapper> for Decoding {
    type Error = tokenizers::Error;

    fn try_from(part: DecoderWrapper) -> Result<Self> {
        match part {
            DecoderWrapper::Sequence(parts) => {
                let parts = DecoderSequence::get_decoders(&parts);
                Ok(Self::Sequence(parts.iter().cloned().map(Self::try_from).collect::<Result<_>>()?))
            }
            DecoderWrapper::Replace(replace) => match replace_by_regex(&replace) {
                Some((regex, content)) => Ok(Self::Replace { regex: CheckedRegex::new(&regex)?, content }),
                None => Ok(Self::Other(DecoderWrapper::Replace(replace))),
            },
            other => Ok(Self::Other(other)),
        }
    }
}

/// A part as its wrapper is read.
fn read<'de, D: Deserializer<'de>, W, P>(deserializer: D) -> std::result::Result<P, D::Error>
where
    W: Deserialize<'de>,
    P: TryFrom<W, Error = tokenizers::Error>,
{
    P::try_from(W::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

impl<'de> Deserialize<'de> for Normalizing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        read::<D, NormalizerWrapper, Self>(deserializer)
    }
}

impl<'de> Deserialize<'de> for Splitting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        read::<D, PreTokenizerWrapper, Self>(deserializer)
    }
}

impl<'de> Deserialize<'de> for Decoding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        read::<D, DecoderWrapper, Self>(deserializer)
    }
}
