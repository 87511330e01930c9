//! Operations on activations ([`Tensor`]) and stored weights ([`DeviceWeight`]), behind one trait ([`Backend`]).
//!
//! `reference` is slow and plain: it is the specification. Every other backend is checked against it by one table-driven
//! suite (`tests/conformance.rs`). This crate knows no layer, no model and no file format.

mod backend;
mod error;
mod kv;
mod tensor;

pub use backend::{AttentionSpec, Backend, DeviceWeight, LinearArg, RopeSpec, Values};
pub use error::KernelError;
pub use kv::{KvCache, KvData, KvDtype};
pub use tensor::Tensor;
