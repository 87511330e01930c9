//! The `quantization_config` of an output: compressed-tensors' own where it can say everything, a superset of it else.

use std::collections::BTreeSet;

use fourfold_tensor::{Form, OffsetsForm, QuantizedForm, ScalesForm};
use serde_json::{Value, json};

use super::composite::to_json;
use super::config::{Scheme, Strategy, is_embedding};
use super::parts::{DOWN, TERM, UP};

/// Describes the quantized tensors among `tensors`; `None` where there are none.
///
/// Where compressed-tensors has words for everything, `quant_method` is `compressed-tensors` and Python loads the output; with
/// double-quantized scales, real offsets, codebooks, column orders, groups that do not divide the row, or quantized tensors that
/// are no `weight`, it is `fourfold`: the same members, and the parts in the file say the rest.
pub fn quantization_config(tensors: &[(String, Form)]) -> Option<Value> {
    let mut schemes: Vec<(Value, Vec<&str>)> = Vec::new();
    let mut plain: BTreeSet<&str> = BTreeSet::new();
    let mut expressible = true;
    let mut composites: Vec<(Value, Vec<&str>)> = Vec::new();
    for (name, form) in tensors {
        if matches!(form, Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_)) {
            add(&mut composites, to_json(form), name);
        }
    }
    let parts: Vec<(String, &Form)> = tensors.iter().flat_map(|(name, form)| single_parts(name, form)).collect();
    for (name, form) in &parts {
        let module = name.strip_suffix(".weight");
        match form {
            // Modules that Python would take for quantized ones of the class `Linear`.
            Form::Dense { shape, .. } => plain.extend(module.filter(|m| shape.len() == 2 && !is_embedding(m))),
            Form::Quantized(form) => {
                expressible &= module.is_some() && is_expressible(form);
                let weights = weights(form);
                add(&mut schemes, weights, module.unwrap_or(name));
            }
            Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => {}
        }
    }
    if schemes.is_empty() && composites.is_empty() {
        return None;
    }
    // An output head tied to the embedding has no tensor of its own and takes no part.
    if !tensors.iter().any(|(name, _)| name == "lm_head.weight") {
        plain.insert("lm_head");
    }
    // The commonest scheme of linear layers is the class's; all others are listed by name, which goes before the class.
    let linear = |modules: &[&str]| modules.iter().filter(|m| !is_embedding(m)).count();
    let commonest = (0..schemes.len()).rev().max_by_key(|&i| linear(&schemes[i].1)).unwrap_or(0);
    let expressible = expressible && composites.is_empty();
    let mut groups = serde_json::Map::new();
    for (i, (weights, modules)) in schemes.iter().enumerate() {
        let mut targets: Vec<&str> = Vec::new();
        if i == commonest && linear(modules) > 0 {
            targets.push("Linear");
            targets.extend(modules.iter().filter(|m| is_embedding(m)));
        } else {
            targets.extend(modules);
        }
        let group = json!({"targets": targets, "weights": weights, "input_activations": null,
            "output_activations": null, "format": "pack-quantized"});
        groups.insert(format!("group_{i}"), group);
    }
    let mut config = json!({
        "quant_method": if expressible { "compressed-tensors" } else { "fourfold" },
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    });
    if !composites.is_empty() {
        let forms = composites.iter().map(|(form, targets)| json!({"targets": targets, "form": form}));
        config["forms"] = forms.collect();
    }
    Some(config)
}

/// Adds `name` to those that share `value`.
fn add<'a>(groups: &mut Vec<(Value, Vec<&'a str>)>, value: Value, name: &'a str) {
    match groups.iter_mut().find(|(known, _)| *known == value) {
        Some((_, names)) => names.push(name),
        None => groups.push((value, vec![name])),
    }
}

/// The parts of a form that are dense or packed, each under its own name.
fn single_parts<'a>(name: &str, form: &'a Form) -> Vec<(String, &'a Form)> {
    match form {
        Form::Dense { .. } | Form::Quantized(_) => vec![(name.to_owned(), form)],
        Form::Sparse(_) => Vec::new(),
        Form::LowRank { up, down } => {
            let mut parts = single_parts(&format!("{name}{UP}"), up);
            parts.extend(single_parts(&format!("{name}{DOWN}"), down));
            parts
        }
        Form::Sum(terms) => {
            terms.iter().enumerate().flat_map(|(i, term)| single_parts(&format!("{name}{TERM}{i}"), term)).collect()
        }
    }
}

/// The first of `tensors` for which compressed-tensors has no words: with one, [`quantization_config`] is this program's own.
pub fn inexpressible(tensors: &[(String, Form)]) -> Option<&str> {
    let can = |(name, form): &(String, Form)| match form {
        Form::Dense { .. } => true,
        Form::Quantized(form) => name.ends_with(".weight") && is_expressible(form),
        Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => false,
    };
    tensors.iter().find(|tensor| !can(tensor)).map(|(name, _)| name.as_str())
}

/// Whether compressed-tensors has words, and code, for the form.
fn is_expressible(form: &QuantizedForm) -> bool {
    let whole_groups = form.group_size >= form.cols || form.cols.is_multiple_of(form.group_size);
    let scales = !matches!(form.scales, ScalesForm::Double(_));
    let offsets = match form.offsets {
        OffsetsForm::Symmetric => true,
        OffsetsForm::ZeroPoint => matches!(form.scales, ScalesForm::PerGroup(_)),
        OffsetsForm::ZeroPointPerTensor => matches!(form.scales, ScalesForm::PerTensor(_)),
        OffsetsForm::Min(_) | OffsetsForm::Double(_) => false,
    };
    scales && offsets && whole_groups && !form.codebook && !form.g_idx
}

/// The `weights` of a group.
fn weights(form: &QuantizedForm) -> Value {
    let scheme = Scheme::of(form);
    let (strategy, group_size) = match scheme.strategy {
        Strategy::Tensor => ("tensor", None),
        Strategy::Channel => ("channel", None),
        Strategy::Group(size) => ("group", Some(size)),
        // No form has blocks of rows.
        Strategy::Block(..) => ("block", None),
    };
    json!({
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": false,
    })
}
