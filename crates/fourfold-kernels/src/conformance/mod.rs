//! One suite for every backend: each operation of the forward pass, in many shapes, against [`crate::Reference`].
//!
//! A backend's tests run [`FORWARD`] over a [`Candidate`]; what differs between two runs that must agree (threads, repeats, widths of
//! a device's subgroups) is compared by them: each check returns what it computed.

mod forward;
mod weights;

use crate::{Activations, Backend, Tensor};

pub use forward::FORWARD;
pub use weights::{FORMS, Form, Noise, noise, weight};

/// A backend to check, and what may be expected of it.
pub struct Candidate<'a> {
    /// What it is, for messages.
    pub label: String,
    /// The backend.
    pub backend: &'a dyn Backend,
    /// Whether its products round activations.
    pub activations: Activations,
    /// How far functions of an exponential may lie from the reference's, as a share.
    pub exponential: f32,
}

/// A check of one operation: what it computed.
pub type Check = fn(&Candidate) -> Vec<Tensor>;

impl Candidate<'_> {
    /// A host tensor where the backend computes.
    pub fn put(&self, x: &Tensor) -> Tensor {
        self.backend.tensor(x.rows(), x.cols(), x.host().to_vec())
    }

    /// A backend's tensor in this process's memory.
    ///
    /// # Panics
    /// When the device failed.
    pub fn get(&self, x: Tensor) -> Tensor {
        let (rows, cols) = (x.rows(), x.cols());
        let values = self.backend.take(x);
        Tensor::new(rows, cols, values.unwrap_or_else(|e| panic!("{}: {e}", self.label)))
    }
}

/// Holds each element to its bound.
///
/// # Panics
/// When one is further off.
pub fn check(what: &str, found: &Tensor, expected: &Tensor, bound: impl Fn(usize) -> f32) {
    assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()), "{what}: shape");
    for (i, (&f, &e)) in found.host().iter().zip(expected.host()).enumerate() {
        let error = (f - e).abs();
        assert!(error <= bound(i), "{what}: element {i} of [{}, {}] is {f}, not {e}", found.rows(), found.cols());
    }
}
