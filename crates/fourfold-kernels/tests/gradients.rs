//! Gradients of the specification against central differences of its own forward.

use std::ops::Range;

use fourfold_kernels::backward::{Backward, IGNORE, SelfAttention, SoftTargets};
use fourfold_kernels::{Backend, Memory, Reference, RopeSpec, Tensor};

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

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    a.host().iter().zip(b.host()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Compares `gradient` with `(loss(x + h) − loss(x − h)) / 2h`, element by element.
fn check(name: &str, x: &Tensor, gradient: &Tensor, loss: impl Fn(&Tensor) -> f64) {
    assert_eq!((x.rows(), x.cols()), (gradient.rows(), gradient.cols()), "{name}");
    let h = 1.0 / 256.0;
    let largest = gradient.host().iter().fold(0.0f32, |most, g| most.max(g.abs()));
    assert!(largest > 1e-3, "{name}: a gradient of zero shows nothing");
    for i in 0..x.host().len() {
        let moved = |by: f32| {
            let mut x = x.clone();
            x.host_mut()[i] += by;
            loss(&x)
        };
        let expected = (moved(h) - moved(-h)) / f64::from(2.0 * h);
        let found = f64::from(gradient.host()[i]);
        let bound = 1e-3 * f64::from(largest).max(0.1);
        assert!((found - expected).abs() < bound, "{name}[{i}]: {found}, by differences {expected}");
    }
}

#[test]
fn weight_bias_and_embedding_gradients_are_sums_of_outer_products() {
    let (x, dy) = (noise(5, 4, 1), noise(5, 3, 2));
    let (mut dw, mut db) = (noise(3, 4, 3), noise(1, 3, 4));
    let (before_w, before_b) = (dw.clone(), db.clone());
    Reference.linear_weight_gradient(&x, &dy, &mut dw);
    Reference.bias_gradient(&dy, &mut db);
    for o in 0..3 {
        let sum = |f: &dyn Fn(usize) -> f32| (0..5).map(f).sum::<f32>();
        assert!((db.row(0)[o] - before_b.row(0)[o] - sum(&|t| dy.row(t)[o])).abs() < 1e-5);
        for i in 0..4 {
            let expected = before_w.row(o)[i] + sum(&|t| dy.row(t)[o] * x.row(t)[i]);
            assert!((dw.row(o)[i] - expected).abs() < 1e-5);
        }
    }
    let mut table = Tensor::zeros(3, 3);
    Reference.embedding_gradient(&[2, 0, 2, 2, 0], &dy, &mut table);
    assert_eq!(table.row(1), [0.0; 3]);
    assert!((table.row(0)[1] - dy.row(1)[1] - dy.row(4)[1]).abs() < 1e-6);
}

#[test]
fn rms_norm_backward() {
    let (x, w, c) = (noise(3, 7, 5), noise(1, 7, 6), noise(3, 7, 7));
    let mut dw = Tensor::zeros(1, 7);
    let dx = Reference.rms_norm_backward(&x, &w, 1e-3, &c, &mut dw);
    check("dx", &x, &dx, |x| dot(&Reference.rms_norm(x, &w, 1e-3), &c));
    check("dw", &w, &dw, |w| dot(&Reference.rms_norm(&x, w, 1e-3), &c));
}

#[test]
fn rope_backward() {
    let angles = noise(6, 2, 8);
    let table = |f: fn(f32) -> f32| Tensor::new(6, 2, angles.host().iter().map(|&a| f(a)).collect());
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    for interleaved in [false, true] {
        let spec = RopeSpec { head_dim: 5, heads: 2, start: 1, interleaved, first_position: 2 };
        let (x, c) = (noise(6, 5, 9), noise(6, 5, 10));
        let mut dx = c.clone();
        Reference.rope_backward(&mut dx, &cos, &sin, &spec);
        check("rope", &x, &dx, |x| {
            let mut y = x.clone();
            Reference.rope(&mut y, &cos, &sin, &spec);
            dot(&y, &c)
        });
    }
}

#[test]
fn swiglu_backward() {
    let (g, u, c) = (noise(2, 6, 11), noise(2, 6, 12), noise(2, 6, 13));
    let (dg, du) = Reference.swiglu_backward(g.clone(), u.clone(), &c);
    check("gate", &g, &dg, |g| dot(&Reference.swiglu(g.clone(), &u), &c));
    check("up", &u, &du, |u| dot(&Reference.swiglu(g.clone(), u), &c));
}

#[test]
fn attention_backward() {
    let documents: [Range<usize>; 3] = [0..4, 4..5, 5..9];
    for window in [None, Some(2)] {
        let spec = SelfAttention {
            heads: 4,
            kv_heads: 2,
            key_dim: 3,
            value_dim: 2,
            scale: 0.6,
            window,
            documents: &documents,
        };
        let (q, k, v, c) = (noise(9, 12, 14), noise(9, 6, 15), noise(9, 4, 16), noise(9, 8, 17));
        let output = Reference.attention_forward(&q, &k, &v, &spec);
        let gradient = Reference.attention_backward(&q, &k, &v, &output, &c, &spec);
        let loss = |q: &Tensor, k: &Tensor, v: &Tensor| dot(&Reference.attention_forward(q, k, v, &spec).y, &c);
        check("dq", &q, &gradient.dq, |q| loss(q, &k, &v));
        check("dk", &k, &gradient.dk, |k| loss(&q, k, &v));
        check("dv", &v, &gradient.dv, |v| loss(&q, &k, v));
    }
}

#[test]
fn attention_forward_is_cached_attention_of_each_document() {
    use fourfold_kernels::{AttentionSpec, KvCache, KvDtype, Values};
    let documents: [Range<usize>; 2] = [0..5, 5..8];
    let spec = SelfAttention {
        heads: 2,
        kv_heads: 1,
        key_dim: 4,
        value_dim: 3,
        scale: 0.5,
        window: Some(3),
        documents: &documents,
    };
    let (q, k, v) = (noise(8, 8, 18), noise(8, 4, 19), noise(8, 3, 20));
    let found = Reference.attention_forward(&q, &k, &v, &spec).y;
    for document in &documents {
        let rows: Vec<usize> = document.clone().collect();
        let part = |x: &Tensor| Reference.gather_rows(x, &rows);
        let (mut keys, mut values) = (KvCache::new(4, KvDtype::F32), KvCache::new(3, KvDtype::F32));
        keys.append(&part(&k));
        values.append(&part(&v));
        let cached = AttentionSpec {
            heads: 2,
            kv_heads: 1,
            key_dim: 4,
            value_dim: 3,
            scale: 0.5,
            first_position: 0,
            window: Some(3),
        };
        let expected = Reference.attention(&part(&q), &keys, Values::Cache(&values), &cached);
        assert_eq!(part(&found), expected);
    }
}

#[test]
fn cross_entropy_gradient_and_ignored_targets() {
    let logits = noise(4, 6, 21);
    let targets = [3, IGNORE, 0, 5];
    let losses = |l: &Tensor| Reference.cross_entropy(&mut l.clone(), &targets, 1.0);
    let mut gradient = logits.clone();
    let found = Reference.cross_entropy(&mut gradient, &targets, 0.7);
    assert_eq!(found[1], 0.0);
    assert_eq!(gradient.row(1), [0.0; 6]);
    let softmax: f64 = logits.row(0).iter().map(|&l| f64::from(l).exp()).sum();
    assert!((f64::from(found[0]) - (softmax.ln() - f64::from(logits.row(0)[3]))).abs() < 1e-6);
    check("logits", &logits, &gradient, |l| 0.7 * losses(l).iter().map(|&v| f64::from(v)).sum::<f64>());
}

#[test]
fn distillation_gradient_and_its_ends() {
    let (logits, teacher) = (noise(4, 6, 22), noise(4, 6, 23));
    let scaled = Tensor::new(4, 6, teacher.host().iter().map(|v| 3.0 * v).collect());
    let targets = [3, IGNORE, 0, 5];
    for (temperature, weight) in [(1.0, 1.0), (2.0, 1.0), (1.0, 0.3), (0.7, 0.6), (1.0, 0.0)] {
        let soft = SoftTargets { temperature, weight };
        let losses = |l: &Tensor| Reference.distillation(&mut l.clone(), scaled.clone(), &targets, soft, 1.0);
        let mut gradient = logits.clone();
        let found = Reference.distillation(&mut gradient, scaled.clone(), &targets, soft, 0.7);
        assert_eq!(found[1], 0.0);
        assert_eq!(gradient.row(1), [0.0; 6]);
        check("logits", &logits, &gradient, |l| 0.7 * losses(l).iter().map(|&v| f64::from(v)).sum::<f64>());
    }
    // The divergence from oneself is zero, and so is its gradient; with weight 0 it is cross-entropy.
    let mut same = scaled.clone();
    let soft = SoftTargets { temperature: 1.5, weight: 1.0 };
    let losses = Reference.distillation(&mut same, scaled.clone(), &targets, soft, 1.0);
    assert!(losses.iter().all(|l| l.abs() < 1e-6) && same.host().iter().all(|d| d.abs() < 1e-6));
    let (mut hard, mut soft_hard) = (logits.clone(), logits.clone());
    let hard_losses = Reference.cross_entropy(&mut hard, &targets, 0.7);
    let soft = SoftTargets { temperature: 1.0, weight: 0.0 };
    let losses = Reference.distillation(&mut soft_hard, scaled, &targets, soft, 0.7);
    assert!(hard.host().iter().zip(soft_hard.host()).all(|(a, b)| (a - b).abs() < 1e-6));
    assert!(hard_losses.iter().zip(&losses).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn tuned_gradients_are_those_of_the_whole_weight_pulled_back() {
    use fourfold_tensor::{DType, FloatBuffer, Offsets, Quantized, Scales, Tuning, pack_row, packed_words_per_row};
    let (rows, cols) = (7, 12);
    let mut packed = vec![0; rows * packed_words_per_row(cols, 3)];
    for (r, words) in packed.chunks_mut(packed_words_per_row(cols, 3)).enumerate() {
        pack_row(&(0..cols).map(|c| ((3 * r + 5 * c) % 8) as u8).collect::<Vec<_>>(), 3, words);
    }
    let floats = |seed| FloatBuffer::from_f32(noise(rows, 3, seed).into_host(), DType::F32);
    let weight = Quantized {
        rows,
        cols,
        bits: 3,
        group_size: 5,
        packed: packed.into(),
        scales: Scales::Float(floats(24)),
        offsets: Offsets::Min(floats(25)),
        codebook: None,
        g_idx: None,
    };
    let tuning = Tuning::of(weight.into()).unwrap();
    let (x, dy) = (noise(9, cols, 26), noise(9, rows, 27));
    let loss = |numbers: &Tensor| {
        let weight = Reference.upload(tuning.with(numbers.host())).unwrap();
        dot(&Reference.linear_rows(&x, &weight, 0..rows), &dy)
    };
    let numbers = Tensor::new(1, tuning.len(), tuning.initial());
    let mut gradient = Tensor::zeros(1, tuning.len());
    for part in [0..3, 3..7] {
        let of_part = Reference.columns(&dy, part.clone());
        Reference.tuned_weight_gradient(&x, &of_part, &tuning, part, &mut gradient);
    }
    check("tuned", &numbers, &gradient, loss);
    let ids = [4, 0, 4, 6, 4, 1, 1, 0, 5];
    let dy = noise(9, cols, 28);
    let loss = |numbers: &Tensor| {
        let weight = Reference.upload(tuning.with(numbers.host())).unwrap();
        dot(&Reference.embedding(&weight, &ids), &dy)
    };
    let mut gradient = Tensor::zeros(1, tuning.len());
    Reference.tuned_embedding_gradient(&ids, &dy, &tuning, &mut gradient);
    check("tuned embedding", &numbers, &gradient, loss);
}
