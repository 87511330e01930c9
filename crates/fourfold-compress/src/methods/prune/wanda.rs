//! Wanda (Sun et al. 2023, section 3): in each row the weights with the least `|w_ij| · ‖x_j‖₂` go. No weight is changed.

use fourfold_tensor::{Form, Weight};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::store::{Scales, Values};
use super::{Pattern, drop_lowest, keep_nm, kept_in_row};
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "wanda";

/// Wanda.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Wanda {
    /// How much goes: of each row `⌊sparsity · columns⌋`.
    pub pattern: Pattern,
    /// How the others are stored.
    #[serde(default)]
    pub values: Values,
}

/// Elements that stay of a row.
pub(crate) fn kept(pattern: Pattern, cols: usize) -> usize {
    match pattern {
        Pattern::Sparsity(s) => cols - (s * cols as f64) as usize,
        Pattern::Nm { n, m } => kept_in_row(cols, n, m),
    }
}

/// What stays of each row, by `|w| · √strength`, or by `|w|` where nothing is known of the inputs.
pub(crate) fn mask(w: &[f32], cols: usize, pattern: Pattern, strength: Option<&[f32]>) -> Vec<bool> {
    let norms: Option<Vec<f32>> = strength.map(|s| s.iter().map(|s| s.sqrt()).collect());
    let mut keep = vec![true; w.len()];
    keep.par_chunks_mut(cols.max(1)).zip(w.par_chunks(cols.max(1))).for_each(|(keep, w)| {
        let scores: Vec<f32> = match &norms {
            Some(norms) => w.iter().zip(norms).map(|(w, n)| w.abs() * n).collect(),
            None => w.iter().map(|w| w.abs()).collect(),
        };
        match pattern {
            Pattern::Sparsity(_) => drop_lowest(&scores, cols - kept(pattern, cols), keep),
            Pattern::Nm { n, m } => keep_nm(&scores, n, m, keep),
        }
    });
    keep
}

impl Method for Wanda {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Moments
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        self.pattern.validate()?;
        self.values.validate()?;
        Ok(Some(self.values.form(rows, cols, rows * kept(self.pattern, cols))))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        self.pattern.validate()?;
        let w = matrix::read(weight)?;
        let strength = matrix::moments(&stats, weight.cols())?;
        let strength = strength.ok_or(MethodError::NoStatistics { method: NAME, needs: "second moments" })?;
        let keep = mask(&w, weight.cols(), self.pattern, Some(strength));
        let stored = self.values.store(&w, &keep, weight.cols(), Scales::Fit(Some(strength)))?;
        let error = matrix::relative_error(&w, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}
