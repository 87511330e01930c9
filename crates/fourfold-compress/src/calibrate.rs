//! What calibration text shows of a model, one block in memory at a time: the Hessian of every linear layer's input, and the
//! hidden states from which the next block starts.
//!
//! Memory: one block, its Hessians (4 bytes x inputs² for each distinct input) and the hidden states of all calibration tokens:
//! 4 bytes x hidden size a token, 2 (bf16) where that would be more than [`F32_LIMIT`].

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use fourfold_kernels::{Backend, KvDtype, Tensor};
use fourfold_models::{Block, Embedding, Head, ModelError, ModelSpec, Observer, WeightSpec};
use fourfold_tensor::{SourceError, TensorInfo, Weight, WeightSource};
use half::bf16;

use crate::CompressError;
use crate::hessian::Hessian;
use crate::methods::quantize::store::read_finite;

/// Bytes of hidden states above which they are kept as bf16.
pub const F32_LIMIT: usize = 512 << 20;

/// The residual stream of every calibration sequence at one depth.
#[derive(Clone)]
pub struct Hidden {
    sequences: Vec<Stored>,
    narrow: bool,
}

#[derive(Clone)]
enum Stored {
    Full(Tensor),
    Narrow(usize, usize, Vec<bf16>),
}

impl Stored {
    fn new(x: Tensor, narrow: bool) -> Self {
        if narrow {
            let values = x.host().iter().map(|&v| bf16::from_f32(v)).collect();
            Self::Narrow(x.rows(), x.cols(), values)
        } else {
            Self::Full(x)
        }
    }

    fn tensor(&self) -> Tensor {
        match self {
            Self::Full(x) => x.clone(),
            Self::Narrow(rows, cols, values) => Tensor::new(*rows, *cols, values.iter().map(|v| v.to_f32()).collect()),
        }
    }
}

impl Hidden {
    /// The embeddings of `sequences`.
    ///
    /// # Errors
    /// The embedding tensor cannot be loaded.
    pub fn embed(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        backend: &Arc<dyn Backend>,
        sequences: &[Vec<u32>],
    ) -> Result<Self, ModelError> {
        let embedding = Embedding::load(spec, source, backend)?;
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let narrow = tokens * spec.hidden_size * size_of::<f32>() > F32_LIMIT;
        let sequences = sequences.iter().map(|ids| Stored::new(embedding.forward(ids), narrow)).collect();
        Ok(Self { sequences, narrow })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Runs sequence `i` through `block` from its first position.
    pub fn run(&self, i: usize, spec: &ModelSpec, index: usize, block: &Block, observer: &mut dyn Observer) -> Tensor {
        let mut cache = spec.blocks[index].new_cache(KvDtype::F32);
        block.forward(self.sequences[i].tensor(), &mut cache, observer)
    }

    /// The states of sequence `i`.
    pub fn states(&self, i: usize) -> Tensor {
        self.sequences[i].tensor()
    }

    /// Replaces the states of sequence `i`.
    pub fn set(&mut self, i: usize, states: Tensor) {
        self.sequences[i] = Stored::new(states, self.narrow);
    }

    /// Runs every sequence through `block`. `keep` replaces the states by the block's outputs.
    pub fn forward(&mut self, spec: &ModelSpec, index: usize, block: &Block, observer: &mut dyn Observer, keep: bool) {
        for i in 0..self.len() {
            let y = self.run(i, spec, index, block, observer);
            if keep {
                self.set(i, y);
            }
        }
    }

    /// The Hessian of the output projection's input: the states after the final norm.
    pub fn head_hessian(&self, spec: &ModelSpec, head: &Head) -> Hessian {
        let mut hessian = Hessian::new(spec.hidden_size);
        for stored in &self.sequences {
            hessian.accumulate(head.norm(&stored.tensor()).host());
        }
        hessian.finish();
        hessian
    }
}

/// Collects one Hessian for each distinct input of a block's linear layers.
pub struct Collector {
    /// Index into `hessians` of each weight.
    slots: HashMap<String, usize>,
    hessians: Vec<Hessian>,
    /// Fingerprint of the last input and its slot: weights that share an input are told of in turn.
    last: Option<(u64, usize)>,
}

impl Default for Collector {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector {
    /// An empty collector.
    pub fn new() -> Self {
        Self { slots: HashMap::new(), hessians: Vec::new(), last: None }
    }

    /// The finished Hessian for a weight; `None` where no token reached it.
    pub fn hessian(&self, weight: &str) -> Option<&Hessian> {
        self.slots.get(weight).map(|&slot| &self.hessians[slot])
    }

