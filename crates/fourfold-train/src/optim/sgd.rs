//! Stochastic gradient descent with momentum, with PyTorch's conventions (no dampening):
//!
//! ```text
//! g ← g + λ w       b ← μ b + g       w ← w − lr · (g + μ b  with Nesterov, else b)
//! ```

use rayon::prelude::*;

use super::adamw::Step;
use super::parameter::{Block, Parameter};
use super::state::{CHUNK, Range, State, StateMut};
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
    /// Updates one tensor; `momentum` is its state, zero at first. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// A gradient of another length, or one that is not finite: nothing has changed then.
    pub fn update(
        &self,
        tensor: &str,
        parameter: &mut Parameter,
        momentum: &mut State,
        gradient: &[f32],
        step: &Step,
    ) -> Result<(), OptimError> {
        check(tensor, gradient, parameter.len())?;
        let arch = pulp::Arch::new();
        let chunks: Vec<(Block, StateMut)> = parameter.blocks(CHUNK).into_iter().zip(momentum.chunks()).collect();
        chunks.into_par_iter().zip(gradient.par_chunks(CHUNK)).enumerate().for_each(
            |(i, ((block, stored), gradient))| {
                arch.dispatch(ChunkUpdate { sgd: self, step, block, stored, gradient, first: i * CHUNK });
            },
        );
        Ok(())
    }
}

/// The update of one chunk, compiled for the machine's widest vectors.
struct ChunkUpdate<'a> {
    sgd: &'a Sgd,
    step: &'a Step,
    block: Block<'a>,
    stored: StateMut<'a>,
    gradient: &'a [f32],
    /// Index of the first element.
    first: usize,
}

impl pulp::NullaryFnOnce for ChunkUpdate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { sgd: &Sgd { momentum, weight_decay, nesterov }, step, mut block, mut stored, gradient, first } =
            self;
        let (mut w, mut b) = ([0.0f32; CHUNK], [0.0f32; CHUNK]);
        let (w, b) = (&mut w[..gradient.len()], &mut b[..gradient.len()]);
        block.read(w);
        stored.read(Range::Signed, b);
        for ((w, b), &g) in w.iter_mut().zip(b.iter_mut()).zip(gradient) {
            let g = g * step.gradient_factor + weight_decay * *w;
            *b = momentum * *b + g;
            *w -= step.lr * if nesterov { g + momentum * *b } else { *b };
        }
        stored.write(Range::Signed, b);
        block.write(w, Some(step.stream), first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use crate::recipe::MomentPrecision;

    #[test]
    fn three_steps_by_hand() {
        let sgd = Sgd { momentum: 0.5, weight_decay: 0.1, nesterov: false };
        let (mut parameter, mut buffer) = (Parameter::F32(vec![1.0].into()), State::F32(vec![0.0]));
        let step = Step { number: 1, lr: 0.1, gradient_factor: 1.0, stream: Stream::new(0, 0, 0) };
        // g = 1.1, b = 1.1, w = 0.89; g = 1.089, b = 1.639, w = 0.7261.
        for expected in [0.89f32, 0.7261] {
            sgd.update("w", &mut parameter, &mut buffer, &[1.0], &step).unwrap();
            let Parameter::F32(w) = &parameter else { unreachable!() };
            assert!((w[0] - expected).abs() < 1e-6, "{w:?}, {expected} expected");
        }
        let nesterov = Sgd { nesterov: true, ..sgd };
        let (mut parameter, mut buffer) = (Parameter::F32(vec![1.0].into()), State::F32(vec![0.0]));
        nesterov.update("w", &mut parameter, &mut buffer, &[1.0], &step).unwrap();
        assert_eq!(parameter, Parameter::F32(vec![1.0 - 0.1 * (1.1 + 0.55)].into()));
    }

    #[test]
    fn momentum_in_few_bits_still_reaches_the_minimum() {
        let n = CHUNK + 100;
        let sgd = Sgd { momentum: 0.9, ..Sgd::default() };
        for (precision, bound) in
            [(MomentPrecision::F32, 1e-4), (MomentPrecision::Bits8, 1e-3), (MomentPrecision::Bits4, 2e-2)]
        {
            let mut parameter = Parameter::F32(vec![0.0; n].into());
            let mut momentum = State::zeros(n, precision, Range::Signed);
            for number in 1..=300 {
                let Parameter::F32(w) = &parameter else { unreachable!() };
                let gradient: Vec<f32> = w.iter().enumerate().map(|(i, w)| w - (i as f32 * 0.37).sin()).collect();
                let step = Step { number, lr: 0.02, gradient_factor: 1.0, stream: Stream::new(0, number, 0) };
                sgd.update("w", &mut parameter, &mut momentum, &gradient, &step).unwrap();
            }
            let Parameter::F32(w) = &parameter else { unreachable!() };
            let worst = w.iter().enumerate().map(|(i, w)| (w - (i as f32 * 0.37).sin()).abs()).fold(0.0, f32::max);
            assert!(worst < bound, "{precision:?}: {worst}");
        }
    }
}
