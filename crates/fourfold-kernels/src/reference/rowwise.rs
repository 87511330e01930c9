//! Operations on rows and elements.

use std::ops::Range;

use crate::{RopeSpec, Tensor};

/// RMSNorm (Zhang & Sennrich 2019, equation 4, with the customary eps inside the root).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
    assert_eq!(x.cols(), weight.cols(), "a norm of {} elements on rows of {}", weight.cols(), x.cols());
    let mut y = x.clone();
    for row in y.host_mut().chunks_exact_mut(x.cols()) {
        let squares: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let inverse = 1.0 / (squares / row.len() as f64 + f64::from(eps)).sqrt();
        for (v, &w) in row.iter_mut().zip(weight.host()) {
            *v = (f64::from(*v) * inverse * f64::from(w)) as f32;
        }
    }
    y
}

/// Rotary position embedding (Su et al. 2021, equation 34): pair i of a head at position p turns by the angle whose cosine
/// and sine stand in row p.
pub fn rope(x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
    assert_eq!(x.cols() * x.rows() % (spec.heads * spec.head_dim), 0, "rope: no whole number of tokens");
    let half = cos.cols();
    for (h, head) in x.host_mut().chunks_exact_mut(spec.head_dim).enumerate() {
        let position = spec.first_position + h / spec.heads;
        for i in 0..half {
            let (first, second) = if spec.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (a, b) = (f64::from(head[spec.start + first]), f64::from(head[spec.start + second]));
            let (c, s) = (f64::from(cos.row(position)[i]), f64::from(sin.row(position)[i]));
            head[spec.start + first] = (a * c - b * s) as f32;
            head[spec.start + second] = (a * s + b * c) as f32;
        }
    }
}

/// SwiGLU's product (Shazeer 2020): `silu(gate) ⊙ up` with `silu(v) = v / (1 + e^−v)`.
pub fn swiglu(mut gate: Tensor, up: &Tensor) -> Tensor {
    assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()), "swiglu of unequal shapes");
    for (g, &u) in gate.host_mut().iter_mut().zip(up.host()) {
        let v = f64::from(*g);
        *g = (v / (1.0 + (-v).exp()) * f64::from(u)) as f32;
    }
    gate
}

/// `x += y`.
pub fn add(x: &mut Tensor, y: &Tensor) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "add of unequal shapes");
    for (x, &y) in x.host_mut().iter_mut().zip(y.host()) {
        *x += y;
    }
}

/// Columns `range` of each row.
pub fn columns(x: &Tensor, range: Range<usize>) -> Tensor {
    let data = (0..x.rows()).flat_map(|r| x.row(r)[range.clone()].iter().copied()).collect();
    Tensor::new(x.rows(), range.len(), data)
}

/// `a` and `b` side by side.
pub fn concat_columns(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.rows(), b.rows(), "concatenating unequal numbers of rows");
    let data = (0..a.rows()).flat_map(|r| a.row(r).iter().chain(b.row(r)).copied()).collect();
    Tensor::new(a.rows(), a.cols() + b.cols(), data)
}

/// The named rows.
pub fn gather_rows(x: &Tensor, rows: &[usize]) -> Tensor {
    let data = rows.iter().flat_map(|&r| x.row(r).iter().copied()).collect();
    Tensor::new(rows.len(), x.cols(), data)
}

/// `x[rows[i]] += factors[i] · y[i]`.
pub fn scatter_add_rows(x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
    assert_eq!((x.cols(), y.rows(), y.rows()), (y.cols(), rows.len(), factors.len()), "scatter of unequal shapes");
    let cols = x.cols();
    for (i, (&r, &factor)) in rows.iter().zip(factors).enumerate() {
        for (x, &y) in x.host_mut()[r * cols..(r + 1) * cols].iter_mut().zip(y.row(i)) {
            *x = (f64::from(*x) + f64::from(factor) * f64::from(y)) as f32;
        }
    }
}
