//! Activations that nothing but products reads.
//!
//! Mixed-precision training rounds both factors of a product. Where a norm or a gate is followed by products alone, its backend may round
//! what it computes at once: half the bytes are written, half are read by each product and by the weight's gradient, and nothing is
//! rounded twice. The numbers are the same.

use std::any::Any;

use crate::Tensor;

/// Activations `[rows, cols]` as a backend's products read them.
pub struct Rounded {
    rows: usize,
    cols: usize,
    inner: Box<dyn Any + Send + Sync>,
}

impl Rounded {
    /// Wraps a backend's own form.
    pub fn new<T: Any + Send + Sync>(rows: usize, cols: usize, inner: T) -> Self {
        Self { rows, cols, inner: Box::new(inner) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The backend's own form.
    ///
    /// # Panics
    /// When another backend made it.
    pub fn get<T: Any>(&self) -> &T {
        self.inner.downcast_ref().expect("rounded activations are used by the backend that made them")
    }
}

/// A factor of a product.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Not rounded yet.
    F32(&'a Tensor),
    /// Rounded.
    Rounded(&'a Rounded),
}

impl<'a> Input<'a> {
    /// Number of rows.
    pub fn rows(self) -> usize {
        match self {
            Self::F32(x) => x.rows(),
            Self::Rounded(x) => x.rows(),
        }
    }

    /// Number of columns.
    pub fn cols(self) -> usize {
        match self {
            Self::F32(x) => x.cols(),
            Self::Rounded(x) => x.cols(),
        }
    }

    /// The tensor.
    ///
    /// # Panics
    /// When it is rounded: who asks has not said that its products round ([`crate::backward::Backward::rounds`]).
    pub fn tensor(self) -> &'a Tensor {
        match self {
            Self::F32(x) => x,
            Self::Rounded(_) => panic!("rounded activations where none were asked for"),
        }
    }
}

impl<'a> From<&'a Tensor> for Input<'a> {
    fn from(x: &'a Tensor) -> Self {
        Self::F32(x)
    }
}

/// A result for products, rounded or not.
pub enum Prepared {
    /// Not rounded.
    F32(Tensor),
    /// Rounded.
    Rounded(Rounded),
}

impl Prepared {
    /// It, as a factor of a product.
    pub fn input(&self) -> Input<'_> {
        match self {
            Self::F32(x) => Input::F32(x),
            Self::Rounded(x) => Input::Rounded(x),
        }
    }
}
