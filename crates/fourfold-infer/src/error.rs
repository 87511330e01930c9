//! What can go wrong while a model runs.

use std::io;

use fourfold_kernels::KernelError;
use thiserror::Error;

/// Why a model could not be run or measured.
#[derive(Debug, Error)]
pub enum InferError {
    /// A value of `generation_config.json` that cannot be used.
    #[error("generation_config.json: {key} = {value}: {reason}")]
    GenerationConfig {
        /// The key.
        key: String,
        /// Its value as JSON, shortened.
        value: String,
        /// What is expected.
        reason: &'static str,
    },
    /// The tokenizer file is not one, or a text could not be encoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A file beside the tokenizer contradicts it, or asks for what is not done.
    #[error("tokenizer_config.json: {key} {reason}")]
    TokenizerConfig {
        /// The key, or the file.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A text has a token that the model has no embedding for.
    #[error(
        "the text has the token {token:?} (id {id}), for which the model has no row: its vocabulary ends at {}",
        vocab_size.saturating_sub(1)
    )]
    NoRow {
        /// The id.
        id: u32,
        /// The token.
        token: String,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// An id outside the model's vocabulary.
    #[error("token id {id} at position {position}: the model's vocabulary ends at {}", vocab_size - 1)]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Where in the sequence.
        position: usize,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// The sequence does not fit the model's context.
    #[error("{tokens} tokens do not fit the context of {context}")]
    ContextFull {
        /// Tokens asked for.
        tokens: usize,
        /// Positions there are.
        context: usize,
    },
    /// Nothing to run the model on.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The model produced no number to choose by.
    #[error("all logits are NaN or infinite after {position} tokens: the weights or the arithmetic are broken")]
    NoFiniteLogits {
        /// Tokens seen so far.
        position: usize,
    },
    /// The chat template has an error, or refused the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// A grammar that an answer cannot follow on.
    #[error("grammar: {0}")]
    Grammar(String),
    /// Too little text for what was asked.
    #[error("the text has {tokens} tokens; {needed} are needed for {purpose}")]
    TextTooShort {
        /// Tokens there are.
        tokens: usize,
        /// Tokens needed.
        needed: usize,
        /// For what.
        purpose: String,
    },
    /// A window that cannot be evaluated.
    #[error("{0}")]
    BadWindow(String),
    /// Two models, or a model and saved logits, that cannot be compared.
    #[error("cannot compare: {0}")]
    Incomparable(String),
    /// Saved logits could not be read or written.
    #[error("saved logits: {0}")]
    Io(#[from] io::Error),
    /// The device that the model runs on failed.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// Stopped on request.
    #[error("interrupted")]
    Interrupted,
}
