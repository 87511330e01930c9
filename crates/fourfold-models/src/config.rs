//! Reading numbers out of an untrusted `config.json`.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::ModelError;

/// Features, heads times elements, and other widths of matrices.
pub(crate) const WIDTHS: RangeInclusive<usize> = 1..=1 << 20;
/// Numbers of heads, experts, layers.
pub(crate) const COUNTS: RangeInclusive<usize> = 1..=1 << 12;
/// Vocabulary entries and positions.
pub(crate) const LENGTHS: RangeInclusive<usize> = 1..=1 << 28;

/// A JSON object whose values are checked as they are read. `null` counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Config<'a> {
    object: &'a Map<String, Value>,
    /// Name of the object inside the file, empty for the outermost.
    place: &'a str,
}

impl<'a> Config<'a> {
    /// The outermost object.
    pub fn new(value: &'a Value) -> Result<Self, ModelError> {
        match value.as_object() {
            Some(object) => Ok(Self { object, place: "" }),
            None => Err(ModelError::Inconsistent("the file holds no JSON object".to_owned())),
        }
    }

    /// An object inside.
    pub fn object(&self, key: &'a str) -> Result<Option<Config<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_object() {
                Some(object) => Ok(Some(Config { object, place: key })),
                None => Err(self.bad(key, "an object is expected")),
            },
        }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Every key, in the file's order.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    /// Whether the key is there with the value `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Value::is_null)
    }

    /// Whether the key is there, with `null` or another value.
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// A key's name with the object it stands in.
    pub fn name(&self, key: &str) -> String {
        if self.place.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place) }
    }

    pub fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingKey { key: self.name(key) }
    }

    /// The error of a value that cannot be used.
    pub fn bad(&self, key: &str, reason: impl Into<String>) -> ModelError {
        let mut value = self.object.get(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        if value.len() > 80 {
            value = value.chars().take(77).collect::<String>() + "...";
        }
        ModelError::Value { key: self.name(key), value, reason: reason.into() }
    }

    pub fn optional_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|size| range.contains(size)) {
            Some(size) => Ok(Some(size)),
            None => Err(self.bad(key, format!("a whole number from {low} to {high} is expected"))),
        }
    }

    pub fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, ModelError> {
        self.optional_size(key, range)?.ok_or_else(|| self.missing(key))
    }

    pub fn size_or(&self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize, ModelError> {
        Ok(self.optional_size(key, range)?.unwrap_or(default))
    }

    /// A positive, finite number.
    pub fn optional_positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.bad(key, "a positive number is expected")),
        }
    }

    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.optional_positive(key)?.unwrap_or(default))
    }

    pub fn positive(&self, key: &str) -> Result<f64, ModelError> {
        self.optional_positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number that may be zero, which then counts as absent (as Python's truth does in published configurations).
    pub fn optional_nonzero(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.get(key).map(Value::as_f64) {
            None | Some(Some(0.0)) => Ok(None),
            Some(_) => self.optional_positive(key),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(key, "true or false is expected")),
        }
    }

    /// A truth value of which `null` is false, as Python takes it; `default` where the key is absent.
    pub fn truth(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        if self.is_null(key) { Ok(false) } else { self.flag(key, default) }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.bad(key, "a string is expected")),
        }
    }

    /// Insists on one of `values` where the key is present.
    pub fn only(&self, key: &str, values: &[&str]) -> Result<(), ModelError> {
        match self.text(key)? {
            Some(value) if !values.contains(&value) => {
                Err(self.bad(key, format!("only {} is supported", values.join(", "))))
            }
            _ => Ok(()),
        }
    }
}
