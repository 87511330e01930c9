//! What grid a weight is rounded to: a plan's words for it, and its exact size.

use fourfold_tensor::{DType, DoubleForm, OffsetsForm, QuantizedForm, ScalesForm};
use serde::{Deserialize, Serialize};

use crate::MethodError;

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// All of them.
    Tensor,
    /// A row: one output feature.
    Channel,
    /// So many neighbouring columns of a row; the last group of a row may be shorter.
    Group(usize),
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum ScaleFormat {
    /// 2 bytes.
    #[default]
    F16,
    /// 2 bytes.
    Bf16,
    /// 4 bytes.
    F32,
    /// An 8-bit code for each group and an f16 for each row (double quantization: QLoRA, section 3).
    Double,
}

/// Where a uniform grid puts its zero.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "snake_case")]
pub enum ZeroKind {
    /// In the middle; nothing is stored.
    #[default]
    Symmetric,
    /// At an integer code of each group.
    ZeroPoint,
    /// Anywhere: a real offset of each group, an f16.
    Min,
}

/// Where the levels lie.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum Levels {
    /// Evenly.
    #[default]
    Uniform,
    /// Where they suit this tensor's weights best: Lloyd's algorithm (1982), 8-bit values, at most 4 bits.
    Learned,
}

/// How a group's scale is chosen.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum ScaleRule {
    /// `absmax / (2^(bits−1) − 1)`, or `(max − min) / (2^bits − 1)`: the textbook definition.
    Absmax,
    /// The scale with the least (weighted) squared error.
    #[default]
    Search,
}

/// A grid.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(deny_unknown_fields)]
pub struct GridSpec {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Which elements share a scale.
    pub granularity: Granularity,
    /// How scales are stored.
    #[serde(default)]
    pub scales: ScaleFormat,
    /// Where zero lies.
    #[serde(default)]
    pub zero: ZeroKind,
    /// Where the levels lie.
    #[serde(default)]
    pub levels: Levels,
    /// How scales are chosen.
    #[serde(default)]
    pub rule: ScaleRule,
}

impl GridSpec {
    /// A symmetric uniform grid with f16 scales, found by search.
    pub const fn new(bits: u8, granularity: Granularity) -> Self {
        Self {
            bits,
            granularity,
            scales: ScaleFormat::F16,
            zero: ZeroKind::Symmetric,
            levels: Levels::Uniform,
            rule: ScaleRule::Search,
        }
    }

    /// The grid of a packed weight, scales found by search; `None` where it is none of these: GGUF's two-level scales, act-order.
    pub fn of(form: &QuantizedForm) -> Option<Self> {
        let granularity = match form.scales {
            ScalesForm::PerTensor(_) if form.rows * form.cols > form.group_size => Granularity::Tensor,
            _ if form.group_size >= form.cols => Granularity::Channel,
            ScalesForm::PerTensor(_) | ScalesForm::PerGroup(_) | ScalesForm::Double(_) => {
                Granularity::Group(form.group_size)
            }
        };
        let scales = match form.scales {
            ScalesForm::PerTensor(dtype) | ScalesForm::PerGroup(dtype) => match dtype {
                DType::F16 => ScaleFormat::F16,
                DType::Bf16 => ScaleFormat::Bf16,
                _ => ScaleFormat::F32,
            },
            ScalesForm::Double(_) => ScaleFormat::Double,
        };
        let zero = match form.offsets {
            OffsetsForm::Symmetric => ZeroKind::Symmetric,
            OffsetsForm::ZeroPoint | OffsetsForm::ZeroPointPerTensor => ZeroKind::ZeroPoint,
            OffsetsForm::Min(_) | OffsetsForm::Double(_) => ZeroKind::Min,
        };
        let levels = if form.codebook { Levels::Learned } else { Levels::Uniform };
        let grid = Self { bits: form.bits, granularity, scales, zero, levels, rule: ScaleRule::Search };
        (grid.validate().is_ok() && grid.form(form.rows, form.cols) == *form).then_some(grid)
    }

