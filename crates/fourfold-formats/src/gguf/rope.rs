//! Rotary position scaling: GGUF's keys and factor table, turned back into Hugging Face's `rope_scaling`.

use serde_json::{Map, Value, json};

use super::arch::Arch;
use super::metadata::Metadata;
use super::{GgufError, config::Keys};

/// Original context and low and high frequency factors that Llama 3.x models were made with, tried where the metadata are silent.
const LLAMA3_CONTEXTS: [f64; 4] = [8192.0, 4096.0, 16384.0, 32768.0];
const LLAMA3_BANDS: [(f64, f64); 1] = [(1.0, 4.0)];

/// `rope_scaling` of `config.json`: null, `linear`, `yarn`, `llama3`, or `longrope` with one list. `factors` is the tensor `rope_freqs.weight`.
///
/// # Errors
/// A kind of scaling that is not read, or factors that are not above 0.
pub fn scaling(keys: &Keys, factors: Option<&[f32]>) -> Result<Value, GgufError> {
    let kind = keys.metadata.string(&keys.key("rope.scaling.type"))?.unwrap_or("none");
    match (kind, factors) {
        ("none", None) => Ok(Value::Null),
        ("none" | "linear", Some(factors)) if keys.factor()?.is_none_or(|f| f == 1.0) => llama3(keys, factors),
        ("linear", None) => match keys.factor()? {
            Some(factor) if factor != 1.0 => Ok(json!({ "rope_type": "linear", "type": "linear", "factor": factor })),
            _ => Ok(Value::Null),
        },
        ("yarn", None) => yarn(keys),
        (_, Some(_)) => Err(keys.unsupported(format!("{kind} position scaling together with a factor table"))),
        _ => Err(keys.unsupported(format!("{kind:?} position scaling"))),
    }
}

/// YaRN (Peng et al. 2023).
fn yarn(keys: &Keys) -> Result<Value, GgufError> {
    let m: &Metadata = keys.metadata;
    let original = keys.key("rope.scaling.original_context_length");
    let mut out = Map::new();
    out.insert("rope_type".to_owned(), json!("yarn"));
    out.insert("type".to_owned(), json!("yarn"));
    let factor = keys.factor()?.ok_or_else(|| GgufError::MissingKey(keys.key("rope.scaling.factor")))?;
    out.insert("factor".to_owned(), json!(factor));
    out.insert("original_max_position_embeddings".to_owned(), json!(m.need_count(&original)?));
    for (gguf, hf) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"), ("attn_factor", "attn_factor")]
    {
        if let Some(v) = m.float(&keys.key(&format!("rope.scaling.{gguf}")))? {
            out.insert(hf.to_owned(), json!(v));
        }
    }
    // DeepSeek's converter stores a tenth of `mscale_all_dim`. `mscale` itself is not stored; in every released model the
    // two are equal, and then only their common value matters.
    if keys.arch == Arch::DeepSeek2
        && let Some(tenth) = m.float(&keys.key("rope.scaling.yarn_log_multiplier"))?
    {
        let mscale = (tenth * 10.0 * 1e6).round() / 1e6;
        out.insert("mscale".to_owned(), json!(mscale));
        out.insert("mscale_all_dim".to_owned(), json!(mscale));
    }
    Ok(Value::Object(out))
}

/// Finds the `llama3` parameters that give `factors`: the largest is the factor itself, the rest are tried until all fit.
fn llama3(keys: &Keys, factors: &[f32]) -> Result<Value, GgufError> {
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    if factors.iter().any(|f| f.is_nan()) {
        return table(keys, factors);
    }
    if factors.iter().all(|&f| f == 1.0) {
        return Ok(Value::Null);
    }
    let base = keys.rope_base()?;
    let given = keys.metadata.count(&keys.key("rope.scaling.original_context_length"))?.map(|c| c as f64);
    for context in given.into_iter().chain(LLAMA3_CONTEXTS) {
        for (low, high) in LLAMA3_BANDS {
            let made = llama3_factors(factors.len(), base, f64::from(factor), low, high, context);
            if factors.iter().zip(&made).all(|(&f, &m)| (f64::from(f) - m).abs() <= 1e-5 * m) {
                return Ok(json!({
                    "rope_type": "llama3",
                    "factor": f64::from(factor),
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": context as u64,
                }));
            }
        }
    }
    table(keys, factors)
}

