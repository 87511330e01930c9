//! The operations that training needs besides [`Backend`]'s: the gradient of each, written by hand.
//!
//! Notation: `dx` is the gradient of the loss with respect to `x`, of the same shape. The gradient of a linear layer's input is
//! `dy · W`, which is [`Backend::linear_transposed`] over all rows.

use std::ops::Range;

use fourfold_tensor::{Mask, Tuning};
use half::bf16;

use crate::spatial::Spatial;
use crate::{Backend, Bf16Tensor, DeviceWeight, Input, LinearArg, Prepared, RopeSpec, Tensor};

/// Elements of a weight's gradient computed at a time where only part of it is kept: 2 MB.
const CHUNK: usize = 1 << 19;

/// Target of a token whose prediction is not scored.
pub const IGNORE: u32 = u32::MAX;

/// The shape of self-attention over packed documents.
#[derive(Clone, Copy, Debug)]
pub struct SelfAttention<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads head `h · kv_heads / heads`.
    pub kv_heads: usize,
    /// Elements of a query and a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// With a sliding window of w, a query at position p sees keys `p − w + 1 ..= p`.
    pub window: Option<usize>,
    /// The documents: consecutive ranges of rows that together are all rows. A query sees its own document alone.
    pub documents: &'a [Range<usize>],
}

/// What [`Backward::attention_forward`] keeps for the way back.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOutput {
    /// `[tokens, heads · value_dim]`.
    pub y: Tensor,
    /// `[tokens, heads]`: logarithm of the sum of exponentials of a query's scaled scores.
    pub lse: Tensor,
}

/// Gradients of an attention's inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionGradient {
    /// `[tokens, heads · key_dim]`.
    pub dq: Tensor,
    /// `[tokens, kv_heads · key_dim]`.
    pub dk: Tensor,
    /// `[tokens, kv_heads · value_dim]`.
    pub dv: Tensor,
}

/// How a student learns a teacher's distribution (Hinton et al. 2015, section 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftTargets {
    /// T: both distributions are softmax(logits / T), and their divergence counts T².
    pub temperature: f32,
    /// w: the loss is w · divergence + (1 − w) · cross-entropy against the target.
    pub weight: f32,
}

/// A backend that can train.
pub trait Backward: Backend + Spatial {
    /// `x` rounded to bf16 (nearest, ties to even).
    fn to_bf16(&self, x: &Tensor) -> Bf16Tensor {
        let mut rounded = Bf16Tensor::zeros(x.rows(), x.cols());
        self.write_bf16(x, &mut rounded);
        rounded
    }

    /// As [`Backward::to_bf16`], over a tensor of the same shape.
    fn write_bf16(&self, x: &Tensor, to: &mut Bf16Tensor) {
        assert_eq!((x.rows(), x.cols()), (to.rows(), to.cols()), "rounding into another shape");
        to.host_mut().iter_mut().zip(x.host()).for_each(|(to, &v)| *to = bf16::from_f32(v));
    }

    /// Rows `range` of `x`, widened.
    fn rows_of_bf16(&self, x: &Bf16Tensor, range: Range<usize>) -> Tensor {
        let values = &x.host()[range.start * x.cols()..range.end * x.cols()];
        // bf16 is the upper half of an f32.
        let widened = values.iter().map(|v| f32::from_bits(u32::from(v.to_bits()) << 16)).collect();
        Tensor::new(range.len(), x.cols(), widened)
    }

    /// The named rows of `x`, widened.
    fn gather_rows_of_bf16(&self, x: &Bf16Tensor, rows: &[usize]) -> Tensor {
        let row = |&r: &usize| &x.host()[r * x.cols()..(r + 1) * x.cols()];
        Tensor::new(rows.len(), x.cols(), rows.iter().flat_map(row).map(|v| v.to_f32()).collect())
    }

    /// Rows `range`.
    fn rows(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        Tensor::new(range.len(), x.cols(), x.host()[range.start * x.cols()..range.end * x.cols()].to_vec())
    }

    /// `a + b`, of equal shapes.
    fn sum(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let mut sum = a.clone();
        self.add(&mut sum, b);
        sum
    }

    /// [`Backend::swiglu`], of a `gate` that is kept.
    fn swiglu_of(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        self.swiglu(gate.clone(), up)
    }

    /// Replaces the rows of `x` from `first` on.
    fn set_rows(&self, x: &mut Tensor, first: usize, rows: &Tensor) {
        assert_eq!(x.cols(), rows.cols(), "rows of another width");
        let start = first * x.cols();
        x.host_mut()[start..start + rows.host().len()].copy_from_slice(rows.host());
    }

    /// Replaces the columns of `x` from `first` on.
    fn set_columns(&self, x: &mut Tensor, first: usize, columns: &Tensor) {
        assert_eq!(x.rows(), columns.rows(), "columns of another height");
        let cols = x.cols().max(1);
        for (i, row) in x.host_mut().chunks_exact_mut(cols).enumerate() {
            row[first..first + columns.cols()].copy_from_slice(columns.row(i));
        }
    }

