//! What a model's `generation_config.json` may say.

use serde_json::Value;

use crate::InferError;

/// Keys that are obeyed, describe the model, or choose how transformers computes the same tokens. Lengths are `-n`'s.
const KNOWN: &[&str] = &[
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "do_sample",
    "eos_token_id",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "min_p",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_k",
    "top_p",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
];

/// Keys that would change which tokens come and are not obeyed, with the values that change nothing beside `null`, `false` and
/// empty lists.
const NOT_OBEYED: &[(&str, &[f64])] = &[
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("constraints", &[]),
    ("diversity_penalty", &[0.0]),
    ("dola_layers", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beam_groups", &[1.0]),
    ("num_beams", &[1.0]),
    ("num_return_sequences", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("remove_invalid_values", &[]),
    ("sequence_bias", &[]),
    ("stop_strings", &[]),
    ("suppress_tokens", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

/// Checks a `generation_config.json` and names what of it is not obeyed, in sentences for the user.
///
/// # Errors
/// A value that transformers refuses: of another type, or out of its range.
pub fn generation_remarks(config: &Value) -> Result<Vec<String>, InferError> {
    let Some(object) = config.as_object() else {
        return Err(bad("generation_config.json", config, "an object is expected"));
    };
    let flag = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(bad(key, other, "true or false is expected")),
    };
    let number = |key: &str, fits: &dyn Fn(f64) -> bool, expected: &'static str| match object.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_f64().is_some_and(fits) => Ok(()),
        Some(value) => Err(bad(key, value, expected)),
    };
    let samples = flag("do_sample")?;
    match samples {
        Some(true) => number("temperature", &|t| t > 0.0, "a number above 0 is expected where do_sample is true")?,
        _ => number("temperature", &|t| t >= 0.0, "a number of at least 0 is expected")?,
    }
    number("top_p", &|p| (0.0..=1.0).contains(&p), "a number from 0 to 1 is expected")?;
    number("min_p", &|p| (0.0..=1.0).contains(&p), "a number from 0 to 1 is expected")?;
    number("repetition_penalty", &|p| p > 0.0, "a number above 0 is expected")?;
    number("max_new_tokens", &|n| n > 0.0, "a number above 0 is expected")?;
    if let Some(value) = object.get("top_k").filter(|v| !v.is_null() && v.as_u64().is_none()) {
        return Err(bad("top_k", value, "a whole number of at least 0 is expected"));
    }
    match object.get("early_stopping") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(word)) if word == "never" => {}
        Some(other) => return Err(bad("early_stopping", other, "true, false or \"never\" is expected")),
    }
    token_ids(object.get("eos_token_id"), "eos_token_id")?;
    token_ids(object.get("bos_token_id"), "bos_token_id")?;

    let set = |value: &Value, neutral: &[f64]| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => number.as_f64().is_none_or(|n| !neutral.contains(&n)),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Bool(true) | Value::String(_) => true,
    };
    let is_set = |key: &str| NOT_OBEYED.iter().any(|(k, neutral)| *k == key && set(&object[key], neutral));
    let not_obeyed: Vec<&str> = object.keys().map(String::as_str).filter(|key| is_set(key)).collect();
    let known = |key: &str| KNOWN.contains(&key) || NOT_OBEYED.iter().any(|(k, _)| *k == key);
    let unknown: Vec<&str> =
        object.keys().map(String::as_str).filter(|key| !known(key) && set(&object[*key], &[])).collect();
    let mut remarks = Vec::new();
    if !not_obeyed.is_empty() {
        remarks.push(format!("generation_config.json asks for what is not obeyed: {}", not_obeyed.join(", ")));
    }
    if !unknown.is_empty() {
        let shown: String = unknown.join(", ").chars().take(400).collect();
        remarks.push(format!("generation_config.json has {} keys that are not known: {shown}", unknown.len()));
    }
    Ok(remarks)
}

/// A token's number, or a list of them.
fn token_ids(value: Option<&Value>, key: &'static str) -> Result<(), InferError> {
    let is_id = |v: &Value| v.as_u64().is_some_and(|id| id <= u64::from(u32::MAX));
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(ids)) if ids.iter().all(is_id) => Ok(()),
        Some(id) if is_id(id) => Ok(()),
        Some(other) => Err(bad(key, other, "a token's number, or a list of them, is expected")),
    }
}

fn bad(key: &str, value: &Value, reason: &'static str) -> InferError {
    let value: String = value.to_string().chars().take(80).collect();
    InferError::GenerationConfig { key: key.to_owned(), value, reason }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_out_of_range_are_refused() {
        for config in [
            json!({"do_sample": true, "temperature": 0.0}),
            json!({"temperature": -1.0}),
            json!({"temperature": "0.7"}),
            json!({"do_sample": "yes"}),
            json!({"top_p": 1.5}),
            json!({"top_p": -0.1}),
            json!({"min_p": 2}),
            json!({"top_k": -1}),
            json!({"top_k": 2.5}),
            json!({"repetition_penalty": 0}),
            json!({"max_new_tokens": 0}),
            json!({"early_stopping": "soon"}),
            json!({"eos_token_id": "2"}),
            json!({"eos_token_id": [1, -2]}),
            json!([1]),
        ] {
            let error = generation_remarks(&config).unwrap_err().to_string();
            let key = config.as_object().map_or("generation_config.json", |o| o.keys().next_back().unwrap());
            assert!(error.contains(key) || error.contains("temperature"), "{config}: {error}");
        }
    }

    #[test]
    fn what_is_not_obeyed_is_named() {
        let quiet = json!({"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2],
            "num_beams": 1, "typical_p": 1.0, "bad_words_ids": null, "suppress_tokens": [], "max_length": 20,
            "transformers_version": "4.51.0", "temperature_note": null});
        assert_eq!(generation_remarks(&quiet).unwrap(), Vec::<String>::new());
        let loud = json!({"num_beams": 4, "suppress_tokens": [3], "no_repeat_ngram_size": 0, "mirostat": 2});
        let remarks = generation_remarks(&loud).unwrap();
        assert_eq!(remarks.len(), 2);
        assert!(remarks[0].contains("num_beams, suppress_tokens") && !remarks[0].contains("ngram"), "{remarks:?}");
        assert!(remarks[1].contains("1 keys") && remarks[1].contains("mirostat"), "{remarks:?}");
    }
}
