//! Operations on activations ([`Tensor`]) and stored weights ([`DeviceWeight`]), behind one trait ([`Backend`]).
//!
//! [`Reference`] is slow and plain: it is the specification. Every other backend is checked against it by one table-driven
//! suite ([`conformance`], behind the feature of its name). This crate knows no layer, no model and no file format.

mod backend;
pub mod backward;
pub mod composite;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod cpu;
mod error;
mod heap;
mod kv;
mod reference;
mod rounded;
pub mod spatial;
mod tensor;

pub use backend::{AttentionSpec, Backend, DeviceUsage, DeviceWeight, LinearArg, Memory, RopeSpec, Values};
pub use cpu::{Activations, Cpu, CpuOptions, FloatProducts, Isa};
pub use error::KernelError;
pub use heap::{Heap, heap_is_for, release_freed_memory};
pub use kv::{DeviceCache, KvCache, KvData, KvDtype};
pub use reference::Reference;
pub use rounded::{Input, Prepared, Rounded};
pub use tensor::{Bf16Tensor, DeviceTensor, Tensor};
