//! Memory predicted from shapes, before anything is loaded.

use fourfold_kernels::KvDtype;

use crate::{BlockSpec, ModelSpec};

/// Bytes that running takes, by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunMemory {
    /// All weights as stored.
    pub weights: u64,
    /// The KV cache at the full context.
    pub kv_cache: u64,
    /// Activations of the hungriest block over a chunk of tokens.
    pub activations: u64,
    /// cos and sin of the positions, one table for all blocks.
    pub rotary_tables: u64,
    /// One chunk's logits.
    pub logits: u64,
}

impl RunMemory {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights + self.kv_cache + self.activations + self.rotary_tables + self.logits
    }
}

/// How a training run stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainRecipe {
    /// f32 weights, gradients, and both moments of AdamW (Loshchilov & Hutter 2019): 16 bytes a parameter. Every activation
    /// is kept for the backward pass.
    AdamW32,
    /// bf16 weights with stochastic rounding, 8-bit moments with a scale for each 64, gradients released tensor by tensor:
    /// 4.1 bytes a parameter. Activations are recomputed for some documents at a time; a block keeps its input alone, in bf16.
    Quarter,
}

/// Bytes that training takes, by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainMemory {
    /// The weights.
    pub weights: u64,
    /// Gradients alive at once.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// What the backward pass needs of the forward.
    pub activations: u64,
    /// Logits and their gradient.
    pub logits: u64,
}

impl TrainMemory {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.logits
    }
}

const F32: u64 = size_of::<f32>() as u64;

/// Tokens with which the quarter recipe runs a block at once, or one longer document.
const BLOCK_TOKENS: u64 = 512;

/// Tokens whose logits the quarter recipe holds at once.
const LOSS_CHUNK: u64 = 64;

impl ModelSpec {
    /// Memory for a context of `context` tokens prefilled `chunk` at a time, with logits of one token; `weight_bytes` is what
    /// the checkpoint's weights take.
    pub fn run_memory(&self, weight_bytes: u64, context: u64, chunk: u64, dtype: KvDtype) -> RunMemory {
        RunMemory {
            weights: weight_bytes,
            kv_cache: context * self.kv_bytes_per_token(dtype) as u64,
            activations: self.peak_scratch(chunk.min(context)) * F32,
            rotary_tables: self.rotary_bytes(context),
            logits: self.vocab_size as u64 * F32,
        }
    }

    /// Memory for training steps of `batch` sequences of `context` tokens: a first estimate from shapes.
    pub fn train_memory(&self, recipe: TrainRecipe, batch: u64, context: u64) -> TrainMemory {
        let (parameters, tokens) = (self.parameters(), batch * context);
        let vocab = self.vocab_size as u64;
        match recipe {
            TrainRecipe::AdamW32 => TrainMemory {
                weights: parameters * F32,
                gradients: parameters * F32,
                optimizer: parameters * 2 * F32,
                activations: self.blocks.iter().map(|block| block.saved_elements(tokens)).sum::<u64>() * F32,
                logits: 2 * tokens * vocab * F32,
            },
            TrainRecipe::Quarter => {
                let largest = self.weights().iter().map(|w| w.elements()).max().unwrap_or(0);
                let inputs = self.blocks.len() as u64 * tokens * self.hidden_size as u64 * 2;
                TrainMemory {
                    weights: parameters * 2,
                    gradients: largest * F32,
                    // Two moments of a byte, each 64 of them with an f32 scale.
                    optimizer: parameters * 2 + parameters.div_ceil(64) * 2 * F32,
                    // The live block is computed again, and the gradients of what it saved take as much.
                    activations: inputs + 2 * self.peak_saved(tokens.min(BLOCK_TOKENS.max(context))) * F32,
                    logits: 2 * LOSS_CHUNK.min(tokens) * vocab * F32,
                }
            }
        }
    }

    fn rotary_bytes(&self, positions: u64) -> u64 {
        self.blocks.first().map_or(0, |block| block.rotary().table_bytes(positions))
    }

    fn peak_saved(&self, tokens: u64) -> u64 {
        self.blocks.iter().map(|block| block.saved_elements(tokens)).max().unwrap_or(0)
    }

    fn peak_scratch(&self, tokens: u64) -> u64 {
        self.blocks.iter().map(|block: &BlockSpec| block.scratch_elements(tokens)).max().unwrap_or(0)
    }
}
