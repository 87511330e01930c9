//! Answers as one JSON object or as server-sent events, for every kind of completion.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use fourfold_infer::engine::TokenEvent;
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, Receiver};
use tokio_stream::wrappers::ReceiverStream;

use crate::ApiError;
use crate::answer::Delta;
use crate::chat::join;
use crate::fields::Fields;
use crate::run::{Done, Step};
use crate::state::State;

/// Time without an event after which a comment keeps the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Events that wait for a client that reads slowly.
const EVENTS_AHEAD: usize = 16;

/// How a kind of completion writes its choices.
pub trait Shape: Send {
    /// The `object` of the answer.
    fn object(&self, stream: bool) -> &'static str;
    /// The first chunk of a choice, where it has one of its own.
    fn opening(&self, index: usize) -> Option<Value>;
    /// What to say of some more of a choice.
    fn chunk(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent]) -> Vec<Value>;
    /// The last chunk of a choice.
    fn closing(&self, index: usize, reason: &str) -> Value;
    /// A whole choice.
    fn whole(&mut self, state: &State, index: usize, delta: Delta, tokens: &[TokenEvent], reason: &str) -> Value;
}

/// The answers to one request.
pub struct Answers {
    state: Arc<State>,
    id: String,
    created: u64,
    steps: Vec<Receiver<Step>>,
    shape: Box<dyn Shape>,
}

impl Answers {
    /// One receiver for each choice.
    pub fn new(state: Arc<State>, prefix: &str, steps: Vec<Receiver<Step>>, shape: Box<dyn Shape>) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self { state, id: new_id(prefix), created, steps, shape }
    }

    /// The HTTP response.
    ///
    /// # Errors
    /// An answer failed before anything was told.
    pub async fn respond(self, stream: bool, include_usage: bool) -> Result<Response, ApiError> {
        if stream { Ok(self.stream(include_usage)) } else { self.at_once().await }
    }

    async fn at_once(mut self) -> Result<Response, ApiError> {
        let mut choices = Vec::with_capacity(self.steps.len());
        let mut usage = Usage::default();
        for (index, steps) in std::mem::take(&mut self.steps).iter_mut().enumerate() {
            let (mut all, mut tokens) = (Delta::default(), Vec::new());
            let done = loop {
                let step = steps.recv().await.unwrap_or_else(|| Step::Failed(ended()));
                if let Some(done) = join(&mut all, &mut tokens, step) {
                    break done?;
                }
            };
            usage.add(&done, index);
            choices.push(self.shape.whole(&self.state, index, all, &tokens, done.reason));
        }
        let mut body = self.head(false);
        body["choices"] = json!(choices);
        body["usage"] = usage.json();
        Ok(json_response(&body))
    }

    fn stream(self, include_usage: bool) -> Response {
        let (sender, receiver) = mpsc::channel::<Value>(EVENTS_AHEAD);
        tokio::spawn(async move { self.tell(include_usage, &sender).await });
        let events = ReceiverStream::new(receiver).map(|value| {
            let text = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Ok::<_, Infallible>(Event::default().data(text))
        });
        let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
        // Proxies would hold events back.
        response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    async fn tell(mut self, include_usage: bool, events: &mpsc::Sender<Value>) {
        let mut steps = SelectAll::new();
        for (index, receiver) in std::mem::take(&mut self.steps).into_iter().enumerate() {
            steps.push(ReceiverStream::new(receiver).map(move |step| (index, step)));
        }
        let mut head = self.head(true);
        if include_usage {
            head["usage"] = Value::Null;
        }
        let mut usage = Usage::default();
        let mut open = steps.len();
        for index in 0..open {
            let Some(opening) = self.shape.opening(index) else { continue };
            if events.send(chunk(&head, opening)).await.is_err() {
                return;
            }
        }
        while open > 0 {
            let (index, step) = tokio::select! {
                next = steps.next() => match next {
                    Some(next) => next,
                    None => (0, Step::Failed(ended())),
                },
                () = events.closed() => return,
            };
            let told = match step {
                Step::More { delta, tokens } => self.shape.chunk(&self.state, index, delta, &tokens),
                Step::Done(done) => {
                    open -= 1;
                    usage.add(&done, index);
                    vec![self.shape.closing(index, done.reason)]
                }
                Step::Failed(error) => {
                    let _ = events.send(error.body()).await;
                    return;
                }
            };
            for choice in told {
                if events.send(chunk(&head, choice)).await.is_err() {
                    return;
                }
            }
        }
        if include_usage {
            head["choices"] = json!([]);
            head["usage"] = usage.json();
            let _ = events.send(head).await;
        }
        let _ = events.send(json!("[DONE]")).await;
    }

    /// What every object of the answer begins with.
    fn head(&self, stream: bool) -> Value {
        json!({ "id": self.id, "object": self.shape.object(stream), "created": self.created,
                "model": self.state.served.name, "system_fingerprint": concat!("fourfold-", env!("CARGO_PKG_VERSION")) })
    }
}

fn chunk(head: &Value, choice: Value) -> Value {
    let mut chunk = head.clone();
    chunk["choices"] = json!([choice]);
    chunk
}

fn ended() -> ApiError {
    ApiError::internal("the computation ended unexpectedly")
}

/// What a request used: the prompt counts once, however many answers it has.
#[derive(Default)]
struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
    reasoning: usize,
}

impl Usage {
    fn add(&mut self, done: &Done, index: usize) {
        if index == 0 {
            (self.prompt, self.cached) = (done.prompt_tokens, done.cached_tokens);
        }
        self.completion += done.tokens;
        self.reasoning += done.reasoning_tokens;
    }

    fn json(&self) -> Value {
        usage(self.prompt, self.cached, self.completion, self.reasoning)
    }
}

/// OpenAI's fields and DeepSeek's.
pub fn usage(prompt: usize, cached: usize, completion: usize, reasoning: usize) -> Value {
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
        "completion_tokens_details": { "reasoning_tokens": reasoning },
        "prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": prompt - cached.min(prompt)
    })
}

/// A name that nobody guesses.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}-{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>())
}

/// A token's own text and bytes.
pub fn token_text(state: &State, id: u32) -> (String, Vec<u8>) {
    let bytes = match state.vocabulary.get(id as usize) {
        Some(Some(token)) => token.bytes.clone(),
        _ => Vec::new(),
    };
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// A JSON object as a response.
pub fn json_response(body: &Value) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body.to_string()).into_response()
}

/// Refuses another model than the one served.
///
/// # Errors
/// The request names one.
pub fn check_model(state: &State, fields: &Fields) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(name) if !state.is_called(name) => Err(ApiError::unknown_model(name)),
        _ => Ok(()),
    }
}
