//! Gradients summed over the micro-batches of a step.
//!
//! Without gradient release the sums are f32 tensors. With it they would be the largest thing in memory: they are kept in bf16, 2 bytes
//! a parameter, and rounded stochastically, so that small gradients add up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use fourfold_kernels::Tensor;
use half::bf16;
use rayon::prelude::*;

use crate::random::Stream;
use crate::rounding::stochastic_bf16;

/// Elements that one work item goes over.
const CHUNK: usize = 1 << 14;

/// The sum of one tensor's gradients.
enum Sum {
    F32(Tensor),
    Bf16 { values: Vec<bf16>, added: u64 },
}

/// Sums by tensor name.
pub struct Sums {
    /// Whether they are kept in bf16.
    narrow: bool,
    /// Step and seed, for the rounding.
    seed: u64,
    step: u64,
    tensors: BTreeMap<String, Sum>,
}

impl Sums {
    /// No gradient yet.
    pub fn new(narrow: bool, seed: u64, step: u64) -> Self {
        Self { narrow, seed, step, tensors: BTreeMap::new() }
    }

    /// Adds a gradient.
    pub fn add(&mut self, name: String, gradient: Tensor) {
        let tensor = name.bytes().fold(0u64, |hash, b| hash.wrapping_mul(31).wrapping_add(u64::from(b)));
        let (narrow, len) = (self.narrow, gradient.host().len());
        let sum = match self.tensors.entry(name) {
            Entry::Occupied(sum) => sum.into_mut(),
            Entry::Vacant(place) if narrow => place.insert(Sum::Bf16 { values: vec![bf16::ZERO; len], added: 0 }),
            Entry::Vacant(place) => {
                place.insert(Sum::F32(gradient));
                return;
            }
        };
        match sum {
            Sum::F32(sum) => add(sum.host_mut(), gradient.host()),
            Sum::Bf16 { values, added } => {
                let stream = Stream::new(self.seed, self.step, tensor.wrapping_add(*added << 48));
                *added += 1;
                let chunks = values.par_chunks_mut(CHUNK).zip(gradient.host().par_chunks(CHUNK)).enumerate();
                chunks.for_each(|(i, (values, gradient))| {
                    for (j, (v, g)) in values.iter_mut().zip(gradient).enumerate() {
                        *v = stochastic_bf16(v.to_f32() + g, stream.word(i * CHUNK + j));
                    }
                });
            }
        }
    }

    /// Adds the sum of `name` to `gradient`.
    pub fn add_to(&self, name: &str, gradient: &mut Tensor) {
        match self.tensors.get(name) {
            Some(Sum::F32(sum)) => add(gradient.host_mut(), sum.host()),
            Some(Sum::Bf16 { values, .. }) => {
                let chunks = gradient.host_mut().par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
                chunks.for_each(|(g, v)| g.iter_mut().zip(v).for_each(|(g, v)| *g += v.to_f32()));
            }
            None => {}
        }
    }

    /// Forgets the sum of `name`.
    pub fn release(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// All sums that are f32 tensors, by name; the rest is forgotten.
    pub fn take_all(&mut self) -> impl Iterator<Item = (String, Tensor)> + use<> {
        let tensors = std::mem::take(&mut self.tensors);
        tensors.into_iter().filter_map(|(name, sum)| match sum {
            Sum::F32(sum) => Some((name, sum)),
            Sum::Bf16 { .. } => None,
        })
    }
}

fn add(sum: &mut [f32], gradient: &[f32]) {
    let chunks = sum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    chunks.for_each(|(sum, gradient)| sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_sums_are_right_on_average_and_wide_ones_exactly() {
        let n = 20_000;
        for narrow in [false, true] {
            let mut sums = Sums::new(narrow, 1, 7);
            for _ in 0..16 {
                sums.add("w".into(), Tensor::new(1, n, vec![1.003; n]));
            }
            let mut total = Tensor::new(1, n, vec![1.003; n]);
            sums.add_to("w", &mut total);
            let mean = total.host().iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
            assert!((mean - 17.051).abs() < if narrow { 5e-3 } else { 1e-5 }, "{mean}");
            sums.release("w");
            let mut nothing = Tensor::zeros(1, n);
            sums.add_to("w", &mut nothing);
            assert!(nothing.host().iter().all(|&v| v == 0.0));
        }
    }
}
