//! Layers, one file each: a spec (shapes, names, bytes) and the layer itself (parameters and forward).
//!
//! A layer reaches its numbers through [`fourfold_kernels::Backend`] alone. The exceptions are two tables of a few
//! values a token that are made on the host: rotation angles, and the router's choice of experts.

mod batch_norm;
mod block;
mod conv2d;
mod dropout;
mod embedding;
mod gqa;
mod head;
mod linear;
mod lora;
mod mla;
mod mlp;
mod moe;
mod norm;
mod rope;
mod router;
mod stack;
mod train;

use fourfold_kernels::Backend;

use crate::Observer;

pub use batch_norm::{BatchNorm, BatchNormSpec, Statistic};
pub use block::{Block, BlockSaved};
pub use conv2d::{Conv2d, Conv2dSpec};
pub use dropout::Dropout;
pub(crate) use embedding::EMBEDDING;
pub use embedding::Embedding;
pub use gqa::{Gqa, GqaSaved, GqaSpec};
pub(crate) use head::LM_HEAD_WEIGHT;
pub use head::{Goals, Head, HeadLoss, TeacherOutput};
pub use linear::{Linear, LinearSpec};
pub use lora::{LORA_A, LORA_B, LORA_SCALING, LoraSpec};
pub use mla::{Mla, MlaSaved, MlaSpec};
pub use mlp::{Mlp, MlpSaved, MlpSpec};
pub use moe::{Moe, MoeSaved, MoeSpec};
pub use norm::{Norm, NormSpec};
pub(crate) use rope::yarn_mscale;
pub use rope::{Rotary, RotaryScaling, RotarySpec};
pub use router::{CORRECTION_BIAS, ExpertLoad, Router, RouterScores, RouterSpec, Selection};
pub use stack::{LayerSpec, Running, Stack, StackPass, StackSaved, kept_inputs, segments};
pub use train::{Gradients, Masks, TrainPass, Trained, Tunings};

/// What a forward pass carries through the layers.
pub struct Pass<'a> {
    /// Runs the operations.
    pub backend: &'a dyn Backend,
    /// Sees the linear layers' inputs.
    pub observer: &'a mut dyn Observer,
    /// Dropout of adapters' inputs, in training.
    pub dropout: Option<Dropout>,
}
