//! Methods that leave weights out. What is left is stored as a bitmask and values ([`fourfold_tensor::Sparse`]), the values as floats or
//! as codes.

pub mod magnitude;
pub mod nm;
pub mod sparsegpt;
pub(crate) mod store;
pub mod wanda;

use serde::{Deserialize, Serialize};

use crate::MethodError;

/// Which share of a weight goes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// This share, 0 ≤ s < 1, wherever it is.
    Sparsity(f64),
    /// Of every `m` neighbouring columns of a row `n` stay (2:4 is n = 2, m = 4). Of fewer columns at a row's end as large a share
    /// stays, rounded up.
    Nm {
        /// How many stay.
        n: usize,
        /// Of how many.
        m: usize,
    },
}

impl Pattern {
    /// Whether it has a meaning.
    ///
    /// # Errors
    /// A sparsity outside [0, 1), or n > m, or m = 0.
    pub fn validate(&self) -> Result<(), MethodError> {
        match *self {
            Self::Sparsity(s) if (0.0..1.0).contains(&s) => Ok(()),
            Self::Sparsity(s) => Err(MethodError::Settings(format!("sparsity {s} is not in [0, 1)"))),
            Self::Nm { n, m } if n >= 1 && n <= m => Ok(()),
            Self::Nm { n, m } => Err(MethodError::Settings(format!("{n}:{m}: of m columns n stay, 1 ≤ n ≤ m"))),
        }
    }
}

/// Elements that stay of `len` neighbours under n:m.
pub(crate) fn kept_of(len: usize, n: usize, m: usize) -> usize {
    (len * n).div_ceil(m)
}

/// Elements that stay in a row of `cols` under n:m.
pub(crate) fn kept_in_row(cols: usize, n: usize, m: usize) -> usize {
    cols / m * n + kept_of(cols % m, n, m)
}

/// Clears `keep` at the `count` lowest scores; of equal ones the first go.
pub(crate) fn drop_lowest(scores: &[f32], count: usize, keep: &mut [bool]) {
    if count == 0 {
        return;
    }
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let by = |a: &u32, b: &u32| scores[*a as usize].total_cmp(&scores[*b as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, by);
    }
    order[..count.min(scores.len())].iter().for_each(|&i| keep[i as usize] = false);
}

/// Keeps n of every m of a row by score.
pub(crate) fn keep_nm(scores: &[f32], n: usize, m: usize, keep: &mut [bool]) {
    for (scores, keep) in scores.chunks(m).zip(keep.chunks_mut(m)) {
        drop_lowest(scores, scores.len() - kept_of(scores.len(), n, m), keep);
    }
}
