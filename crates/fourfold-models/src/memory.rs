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

const F32: u64 = size_of::<f32>() as u64;

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

    fn rotary_bytes(&self, positions: u64) -> u64 {
        self.blocks.first().map_or(0, |block| block.rotary().table_bytes(positions))
    }

    fn peak_scratch(&self, tokens: u64) -> u64 {
        self.blocks.iter().map(|block: &BlockSpec| block.scratch_elements(tokens)).max().unwrap_or(0)
    }
}
