//! Optimizers. Each updates one tensor at a time, so that a gradient can be applied and released before the next is computed.

pub mod adamw;
pub mod blockwise;
pub mod parameter;
pub mod sgd;

use rayon::prelude::*;
use thiserror::Error;

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
    let arch = pulp::Arch::new();
    // Every element of a chunk is looked at, without a branch.
    let finite = |chunk: &&[f32]| arch.dispatch(|| chunk.iter().fold(true, |all, g| all & g.is_finite()));
    if gradient.par_chunks(CHUNK).all(|chunk| finite(&chunk)) {
        return Ok(());
    }
    let element = gradient.iter().position(|g| !g.is_finite()).unwrap_or_default();
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
