//! Gradients of the operations on rows and elements, and the loss.

use std::ops::Range;

use crate::backward::IGNORE;
use crate::cpu::Isa;
use crate::cpu::dense::Lanes;
use crate::cpu::pool::{Pool, SendPtr};
use crate::cpu::quant::Context;
use crate::cpu::simd::{MAX_LANES, Simd, dot, exp, for_isa, softmax_exp};
use crate::cpu::unwritten::Unwritten;
use crate::{Rounded, Tensor};

/// Elements below which threads do not pay.
pub(super) const GRAIN: usize = 1 << 13;

/// `db += Σ_tokens dy`.
pub fn bias_gradient(dy: &Tensor, db: &mut Tensor) {
    assert_eq!(dy.cols(), db.cols(), "bias gradient: shapes");
    let mut sums = vec![0.0f32; db.cols()];
    for t in 0..dy.rows() {
        sums.iter_mut().zip(dy.row(t)).for_each(|(sum, d)| *sum += d);
    }
    db.host_mut().iter_mut().zip(&sums).for_each(|(b, sum)| *b += sum);
}

/// `dw[ids[i]] += dy[i]`. By one thread: ids repeat.
pub fn embedding_gradient(ids: &[u32], dy: &Tensor, dw: &mut Tensor) {
    assert_eq!((ids.len(), dw.cols()), (dy.rows(), dy.cols()), "embedding gradient: shapes");
    let cols = dw.cols();
    for (i, &id) in ids.iter().enumerate() {
        let row = &mut dw.host_mut()[id as usize * cols..][..cols];
        row.iter_mut().zip(dy.row(i)).for_each(|(w, d)| *w += d);
    }
}

/// With r = 1/√(mean(x²) + eps): `dx_i = r (w_i dy_i − x_i r² mean_j(w_j dy_j x_j))`, `dw_i += Σ dy_i x_i r`.
pub fn rms_norm_backward(
    pool: &Pool,
    isa: Isa,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    dy: &Tensor,
    dweight: &mut Tensor,
) -> Tensor {
    let cols = x.cols();
    assert_eq!((dy.rows(), dy.cols(), weight.cols(), dweight.cols()), (x.rows(), cols, cols, cols), "norm backward");
    if x.host().is_empty() {
        return Tensor::zeros(x.rows(), cols);
    }
    let mut dx = Unwritten::new(x.rows() * cols);
    let mut factors = vec![0.0f32; x.rows()];
    let (to, kept) = (dx.target(), SendPtr::new(&mut factors));
    pool.for_ranges(x.rows(), GRAIN / cols, |rows| {
        let range = rows.start * cols..rows.end * cols;
        // SAFETY: each row and its factor are one item's; `norm_rows` writes before it reads.
        let (dx, factors) = unsafe { (slice_of(to, range.clone()), slice_of(kept, rows)) };
        norm_rows(isa, &x.host()[range.clone()], weight.host(), eps, &dy.host()[range], dx, factors);
    });
    // Threads share columns, not rows, so that sums do not depend on their number.
    pool.for_chunks_mut(dweight.host_mut(), 16, (GRAIN / x.rows() / 16).max(2), |first, sums| {
        add_columns(isa, x, dy, &factors, first * 16, sums);
    });
    // SAFETY: all rows have been written.
    Tensor::new(x.rows(), cols, unsafe { dx.written() })
}

/// # Safety
/// The elements are inside the memory, and nobody else uses them; those not written yet the caller writes before it reads them.
unsafe fn slice_of<'a>(memory: SendPtr<f32>, range: Range<usize>) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(memory.get().add(range.start), range.len()) }
}

for_isa! {
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], factors: &mut [f32]) = norm_rows_with
}

#[inline(always)]
fn norm_rows_with<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], factors: &mut [f32]) {
    let n = weight.len();
    let rows = x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
    for (((x, dy), dx), factor) in rows.zip(factors) {
        let r = 1.0 / (dot(s, x, x) / n as f32 + eps).sqrt();
        *factor = r;
        for ((dx, w), d) in dx.iter_mut().zip(weight).zip(dy) {
            *dx = w * d;
        }
        let inward = dot(s, dx, x) / n as f32 * r * r * r;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = r * *dx - x * inward;
        }
    }
}

for_isa! {
    /// `sums[c] += Σ_t dy[t, first + c] x[t, first + c] factors[t]`.
    fn add_columns(x: &Tensor, dy: &Tensor, factors: &[f32], first: usize, sums: &mut [f32]) = add_columns_with
}

#[inline(always)]
fn add_columns_with<S: Simd>(_s: S, x: &Tensor, dy: &Tensor, factors: &[f32], first: usize, sums: &mut [f32]) {
    for (t, &factor) in factors.iter().enumerate() {
        let columns = first..first + sums.len();
        for ((sum, x), d) in sums.iter_mut().zip(&x.row(t)[columns.clone()]).zip(&dy.row(t)[columns]) {
            *sum += d * x * factor;
        }
    }
}

/// `dgate = dy · up · σ(gate) (1 + gate (1 − σ(gate)))`, `dup = dy · gate · σ(gate)`.
pub fn swiglu_backward(pool: &Pool, isa: Isa, mut gate: Tensor, mut up: Tensor, dy: &Tensor) -> (Tensor, Tensor) {
    let shape = (gate.rows(), gate.cols());
    assert_eq!(((up.rows(), up.cols()), (dy.rows(), dy.cols())), (shape, shape), "swiglu backward: shapes");
    let to_up = SendPtr::new(up.host_mut());
    pool.for_chunks_mut(gate.host_mut(), 64, GRAIN / 64, |first, gate| {
        let range = first * 64..first * 64 + gate.len();
        // SAFETY: the same ranges as of gate, which do not overlap.
        let up = unsafe { slice_of(to_up, range.clone()) };
        swiglu_slices(isa, gate, up, &dy.host()[range]);
    });
    (gate, up)
}

