//! The specification against the papers' formulas, written out a second time in f64.

use fourfold_kernels::{
    AttentionSpec, Backend, KvCache, KvDtype, LinearArg, Memory, Reference, RopeSpec, Tensor, Values,
};
use fourfold_tensor::Dense;

/// Values in [−1, 1) that differ between seeds.
fn noise(rows: usize, cols: usize, seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    Tensor::new(rows, cols, (0..rows * cols).map(|_| next()).collect())
}

fn close(found: &Tensor, expected: impl Fn(usize, usize) -> f64) {
    for r in 0..found.rows() {
        for c in 0..found.cols() {
            let (f, e) = (f64::from(found.row(r)[c]), expected(r, c));
            assert!((f - e).abs() <= 1e-6 * e.abs().max(1.0), "[{r}, {c}]: {f} for {e}");
        }
    }
}

#[test]
fn attention_is_the_softmax_of_masked_scores_times_values() {
    let (tokens, heads, kv_heads, key_dim, value_dim) = (5, 6, 2, 8, 4);
    for (window, first_position) in [(None, 0), (None, 3), (Some(3), 3)] {
        let spec = AttentionSpec { heads, kv_heads, key_dim, value_dim, scale: 0.3, first_position, window };
        let q = noise(tokens, heads * key_dim, 1);
        let (k, v) = (noise(8, kv_heads * key_dim, 2), noise(8, kv_heads * value_dim, 3));
        let mut keys = KvCache::new(kv_heads * key_dim, KvDtype::F32);
        let mut values = KvCache::new(kv_heads * value_dim, KvDtype::F32);
        keys.append(&k);
        values.append(&v);
        for own_values in [true, false] {
            let source = if own_values { Values::Cache(&values) } else { Values::PrefixOfKeys };
            let y = Reference.attention(&q, &keys, source, &spec);
            close(&y, |t, column| {
                let (h, d) = (column / value_dim, column % value_dim);
                let kv = h / (heads / kv_heads);
                let (mut sum, mut total) = (0.0, 0.0);
                for p in 0..8 {
                    let position = first_position + t;
                    if p > position || window.is_some_and(|w| p + w <= position) {
                        continue;
                    }
                    let score: f64 = (0..key_dim)
                        .map(|i| f64::from(q.row(t)[h * key_dim + i]) * f64::from(k.row(p)[kv * key_dim + i]))
                        .sum();
                    let weight = (score * f64::from(0.3f32)).exp();
                    let value = if own_values { v.row(p)[kv * value_dim + d] } else { k.row(p)[kv * key_dim + d] };
                    sum += weight * f64::from(value);
                    total += weight;
                }
                sum / total
            });
        }
    }
}

#[test]
fn rope_multiplies_a_pair_as_a_complex_number_by_the_position_s_rotation() {
    let (tokens, heads, head_dim, start, half) = (4, 3, 10, 2, 3);
    let positions = 9;
    let angle = |p: usize, i: usize| p as f64 * 10000f64.powf(-(i as f64) / half as f64);
    let table = |f: fn(f64) -> f64| {
        let data = (0..positions * half).map(|j| f(angle(j / half, j % half)) as f32).collect();
        Tensor::new(positions, half, data)
    };
    for interleaved in [false, true] {
        let spec = RopeSpec { head_dim, heads, start, interleaved, first_position: 5 };
        let x = noise(tokens * heads, head_dim, 4);
        let mut y = x.clone();
        Reference.rope(&mut y, &table(f64::cos), &table(f64::sin), &spec);
        close(&y, |r, c| {
            let Some(offset) = c.checked_sub(start).filter(|&o| o < 2 * half) else {
                return f64::from(x.row(r)[c]);
            };
            let (i, imaginary) =
                if interleaved { (offset / 2, offset % 2 == 1) } else { (offset % half, offset >= half) };
            let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (modulus, argument) = {
                let (re, im) = (f64::from(x.row(r)[start + a]), f64::from(x.row(r)[start + b]));
                (re.hypot(im), im.atan2(re) + angle(5 + r / heads, i))
            };
            if imaginary { modulus * argument.sin() } else { modulus * argument.cos() }
        });
    }
}

#[test]
fn rms_norm_gives_rows_of_root_mean_square_one_times_the_weight() {
    let x = noise(3, 7, 5);
    let weight = noise(1, 7, 6);
    let y = Reference.rms_norm(&x, &weight, 0.01);
    close(&y, |r, c| {
        let mean = x.row(r).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 7.0;
        f64::from(x.row(r)[c]) / (mean + f64::from(0.01f32)).sqrt() * f64::from(weight.host()[c])
    });
}

#[test]
fn linear_and_its_transpose_are_sums_of_products() {
    let (x, w, b) = (noise(3, 5, 7), noise(4, 5, 8), noise(1, 4, 9));
    let weight = Reference.upload(Dense::from_f32(vec![4, 5], w.host().to_vec()).into()).unwrap();
    let y = &Reference.linear(&x, &[LinearArg { weight: &weight, bias: Some(&b) }])[0];
    close(y, |t, o| {
        f64::from(b.host()[o]) + (0..5).map(|i| f64::from(x.row(t)[i]) * f64::from(w.row(o)[i])).sum::<f64>()
    });
    let upper = noise(3, 2, 10);
    let back = Reference.linear_transposed(&upper, &weight, 1..3);
    close(&back, |t, i| (0..2).map(|o| f64::from(upper.row(t)[o]) * f64::from(w.row(1 + o)[i])).sum::<f64>());
}

#[test]
fn swiglu_gates_by_the_logistic_function() {
    let (gate, up) = (noise(2, 9, 11), noise(2, 9, 12));
    let y = Reference.swiglu(gate.clone(), &up);
    close(&y, |r, c| {
        let g = f64::from(gate.row(r)[c]);
        g * 0.5 * (1.0 + (g / 2.0).tanh()) * f64::from(up.row(r)[c])
    });
}
