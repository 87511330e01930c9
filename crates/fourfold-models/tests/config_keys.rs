//! Every key of `config.json` varied, against what transformers makes of it (`scripts/golden_config_keys.py`): the same logits, or
//! a refusal by name. What is left over is a silent difference, and there is none.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use fourfold_kernels::KvDtype;
use fourfold_models::{Model, ModelError, config_remarks, knows_key, spec_from_config};
use fourfold_tensor::WeightSource;
use serde_json::{Map, Value};
use support::{Case, cases, cpu, distance};

/// Keys on which this program decides otherwise than transformers, and says so in a remark (docs/models.md).
const DECIDED: [&str; 2] = ["attn_factor", "norm_topk_prob"];
/// Logits count as the same below this difference; those of the cases are of size 1.
const TOLERANCE: f32 = 2e-4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Same,
    BothRefuse,
    WeRefuse,
    TheyRefuse,
    DecidedAndSaid,
    SilentDifference,
}

/// What this program makes of a configuration.
enum Ours {
    Refused(String),
    /// The logits, `[24, vocab]`, and the remarks.
    Logits(Vec<f32>, Vec<String>),
}

fn table() -> Value {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden_config_keys.json");
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

/// `config` with values put at paths, or keys taken out.
fn changed(mut config: Value, changes: &Map<String, Value>) -> Value {
    for (path, value) in changes {
        let (outer, key) = match path.rsplit_once('.') {
            Some((outer, key)) => (Some(outer), key),
            None => (None, path.as_str()),
        };
        let place = match outer {
            Some(outer) => &mut config[outer],
            None => &mut config,
        };
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let place = place.as_object_mut().unwrap();
        if value.get("absent").is_some() {
            place.remove(key);
        } else {
            place.insert(key.to_owned(), value.clone());
        }
    }
    config
}

fn ours(case: &Case, config: &Value) -> Ours {
    let read = || -> Result<(Vec<f32>, Vec<String>), ModelError> {
        let mut spec = spec_from_config(config)?;
        // As where the program opens a checkpoint: an output projection of its own goes before a tied one.
        spec.tied &= case.weights.info("lm_head.weight").is_none();
        let remarks = config_remarks(config)?;
        let model = Model::load(&spec, &case.weights, cpu(1), &mut |_| ())?;
        let hidden = model.hidden(&case.ids, &mut model.new_cache(KvDtype::F32));
        Ok((model.logits(&hidden).host().to_vec(), remarks))
    };
    match read() {
        Ok((logits, remarks)) => Ours::Logits(logits, remarks),
        Err(error) => Ours::Refused(error.to_string()),
    }
}

/// The logits that the table keeps: every eighth of the last position.
fn kept(logits: &[f32], tokens: usize) -> Vec<f32> {
    let vocab = logits.len() / tokens;
    logits[(tokens - 1) * vocab..].iter().step_by(8).copied().collect()
}

fn judge(case: &Case, ours: &Ours, theirs: &Value) -> Verdict {
    let (logits, remarks) = match (ours, theirs.as_str()) {
        (Ours::Refused(_), Some("refused")) => return Verdict::BothRefuse,
        (Ours::Refused(_), _) => return Verdict::WeRefuse,
        (Ours::Logits(..), Some("refused")) => return Verdict::TheyRefuse,
        (Ours::Logits(logits, remarks), _) => (logits, remarks),
    };
    let agree = match theirs {
        Value::String(same) => {
            assert_eq!(same, "same");
            logits.len() == case.logits.len() && distance(logits, &case.logits) <= TOLERANCE
        }
        numbers => {
            let numbers: Vec<f32> = serde_json::from_value(numbers.clone()).unwrap();
            let kept = kept(logits, case.ids.len());
            kept.len() == numbers.len() && distance(&kept, &numbers) <= TOLERANCE
        }
    };
    let said = DECIDED.iter().any(|key| remarks.iter().any(|remark| remark.contains(key)));
    match (agree, said) {
        (true, _) => Verdict::Same,
        (false, true) => Verdict::DecidedAndSaid,
        (false, false) => Verdict::SilentDifference,
    }
}

#[test]
fn no_key_differs_from_transformers_in_silence() {
    let table = table();
    let cases: BTreeMap<String, Case> = cases().into_iter().map(|case| (case.name.clone(), case)).collect();
    let mut counts = BTreeMap::new();
    let (mut silent, mut unnamed, mut we_refuse) = (Vec::new(), Vec::new(), BTreeSet::new());
    let mut they_refuse: BTreeMap<String, usize> = BTreeMap::new();
    for line in table["variants"].as_array().unwrap() {
        let (case, changes, theirs) = (&cases[line[0].as_str().unwrap()], line[1].as_object().unwrap(), &line[2]);
        let found = ours(case, &changed(case.config("config.json"), changes));
        let verdict = judge(case, &found, theirs);
        *counts.entry(verdict).or_insert(0usize) += 1;
        let what = format!("{}: {}", case.name, line[1]);
        let names: Vec<&str> = changes.keys().map(|path| path.rsplit('.').next().unwrap()).collect();
        match (verdict, &found) {
            (Verdict::SilentDifference, _) => silent.push(what),
            (Verdict::TheyRefuse, _) => *they_refuse.entry(names.join("+")).or_default() += 1,
            (Verdict::WeRefuse, Ours::Refused(error)) => {
                we_refuse.insert(format!("{} | {error}", names.join("+")));
                // A tensor that is missing or of another shape names itself; a key may stand for one that contradicts it.
                let named = names.iter().any(|name| error.contains(name)) || error.contains("tensor");
                let contradicted = ["rope_scaling", "rope_parameters", "num_experts_per_tok", "num_attention_heads"];
                if !named && !contradicted.iter().any(|key| error.contains(key)) {
                    unnamed.push(format!("{what}: {error}"));
                }
            }
            _ => {}
        }
    }
    println!("transformers {}: {counts:#?}", table["version"]);
    we_refuse.iter().for_each(|reason| println!("we refuse: {reason}"));
    they_refuse.iter().for_each(|(keys, count)| println!("they refuse: {keys} ({count})"));
    silent.iter().for_each(|what| println!("SILENT DIFFERENCE: {what}"));
    unnamed.iter().for_each(|what| println!("UNNAMED: {what}"));
    assert_eq!(silent, Vec::<String>::new());
    assert_eq!(unnamed, Vec::<String>::new());
    assert!(counts[&Verdict::Same] > 300 && counts[&Verdict::BothRefuse] > 300, "{counts:?}");
}

/// Every key that transformers' code of an architecture reads is read, known to be without effect, or limited to such values.
#[test]
fn every_key_that_transformers_reads_is_declared() {
    let table = table();
    for (architecture, keys) in table["reads"].as_object().unwrap() {
        let keys = keys.as_array().unwrap();
        assert!(keys.len() > 30, "{architecture}: {}", keys.len());
        let undeclared: Vec<&Value> =
            keys.iter().filter(|key| !knows_key(architecture, key.as_str().unwrap())).collect();
        assert!(undeclared.is_empty(), "{architecture}: {undeclared:?}");
    }
    assert!(!knows_key("llama", "final_logit_softcapping") && !knows_key("mamba", "hidden_size"));
}

/// Negative control: with one case's logits in the place of another's, the comparison fails.
#[test]
fn the_comparison_sees_other_logits() {
    let cases = cases();
    let case = cases.iter().find(|case| case.name == "qwen3").unwrap();
    let found = ours(case, &case.config("config.json"));
    assert_eq!(judge(case, &found, &"same".into()), Verdict::Same);
    let Ours::Logits(logits, _) = &found else { panic!("the case itself is read") };
    let mut kept = kept(logits, case.ids.len());
    assert_eq!(judge(case, &found, &serde_json::to_value(&kept).unwrap()), Verdict::Same);
    kept[5] += 1e-3;
    assert_eq!(judge(case, &found, &serde_json::to_value(&kept).unwrap()), Verdict::SilentDifference);
}
