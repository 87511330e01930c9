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

use super::blockwise::{BLOCK4, BLOCK8, Code, State4, State8, decode4, decode8, encode4, encode8};
use super::parameter::{Block, Parameter};
use super::{OptimError, check};
use crate::random::Stream;

/// Elements that one block of work updates; a whole number of blocks of every state.
const CHUNK: usize = 16 * BLOCK8;

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
pub enum Moments {
    /// 8 bytes a parameter.
    F32 {
        /// First moments.
        m: Vec<f32>,
        /// Second moments.
        v: Vec<f32>,
    },
    /// 2.03 bytes a parameter.
    Bits8 {
        /// First moments.
        m: State8,
        /// Second moments.
        v: State8,
    },
    /// 1.06 bytes a parameter.
    Bits4 {
        /// First moments.
        m: State4,
        /// Second moments.
        v: State4,
    },
}

/// One chunk of [`Moments`].
enum MomentsMut<'a> {
    F32(&'a mut [f32], &'a mut [f32]),
    Bits8([(&'a mut [u8], &'a mut [f32]); 2]),
    Bits4([(&'a mut [u8], &'a mut [f32]); 2]),
}

impl Moments {
    /// f32 moments of a tensor of `len` elements, zero.
    pub fn f32(len: usize) -> Self {
        Self::F32 { m: vec![0.0; len], v: vec![0.0; len] }
    }

    /// 8-bit moments, zero.
    pub fn bits8(len: usize) -> Self {
        Self::Bits8 { m: State8::zeros(len, Code::signed8()), v: State8::zeros(len, Code::unsigned8()) }
    }

    /// 4-bit moments, zero.
    pub fn bits4(len: usize) -> Self {
        Self::Bits4 { m: State4::zeros(len, Code::signed4()), v: State4::zeros(len, Code::linear4()) }
    }

    /// Bytes they take.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::F32 { m, v } => 4 * (m.len() + v.len()),
            Self::Bits8 { m, v } => m.byte_len() + v.byte_len(),
            Self::Bits4 { m, v } => m.byte_len() + v.byte_len(),
        }
    }

    fn chunks(&mut self) -> Vec<MomentsMut<'_>> {
        fn pairs<'a>(
            codes: &'a mut [u8],
            c: usize,
            scales: &'a mut [f32],
            s: usize,
        ) -> Vec<(&'a mut [u8], &'a mut [f32])> {
            codes.chunks_mut(c).zip(scales.chunks_mut(s)).collect()
        }
        match self {
            Self::F32 { m, v } => {
                m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK)).map(|(m, v)| MomentsMut::F32(m, v)).collect()
            }
            Self::Bits8 { m, v } => {
                let m = pairs(&mut m.codes, CHUNK, &mut m.scales, CHUNK / BLOCK8);
                let v = pairs(&mut v.codes, CHUNK, &mut v.scales, CHUNK / BLOCK8);
                m.into_iter().zip(v).map(|(m, v)| MomentsMut::Bits8([m, v])).collect()
            }
            Self::Bits4 { m, v } => {
                let m = pairs(&mut m.codes, CHUNK / 2, &mut m.scales, CHUNK / BLOCK4);
                let v = pairs(&mut v.codes, CHUNK / 2, &mut v.scales, CHUNK / BLOCK4);
                m.into_iter().zip(v).map(|(m, v)| MomentsMut::Bits4([m, v])).collect()
            }
        }
    }
}

impl MomentsMut<'_> {
    #[inline(always)]
    fn read(&self, m: &mut [f32], v: &mut [f32]) {
        match self {
            Self::F32(stored, _) => m.copy_from_slice(stored),
            Self::Bits8([stored, _]) => read8(stored, Code::signed8(), m),
            Self::Bits4([stored, _]) => read4(stored, Code::signed4(), m),
        }
        self.read_second(v);
    }

    #[inline(always)]
    fn read_second(&self, v: &mut [f32]) {
        match self {
            Self::F32(_, stored) => v.copy_from_slice(stored),
            Self::Bits8([_, stored]) => read8(stored, Code::unsigned8(), v),
            Self::Bits4([_, stored]) => read4(stored, Code::linear4(), v),
        }
    }

    #[inline(always)]
    fn write(&mut self, m: &[f32], v: &[f32]) {
        match self {
            Self::F32(stored_m, stored_v) => {
                stored_m.copy_from_slice(m);
                stored_v.copy_from_slice(v);
            }
            Self::Bits8(stored) => {
                for ((codes, scales), (values, code)) in
                    stored.iter_mut().zip([(m, Code::signed8()), (v, Code::unsigned8())])
                {
                    let blocks = values.chunks(BLOCK8).zip(codes.chunks_mut(BLOCK8)).zip(scales.iter_mut());
                    blocks.for_each(|((values, codes), scale)| *scale = encode8(values, code, codes));
                }
            }
            Self::Bits4(stored) => {
                for ((codes, scales), (values, code)) in
                    stored.iter_mut().zip([(m, Code::signed4()), (v, Code::linear4())])
                {
                    let blocks = values.chunks(BLOCK4).zip(codes.chunks_mut(BLOCK4 / 2)).zip(scales.iter_mut());
                    blocks.for_each(|((values, codes), scale)| *scale = encode4(values, code, codes));
                }
            }
        }
    }
}

