//! What training carries through the layers besides [`super::Pass`].
//!
//! Each layer has, in its own file, `train_forward`, which returns its output and what its gradient needs, and `backward`,
//! written by hand. A [`super::Block`] keeps its input alone between the two when it is run forward anew
//! (full recompute: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Input, Tensor};
use fourfold_tensor::{Mask, Tuning};

use super::{Dropout, Pass};
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
    /// Dropout of adapters' inputs.
    pub dropout: Option<Dropout>,
}

impl TrainPass<'_> {
    /// Runs part of the forward that is the same in training, unobserved.
    pub(crate) fn run<R>(&self, f: impl FnOnce(&mut Pass) -> R) -> R {
        f(&mut Pass { backend: self.backend, observer: &mut NoObserver, dropout: self.dropout })
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

/// Masks of pruned tensors, by name.
pub type Masks = Arc<HashMap<String, Arc<Mask>>>;

/// Packed tensors of which some numbers are learned, by name.
pub type Tunings = Arc<HashMap<String, Arc<Tuning>>>;

/// Gradients by tensor name, each as the tensor's matrix view, summed over all uses of the tensor. Of a pruned tensor what its mask keeps
/// alone has a gradient, `[1, kept]`; of a packed one the numbers that are learned, `[1, numbers]`.
#[derive(Debug, Default)]
pub struct Gradients {
    trained: Trained,
    masks: Masks,
    tunings: Tunings,
    tensors: BTreeMap<String, Tensor>,
    loads: BTreeMap<String, Vec<u64>>,
}

impl Gradients {
    /// No gradient yet.
    pub fn new(trained: Trained) -> Self {
        Self { trained, ..Self::default() }
    }

    /// The same, of tensors that are pruned.
    #[must_use]
    pub fn masked(self, masks: Masks) -> Self {
        Self { masks, ..self }
    }

    /// The same, of packed tensors.
    #[must_use]
    pub fn tuned(self, tunings: Tunings) -> Self {
        Self { tunings, ..self }
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

    /// Counts the tokens that each expert of a router got: what balances them is no gradient.
    pub(crate) fn count_loads(&mut self, router: &str, tokens: impl ExactSizeIterator<Item = usize>) {
        let loads = self.loads.entry(router.to_owned()).or_insert_with(|| vec![0; tokens.len()]);
        loads.iter_mut().zip(tokens).for_each(|(load, tokens)| *load += tokens as u64);
    }

    /// Takes out the tokens of each expert, by the name of the router (`model.layers.3.mlp.gate`).
    pub fn take_loads(&mut self) -> BTreeMap<String, Vec<u64>> {
        std::mem::take(&mut self.loads)
    }

    /// Adds `dyᵀ · x` to the gradient of a product's weight, `[rows, cols]`, of whose rows `part` made `dy`.
    pub fn add_product(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        part: Range<usize>,
        [x, dy]: [Input; 2],
        backend: &dyn Backward,
    ) {
        if let Some(mask) = self.masks.get(name).map(Arc::clone) {
            if let Some(dw) = self.of(name, 1, mask.kept()) {
                backend.kept_weight_gradient(x.tensor(), dy.tensor(), &mask, part, dw);
            }
        } else if let Some(tuning) = self.tunings.get(name).map(Arc::clone) {
            if let Some(dw) = self.of(name, 1, tuning.len()) {
                backend.tuned_weight_gradient(x.tensor(), dy.tensor(), &tuning, part, dw);
            }
        } else if part.len() == rows {
            self.add(name, || backend.new_weight_gradient_of(x, dy), |dw| backend.weight_gradient_of(x, dy, dw));
        } else if let Some(dw) = self.of(name, rows, cols) {
            let mut of_part = backend.rows(dw, part.clone());
            backend.weight_gradient_of(x, dy, &mut of_part);
            backend.set_rows(dw, part.start, &of_part);
        }
    }

    /// Adds the gradient of a table's rows `ids`: dy `[ids.len(), cols]`.
    pub fn add_rows(&mut self, name: &str, [rows, cols]: [usize; 2], ids: &[u32], dy: &Tensor, backend: &dyn Backward) {
        if let Some(tuning) = self.tunings.get(name).map(Arc::clone) {
            if let Some(dw) = self.of(name, 1, tuning.len()) {
                backend.tuned_embedding_gradient(ids, dy, &tuning, dw);
            }
        } else if let Some(dw) = self.of(name, rows, cols) {
            backend.embedding_gradient(ids, dy, dw);
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
