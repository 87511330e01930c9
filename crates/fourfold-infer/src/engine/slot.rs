//! One request while it is computed.

use std::time::{Duration, Instant};

use fourfold_models::Cache;

use super::request::{Event, Finish, Job, Request, TokenEvent};
use super::{PIECE, SlotState};
use crate::{InferError, Sampler, Stop};

/// A request with its sequence.
pub(super) struct Slot {
    pub number: u64,
    pub request: Request,
    pub cache: Cache,
    /// The prompt and what was produced; the last token of an answer is not in the cache yet.
    pub ids: Vec<u32>,
    pub prompt_tokens: usize,
    cached_tokens: usize,
    sampler: Sampler,
    /// Positions that the cache has memory for.
    room: usize,
    generated: usize,
    waited: Duration,
    started: Instant,
    first_token: Option<Instant>,
    /// Sum of the hidden rows so far, where the request wants their mean.
    pub hidden_sum: Vec<f64>,
}

/// Whether a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    GoesOn,
    Finished,
    Cancelled,
    Failed,
}

impl Slot {
    /// A request that begins, with a cache that holds the first `cache.len()` tokens of its prompt.
    pub fn new(job: Job, cache: Cache, waited: Duration) -> Self {
        let Job { number, mut request } = job;
        let ids = std::mem::take(&mut request.ids);
        Self {
            number,
            prompt_tokens: ids.len(),
            cached_tokens: cache.len(),
            sampler: Sampler::new(request.sampling.clone()),
            request,
            room: 0,
            cache,
            ids,
            generated: 0,
            waited,
            started: Instant::now(),
            first_token: None,
            hidden_sum: Vec::new(),
        }
    }

    /// Whether its prompt is not read yet.
    pub fn reads(&self) -> bool {
        self.cache.len() < self.prompt_tokens
    }

    /// The next piece of its prompt: up to the next multiple of [`PIECE`], wherever it began.
    pub fn piece(&self) -> std::ops::Range<usize> {
        let start = self.cache.len();
        start..((start / PIECE + 1) * PIECE).min(self.prompt_tokens)
    }

    /// Takes memory for `positions` in all. Growth copies what is there, so it comes in growing steps.
    pub fn make_room(&mut self, positions: usize) {
        if positions > self.room {
            self.room = (positions + positions / 4).next_multiple_of(PIECE);
            self.cache.reserve(self.room);
        }
    }

    /// Tells the listener that the work begins.
    pub fn tell_started(&mut self) -> Progress {
        let event = Event::Started { cached_tokens: self.cached_tokens };
        if (self.request.on_event)(event) { Progress::GoesOn } else { Progress::Cancelled }
    }

    /// Tells the listener how far the prompt is read.
    pub fn tell_reading(&mut self) -> Progress {
        let event = Event::Reading { read: self.cache.len(), of: self.prompt_tokens };
        if (self.request.on_event)(event) { Progress::GoesOn } else { Progress::Cancelled }
    }

    /// For the outside.
    pub fn state(&self) -> SlotState {
        SlotState {
            busy: true,
            request: self.number,
            prompt_tokens: self.prompt_tokens,
            prompt_read: self.cache.len().min(self.prompt_tokens),
            generated: self.generated,
        }
    }

    /// Chooses the token that follows, by `logits` `[vocab]`, and tells the listener.
    pub fn choose(&mut self, logits: &mut [f32], context: usize) -> Progress {
        let first = *self.first_token.get_or_insert_with(Instant::now);
        match self.next_token(logits) {
            Err(error) => self.fail(error),
            Ok(None) => self.finish(Stop::EndOfText, first),
            Ok(Some((token, last))) => {
                self.ids.push(token.id);
                self.generated += 1;
                if !(self.request.on_event)(Event::Token(token)) {
                    return Progress::Cancelled;
                }
                if last {
                    return self.finish(Stop::EndOfText, first);
                }
                if self.request.max_tokens.is_some_and(|most| self.generated >= most) {
                    return self.finish(Stop::Length, first);
                }
                if self.ids.len() >= context {
                    return self.finish(Stop::Context, first);
                }
                Progress::GoesOn
            }
        }
    }

    /// The next token and whether it is the last one; `None` where the text ends before it.
    fn next_token(&mut self, logits: &mut [f32]) -> Result<Option<(TokenEvent, bool)>, InferError> {
        let raw = self.request.logprobs.map(|count| Likelihoods::of(logits, count));
        for &(id, bias) in &self.request.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if let Some(constraint) = &mut self.request.constraint {
            constraint.restrict(logits)?;
        }
        let id = self.sampler.sample(logits, &self.ids)?;
        if self.request.stop_ids.contains(&id) {
            return Ok(None);
        }
        let last = match &mut self.request.constraint {
            Some(constraint) => constraint.accept(id)?,
            None => false,
        };
        let (logprob, top) = match raw {
            Some(likelihoods) => (Some(likelihoods.of_token(id)), likelihoods.top),
            None => (None, Vec::new()),
        };
        Ok(Some((TokenEvent { id, logprob, top }, last)))
    }

    /// Ends a request that wanted no answer: the prompt is read.
    pub fn finish_prompt(&mut self) -> Progress {
        if self.request.embed {
            let mean: Vec<f32> = self.hidden_sum.iter().map(|sum| (sum / self.prompt_tokens as f64) as f32).collect();
            if !(self.request.on_event)(Event::Embedding(mean)) {
                return Progress::Cancelled;
            }
        }
        self.finish(Stop::Length, Instant::now())
    }

    fn finish(&mut self, stop: Stop, first_token: Instant) -> Progress {
        let finish = Finish {
            stop,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            tokens: self.generated,
            waited: self.waited,
            prompt_time: first_token - self.started,
            decode_time: first_token.elapsed(),
        };
        (self.request.on_event)(Event::Finished(finish));
        Progress::Finished
    }

    fn fail(&mut self, error: InferError) -> Progress {
        (self.request.on_event)(Event::Failed(error));
        Progress::Failed
    }
}

/// Logarithms of probabilities of a model's own distribution.
struct Likelihoods {
    logits: Vec<f32>,
    log_sum: f64,
    top: Vec<(u32, f32)>,
}

impl Likelihoods {
    fn of(logits: &[f32], count: usize) -> Self {
        let most = logits.iter().copied().filter(|l| l.is_finite()).fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().filter(|l| l.is_finite()).map(|&l| f64::from(l - most).exp()).sum();
        let mut likelihoods = Self { logits: logits.to_vec(), log_sum: f64::from(most) + sum.ln(), top: Vec::new() };
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize].is_finite()).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if count < order.len() && count > 0 {
            order.select_nth_unstable_by(count - 1, by_logit);
        }
        order.truncate(count);
        order.sort_unstable_by(by_logit);
        likelihoods.top = order.into_iter().map(|id| (id, likelihoods.of_token(id))).collect();
        likelihoods
    }

    fn of_token(&self, id: u32) -> f32 {
        (f64::from(self.logits[id as usize]) - self.log_sum) as f32
    }
}
