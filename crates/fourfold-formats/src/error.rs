//! What can be wrong with a checkpoint. [`FormatError`] names the file, [`TensorError`] what is wrong with one tensor in it.

use std::io;
use std::path::{Path, PathBuf};

use fourfold_tensor::{DType, Fp8Error, LowRankError, QuantizedError, SourceError, SparseError, SumError};
use thiserror::Error;

use crate::gguf::GgufError;
use crate::hf::AdapterError;
use crate::hub::HubError;
use crate::quantization::ConfigError;
use crate::safetensors::{HeaderError, IndexError};

/// A checkpoint that cannot be read or written.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// An output could not be locked, made durable or given its name.
    #[error(transparent)]
    Disk(#[from] fourfold_disk::DiskError),
    /// There is nothing at the path, or nothing that holds a model.
    #[error("{}: {reason}", path.display())]
    NotACheckpoint {
        /// The path given.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A JSON file that is no JSON, or not of the form its name promises.
    #[error("{}: {reason}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// A malformed safetensors header.
    #[error("{}: {problem}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: HeaderError,
    },
    /// A malformed shard index, or shards that do not hold what it promises.
    #[error("{}: {problem}", file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What is wrong.
        problem: IndexError,
    },
    /// A `quantization_config` that cannot be read.
    #[error("{}: {problem}", file.display())]
    Quantization {
        /// The configuration's file.
        file: PathBuf,
        /// What is wrong.
        problem: ConfigError,
    },
    /// The disk is full.
    #[error("{}: no room on the disk: {needed} bytes were to be written", file.display())]
    DiskFull {
        /// The file being written.
        file: PathBuf,
        /// Bytes it was to take.
        needed: u64,
    },
    /// An output that must not, or cannot, be written.
    #[error("{}: {problem}", path.display())]
    Output {
        /// The output directory.
        path: PathBuf,
        /// Why.
        problem: OutputError,
    },
    /// A GGUF file that cannot be used.
    #[error("{}: {problem}", file.display())]
    Gguf {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: GgufError,
    },
    /// A model that could not be fetched.
    #[error("{repo}: {problem}")]
    Hub {
        /// The repository.
        repo: String,
        /// What went wrong.
        problem: HubError,
    },
    /// An adapter that cannot be applied.
    #[error("{}: {problem}", file.display())]
    Adapter {
        /// The file of the adapter.
        file: PathBuf,
        /// What is wrong.
        problem: Box<AdapterError>,
    },
    /// One tensor cannot be used.
    #[error("{}: tensor {tensor}: {problem}", file.display())]
    Tensor {
        /// The file that holds it.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: TensorError,
    },
}

/// What is wrong with one tensor.
#[derive(Debug, Error)]
pub enum TensorError {
    /// Elements that are no weight: integers outside a packed weight.
    #[error("{dtype} {shape:?} is not a weight of floats")]
    NotFloat {
        /// The stored type.
        dtype: DType,
        /// The stored shape.
        shape: Vec<usize>,
    },
    /// Elements of a type that the format has and this program does not compute with.
    #[error("{dtype} {shape:?}: this program does not compute with {dtype}; save the tensor as F32, F16 or BF16")]
    ForeignType {
        /// The stored type.
        dtype: String,
        /// The stored shape.
        shape: Vec<usize>,
    },
    /// No matrix where only a matrix has a meaning.
    #[error("shape {shape:?} is no matrix")]
    NotMatrix {
        /// The stored shape.
        shape: Vec<usize>,
    },
    /// A packed weight that lacks a part.
    #[error("its part {part} is missing")]
    PartMissing {
        /// The part.
        part: String,
    },
    /// A part of the wrong type.
    #[error("its part {part} is {found}, {expected} was expected")]
    PartDtype {
        /// The part.
        part: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: DType,
    },
    /// A part of the wrong shape.
    #[error("its part {part} has shape {found:?}, {expected:?} was expected")]
    PartShape {
        /// The part.
        part: String,
        /// What it should be.
        expected: Vec<usize>,
        /// What it is.
        found: Vec<usize>,
    },
    /// A `weight_shape` that does not fit the codes.
    #[error("its shape part says {claimed:?}, which codes of shape {packed:?} do not fit")]
    PackedShape {
        /// What the shape part says.
        claimed: Vec<i64>,
        /// Shape of the codes.
        packed: Vec<usize>,
    },
    /// A packed weight for which config.json has no scheme, or none that can be read.
    #[error("is packed, and quantization_config has no scheme for it")]
    NoScheme,
    /// A weight stored in two ways.
    #[error("is there both packed and plain")]
    PackedAndPlain,
    /// FP8 blocks of unknown size.
    #[error("has scales for blocks, and quantization_config has no weight_block_size")]
    NoBlockSize,
    /// An integer beyond the scheme's width.
    #[error("holds the code {value}, which {bits} bits cannot")]
    CodeRange {
        /// The signed code.
        value: i8,
        /// Bits of the scheme.
        bits: u8,
    },
    /// The parts of a quantized matrix do not fit together.
    #[error(transparent)]
    Quantized(#[from] QuantizedError),
    /// The parts of an FP8 matrix do not fit together, or a code is no number.
    #[error(transparent)]
    Fp8(#[from] Fp8Error),
    /// The parts of a sparse matrix do not fit together.
    #[error(transparent)]
    Sparse(#[from] SparseError),
    /// The factors of a low-rank matrix do not fit together.
    #[error(transparent)]
    LowRank(#[from] LowRankError),
    /// The terms of a sum do not fit together.
    #[error(transparent)]
    Sum(#[from] SumError),
}

/// Why an output cannot be written. What concerns one tensor names it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OutputError {
    /// Something is there already.
    #[error("exists already; choose another directory, or ask for it to be overwritten")]
    Exists,
    /// The output would replace what it is made from.
    #[error("holds the source of this output; choose another directory")]
    HoldsSource,
    /// Something stands where the output would grow that this program did not make.
    #[error(
        "{partial} stands where the output would grow and is not of fourfold's making; move it away, or name another output"
    )]
    ForeignLeftovers {
        /// What stands there.
        partial: String,
    },
    /// What an interrupted run left was made of other settings or inputs.
    #[error(
        "{partial} holds what an interrupted run of other settings or inputs had written: {differs}. Give the same again to go on from it, \
         remove it, or begin anew with --overwrite"
    )]
    OtherLeftovers {
        /// The directory.
        partial: String,
        /// What is not the same.
        differs: String,
    },
    /// Two declared tensors, or parts of them, of one name.
    #[error("tensor {tensor} is declared twice")]
    DeclaredTwice {
        /// The name.
        tensor: String,
    },
    /// A declaration after the first.
    #[error("the output is declared already")]
    DeclaredAlready,
    /// A tensor that was not declared.
    #[error("tensor {tensor} was not declared")]
    NotDeclared {
        /// The name.
        tensor: String,
    },
    /// A tensor of another form than was declared.
    #[error("tensor {tensor} has another form than was declared: {found}, not {declared}")]
    OtherForm {
        /// The name.
        tensor: String,
        /// The form it has.
        found: String,
        /// The form declared.
        declared: String,
    },
    /// A form that safetensors parts cannot hold.
    #[error("tensor {tensor}: {reason}")]
    NotStorable {
        /// The name.
        tensor: String,
        /// Why.
        reason: String,
    },
    /// Declared tensors that were never written.
    #[error("{missing} declared tensors were not written, {tensor} among them")]
    Incomplete {
        /// The first of them.
        tensor: String,
        /// How many.
        missing: usize,
    },
}

