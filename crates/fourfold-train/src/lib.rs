//! Training and fine-tuning in a quarter of the memory of f32 AdamW: how weights are rounded, how optimizer states are stored,
//! how the learning rate moves, how a loss is scaled, and the step that joins them.
//!
//! Bytes a parameter (weight + gradient + optimizer state): f32 AdamW 4 + 4 + 8; bf16 with stochastic rounding, 8-bit states and
//! gradient release 2 + 2.03.

mod accumulate;
pub mod balance;
pub mod batch;
pub mod checkpoint;
pub mod data;
pub mod distill;
pub mod image_memory;
pub mod images;
pub mod labelled;
pub mod language;
pub mod loss_scale;
pub mod memory;
pub mod network;
pub mod optim;
pub mod random;
pub mod recipe;
pub mod rounding;
pub mod run;
pub mod schedule;
pub mod store;
pub mod trainer;
pub mod vision;
mod waiting;
