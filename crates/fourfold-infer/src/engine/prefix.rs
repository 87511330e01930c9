//! Keys and values of earlier prompts: a tree whose nodes are pieces of [`PIECE`] tokens, so that prompts that begin alike
//! share nodes (RadixAttention; Zheng et al. 2024, "SGLang", section 3). The least recently used leaves go first.

use std::collections::HashMap;
use std::sync::Arc;

use fourfold_models::Cache;

use super::PIECE;

/// Where a node stands in [`PrefixCache::nodes`].
type Index = usize;

/// The tree. The root is the empty prompt.
pub(super) struct PrefixCache {
    nodes: HashMap<Index, Node>,
    roots: HashMap<Box<[u32]>, Index>,
    next: Index,
    clock: u64,
    bytes: usize,
    budget: usize,
    evicted: u64,
}

struct Node {
    tokens: Box<[u32]>,
    parent: Option<Index>,
    children: HashMap<Box<[u32]>, Index>,
    cache: Arc<Cache>,
    bytes: usize,
    used: u64,
}

impl PrefixCache {
    /// An empty tree that holds at most `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let (nodes, roots) = (HashMap::new(), HashMap::new());
        Self { nodes, roots, next: 0, clock: 0, bytes: 0, budget, evicted: 0 }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pieces that had to go so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The pieces of the longest known beginning of `ids` that leaves at least one token to compute.
    pub fn find(&mut self, ids: &[u32]) -> Vec<Arc<Cache>> {
        self.clock += 1;
        let mut found = Vec::new();
        let mut at = None;
        let whole = ids.len().saturating_sub(1) / PIECE * PIECE;
        for piece in ids[..whole].chunks_exact(PIECE) {
            let Some(next) = self.child(at, piece) else { break };
            let Some(node) = self.nodes.get_mut(&next) else { break };
            node.used = self.clock;
            found.push(Arc::clone(&node.cache));
            at = Some(next);
        }
        found
    }

    /// Keeps the last piece of `ids`, whose length is a multiple of [`PIECE`] and all of whose earlier pieces are kept.
    /// `cache` is asked for its keys and values where they are new. Keeps nothing when an earlier piece has gone.
    pub fn insert(&mut self, ids: &[u32], cache: impl FnOnce() -> Cache) {
        let Some(before) = ids.len().checked_sub(PIECE).filter(|before| before.is_multiple_of(PIECE)) else { return };
        self.clock += 1;
        let mut at = None;
        for piece in ids[..before].chunks_exact(PIECE) {
            let Some(next) = self.child(at, piece) else { return };
            if let Some(node) = self.nodes.get_mut(&next) {
                node.used = self.clock;
            }
            at = Some(next);
        }
        let piece = &ids[before..];
        if self.budget == 0 || self.child(at, piece).is_some() {
            return;
        }
        let cache = cache();
        let bytes = cache.byte_len() + 2 * piece.len() * size_of::<u32>() + size_of::<Node>();
        if !self.make_room(bytes, at) {
            return;
        }
        let (index, tokens): (_, Box<[u32]>) = (self.next, piece.into());
        self.next += 1;
        let siblings = match at.and_then(|parent| self.nodes.get_mut(&parent)) {
            Some(parent) => &mut parent.children,
            None => &mut self.roots,
        };
        siblings.insert(tokens.clone(), index);
        let node =
            Node { tokens, parent: at, children: HashMap::new(), cache: Arc::new(cache), bytes, used: self.clock };
        self.nodes.insert(index, node);
        self.bytes += bytes;
    }

    fn child(&self, parent: Option<Index>, piece: &[u32]) -> Option<Index> {
        match parent {
            Some(parent) => self.nodes.get(&parent)?.children.get(piece).copied(),
            None => self.roots.get(piece).copied(),
        }
    }

    /// Drops leaves until `bytes` more fit, never `spared` or what stands above it (it is in use now).
    fn make_room(&mut self, bytes: usize, spared: Option<Index>) -> bool {
        while self.bytes + bytes > self.budget {
            let leaves = self.nodes.iter().filter(|(index, node)| node.children.is_empty() && Some(**index) != spared);
            let Some(oldest) = leaves.min_by_key(|(index, node)| (node.used, **index)).map(|(index, _)| *index) else {
                return false;
            };
            self.remove(oldest);
            self.evicted += 1;
        }
        true
    }

    fn remove(&mut self, index: Index) {
        let Some(node) = self.nodes.remove(&index) else { return };
        self.bytes -= node.bytes;
        let siblings = match node.parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            Some(parent) => &mut parent.children,
            None => &mut self.roots,
        };
        siblings.remove(&node.tokens);
    }
}

#[cfg(test)]
mod tests {
    use fourfold_kernels::{KvDtype, Tensor};
    use fourfold_models::BlockCache;

    use super::*;

    fn piece(value: f32) -> Cache {
        let mut block = BlockCache::Latent(fourfold_kernels::KvCache::new(4, KvDtype::F32));
        let BlockCache::Latent(latent) = &mut block else { unreachable!() };
        latent.append(&Tensor::new(PIECE, 4, vec![value; 4 * PIECE]));
        Cache { blocks: vec![block] }
    }

    fn ids(beginnings: &[u32]) -> Vec<u32> {
        beginnings.iter().flat_map(|&first| (0..PIECE as u32).map(move |i| first * 1000 + i)).collect()
    }

    fn fill(tree: &mut PrefixCache, beginnings: &[u32]) {
        for end in 1..=beginnings.len() {
            tree.insert(&ids(&beginnings[..end]), || piece(beginnings[end - 1] as f32));
        }
    }

    #[test]
    fn prompts_that_begin_alike_share_pieces() {
        let mut tree = PrefixCache::new(1 << 20);
        fill(&mut tree, &[1, 2, 3]);
        let before = tree.bytes();
        fill(&mut tree, &[1, 2, 4]);
        assert_eq!(tree.bytes() - before, before / 3, "two of three pieces were known");
        let mut wanted = ids(&[1, 2, 4]);
        assert_eq!(tree.find(&wanted).len(), 2, "the last token is computed, so its piece is");
        wanted.push(7);
        assert_eq!(tree.find(&wanted).len(), 3);
        assert_eq!(tree.find(&ids(&[2, 1, 9])).len(), 0, "a piece in another place is another piece");
        wanted[70] += 1;
        assert_eq!(tree.find(&wanted).len(), 1);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let one = {
            let mut tree = PrefixCache::new(1 << 20);
            fill(&mut tree, &[1]);
            tree.bytes()
        };
        let mut tree = PrefixCache::new(3 * one);
        fill(&mut tree, &[1, 2]);
        fill(&mut tree, &[5]);
        tree.find(&ids(&[1, 2, 9]));
        fill(&mut tree, &[6]);
        assert!(tree.bytes() <= 3 * one);
        assert_eq!(tree.evicted(), 1);
        assert_eq!(tree.find(&ids(&[5, 9])).len(), 0);
        assert_eq!(tree.find(&ids(&[1, 2, 9])).len(), 2);
    }

    #[test]
    fn no_budget_keeps_nothing() {
        let mut tree = PrefixCache::new(0);
        tree.insert(&ids(&[1]), || unreachable!("nobody copies what is not kept"));
        assert_eq!(tree.find(&ids(&[1, 2])).len(), 0);
        let mut small = PrefixCache::new(10);
        fill(&mut small, &[1]);
        assert_eq!((small.bytes(), small.evicted()), (0, 0));
    }
}