    /// The gradients of [`Backend::split_heads`]'s two inputs: the shared one's is the sum over the heads.
    fn split_heads_backward(&self, dk: &Tensor, dv: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
        assert_eq!(dk.rows(), dv.rows(), "split heads: rows");
        let every_head: Vec<usize> = (0..dk.rows()).map(|row| row / heads).collect();
        let mut d_shared = Tensor::zeros(dk.rows() / heads, dk.cols() - own);
        let of_shared = self.columns(dk, own..dk.cols());
        self.scatter_add_rows(&mut d_shared, &of_shared, &every_head, &vec![1.0; dk.rows()]);
        [self.concat_columns(&self.columns(dk, 0..own), dv), d_shared]
    }

    /// Multiplies each row by its factor.
    fn scale_rows(&self, x: &mut Tensor, factors: &[f32]) {
        assert_eq!(x.rows(), factors.len(), "factors for another number of rows");
        let cols = x.cols().max(1);
        for (row, factor) in x.host_mut().chunks_mut(cols).zip(factors) {
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }

    /// Whether products with `weight`, and its gradient, round activations, so that they may be given rounded ones.
    fn rounds(&self, _weight: &DeviceWeight) -> bool {
        false
    }

    /// [`Backend::rms_norm`] for products alone, `rounded` where all of these round.
    fn rms_norm_for_products(&self, x: &Tensor, weight: &Tensor, eps: f32, _rounded: bool) -> Prepared {
        Prepared::F32(self.rms_norm(x, weight, eps))
    }

    /// [`Backend::gather_rows`] for products alone, `rounded` where all of these round.
    fn gather_rows_for_products(&self, x: &Tensor, rows: &[usize], _rounded: bool) -> Prepared {
        Prepared::F32(self.gather_rows(x, rows))
    }

    /// [`Backward::swiglu_of`] for products alone, `rounded` where all of these round.
    fn swiglu_for_products(&self, gate: &Tensor, up: &Tensor, _rounded: bool) -> Prepared {
        Prepared::F32(self.swiglu_of(gate, up))
    }

    /// [`Backward::swiglu_backward`] for products alone, `rounded` where all of these round.
    fn swiglu_backward_for_products(&self, gate: Tensor, up: Tensor, dy: Tensor, _rounded: bool) -> [Prepared; 2] {
        let (d_gate, d_up) = self.swiglu_backward(gate, up, &dy);
        [Prepared::F32(d_gate), Prepared::F32(d_up)]
    }

    /// [`Backend::linear`] of activations that may be rounded.
    fn linear_of(&self, x: Input, weights: &[LinearArg]) -> Vec<Tensor> {
        self.linear(x.tensor(), weights)
    }

    /// `dy · W`, added to `sum` where there is one.
    fn input_gradient(&self, dy: Input, weight: &DeviceWeight, sum: Option<Tensor>) -> Tensor {
        let dx = self.linear_transposed(dy.tensor(), weight, 0..weight.rows());
        match sum {
            None => dx,
            Some(mut sum) => {
                self.add(&mut sum, &dx);
                sum
            }
        }
    }

    /// `dw += dyᵀ · x`: x `[tokens, in]`, dy `[tokens, out]`, dw `[out, in]`.
    fn linear_weight_gradient(&self, x: &Tensor, dy: &Tensor, dw: &mut Tensor);

    /// [`Backward::linear_weight_gradient`] of factors that may be rounded.
    fn weight_gradient_of(&self, x: Input, dy: Input, dw: &mut Tensor) {
        self.linear_weight_gradient(x.tensor(), dy.tensor(), dw);
    }

    /// [`Backward::weight_gradient_of`] of zeros.
    fn new_weight_gradient_of(&self, x: Input, dy: Input) -> Tensor {
        self.new_linear_weight_gradient(x.tensor(), dy.tensor())
    }

    /// `dyᵀ · x`, as [`Backward::linear_weight_gradient`] of zeros.
    fn new_linear_weight_gradient(&self, x: &Tensor, dy: &Tensor) -> Tensor {
        let mut dw = Tensor::zeros(dy.cols(), x.cols());
        self.linear_weight_gradient(x, dy, &mut dw);
        dw
    }

    /// As [`Backward::linear_weight_gradient`] for a pruned weight's rows `rows`, of what is kept alone: dy `[tokens, rows.len()]`,
    /// dw `[1, kept]` in the mask's order. Some rows are computed at a time, so that the whole gradient is never in memory.
    fn kept_weight_gradient(&self, x: &Tensor, dy: &Tensor, mask: &Mask, rows: Range<usize>, dw: &mut Tensor) {
        assert_eq!((mask.cols(), mask.kept(), rows.len()), (x.cols(), dw.cols(), dy.cols()), "kept gradient: shapes");
        let step = (CHUNK / mask.cols().max(1)).max(1);
        for first in rows.clone().step_by(step) {
            let part = first..(first + step).min(rows.end);
            let dy = self.columns(dy, part.start - rows.start..part.end - rows.start);
            let whole = self.new_linear_weight_gradient(x, &dy);
            for (r, row) in part.clone().map(|r| (r, whole.row(r - part.start))) {
                let kept = dw.host_mut()[mask.values(r)].iter_mut().zip(mask.columns(r));
                kept.for_each(|(d, c)| *d += row[c]);
            }
        }
    }

    /// As [`Backward::kept_weight_gradient`] for the numbers that are learned of a packed weight: dw `[1, tuning.len()]`.
    fn tuned_weight_gradient(&self, x: &Tensor, dy: &Tensor, tuning: &Tuning, rows: Range<usize>, dw: &mut Tensor) {
        let cols = x.cols();
        assert_eq!((tuning.base().cols(), tuning.len(), rows.len()), (cols, dw.cols(), dy.cols()), "tuned gradient");
        let step = (CHUNK / cols.max(1)).max(1);
        for first in rows.clone().step_by(step) {
            let part = first..(first + step).min(rows.end);
            let dy = self.columns(dy, part.start - rows.start..part.end - rows.start);
            self.tuned_rows_gradient(&self.new_linear_weight_gradient(x, &dy), tuning, first, dw);
        }
    }

    /// Adds the gradients of the numbers learned of rows `first ..`, given the gradients `whole` `[rows, cols]` of these rows.
    fn tuned_rows_gradient(&self, whole: &Tensor, tuning: &Tuning, first: usize, dw: &mut Tensor) {
        let mut scratch = Vec::new();
        let sums = dw.host_mut()[first * tuning.per_row()..].chunks_mut(tuning.per_row());
        for (i, sums) in sums.take(whole.rows()).enumerate() {
            tuning.add_row_gradient(first + i, whole.row(i), &mut scratch, sums);
        }
    }

    /// As [`Backward::embedding_gradient`] for the numbers that are learned of a packed table: dw `[1, tuning.len()]`.
    fn tuned_embedding_gradient(&self, ids: &[u32], dy: &Tensor, tuning: &Tuning, dw: &mut Tensor) {
        let mut scratch = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            let sums = &mut dw.host_mut()[id as usize * tuning.per_row()..][..tuning.per_row()];
            tuning.add_row_gradient(id as usize, dy.row(i), &mut scratch, sums);
        }
    }

