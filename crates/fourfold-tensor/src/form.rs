//! A weight's storage form without its values: what a plan knows of a weight before any of it is computed.

use crate::{DType, Double, DoubleCodes, Offsets, Quantized, Scales, Weight, packed_words_per_row};

/// The form of a [`Weight`]: enough to say how many bytes it takes and how a file lays it out. Closed like `Weight` itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// One float an element.
    Dense {
        /// The tensor's shape.
        shape: Vec<usize>,
        /// F32, F16 or BF16.
        dtype: DType,
    },
    /// Packed codes with group scales.
    Quantized(QuantizedForm),
}

/// The form of a [`Quantized`]. Its fields are named as there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct QuantizedForm {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group_size: usize,
    /// The scales.
    pub scales: ScalesForm,
    /// The offsets.
    pub offsets: OffsetsForm,
    /// Whether codes are looked up.
    pub codebook: bool,
    /// Whether each column names its group.
    pub g_idx: bool,
}

/// The form of [`Scales`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScalesForm {
    /// One float for the tensor.
    PerTensor(DType),
    /// One float for each row and group.
    PerGroup(DType),
    /// One byte for each row and group, one float for each run of groups.
    Double(DoubleForm),
}

/// The form of a [`Double`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DoubleForm {
    /// Type of the floats.
    pub dtype: DType,
    /// Groups that share a float.
    pub span: usize,
    /// Whether the codes have a sign.
    pub signed: bool,
}

impl DoubleForm {
    /// The form of a [`Double`].
    pub fn of(double: &Double) -> Self {
        let signed = matches!(double.codes, DoubleCodes::Signed(_));
        Self { dtype: double.floats.dtype(), span: double.span, signed }
    }

    /// As [`Form::file_bytes`], for a matrix of so many rows and groups a row.
    pub fn file_bytes(&self, rows: usize, groups: usize) -> usize {
        rows * groups.div_ceil(self.span) * self.dtype.size() + rows * groups
    }
}

/// The form of [`Offsets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OffsetsForm {
    /// Nothing is stored.
    Symmetric,
    /// One integer for the tensor.
    ZeroPointPerTensor,
    /// One integer for each row and group.
    ZeroPoint,
    /// One float for each row and group.
    Min(DType),
    /// One byte for each row and group, one float for each run of groups.
    Double(DoubleForm),
}

impl Form {
    /// The form of a weight.
    pub fn of(weight: &Weight) -> Self {
        match weight {
            Weight::Dense(w) => Self::Dense { shape: w.shape().to_vec(), dtype: w.dtype() },
            Weight::Quantized(w) => Self::Quantized(QuantizedForm::of(w)),
        }
    }

    /// Bytes the weight takes in a safetensors file, all its parts together: what a size limit on the output counts.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Self::Dense { shape, dtype } => shape.iter().product::<usize>() as u64 * dtype.size() as u64,
            Self::Quantized(form) => form.file_bytes(),
        }
    }
}

impl QuantizedForm {
    /// The form of a quantized matrix.
    pub fn of(weight: &Quantized) -> Self {
        Self {
            rows: weight.rows,
            cols: weight.cols,
            bits: weight.bits,
            group_size: weight.group_size,
            scales: match &weight.scales {
                Scales::Float(s) if s.len() == 1 => ScalesForm::PerTensor(s.dtype()),
                Scales::Float(s) => ScalesForm::PerGroup(s.dtype()),
                Scales::Double(double) => ScalesForm::Double(DoubleForm::of(double)),
            },
            offsets: match &weight.offsets {
                Offsets::Symmetric => OffsetsForm::Symmetric,
                Offsets::ZeroPoint(z) if z.len() == 1 => OffsetsForm::ZeroPointPerTensor,
                Offsets::ZeroPoint(_) => OffsetsForm::ZeroPoint,
                Offsets::Min(m) => OffsetsForm::Min(m.dtype()),
                Offsets::Double(double) => OffsetsForm::Double(DoubleForm::of(double)),
            },
            codebook: weight.codebook.is_some(),
            g_idx: weight.g_idx.is_some(),
        }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_size)
    }

    /// As [`Form::file_bytes`]: codes, scales, offsets, codebook, g_idx and the 16 bytes of the shape.
    pub fn file_bytes(&self) -> u64 {
        let (rows, groups) = (self.rows, self.groups());
        let codes = rows * packed_words_per_row(self.cols, self.bits) * 4;
        let scales = match self.scales {
            ScalesForm::PerTensor(dtype) => dtype.size(),
            ScalesForm::PerGroup(dtype) => rows * groups * dtype.size(),
            ScalesForm::Double(form) => form.file_bytes(rows, groups),
        };
        let offsets = match self.offsets {
            OffsetsForm::Symmetric => 0,
            OffsetsForm::ZeroPointPerTensor => 1,
            // Packed along the rows, each column of groups beginning a word.
            OffsetsForm::ZeroPoint => packed_words_per_row(rows, self.bits) * 4 * groups,
            OffsetsForm::Min(dtype) => rows * groups * dtype.size(),
            OffsetsForm::Double(form) => form.file_bytes(rows, groups),
        };
        let codebook = if self.codebook { 1 << self.bits } else { 0 };
        let g_idx = if self.g_idx { self.cols * 4 } else { 0 };
        (codes + scales + offsets + codebook + g_idx + 16) as u64
    }
}
