//! `y = x · Wᵀ + b`.

use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::{Backend, DeviceWeight, Input, LinearArg, Tensor};

use super::lora::Lora;
use super::{Gradients, Pass, TrainPass};
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// The shape and name of a linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Name without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Output features.
    pub outputs: usize,
    /// Input features.
    pub inputs: usize,
    /// Whether a bias is added.
    pub bias: bool,
    /// What the weight is for.
    pub role: Role,
}

impl LinearSpec {
    /// Its tensors: weight `[outputs, inputs]`, and bias `[outputs]` where there is one.
    pub fn weights(&self) -> impl Iterator<Item = WeightSpec> {
        let weight = WeightSpec {
            name: format!("{}.weight", self.name),
            shape: vec![self.outputs, self.inputs],
            role: self.role,
            block: None,
        };
        let bias = self.bias.then(|| WeightSpec {
            name: format!("{}.bias", self.name),
            shape: vec![self.outputs],
            role: Role::Bias,
            block: None,
        });
        std::iter::once(weight).chain(bias)
    }
}

/// A linear layer: a weight in its backend's layout, its name, perhaps a bias, perhaps an adapter ([`super::LoraSpec`]).
pub struct Linear {
    name: String,
    weight: Arc<DeviceWeight>,
    bias: Option<Tensor>,
    lora: Option<Lora>,
}

impl Linear {
    pub(crate) fn load(spec: &LinearSpec, loader: &Loader) -> Result<Self, ModelError> {
        let name = format!("{}.weight", spec.name);
        let weight = loader.matrix(&name, spec.outputs, spec.inputs)?;
        Self::with_weight(spec, name, weight, loader)
    }

    /// As [`Linear::load`], with the weight widened to f32.
    pub(crate) fn load_f32(spec: &LinearSpec, loader: &Loader) -> Result<Self, ModelError> {
        let name = format!("{}.weight", spec.name);
        let weight = loader.matrix_f32(&name, spec.outputs, spec.inputs)?;
        Self::with_weight(spec, name, weight, loader)
    }

    /// A layer over a weight that another layer holds too (tied embeddings).
    pub(crate) fn shared(name: String, weight: Arc<DeviceWeight>) -> Self {
        Self { name, weight, bias: None, lora: None }
    }

    fn with_weight(
        spec: &LinearSpec,
        name: String,
        weight: Arc<DeviceWeight>,
        loader: &Loader,
    ) -> Result<Self, ModelError> {
        let bias = if spec.bias { Some(loader.vector(&format!("{}.bias", spec.name), spec.outputs)?) } else { None };
        Ok(Self { name, weight, bias, lora: Lora::load(spec, loader)? })
    }

    /// The weight tensor's full name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of weight, bias and adapter in memory.
    pub fn byte_len(&self) -> usize {
        let bias = self.bias.as_ref().map_or(0, |b| b.cols() * size_of::<f32>());
        self.weight.byte_len() + bias + self.lora.as_ref().map_or(0, Lora::byte_len)
    }

    /// Output features `rows` alone, without a bias: x `[tokens, inputs]` to `[tokens, rows.len()]`.
    pub(crate) fn rows(&self, x: &Tensor, rows: Range<usize>, backend: &dyn Backend) -> Tensor {
        let mut y = backend.linear_rows(x, &self.weight, rows.clone());
        if let Some(lora) = &self.lora {
            lora.add_to(&mut y, x, rows, None, backend);
        }
        y
    }

    /// `x · W[rows, :]`: x `[tokens, rows.len()]` to `[tokens, inputs]`.
    pub(crate) fn transposed(&self, x: &Tensor, rows: Range<usize>, backend: &dyn Backend) -> Tensor {
        let mut y = backend.linear_transposed(x, &self.weight, rows.clone());
        if let Some(lora) = &self.lora {
            lora.add_transposed_to(&mut y, x, rows, None, backend);
        }
        y
    }

