//! Weight quantization: integer or codebook grids with scales per tensor, channel or group.

pub mod blocks;
mod codebook;
pub mod estimate;
mod fit;
pub mod gptq;
pub mod grid;
mod lattice;
mod polish;
pub mod rtn;
pub(crate) mod store;
mod sweep;
