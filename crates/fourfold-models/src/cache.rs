//! What a sequence leaves behind for its next tokens.

use std::ops::Range;

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

    /// A copy of some positions. They keep the rotation of where they stood: only a sequence that begins with the same tokens
    /// can take them.
    pub fn copy(&self, positions: Range<usize>) -> Self {
        match self {
            Self::KeysAndValues { keys, values } => {
                Self::KeysAndValues { keys: keys.copy(positions.clone()), values: values.copy(positions) }
            }
            Self::Latent(latent) => Self::Latent(latent.copy(positions)),
        }
    }

    /// Appends the positions of another cache of the same block.
    ///
    /// # Panics
    /// When it is of another kind, width or type.
    pub fn extend(&mut self, other: &Self) {
        match (self, other) {
            (Self::KeysAndValues { keys, values }, Self::KeysAndValues { keys: more, values: more_values }) => {
                keys.extend(more);
                values.extend(more_values);
            }
            (Self::Latent(latent), Self::Latent(more)) => latent.extend(more),
            (Self::KeysAndValues { .. } | Self::Latent(_), _) => panic!("caches of different kinds of attention"),
        }
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

    /// A copy of some positions ([`BlockCache::copy`]).
    pub fn copy(&self, positions: Range<usize>) -> Self {
        Self { blocks: self.blocks.iter().map(|block| block.copy(positions.clone())).collect() }
    }

    /// Appends the positions of another cache of the same model.
    ///
    /// # Panics
    /// When it is another model's.
    pub fn extend(&mut self, other: &Self) {
        assert_eq!(self.blocks.len(), other.blocks.len(), "caches of different models");
        self.blocks.iter_mut().zip(&other.blocks).for_each(|(block, more)| block.extend(more));
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
