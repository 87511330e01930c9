//! The `quantization_config` of an output: compressed-tensors' own where it can say everything, a superset of it else.

use std::collections::BTreeSet;

use fourfold_tensor::{Form, OffsetsForm, QuantizedForm, ScalesForm};
use serde_json::{Map, Value, json};

use super::composite::to_json;
use super::config::{Scheme, Strategy, is_embedding};
use super::parts::{DOWN, TERM, UP};

/// The routed experts of a mixture: transformers decodes all of them by the group that has a pattern with this word.
const EXPERTS: &str = r"re:.*\.experts\.\d+\.\w+$";

/// Describes the quantized tensors among `tensors`; `None` where there are none.
///
/// Where compressed-tensors has words for everything, `quant_method` is `compressed-tensors` and Python loads the output; with
/// double-quantized scales, real offsets, codebooks, column orders, groups that do not divide the row, quantized tensors that
/// are no `weight`, or experts that are not all of one form, it is `fourfold`: the same members, and the parts in the file say the rest.
pub fn quantization_config(tensors: &[(String, Form)]) -> Option<Value> {
    let mut schemes: Vec<(Value, Vec<&str>)> = Vec::new();
    let mut plain: BTreeSet<&str> = BTreeSet::new();
    let mut composites: Vec<(Value, Vec<&str>)> = Vec::new();
    for (name, form) in tensors {
        if matches!(form, Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_)) {
            add(&mut composites, to_json(form), name);
        }
    }
    let experts = scheme_of_experts(tensors).ok().flatten();
    let parts: Vec<(String, &Form)> = tensors.iter().flat_map(|(name, form)| single_parts(name, form)).collect();
    for (name, form) in &parts {
        let module = name.strip_suffix(".weight");
        match form {
            // Modules that Python would take for quantized ones of the class `Linear`.
            Form::Dense { shape, .. } => plain.extend(module.filter(|m| shape.len() == 2 && !is_embedding(m))),
            Form::Quantized(form) => {
                let module = module.unwrap_or(name);
                let scheme = experts.filter(|_| is_expert(module)).unwrap_or_else(|| Scheme::of(form));
                add(&mut schemes, weights(scheme), module);
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
    let mut groups = serde_json::Map::new();
    for (i, (weights, modules)) in schemes.iter().enumerate() {
        let mut targets: Vec<&str> = Vec::new();
        if i == commonest && linear(modules) > 0 {
            targets.push("Linear");
            targets.extend(modules.iter().filter(|m| is_embedding(m)));
        } else {
            targets.extend(modules);
        }
        if experts.is_some() && modules.iter().any(|m| is_expert(m)) {
            targets.retain(|m| !is_expert(m));
            targets.push(EXPERTS);
        }
        let group = json!({"targets": targets, "weights": weights, "input_activations": null,
            "output_activations": null, "format": "pack-quantized"});
        groups.insert(format!("group_{i}"), group);
    }
    let mut config = json!({
        "quant_method": if is_own(tensors) { "fourfold" } else { "compressed-tensors" },
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

/// Why other programs must not load this program's own packing: transformers skips a `quant_method` that it does not know and would run on
/// random weights, but shows and refuses a `transformers_weights` that is no file's name.
const NOT_FOR_OTHERS: &str = "these weights are packed by fourfold, which alone can run them; `fourfold compress --format \
                              compressed-tensors` packs weights for transformers";
const WEIGHTS_FILE: &str = "transformers_weights";

/// Puts what describes the stored forms of `tensors` in the place of what a config.json said of another file's.
pub fn describe_storage(config: &mut Map<String, Value>, tensors: &[(String, Form)]) {
    for member in ["quantization_config", "compression_config", WEIGHTS_FILE] {
        config.shift_remove(member);
    }
    let Some(quantization) = quantization_config(tensors) else { return };
    config.insert("quantization_config".to_owned(), quantization);
    if is_own(tensors) {
        config.insert(WEIGHTS_FILE.to_owned(), NOT_FOR_OTHERS.into());
    }
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

/// Whether tensors are stored in this program's own packing, which compressed-tensors has no words for.
pub fn is_own(tensors: &[(String, Form)]) -> bool {
    inexpressible(tensors).is_some() || odd_experts(tensors).is_some()
}

/// Whether a module is a projection of a routed expert: `….experts.3.up_proj`.
fn is_expert(module: &str) -> bool {
    let after = module.split_once(".experts.").and_then(|(_, rest)| rest.split_once('.'));
    after.is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a form is a matrix's.
fn is_matrix(form: &Form) -> bool {
    !matches!(form, Form::Dense { shape, .. } if shape.len() != 2)
}

/// The scheme of all routed experts together; `None` where there are none, or none is packed.
///
/// # Errors
/// Two weights that transformers cannot decode in one model: experts of different schemes, or a dense expert beside packed weights.
fn scheme_of_experts(tensors: &[(String, Form)]) -> Result<Option<Scheme>, (&str, &str)> {
    let packed = |form: &Form| match form {
        Form::Quantized(form) => Some(form.clone()),
        Form::Dense { .. } | Form::Sparse(_) | Form::LowRank { .. } | Form::Sum(_) => None,
    };
    let mut experts = tensors.iter().filter(|(name, form)| is_expert(name) && is_matrix(form));
    let Some((first, form)) = experts.next() else { return Ok(None) };
    let Some(one) = packed(form) else {
        let other = tensors.iter().find(|(_, form)| packed(form).is_some());
        return other.map_or(Ok(None), |(other, _)| Err((first, other)));
    };
    // A group as wide as the row is one scale a row, whatever the others are called.
    let mut scheme = Scheme::of(&one);
    for (name, form) in experts {
        let same = packed(form).filter(|other| {
            let (a, b) = (Scheme::of(other), scheme);
            let whole_rows = a.strategy == b.strategy || other.group_size == one.group_size;
            a.bits == b.bits && a.symmetric == b.symmetric && whole_rows
        });
        match same.map(|other| Scheme::of(&other)) {
            Some(group @ Scheme { strategy: Strategy::Group(_), .. }) => scheme = group,
            Some(_) => {}
            None => return Err((first, name)),
        }
    }
    Ok(Some(scheme))
}

/// Two weights that transformers cannot decode in one model, since it decodes all routed experts by one group: experts that are stored
/// differently, or a dense expert and a packed weight.
pub fn odd_experts(tensors: &[(String, Form)]) -> Option<(&str, &str)> {
    scheme_of_experts(tensors).err()
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
fn weights(scheme: Scheme) -> Value {
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
