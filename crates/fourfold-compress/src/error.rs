//! What compression can refuse.

use fourfold_models::ModelError;
use fourfold_tensor::SourceError;
use thiserror::Error;

/// Why a model could not be compressed.
#[derive(Debug, Error)]
pub enum CompressError {
    /// A tensor could not be read or written.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A method refused a tensor.
    #[error("tensor {tensor}: {reason}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: MethodError,
    },
    /// The plan does not fit the checkpoint.
    #[error("plan: {0}")]
    Plan(String),
    /// No choice of settings is small enough.
    #[error("the smallest plan takes {smallest} bytes, and {budget} are allowed")]
    Budget {
        /// Bytes of the smallest plan.
        smallest: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// The model's code refused the checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl CompressError {
    /// Whether the disk is at fault, so that the same command may go on once it is mended.
    pub fn may_be_mended(&self) -> bool {
        matches!(self, Self::Source(error) if error.io().is_some())
    }
}

/// Why a method cannot compress one weight.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum MethodError {
    /// A value that no scale can stand for.
    #[error("element [{row}, {col}] is {value}")]
    NotFinite {
        /// Row of the matrix view.
        row: usize,
        /// Column of the matrix view.
        col: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// Numbers that f16 holds as zero, as infinity, or too coarsely.
    #[error("its {what} reach {largest:e}, which f16 does not hold; {remedy}")]
    BeyondF16 {
        /// Which numbers.
        what: &'static str,
        /// The largest, as f16 holds it.
        largest: f32,
        /// What helps.
        remedy: &'static str,
    },
    /// Settings that contradict each other or have no kernel.
    #[error("{0}")]
    Settings(String),
    /// A method that needs calibration got none.
    #[error("method {method} needs {needs}, and there is none for this tensor")]
    NoStatistics {
        /// The method.
        method: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// Statistics of another width.
    #[error("statistics of {found} columns for a weight of {expected}")]
    Width {
        /// Columns of the statistics.
        found: usize,
        /// Columns of the weight.
        expected: usize,
    },
    /// The Hessian stayed indefinite with all the damping allowed, or holds NaN.
    #[error("the Hessian is not positive definite with damping {damping} of its mean diagonal")]
    Indefinite {
        /// The largest damping tried.
        damping: f64,
    },
    /// No such method.
    #[error("no method named {0}")]
    Unknown(String),
}

impl MethodError {
    /// Names the tensor.
    pub fn of(self, tensor: &str) -> CompressError {
        CompressError::Tensor { tensor: tensor.to_owned(), reason: self }
    }
}
