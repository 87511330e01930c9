//! Batch normalisation (Ioffe & Szegedy 2015) of each channel.

use fourfold_kernels::backward::Backward;
use fourfold_kernels::spatial::Moments;
use fourfold_kernels::{Reference, Tensor};
use fourfold_tensor::WeightSource;

use super::Gradients;
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// The shape and name of a batch normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNormSpec {
    /// Name without `.weight`.
    pub name: String,
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Share of a batch in the running statistics.
    pub momentum: f32,
}

impl BatchNormSpec {
    /// Its tensors, each `[channels]`: factor and summand, which are trained, and the running statistics, which are counted.
    pub fn weights(&self) -> impl Iterator<Item = WeightSpec> {
        let parts = [
            ("weight", Role::Norm),
            ("bias", Role::Bias),
            ("running_mean", Role::RunningMean),
            ("running_var", Role::RunningVariance),
        ];
        parts.into_iter().map(|(part, role)| WeightSpec {
            name: format!("{}.{part}", self.name),
            shape: vec![self.channels],
            role,
            block: None,
        })
    }
}

impl BatchNormSpec {
    /// Factor and summand of each channel, with the running statistics of `source`: what a convolution before it can take over.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn affine(&self, source: &dyn WeightSource) -> Result<(Tensor, Tensor), ModelError> {
        Ok(BatchNorm::load(self, &Loader::new(source, &Reference))?.affine())
    }
}

/// What a batch adds to a running statistic, which is counted and not trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistic {
    /// The tensor.
    pub name: String,
    /// The batch's mean or variance, `[1, channels]`.
    pub value: Tensor,
    /// Its share in the statistic that follows.
    pub momentum: f32,
}

impl Statistic {
    /// The running statistic after the batch.
    pub fn after(&self, before: &[f32]) -> Vec<f32> {
        let (m, values) = (self.momentum, self.value.host());
        before.iter().zip(values).map(|(&old, &new)| (1.0 - m) * old + m * new).collect()
    }
}

/// `(x − mean) / √(variance + eps) · weight + bias`.
pub struct BatchNorm {
    spec: BatchNormSpec,
    weight: Tensor,
    bias: Tensor,
    running: Moments,
}

impl BatchNorm {
    pub(crate) fn load(spec: &BatchNormSpec, loader: &Loader) -> Result<Self, ModelError> {
        let vector = |part: &str| loader.vector(&format!("{}.{part}", spec.name), spec.channels);
        let running = Moments { mean: vector("running_mean")?, variance: vector("running_var")? };
        Ok(Self { spec: spec.clone(), weight: vector("weight")?, bias: vector("bias")?, running })
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        4 * self.spec.channels * size_of::<f32>()
    }

    fn affine(&self) -> (Tensor, Tensor) {
        self.affine_with(&self.running)
    }

    fn affine_with(&self, moments: &Moments) -> (Tensor, Tensor) {
        let channels = self.spec.channels;
        let factor = |(&w, &v): (&f32, &f32)| w / (v + self.spec.eps).sqrt();
        let scale: Vec<f32> = self.weight.host().iter().zip(moments.variance.host()).map(factor).collect();
        let means = moments.mean.host().iter().zip(&scale);
        let shift = self.bias.host().iter().zip(means).map(|(&b, (&m, &s))| b - m * s).collect();
        (Tensor::new(1, channels, scale), Tensor::new(1, channels, shift))
    }

    /// With the running statistics.
    pub fn forward(&self, mut x: Tensor, backend: &dyn Backward) -> Tensor {
        let (scale, shift) = self.affine();
        backend.scale_shift(&mut x, &scale, &shift);
        x
    }

    /// With statistics of the batch, [`Backward`]'s `moments` of `x`.
    pub fn train_forward(&self, mut x: Tensor, moments: &Moments, backend: &dyn Backward) -> Tensor {
        let (scale, shift) = self.affine_with(moments);
        backend.scale_shift(&mut x, &scale, &shift);
        x
    }

    /// What a batch of `rows` pixels adds to the running statistics. The variance is counted with n − 1, as PyTorch does.
    pub fn statistics(&self, moments: &Moments, rows: usize) -> [Statistic; 2] {
        let unbiased = rows as f32 / (rows.max(2) - 1) as f32;
        let variance = moments.variance.host().iter().map(|v| unbiased * v).collect();
        let variance = Tensor::new(1, self.spec.channels, variance);
        [("running_mean", moments.mean.clone()), ("running_var", variance)].map(|(part, value)| Statistic {
            name: format!("{}.{part}", self.spec.name),
            value,
            momentum: self.spec.momentum,
        })
    }

    /// The gradient of `x`, in place of `dy`; adds weight's and bias's.
    pub fn backward(
        &self,
        x: &Tensor,
        moments: &Moments,
        mut dy: Tensor,
        backend: &dyn Backward,
        gradients: &mut Gradients,
    ) -> Tensor {
        let channels = self.spec.channels;
        let (weight, bias) = (format!("{}.weight", self.spec.name), format!("{}.bias", self.spec.name));
        let (mut dw, mut db) = (Tensor::zeros(1, channels), Tensor::zeros(1, channels));
        backend.batch_norm_backward(x, moments, self.spec.eps, &self.weight, &mut dy, &mut dw, &mut db);
        for (name, gradient) in [(weight, dw), (bias, db)] {
            if let Some(sum) = gradients.of(&name, 1, channels) {
                backend.add(sum, &gradient);
            }
        }
        dy
    }
}
