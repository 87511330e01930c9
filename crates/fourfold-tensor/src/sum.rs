//! A matrix as a sum of matrices stored in different forms: a quantized one and a low-rank correction, say.

use thiserror::Error;

use crate::Weight;

/// `Σ terms`, of equal shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Sum {
    terms: Vec<Weight>,
}

/// Terms that have no sum.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SumError {
    /// There are none.
    #[error("a sum of no terms")]
    Empty,
    /// Their shapes differ.
    #[error("term {term} of a sum has shape {found:?}, the first has {expected:?}")]
    Shape {
        /// Which one.
        term: usize,
        /// Its rows and columns.
        found: [usize; 2],
        /// Rows and columns of the first.
        expected: [usize; 2],
    },
}

impl Sum {
    /// Joins terms.
    ///
    /// # Errors
    /// No terms, or shapes that differ.
    pub fn new(terms: Vec<Weight>) -> Result<Self, SumError> {
        let expected = terms.first().map(|w| [w.rows(), w.cols()]).ok_or(SumError::Empty)?;
        for (term, weight) in terms.iter().enumerate() {
            let found = [weight.rows(), weight.cols()];
            if found != expected {
                return Err(SumError::Shape { term, found, expected });
            }
        }
        Ok(Self { terms })
    }

    /// The terms, at least one.
    pub fn terms(&self) -> &[Weight] {
        &self.terms
    }

    /// The terms themselves.
    pub fn into_terms(self) -> Vec<Weight> {
        self.terms
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.terms[0].rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.terms[0].cols()
    }

    /// Row `r` of the sum, into `out` of length `cols`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let cols = self.cols();
        self.terms[0].read_row(r, out);
        let mut row = vec![0.0; cols];
        for term in &self.terms[1..] {
            term.read_row(r, &mut row);
            out.iter_mut().zip(&row).for_each(|(o, v)| *o += v);
        }
    }

    /// The sum, `[rows, cols]` row-major: the values of [`Sum::read_row`].
    pub fn to_f32(&self) -> Vec<f32> {
        let mut all = self.terms[0].to_f32();
        for term in &self.terms[1..] {
            all.iter_mut().zip(term.to_f32()).for_each(|(o, v)| *o += v);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dense;

    #[test]
    fn terms_are_added_and_must_agree() {
        let dense = |cols, v| Weight::from(Dense::from_f32(vec![2, cols], vec![v; 2 * cols]));
        let sum: Weight = Sum::new(vec![dense(2, 1.0), dense(2, 0.5)]).unwrap().into();
        assert_eq!(sum.to_f32(), [1.5; 4]);
        assert_eq!(Sum::new(Vec::new()), Err(SumError::Empty));
        let shapes = Sum::new(vec![dense(2, 1.0), dense(3, 1.0)]);
        assert_eq!(shapes, Err(SumError::Shape { term: 1, found: [2, 3], expected: [2, 2] }));
    }
}
