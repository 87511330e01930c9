//! What an engine is asked, and what it answers.

use std::time::Duration;

use crate::{InferError, SamplerSettings, Stop};

/// What may come next: a grammar, most often.
pub trait Constraint: Send {
    /// Sets the logits of tokens that may not come next to −∞.
    ///
    /// # Errors
    /// The grammar cannot go on: what is wrong with it.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), InferError>;

    /// Takes the token chosen. Returns whether nothing may follow.
    ///
    /// # Errors
    /// The token was not allowed.
    fn accept(&mut self, id: u32) -> Result<bool, InferError>;
}

/// A prompt and how to continue it.
pub struct Request {
    /// The prompt, at least one token.
    pub ids: Vec<u32>,
    /// Most tokens to produce: as many as the context holds where `None`. With 0, only the prompt is read.
    pub max_tokens: Option<usize>,
    /// Tokens that end the answer.
    pub stop_ids: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplerSettings,
    /// Added to the logits of some tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The logarithm of each chosen token's probability, and this many of the likeliest tokens'.
    pub logprobs: Option<usize>,
    /// The grammar of the answer.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The hidden state after the prompt's tokens, averaged, instead of an answer.
    pub embed: bool,
    /// Takes what happens, on the engine's thread: it must not wait. `false` ends the request (nobody listens any more).
    pub on_event: Box<dyn FnMut(Event) -> bool + Send>,
}

/// A request in the queue.
pub struct Job {
    /// Its number.
    pub number: u64,
    /// What is asked.
    pub request: Request,
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The token.
    pub id: u32,
    /// The logarithm of its probability, before penalties, temperature and filters, where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens and theirs.
    pub top: Vec<(u32, f32)>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// Why.
    pub stop: Stop,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of them, tokens whose keys and values were found.
    pub cached_tokens: usize,
    /// Tokens produced, the one that ended the text not counted.
    pub tokens: usize,
    /// Time in the queue.
    pub waited: Duration,
    /// From the beginning of the work to the first token.
    pub prompt_time: Duration,
    /// From there to the end.
    pub decode_time: Duration,
}

/// What happens to a request.
#[derive(Debug)]
pub enum Event {
    /// It is being computed.
    Started {
        /// Tokens of the prompt whose keys and values were found.
        cached_tokens: usize,
    },
    /// A piece of the prompt was read, and there is more.
    Reading {
        /// Tokens read so far.
        read: usize,
        /// Tokens of the prompt.
        of: usize,
    },
    /// One more token.
    Token(TokenEvent),
    /// The prompt's hidden state, `[hidden]` ([`Request::embed`]).
    Embedding(Vec<f32>),
    /// The answer is complete.
    Finished(Finish),
    /// It cannot be completed.
    Failed(InferError),
}
