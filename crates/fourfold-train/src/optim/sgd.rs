//! Stochastic gradient descent with momentum, with PyTorch's conventions (no dampening):
//!
//! ```text
//! g ← g + λ w       b ← μ b + g       w ← w − lr · (g + μ b  with Nesterov, else b)
//! ```

use super::adamw::Step;
use super::parameter::Parameter;
use super::{OptimError, check};

/// The hyperparameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sgd {
    /// Momentum μ.
    pub momentum: f32,
    /// L2 penalty λ.
    pub weight_decay: f32,
    /// Look ahead along the momentum (Sutskever et al. 2013).
    pub nesterov: bool,
}

impl Sgd {
    /// Updates one tensor; `buffer` is its momentum, zero at first.
    ///
    /// # Errors
    /// A gradient of another length, or one that is not finite: nothing has changed then.
    pub fn update(
        &self,
        tensor: &str,
        parameter: &mut Parameter,
        buffer: &mut [f32],
        gradient: &[f32],
        step: &Step,
    ) -> Result<(), OptimError> {
        const CHUNK: usize = 4096;
        check(tensor, gradient, parameter.len())?;
        let mut w = [0.0f32; CHUNK];
        let blocks = parameter.blocks(CHUNK).into_iter().zip(buffer.chunks_mut(CHUNK)).zip(gradient.chunks(CHUNK));
        for (i, ((mut block, b), g)) in blocks.enumerate() {
            let w = &mut w[..g.len()];
            block.read(w);
            for ((w, b), &g) in w.iter_mut().zip(b).zip(g) {
                let g = g * step.gradient_factor + self.weight_decay * *w;
                *b = self.momentum * *b + g;
                *w -= step.lr * if self.nesterov { g + self.momentum * *b } else { *b };
            }
            block.write(w, step.stream, i * CHUNK);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn three_steps_by_hand() {
        let sgd = Sgd { momentum: 0.5, weight_decay: 0.1, nesterov: false };
        let (mut parameter, mut buffer) = (Parameter::F32(vec![1.0].into()), vec![0.0]);
        let step = Step { number: 1, lr: 0.1, gradient_factor: 1.0, stream: Stream::new(0, 0, 0) };
        // g = 1.1, b = 1.1, w = 0.89; g = 1.089, b = 1.639, w = 0.7261.
        for expected in [0.89f32, 0.7261] {
            sgd.update("w", &mut parameter, &mut buffer, &[1.0], &step).unwrap();
            let Parameter::F32(w) = &parameter else { unreachable!() };
            assert!((w[0] - expected).abs() < 1e-6, "{w:?}, {expected} expected");
        }
        let nesterov = Sgd { nesterov: true, ..sgd };
        let (mut parameter, mut buffer) = (Parameter::F32(vec![1.0].into()), vec![0.0]);
        nesterov.update("w", &mut parameter, &mut buffer, &[1.0], &step).unwrap();
        assert_eq!(parameter, Parameter::F32(vec![1.0 - 0.1 * (1.1 + 0.55)].into()));
    }
}
