//! Stores a weight as floats of another type.

use fourfold_tensor::{DType, Dense, FloatBuffer, Form, Weight};
use serde::{Deserialize, Serialize};

use crate::MethodError;
use crate::methods::range::{Stored, check_f16};
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "cast";

/// The type.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes, the range of f32.
    Bf16,
}

/// Rounds to nearest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// The type.
    pub dtype: Float,
}

impl Cast {
    fn dtype(self) -> DType {
        match self.dtype {
            Float::F32 => DType::F32,
            Float::F16 => DType::F16,
            Float::Bf16 => DType::Bf16,
        }
    }
}

impl Method for Cast {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// As a matrix; a weight of more dimensions keeps its shape.
    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        Ok(Some(Form::Dense { shape: vec![rows, cols], dtype: self.dtype() }))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let values = matrix::read(weight)?;
        if self.dtype == Float::F16 {
            check_f16(&values, Stored::Values)?;
        }
        let stored = Dense::new(weight.shape(), FloatBuffer::from_f32(values.clone(), self.dtype())).into();
        let error = matrix::relative_error(&values, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}
