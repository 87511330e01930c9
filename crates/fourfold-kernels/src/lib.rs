//! Operations on activations ([`Tensor`]) and stored weights ([`DeviceWeight`]), behind one trait ([`Backend`]).
//!
//! [`Reference`] is slow and plain: it is the specification. Every other backend is checked against it by one table-driven
//! suite (`tests/conformance.rs`). This crate knows no layer, no model and no file format.

mod backend;
pub mod backward;
pub mod cpu;
mod error;
mod heap;
mod kv;
mod reference;
mod rounded;
pub mod spatial;
mod tensor;

pub use backend::{AttentionSpec, Backend, DeviceWeight, LinearArg, RopeSpec, Values};
pub use cpu::{Activations, Cpu, CpuOptions, FloatProducts, Isa};
pub use error::KernelError;
pub use heap::release_freed_memory;
pub use kv::{KvCache, KvData, KvDtype};
pub use reference::Reference;
pub use rounded::{Input, Prepared, Rounded};
pub use tensor::{Bf16Tensor, Tensor};