#[inline(always)]
fn read8((codes, scales): &(&mut [u8], &mut [f32]), code: &Code, out: &mut [f32]) {
    let blocks = out.chunks_mut(BLOCK8).zip(codes.chunks(BLOCK8)).zip(scales.iter());
    blocks.for_each(|((out, codes), &scale)| decode8(codes, scale, code, out));
}

#[inline(always)]
fn read4((codes, scales): &(&mut [u8], &mut [f32]), code: &Code, out: &mut [f32]) {
    let blocks = out.chunks_mut(BLOCK4).zip(codes.chunks(BLOCK4 / 2)).zip(scales.iter());
    blocks.for_each(|((out, codes), &scale)| decode4(codes, scale, code, out));
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

        let arch = pulp::Arch::new();
        let chunks: Vec<(Block, MomentsMut)> = parameter.blocks(CHUNK).into_iter().zip(moments.chunks()).collect();
        chunks.into_par_iter().zip(gradient.par_chunks(CHUNK)).enumerate().for_each(
            |(i, ((block, stored), gradient))| {
                let first = i * CHUNK;
                arch.dispatch(ChunkUpdate { adam: self, step, decay, rate, inverse2, block, stored, gradient, first });
            },
        );
        Ok(())
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
        let Self { adam: &AdamW { beta1, beta2, eps, .. }, step, decay, rate, inverse2, .. } = self;
        let Self { mut block, mut stored, gradient, first, .. } = self;
        let (mut w, mut m, mut v) = ([0.0f32; CHUNK], [0.0f32; CHUNK], [0.0f32; CHUNK]);
        let n = gradient.len();
        let (w, m, v) = (&mut w[..n], &mut m[..n], &mut v[..n]);
        block.read(w);
        stored.read(m, v);
        for (((w, m), v), &g) in w.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(gradient) {
            let g = g * step.gradient_factor;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w = *w * decay - rate * *m / ((*v * inverse2).sqrt() + eps);
        }
        stored.write(m, v);
        block.write(w, step.stream, first);
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
        stored.read_second(v);
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
    fn first_step_is_the_rate_times_the_sign() {
        let mut parameter = Parameter::F32(vec![1.0, 1.0, 1.0].into());
        let adam = AdamW { weight_decay: 0.5, ..AdamW::default() };
        adam.update("w", &mut parameter, &mut Moments::f32(3), &[2.0, -0.01, 0.0], &step(1, 0.1)).unwrap();
        let Parameter::F32(w) = parameter else { unreachable!() };
        let expected = [0.95 - 0.1, 0.95 + 0.1, 0.95];
        assert!(w.iter().zip(expected).all(|(w, e)| (w - e).abs() < 1e-6), "{w:?}");
    }

    #[test]
    fn low_precision_states_reach_the_minimum_and_nearest_rounding_is_worse() {
        let n = 3 * CHUNK / 2 + 5;
        let exact = descend(Parameter::F32(vec![0.0; n].into()), Moments::f32(n));
        let bits8 = descend(Parameter::F32(vec![0.0; n].into()), Moments::bits8(n));
        let bits4 = descend(Parameter::F32(vec![0.0; n].into()), Moments::bits4(n));
        let stochastic = descend(Parameter::Bf16(vec![bf16::ZERO; n].into()), Moments::bits8(n));
        let residual =
            descend(Parameter::Bf16Residual { high: vec![bf16::ZERO; n].into(), low: vec![0; n] }, Moments::bits8(n));
        let nearest = descend(Parameter::Bf16Nearest(vec![bf16::ZERO; n].into()), Moments::bits8(n));
        assert!(exact < 1e-3, "{exact}");
        assert!(bits8 < 1.1 * exact, "8 bits {bits8}, f32 {exact}");
        assert!(bits4 < 1.5 * exact, "4 bits {bits4}, f32 {exact}");
        assert!(residual < 1.1 * exact, "residual {residual}, f32 {exact}");
        assert!(4.0 * stochastic < nearest, "stochastic {stochastic}, nearest {nearest}");
    }

    #[test]
    fn bytes_are_counted() {
        let n = 1 << 16;
        assert_eq!(Moments::f32(n).byte_len(), 8 * n);
        assert_eq!(Moments::bits8(n).byte_len(), 2 * n + 8 * n / BLOCK8);
        assert_eq!(Moments::bits4(n).byte_len(), n + 8 * n / BLOCK4);
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let mut parameter = Parameter::F32(vec![1.0; 8].into());
        let mut moments = Moments::bits8(8);
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
            let (mut parameter, mut moments) = (Parameter::F32(vec![0.0; 64].into()), Moments::f32(64));
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
                let mut moments = Moments::bits8(n);
                let adam = AdamW { clip_update: true, ..AdamW::default() };
                let gradient: Vec<f32> = (0..n).map(|i| (i as f32 * 0.1).sin()).collect();
                (1..5).for_each(|t| adam.update("w", &mut parameter, &mut moments, &gradient, &step(t, 1e-2)).unwrap());
                (parameter, moments)
            })
        };
        assert!(run(1) == run(3));
    }
}
