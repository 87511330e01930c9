//! AdamW (Loshchilov & Hutter 2019, algorithm 2) with moments in f32, 8 or 4 bits.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! w ← w − lr · λ · w − lr · m̂ / (√v̂ + ε)      m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
//! ```
//!
//! With update clipping (StableAdamW: Wortsman et al. 2023, section 3.3) the rate of a tensor is divided by
//! `max(1, √mean(g² / v̂))`: a gradient that outgrows its second moment cannot throw the tensor far. It needs one tensor
//! only, so gradients can be released as they arrive, which clipping by global norm forbids.

use rayon::prelude::*;

use super::parameter::{Block, Parameter};
use super::state::{CHUNK, Range, State, StateMut};
use super::{OptimError, check};
use crate::random::Stream;
use crate::recipe::MomentPrecision;

/// The hyperparameters. The defaults are PyTorch's, but for weight decay, which is 0 until asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay rate of the first moment.
    pub beta1: f32,
    /// Decay rate of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay λ.
    pub weight_decay: f32,
    /// Divide a tensor's rate by the root mean square of `g / √v̂` where that is above 1.
    pub clip_update: bool,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, clip_update: false }
    }
}

/// First and second moments of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// First moments.
    pub m: State,
    /// Second moments.
    pub v: State,
}

/// One chunk of [`Moments`].
struct MomentsMut<'a> {
    m: StateMut<'a>,
    v: StateMut<'a>,
}

impl Moments {
    /// Moments of a tensor of `len` elements, zero.
    pub fn zeros(len: usize, precision: MomentPrecision) -> Self {
        Self { m: State::zeros(len, precision, Range::Signed), v: State::zeros(len, precision, Range::NonNegative) }
    }

    /// Bytes they take.
    pub fn byte_len(&self) -> usize {
        self.m.byte_len() + self.v.byte_len()
    }

    fn chunks(&mut self) -> Vec<MomentsMut<'_>> {
        self.m.chunks().into_iter().zip(self.v.chunks()).map(|(m, v)| MomentsMut { m, v }).collect()
    }
}

/// What an update needs besides the tensor.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Number of this update, counted from 1.
    pub number: u64,
    /// Learning rate.
    pub lr: f32,
    /// Factor of the gradient: the inverse of the loss scale, the factor of a global-norm clip.
    pub gradient_factor: f32,
    /// Random numbers for stochastic rounding, of this tensor and step.
    pub stream: Stream,
}

impl AdamW {
    /// Updates one tensor. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// A gradient of another length, or one that is not finite: nothing has changed then.
    pub fn update(
        &self,
        tensor: &str,
        parameter: &mut Parameter,
        moments: &mut Moments,
        gradient: &[f32],
        step: &Step,
    ) -> Result<(), OptimError> {
        check(tensor, gradient, parameter.len())?;
        let correction1 = 1.0 - f64::from(self.beta1).powf(step.number as f64);
        let correction2 = 1.0 - f64::from(self.beta2).powf(step.number as f64);
        let inverse2 = (1.0 / correction2) as f32;
        let mut lr = f64::from(step.lr);
        if self.clip_update {
            lr /= self.update_size(moments, gradient, step, inverse2).max(1.0);
        }
        let rate = (lr / correction1) as f32;
        let decay = (1.0 - lr * f64::from(self.weight_decay)) as f32;
        let most = self.largest_ratio() * (correction2.sqrt() as f32);

        let arch = pulp::Arch::new();
        let chunks: Vec<(Block, MomentsMut)> = parameter.blocks(CHUNK).into_iter().zip(moments.chunks()).collect();
        chunks.into_par_iter().zip(gradient.par_chunks(CHUNK)).enumerate().for_each(
            |(i, ((block, stored), gradient))| {
                let first = i * CHUNK;
                let update =
                    ChunkUpdate { adam: self, step, decay, rate, inverse2, most, block, stored, gradient, first };
                arch.dispatch(update);
            },
        );
        Ok(())
    }

