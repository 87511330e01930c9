//! Checkpoints whose configuration ties the output projection to the embedding and that hold a projection all the same.

use fourfold_tensor::{Weight, WeightSource};

use crate::layers::{EMBEDDING, Head, LM_HEAD_WEIGHT};
use crate::{ModelError, ModelSpec};

/// A tied model's own output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnHead {
    /// There is none.
    Absent,
    /// It is the embedding once more, number by number.
    Equal,
    /// It is another matrix: transformers 5 then keeps it and does not tie.
    Different,
}

impl OwnHead {
    /// Looks for it in `source`, and compares it with the embedding. Both are in memory meanwhile.
    ///
    /// # Errors
    /// A projection of another shape, or one of the two cannot be read.
    pub fn find(spec: &ModelSpec, source: &dyn WeightSource) -> Result<Self, ModelError> {
        let Some(head) = source.info(LM_HEAD_WEIGHT).filter(|_| spec.tied && spec.classes.is_none()) else {
            return Ok(Self::Absent);
        };
        let untied = ModelSpec { tied: false, ..spec.clone() };
        for weight in Head::weights(&untied).iter().filter(|weight| weight.name == LM_HEAD_WEIGHT) {
            weight.check_shape(&head.shape)?;
        }
        let (embedding, head) = (source.load(EMBEDDING)?, source.load(LM_HEAD_WEIGHT)?);
        Ok(if are_equal(&embedding, &head) { Self::Equal } else { Self::Different })
    }
}

/// Whether two matrices of one shape have equal numbers, however they are stored.
fn are_equal(a: &Weight, b: &Weight) -> bool {
    let (mut row_a, mut row_b) = (vec![0.0; a.cols()], vec![0.0; b.cols()]);
    a.shape() == b.shape()
        && (0..a.rows()).all(|row| {
            a.read_row(row, &mut row_a);
            b.read_row(row, &mut row_b);
            row_a == row_b
        })
}
