//! Models as stacks of layers, each written once: the language models llama, qwen2, qwen3, deepseek_v2 and deepseek_v3, and
//! convolutional networks ([`ConvNetSpec`]).
//!
//! [`spec_from_config`] reads a Hugging Face `config.json` into a [`ModelSpec`]: data, checked, with nothing allocated. The
//! spec lists every tensor ([`ModelSpec::weights`]) and predicts memory ([`memory`]); [`Model::load`] builds the layers from a
//! [`fourfold_tensor::WeightSource`]. Layers call operations of [`fourfold_kernels::Backend`] and never look into a tensor,
//! so one description serves inference, calibration and every backend.
//!
//! This crate names no compression method and no file format.

mod arch;
mod batch;
mod cache;
mod checkpoint;
mod config;
mod convnet;
mod error;
mod keys;
pub mod layers;
mod loader;
pub mod memory;
mod model;
mod names;
mod observer;
mod rope;
mod spec;
pub mod testing;
mod tied;

pub use arch::{ConvNetSpec, architectures, config_remarks, knows_key, spec_from_config, training_remarks};
pub use batch::{Segment, Sequence};
pub use cache::{BlockCache, Cache};
pub use checkpoint::{check_tensors, holds_floats};
pub use convnet::ConvNet;
pub use error::ModelError;
pub use layers::{Block, Embedding, Head};
pub use loader::{Frozen, Weights};
pub use model::Model;
pub use names::with_model_names;
pub use observer::{NoObserver, Observer};
pub use spec::{AttentionKind, BlockSpec, FeedForward, ModelSpec, Role, WeightSpec};
pub use tied::OwnHead;
