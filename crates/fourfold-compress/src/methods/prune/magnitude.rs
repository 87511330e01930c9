//! Magnitude pruning (Han et al. 2015): the weights closest to zero go, as `torch.nn.utils.prune.l1_unstructured` picks them.

use std::collections::BTreeMap;

use fourfold_tensor::{Form, Weight};
use serde::{Deserialize, Serialize};

use super::drop_lowest;
use super::store::{Scales, Values};
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "magnitude";

/// How much goes, as PyTorch's `amount` says it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// A share of the elements, 0 ≤ s < 1: `round(s · n)` of them, halves to even.
    Sparsity(f64),
    /// So many.
    Count(usize),
}

impl Amount {
    /// Elements of `n` that go.
    ///
    /// # Errors
    /// A share outside [0, 1), a count above `n`.
    pub fn of(&self, n: usize) -> Result<usize, MethodError> {
        match *self {
            Self::Sparsity(s) if (0.0..1.0).contains(&s) => Ok((s * n as f64).round_ties_even() as usize),
            Self::Sparsity(s) => Err(MethodError::Settings(format!("sparsity {s} is not in [0, 1)"))),
            Self::Count(count) if count <= n => Ok(count),
            Self::Count(count) => Err(MethodError::Settings(format!("{count} of {n} elements cannot go"))),
        }
    }
}

/// Unstructured magnitude pruning of one layer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Magnitude {
    /// How much goes.
    pub amount: Amount,
    /// How the others are stored.
    #[serde(default)]
    pub values: Values,
}

impl Method for Magnitude {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        self.values.validate()?;
        let n = rows * cols;
        Ok(Some(self.values.form(rows, cols, n - self.amount.of(n)?)))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let w = matrix::read(weight)?;
        let scores: Vec<f32> = w.iter().map(|w| w.abs()).collect();
        let mut keep = vec![true; w.len()];
        drop_lowest(&scores, self.amount.of(w.len())?, &mut keep);
        let strength = matrix::moments(&stats, weight.cols())?;
        let stored = self.values.store(&w, &keep, weight.cols(), Scales::Fit(strength))?;
        let error = matrix::relative_error(&w, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}

/// One threshold over several layers (`torch.nn.utils.prune.global_unstructured` with `L1Unstructured`): how many elements of each go
/// when `amount` of all of them together does. Each layer's [`Amount::Count`] for its plan entry, by name.
///
/// # Errors
/// A value that is not finite, an amount out of range. Weights come one at a time, and only their magnitudes are held.
pub fn global_counts<E: From<MethodError>>(
    names: &[String],
    amount: Amount,
    mut load: impl FnMut(&str) -> Result<Weight, E>,
) -> Result<BTreeMap<String, usize>, E> {
    let (mut scores, mut ends) = (Vec::new(), Vec::new());
    for name in names {
        scores.extend(matrix::read(&load(name)?)?.iter().map(|w| w.abs()));
        ends.push(scores.len());
    }
    let mut keep = vec![true; scores.len()];
    drop_lowest(&scores, amount.of(scores.len())?, &mut keep);
    let mut start = 0;
    let mut counts = BTreeMap::new();
    for (name, end) in names.iter().zip(ends) {
        counts.insert(name.clone(), keep[start..end].iter().filter(|k| !**k).count());
        start = end;
    }
    Ok(counts)
}
