//! What a sequence leaves behind for its next tokens.

use fourfold_kernels::{KvCache, KvDtype};

/// One block's part of a [`Cache`].
#[derive(Clone, Debug)]
pub enum BlockCache {
    /// Keys and values of grouped-query attention, `[positions, kv_heads · head_dim]` each.
    KeysAndValues {
        /// The rotated keys.
        keys: KvCache,
        /// The values.
        values: KvCache,
    },
    /// The compressed latent of MLA beside its rotary key, `[positions, kv_lora_rank + qk_rope_head_dim]`
    /// (DeepSeek-V2, section 2.1).
    Latent(KvCache),
}

impl BlockCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        match self {
            Self::KeysAndValues { keys, .. } => keys.len(),
            Self::Latent(latent) => latent.len(),
        }
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets every position from `positions` on.
    pub fn truncate(&mut self, positions: usize) {
        self.parts_mut().into_iter().flatten().for_each(|part| part.truncate(positions));
    }

    /// Takes memory for `positions` in all, so that no growth copies.
    pub fn reserve(&mut self, positions: usize) {
        self.parts_mut().into_iter().flatten().for_each(|part| part.reserve(positions));
    }

    /// Bytes held.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::KeysAndValues { keys, values } => keys.byte_len() + values.byte_len(),
            Self::Latent(latent) => latent.byte_len(),
        }
    }

    fn parts_mut(&mut self) -> [Option<&mut KvCache>; 2] {
        match self {
            Self::KeysAndValues { keys, values } => [Some(keys), Some(values)],
            Self::Latent(latent) => [Some(latent), None],
        }
    }

    /// Keys and values of these widths.
    pub(crate) fn keys_and_values(key_width: usize, value_width: usize, dtype: KvDtype) -> Self {
        Self::KeysAndValues { keys: KvCache::new(key_width, dtype), values: KvCache::new(value_width, dtype) }
    }
}

/// The cache of one sequence: a [`BlockCache`] for each block.
#[derive(Clone, Debug)]
pub struct Cache {
    /// In the blocks' order.
    pub blocks: Vec<BlockCache>,
}

impl Cache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.blocks.first().map_or(0, BlockCache::len)
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets every position from `positions` on.
    pub fn truncate(&mut self, positions: usize) {
        self.blocks.iter_mut().for_each(|block| block.truncate(positions));
    }

    /// Takes memory for `positions` in all.
    pub fn reserve(&mut self, positions: usize) {
        self.blocks.iter_mut().for_each(|block| block.reserve(positions));
    }

    /// Bytes held.
    pub fn byte_len(&self) -> usize {
        self.blocks.iter().map(BlockCache::byte_len).sum()
    }
}
