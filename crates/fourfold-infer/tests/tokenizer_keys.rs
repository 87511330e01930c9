//! Every key of the files beside a `tokenizer.json` varied, against what transformers makes of it (`scripts/golden_tokenizer_keys.py`):
//! the same tokens and texts, a refusal by name, or a remark. What is left over is a silent difference, and there is none.

use std::collections::BTreeMap;

use fourfold_infer::{InferError, Tokenizer, TokenizerSettings};
use serde_json::{Map, Value, json};

/// Keys that this program obeys, as transformers did up to version 4, and version 5 leaves out (docs/models.md).
const OBEYED: [&str; 2] = ["add_bos_token", "add_eos_token"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Same,
    BothRefuse,
    WeRefuse,
    TheyRefuse,
    Remarked,
    Obeyed,
    SilentDifference,
}

/// The files of a variant by name, and the model's type.
fn files(kind: &Value, changes: &Map<String, Value>) -> (Map<String, Value>, String) {
    let mut model_type = kind["model_type"].as_str().unwrap().to_owned();
    let mut files = Map::new();
    files.insert("tokenizer.json".to_owned(), kind["tokenizer"].clone());
    files.insert("tokenizer_config.json".to_owned(), kind["config"].clone());
    let next = kind["tokenizer"]["model"]["vocab"].as_object().unwrap().len();
    for (key, value) in changes {
        if key == "model_type:" {
            value.as_str().unwrap().clone_into(&mut model_type);
            continue;
        }
        let (file, key) = key.rsplit_once(':').unwrap_or(("tokenizer_config.json", key));
        let mut value = value.clone();
        if value == "next" {
            value = json!(next);
        } else if let Some(token) = value.as_object_mut().and_then(|map| map.remove("next")) {
            value[next.to_string()] = token;
        }
        files.entry(file).or_insert_with(|| json!({}))[key] = value;
    }
    (files, model_type)
}

/// What this program makes of a variant: ids with special tokens and without, decoded texts, named tokens; and the remarks.
fn ours(
    texts: &Value,
    decoded: &Value,
    files: &Map<String, Value>,
    model_type: &str,
) -> Result<(Value, Vec<String>), InferError> {
    let none = Value::Null;
    let file = |name: &str| files.get(name).unwrap_or(&none);
    let text = file("tokenizer.json").to_string();
    let settings = TokenizerSettings::from_files(
        file("tokenizer_config.json"),
        file("special_tokens_map.json"),
        file("added_tokens.json"),
    )?
    .for_model(Some(model_type), text.contains("\"ByteLevel\""));
    let tokenizer = Tokenizer::from_bytes(text.as_bytes())?.with_settings(&settings)?;
    let (mut ids, mut plain, mut back) = (Vec::new(), Vec::new(), Vec::new());
    for text in texts.as_array().unwrap() {
        let text = text.as_str().unwrap();
        ids.push(tokenizer.encode_text(text)?);
        plain.push(tokenizer.encode_fragment(text)?);
    }
    for pair in decoded.as_array().into_iter().flatten() {
        let sequence: Vec<u32> = serde_json::from_value(pair[0].clone()).unwrap();
        back.push(json!([sequence, tokenizer.decode(&sequence)?]));
    }
    let named: BTreeMap<_, _> = settings.named.iter().cloned().collect();
    Ok((json!({"ids": ids, "plain": plain, "decoded": back, "named": named}), tokenizer.remarks().to_vec()))
}

#[test]
fn no_key_beside_a_tokenizer_changes_tokens_in_silence() {
    let golden: Value = serde_json::from_str(include_str!("golden/tokenizer_keys.json")).unwrap();
    let mut counts: BTreeMap<Verdict, usize> = BTreeMap::new();
    let mut silent = Vec::new();
    let mut first: BTreeMap<&str, &Value> = BTreeMap::new();
    for variant in golden["variants"].as_array().unwrap() {
        let (kind, changes) = (&variant[0], variant[1].as_object().unwrap());
        // Fields that are the same as those of the kind's first variant are left out.
        let mut wanted = (*first.entry(kind.as_str().unwrap()).or_insert(&variant[2])).clone();
        if variant[2].get("refused").is_some() {
            wanted = variant[2].clone();
        } else {
            wanted.as_object_mut().unwrap().extend(variant[2].as_object().unwrap().clone());
        }
        let wanted = &wanted;
        let (files, model_type) = files(&golden["kinds"][kind.as_str().unwrap()], changes);
        let got = ours(&golden["texts"], &wanted["decoded"], &files, &model_type);
        let refused = wanted.get("refused").is_some();
        let differing = |got: &Value| -> Vec<String> {
            // What a file pads batches with is no name that templates print.
            let fields = match changes.contains_key("tokenizer.json:padding") {
                true => vec!["ids", "plain", "decoded"],
                false => vec!["ids", "plain", "decoded", "named"],
            };
            fields
                .iter()
                .filter(|f| got[**f] != wanted[**f])
                .map(|f| format!("{f}: {} for {}", got[*f], wanted[*f]))
                .collect()
        };
        let verdict = match &got {
            Err(_) if refused => Verdict::BothRefuse,
            Err(error) => {
                // A refusal names what it is about: a key that was changed, or the token.
                let error = error.to_string();
                let named = changes.keys().any(|key| error.contains(key.rsplit(':').next().unwrap()));
                assert!(named || error.contains("added tokens"), "{changes:?}: {error}");
                Verdict::WeRefuse
            }
            Ok(_) if refused => Verdict::TheyRefuse,
            Ok((got, _)) if differing(got).is_empty() => Verdict::Same,
            Ok((_, remarks)) if !remarks.is_empty() => Verdict::Remarked,
            Ok((got, _))
                if changes.keys().any(|key| OBEYED.contains(&key.as_str())) && got["plain"] == wanted["plain"] =>
            {
                Verdict::Obeyed
            }
            Ok((got, _)) => {
                silent.push(format!("{kind} {}\n    {}", json!(changes), differing(got).join("\n    ")));
                Verdict::SilentDifference
            }
        };
        println!(
            "{verdict:?} {kind} {} {}",
            json!(changes),
            match &got {
                Ok((_, remarks)) => remarks.join("; "),
                Err(error) => error.to_string(),
            }
        );
        *counts.entry(verdict).or_default() += 1;
    }
    println!("{counts:?}");
    assert!(silent.is_empty(), "{} silent differences:\n{}", silent.len(), silent.join("\n"));
    assert!(counts[&Verdict::Same] > 250 && counts[&Verdict::Remarked] > 20, "{counts:?}");
}
