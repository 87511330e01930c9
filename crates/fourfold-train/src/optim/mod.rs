//! Optimizers. Each updates one tensor at a time, so that a gradient can be applied and released before the next is computed.

pub mod adamw;
pub mod blockwise;
pub mod parameter;
pub mod sgd;
pub mod state;

use rayon::prelude::*;
use thiserror::Error;

use self::adamw::{AdamW, Moments, Step};
use self::parameter::Parameter;
use self::sgd::Sgd;
use self::state::State;
use crate::recipe::MomentPrecision;

/// An optimizer with its hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Optimizer {
    /// See [`AdamW`].
    AdamW(AdamW),
    /// See [`Sgd`].
    Sgd(Sgd),
}

impl From<AdamW> for Optimizer {
    fn from(adam: AdamW) -> Self {
        Self::AdamW(adam)
    }
}

impl From<Sgd> for Optimizer {
    fn from(sgd: Sgd) -> Self {
        Self::Sgd(sgd)
    }
}

/// Which optimizer: what a tensor's state is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerKind {
    /// Two moments.
    AdamW,
    /// One.
    Sgd,
}

/// What an optimizer keeps of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum OptimizerState {
    /// First and second moments.
    AdamW(Moments),
    /// The momentum.
    Sgd(State),
}

impl OptimizerState {
    /// The state of a tensor of `len` elements before the first step.
    pub fn zeros(kind: OptimizerKind, len: usize, precision: MomentPrecision) -> Self {
        match kind {
            OptimizerKind::AdamW => Self::AdamW(Moments::zeros(len, precision)),
            OptimizerKind::Sgd => Self::Sgd(State::zeros(len, precision, state::Range::Signed)),
        }
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::AdamW(moments) => moments.byte_len(),
            Self::Sgd(momentum) => momentum.byte_len(),
        }
    }
}

impl Optimizer {
    /// Which it is.
    pub fn kind(&self) -> OptimizerKind {
        match self {
            Self::AdamW(_) => OptimizerKind::AdamW,
            Self::Sgd(_) => OptimizerKind::Sgd,
        }
    }

    /// The same without weight decay: for norms and biases.
    #[must_use]
    pub fn without_decay(self) -> Self {
        match self {
            Self::AdamW(adam) => Self::AdamW(AdamW { weight_decay: 0.0, ..adam }),
            Self::Sgd(sgd) => Self::Sgd(Sgd { weight_decay: 0.0, ..sgd }),
        }
    }

    /// Updates one tensor.
    ///
    /// # Errors
    /// A gradient that does not fit or is not finite, another optimizer's state: nothing has changed then.
    pub fn update(
        &self,
        tensor: &str,
        parameter: &mut Parameter,
        state: &mut OptimizerState,
        gradient: &[f32],
        step: &Step,
    ) -> Result<(), OptimError> {
        match (self, state) {
            (Self::AdamW(adam), OptimizerState::AdamW(moments)) => {
                adam.update(tensor, parameter, moments, gradient, step)
            }
            (Self::Sgd(sgd), OptimizerState::Sgd(momentum)) => sgd.update(tensor, parameter, momentum, gradient, step),
            (Self::AdamW(_), OptimizerState::Sgd(_)) | (Self::Sgd(_), OptimizerState::AdamW(_)) => {
                Err(OptimError::Foreign { tensor: tensor.into() })
            }
        }
    }
}

/// Elements that one work item goes over.
const CHUNK: usize = 1 << 14;

/// Why an update was refused. Nothing of the tensor has changed then.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptimError {
    /// The gradient has another length than the parameter.
    #[error("{tensor}: a gradient of {gradient} elements for {parameter} parameters")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements of the gradient.
        gradient: usize,
        /// Elements of the parameter.
        parameter: usize,
    },
    /// The recipe made the states for another optimizer.
    #[error("{tensor}: its state is another optimizer's")]
    Foreign {
        /// The tensor.
        tensor: String,
    },
    /// The gradient holds an infinity or NaN, or a number whose square is one.
    #[error("{tensor}: the gradient is not finite at element {element}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Its first such element.
        element: usize,
    },
}

/// Refuses gradients that do not fit, or whose squares, which a second moment holds, are not finite.
fn check(tensor: &str, gradient: &[f32], parameter: usize) -> Result<(), OptimError> {
    if gradient.len() != parameter {
        return Err(OptimError::Length { tensor: tensor.into(), gradient: gradient.len(), parameter });
    }
    let arch = pulp::Arch::new();
    // Every element of a chunk is looked at, without a branch.
    let finite = |chunk: &&[f32]| arch.dispatch(|| chunk.iter().fold(true, |all, g| all & (g * g).is_finite()));
    if gradient.par_chunks(CHUNK).all(|chunk| finite(&chunk)) {
        return Ok(());
    }
    let element = gradient.iter().position(|g| !(g * g).is_finite()).unwrap_or_default();
    Err(OptimError::NotFinite { tensor: tensor.into(), element })
}

/// `Σ g²`. Does not depend on the number of threads.
pub fn sum_of_squares(gradient: &[f32]) -> f64 {
    const LANES: usize = 8;
    let arch = pulp::Arch::new();
    let sum = |chunk: &[f32]| {
        arch.dispatch(|| {
            let mut lanes = [0.0f64; LANES];
            for group in chunk.chunks(LANES) {
                lanes.iter_mut().zip(group).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
            }
            lanes.iter().sum::<f64>()
        })
    };
    let sums: Vec<f64> = gradient.par_chunks(CHUNK).map(sum).collect();
    sums.iter().sum()
}