    /// Whether the parts go together.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn validate(&self) -> Result<(), MethodError> {
        let refuse = |why: &str| Err(MethodError::Settings(why.to_owned()));
        if !(2..=8).contains(&self.bits) {
            return Err(MethodError::Settings(format!("{} bits: codes have 2 to 8", self.bits)));
        }
        if self.granularity == Granularity::Group(0) {
            return refuse("a group of 0 columns");
        }
        if self.levels == Levels::Learned && (self.bits > 4 || self.zero != ZeroKind::Symmetric) {
            return refuse("learned levels need at most 4 bits and no zero point");
        }
        if self.levels == Levels::Learned && self.rule == ScaleRule::Absmax {
            return refuse("learned levels need rule = \"search\"");
        }
        if self.granularity == Granularity::Tensor {
            if self.scales == ScaleFormat::Double {
                return refuse("one scale for the tensor has nothing to quantize twice");
            }
            if self.zero == ZeroKind::Min || self.levels == Levels::Learned {
                return refuse("one scale for the tensor goes with symmetric and zero_point grids only");
            }
        }
        Ok(())
    }

    /// Columns that share a scale in a row of `cols`.
    pub fn group_size(&self, cols: usize) -> usize {
        match self.granularity {
            Granularity::Tensor | Granularity::Channel => cols.max(1),
            Granularity::Group(size) => size.min(cols.max(1)),
        }
    }

    /// The form of a `[rows, cols]` weight on this grid.
    pub fn form(&self, rows: usize, cols: usize) -> QuantizedForm {
        let dtype = self.scale_dtype();
        let single = self.granularity == Granularity::Tensor;
        QuantizedForm {
            rows,
            cols,
            bits: self.bits,
            group_size: self.group_size(cols),
            scales: match self.scales {
                ScaleFormat::Double => {
                    ScalesForm::Double(DoubleForm { dtype, span: self.groups(cols).max(1), signed: false })
                }
                ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::F32 if single || rows * self.groups(cols) == 1 => {
                    ScalesForm::PerTensor(dtype)
                }
                ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::F32 => ScalesForm::PerGroup(dtype),
            },
            offsets: match self.zero {
                ZeroKind::Symmetric => OffsetsForm::Symmetric,
                ZeroKind::ZeroPoint if single || rows * self.groups(cols) == 1 => OffsetsForm::ZeroPointPerTensor,
                ZeroKind::ZeroPoint => OffsetsForm::ZeroPoint,
                ZeroKind::Min => OffsetsForm::Min(DType::F16),
            },
            codebook: self.levels == Levels::Learned,
            g_idx: false,
        }
    }

    /// Groups of a row of `cols`.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_size(cols))
    }

    /// Bytes of a `[rows, cols]` weight on this grid, every part as a safetensors file stores it.
    pub fn bytes(&self, rows: usize, cols: usize) -> u64 {
        self.form(rows, cols).file_bytes()
    }

    /// In a few words: `int4 g64`, `codebook3 g32 double`, `int8 per-channel zero_point`.
    pub fn describe(&self) -> String {
        let kind = if self.levels == Levels::Learned { "codebook" } else { "int" };
        let place = match self.granularity {
            Granularity::Tensor => "per-tensor".to_owned(),
            Granularity::Channel => "per-channel".to_owned(),
            Granularity::Group(size) => format!("g{size}"),
        };
        let zero = match self.zero {
            ZeroKind::Symmetric => "",
            ZeroKind::ZeroPoint => " zero_point",
            ZeroKind::Min => " min",
        };
        let scales = match self.scales {
            ScaleFormat::F16 => "",
            ScaleFormat::Bf16 => " bf16-scales",
            ScaleFormat::F32 => " f32-scales",
            ScaleFormat::Double => " double",
        };
        format!("{kind}{} {place}{zero}{scales}", self.bits)
    }

    /// The type float scales are stored in, and the row scales of double quantization.
    pub(crate) fn scale_dtype(&self) -> DType {
        match self.scales {
            ScaleFormat::F16 | ScaleFormat::Double => DType::F16,
            ScaleFormat::Bf16 => DType::Bf16,
            ScaleFormat::F32 => DType::F32,
        }
    }
}
