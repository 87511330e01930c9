//! SentencePiece's BPE (Llama 1 and 2, Mistral): tokens with scores, unknown characters as bytes. Merging the pair whose
//! token scores highest is merging by rank, so the merges are all ways to cut a token in two, ordered by score.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::super::GgufError;
use super::super::metadata::{Metadata, Number};
use super::{Kind, Parts, Vocabulary};

/// The mark SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";
/// Longest piece: its cuts are tried one by one, so a damaged length must not be believed.
const MAX_PIECE: usize = 512;

pub(super) fn parts(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Parts, GgufError> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.numbers(key)?.ok_or_else(|| GgufError::MissingKey(key.to_owned()))?;
    if scores.len() != vocabulary.tokens.len() {
        let message = format!("{} tokens, {} scores", vocabulary.tokens.len(), scores.len());
        return Err(GgufError::Tokenizer(message));
    }
    let unknown = vocabulary.iter().find(|(_, _, kind)| *kind == Kind::Unknown).map(|(_, text, _)| text);
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mark = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let unmark = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
    let (normalizer, decoder) = if prefix {
        (
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, mark]}),
            json!({"type": "Sequence", "decoders": [
                unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            ]}),
        )
    } else {
        (mark, json!({"type": "Sequence", "decoders": [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}]}))
    };
    Ok(Parts {
        normalizer,
        pre_tokenizer: Value::Null,
        post_processor: Value::Null,
        decoder,
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.ids(), "merges": merges(vocabulary, &scores)?,
        }),
    })
}

/// Every pair of tokens that joins to a token, best score first; pairs of one token by the ids of their parts.
fn merges(vocabulary: &Vocabulary, scores: &[Number]) -> Result<Vec<Value>, GgufError> {
    let pieces = || vocabulary.iter().filter(|(_, _, kind)| *kind == Kind::Normal);
    let mut ids = HashMap::new();
    for (id, text, _) in pieces() {
        ids.entry(text).or_insert(id);
    }
    let mut found = Vec::new();
    for (id, text, _) in pieces() {
        if text.len() > MAX_PIECE {
            return Err(GgufError::Tokenizer(format!("token {id} is {} bytes long", text.len())));
        }
        let score = match scores[id] {
            Number::Float(score) if !score.is_nan() => score,
            other => return Err(GgufError::Tokenizer(format!("token {id} has the score {other:?}"))),
        };
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                found.push((score, l, r, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(found.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
}
