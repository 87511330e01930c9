//! Which layers an adapter's configuration names, as PEFT's `check_target_module_exists` decides it.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::AdapterError;
use super::config::{bad, regex};

/// The word of `target_modules` for every linear layer but the output projection.
const ALL_LINEAR: &str = "all-linear";

/// The layers that have an adapter.
#[derive(Debug)]
pub(super) struct Targets {
    names: Names,
    excluded: Names,
    /// `layers_to_transform`: numbers of blocks.
    layers: Option<Vec<u64>>,
    /// How a block's number is found in a name.
    numbers: Vec<Regex>,
    saved: Vec<String>,
}

/// A list of names, or an expression for whole names.
#[derive(Debug)]
enum Names {
    Unsaid,
    AllLinear,
    List(Vec<String>),
    Pattern(Box<Regex>),
}

impl Names {
    fn parse(config: &Map<String, Value>, key: &str) -> Result<Self, AdapterError> {
        match config.get(key) {
            None | Some(Value::Null) => Ok(Self::Unsaid),
            Some(Value::String(text)) if text.to_lowercase() == ALL_LINEAR => Ok(Self::AllLinear),
            Some(Value::String(text)) => Ok(Self::Pattern(Box::new(regex(config, key, &format!("^(?:{text})$"))?))),
            Some(_) => match strings(config, key)? {
                list if list.is_empty() => Ok(Self::Unsaid),
                list => Ok(Self::List(list)),
            },
        }
    }

    /// Whether a layer is among them.
    fn has(&self, layer: &str) -> bool {
        match self {
            Self::Unsaid => false,
            Self::AllLinear => !ends_with(layer, "lm_head"),
            Self::List(names) => names.iter().any(|name| ends_with(layer, name)),
            Self::Pattern(pattern) => pattern.is_match(layer).unwrap_or(false),
        }
    }
}

impl Targets {
    pub(super) fn parse(config: &Map<String, Value>) -> Result<Self, AdapterError> {
        let number = |value: &Value| value.as_u64();
        let layers = match config.get("layers_to_transform") {
            None | Some(Value::Null) => None,
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(Value::Array(list)) => Some(list.iter().map(number).collect::<Option<Vec<u64>>>()),
            Some(value) => Some(number(value).map(|number| vec![number])),
        };
        let layers = match layers {
            None => None,
            Some(Some(layers)) => Some(layers),
            Some(None) => return Err(bad(config, "layers_to_transform", "a number or a list of numbers is expected")),
        };
        let patterns = strings(config, "layers_pattern")?;
        let numbers = match patterns.as_slice() {
            [] => vec![regex(config, "layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?],
            some => some
                .iter()
                .map(|pattern| regex(config, "layers_pattern", &format!(r"^(?:.*?\.)?(?:{pattern})\.(\d+)\.")))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            names: Names::parse(config, "target_modules")?,
            excluded: Names::parse(config, "exclude_modules")?,
            layers,
            numbers,
            saved: strings(config, "modules_to_save")?,
        })
    }

    /// Whether the configuration says that a layer has an adapter; `None` where it says nothing of layers at all.
    pub(super) fn adapts(&self, layer: &str) -> Option<bool> {
        let is_target = match &self.names {
            Names::Unsaid => return None,
            Names::Pattern(_) | Names::AllLinear => self.names.has(layer),
            Names::List(_) => self.names.has(layer) && self.is_in_layers(layer),
        };
        Some(is_target && !self.excluded.has(layer) && !self.is_in_saved(layer))
    }

    /// Whether every layer that is named must have its tensors: with [`ALL_LINEAR`] it depends on what PEFT took for a
    /// linear layer.
    pub(super) fn are_exact(&self) -> bool {
        !matches!(self.names, Names::AllLinear | Names::Unsaid)
    }

    /// Whether a module was trained whole (`modules_to_save`), itself or with one that it is part of. PEFT goes by the
    /// ends of names, so that `norm` is every norm.
    pub(super) fn saves(&self, module: &str) -> bool {
        let mut parts = module.match_indices('.').map(|(dot, _)| &module[..dot]).chain([module]);
        parts.any(|part| self.saved.iter().any(|saved| part.ends_with(saved.as_str())))
    }

    /// Whether a layer cannot have an adapter for being saved whole: here PEFT goes by whole parts of names.
    fn is_in_saved(&self, layer: &str) -> bool {
        let mut parts = layer.match_indices('.').map(|(dot, _)| &layer[..dot]).chain([layer]);
        parts.any(|part| self.saved.iter().any(|saved| ends_with(part, saved)))
    }

    fn is_in_layers(&self, layer: &str) -> bool {
        let Some(layers) = &self.layers else { return true };
        let found = self.numbers.iter().find_map(|pattern| pattern.captures(layer).ok().flatten());
        let number = found.and_then(|found| found.get(1)?.as_str().parse().ok());
        number.is_some_and(|number| layers.contains(&number))
    }
}

/// Whether `name` is the last parts of a module's name, or all of it.
fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A string, or a list of them.
fn strings(config: &Map<String, Value>, key: &str) -> Result<Vec<String>, AdapterError> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let list = match config.get(key) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(text).collect(),
        Some(value) => text(value).map(|text| if text.is_empty() { Vec::new() } else { vec![text] }),
    };
    list.ok_or_else(|| bad(config, key, "a list of names is expected"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const Q1: &str = "model.layers.1.self_attn.q_proj";

    fn adapts(config: Value, layer: &str) -> Option<bool> {
        Targets::parse(config.as_object().unwrap()).unwrap().adapts(layer)
    }

    #[test]
    fn layers_are_chosen_as_peft_chooses_them() {
        for (config, layer, expected) in [
            (json!({"target_modules": ["q_proj"]}), Q1, Some(true)),
            (json!({"target_modules": ["proj"]}), Q1, Some(false)),
            (json!({"target_modules": [Q1]}), Q1, Some(true)),
            (json!({"target_modules": r".*\.q_proj"}), Q1, Some(true)),
            (json!({"target_modules": "q_proj"}), Q1, Some(false)),
            (json!({"target_modules": "all-linear"}), Q1, Some(true)),
            (json!({"target_modules": "all-linear"}), "lm_head", Some(false)),
            (json!({"target_modules": null}), Q1, None),
            (json!({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}), Q1, Some(false)),
            (json!({"target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"}), Q1, Some(true)),
            (json!({"target_modules": ["q_proj"], "layers_to_transform": [1]}), Q1, Some(true)),
            (json!({"target_modules": ["q_proj"], "layers_to_transform": 0}), Q1, Some(false)),
            (json!({"target_modules": ["q_proj"], "layers_to_transform": []}), Q1, Some(true)),
            (json!({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"}), Q1, Some(false)),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
                Q1,
                Some(true),
            ),
            (json!({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}), "lm_head", Some(false)),
            // The first number is the block's, the second the expert's.
            (
                json!({"target_modules": ["up_proj"], "layers_to_transform": [5]}),
                "model.layers.1.mlp.experts.5.up_proj",
                Some(false),
            ),
        ] {
            assert_eq!(adapts(config.clone(), layer), expected, "{config} {layer}");
        }
        assert!(Targets::parse(json!({"layers_to_transform": "1"}).as_object().unwrap()).is_err());
        assert!(Targets::parse(json!({"target_modules": 3}).as_object().unwrap()).is_err());
    }
}
