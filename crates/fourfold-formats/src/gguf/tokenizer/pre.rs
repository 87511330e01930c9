//! How byte-level BPE splits a text before it merges, by the name in `tokenizer.ggml.pre`.
//!
//! The patterns are those of the models' own `tokenizer.json`; a name stands for all models that share one.

use serde_json::{Value, json};

use super::super::GgufError;

/// A way to split.
pub(super) struct Splitting {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    /// Whether a word that is a token is taken without merging.
    pub ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    pub add_bos: bool,
}

/// Contractions, words with one leading character, up to three digits, punctuation with line ends, white space.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's own.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// DeepSeek-V3: numbers, then Chinese and Japanese, then the rest.
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];
/// DeepSeek LLM and V2: line ends, words of the scripts with case, punctuation, trailing space, Chinese and Korean.
const DEEPSEEK_LLM: [&str; 5] = [
    "[\r\n]",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1f7d}ᾀ-ᾴᾶ-ᾼ\u{1fbe}ῂ-ῄῆ-ῌῐ-\u{1fd3}ῖ-\u{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+",
    "\\s+$",
    "[一-龥ࠀ-一가-\u{d7ff}]+",
];
/// DeepSeek Coder.
const DEEPSEEK_CODER: [&str; 4] = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{d7ff}]+"];
/// What llama.cpp does with files that name nothing: punctuation, GPT-2's words, numbers by threes.
const UNNAMED: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// The way of a name.
///
/// # Errors
/// A name that is not known: splitting in another way gives other tokens, silently worse.
pub(super) fn named(name: Option<&str>) -> Result<Splitting, GgufError> {
    let plain =
        |pre_tokenizer| Splitting { normalizer: Value::Null, pre_tokenizer, ignore_merges: false, add_bos: false };
    Ok(match name {
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            Splitting { ignore_merges: true, add_bos: true, ..plain(splits(&[LLAMA3], None)) }
        }
        Some("dbrx" | "smaug-bpe") => plain(splits(&[LLAMA3], None)),
        Some("qwen2" | "deepseek-r1-qwen" | "megrez") => {
            Splitting { normalizer: json!({"type": "NFC"}), ..plain(splits(&[QWEN2], None)) }
        }
        Some("stablelm2") => plain(splits(&[QWEN2], None)),
        Some("gpt-2" | "phi-2" | "mpt" | "olmo" | "exaone4" | "mellum") => plain(splits(&[GPT2], None)),
        Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone") => {
            plain(splits(&[GPT2], Some(Digits::Before)))
        }
        Some("deepseek-v3") => plain(splits(&DEEPSEEK3, None)),
        Some("deepseek-llm") => plain(splits(&DEEPSEEK_LLM, Some(Digits::After))),
        Some("deepseek-coder") => plain(splits(&DEEPSEEK_CODER, Some(Digits::After))),
        None | Some("default") => plain(splits(&UNNAMED, None)),
        Some(other) => return Err(GgufError::Tokenizer(format!("the pre-tokenizer {other:?} is not supported"))),
    })
}

/// Where numbers are cut into single digits.
enum Digits {
    Before,
    After,
}

/// Patterns one after the other, each cutting out what it matches, then bytes spelled as letters.
fn splits(patterns: &[&str], digits: Option<Digits>) -> Value {
    let split = |p: &&str| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = patterns.iter().map(split).collect();
    let single = json!({"type": "Digits", "individual_digits": true});
    match digits {
        Some(Digits::Before) => steps.insert(0, single),
        Some(Digits::After) => steps.push(single),
        None => {}
    }
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    json!({"type": "Sequence", "pretokenizers": steps})
}
