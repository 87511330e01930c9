//! Whether a checkpoint holds a model's tensors, by names, shapes and types alone: the one check before anything of it
//! is used.

use std::collections::HashSet;

use fourfold_tensor::{TensorInfo, WeightSource};

use crate::{ModelError, Role, WeightSpec};

/// Types that are no floats a layer computes with, as checkpoints call them.
const NO_WEIGHTS: &[&str] = &[
    "BOOL",
    "U8",
    "U16",
    "U32",
    "U64",
    "I8",
    "I16",
    "I32",
    "I64",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "C64",
];

/// Tensors that change nothing, by the ends of their names: tables that configurations describe, and PyTorch's
/// counters.
const WITHOUT_EFFECT: &[&str] = &[".rotary_emb.inv_freq", ".num_batches_tracked"];

/// Who puts what before every name.
const PREFIXES: &[(&str, &str)] = &[
    ("_orig_mod.", "torch.compile"),
    ("_fsdp_wrapped_module.", "FSDP"),
    ("base_model.model.", "PEFT"),
    ("language_model.", "a model of text and images"),
    ("module.", "DataParallel"),
];

/// What the parts of others' layouts are called beside a layer's name.
const LAYOUTS: &[(&str, &str)] = &[
    ("qweight", "GPTQ or AWQ"),
    ("weight.absmax", "bitsandbytes, 4 bits"),
    ("weight.quant_map", "bitsandbytes, 4 bits"),
    ("SCB", "bitsandbytes, 8 bits"),
    ("weight.SCB", "bitsandbytes, 8 bits"),
    ("weight_format", "bitsandbytes, 8 bits"),
    ("bitmask", "sparse-bitmask of compressed-tensors"),
    ("compressed", "sparse-bitmask of compressed-tensors"),
    ("weight.bitmask", "sparse-bitmask of compressed-tensors"),
    ("weight.compressed", "sparse-bitmask of compressed-tensors"),
    ("weight_packed", "compressed-tensors"),
    ("W_q", "HQQ"),
    ("codebooks", "AQLM"),
    ("base_layer.weight", "PEFT"),
];

impl WeightSpec {
    /// Whether a stored tensor of shape `found` is this one: a vector may be stored as one row, a convolution as the
    /// matrix of as many rows.
    ///
    /// # Errors
    /// [`ModelError::Shape`].
    pub fn check_shape(&self, found: &[usize]) -> Result<(), ModelError> {
        let row = [1, self.elements() as usize];
        let matrix = [self.shape.first().copied().unwrap_or(1), self.shape.iter().skip(1).product()];
        let is_right = found == self.shape
            || (self.shape.len() == 1 && found == row)
            || (self.role == Role::Convolution && found == matrix);
        match is_right {
            true => Ok(()),
            false => Err(ModelError::Shape {
                tensor: self.name.clone(),
                expected: self.shape.clone(),
                found: found.to_vec(),
            }),
        }
    }
}

/// Checks that `source` holds every one of `weights` in its shape and in a type of floats. Gives the names of the
/// tensors that none of `weights` reads and that might have been meant to be read.
///
/// # Errors
/// [`ModelError::MissingTensor`] with what was found in its place, [`ModelError::Shape`], [`ModelError::NotFloat`].
pub fn check_tensors(weights: &[WeightSpec], source: &dyn WeightSource) -> Result<Vec<String>, ModelError> {
    for weight in weights {
        let Some(info) = source.info(&weight.name) else {
            return Err(missing(weight, weights, source));
        };
        if let Some(found) = layout(weight, source) {
            return Err(ModelError::ForeignLayout { tensor: weight.name.clone(), found });
        }
        weight.check_shape(&info.shape)?;
        if !holds_floats(info) {
            let (tensor, storage, shape) = (weight.name.clone(), info.storage.clone(), info.shape.clone());
            return Err(ModelError::NotFloat { tensor, storage, shape });
        }
    }
    let known: HashSet<&str> = weights.iter().map(|weight| weight.name.as_str()).collect();
    let is_unread = |info: &&TensorInfo| {
        !known.contains(info.name.as_str()) && !WITHOUT_EFFECT.iter().any(|end| info.name.ends_with(end))
    };
    Ok(source.tensors().iter().filter(is_unread).map(|info| info.name.clone()).collect())
}

/// Whether a tensor is stored in a form that has floats: plain ones, or codes that stand for them.
pub fn holds_floats(info: &TensorInfo) -> bool {
    !NO_WEIGHTS.contains(&info.storage.as_str())
}

fn missing(weight: &WeightSpec, weights: &[WeightSpec], source: &dyn WeightSource) -> ModelError {
    let absent = weights.iter().map(|other| other.name.as_str()).filter(|name| source.info(name).is_none());
    let absent: Vec<&str> = absent.collect();
    if let Some(found) = layout(weight, source) {
        return ModelError::ForeignLayout { tensor: weight.name.clone(), found };
    }
    ModelError::MissingTensor {
        tensor: weight.name.clone(),
        others: absent.len() - 1,
        found: prefix(&weight.name, &absent, source)
            .or_else(|| near(&weight.name, weights, source))
            .unwrap_or_default(),
    }
}

/// Another program's layout of a layer's weight: its name, and the tensor that shows it.
fn layout(weight: &WeightSpec, source: &dyn WeightSource) -> Option<String> {
    let stem = weight.name.strip_suffix("weight")?;
    let shown = |(part, of): &(&str, &str)| {
        let name = format!("{stem}{part}");
        source.info(&name).map(|info| format!("{name} {} {:?}: the layout of {of}", info.storage, info.shape))
    };
    LAYOUTS.iter().find_map(shown)
}

