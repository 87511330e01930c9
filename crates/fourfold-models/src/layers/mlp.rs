//! The gated feed-forward: `down(silu(gate(x)) ⊙ up(x))` (SwiGLU, Shazeer 2020).

use fourfold_kernels::Tensor;

use super::{Linear, LinearSpec, Pass};
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

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.gate.byte_len() + self.up.byte_len() + self.down.byte_len()
    }
}
