//! What training carries through the layers besides [`super::Pass`].
//!
//! Each layer has, in its own file, `train_forward`, which returns its output and what its gradient needs, and `backward`,
//! written by hand. A [`super::Block`] keeps its input alone between the two when it is run forward anew
//! (full recompute: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;

use super::Pass;
use crate::NoObserver;

/// A packed batch: documents side by side, all rows of one matrix.
#[derive(Clone, Copy)]
pub struct TrainPass<'a> {
    /// Runs the operations.
    pub backend: &'a dyn Backward,
    /// Consecutive ranges of rows that together are all rows; attention stays inside each.
    pub documents: &'a [Range<usize>],
    /// Position of each row in its document.
    pub positions: &'a [usize],
}

impl TrainPass<'_> {
    /// Runs part of the forward that is the same in training, unobserved.
    pub(crate) fn run<R>(&self, f: impl FnOnce(&mut Pass) -> R) -> R {
        f(&mut Pass { backend: self.backend, observer: &mut NoObserver })
    }
}

/// Which tensors get a gradient.
#[derive(Clone, Debug, Default)]
pub enum Trained {
    /// All of them.
    #[default]
    All,
    /// Those named.
    Only(HashSet<String>),
}

/// Gradients by tensor name, each as the tensor's matrix view, summed over all uses of the tensor.
#[derive(Debug, Default)]
pub struct Gradients {
    trained: Trained,
    tensors: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// No gradient yet.
    pub fn new(trained: Trained) -> Self {
        Self { trained, tensors: BTreeMap::new() }
    }

    /// Whether the tensor is trained.
    pub fn wants(&self, name: &str) -> bool {
        match &self.trained {
            Trained::All => true,
            Trained::Only(names) => names.contains(name),
        }
    }

    /// The gradient of a `[rows, cols]` tensor, zero at first; `None` where it is not trained.
    pub fn of(&mut self, name: &str, rows: usize, cols: usize) -> Option<&mut Tensor> {
        if !self.wants(name) {
            return None;
        }
        if !self.tensors.contains_key(name) {
            self.tensors.insert(name.to_owned(), Tensor::zeros(rows, cols));
        }
        self.tensors.get_mut(name)
    }

    /// Adds to a tensor's gradient: `first` makes it, `more` adds to it. Neither is called where the tensor is not trained.
    pub fn add(&mut self, name: &str, first: impl FnOnce() -> Tensor, more: impl FnOnce(&mut Tensor)) {
        if !self.wants(name) {
            return;
        }
        match self.tensors.get_mut(name) {
            Some(gradient) => more(gradient),
            None => {
                self.tensors.insert(name.to_owned(), first());
            }
        }
    }

    /// Takes one gradient out.
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// Takes all gradients out, by name.
    pub fn take_all(&mut self) -> BTreeMap<String, Tensor> {
        std::mem::take(&mut self.tensors)
    }
}
