//! Weights made of others (low-rank products, sums), composed once for all backends: a backend has kernels for leaf forms alone.

use std::ops::Range;

use fourfold_tensor::Weight;

use crate::Tensor;

/// A weight whose leaves are in a backend's layout.
pub enum Composite<L> {
    /// A form that the backend has kernels for.
    Leaf(L),
    /// `up · down`.
    LowRank {
        /// `[rows, rank]`.
        up: Box<Composite<L>>,
        /// `[rank, cols]`.
        down: Box<Composite<L>>,
    },
    /// `Σ terms`, of equal shapes.
    Sum(Vec<Composite<L>>),
}

/// A leaf to multiply with.
pub struct LeafArg<'a, L> {
    /// `[out, in]`.
    pub leaf: &'a L,
    /// `[1, out]`.
    pub bias: Option<&'a Tensor>,
}

/// A weight to multiply with.
pub struct Product<'a, L> {
    /// `[out, in]`.
    pub weight: &'a Composite<L>,
    /// `[1, out]`.
    pub bias: Option<&'a Tensor>,
}

/// What a backend does with its leaves.
pub trait Leaves<L> {
    /// Rows and columns of a leaf.
    fn shape(&self, leaf: &L) -> [usize; 2];

    /// `y_i = x · W_iᵀ + b_i`, of leaves that multiply the same input.
    fn linear(&self, x: &Tensor, leaves: &[LeafArg<L>]) -> Vec<Tensor>;

    /// `y = x · W[rows, :]ᵀ`.
    fn linear_rows(&self, x: &Tensor, leaf: &L, rows: Range<usize>) -> Tensor;

    /// `y = x · W[rows, :]`.
    fn linear_transposed(&self, x: &Tensor, leaf: &L, rows: Range<usize>) -> Tensor;

    /// The named rows.
    fn embedding(&self, leaf: &L, ids: &[u32]) -> Tensor;

    /// `x += y`.
    fn add(&self, x: &mut Tensor, y: &Tensor);

    /// `y += bias` in each row.
    fn add_bias(&self, y: &mut Tensor, bias: &Tensor);
}

impl<L> Composite<L> {
    /// Takes a weight's leaves into a backend's layout by `leaf`, which is given no composite weight.
    ///
    /// # Errors
    /// What `leaf` says.
    pub fn prepare<E>(weight: Weight, leaf: &mut dyn FnMut(Weight) -> Result<L, E>) -> Result<Self, E> {
        Ok(match weight {
            Weight::Dense(_) | Weight::Quantized(_) | Weight::Fp8(_) | Weight::Sparse(_) => Self::Leaf(leaf(weight)?),
            Weight::LowRank(w) => {
                let (up, down) = w.into_factors();
                Self::LowRank { up: Box::new(Self::prepare(up, leaf)?), down: Box::new(Self::prepare(down, leaf)?) }
            }
            Weight::Sum(w) => {
                let terms = w.into_terms().into_iter().map(|w| Self::prepare(w, leaf)).collect::<Result<_, E>>()?;
                Self::Sum(terms)
            }
        })
    }

    /// The sum of `of` over the leaves: bytes.
    pub fn total(&self, of: &dyn Fn(&L) -> usize) -> usize {
        match self {
            Self::Leaf(leaf) => of(leaf),
            Self::LowRank { up, down } => up.total(of) + down.total(of),
            Self::Sum(terms) => terms.iter().map(|term| term.total(of)).sum(),
        }
    }

    fn rows(&self, backend: &impl Leaves<L>) -> usize {
        match self {
            Self::Leaf(leaf) => backend.shape(leaf)[0],
            Self::LowRank { up, .. } => up.rows(backend),
            Self::Sum(terms) => terms[0].rows(backend),
        }
    }

