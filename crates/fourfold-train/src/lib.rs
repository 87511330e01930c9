//! Training and fine-tuning in a quarter of the memory of f32 AdamW: how weights are rounded, how optimizer states are stored,
//! how the learning rate moves, how a loss is scaled.
//!
//! Bytes a parameter (weight + optimizer state; gradients are released as they are applied): f32 AdamW 4 + 8, bf16 with
//! stochastic rounding and 8-bit states 2 + 2.03.

pub mod loss_scale;
pub mod optim;
pub mod random;
pub mod rounding;
pub mod schedule;