/// As [`swiglu_backward`], as products read them.
pub fn swiglu_backward_rounded(context: Context, gate: &Tensor, up: &Tensor, dy: &Tensor) -> [Rounded; 2] {
    let (rows, cols) = (gate.rows(), gate.cols());
    let shape = (rows, cols);
    assert_eq!(((up.rows(), up.cols()), (dy.rows(), dy.cols())), (shape, shape), "swiglu backward: shapes");
    let write = |t: usize, d_gate: &mut [f32], d_up: &mut [f32]| {
        d_gate.copy_from_slice(gate.row(t));
        d_up.copy_from_slice(up.row(t));
        swiglu_slices(context.isa, d_gate, d_up, dy.row(t));
    };
    Lanes::two_rounded_rows(context, rows, cols, write).map(|lanes| Rounded::new(rows, cols, lanes))
}

for_isa! {
    /// `gate` and `up` become their gradients.
    fn swiglu_slices(gate: &mut [f32], up: &mut [f32], dy: &[f32]) = swiglu_slices_with
}

#[inline(always)]
fn swiglu_slices_with<S: Simd>(s: S, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    let one = s.splat(1.0);
    let n = gate.len();
    assert_eq!((up.len(), dy.len()), (n, n));
    for i in (0..n).step_by(S::LANES) {
        let count = S::LANES.min(n - i);
        // SAFETY: `count` elements of each slice are left.
        unsafe {
            let g = s.load_first(gate.as_ptr().add(i), count);
            let (u, d) = (s.load_first(up.as_ptr().add(i), count), s.load_first(dy.as_ptr().add(i), count));
            let sigma = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), g))));
            let slope = s.mul(sigma, s.mul_add(g, s.sub(one, sigma), one));
            s.store_first(gate.as_mut_ptr().add(i), s.mul(s.mul(d, u), slope), count);
            s.store_first(up.as_mut_ptr().add(i), s.mul(s.mul(d, g), sigma), count);
        }
    }
}

/// Losses of rows; the logits become `factor · (softmax − onehot)`.
pub fn cross_entropy(pool: &Pool, isa: Isa, logits: &mut Tensor, targets: &[u32], factor: f32) -> Vec<f32> {
    assert_eq!(logits.rows(), targets.len(), "cross-entropy: a target a row");
    let vocabulary = logits.cols();
    let mut losses = vec![0.0f32; targets.len()];
    let to = SendPtr::new(&mut losses);
    pool.for_chunks_mut(logits.host_mut(), vocabulary, GRAIN / vocabulary.max(1), |first, rows| {
        let count = rows.len() / vocabulary;
        // SAFETY: each row has a loss of its own.
        let losses = unsafe { std::slice::from_raw_parts_mut(to.get().add(first), count) };
        cross_entropy_rows(isa, rows, &targets[first..first + count], factor, losses);
    });
    losses
}

for_isa! {
    fn cross_entropy_rows(rows: &mut [f32], targets: &[u32], factor: f32, losses: &mut [f32]) = cross_entropy_rows_with
}

#[inline(always)]
pub(super) fn cross_entropy_rows_with<S: Simd>(
    s: S,
    rows: &mut [f32],
    targets: &[u32],
    factor: f32,
    losses: &mut [f32],
) {
    let vocabulary = rows.len() / targets.len();
    for ((row, &target), loss) in rows.chunks_exact_mut(vocabulary).zip(targets).zip(losses) {
        if target == IGNORE {
            row.fill(0.0);
            continue;
        }
        let largest = largest(s, row);
        let correct = row[target as usize];
        let mut sums = s.splat(0.0);
        let n = row.len();
        let mut tail = 0.0;
        for i in (0..n).step_by(S::LANES) {
            let count = S::LANES.min(n - i);
            // SAFETY: `count` elements are left.
            unsafe {
                let at = row.as_mut_ptr().add(i);
                let e = softmax_exp(s, s.sub(s.load_first(at.cast_const(), count), s.splat(largest)));
                s.store_first(at, e, count);
                if count == S::LANES {
                    sums = s.add(sums, e);
                } else {
                    for j in 0..count {
                        tail += *at.add(j);
                    }
                }
            }
        }
        let total = s.sum(sums) + tail;
        *loss = total.ln() + largest - correct;
        let scale = factor / total;
        for e in row.iter_mut() {
            *e *= scale;
        }
        row[target as usize] -= factor;
    }
}

#[inline(always)]
pub(super) fn largest<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut most = s.splat(f32::NEG_INFINITY);
    let whole = row.len() / S::LANES * S::LANES;
    let mut lanes = [f32::NEG_INFINITY; MAX_LANES];
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: i + LANES ≤ whole ≤ len.
        most = s.max(most, unsafe { s.load(row.as_ptr().add(i)) });
    }
    // SAFETY: the array has LANES elements or more.
    unsafe { s.store(lanes.as_mut_ptr(), most) };
    let mut largest = f32::NEG_INFINITY;
    for &v in lanes.iter().chain(&row[whole..]) {
        largest = if v > largest { v } else { largest };
    }
    largest
}