    /// The leaves that multiply the layer's input itself.
    fn inputs<'a>(&'a self, found: &mut Vec<&'a L>) {
        match self {
            Self::Leaf(leaf) => found.push(leaf),
            Self::LowRank { down, .. } => down.inputs(found),
            Self::Sum(terms) => terms.iter().for_each(|term| term.inputs(found)),
        }
    }

    /// The whole product from the products of [`Composite::inputs`], taken in its order.
    fn finish(&self, backend: &impl Leaves<L>, parts: &mut impl Iterator<Item = Tensor>) -> Tensor {
        match self {
            Self::Leaf(_) => parts.next().unwrap_or_else(|| unreachable!("a product for each part")),
            Self::LowRank { up, down } => {
                let inner = down.finish(backend, parts);
                linear(backend, &inner, &[Product { weight: up, bias: None }]).swap_remove(0)
            }
            Self::Sum(terms) => sum(backend, terms.iter().map(|term| term.finish(backend, parts)).collect()),
        }
    }

    /// `y = x · W[rows, :]ᵀ`.
    pub fn linear_rows(&self, backend: &impl Leaves<L>, x: &Tensor, rows: Range<usize>) -> Tensor {
        match self {
            Self::Leaf(leaf) => backend.linear_rows(x, leaf, rows),
            Self::LowRank { up, down } => {
                up.linear_rows(backend, &down.linear_rows(backend, x, 0..down.rows(backend)), rows)
            }
            Self::Sum(terms) => {
                sum(backend, terms.iter().map(|term| term.linear_rows(backend, x, rows.clone())).collect())
            }
        }
    }

    /// `y = x · W[rows, :]`.
    pub fn linear_transposed(&self, backend: &impl Leaves<L>, x: &Tensor, rows: Range<usize>) -> Tensor {
        match self {
            Self::Leaf(leaf) => backend.linear_transposed(x, leaf, rows),
            Self::LowRank { up, down } => {
                down.linear_transposed(backend, &up.linear_transposed(backend, x, rows), 0..down.rows(backend))
            }
            Self::Sum(terms) => {
                sum(backend, terms.iter().map(|term| term.linear_transposed(backend, x, rows.clone())).collect())
            }
        }
    }

    /// The named rows: `[ids.len(), cols]`.
    pub fn embedding(&self, backend: &impl Leaves<L>, ids: &[u32]) -> Tensor {
        match self {
            Self::Leaf(leaf) => backend.embedding(leaf, ids),
            Self::LowRank { up, down } => {
                down.linear_transposed(backend, &up.embedding(backend, ids), 0..down.rows(backend))
            }
            Self::Sum(terms) => sum(backend, terms.iter().map(|term| term.embedding(backend, ids)).collect()),
        }
    }
}

/// `y_i = x · W_iᵀ + b_i`. All leaves that multiply `x` are given to the backend together; a leaf's bias with it.
pub fn linear<L>(backend: &impl Leaves<L>, x: &Tensor, products: &[Product<L>]) -> Vec<Tensor> {
    let mut parts = Vec::with_capacity(products.len());
    for product in products {
        match product.weight {
            Composite::Leaf(leaf) => parts.push(LeafArg { leaf, bias: product.bias }),
            Composite::LowRank { .. } | Composite::Sum(_) => {
                let mut leaves = Vec::new();
                product.weight.inputs(&mut leaves);
                parts.extend(leaves.into_iter().map(|leaf| LeafArg { leaf, bias: None }));
            }
        }
    }
    let mut outputs = backend.linear(x, &parts).into_iter();
    let finish = |product: &Product<L>| {
        let mut y = product.weight.finish(backend, &mut outputs);
        if let (Composite::LowRank { .. } | Composite::Sum(_), Some(bias)) = (product.weight, product.bias) {
            backend.add_bias(&mut y, bias);
        }
        y
    };
    products.iter().map(finish).collect()
}

/// `Σ terms`.
fn sum<L>(backend: &impl Leaves<L>, terms: Vec<Tensor>) -> Tensor {
    let mut terms = terms.into_iter();
    let mut total = terms.next().unwrap_or_else(|| unreachable!("a sum has terms"));
    terms.for_each(|term| backend.add(&mut total, &term));
    total
}
