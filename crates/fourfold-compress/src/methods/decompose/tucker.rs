//! Tucker-2 decomposition of a convolution's kernel along its channels (Kim et al. 2016, "Compression of Deep Convolutional Neural
//! Networks for Fast and Low Power Mobile Applications", section 3): a 1x1 convolution to fewer channels, the kernel between
//! these, and a 1x1 convolution to the output's. The start is the higher-order SVD; higher-order orthogonal iteration
//! (De Lathauwer et al. 2000) improves it.

use super::kernel::{Kernel, Matrix, leading, symmetric_eigen};
use crate::MethodError;

/// Ranks along outputs and inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranks {
    /// As given.
    Given {
        /// Channels of the core's output.
        outputs: usize,
        /// Channels of the core's input.
        inputs: usize,
    },
    /// The fewest that keep this share of each unfolding's energy.
    Energy(f64),
}

/// `K[o, i, h, w] ≈ Σ_ab outputs[o, a] · core[a, b, h, w] · inputs[i, b]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tucker2 {
    /// `[outputs, rank]`, orthonormal columns.
    pub outputs: Matrix,
    /// `[inputs, rank]`, orthonormal columns.
    pub inputs: Matrix,
    /// The core.
    pub core: Kernel,
    /// Energy of the error relative to the kernel's; 0 for a kernel of zeros.
    pub error: f64,
}

/// Rounds of orthogonal iteration at most.
const ROUNDS: usize = 100;

/// Decomposes a kernel.
///
/// # Errors
/// A rank of 0 or above the channels, an energy outside (0, 1].
pub fn tucker2(kernel: &Kernel, ranks: Ranks) -> Result<Tucker2, MethodError> {
    let [outputs, inputs, ..] = kernel.shape;
    let (of_outputs, of_inputs) = match ranks {
        Ranks::Given { outputs: a, inputs: b } => (a, b),
        Ranks::Energy(share) if share > 0.0 && share <= 1.0 => (enough(kernel, 0, share), enough(kernel, 1, share)),
        Ranks::Energy(share) => {
            return Err(MethodError::Settings(format!("energy {share}: a share above 0 and at most 1 is expected")));
        }
    };
    for (rank, channels, what) in [(of_outputs, outputs, "output"), (of_inputs, inputs, "input")] {
        if rank == 0 || rank > channels {
            return Err(MethodError::Settings(format!("rank {rank}: the kernel has {channels} {what} channels")));
        }
    }
    let mut to_outputs = leading(&kernel.unfolded_gram(0), of_outputs);
    let mut to_inputs = leading(&kernel.unfolded_gram(1), of_inputs);
    let energy = kernel.energy();
    let mut kept = 0.0;
    for _ in 0..ROUNDS {
        to_outputs = leading(&kernel.project(1, &to_inputs).unfolded_gram(0), of_outputs);
        to_inputs = leading(&kernel.project(0, &to_outputs).unfolded_gram(1), of_inputs);
        let now = kernel.project(0, &to_outputs).project(1, &to_inputs).energy();
        if now - kept <= 1e-12 * energy {
            break;
        }
        kept = now;
    }
    let core = kernel.project(0, &to_outputs).project(1, &to_inputs);
    // The factors are orthonormal: what the core does not hold is the error.
    let error = if energy > 0.0 { (1.0 - core.energy() / energy).max(0.0) } else { 0.0 };
    Ok(Tucker2 { outputs: to_outputs, inputs: to_inputs, core, error })
}

/// The fewest channels along `axis` that keep `share` of the energy.
fn enough(kernel: &Kernel, axis: usize, share: f64) -> usize {
    let (values, _) = symmetric_eigen(&kernel.unfolded_gram(axis));
    let total: f64 = values.iter().map(|v| v.max(0.0)).sum();
    let mut sum = 0.0;
    let fewer = values.iter().take_while(|v| {
        let more = sum < share * total;
        sum += v.max(0.0);
        more
    });
    fewer.count().clamp(1, kernel.shape[axis].max(1))
}