    /// What `|m| / √v` cannot exceed, whatever the gradients were (Cauchy & Schwarz), with room for rounding: infinite where
    /// β1² ≥ β2. Exact moments never reach it. A second moment that 8 bits rounded to zero, under a first one that they did not,
    /// would go past it by orders of magnitude.
    fn largest_ratio(&self) -> f32 {
        let (beta1, beta2) = (f64::from(self.beta1), f64::from(self.beta2));
        let sum = 1.0 - beta1 * beta1 / beta2;
        if sum > 0.0 { (1.01 * (1.0 - beta1) / ((1.0 - beta2) * sum).sqrt()) as f32 } else { f32::INFINITY }
    }

    /// `√mean(g² / v̂)` with the second moments as they will be after this step.
    fn update_size(&self, moments: &mut Moments, gradient: &[f32], step: &Step, inverse2: f32) -> f64 {
        let arch = pulp::Arch::new();
        let sum = |(stored, gradient)| arch.dispatch(ChunkSize { adam: self, step, inverse2, stored, gradient });
        let sums: Vec<f64> = moments.chunks().into_par_iter().zip(gradient.par_chunks(CHUNK)).map(sum).collect();
        (sums.iter().sum::<f64>() / gradient.len().max(1) as f64).sqrt()
    }
}

/// The update of one chunk, compiled for the machine's widest vectors (a closure of this size would not be inlined where they
/// are). Multiplications and additions stay apart, so that the result is the same everywhere.
struct ChunkUpdate<'a> {
    adam: &'a AdamW,
    step: &'a Step,
    decay: f32,
    rate: f32,
    inverse2: f32,
    /// Largest magnitude of an element's update, before the rate.
    most: f32,
    block: Block<'a>,
    stored: MomentsMut<'a>,
    gradient: &'a [f32],
    /// Index of the first element.
    first: usize,
}

impl pulp::NullaryFnOnce for ChunkUpdate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { adam: &AdamW { beta1, beta2, eps, .. }, step, decay, rate, inverse2, most, .. } = self;
        let Self { mut block, mut stored, gradient, first, .. } = self;
        let (mut w, mut m, mut v) = ([0.0f32; CHUNK], [0.0f32; CHUNK], [0.0f32; CHUNK]);
        let n = gradient.len();
        let (w, m, v) = (&mut w[..n], &mut m[..n], &mut v[..n]);
        block.read(w);
        stored.m.read(Range::Signed, m);
        stored.v.read(Range::NonNegative, v);
        for (((w, m), v), &g) in w.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(gradient) {
            let g = g * step.gradient_factor;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let ratio = (*m / ((*v * inverse2).sqrt() + eps)).max(-most).min(most);
            *w = *w * decay - rate * ratio;
        }
        stored.m.write(Range::Signed, m);
        stored.v.write(Range::NonNegative, v);
        block.write(w, Some(step.stream), first);
    }
}

/// `Σ g² / v̂` over one chunk, compiled as [`ChunkUpdate`].
struct ChunkSize<'a> {
    adam: &'a AdamW,
    step: &'a Step,
    inverse2: f32,
    stored: MomentsMut<'a>,
    gradient: &'a [f32],
}

