//! N:M pruning by the weights alone (Mishra et al. 2021 for 2:4): of every m neighbours of a row the n largest stay. With text
//! [`super::wanda`] and [`super::sparsegpt`] do the same with better scores.

use fourfold_tensor::{Form, Weight};
use serde::{Deserialize, Serialize};

use super::Pattern;
use super::store::{Scales, Values};
use super::wanda::mask;
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "nm";

/// N:M by magnitude.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Nm {
    /// How many stay.
    pub n: usize,
    /// Of how many.
    pub m: usize,
    /// How they are stored.
    #[serde(default)]
    pub values: Values,
}

impl Method for Nm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        Pattern::Nm { n: self.n, m: self.m }.validate()?;
        self.values.validate()?;
        Ok(Some(self.values.form(rows, cols, rows * super::kept_in_row(cols, self.n, self.m))))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let pattern = Pattern::Nm { n: self.n, m: self.m };
        pattern.validate()?;
        let w = matrix::read(weight)?;
        let keep = mask(&w, weight.cols(), pattern, None);
        let strength = matrix::moments(&stats, weight.cols())?;
        let stored = self.values.store(&w, &keep, weight.cols(), Scales::Fit(strength))?;
        let error = matrix::relative_error(&w, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}
