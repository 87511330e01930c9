//! Gradients by their formulas, every sum in f64.

use std::ops::Range;

use super::Reference;
use crate::backward::{AttentionGradient, AttentionOutput, Backward, IGNORE, SelfAttention, SoftTargets};
use crate::{RopeSpec, Tensor};

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

impl Backward for Reference {
    fn linear_weight_gradient(&self, x: &Tensor, dy: &Tensor, dw: &mut Tensor) {
        assert_eq!((x.rows(), dw.rows(), dw.cols()), (dy.rows(), dy.cols(), x.cols()), "weight gradient: shapes");
        for o in 0..dw.rows() {
            for i in 0..dw.cols() {
                let sum: f64 = (0..x.rows()).map(|t| f64::from(dy.row(t)[o]) * f64::from(x.row(t)[i])).sum();
                let at = o * x.cols() + i;
                dw.host_mut()[at] = (f64::from(dw.host()[at]) + sum) as f32;
            }
        }
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) {
        assert_eq!(dy.cols(), db.cols(), "bias gradient: shapes");
        for o in 0..db.cols() {
            let sum: f64 = (0..dy.rows()).map(|t| f64::from(dy.row(t)[o])).sum();
            db.host_mut()[o] = (f64::from(db.host()[o]) + sum) as f32;
        }
    }

    fn embedding_gradient(&self, ids: &[u32], dy: &Tensor, dw: &mut Tensor) {
        assert_eq!((ids.len(), dw.cols()), (dy.rows(), dy.cols()), "embedding gradient: shapes");
        let cols = dw.cols();
        for (i, &id) in ids.iter().enumerate() {
            let row = &mut dw.host_mut()[id as usize * cols..][..cols];
            row.iter_mut().zip(dy.row(i)).for_each(|(w, &d)| *w += d);
        }
    }

    // With r = 1/√(mean(x²) + eps):  dx_i = r · (w_i dy_i − x_i r² · mean_j(w_j dy_j x_j)),  dw_i = dy_i x_i r.
    fn rms_norm_backward(&self, x: &Tensor, weight: &Tensor, eps: f32, dy: &Tensor, dweight: &mut Tensor) -> Tensor {
        let n = x.cols();
        assert_eq!((dy.rows(), dy.cols(), dweight.cols()), (x.rows(), n, n), "norm backward: shapes");
        let mut dx = Tensor::zeros(x.rows(), n);
        let mut sums = vec![0.0f64; n];
        for t in 0..x.rows() {
            let (x, dy) = (x.row(t), dy.row(t));
            let r = 1.0 / (dot(x, x) / n as f64 + f64::from(eps)).sqrt();
            let weighted = |i: usize| f64::from(weight.host()[i]) * f64::from(dy[i]);
            let mean: f64 = (0..n).map(|i| weighted(i) * f64::from(x[i])).sum::<f64>() / n as f64;
            for i in 0..n {
                sums[i] += f64::from(dy[i]) * f64::from(x[i]) * r;
                dx.host_mut()[t * n + i] = (r * (weighted(i) - f64::from(x[i]) * r * r * mean)) as f32;
            }
        }
        dweight.host_mut().iter_mut().zip(&sums).for_each(|(w, s)| *w = (f64::from(*w) + s) as f32);
        dx
    }

    fn rope_backward(&self, dx: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        let negative = Tensor::new(sin.rows(), sin.cols(), sin.host().iter().map(|s| -s).collect());
        super::rowwise::rope(dx, cos, &negative, spec);
    }

    // silu′(g) = σ(g) · (1 + g · (1 − σ(g))).
    fn swiglu_backward(&self, gate: Tensor, up: Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        let (mut gate, mut up) = (gate, up);
        for ((gate, up), &d) in gate.host_mut().iter_mut().zip(up.host_mut()).zip(dy.host()) {
            let (g, u, d) = (f64::from(*gate), f64::from(*up), f64::from(d));
            let sigma = 1.0 / (1.0 + (-g).exp());
            *gate = (d * u * sigma * (1.0 + g * (1.0 - sigma))) as f32;
            *up = (d * g * sigma) as f32;
        }
        (gate, up)
    }

