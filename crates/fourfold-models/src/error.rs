//! Why a model cannot be built.

use fourfold_kernels::KernelError;
use fourfold_tensor::SourceError;
use thiserror::Error;

/// Why a configuration or a checkpoint does not make a model.
#[derive(Debug, Error)]
pub enum ModelError {
    /// `config.json` names an architecture this program has no description of.
    #[error("config.json: model_type {found:?} is not supported; supported: {supported}")]
    UnknownArchitecture {
        /// What the file says.
        found: String,
        /// The known ones, comma-separated.
        supported: String,
    },
    /// An architecture that is known and not computed.
    #[error("config.json: model_type {found:?} is not supported: {missing}")]
    Unsupported {
        /// What the file says.
        found: String,
        /// What of it this program does not compute.
        missing: &'static str,
    },
    /// A key that the architecture needs is absent.
    #[error("config.json: {key} is missing")]
    MissingKey {
        /// The key, with the object it belongs to: `rope_scaling.factor`.
        key: String,
    },
    /// A key has a value that cannot be used.
    #[error("config.json: {key} = {value}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// Its value as JSON, shortened.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The numbers are plausible one by one and not together.
    #[error("config.json: {0}")]
    Inconsistent(String),
    /// A tensor has another shape than the configuration says.
    #[error("tensor {tensor}: config.json asks for shape {expected:?}, the file has {found:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// What the configuration asks for.
        expected: Vec<usize>,
        /// What the checkpoint holds.
        found: Vec<usize>,
    },
    /// A tensor that the architecture reads is not in the checkpoint.
    #[error("no tensor named {tensor}{}{found}", and_others(*others))]
    MissingTensor {
        /// The first of them.
        tensor: String,
        /// How many more there are.
        others: usize,
        /// What the checkpoint holds in its place; empty where nothing is like it.
        found: String,
    },
    /// A weight in the layout of another program.
    #[error(
        "tensor {tensor}: the checkpoint holds {found}, which this program does not read (start from the unquantized checkpoint, \
         or a GGUF file)"
    )]
    ForeignLayout {
        /// The weight.
        tensor: String,
        /// What shows the layout.
        found: String,
    },
    /// A tensor of a type that no layer computes with.
    #[error("tensor {tensor}: {storage} {shape:?}: floats are read as F32, F16, BF16, F64 and F8_E4M3")]
    NotFloat {
        /// The tensor.
        tensor: String,
        /// Its type.
        storage: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two tensors that would both be one of the model's.
    #[error("tensor {tensor} is there twice, as {first} and as {second}")]
    TwoNames {
        /// The model's name of it.
        tensor: String,
        /// The first one's name.
        first: String,
        /// The second one's.
        second: String,
    },
    /// The checkpoint cannot give the tensor.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The backend cannot take the weight.
    #[error("tensor {tensor}: {source}")]
    Kernel {
        /// The tensor.
        tensor: String,
        /// Why not.
        source: KernelError,
    },
    /// There is no such block.
    #[error("block {index} does not exist: the model has {blocks}")]
    NoBlock {
        /// The block asked for.
        index: usize,
        /// How many there are.
        blocks: usize,
    },
}

/// "and n others", where there are others.
fn and_others(count: usize) -> String {
    match count {
        0 => String::new(),
        1 => " and 1 other".to_owned(),
        n => format!(" and {n} others"),
    }
}
