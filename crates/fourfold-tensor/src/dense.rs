//! The plain storage form: one float per element.

use crate::{DType, FloatBuffer};

/// A tensor stored element by element, row-major. `shape` is the file's; a matrix view of it has `shape[0]` rows
/// (one row for a vector) and the product of the rest as columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    shape: Vec<usize>,
    data: FloatBuffer,
}

impl Dense {
    /// Joins a shape to its elements.
    ///
    /// # Panics
    /// When their counts differ: readers check sizes before they build a tensor.
    pub fn new(shape: Vec<usize>, data: FloatBuffer) -> Self {
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "shape {shape:?} does not hold {} elements",
            data.len()
        );
        Self { shape, data }
    }

    /// A tensor of f32 values.
    pub fn from_f32(shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self::new(shape, FloatBuffer::F32(values.into()))
    }

    /// The shape as stored.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements.
    pub fn data(&self) -> &FloatBuffer {
        &self.data
    }

    /// Rows of the matrix view.
    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Columns of the matrix view.
    pub fn cols(&self) -> usize {
        if self.shape.len() < 2 { self.data.len() } else { self.shape[1..].iter().product() }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }
}
