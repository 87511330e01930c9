//! The engine's thread.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use fourfold_kernels::Tensor;
use fourfold_models::{Model, Sequence};
use rayon::prelude::*;

use super::prefix::PrefixCache;
use super::request::Job;
use super::slot::{Progress, Slot};
use super::{Counters, DECODE_ROWS, EngineSettings, PIECE, SlotState, add};

pub(super) struct Worker {
    model: Arc<Model>,
    settings: EngineSettings,
    receiver: Receiver<Job>,
    closed: bool,
    waiting: VecDeque<(Job, Instant)>,
    slots: Vec<Option<Slot>>,
    prefix: PrefixCache,
    counters: Arc<Counters>,
    states: Arc<Mutex<Vec<SlotState>>>,
}

impl Worker {
    pub fn new(
        model: Arc<Model>,
        settings: EngineSettings,
        receiver: Receiver<Job>,
        counters: Arc<Counters>,
        states: Arc<Mutex<Vec<SlotState>>>,
    ) -> Self {
        Self {
            model,
            settings,
            receiver,
            closed: false,
            waiting: VecDeque::new(),
            slots: (0..settings.parallel).map(|_| None).collect(),
            prefix: PrefixCache::new(settings.prefix_bytes),
            counters,
            states,
        }
    }

    /// Until nobody can send requests any more and all have ended.
    pub fn run(mut self) {
        loop {
            self.receive();
            self.admit();
            if self.slots.iter().all(Option::is_none) {
                if self.closed {
                    return;
                }
                continue;
            }
            self.read_piece();
            self.decode();
            self.publish();
        }
    }

