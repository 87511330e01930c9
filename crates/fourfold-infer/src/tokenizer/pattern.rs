//! Regular expressions of a `tokenizer.json` whose failure is an error. The `tokenizers` crate leaves the rest of a text as one piece
//! where an expression backtracks without end.

use std::cell::RefCell;

use fancy_regex::{Regex, RegexBuilder};
use tokenizers::pattern::Pattern;
use tokenizers::{Offsets, Result};

/// Steps back that one match may take: as many as in Oniguruma, which Python's `tokenizers` uses.
const MOST_STEPS: usize = 10_000_000;
/// Characters of an expression that an error shows.
const SHOWN: usize = 60;

/// A regular expression.
#[derive(Debug)]
pub(super) struct CheckedRegex {
    regex: Regex,
}

impl CheckedRegex {
    pub(super) fn new(expression: &str) -> Result<Self> {
        let regex = RegexBuilder::new(expression).backtrack_limit(MOST_STEPS).build();
        let regex = regex.map_err(|e| format!("the regular expression {}: {e}", shown(expression)))?;
        Ok(Self { regex })
    }
}

impl Pattern for &CheckedRegex {
    fn find_matches(&self, inside: &str) -> Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let mut pieces = Vec::new();
        let mut end = 0;
        for found in self.regex.find_iter(inside) {
            let found = found.map_err(|_| {
                let left = inside.len() - end;
                let reason = format!(
                    "the regular expression {} takes too many steps back on this text (its last {left} bytes)",
                    shown(self.regex.as_str())
                );
                FAILURE.with(|failure| failure.replace(Some(reason.clone())));
                reason
            })?;
            if end != found.start() {
                pieces.push(((end, found.start()), false));
            }
            pieces.push(((found.start(), found.end()), true));
            end = found.end();
        }
        if end != inside.len() {
            pieces.push(((end, inside.len()), false));
        }
        Ok(pieces)
    }
}

thread_local! {
    /// What failed last on this thread: the `tokenizers` crate drops or unwraps the errors of a normalizer.
    static FAILURE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What has failed on this thread since it was last asked.
pub(super) fn failure() -> Option<String> {
    FAILURE.with(RefCell::take)
}

fn shown(expression: &str) -> String {
    match expression.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &expression[..end]),
        None => format!("{expression:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_that_gives_up_is_an_error() {
        let regex = CheckedRegex::new(r"(?=x)y|(a|a)+(?=b)").unwrap();
        assert_eq!((&regex).find_matches("aab").unwrap(), [((0, 2), true), ((2, 3), false)]);
        assert!(failure().is_none());
        let error = (&regex).find_matches(&"a".repeat(60)).unwrap_err().to_string();
        assert!(error.contains("(a|a)+") && error.contains("60 bytes"), "{error}");
        assert_eq!(failure().as_deref(), Some(error.as_str()));
        assert!(failure().is_none());
        assert!(CheckedRegex::new("(").unwrap_err().to_string().contains("regular expression"));
    }
}
