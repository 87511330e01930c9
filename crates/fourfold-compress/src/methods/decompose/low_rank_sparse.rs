//! Low rank plus sparse, by turns (OATS, Zhang & Papyan 2024; SLiM, Mozaffari et al. 2024): the sparse part is pruned from what the
//! factors leave, the factors fit what the sparse part leaves.

use fourfold_tensor::{Dense, Form, Sum, Weight};
use serde::{Deserialize, Serialize};

use super::residual::Nested;
use super::svd::Svd;
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "low_rank_sparse";

/// Factors and a pruned remainder.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct LowRankSparse {
    /// The factors.
    pub low_rank: Svd,
    /// The pruning method of the rest.
    pub sparse: Nested,
    /// Turns, at least one.
    #[serde(default = "default_rounds")]
    pub rounds: usize,
}

fn default_rounds() -> usize {
    3
}

impl Method for LowRankSparse {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        self.sparse.method().map_or(Needs::Nothing, |sparse| sparse.needs()).max(self.low_rank.needs())
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        let sparse = self.sparse.method()?.form(rows, cols)?;
        let sparse = sparse.ok_or_else(|| MethodError::Settings("the rest must be pruned".to_owned()))?;
        Ok(self.low_rank.form(rows, cols)?.map(|factors| Form::Sum(vec![sparse, factors])))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let w = matrix::read(weight)?;
        let without = |part: &Weight| -> Vec<f32> { part.to_f32().iter().zip(&w).map(|(p, w)| w - p).collect() };
        let pruning = self.sparse.method()?;
        let mut rest = w.clone();
        let mut best: Option<(f64, Weight)> = None;
        for _ in 0..self.rounds.max(1) {
            let factors = self.low_rank.factorise(&rest, cols, &stats)?;
            let left = Dense::from_f32(vec![rows, cols], without(&factors)).into();
            let sparse = pruning.compress(&left, stats)?.weight;
            rest = without(&sparse);
            let sum = Sum::new(vec![sparse, factors]).map_err(|e| MethodError::Settings(e.to_string()))?.into();
            let error = matrix::relative_error(&w, &sum, &stats);
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, sum));
            }
        }
        let (error, weight) = best.unwrap_or_else(|| (0.0, weight.clone()));
        Ok(Compressed { weight, error })
    }
}
