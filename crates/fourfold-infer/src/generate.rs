//! One answer: a prompt in, tokens out until something ends it.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{InferError, Sampler, Session};

/// When an answer ends.
#[derive(Clone, Debug, Default)]
pub struct GenerationSettings {
    /// Most tokens to produce; `None` for as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Tokens that end a text.
    pub stop_ids: Vec<u32>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model ended its text.
    EndOfText,
    /// It has as many tokens as asked for.
    Length,
    /// A text came that ends it.
    StopString,
    /// The context is full.
    Context,
    /// The caller asked.
    Interrupted,
}

/// What an answer took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The tokens produced, without the one that ended the text.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of them, tokens found in the KV cache.
    pub reused_tokens: usize,
    /// Time for the prompt, up to its logits.
    pub prompt_time: Duration,
    /// Tokens that went through the model after it; the last one of an answer need not.
    pub decode_steps: usize,
    /// Time for everything after the prompt.
    pub decode_time: Duration,
    /// Why it ended.
    pub stop: Stop,
}

impl Generation {
    /// Tokens a second while the prompt was read; 0 when nothing had to be computed.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens - self.reused_tokens, self.prompt_time)
    }

    /// Tokens a second while the answer was made.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_steps, self.decode_time)
    }
}

fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Continues `prompt`. Each token goes to `on_token` as soon as it is chosen; `interrupted` is asked between tokens.
///
/// # Errors
/// The prompt does not fit or is empty, the logits are broken, or `on_token` fails.
pub fn generate<E: From<InferError>>(
    session: &mut Session,
    sampler: &mut Sampler,
    prompt: &[u32],
    settings: &GenerationSettings,
    interrupted: &dyn Fn() -> bool,
    mut on_token: impl FnMut(u32) -> Result<(), E>,
) -> Result<Generation, E> {
    let start = Instant::now();
    let (reused_tokens, mut logits) = session.prompt(prompt, interrupted)?;
    let prompt_time = start.elapsed();
    let decoding = Instant::now();
    let most = settings.max_tokens.unwrap_or(usize::MAX);
    let mut ids = Vec::new();
    let mut decode_steps = 0;
    let stop = loop {
        if ids.len() >= most {
            break Stop::Length;
        }
        if interrupted() {
            break Stop::Interrupted;
        }
        let id = sampler.sample(&logits, session.ids())?;
        if settings.stop_ids.contains(&id) {
            break Stop::EndOfText;
        }
        ids.push(id);
        on_token(id)?;
        if session.ids().len() == session.context() {
            break Stop::Context;
        }
        if ids.len() < most {
            logits = session.push(id)?;
            decode_steps += 1;
        }
    };
    let decode_time = decoding.elapsed();
    Ok(Generation { ids, prompt_tokens: prompt.len(), reused_tokens, prompt_time, decode_steps, decode_time, stop })
}