    /// `db += Σ_tokens dy`: db `[1, out]`.
    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor);

    /// `dw[ids[i]] += dy[i]`: the gradient of a table of embeddings, `[vocabulary, hidden]`.
    fn embedding_gradient(&self, ids: &[u32], dy: &Tensor, dw: &mut Tensor);

    /// The gradient of [`Backend::rms_norm`]'s input; adds its weight's to `dweight`.
    fn rms_norm_backward(&self, x: &Tensor, weight: &Tensor, eps: f32, dy: &Tensor, dweight: &mut Tensor) -> Tensor;

    /// The gradient of [`Backend::rope`]'s input, in place: the rotation backwards.
    fn rope_backward(&self, dx: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec);

    /// The gradients of [`Backend::swiglu`]'s `gate` and `up`, in whose memory they are returned.
    fn swiglu_backward(&self, gate: Tensor, up: Tensor, dy: &Tensor) -> (Tensor, Tensor);

    /// Causal self-attention inside each document: q `[tokens, heads · key_dim]`, k `[tokens, kv_heads · key_dim]`,
    /// v `[tokens, kv_heads · value_dim]`. Never holds tokens x tokens.
    fn attention_forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, spec: &SelfAttention) -> AttentionOutput;

    /// Its gradients, from probabilities computed anew block by block (FlashAttention-2, Dao 2023, section 3.1.2).
    fn attention_backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &AttentionOutput,
        dy: &Tensor,
        spec: &SelfAttention,
    ) -> AttentionGradient;

    /// `a[i] · b[i]` for each row i of two tensors of equal shapes: the gradient of a factor that scaled a row.
    fn row_dots(&self, a: &Tensor, b: &Tensor) -> Vec<f32> {
        assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "row dots: shapes");
        let dot = |r| a.row(r).iter().zip(b.row(r)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>() as f32;
        (0..a.rows()).map(dot).collect()
    }

    /// Cross-entropy of each row of `logits` `[tokens, vocabulary]` against its target, in nats; 0 for [`IGNORE`]. Replaces
    /// the logits by the gradient of `factor · Σ losses`: `factor · (softmax − onehot)`.
    fn cross_entropy(&self, logits: &mut Tensor, targets: &[u32], factor: f32) -> Vec<f32>;

    /// Loss of each row of `logits` `[tokens, vocabulary]` against a teacher's logits of the same shape, in nats; 0 where the
    /// target is [`IGNORE`]:
    ///
    /// ```text
    /// w · T² · KL(softmax(teacher / T) ‖ softmax(logits / T)) + (1 − w) · cross-entropy(softmax(logits), target)
    /// ```
    ///
    /// Replaces the logits by the gradient of `factor · Σ losses`.
    fn distillation(
        &self,
        logits: &mut Tensor,
        teacher: Tensor,
        targets: &[u32],
        soft: SoftTargets,
        factor: f32,
    ) -> Vec<f32>;
}
