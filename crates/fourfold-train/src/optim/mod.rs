//! Optimizers. Each updates one tensor at a time, so that a gradient can be applied and released before the next is computed.

pub mod adamw;
pub mod blockwise;
pub mod parameter;
pub mod sgd;

use thiserror::Error;

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
    /// The gradient holds an infinity or NaN.
    #[error("{tensor}: the gradient is not finite at element {element}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Its first such element.
        element: usize,
    },
}

/// Refuses gradients that do not fit or are not finite.
fn check(tensor: &str, gradient: &[f32], parameter: usize) -> Result<(), OptimError> {
    if gradient.len() != parameter {
        return Err(OptimError::Length { tensor: tensor.into(), gradient: gradient.len(), parameter });
    }
    match gradient.iter().position(|g| !g.is_finite()) {
        Some(element) => Err(OptimError::NotFinite { tensor: tensor.into(), element }),
        None => Ok(()),
    }
}
