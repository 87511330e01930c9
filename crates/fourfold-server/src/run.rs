//! One answer: from the engine's tokens to what a client is told of them.

use std::sync::Arc;

use fourfold_infer::engine::{Event, Finish, Request, TokenEvent};
use fourfold_infer::{InferError, Stop};
use tokio::sync::mpsc::{self, Receiver, UnboundedReceiver};

use crate::ApiError;
use crate::answer::{AnswerText, Delta};
use crate::state::State;

/// Steps that wait for a client that reads slowly.
const STEPS_AHEAD: usize = 16;

/// Something to tell about an answer.
#[derive(Debug)]
pub enum Step {
    /// More of it.
    More {
        /// Text and calls.
        delta: Delta,
        /// The tokens it was made of, where their probabilities were asked for.
        tokens: Vec<TokenEvent>,
    },
    /// It is complete.
    Done(Done),
    /// It cannot be completed.
    Failed(ApiError),
}

/// How an answer ended.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// `stop`, `length` or `tool_calls`.
    pub reason: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of them, tokens that were cached.
    pub cached_tokens: usize,
    /// Tokens produced.
    pub tokens: usize,
    /// Of them, tokens of thoughts.
    pub reasoning_tokens: usize,
}

/// Begins an answer; the request's own listener is replaced. Nobody listening ends it within one token. `continues`: whether the
/// answer goes on with the prompt's text, instead of being a text of its own.
///
/// # Errors
/// The engine does not take the request.
pub fn start(
    state: &Arc<State>,
    request: Request,
    text: AnswerText,
    continues: bool,
) -> Result<Receiver<Step>, ApiError> {
    let (sender, events) = mpsc::unbounded_channel();
    let prompt = request.ids.len();
    let before = if continues { request.ids.clone() } else { Vec::new() };
    let request = Request { on_event: Box::new(move |event| sender.send(event).is_ok()), ..request };
    state.served.engine.submit(request)?;
    let (steps, receiver) = mpsc::channel(STEPS_AHEAD);
    let state = Arc::clone(state);
    tokio::spawn(async move { follow(&state, events, text, prompt, &before, &steps).await });
    Ok(receiver)
}

/// Hands an answer on, until it ends, nobody listens, or its time is up.
async fn follow(
    state: &State,
    mut events: UnboundedReceiver<Event>,
    text: AnswerText,
    prompt: usize,
    before: &[u32],
    steps: &mpsc::Sender<Step>,
) {
    let deadline = tokio::time::Instant::now() + state.limits.answer_time;
    let mut progress = Progress { text, prompt, cached: 0, tokens: Vec::new(), count: 0, reasoning: 0 };
    let mut stream = match state.served.tokenizer.detokenizer_after(before) {
        Ok(stream) => stream,
        Err(error) => {
            let _ = steps.send(Step::Failed(failure(error))).await;
            return;
        }
    };
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = steps.closed() => return,
            () = tokio::time::sleep_until(deadline) => {
                let _ = steps.send(Step::Failed(ApiError::out_of_time())).await;
                return;
            }
        };
        let told = match event {
            Some(Event::Started { cached_tokens }) => {
                progress.cached = cached_tokens;
                Ok(Vec::new())
            }
            Some(Event::Reading { .. } | Event::Embedding(_)) => Ok(Vec::new()),
            Some(Event::Token(token)) => stream.push(token.id).map(|text| progress.token(token, &text)),
            Some(Event::Finished(finish)) => stream.finish().map(|text| progress.end(&text, &finish)),
            Some(Event::Failed(error)) => Err(error),
            None => Err(InferError::Interrupted),
        };
        let told = told.unwrap_or_else(|error| vec![Step::Failed(failure(error))]);
        for step in told {
            let last = !matches!(step, Step::More { .. });
            // A client that does not read is given up.
            match tokio::time::timeout(state.limits.client_time, steps.send(step)).await {
                Ok(Ok(())) if !last => {}
                _ => return,
            }
        }
    }
}

fn failure(error: InferError) -> ApiError {
    match error {
        InferError::Interrupted => ApiError::internal("the computation ended unexpectedly"),
        other => other.into(),
    }
}

struct Progress {
    text: AnswerText,
    prompt: usize,
    cached: usize,
    tokens: Vec<TokenEvent>,
    count: usize,
    reasoning: usize,
}

impl Progress {
    fn token(&mut self, token: TokenEvent, text: &str) -> Vec<Step> {
        self.count += 1;
        self.reasoning += usize::from(self.text.in_thoughts());
        if token.logprob.is_some() {
            self.tokens.push(token);
        }
        let delta = self.text.push(text);
        if self.text.stopped() {
            let mut steps = self.more(delta);
            steps.extend(self.rest(""));
            // Returning ends the engine's work: its own figures never come.
            steps.push(Step::Done(self.done("stop")));
            return steps;
        }
        if delta.is_empty() { Vec::new() } else { self.more(delta) }
    }

    fn end(&mut self, text: &str, finish: &Finish) -> Vec<Step> {
        let mut steps = self.rest(text);
        let reason = match finish.stop {
            _ if self.text.called() => "tool_calls",
            Stop::EndOfText | Stop::StopString => "stop",
            Stop::Length | Stop::Context | Stop::Interrupted => "length",
        };
        let reason = if self.text.stopped() { "stop" } else { reason };
        steps.push(Step::Done(self.done(reason)));
        steps
    }

    /// What was held back.
    fn rest(&mut self, text: &str) -> Vec<Step> {
        let first = self.text.push(text);
        let last = self.text.finish();
        let mut steps = self.more(first);
        steps.extend(self.more(last));
        steps
    }

    fn more(&mut self, delta: Delta) -> Vec<Step> {
        let tokens = std::mem::take(&mut self.tokens);
        if delta.is_empty() && tokens.is_empty() { Vec::new() } else { vec![Step::More { delta, tokens }] }
    }

    fn done(&self, reason: &'static str) -> Done {
        Done {
            reason,
            prompt_tokens: self.prompt,
            cached_tokens: self.cached,
            tokens: self.count,
            reasoning_tokens: self.reasoning,
        }
    }
}
