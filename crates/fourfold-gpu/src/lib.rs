//! The backend for graphics cards.
//!
//! The backend ([`Gpu`]) is written once over a seam ([`device::Device`]: memory, transfers, launches). [`wgpu`](self::wgpu) stands
//! behind it: Vulkan, Metal, any vendor's card. Kernels are WGSL, one file an operation, in `kernels/`. Weights stay packed in device
//! memory, and kernels read them packed. Weights made of others are composed by [`fourfold_kernels::composite`].

mod backend;
pub mod device;
mod kernels;
mod leaf;
mod tensor;
pub mod wgpu;

pub use self::wgpu::{Adapter, Choice, OpenError, adapters};
pub use backend::Gpu;
