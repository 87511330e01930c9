//! Reading a request's fields: an unknown one is left alone, a wrong one is an error that names it.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::ApiError;

/// A JSON object of a request. `null` counts as absent, as OpenAI's clients send it.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    place: &'a str,
}

impl<'a> Fields<'a> {
    /// The request's body.
    ///
    /// # Errors
    /// It is no object.
    pub fn of_body(body: &'a Value) -> Result<Self, ApiError> {
        let object = body.as_object().ok_or_else(|| ApiError::bad_request("the body is no JSON object"))?;
        Ok(Self { object, place: "" })
    }

    /// An object inside; `place` is what errors call it.
    ///
    /// # Errors
    /// It is no object.
    pub fn of(value: &'a Value, place: &'a str) -> Result<Self, ApiError> {
        let object = value.as_object().ok_or_else(|| ApiError::param(place, "an object is expected"))?;
        Ok(Self { object, place })
    }

    /// The value, where there is one.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The error of a field that is wrong.
    pub fn wrong(&self, name: &str, message: impl Display) -> ApiError {
        let name = if self.place.is_empty() { name.to_owned() } else { format!("{}.{name}", self.place) };
        ApiError::param(name, message)
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "a string is expected"))
    }

    /// A string that must be there.
    pub fn required_text(&self, name: &str) -> Result<&'a str, ApiError> {
        self.text(name)?.ok_or_else(|| self.wrong(name, "this field is required"))
    }

    /// `true` or `false`.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false is expected"))
    }

    /// A whole number in a range.
    pub fn whole(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // Clients written in languages without whole numbers send 5.0.
        let whole = |v: f64| (v >= 0.0 && v.fract() == 0.0 && v < 9e15).then_some(v as u64);
        let number = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        let (low, high) = (range.start(), range.end());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, format!("a whole number from {low} to {high} is expected"))),
        }
    }

    /// A number in a range.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => Err(self.wrong(name, format!("a number from {low} to {high} is expected"))),
        }
    }

    /// An object.
    pub fn object(&self, name: &'a str) -> Result<Option<Fields<'a>>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_object() {
            Some(object) => Ok(Some(Fields { object, place: name })),
            None => Err(self.wrong(name, "an object is expected")),
        }
    }

    /// A list.
    pub fn list(&self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_array().map(|list| Some(list.as_slice())).ok_or_else(|| self.wrong(name, "a list is expected"))
    }

    /// A string or a list of strings.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(vec![text.clone()])),
            Some(Value::Array(list)) => {
                let text = |v: &Value| v.as_str().map(str::to_owned);
                let texts: Option<Vec<String>> = list.iter().map(text).collect();
                texts.map(Some).ok_or_else(|| self.wrong(name, "a list of strings is expected"))
            }
            Some(_) => Err(self.wrong(name, "a string or a list of strings is expected")),
        }
    }

    /// The object itself.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.object
    }
}
