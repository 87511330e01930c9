//! A weight's storage form without its values: what a plan knows of a weight before any of it is computed.

use crate::{
    DType, Double, DoubleCodes, Offsets, Quantized, Scales, Sparse, SparseValues, Weight, mask_words_per_row,
    packed_words_per_row,
};

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
    /// A bitmask and the values it keeps.
    Sparse(SparseForm),
    /// The product of two thin matrices.
    LowRank {
        /// `[rows, rank]`.
        up: Box<Form>,
        /// `[rank, cols]`.
        down: Box<Form>,
    },
    /// The sum of several weights.
    Sum(Vec<Form>),
}

/// The form of a [`Sparse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SparseForm {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Elements kept.
    pub kept: usize,
    /// How they are stored.
    pub values: SparseValuesForm,
}

/// The form of [`SparseValues`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SparseValuesForm {
    /// Floats of this type.
    Float(DType),
    /// Codes.
    Codes {
        /// Bits of a code, 2 to 8.
        bits: u8,
        /// Columns that share a scale.
        group_size: usize,
        /// Type of the scales.
        scales: DType,
    },
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
    /// The form of a weight in a file that this program writes.
    pub fn of(weight: &Weight) -> Self {
        match weight {
            Weight::Dense(w) => Self::Dense { shape: w.shape().to_vec(), dtype: w.dtype() },
            Weight::Quantized(w) => Self::Quantized(QuantizedForm::of(w)),
            // FP8 is read, not written: BF16 is what DeepSeek's own conversion makes of it.
            Weight::Fp8(w) => Self::Dense { shape: vec![w.rows(), w.cols()], dtype: DType::Bf16 },
            Weight::Sparse(w) => Self::Sparse(SparseForm::of(w)),
            Weight::LowRank(w) => Self::LowRank { up: Box::new(Self::of(w.up())), down: Box::new(Self::of(w.down())) },
            Weight::Sum(w) => Self::Sum(w.terms().iter().map(Self::of).collect()),
        }
    }

    /// Bytes the weight takes in a safetensors file, all its parts together: what a size limit on the output counts.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Self::Dense { shape, dtype } => shape.iter().product::<usize>() as u64 * dtype.size() as u64,
            Self::Quantized(form) => form.file_bytes(),
            Self::Sparse(form) => form.file_bytes(),
            Self::LowRank { up, down } => up.file_bytes() + down.file_bytes(),
            Self::Sum(terms) => terms.iter().map(Self::file_bytes).sum(),
        }
    }

    /// Rows of the matrix view.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense { shape, .. } => {
                if shape.len() < 2 {
                    1
                } else {
                    shape[0]
                }
            }
            Self::Quantized(form) => form.rows,
            Self::Sparse(form) => form.rows,
            Self::LowRank { up, .. } => up.rows(),
            Self::Sum(terms) => terms.first().map_or(0, Self::rows),
        }
    }

    /// In a few words: `BF16`, `int4 g64`, `sparse 50 % BF16`, `rank 64 (BF16)`, `int3 g64 + rank 16 (int8 per-channel)`.
    pub fn describe(&self) -> String {
        match self {
            Self::Dense { dtype, .. } => dtype.to_string(),
            Self::Quantized(form) => form.describe(),
            Self::Sparse(form) => form.describe(),
            Self::LowRank { up, down } => {
                let (rank, up, down) = (down.rows(), up.describe(), down.describe());
                if up == down { format!("rank {rank} ({up})") } else { format!("rank {rank} ({up}, {down})") }
            }
            Self::Sum(terms) => terms.iter().map(Self::describe).collect::<Vec<_>>().join(" + "),
        }
    }
}

impl SparseForm {
    /// The form of a sparse matrix.
    pub fn of(weight: &Sparse) -> Self {
        let values = match weight.values() {
            SparseValues::Float(values) => SparseValuesForm::Float(values.dtype()),
            SparseValues::Codes(codes) => {
                SparseValuesForm::Codes { bits: codes.bits, group_size: codes.group_size, scales: codes.scales.dtype() }
            }
        };
        Self { rows: weight.rows(), cols: weight.cols(), kept: weight.kept(), values }
    }

    /// As [`Form::file_bytes`]: mask, values, scales and the 16 bytes of the shape.
    pub fn file_bytes(&self) -> u64 {
        let mask = self.rows * mask_words_per_row(self.cols) * 8;
        let values = match self.values {
            SparseValuesForm::Float(dtype) => self.kept * dtype.size(),
            SparseValuesForm::Codes { bits, group_size, scales } => {
                packed_words_per_row(self.kept, bits) * 4 + self.rows * self.cols.div_ceil(group_size) * scales.size()
            }
        };
        (mask + values + 16) as u64
    }

    /// In a few words: the share of elements that are gone, and how the others are stored.
    pub fn describe(&self) -> String {
        let all = (self.rows * self.cols).max(1) as f64;
        let gone = 100.0 * (1.0 - self.kept as f64 / all);
        match self.values {
            SparseValuesForm::Float(dtype) => format!("sparse {gone:.0} % {dtype}"),
            SparseValuesForm::Codes { bits, group_size, .. } if group_size >= self.cols => {
                format!("sparse {gone:.0} % int{bits} per-channel")
            }
            SparseValuesForm::Codes { bits, group_size, .. } => format!("sparse {gone:.0} % int{bits} g{group_size}"),
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

    /// In a few words: `int4 g64`, `codebook3 g32`, `int8 per-channel`.
    pub fn describe(&self) -> String {
        let kind = if self.codebook { "codebook" } else { "int" };
        if matches!(self.scales, ScalesForm::PerTensor(_)) && self.rows * self.groups() != 1 {
            format!("{kind}{} per-tensor", self.bits)
        } else if self.group_size >= self.cols {
            format!("{kind}{} per-channel", self.bits)
        } else {
            format!("{kind}{} g{}", self.bits, self.group_size)
        }
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
