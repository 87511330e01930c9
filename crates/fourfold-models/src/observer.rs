//! Seeing what linear layers are given: how calibration collects its statistics.

use fourfold_kernels::Tensor;

/// Told of the input of every linear layer, before the multiplication.
pub trait Observer {
    /// `input` `[tokens, in]` is about to be multiplied by the weight named `weight_name`
    /// (`model.layers.0.self_attn.q_proj.weight`). Weights that share an input are each told of, in turn.
    fn linear_input(&mut self, weight_name: &str, input: &Tensor);
}

/// Looks at nothing.
pub struct NoObserver;

impl Observer for NoObserver {
    fn linear_input(&mut self, _weight_name: &str, _input: &Tensor) {}
}
