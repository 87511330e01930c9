//! A compressed weight and a low-rank correction of what it lost (LoftQ, Li et al. 2023; whitened as in LQER, Zhang et al. 2024), by turns
//! where asked (CALDERA, Saha et al. 2024).

use fourfold_tensor::{Dense, Form, Sum, Weight};
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
    /// Turns in which the method is run again on what the factors leave. The best of all turns is kept.
    #[serde(default)]
    pub rounds: usize,
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
        let (rows, cols) = (weight.rows(), weight.cols());
        let w = matrix::read(weight)?;
        let without = |part: &Weight| -> Vec<f32> { part.to_f32().iter().zip(&w).map(|(p, w)| w - p).collect() };
        let base = self.base.method()?;
        let mut now = base.compress(weight, stats)?.weight;
        let mut best: Option<(f64, Weight)> = None;
        for round in 0..=self.rounds {
            let factors = self.correction.factorise(&without(&now), cols, &stats)?;
            let left = without(&factors);
            let sum = Sum::new(vec![now.clone(), factors]).map_err(|e| MethodError::Settings(e.to_string()))?.into();
            let error = matrix::relative_error(&w, &sum, &stats);
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, sum));
            }
            if round < self.rounds {
                now = base.compress(&Dense::from_f32(vec![rows, cols], left).into(), stats)?.weight;
            }
        }
        let (error, weight) = best.unwrap_or_else(|| (0.0, weight.clone()));
        Ok(Compressed { weight, error })
    }
}
