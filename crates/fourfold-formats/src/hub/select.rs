//! Which files of a repository make a model.

use std::path::{Component, Path};

use super::HubError;
use crate::safetensors::{INDEX_NAME, Index};

/// Small files, each fetched where it is there.
const SMALL: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_NAME,
];

/// Refuses names that would lead out of the cache or make no URL.
pub(super) fn check_name(repo: &str, revision: &str) -> Result<(), HubError> {
    let is_word = |w: &str| {
        !w.is_empty()
            && !w.starts_with(['-', '.'])
            && !w.contains("..")
            && w.chars().all(|c| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c))
    };
    for (name, most) in [(repo, 2), (revision, usize::MAX)] {
        let words: Vec<&str> = name.split('/').collect();
        if words.len() > most || !words.iter().all(|w| is_word(w)) {
            return Err(HubError::Name { name: name.to_owned() });
        }
    }
    Ok(())
}

/// Whether a file's name stays below its directory, on disk and in a URL.
pub(super) fn is_safe_file(name: &str) -> bool {
    !name.split('/').any(str::is_empty)
        && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
        && name.chars().all(|c| c.is_ascii_graphic() && !['?', '#', '%', '\\'].contains(&c))
}

/// The small files that are there, chat templates in their directory too.
pub(super) fn small_files(names: &[String]) -> impl Iterator<Item = &str> {
    let is_template = |name: &&str| {
        let rest = name.strip_prefix("additional_chat_templates/").and_then(|rest| rest.strip_suffix(".jinja"));
        rest.is_some_and(|rest| !rest.contains('/')) && is_safe_file(name)
    };
    let templates = names.iter().map(String::as_str).filter(is_template);
    SMALL.iter().copied().filter(|small| names.iter().any(|n| n == small)).chain(templates)
}

/// The files that hold the weights: the index's shards, else `model.safetensors`, else the only safetensors or GGUF file.
pub(super) fn weight_files(names: &[String], index: Option<&Index>) -> Result<Vec<String>, HubError> {
    if let Some(index) = index {
        return Ok(index.shards().into_iter().map(str::to_owned).collect());
    }
    let ending = |end: &str| names.iter().filter(|n| n.ends_with(end) && !n.contains('/')).cloned().collect::<Vec<_>>();
    let tensors = ending(".safetensors");
    let is_it = |name: &&String| *name == "model.safetensors" || tensors.len() == 1;
    if let Some(model) = tensors.iter().find(is_it) {
        return Ok(vec![model.clone()]);
    }
    match ending(".gguf") {
        ggufs if ggufs.len() == 1 => Ok(ggufs),
        ggufs => Err(HubError::NoWeights { ggufs }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_lead_elsewhere() {
        assert!(check_name("owner/Name-1.5_b", "refs/pr/3").is_ok());
        assert!(check_name("gpt2", "main").is_ok());
        for (repo, revision) in [
            ("a/b/c", "main"),
            ("../b", "main"),
            ("a/..", "main"),
            ("/b", "main"),
            ("a b", "main"),
            ("a", "x/../y"),
            ("a", ""),
        ] {
            assert!(matches!(check_name(repo, revision), Err(HubError::Name { .. })), "{repo} {revision}");
        }
        assert!(is_safe_file("onnx/model.bin"));
        for name in ["", "../x", "/x", "a/../b", "a?b", "a b"] {
            assert!(!is_safe_file(name), "{name}");
        }
    }

    #[test]
    fn named_templates_are_small_files() {
        let names = ["additional_chat_templates/tool_use.jinja", "config.json", "additional_chat_templates/a/b.jinja"];
        let found: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(small_files(&found).collect::<Vec<_>>(), ["config.json", names[0]]);
    }

    #[test]
    fn weights_are_told_from_the_rest() {
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let chosen = |list: &[&str]| weight_files(&names(list), None);
        assert_eq!(chosen(&["model.safetensors", "extra.safetensors", "q4.gguf"]).unwrap(), ["model.safetensors"]);
        assert_eq!(chosen(&["only.safetensors"]).unwrap(), ["only.safetensors"]);
        assert_eq!(chosen(&["q4.gguf"]).unwrap(), ["q4.gguf"]);
        let error = chosen(&["q4.gguf", "q8.gguf"]).unwrap_err().to_string();
        assert!(error.contains("q4.gguf, q8.gguf"), "{error}");
        assert!(chosen(&["pytorch_model.bin"]).is_err());
    }
}