    /// Takes what has arrived; waits where there is nothing else to do.
    fn receive(&mut self) {
        let idle = self.waiting.is_empty() && self.slots.iter().all(Option::is_none);
        if idle && !self.closed {
            self.publish();
            match self.receiver.recv() {
                Ok(job) => self.waiting.push_back((job, Instant::now())),
                Err(_) => self.closed = true,
            }
        }
        loop {
            match self.receiver.try_recv() {
                Ok(job) => self.waiting.push_back((job, Instant::now())),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.closed = true;
                    return;
                }
            }
        }
    }

    /// Gives free slots to those who have waited longest.
    fn admit(&mut self) {
        for slot in self.slots.iter_mut().filter(|slot| slot.is_none()) {
            let Some((job, since)) = self.waiting.pop_front() else { return };
            let mut cache = self.model.new_cache(self.settings.kv);
            // A mean of hidden rows needs them all.
            if !job.request.embed {
                let pieces = self.prefix.find(&job.request.ids);
                cache.reserve((pieces.len() + 1) * PIECE);
                pieces.iter().for_each(|piece| cache.extend(piece));
            }
            add(&self.counters.prompt_tokens, job.request.ids.len() as u64);
            add(&self.counters.cached_tokens, cache.len() as u64);
            // In this order, so that a request on its way is never counted twice: that would refuse another.
            self.counters.waiting.fetch_sub(1, Ordering::SeqCst);
            self.counters.running.fetch_add(1, Ordering::SeqCst);
            let mut begun = Slot::new(job, cache, since.elapsed());
            match begun.tell_started() {
                Progress::GoesOn => *slot = Some(begun),
                _ => {
                    add(&self.counters.cancelled, 1);
                    self.counters.running.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
    }

    /// One piece of the prompt of the request that came first.
    fn read_piece(&mut self) {
        let reading =
            self.slots.iter().enumerate().filter_map(|(i, s)| s.as_ref().filter(|s| s.reads()).map(|s| (i, s)));
        let Some(index) = reading.min_by_key(|(_, slot)| slot.number).map(|(i, _)| i) else { return };
        let Some(slot) = self.slots[index].as_mut() else { return };
        let start = Instant::now();
        let piece = slot.piece();
        slot.make_room(piece.end);
        let hidden = self.model.hidden(&slot.ids[piece.clone()], &mut slot.cache);
        if slot.request.embed {
            add_rows(&mut slot.hidden_sum, &hidden);
        } else if piece.end.is_multiple_of(PIECE) {
            self.prefix.insert(&slot.ids[..piece.end], || slot.cache.copy(piece.end - PIECE..piece.end));
        }
        let progress = if slot.reads() {
            slot.tell_reading()
        } else if slot.request.embed || slot.request.max_tokens == Some(0) {
            slot.finish_prompt()
        } else {
            let last = hidden.rows() - 1;
            let mut logits = self.model.logits(&Tensor::new(1, hidden.cols(), hidden.row(last).to_vec())).into_host();
            add(&self.counters.generated_tokens, 1);
            slot.choose(&mut logits, self.settings.context)
        };
        add(&self.counters.prompt_micros, start.elapsed().as_micros() as u64);
        self.settle(index, progress);
    }

    /// A token for every request whose prompt is read, in groups of [`DECODE_ROWS`].
    fn decode(&mut self) {
        let ready: Vec<usize> =
            (0..self.slots.len()).filter(|&i| self.slots[i].as_ref().is_some_and(|slot| !slot.reads())).collect();
        for group in ready.chunks(DECODE_ROWS) {
            let start = Instant::now();
            let mut slots: Vec<&mut Slot> = self
                .slots
                .iter_mut()
                .enumerate()
                .filter(|(i, _)| group.contains(i))
                .filter_map(|(_, slot)| slot.as_mut())
                .collect();
            let last: Vec<u32> = slots.iter().filter_map(|slot| slot.ids.last().copied()).collect();
            let mut batch: Vec<Sequence> = slots
                .iter_mut()
                .zip(&last)
                .map(|(slot, id)| {
                    slot.make_room(slot.cache.len() + 1);
                    Sequence { ids: std::slice::from_ref(id), cache: &mut slot.cache }
                })
                .collect();
            let hidden = self.model.hidden_batch(&mut batch);
            drop(batch);
            let logits = self.model.logits(&hidden);
            let vocab = logits.cols();
            let mut logits = logits.into_host();
            let context = self.settings.context;
            let choose = |(slot, logits): (&mut &mut Slot, &mut [f32])| slot.choose(logits, context);
            // A pool of one thread may be the main thread, which waits for the server's end and not for work.
            let progress: Vec<Progress> = match rayon::current_num_threads() {
                1 => slots.iter_mut().zip(logits.chunks_mut(vocab)).map(choose).collect(),
                _ => slots.par_iter_mut().zip(logits.par_chunks_mut(vocab)).map(choose).collect(),
            };
            add(&self.counters.generated_tokens, group.len() as u64);
            add(&self.counters.decode_steps, 1);
            add(&self.counters.decode_micros, start.elapsed().as_micros() as u64);
            for (&index, progress) in group.iter().zip(progress) {
                self.settle(index, progress);
            }
        }
    }

    /// Frees the slot of a request that has ended.
    fn settle(&mut self, index: usize, progress: Progress) {
        let counter = match progress {
            Progress::GoesOn => return,
            Progress::Finished => &self.counters.completed,
            Progress::Cancelled => &self.counters.cancelled,
            Progress::Failed => &self.counters.failed,
        };
        add(counter, 1);
        self.counters.running.fetch_sub(1, Ordering::SeqCst);
        self.slots[index] = None;
    }

    fn publish(&self) {
        let bytes = self.slots.iter().flatten().map(|slot| slot.cache.byte_len()).sum();
        self.counters.kv_bytes.store(bytes, Ordering::Relaxed);
        self.counters.prefix_bytes.store(self.prefix.bytes(), Ordering::Relaxed);
        self.counters.evicted_pieces.store(self.prefix.evicted(), Ordering::Relaxed);
        let states = self.slots.iter().map(|slot| slot.as_ref().map(Slot::state).unwrap_or_default());
        if let Ok(mut shared) = self.states.lock() {
            shared.clear();
            shared.extend(states);
        }
    }
}

fn add_rows(sum: &mut Vec<f64>, rows: &Tensor) {
    sum.resize(rows.cols(), 0.0);
    for row in 0..rows.rows() {
        sum.iter_mut().zip(rows.row(row)).for_each(|(sum, &value)| *sum += f64::from(value));
    }
}