/// What stands before the names of a checkpoint's tensors: before that of the missing tensor `name`, and of most
/// missing ones.
fn prefix(name: &str, absent: &[&str], source: &dyn WeightSource) -> Option<String> {
    const LOOKED_AT: usize = 64;
    let bare = |name: &str| name.strip_prefix("model.").map(str::to_owned);
    let absent = &absent[..absent.len().min(LOOKED_AT)];
    let is_of_most = |prefix: &&str, short: bool| {
        let there = absent.iter().filter(|name| {
            let name = if short { bare(name) } else { Some((**name).to_owned()) };
            name.is_some_and(|name| source.info(&format!("{prefix}{name}")).is_some())
        });
        2 * there.count() >= absent.len()
    };
    let find = |name: &str, short: bool| {
        let before = source.tensors().iter().filter_map(|info| info.name.strip_suffix(name));
        before.filter(|before| before.ends_with('.')).find(|before| is_of_most(before, short)).map(str::to_owned)
    };
    let found = find(name, false).or_else(|| find(&bare(name)?, true))?;
    let of = PREFIXES.iter().find(|(part, _)| found.contains(part)).map(|(_, of)| format!(" ({of})"));
    let of = of.unwrap_or_default();
    Some(format!("; its tensors are called {found}…{of}: save the model without that prefix, or rename them"))
}

/// Unread tensors of almost the same name.
fn near(name: &str, weights: &[WeightSpec], source: &dyn WeightSource) -> Option<String> {
    const SHOWN: usize = 3;
    let known: HashSet<&str> = weights.iter().map(|weight| weight.name.as_str()).collect();
    let most = name.len() / 3;
    let mut near: Vec<(usize, &str)> = source
        .tensors()
        .iter()
        .map(|info| info.name.as_str())
        .filter(|other| !known.contains(other) && other.len().abs_diff(name.len()) <= most)
        .map(|other| (distance(name, other), other))
        .filter(|(distance, _)| *distance <= most)
        .collect();
    near.sort_unstable();
    near.truncate(SHOWN);
    let names: Vec<&str> = near.into_iter().map(|(_, other)| other).collect();
    (!names.is_empty()).then(|| format!("; it holds {}", names.join(", ")))
}

/// Insertions, deletions and changes of a byte that make `b` of `a` (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::RandomWeights;
    use crate::{ModelSpec, spec_from_config};

    const Q: &str = "model.layers.1.self_attn.q_proj.weight";

    fn spec() -> ModelSpec {
        spec_from_config(&json!({
            "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "attention_bias": true,
        }))
        .unwrap()
    }

    fn error(source: &RandomWeights) -> String {
        check_tensors(&spec().weights(), source).unwrap_err().to_string()
    }

    fn without(names: &[&str]) -> RandomWeights {
        names.iter().fold(RandomWeights::new(&spec(), 0), |source, name| source.without(name))
    }

    #[test]
    fn every_wrong_shape_is_named() {
        for weight in spec().weights() {
            let longer = weight.shape.iter().map(|&d| d + 1).collect::<Vec<_>>();
            let shorter = weight.shape.iter().map(|&d| d - 1).collect::<Vec<_>>();
            let turned = weight.shape.iter().rev().copied().collect::<Vec<_>>();
            let flat = vec![weight.shape.iter().product::<usize>(), 1];
            for shape in [longer, shorter, turned, flat, vec![]].iter().filter(|shape| **shape != weight.shape) {
                let message = error(&RandomWeights::new(&spec(), 0).with(&weight.name, shape));
                assert!(message.contains(&weight.name) && message.contains(&format!("{shape:?}")), "{message}");
            }
        }
        let row = RandomWeights::new(&spec(), 0).with("model.norm.weight", &[1, 8]);
        assert_eq!(check_tensors(&spec().weights(), &row).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_stands_in_the_place_of_a_missing_tensor_is_named() {
        let layer = Q.strip_suffix("weight").unwrap();
        for (part, words) in [
            ("qweight", "GPTQ or AWQ"),
            ("weight.absmax", "bitsandbytes"),
            ("bitmask", "sparse-bitmask"),
            ("base_layer.weight", "PEFT"),
        ] {
            let message = error(&without(&[Q]).with(&format!("{layer}{part}"), &[2, 2]));
            assert!(message.contains(words) && message.contains(Q), "{message}");
        }
        for (prefix, of) in [
            ("_orig_mod.", "torch.compile"),
            ("module.", "DataParallel"),
            ("base_model.model.", "PEFT"),
            ("student.", "student.…"),
        ] {
            let message = error(&without(&[Q]).with(&format!("{prefix}{Q}"), &[8, 8]));
            assert!(message.contains(&format!("{prefix}…")) && message.contains(of), "{message}");
        }
        let language = Q.replace("model.", "model.language_model.");
        let message = error(&without(&[Q]).with(&language, &[8, 8]));
        assert!(message.contains("model.language_model.…") && message.contains("images"), "{message}");
        let message = error(&without(&[Q, "model.norm.weight"]).with("model.layers.1.self_attn.q.weight", &[8, 8]));
        assert!(message.contains("and 1 other") && message.contains("self_attn.q.weight"), "{message}");
    }

    #[test]
    fn unread_tensors_are_listed_but_for_those_without_effect() {
        let source = RandomWeights::new(&spec(), 0)
            .with("model.layers.2.mlp.up_proj.weight", &[1])
            .with("model.layers.0.self_attn.rotary_emb.inv_freq", &[2]);
        let unread = check_tensors(&spec().weights(), &source).unwrap();
        assert_eq!(unread, ["model.layers.2.mlp.up_proj.weight"]);
    }

    #[test]
    fn distances_are_edits() {
        for (a, b, edits) in [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }
}