/// A table that no `llama3` parameters make, as it is: LongRoPE with one list of factors for every length.
fn table(keys: &Keys, factors: &[f32]) -> Result<Value, GgufError> {
    if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
        return Err(keys.unsupported("rotary factors that are not all above 0".to_owned()));
    }
    Ok(json!({
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": keys.metadata.need_count(&keys.key("context_length"))?,
    }))
}

/// What the frequencies are divided by (Llama 3.1's "frequency bands").
fn llama3_factors(half: usize, base: f64, factor: f64, low: f64, high: f64, context: f64) -> Vec<f64> {
    (0..half)
        .map(|i| {
            let wavelength = 2.0 * std::f64::consts::PI * base.powf(i as f64 / half as f64);
            if wavelength < context / high {
                1.0
            } else if wavelength > context / low {
                factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::metadata::{Number, Value as Meta};
    use super::*;

    fn metadata(entries: &[(&str, Meta)]) -> Metadata {
        let mut m = Metadata::default();
        m.values.extend(entries.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
        m
    }

    fn float(v: f64) -> Meta {
        Meta::Number(Number::Float(v))
    }

    #[test]
    fn llama3_parameters_are_found_again() {
        let context = Meta::Number(Number::Unsigned(131_072));
        let m = metadata(&[("llama.rope.freq_base", float(500_000.0)), ("llama.context_length", context)]);
        let keys = Keys { arch: Arch::Llama, metadata: &m };
        let factors: Vec<f32> =
            llama3_factors(64, 500_000.0, 32.0, 1.0, 4.0, 8192.0).into_iter().map(|f| f as f32).collect();
        let found = scaling(&keys, Some(&factors)).unwrap();
        assert_eq!(found["factor"], 32.0);
        assert_eq!(found["original_max_position_embeddings"], 8192);
        let mut other = factors.clone();
        other[40] *= 1.5;
        let found = scaling(&keys, Some(&other)).unwrap();
        assert_eq!(found["rope_type"], "longrope");
        assert_eq!(found["short_factor"], json!(other));
        assert_eq!(found["short_factor"], found["long_factor"]);
        // Made for another original context than the known ones: the table itself.
        let far: Vec<f32> =
            llama3_factors(64, 500_000.0, 32.0, 1.0, 4.0, 6000.0).into_iter().map(|f| f as f32).collect();
        assert_eq!(scaling(&keys, Some(&far)).unwrap()["short_factor"], json!(far));
        other[40] = f32::NAN;
        assert!(matches!(scaling(&keys, Some(&other)), Err(GgufError::Feature { .. })));
        assert_eq!(scaling(&keys, Some(&[1.0; 64])).unwrap(), Value::Null);
    }

    #[test]
    fn yarn_of_deepseek_keeps_its_mscale() {
        let m = metadata(&[
            ("deepseek2.rope.scaling.type", Meta::String("yarn".into())),
            ("deepseek2.rope.scaling.factor", float(40.0)),
            ("deepseek2.rope.scaling.original_context_length", Meta::Number(Number::Unsigned(4096))),
            ("deepseek2.rope.scaling.yarn_log_multiplier", float(0.0707)),
        ]);
        let found = scaling(&Keys { arch: Arch::DeepSeek2, metadata: &m }, None).unwrap();
        assert_eq!(found["mscale"], 0.707);
        assert_eq!(found["mscale_all_dim"], 0.707);
        assert_eq!(found["factor"], 40.0);
        assert_eq!(found["original_max_position_embeddings"], 4096);
        let longrope = metadata(&[("llama.rope.scaling.type", Meta::String("longrope".into()))]);
        assert!(scaling(&Keys { arch: Arch::Llama, metadata: &longrope }, None).is_err());
    }
}