/// A failure inside a tensor, before its name is joined to it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The file's, named already.
    Format(FormatError),
    /// The tensor's.
    Tensor(TensorError),
}

impl Failure {
    /// Joins file and tensor.
    pub(crate) fn at(self, file: &Path, tensor: &str) -> FormatError {
        match self {
            Self::Format(error) => error,
            Self::Tensor(problem) => FormatError::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), problem },
        }
    }
}

impl From<FormatError> for Failure {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

impl From<TensorError> for Failure {
    fn from(error: TensorError) -> Self {
        Self::Tensor(error)
    }
}

impl From<QuantizedError> for Failure {
    fn from(error: QuantizedError) -> Self {
        Self::Tensor(error.into())
    }
}

impl FormatError {
    /// Joins an I/O error to the file it is about.
    pub fn io(file: &Path) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Io { file, source }
    }
}

impl From<FormatError> for SourceError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Tensor { file, tensor, problem } => Self::Tensor { file, tensor, reason: Box::new(problem) },
            FormatError::Io { file, source } => Self::File { file, reason: Box::new(source) },
            FormatError::NotACheckpoint { path, reason } => Self::File { file: path, reason: reason.into() },
            FormatError::Json { file, reason } => Self::File { file, reason: reason.into() },
            FormatError::Header { file, problem } => Self::File { file, reason: Box::new(problem) },
            FormatError::Index { file, problem } => Self::File { file, reason: Box::new(problem) },
            FormatError::Quantization { file, problem } => Self::File { file, reason: Box::new(problem) },
            FormatError::DiskFull { file, needed } => {
                let reason = format!("no room on the disk: {needed} bytes were to be written");
                Self::File { file, reason: Box::new(io::Error::new(io::ErrorKind::StorageFull, reason)) }
            }
            FormatError::Disk(error) => of_disk(error),
            FormatError::Hub { repo, problem } => Self::File { file: repo.into(), reason: Box::new(problem) },
            FormatError::Output { path, problem } => Self::File { file: path, reason: Box::new(problem) },
            FormatError::Adapter { file, problem } => Self::File { file, reason: problem },
            FormatError::Gguf { file, problem } => Self::File { file, reason: Box::new(problem) },
        }
    }
}

fn of_disk(error: fourfold_disk::DiskError) -> SourceError {
    use fourfold_disk::DiskError;
    match error {
        DiskError::Io { action, file, source } => {
            let reason = format!("cannot {action}: {source}");
            SourceError::File { file, reason: Box::new(io::Error::new(source.kind(), reason)) }
        }
        DiskError::Busy { ref place, .. } => SourceError::File { file: place.clone(), reason: Box::new(error) },
        DiskError::Place { place, reason } => SourceError::File { file: place, reason: reason.into() },
        DiskError::Malformed { file, reason } => SourceError::File { file, reason: reason.into() },
    }
}
