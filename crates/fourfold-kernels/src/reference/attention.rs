//! Softmax attention, one query and head at a time.

use crate::{AttentionSpec, KvCache, KvData, Tensor, Values};

/// Scaled dot-product attention (Vaswani et al. 2017, equation 1) under a causal mask, with grouped key heads (Ainslie et al.
/// 2023).
pub fn attention(q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
    let AttentionSpec { heads, kv_heads, key_dim, value_dim, .. } = *spec;
    assert_eq!(q.cols(), heads * key_dim, "queries of {} columns for {heads} heads of {key_dim}", q.cols());
    assert_eq!(keys.width(), kv_heads * key_dim, "keys of width {} for {kv_heads} heads", keys.width());
    assert!(spec.first_position + q.rows() <= keys.len(), "a query beyond the {} cached positions", keys.len());
    let mut y = Tensor::zeros(q.rows(), heads * value_dim);
    for t in 0..q.rows() {
        let last = spec.first_position + t;
        let first = spec.window.map_or(0, |w| (last + 1).saturating_sub(w));
        for h in 0..heads {
            let kv_head = h * kv_heads / heads;
            let query = &q.row(t)[h * key_dim..(h + 1) * key_dim];
            let scores: Vec<f64> = (first..=last)
                .map(|p| {
                    let key = row(keys, p, kv_head * key_dim, key_dim);
                    query.iter().zip(&key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
                        * f64::from(spec.scale)
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let total: f64 = exps.iter().sum();
            let mut sums = vec![0.0f64; value_dim];
            for (p, e) in (first..=last).zip(&exps) {
                let value = match values {
                    Values::Cache(cache) => row(cache, p, kv_head * value_dim, value_dim),
                    Values::PrefixOfKeys => row(keys, p, kv_head * key_dim, value_dim),
                };
                sums.iter_mut().zip(&value).for_each(|(s, &v)| *s += e / total * f64::from(v));
            }
            let out = (t * heads + h) * value_dim;
            y.host_mut()[out..out + value_dim].iter_mut().zip(&sums).for_each(|(y, &s)| *y = s as f32);
        }
    }
    y
}

/// `len` elements of position `p`, from column `start`.
fn row(cache: &KvCache, p: usize, start: usize, len: usize) -> Vec<f32> {
    let range = p * cache.width() + start..p * cache.width() + start + len;
    match cache.data() {
        KvData::F32(d) => d[range].to_vec(),
        KvData::F16(d) => d[range].iter().map(|v| v.to_f32()).collect(),
        KvData::Bf16(d) => d[range].iter().map(|v| v.to_f32()).collect(),
        KvData::Device(_) => panic!("a cache on a device is read by its backend"),
    }
}
