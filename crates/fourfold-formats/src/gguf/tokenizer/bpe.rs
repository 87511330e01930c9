//! Byte-level BPE (GPT-2's kind): tokens and merges are in the file, the way a text is split is named there.

use serde_json::json;

use super::super::GgufError;
use super::super::metadata::Metadata;
use super::{Parts, Vocabulary, pre};

/// The parts, and whether BOS is added where the file does not say.
pub(super) fn parts(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Parts, bool), GgufError> {
    let splitting = pre::named(metadata.string("tokenizer.ggml.pre")?)?;
    let key = "tokenizer.ggml.merges";
    let merges = metadata.strings(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))?;
    let ids = vocabulary.ids();
    let mut pairs = Vec::with_capacity(merges.len());
    for (i, merge) in merges.iter().enumerate() {
        // A token may begin with a space where bytes are not spelled as letters: the separator is the first after it.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let Some((left, right)) = cut.map(|at| (&merge[..at], &merge[at + 1..])) else {
            return Err(GgufError::Tokenizer(format!("merge {i}, {merge:?}, is not a pair")));
        };
        let joined = [left, right].concat();
        if let Some(absent) = [left, right, &joined].into_iter().find(|t| !ids.contains_key(*t)) {
            return Err(GgufError::Tokenizer(format!("merge {i}, {merge:?}: there is no token {absent:?}")));
        }
        pairs.push(json!([left, right]));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let parts = Parts {
        normalizer: splitting.normalizer,
        pre_tokenizer: splitting.pre_tokenizer,
        post_processor: byte_level.clone(),
        decoder: byte_level,
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": splitting.ignore_merges, "vocab": ids, "merges": pairs,
        }),
    };
    Ok((parts, splitting.add_bos))
}