    fn attention_forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, spec: &SelfAttention) -> AttentionOutput {
        let mut y = Tensor::zeros(q.rows(), spec.heads * spec.value_dim);
        let mut lse = Tensor::zeros(q.rows(), spec.heads);
        each_query(spec, |t, h, seen| {
            let scores = scores(q, k, spec, t, h, seen.clone());
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            lse.host_mut()[t * spec.heads + h] = (largest + total.ln()) as f32;
            for d in 0..spec.value_dim {
                let terms = scores.iter().zip(seen.clone());
                let sum: f64 =
                    terms.map(|(s, p)| (s - largest).exp() / total * f64::from(value(v, spec, p, h)[d])).sum();
                y.host_mut()[(t * spec.heads + h) * spec.value_dim + d] = sum as f32;
            }
        });
        AttentionOutput { y, lse }
    }

    // With probabilities P and D_t = dy_t · y_t:  dS_tp = P_tp (dy_t · v_p − D_t),  dq_t = scale Σ_p dS_tp k_p,
    // dk_p = scale Σ_t dS_tp q_t,  dv_p = Σ_t P_tp dy_t.
    fn attention_backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &AttentionOutput,
        dy: &Tensor,
        spec: &SelfAttention,
    ) -> AttentionGradient {
        let SelfAttention { heads, kv_heads, key_dim, value_dim, .. } = *spec;
        let scale = f64::from(spec.scale);
        let (mut dq, mut dk, mut dv) =
            (vec![0.0f64; q.host().len()], vec![0.0f64; k.host().len()], vec![0.0f64; v.host().len()]);
        each_query(spec, |t, h, seen| {
            let kv = h * kv_heads / heads;
            let range = h * value_dim..(h + 1) * value_dim;
            let dy = &dy.row(t)[range.clone()];
            let delta = dot(dy, &output.y.row(t)[range]);
            let lse = f64::from(output.lse.row(t)[h]);
            let scores = scores(q, k, spec, t, h, seen.clone());
            for (score, p) in scores.into_iter().zip(seen) {
                let probability = (score - lse).exp();
                let ds = probability * (dot(dy, value(v, spec, p, h)) - delta);
                let (query, key) = ((t * heads + h) * key_dim, (p * kv_heads + kv) * key_dim);
                for i in 0..key_dim {
                    dq[query + i] += scale * ds * f64::from(k.host()[key + i]);
                    dk[key + i] += scale * ds * f64::from(q.host()[query + i]);
                }
                let value = (p * kv_heads + kv) * value_dim;
                dy.iter().enumerate().for_each(|(i, &d)| dv[value + i] += probability * f64::from(d));
            }
        });
        let tensor = |like: &Tensor, sums: Vec<f64>| {
            Tensor::new(like.rows(), like.cols(), sums.into_iter().map(|s| s as f32).collect())
        };
        AttentionGradient { dq: tensor(q, dq), dk: tensor(k, dk), dv: tensor(v, dv) }
    }

    fn cross_entropy(&self, logits: &mut Tensor, targets: &[u32], factor: f32) -> Vec<f32> {
        assert_eq!(logits.rows(), targets.len(), "cross-entropy: a target a row");
        let vocabulary = logits.cols();
        let rows = logits.host_mut().chunks_exact_mut(vocabulary).zip(targets);
        rows.map(|(row, &target)| {
            if target == IGNORE {
                row.fill(0.0);
                return 0.0;
            }
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|&l| (f64::from(l) - f64::from(largest)).exp()).sum();
            let loss = total.ln() + f64::from(largest) - f64::from(row[target as usize]);
            for (i, l) in row.iter_mut().enumerate() {
                let probability = (f64::from(*l) - f64::from(largest)).exp() / total;
                *l = (f64::from(factor) * (probability - f64::from(u8::from(i == target as usize)))) as f32;
            }
            loss as f32
        })
        .collect()
    }

    // With q = softmax(logits / T), p = softmax(teacher / T): the loss's gradient is w T (q − p) + (1 − w) (softmax − onehot).
    fn distillation(
        &self,
        logits: &mut Tensor,
        teacher: Tensor,
        targets: &[u32],
        soft: SoftTargets,
        factor: f32,
    ) -> Vec<f32> {
        assert_eq!((logits.rows(), logits.cols()), (teacher.rows(), teacher.cols()), "distillation: shapes");
        let (t, w) = (f64::from(soft.temperature), f64::from(soft.weight));
        let mut hard = logits.clone();
        let of_targets = self.cross_entropy(&mut hard, targets, 1.0);
        let vocabulary = logits.cols();
        let rows = logits.host_mut().chunks_exact_mut(vocabulary).zip(targets).zip(of_targets).enumerate();
        rows.map(|(r, ((row, &target), of_target))| {
            if target == IGNORE {
                row.fill(0.0);
                return 0.0;
            }
            let (q, p) = (log_softmax(row, t), log_softmax(teacher.row(r), t));
            let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
            for (i, l) in row.iter_mut().enumerate() {
                let gradient = w * t * (q[i].exp() - p[i].exp()) + (1.0 - w) * f64::from(hard.row(r)[i]);
                *l = (f64::from(factor) * gradient) as f32;
            }
            (w * t * t * divergence + (1.0 - w) * f64::from(of_target)) as f32
        })
        .collect()
    }
}

/// Logarithms of `softmax(row / temperature)`.
fn log_softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scaled: Vec<f64> = row.iter().map(|&l| (f64::from(l) - f64::from(largest)) / temperature).collect();
    let total = scaled.iter().map(|l| l.exp()).sum::<f64>().ln();
    scaled.iter().map(|l| l - total).collect()
}

/// Calls `visit(token, head, keys seen)` for every query.
fn each_query(spec: &SelfAttention, mut visit: impl FnMut(usize, usize, Range<usize>)) {
    for document in spec.documents {
        for t in document.clone() {
            let first = spec.window.map_or(document.start, |w| document.start.max((t + 1).saturating_sub(w)));
            (0..spec.heads).for_each(|h| visit(t, h, first..t + 1));
        }
    }
}

fn scores(q: &Tensor, k: &Tensor, spec: &SelfAttention, t: usize, h: usize, seen: Range<usize>) -> Vec<f64> {
    let kv = h * spec.kv_heads / spec.heads;
    let query = &q.row(t)[h * spec.key_dim..(h + 1) * spec.key_dim];
    let key = |p: usize| &k.row(p)[kv * spec.key_dim..(kv + 1) * spec.key_dim];
    seen.map(|p| dot(query, key(p)) * f64::from(spec.scale)).collect()
}

fn value<'a>(v: &'a Tensor, spec: &SelfAttention, p: usize, h: usize) -> &'a [f32] {
    let kv = h * spec.kv_heads / spec.heads;
    &v.row(p)[kv * spec.value_dim..(kv + 1) * spec.value_dim]
}
