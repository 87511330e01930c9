//! Models by their name on the Hugging Face hub.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;

use crate::context::Context;
use crate::progress::Progress;

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
    let mut bars = Bars { progress: context.progress, bar: None };
    fourfold_formats::hub::fetch(repo, revision, &mut bars)
        .with_context(|| format!("there is no file or directory {repo}, and as a name on the hub"))
}

/// A bar for each file.
struct Bars {
    progress: Progress,
    bar: Option<ProgressBar>,
}

impl fourfold_formats::hub::Progress for Bars {
    fn start(&mut self, file: &str, bytes: u64) {
        self.finish();
        self.bar = Some(self.progress.bytes(file, bytes));
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
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