    /// Ends the collection. An expert's Hessian is shrunk toward that of all tokens that reached any expert of its layer: that one
    /// counts for `prior` tokens.
    pub fn finish(&mut self, prior: f64) {
        self.hessians.iter_mut().for_each(Hessian::finish);
        let mut layers: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (name, &slot) in &self.slots {
            if let Some(layer) = expert_layer(name) {
                let slots = layers.entry(layer).or_default();
                if !slots.contains(&slot) {
                    slots.push(slot);
                }
            }
        }
        for slots in layers.values_mut() {
            slots.sort_unstable();
            let Some(pooled) = Hessian::pooled(slots.iter().map(|&s| &self.hessians[s])) else { continue };
            for &slot in slots.iter() {
                self.hessians[slot].shrink(&pooled, prior);
            }
        }
    }

    /// Tokens that reached each expert's weights, by weight name.
    pub fn coverage(&self) -> BTreeMap<String, u64> {
        let experts = self.slots.iter().filter(|(name, _)| expert_layer(name).is_some());
        experts.map(|(name, &slot)| (name.clone(), self.hessians[slot].tokens())).collect()
    }

    /// What an expert that no token reached is rounded by: its siblings' Hessian; without reached siblings, as if all inputs were equal.
    pub fn hessian_of_unreached(&self, weight: &WeightSpec) -> Hessian {
        self.siblings(&weight.name).unwrap_or_else(|| Hessian::identity(*weight.shape.last().unwrap_or(&1)))
    }

    /// The pooled Hessian of an expert's siblings, for one that no token reached.
    pub fn siblings(&self, weight: &str) -> Option<Hessian> {
        let layer = expert_layer(weight)?;
        let mut slots: Vec<usize> =
            self.slots.iter().filter(|(n, _)| expert_layer(n).as_ref() == Some(&layer)).map(|(_, &s)| s).collect();
        slots.sort_unstable();
        slots.dedup();
        Hessian::pooled(slots.iter().map(|&s| &self.hessians[s]))
    }
}

/// Counts the tokens that reach each expert, and keeps nothing else.
#[derive(Default)]
pub struct ExpertCounter {
    /// Tokens, by weight name.
    pub tokens: BTreeMap<String, u64>,
}

impl Observer for ExpertCounter {
    fn linear_input(&mut self, weight_name: &str, input: &Tensor) {
        if expert_layer(weight_name).is_some() {
            *self.tokens.entry(weight_name.to_owned()).or_default() += input.rows() as u64;
        }
    }
}

/// `model.layers.3.mlp.experts.*.up_proj.weight` for one of its experts.
fn expert_layer(name: &str) -> Option<String> {
    let (before, after) = name.split_once(".experts.")?;
    let (_, part) = after.split_once('.')?;
    Some(format!("{before}.experts.*.{part}"))
}

fn fingerprint(x: &Tensor) -> u64 {
    let mut hasher = DefaultHasher::new();
    (x.rows(), x.cols()).hash(&mut hasher);
    // Enough of the values to tell two activations of one shape apart.
    for v in x.host().iter().step_by(61) {
        v.to_bits().hash(&mut hasher);
    }
    hasher.finish()
}

impl Observer for Collector {
    fn linear_input(&mut self, weight_name: &str, input: &Tensor) {
        let print = fingerprint(input);
        let slot = match self.slots.get(weight_name) {
            Some(&slot) => slot,
            None => {
                let slot = match self.last {
                    Some((last, slot)) if last == print => slot,
                    Some(_) | None => {
                        self.hessians.push(Hessian::new(input.cols()));
                        self.hessians.len() - 1
                    }
                };
                self.slots.insert(weight_name.to_owned(), slot);
                slot
            }
        };
        let seen = self.last == Some((print, slot));
        self.last = Some((print, slot));
        if !seen {
            self.hessians[slot].accumulate(input.host());
        }
    }
}

/// Refuses tensors with a value that is not finite: text run through them would show it somewhere else, if at all.
///
/// # Errors
/// [`CompressError::Tensor`] of the first.
pub fn check_finite<'a>(
    source: &dyn WeightSource,
    weights: impl Iterator<Item = &'a WeightSpec>,
) -> Result<(), CompressError> {
    for spec in weights {
        let weight = source.load(&spec.name)?;
        let mut row = vec![0.0f32; weight.cols()];
        (0..weight.rows()).try_for_each(|r| read_finite(&weight, r, &mut row)).map_err(|e| e.of(&spec.name))?;
    }
    Ok(())
}

/// A source with some tensors replaced: a block's compressed weights over the original's.
pub struct Overlay<'a> {
    /// The original.
    pub base: &'a dyn WeightSource,
    /// What goes before it.
    pub replaced: HashMap<String, Weight>,
}

impl WeightSource for Overlay<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.base.tensors()
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        match self.replaced.get(name) {
            Some(weight) => Ok(weight.clone()),
            None => self.base.load(name),
        }
    }
}