impl pulp::NullaryFnOnce for ChunkSize<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        const LANES: usize = 8;
        let Self { adam: &AdamW { beta2, eps, .. }, step, inverse2, stored, gradient } = self;
        let mut v = [0.0f32; CHUNK];
        let v = &mut v[..gradient.len()];
        stored.v.read(Range::NonNegative, v);
        let mut lanes = [0.0f64; LANES];
        for (v, g) in v.chunks(LANES).zip(gradient.chunks(LANES)) {
            for ((sum, &v), &g) in lanes.iter_mut().zip(v).zip(g) {
                let g = g * step.gradient_factor;
                let v = (beta2 * v + (1.0 - beta2) * g * g) * inverse2;
                *sum += f64::from(g * g / v.max(eps * eps));
            }
        }
        lanes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::blockwise::{BLOCK4, BLOCK8};
    use super::*;
    use half::bf16;

    fn step(number: u64, lr: f32) -> Step {
        Step { number, lr, gradient_factor: 1.0, stream: Stream::new(0, number, 0) }
    }

    /// Minimises ½ Σ c (w − t)² with noisy gradients, and returns the mean squared distance from t.
    fn descend(mut parameter: Parameter, mut moments: Moments) -> f64 {
        let n = parameter.len();
        let noise = Stream::new(99, 0, 0);
        let target = |i: usize| (i as f32 * 0.37).sin();
        // Curvatures differ between blocks of elements, as they do between the rows of a weight.
        let curvature = |i: usize| (-((i / 256 % 7) as f32)).exp2();
        let adam = AdamW { beta2: 0.99, ..AdamW::default() };
        let mut w = vec![0.0; n];
        for t in 1..=600u64 {
            parameter.blocks(n)[0].read(&mut w);
            let gradient: Vec<f32> = (0..n)
                .map(|i| curvature(i) * (w[i] - target(i) + 0.2 * (noise.unit(t as usize * n + i) - 0.5)))
                .collect();
            let lr = 1e-2 * (1.0 - t as f32 / 601.0);
            adam.update("w", &mut parameter, &mut moments, &gradient, &step(t, lr)).unwrap();
        }
        parameter.blocks(n)[0].read(&mut w);
        (0..n).map(|i| f64::from(w[i] - target(i)).powi(2)).sum::<f64>() / n as f64
    }

    #[test]
    fn a_second_moment_that_rounds_to_zero_does_not_throw_a_weight_away() {
        let n = 256;
        let adam = AdamW { weight_decay: 0.0, beta2: 0.95, clip_update: false, ..AdamW::default() };
        let after = |precision| {
            let mut parameter = Parameter::F32(vec![0.0; n].into());
            let mut moments = Moments::zeros(n, precision);
            for t in 1..=4 {
                // One element's gradient is so large that the squares of the others' vanish beside it.
                let gradient: Vec<f32> = (0..n)
                    .map(|i| {
                        if i == 7 {
                            1.0
                        } else if t == 1 {
                            1e-4
                        } else {
                            0.0
                        }
                    })
                    .collect();
                adam.update("w", &mut parameter, &mut moments, &gradient, &step(t, 1e-3)).unwrap();
            }
            let mut w = vec![0.0; n];
            parameter.blocks(n)[0].read(&mut w);
            w.iter().fold(0.0f32, |most, w| most.max(w.abs()))
        };
        let (exact, coarse) = (after(MomentPrecision::F32), after(MomentPrecision::Bits8));
        assert!(exact < 1e-2 && coarse < 1e-2, "{exact} {coarse} after four steps of 1e-3");
    }

    #[test]
    fn first_step_is_the_rate_times_the_sign() {
        let mut parameter = Parameter::F32(vec![1.0, 1.0, 1.0].into());
        let adam = AdamW { weight_decay: 0.5, ..AdamW::default() };
        adam.update(
            "w",
            &mut parameter,
            &mut Moments::zeros(3, MomentPrecision::F32),
            &[2.0, -0.01, 0.0],
            &step(1, 0.1),
        )
        .unwrap();
        let Parameter::F32(w) = parameter else { unreachable!() };
        let expected = [0.95 - 0.1, 0.95 + 0.1, 0.95];
        assert!(w.iter().zip(expected).all(|(w, e)| (w - e).abs() < 1e-6), "{w:?}");
    }

    #[test]
    fn low_precision_states_reach_the_minimum_and_nearest_rounding_is_worse() {
        let n = 3 * CHUNK / 2 + 5;
        let exact = descend(Parameter::F32(vec![0.0; n].into()), Moments::zeros(n, MomentPrecision::F32));
        let bits8 = descend(Parameter::F32(vec![0.0; n].into()), Moments::zeros(n, MomentPrecision::Bits8));
        let bits4 = descend(Parameter::F32(vec![0.0; n].into()), Moments::zeros(n, MomentPrecision::Bits4));
        let stochastic =
            descend(Parameter::Bf16(vec![bf16::ZERO; n].into()), Moments::zeros(n, MomentPrecision::Bits8));
        let residual = descend(
            Parameter::Bf16Residual { high: vec![bf16::ZERO; n].into(), low: vec![0; n] },
            Moments::zeros(n, MomentPrecision::Bits8),
        );
        let nearest =
            descend(Parameter::Bf16Nearest(vec![bf16::ZERO; n].into()), Moments::zeros(n, MomentPrecision::Bits8));
        assert!(exact < 1e-3, "{exact}");
        assert!(bits8 < 1.1 * exact, "8 bits {bits8}, f32 {exact}");
        assert!(bits4 < 1.5 * exact, "4 bits {bits4}, f32 {exact}");
        assert!(residual < 1.1 * exact, "residual {residual}, f32 {exact}");
        assert!(4.0 * stochastic < nearest, "stochastic {stochastic}, nearest {nearest}");
    }

    #[test]
    fn bytes_are_counted() {
        let n = 1 << 16;
        assert_eq!(Moments::zeros(n, MomentPrecision::F32).byte_len(), 8 * n);
        assert_eq!(Moments::zeros(n, MomentPrecision::Bits8).byte_len(), 2 * n + 8 * n / BLOCK8);
        assert_eq!(Moments::zeros(n, MomentPrecision::Bits4).byte_len(), n + 8 * n / BLOCK4);
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let mut parameter = Parameter::F32(vec![1.0; 8].into());
        let mut moments = Moments::zeros(8, MomentPrecision::Bits8);
        let before = (parameter.clone(), moments.clone());
        let adam = AdamW::default();
        let mut gradient = vec![1.0; 8];
        gradient[5] = f32::NAN;
        let error = adam.update("w", &mut parameter, &mut moments, &gradient, &step(1, 0.1)).unwrap_err();
        assert_eq!(error, OptimError::NotFinite { tensor: "w".into(), element: 5 });
        let error = adam.update("w", &mut parameter, &mut moments, &gradient[..3], &step(1, 0.1)).unwrap_err();
        assert_eq!(error, OptimError::Length { tensor: "w".into(), gradient: 3, parameter: 8 });
        assert_eq!(before, (parameter, moments));
    }

    #[test]
    fn update_clipping_holds_back_a_burst() {
        let moved = |clip_update: bool| {
            let adam = AdamW { clip_update, ..AdamW::default() };
            let (mut parameter, mut moments) =
                (Parameter::F32(vec![0.0; 64].into()), Moments::zeros(64, MomentPrecision::F32));
            (1..=50).for_each(|t| adam.update("w", &mut parameter, &mut moments, &[1e-3; 64], &step(t, 0.0)).unwrap());
            adam.update("w", &mut parameter, &mut moments, &[1.0; 64], &step(51, 1.0)).unwrap();
            let Parameter::F32(w) = parameter else { unreachable!() };
            w[0].abs()
        };
        assert!(moved(true) < 0.5 * moved(false), "clipped {}, not {}", moved(true), moved(false));
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let n = 5 * CHUNK + 77;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut parameter =
                    Parameter::Bf16((0..n).map(|i| bf16::from_f32((i as f32).cos())).collect::<Vec<_>>().into());
                let mut moments = Moments::zeros(n, MomentPrecision::Bits8);
                let adam = AdamW { clip_update: true, ..AdamW::default() };
                let gradient: Vec<f32> = (0..n).map(|i| (i as f32 * 0.1).sin()).collect();
                (1..5).for_each(|t| adam.update("w", &mut parameter, &mut moments, &gradient, &step(t, 1e-2)).unwrap());
                (parameter, moments)
            })
        };
        assert!(run(1) == run(3));
    }
}