    /// x `[tokens, inputs]` to `[tokens, outputs]`.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let [y] = Self::forward_shared([self], x, pass);
        y
    }

    /// `sum += y`, with y as of [`Linear::forward`].
    pub fn forward_add(&self, x: &Tensor, sum: &mut Tensor, pass: &mut Pass) {
        if self.lora.is_some() {
            let y = self.forward(x, pass);
            return pass.backend.add(sum, &y);
        }
        pass.observer.linear_input(&self.name, x);
        pass.backend.linear_add(x, self.arg(), sum);
    }

    /// Several layers over one input, which is prepared once.
    pub fn forward_shared<const N: usize>(layers: [&Self; N], x: &Tensor, pass: &mut Pass) -> [Tensor; N] {
        for layer in layers {
            pass.observer.linear_input(&layer.name, x);
        }
        let args = layers.map(Self::arg);
        let mut outputs = pass.backend.linear(x, &args);
        for (layer, y) in layers.into_iter().zip(&mut outputs) {
            if let Some(lora) = &layer.lora {
                lora.add_to(y, x, 0..layer.weight.rows(), pass.dropout, pass.backend);
            }
        }
        outputs.try_into().unwrap_or_else(|_| unreachable!("one output a weight"))
    }

    /// What [`fourfold_kernels::Backend::linear`] takes.
    pub(crate) fn arg(&self) -> LinearArg<'_> {
        LinearArg { weight: &self.weight, bias: self.bias.as_ref() }
    }

    /// As [`Linear::forward_shared`], in training.
    pub(crate) fn train_forward_shared<'a, const N: usize>(
        layers: [&Self; N],
        x: impl Into<Input<'a>>,
        pass: &TrainPass,
    ) -> [Tensor; N] {
        match x.into() {
            Input::F32(x) => pass.run(|pass| Self::forward_shared(layers, x, pass)),
            rounded @ Input::Rounded(_) => {
                let outputs = pass.backend.linear_of(rounded, &layers.map(Self::arg));
                outputs.try_into().unwrap_or_else(|_| unreachable!("one output a weight"))
            }
        }
    }

    /// Whether its input may be rounded in training ([`fourfold_kernels::Rounded`]).
    pub(crate) fn rounds_input(&self, pass: &TrainPass) -> bool {
        self.lora.is_none() && pass.backend.rounds(&self.weight)
    }

    /// Whether the gradient of its output may be rounded too: a bias takes the sum of the unrounded one.
    pub(crate) fn rounds_gradient(&self, pass: &TrainPass) -> bool {
        self.bias.is_none() && self.rounds_input(pass)
    }

    /// `dx = dy · W`, and adds `dyᵀ · x` and `Σ dy` to the gradients of weight and bias. x `[tokens, inputs]`, dy
    /// `[tokens, outputs]`.
    pub fn backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        dy: impl Into<Input<'a>>,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let dy = dy.into();
        self.weight_backward(x, dy, pass, gradients);
        self.input_backward(dy, None, pass)
    }

    /// The gradient of the input alone, added to `sum` where there is one.
    pub(crate) fn input_backward<'a>(&self, dy: impl Into<Input<'a>>, sum: Option<Tensor>, pass: &TrainPass) -> Tensor {
        let dy = dy.into();
        let mut dx = pass.backend.input_gradient(dy, &self.weight, sum);
        if let Some(lora) = &self.lora {
            lora.add_transposed_to(&mut dx, dy.tensor(), 0..self.weight.rows(), pass.dropout, pass.backend);
        }
        dx
    }

    /// The gradients of weight, bias and adapter alone.
    pub(crate) fn weight_backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        dy: impl Into<Input<'a>>,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) {
        let dy = dy.into();
        self.product_backward(x.into(), dy, pass, gradients);
        if self.bias.is_some() {
            self.bias_backward(dy.tensor(), pass, gradients);
        }
    }

    /// The gradients of weight and adapter alone.
    pub(crate) fn product_backward(&self, x: Input, dy: Input, pass: &TrainPass, gradients: &mut Gradients) {
        if let Some(lora) = &self.lora {
            lora.weight_backward(x.tensor(), dy.tensor(), pass, gradients);
        }
        let shape = [self.weight.rows(), self.weight.cols()];
        gradients.add_product(&self.name, shape, 0..shape[0], [x, dy], pass.backend);
    }

    /// The gradient of the bias alone.
    pub(crate) fn bias_backward(&self, dy: &Tensor, pass: &TrainPass, gradients: &mut Gradients) {
        if let (Some(bias), Some(stem)) = (&self.bias, self.name.strip_suffix(".weight"))
            && let Some(db) = gradients.of(&format!("{stem}.bias"), 1, bias.cols())
        {
            pass.backend.bias_gradient(dy, db);
        }
    }

    /// Several layers over one input: the sum of their gradients of it.
    pub(crate) fn backward_shared<'a, const N: usize>(
        layers: [(&Self, Input); N],
        x: impl Into<Input<'a>>,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let x = x.into();
        let mut sum = None;
        for (layer, dy) in layers {
            layer.weight_backward(x, dy, pass, gradients);
            sum = Some(layer.input_backward(dy, sum, pass));
        }
        sum.unwrap_or_else(|| pass.backend.zeros(x.rows(), x.cols()))
    }
}
