//! The gated feed-forward: `down(silu(gate(x)) ⊙ up(x))` (SwiGLU, Shazeer 2020).

use fourfold_kernels::{Input, Tensor};

use super::{Gradients, Linear, LinearSpec, Pass, TrainPass};
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// The shape of a gated feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    /// Input and output features.
    pub hidden: usize,
    /// Features between.
    pub intermediate: usize,
    /// Whether the three projections have biases.
    pub bias: bool,
    /// What its weights are for: a dense block's, a shared or a routed expert's.
    pub role: Role,
}

impl MlpSpec {
    fn linears(&self, prefix: &str) -> [LinearSpec; 3] {
        let linear = |part: &str, outputs, inputs| LinearSpec {
            name: format!("{prefix}.{part}"),
            outputs,
            inputs,
            bias: self.bias,
            role: self.role,
        };
        [
            linear("gate_proj", self.intermediate, self.hidden),
            linear("up_proj", self.intermediate, self.hidden),
            linear("down_proj", self.hidden, self.intermediate),
        ]
    }

    /// Its tensors below `prefix`.
    pub fn weights(&self, prefix: &str) -> impl Iterator<Item = WeightSpec> {
        self.linears(prefix).into_iter().flat_map(|linear| linear.weights().collect::<Vec<_>>())
    }

    /// f32 elements that training keeps of the forward over `tokens` ([`MlpSaved`]).
    pub fn saved_elements(&self, tokens: u64) -> u64 {
        tokens * 2 * self.intermediate as u64
    }

    /// f32 elements alive at the peak of the forward over `tokens`, input and output not counted: gate and up.
    pub fn scratch_elements(&self, tokens: u64) -> u64 {
        tokens * 2 * self.intermediate as u64
    }
}

/// A gated feed-forward.
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    pub(crate) fn load(spec: &MlpSpec, prefix: &str, loader: &Loader) -> Result<Self, ModelError> {
        let [gate, up, down] = spec.linears(prefix);
        Ok(Self {
            gate: Linear::load(&gate, loader)?,
            up: Linear::load(&up, loader)?,
            down: Linear::load(&down, loader)?,
        })
    }

    /// x `[tokens, hidden]` to the same shape.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let [gate, up] = Linear::forward_shared([&self.gate, &self.up], x, pass);
        let inner = pass.backend.swiglu(gate, &up);
        self.down.forward(&inner, pass)
    }

    /// `sum += y`, with y as of [`Mlp::forward`].
    pub fn forward_add(&self, x: &Tensor, sum: &mut Tensor, pass: &mut Pass) {
        let [gate, up] = Linear::forward_shared([&self.gate, &self.up], x, pass);
        let inner = pass.backend.swiglu(gate, &up);
        self.down.forward_add(&inner, sum, pass);
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.gate.byte_len() + self.up.byte_len() + self.down.byte_len()
    }

    /// As [`Mlp::forward`], and what [`Mlp::backward`] needs besides `x`: 2 · intermediate elements a token.
    pub fn train_forward<'a>(&self, x: impl Into<Input<'a>>, pass: &TrainPass) -> (Tensor, MlpSaved) {
        let saved = self.recompute(x, pass);
        let inner = pass.backend.swiglu_for_products(&saved.gate, &saved.up, self.down.rounds_input(pass));
        let [y] = Linear::train_forward_shared([&self.down], inner.input(), pass);
        (y, saved)
    }

    /// What [`Mlp::train_forward`] saves, without its output.
    pub fn recompute<'a>(&self, x: impl Into<Input<'a>>, pass: &TrainPass) -> MlpSaved {
        let [gate, up] = Linear::train_forward_shared([&self.gate, &self.up], x, pass);
        MlpSaved { gate, up }
    }

    /// Whether the gradient of its output may be rounded in [`Mlp::weighted_backward`].
    pub(crate) fn rounds_gradient(&self, pass: &TrainPass) -> bool {
        self.down.rounds_gradient(pass)
    }

    /// Whether its input may be rounded in training.
    pub(crate) fn rounds_input(&self, pass: &TrainPass) -> bool {
        self.gate.rounds_input(pass) && self.up.rounds_input(pass)
    }

    /// The gradient of `x`. The product of gate and up is computed anew.
    pub fn backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        saved: MlpSaved,
        dy: &Tensor,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let MlpSaved { gate, up } = saved;
        let inner = pass.backend.swiglu_for_products(&gate, &up, self.down.rounds_input(pass));
        self.down.weight_backward(inner.input(), dy, pass, gradients);
        drop(inner);
        let d_inner = self.down.input_backward(dy, None, pass);
        self.gates_backward(x, gate, up, d_inner, pass, gradients)
    }

    /// The gradient of `x` from that of gate times up.
    fn gates_backward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        gate: Tensor,
        up: Tensor,
        d_inner: Tensor,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let rounded = self.gate.rounds_gradient(pass) && self.up.rounds_gradient(pass);
        let [d_gate, d_up] = pass.backend.swiglu_backward_for_products(gate, up, d_inner, rounded);
        Linear::backward_shared([(&self.gate, d_gate.input()), (&self.up, d_up.input())], x, pass, gradients)
    }

    /// As [`Mlp::backward`], where each row of the output was multiplied by a factor: dy is the gradient of the products. The
    /// gradients of x and of the factors, `df = dy · mlp(x)`.
    ///
    /// The output is not needed for these: with `u = dy · down`, `df = u · inner` and `d_inner = f u`. Of the weight's gradient
    /// `(f dy)ᵀ · inner = dyᵀ · (f inner)` the narrower factor is scaled.
    pub(crate) fn weighted_backward(
        &self,
        x: Input,
        saved: MlpSaved,
        dy: Input,
        factors: &[f32],
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> (Tensor, Vec<f32>) {
        let MlpSaved { gate, up } = saved;
        let mut inner = pass.backend.swiglu_of(&gate, &up);
        let mut d_inner = self.down.input_backward(dy, None, pass);
        let mut d_factors = pass.backend.row_dots(&d_inner, &inner);
        if let Some(bias) = self.down.arg().bias {
            let mut dy = dy.tensor().clone();
            let of_bias = pass.backend.row_dots(&dy, &pass.backend.gather_rows(bias, &vec![0; dy.rows()]));
            d_factors.iter_mut().zip(of_bias).for_each(|(d, of_bias)| *d += of_bias);
            pass.backend.scale_rows(&mut dy, factors);
            self.down.bias_backward(&dy, pass, gradients);
        }
        pass.backend.scale_rows(&mut inner, factors);
        self.down.product_backward((&inner).into(), dy, pass, gradients);
        drop(inner);
        pass.backend.scale_rows(&mut d_inner, factors);
        (self.gates_backward(x, gate, up, d_inner, pass, gradients), d_factors)
    }
}

/// What [`Mlp::backward`] needs of the forward, `[tokens, intermediate]` each.
pub struct MlpSaved {
    gate: Tensor,
    up: Tensor,
}
