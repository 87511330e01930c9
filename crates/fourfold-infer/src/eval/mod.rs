//! How good a model is: perplexity on a text, and its distance from another model's predictions.
//!
//! Memory stays small whatever the vocabulary: logits exist for [`ROWS`] positions at a time.

mod divergence;
mod perplexity;
mod run;
mod saved;
mod softmax;
mod windows;

pub use divergence::{Divergence, DivergenceReport};
pub use perplexity::{Perplexity, PerplexityReport};
pub use run::{Base, Evaluation, EvaluationReport, ReadSeek, dump_logits, evaluate};
pub use saved::{SavedLogits, SavedLogitsWriter};
pub use windows::{Protocol, Window, windows};

/// Positions whose logits are in memory together.
pub const ROWS: usize = 32;
