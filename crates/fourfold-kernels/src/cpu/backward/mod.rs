//! The way back, on the CPU.

mod distill;
mod rowwise;

use std::ops::Range;

use fourfold_tensor::Tuning;

use super::weight::CpuWeight;
use super::{Cpu, attention, dense, elementwise, rows};
use crate::backward::{AttentionGradient, AttentionOutput, Backward, SelfAttention, SoftTargets};
use crate::{Backend, Bf16Tensor, DeviceWeight, Input, LinearArg, Prepared, RopeSpec, Rounded, Tensor};

impl Backward for Cpu {
    fn write_bf16(&self, x: &Tensor, to: &mut Bf16Tensor) {
        assert_eq!((x.rows(), x.cols()), (to.rows(), to.cols()), "rounding into another shape");
        dense::write_bf16(self.context(), x.host(), to.host_mut());
    }

    fn rows_of_bf16(&self, x: &Bf16Tensor, range: Range<usize>) -> Tensor {
        rows::rows_of_bf16(&self.pool, x, range)
    }

    fn rows(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        rows::rows(&self.pool, x, range)
    }

    fn set_rows(&self, x: &mut Tensor, first: usize, rows: &Tensor) {
        rows::set_rows(&self.pool, x, first, rows);
    }

    fn set_columns(&self, x: &mut Tensor, first: usize, columns: &Tensor) {
        rows::set_columns(&self.pool, x, first, columns);
    }

    fn split_heads_backward(&self, dk: &Tensor, dv: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
        rows::split_heads_backward(&self.pool, dk, dv, heads, own)
    }

    fn scale_rows(&self, x: &mut Tensor, factors: &[f32]) {
        rows::scale_rows(&self.pool, x, factors);
    }

    fn row_dots(&self, a: &Tensor, b: &Tensor) -> Vec<f32> {
        rows::row_dots(&self.pool, a, b)
    }

    fn sum(&self, a: &Tensor, b: &Tensor) -> Tensor {
        elementwise::sum(&self.pool, a, b)
    }

    fn swiglu_of(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        elementwise::swiglu_of(&self.pool, self.isa, gate, up)
    }

    fn rounds(&self, weight: &DeviceWeight) -> bool {
        weight.get::<CpuWeight>().reads_rounded(self.context())
    }

    fn rms_norm_for_products(&self, x: &Tensor, weight: &Tensor, eps: f32, rounded: bool) -> Prepared {
        match rounded {
            true => Prepared::Rounded(elementwise::rms_norm_rounded(self.context(), x, weight, eps)),
            false => Prepared::F32(self.rms_norm(x, weight, eps)),
        }
    }

    fn gather_rows_for_products(&self, x: &Tensor, rows: &[usize], rounded: bool) -> Prepared {
        match rounded {
            true => {
                let lanes = dense::Lanes::gathered_pairs(self.context(), x, rows);
                Prepared::Rounded(Rounded::new(rows.len(), x.cols(), lanes))
            }
            false => Prepared::F32(self.gather_rows(x, rows)),
        }
    }

    fn swiglu_for_products(&self, gate: &Tensor, up: &Tensor, rounded: bool) -> Prepared {
        match rounded {
            true => Prepared::Rounded(elementwise::swiglu_rounded(self.context(), gate, up)),
            false => Prepared::F32(self.swiglu_of(gate, up)),
        }
    }

    fn swiglu_backward_for_products(&self, gate: Tensor, up: Tensor, dy: Tensor, rounded: bool) -> [Prepared; 2] {
        match rounded {
            true => rowwise::swiglu_backward_rounded(self.context(), &gate, &up, &dy).map(Prepared::Rounded),
            false => <[Tensor; 2]>::from(self.swiglu_backward(gate, up, &dy)).map(Prepared::F32),
        }
    }

    fn linear_of(&self, x: Input, weights: &[LinearArg]) -> Vec<Tensor> {
        match x {
            Input::F32(x) => self.linear(x, weights),
            Input::Rounded(x) => {
                let args: Vec<_> =
                    weights.iter().map(|arg| arg.weight.get::<CpuWeight>().dense_arg(arg.bias)).collect();
                dense::linear_rounded(self.context(), x, &args)
            }
        }
    }

    fn input_gradient(&self, dy: Input, weight: &DeviceWeight, sum: Option<Tensor>) -> Tensor {
        weight.get::<CpuWeight>().input_gradient(self.context(), dy, weight.rows(), sum)
    }

    fn linear_weight_gradient(&self, x: &Tensor, dy: &Tensor, dw: &mut Tensor) {
        self.weight_gradient_of(x.into(), dy.into(), dw);
    }

    fn new_linear_weight_gradient(&self, x: &Tensor, dy: &Tensor) -> Tensor {
        self.new_weight_gradient_of(x.into(), dy.into())
    }

    fn weight_gradient_of(&self, x: Input, dy: Input, dw: &mut Tensor) {
        dense::weight_gradient(self.context(), x, dy, dw);
    }

    fn new_weight_gradient_of(&self, x: Input, dy: Input) -> Tensor {
        dense::new_weight_gradient(self.context(), x, dy)
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) {
        rowwise::bias_gradient(dy, db);
    }

    fn embedding_gradient(&self, ids: &[u32], dy: &Tensor, dw: &mut Tensor) {
        rowwise::embedding_gradient(ids, dy, dw);
    }

    fn rms_norm_backward(&self, x: &Tensor, weight: &Tensor, eps: f32, dy: &Tensor, dweight: &mut Tensor) -> Tensor {
        rowwise::rms_norm_backward(&self.pool, self.isa, x, weight, eps, dy, dweight)
    }

    fn rope_backward(&self, dx: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        elementwise::rope(&self.pool, dx, cos, sin, spec, -1.0);
    }

    fn swiglu_backward(&self, gate: Tensor, up: Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        rowwise::swiglu_backward(&self.pool, self.isa, gate, up, dy)
    }

    fn attention_forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, spec: &SelfAttention) -> AttentionOutput {
        attention::attention_forward(self.context(), q, k, v, spec)
    }

    fn attention_backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &AttentionOutput,
        dy: &Tensor,
        spec: &SelfAttention,
    ) -> AttentionGradient {
        attention::attention_backward(self.context(), [q, k, v], output, dy, spec)
    }

    fn cross_entropy(&self, logits: &mut Tensor, targets: &[u32], factor: f32) -> Vec<f32> {
        rowwise::cross_entropy(&self.pool, self.isa, logits, targets, factor)
    }

    fn distillation(
        &self,
        logits: &mut Tensor,
        teacher: Tensor,
        targets: &[u32],
        soft: SoftTargets,
        factor: f32,
    ) -> Vec<f32> {
        distill::distillation(&self.pool, self.isa, logits, teacher, targets, soft, factor)
    }

    fn tuned_rows_gradient(&self, whole: &Tensor, tuning: &Tuning, first: usize, dw: &mut Tensor) {
        let width = tuning.per_row();
        let sums = &mut dw.host_mut()[first * width..(first + whole.rows()) * width];
        // A few thousand elements an item.
        self.pool.for_chunks_mut(sums, width, (1 << 13) / whole.cols().max(1), |row, sums| {
            let mut scratch = Vec::new();
            for (i, sums) in sums.chunks_mut(width).enumerate() {
                tuning.add_row_gradient(first + row + i, whole.row(row + i), &mut scratch, sums);
            }
        });
    }
}
