//! Many requests at once over one model: continuous batching (Yu et al. 2022, "Orca", section 4.1).
//!
//! Requests enter and leave between tokens. A long prompt is read in pieces of [`PIECE`] tokens, with a token for everybody
//! else between two of them. What prompts have in common is computed once ([`prefix`]).
//!
//! A request's tokens do not depend on what runs beside it: pieces end at fixed positions, only keys and values that were
//! computed as a prompt are shared, and sequences are decoded in groups small enough for the kernels to treat each row alike.

mod prefix;
mod request;
mod slot;
mod worker;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use fourfold_kernels::KvDtype;
use fourfold_models::Model;
use serde::Serialize;

pub use request::{Constraint, Event, Finish, Job, Request, TokenEvent};

use crate::InferError;

/// Tokens of a prompt that go through the model together, and that are shared together.
pub const PIECE: usize = 64;

/// Most sequences of one decoding step. Below this every kernel computes a row as it does alone.
pub const DECODE_ROWS: usize = 7;

/// How an engine is set up.
#[derive(Clone, Copy, Debug)]
pub struct EngineSettings {
    /// Requests that are computed at once; at least 1.
    pub parallel: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Most tokens of a sequence, prompt and answer.
    pub context: usize,
    /// How keys and values are cached.
    pub kv: KvDtype,
    /// Bytes of keys and values kept of earlier prompts; 0 keeps none.
    pub prefix_bytes: usize,
}

/// What an engine has done so far, and does now. Counters only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests taken.
    pub accepted: AtomicU64,
    /// Requests refused because the queue was full.
    pub refused: AtomicU64,
    /// Requests that ended by themselves.
    pub completed: AtomicU64,
    /// Requests whose client went away.
    pub cancelled: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Of them, tokens whose keys and values were found.
    pub cached_tokens: AtomicU64,
    /// Tokens produced.
    pub generated_tokens: AtomicU64,
    /// Decoding steps, each of up to [`DECODE_ROWS`] sequences.
    pub decode_steps: AtomicU64,
    /// Microseconds spent reading prompts.
    pub prompt_micros: AtomicU64,
    /// Microseconds spent decoding.
    pub decode_micros: AtomicU64,
    /// Requests that wait now.
    pub waiting: AtomicUsize,
    /// Requests that are computed now.
    pub running: AtomicUsize,
    /// Bytes of keys and values of running requests.
    pub kv_bytes: AtomicUsize,
    /// Bytes of keys and values kept of earlier prompts.
    pub prefix_bytes: AtomicUsize,
    /// Pieces of earlier prompts that had to go.
    pub evicted_pieces: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// What one slot is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SlotState {
    /// Whether a request is in it.
    pub busy: bool,
    /// The request's number.
    pub request: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Of them, tokens read so far.
    pub prompt_read: usize,
    /// Tokens produced.
    pub generated: usize,
}

/// A thread that computes requests.
pub struct Engine {
    sender: Option<SyncSender<Job>>,
    worker: Option<JoinHandle<()>>,
    counters: Arc<Counters>,
    slots: Arc<Mutex<Vec<SlotState>>>,
    settings: EngineSettings,
    vocab_size: usize,
    next: AtomicU64,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Closed,
    /// The request cannot be computed.
    #[error(transparent)]
    Invalid(#[from] InferError),
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(model: Arc<Model>, settings: EngineSettings) -> std::io::Result<Self> {
        let parallel = settings.parallel.max(1);
        let context = settings.context.min(model.spec().max_positions);
        let settings = EngineSettings { parallel, context, ..settings };
        let vocab_size = model.spec().vocab_size;
        // The queue is bounded by `waiting`, which counts what the worker has taken out of the channel but not begun.
        let (sender, receiver) = mpsc::sync_channel(settings.queue + parallel);
        let counters = Arc::new(Counters::default());
        let slots = Arc::new(Mutex::new(vec![SlotState::default(); parallel]));
        let worker = worker::Worker::new(model, settings, receiver, Arc::clone(&counters), Arc::clone(&slots));
        let worker = std::thread::Builder::new().name("engine".to_owned()).spawn(move || worker.run())?;
        let next = AtomicU64::new(0);
        Ok(Self { sender: Some(sender), worker: Some(worker), counters, slots, settings, vocab_size, next })
    }

    /// Hands over a request; its events go to its callback, on the engine's thread. Returns the request's number.
    ///
    /// # Errors
    /// The queue is full, the prompt is empty, has an unknown id or does not fit, or the engine has stopped.
    pub fn submit(&self, request: Request) -> Result<u64, SubmitError> {
        if request.ids.is_empty() {
            return Err(InferError::EmptyPrompt.into());
        }
        crate::session::check_ids(&request.ids, self.vocab_size)?;
        let (tokens, context) = (request.ids.len(), self.settings.context);
        if tokens > context {
            return Err(InferError::ContextFull { tokens, context }.into());
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let sender = self.sender.as_ref().ok_or(SubmitError::Closed)?;
        let waiting = self.counters.waiting.fetch_add(1, Ordering::SeqCst);
        let refuse = |error: SubmitError| {
            self.counters.waiting.fetch_sub(1, Ordering::SeqCst);
            error
        };
        let idle = self.settings.parallel.saturating_sub(self.counters.running.load(Ordering::SeqCst));
        if waiting >= self.settings.queue + idle {
            add(&self.counters.refused, 1);
            return Err(refuse(SubmitError::QueueFull { waiting }));
        }
        match sender.try_send(Job { number, request }) {
            Ok(()) => {
                add(&self.counters.accepted, 1);
                Ok(number)
            }
            Err(TrySendError::Full(_)) => {
                add(&self.counters.refused, 1);
                Err(refuse(SubmitError::QueueFull { waiting }))
            }
            Err(TrySendError::Disconnected(_)) => Err(refuse(SubmitError::Closed)),
        }
    }

    /// What it has done.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What its slots do now.
    pub fn slots(&self) -> Vec<SlotState> {
        self.slots.lock().map_or_else(|poisoned| poisoned.into_inner().clone(), |slots| slots.clone())
    }

    /// How it is set up: what was asked for, within the model's limits.
    pub fn settings(&self) -> EngineSettings {
        self.settings
    }
}

impl Drop for Engine {
    /// Takes no more requests and waits until those taken have ended.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}
