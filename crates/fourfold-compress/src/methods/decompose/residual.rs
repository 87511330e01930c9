//! A compressed weight and a low-rank correction of what it lost (LoftQ, Li et al. 2023; whitened as in LQER, Zhang et al. 2024).

use fourfold_tensor::{Form, Sum, Weight};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::svd::Svd;
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats, matrix, method};

/// The name in plans.
pub const NAME: &str = "residual";

/// Any method, and a correction.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Residual {
    /// The method that goes first.
    pub base: Nested,
    /// The decomposition of what it leaves.
    pub correction: Svd,
}

/// A method inside another.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Nested {
    /// Its name in the registry.
    pub method: String,
    /// Its settings.
    #[serde(default)]
    pub settings: Value,
}

impl Nested {
    /// The method.
    ///
    /// # Errors
    /// As [`method`].
    pub fn method(&self) -> Result<Box<dyn Method>, MethodError> {
        method(&self.method, &self.settings)
    }
}

impl Method for Residual {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        // An unknown base is refused where its form is asked for.
        self.base.method().map_or(Needs::Nothing, |base| base.needs()).max(self.correction.needs())
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        let base = self.base.method()?.form(rows, cols)?;
        let base = base.ok_or_else(|| MethodError::Settings("a correction of what stays as it is".to_owned()))?;
        Ok(self.correction.form(rows, cols)?.map(|correction| Form::Sum(vec![base, correction])))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let w = matrix::read(weight)?;
        let base = self.base.method()?.compress(weight, stats)?.weight;
        let mut rest = base.to_f32();
        rest.iter_mut().zip(&w).for_each(|(r, &w)| *r = w - *r);
        let correction = self.correction.factorise(&rest, weight.cols(), &stats)?;
        let sum = Sum::new(vec![base, correction]).map_err(|e| MethodError::Settings(e.to_string()))?.into();
        let error = matrix::relative_error(&w, &sum, &stats);
        Ok(Compressed { weight: sum, error })
    }
}
