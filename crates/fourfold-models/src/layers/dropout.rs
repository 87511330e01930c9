//! Dropout (Srivastava et al. 2014) of what goes into adapters, as PEFT's `lora_dropout` has it: an element is zero with probability
//! `share`, the others are divided by `1 - share`, in training alone.
//!
//! Which elements are dropped is a function of a key, the layer's name and the element's place, so that a forward pass that is run
//! again for its gradient, and a resumed run, drop the same ones.

use fourfold_kernels::{Backend, Tensor};

/// What is dropped in a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    share: f32,
    key: u64,
}

impl Dropout {
    /// Elements are dropped with probability `share`, at least 0 and below 1; `None` where nothing is. `key` stands for run, step
    /// and batch.
    pub fn new(share: f32, key: u64) -> Option<Self> {
        (share > 0.0).then_some(Self { share, key })
    }

    /// That of another part of the batch.
    #[must_use]
    pub fn part(self, first_row: usize) -> Self {
        Self { key: mix(self.key.wrapping_add(first_row as u64)), ..self }
    }

    /// x `[tokens, inputs]` as it goes into the adapter of a layer.
    pub(crate) fn of(self, layer: &str, x: &Tensor, backend: &dyn Backend) -> Tensor {
        let mut dropped = backend.zeros(x.rows(), x.cols());
        backend.add(&mut dropped, x);
        self.apply(layer, &mut dropped);
        dropped
    }

    /// Drops from x in its place.
    pub(crate) fn apply(self, layer: &str, x: &mut Tensor) {
        // FNV-1a of the name.
        let name = layer
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let key = mix(self.key ^ name);
        // The share to one part in 2³².
        let limit = (f64::from(self.share) * f64::from(u32::MAX)) as u32;
        let factor = 1.0 / (1.0 - self.share);
        for (i, value) in x.host_mut().iter_mut().enumerate() {
            let word = (mix(key.wrapping_add(i as u64)) >> 32) as u32;
            *value = if word < limit { 0.0 } else { *value * factor };
        }
    }
}

/// SplitMix64's output function (Steele et al. 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use fourfold_kernels::Reference;

    use super::*;

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        assert_eq!(Dropout::new(0.0, 1), None);
        let dropout = Dropout::new(0.25, 1).unwrap();
        let mut ones = Tensor::zeros(100, 400);
        ones.host_mut().fill(1.0);
        let of = |dropout: Dropout, layer: &str| dropout.of(layer, &ones, &Reference).into_host();
        let values = of(dropout, "a");
        let kept = values.iter().filter(|&&v| v != 0.0).count() as f32 / values.len() as f32;
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((kept - 0.75).abs() < 0.01 && (mean - 1.0).abs() < 0.02, "{kept} kept, mean {mean}");
        assert!(values.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(of(dropout, "a"), values);
        for other in [of(dropout, "b"), of(dropout.part(3), "a"), of(Dropout::new(0.25, 2).unwrap(), "a")] {
            let same = values.iter().zip(&other).filter(|(a, b)| a == b).count() as f32 / values.len() as f32;
            assert!((same - 0.625).abs() < 0.02, "masks have nothing to do with each other: {same}");
        }
    }
}
