//! Which tokens are scored, given which before them. The two definitions in common use differ, and so do their figures.

use serde::Serialize;

use crate::InferError;

/// How a text is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// As `llama-perplexity`: disjoint chunks of `context` tokens, the first of each replaced by BOS where the model has one;
    /// only the second half of a chunk is scored, so that each scored token has at least half a context before it. What does
    /// not fill a chunk is left out.
    Chunks,
    /// As the transformers documentation on perplexity of fixed-length models: a window of `context` tokens moves on by
    /// `stride`; each token is scored once, with as much before it as the window holds.
    Sliding {
        /// Tokens from one window's start to the next.
        stride: usize,
    },
}

/// Some tokens to run through the model, and which of its predictions count.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The first position whose prediction of the next token is scored; the last is the one before the last token.
    pub first: usize,
    /// What each scored prediction counts in the mean.
    pub weight: f64,
}

impl Window {
    /// Predictions that are scored.
    pub fn scored(&self) -> usize {
        self.ids.len() - 1 - self.first
    }

    /// The token that should follow position `p`.
    pub fn target(&self, p: usize) -> u32 {
        self.ids[p + 1]
    }
}

/// Cuts a text's tokens (with BOS in front where the model has one) into windows, at most `limit` of them.
///
/// # Errors
/// A context that cannot score anything, or fewer tokens than one window needs.
pub fn windows(
    ids: &[u32],
    bos: Option<u32>,
    context: usize,
    protocol: Protocol,
    limit: Option<usize>,
) -> Result<Vec<Window>, InferError> {
    if context < 4 {
        return Err(InferError::BadWindow(format!("a context of {context} tokens is too short to evaluate")));
    }
    let mut all = match protocol {
        Protocol::Chunks => chunks(ids, bos, context),
        Protocol::Sliding { stride } => {
            if stride == 0 || stride > context {
                let why = format!("a stride of {stride} with a context of {context}: it must be 1 to {context}");
                return Err(InferError::BadWindow(why));
            }
            sliding(ids, context, stride)
        }
    };
    all.truncate(limit.unwrap_or(usize::MAX));
    if all.is_empty() {
        let needed = if protocol == Protocol::Chunks { context } else { 2 };
        let purpose = format!("one window at a context of {context}");
        return Err(InferError::TextTooShort { tokens: ids.len(), needed, purpose });
    }
    Ok(all)
}

fn chunks(ids: &[u32], bos: Option<u32>, context: usize) -> Vec<Window> {
    let one = |chunk: &[u32]| {
        let mut ids = chunk.to_vec();
        if let Some(bos) = bos {
            ids[0] = bos;
        }
        Window { ids, first: context / 2, weight: 1.0 }
    };
    ids.chunks_exact(context).map(one).collect()
}

fn sliding(ids: &[u32], context: usize, stride: usize) -> Vec<Window> {
    let mut all = Vec::new();
    let (mut begin, mut done) = (0, 0);
    while done < ids.len() && ids.len() >= 2 {
        let end = (begin + context).min(ids.len());
        let new = end - done;
        // Predictions of `new` tokens; nothing predicts the very first token of the text.
        let first = (end - begin - new).saturating_sub(1);
        let scored = end - begin - 1 - first;
        // The documentation weighs a window's mean loss by one less than its new tokens (the shift inside the model takes a
        // label away, which is so for the first window only). Kept as it is: the figure is to be compared.
        let weight = if scored == 0 { 0.0 } else { (new - 1) as f64 / scored as f64 };
        all.push(Window { ids: ids[begin..end].to_vec(), first, weight });
        done = end;
        begin += stride;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_score_their_second_half_with_bos_in_front() {
        let ids: Vec<u32> = (10..31).collect();
        let all = windows(&ids, Some(1), 8, Protocol::Chunks, None).unwrap();
        assert_eq!(all.len(), 2, "21 tokens hold two chunks of 8");
        assert_eq!(all[1].ids, [1, 19, 20, 21, 22, 23, 24, 25]);
        let scored: Vec<u32> = (all[1].first..7).map(|p| all[1].target(p)).collect();
        assert_eq!(scored, [23, 24, 25]);
        assert_eq!(all[1].scored(), 3);
        assert_eq!(windows(&ids, None, 8, Protocol::Chunks, Some(1)).unwrap()[0].ids[0], 10);
    }

    #[test]
    fn sliding_windows_score_each_token_once() {
        let ids: Vec<u32> = (0..50).collect();
        for (context, stride) in [(16, 8), (16, 16), (16, 5), (64, 64), (16, 1)] {
            let all = windows(&ids, None, context, Protocol::Sliding { stride }, None).unwrap();
            let scored: Vec<u32> = all.iter().flat_map(|w| (w.first..w.ids.len() - 1).map(|p| w.target(p))).collect();
            // Token 0 has nothing before it. At stride = context, neither has the first token of each window.
            let expected: Vec<u32> = if stride == context {
                (1..50).filter(|t| t % context as u32 != 0).collect()
            } else {
                (1..50).collect()
            };
            assert_eq!(scored, expected, "context {context}, stride {stride}");
        }
    }

    #[test]
    fn weights_are_the_documentations() {
        let ids: Vec<u32> = (0..20).collect();
        let all = windows(&ids, None, 8, Protocol::Sliding { stride: 4 }, None).unwrap();
        // Labels 8 4 4 4; counted 7 3 3 3.
        let counted: Vec<f64> = all.iter().map(|w| w.weight * w.scored() as f64).collect();
        assert_eq!(counted, [7.0, 3.0, 3.0, 3.0]);
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        let ids: Vec<u32> = (0..20).collect();
        assert!(matches!(windows(&ids, None, 32, Protocol::Chunks, None), Err(InferError::TextTooShort { .. })));
        assert!(windows(&ids, None, 8, Protocol::Sliding { stride: 0 }, None).is_err());
        assert!(windows(&ids, None, 8, Protocol::Sliding { stride: 9 }, None).is_err());
        assert!(windows(&[1], None, 8, Protocol::Sliding { stride: 4 }, None).is_err());
    }
}
