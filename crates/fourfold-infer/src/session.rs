//! A sequence of tokens and the model's memory of it.

use std::sync::Arc;

use fourfold_kernels::{KvDtype, Tensor};
use fourfold_models::{Cache, Model};

use crate::InferError;

/// Tokens of a prompt that go through the model together: enough for matrix products to be efficient, few enough that
/// activations stay small.
pub const PROMPT_BATCH: usize = 256;

/// A growing sequence with its KV cache. A new prompt that begins like the tokens already seen (the next turn of a
/// conversation) reuses what is cached of them.
pub struct Session {
    model: Arc<Model>,
    cache: Cache,
    ids: Vec<u32>,
    context: usize,
}

impl Session {
    /// An empty sequence of at most `context` tokens (and never more than the model has positions for).
    pub fn new(model: Arc<Model>, kv: KvDtype, context: usize) -> Self {
        let cache = model.new_cache(kv);
        let context = context.min(model.spec().max_positions);
        Self { model, cache, ids: Vec::new(), context }
    }

    /// The tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Most tokens there can be.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes that the KV cache holds.
    pub fn cache_bytes(&self) -> usize {
        self.cache.byte_len()
    }

    /// Makes the sequence `ids`, computing only what differs from the tokens already cached, and returns how many of them
    /// were reused and the logits `[vocab]` that follow the last token. Stops between batches when `interrupted` says so;
    /// the session stays usable.
    ///
    /// # Errors
    /// An empty prompt, an id that the model does not know, more tokens than the context holds, an interruption, or a device that failed.
    pub fn prompt(&mut self, ids: &[u32], interrupted: &dyn Fn() -> bool) -> Result<(usize, Vec<f32>), InferError> {
        if ids.is_empty() {
            return Err(InferError::EmptyPrompt);
        }
        check_ids(ids, self.model.spec().vocab_size)?;
        self.check_room(ids.len())?;
        let common = self.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        // The last token is always computed: its logits are wanted.
        let reused = common.min(ids.len() - 1);
        self.ids.truncate(reused);
        self.cache.truncate(reused);
        let mut last = None;
        for batch in ids[reused..].chunks(PROMPT_BATCH) {
            if interrupted() {
                return Err(InferError::Interrupted);
            }
            last = Some(self.model.hidden(batch, &mut self.cache));
            self.ids.extend_from_slice(batch);
        }
        let hidden = last.ok_or(InferError::EmptyPrompt)?;
        Ok((reused, self.logits_of_last(&hidden)?))
    }

    /// Appends one token and returns the logits `[vocab]` that follow it.
    ///
    /// # Errors
    /// An id that the model does not know, a full context, or a device that failed.
    pub fn push(&mut self, id: u32) -> Result<Vec<f32>, InferError> {
        check_ids(&[id], self.model.spec().vocab_size)?;
        self.check_room(self.ids.len() + 1)?;
        let hidden = self.model.hidden(&[id], &mut self.cache);
        self.ids.push(id);
        self.logits_of_last(&hidden)
    }

    fn check_room(&self, tokens: usize) -> Result<(), InferError> {
        if tokens > self.context {
            return Err(InferError::ContextFull { tokens, context: self.context });
        }
        Ok(())
    }

    fn logits_of_last(&self, hidden: &Tensor) -> Result<Vec<f32>, InferError> {
        Ok(self.model.logits_of(hidden, hidden.rows() - 1..hidden.rows())?)
    }
}

/// Every id has a row in the embedding.
///
/// # Errors
/// [`InferError::TokenOutOfRange`] for the first that has none.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<(), InferError> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(position) => Err(InferError::TokenOutOfRange { id: ids[position], position, vocab_size }),
        None => Ok(()),
    }
}
