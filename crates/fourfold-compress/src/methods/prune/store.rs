//! From a matrix and what stays of it to the stored form.

use fourfold_tensor::{
    DType, FloatBuffer, Form, Quantized, Sparse, SparseCodes, SparseForm, SparseValues, SparseValuesForm, Weight,
    mask_words_per_row, pack_row, packed_words_per_row,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::MethodError;
use crate::methods::range::{Stored, check_f16};

/// Shrunken scales tried beside the one that reaches the largest value.
const STEPS: usize = 24;

/// How kept values are stored.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Values {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    #[default]
    Bf16,
    /// Symmetric codes with an f16 scale for each group of columns.
    Int {
        /// Bits of a code, 2 to 8.
        bits: u8,
        /// Columns that share a scale.
        group_size: usize,
    },
}

/// Where the scales of codes come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scales<'a> {
    /// They minimise `Σ strength_c · (w − ŵ)²` over each group.
    Fit(Option<&'a [f32]>),
    /// The method has chosen them, `[rows, groups]`.
    Given(&'a [f32]),
}

impl Values {
    /// Whether it has a meaning.
    ///
    /// # Errors
    /// A width or a group size that no code has.
    pub fn validate(&self) -> Result<(), MethodError> {
        match *self {
            Self::F32 | Self::F16 | Self::Bf16 => Ok(()),
            Self::Int { bits, group_size } if (2..=8).contains(&bits) && group_size > 0 => Ok(()),
            Self::Int { bits, group_size } => Err(MethodError::Settings(format!(
                "{bits} bits in groups of {group_size}: 2 to 8 in groups of at least 1"
            ))),
        }
    }

    /// The form of a matrix with `kept` elements.
    pub fn form(&self, rows: usize, cols: usize, kept: usize) -> Form {
        let values = match *self {
            Self::F32 => SparseValuesForm::Float(DType::F32),
            Self::F16 => SparseValuesForm::Float(DType::F16),
            Self::Bf16 => SparseValuesForm::Float(DType::Bf16),
            Self::Int { bits, group_size } => {
                SparseValuesForm::Codes { bits, group_size: group_size.min(cols.max(1)), scales: DType::F16 }
            }
        };
        Form::Sparse(SparseForm { rows, cols, kept, values })
    }

    /// Stores what `keep` says of `w`, `[rows, cols]`. Codes are rounded to nearest, with the given scales of the groups.
    pub(crate) fn store(&self, w: &[f32], keep: &[bool], cols: usize, scales: Scales) -> Result<Weight, MethodError> {
        let rows = w.len() / cols.max(1);
        let words = mask_words_per_row(cols);
        let mut mask = vec![0u64; rows * words];
        for (line, keep) in mask.chunks_exact_mut(words.max(1)).zip(keep.chunks_exact(cols.max(1))) {
            for (c, _) in keep.iter().enumerate().filter(|(_, k)| **k) {
                line[c / 64] |= 1 << (c % 64);
            }
        }
        let kept = |w: &[f32]| -> Vec<f32> { w.iter().zip(keep).filter(|(_, k)| **k).map(|(&w, _)| w).collect() };
        let values = match *self {
            Self::F32 => SparseValues::Float(FloatBuffer::from_f32(kept(w), DType::F32)),
            Self::F16 => {
                let kept = kept(w);
                check_f16(&kept, Stored::Values)?;
                SparseValues::Float(FloatBuffer::from_f32(kept, DType::F16))
            }
            Self::Bf16 => SparseValues::Float(FloatBuffer::from_f32(kept(w), DType::Bf16)),
            Self::Int { bits, group_size } => {
                let group_size = group_size.min(cols.max(1));
                let lines = w.par_chunks(cols.max(1)).zip(keep.par_chunks(cols.max(1))).enumerate();
                let groups = cols.div_ceil(group_size);
                let encode = |(r, (w, keep)): (usize, (&[f32], &[bool]))| {
                    let scales = match scales {
                        Scales::Fit(strength) => fit_row(w, keep, bits, group_size, strength),
                        Scales::Given(scales) => scales[r * groups..(r + 1) * groups].to_vec(),
                    };
                    let codes = encode_row(w, keep, bits, group_size, &scales);
                    (scales, codes)
                };
                let rows: Vec<(Vec<f32>, Vec<u8>)> = lines.map(encode).collect();
                let scales: Vec<f32> = rows.iter().flat_map(|(scales, _)| scales).copied().collect();
                check_f16(&scales, Stored::CodeScales)?;
                let codes: Vec<u8> = rows.iter().flat_map(|(_, codes)| codes).copied().collect();
                let mut packed = vec![0; packed_words_per_row(codes.len(), bits)];
                pack_row(&codes, bits, &mut packed);
                let scales = FloatBuffer::from_f32(scales, DType::F16);
                SparseValues::Codes(SparseCodes { bits, group_size, packed: packed.into(), scales })
            }
        };
        let sparse = Sparse::new(rows, cols, mask.into(), values).map_err(|e| MethodError::Settings(e.to_string()))?;
        Ok(sparse.into())
    }
}

/// Scales of a row's groups.
pub(crate) fn fit_row(w: &[f32], keep: &[bool], bits: u8, group_size: usize, strength: Option<&[f32]>) -> Vec<f32> {
    let groups = w.chunks(group_size).zip(keep.chunks(group_size)).enumerate();
    let fit = |(g, (w, keep)): (usize, (&[f32], &[bool]))| {
        fit_scale(w, keep, bits, strength.map(|s| &s[g * group_size..g * group_size + w.len()]))
    };
    groups.map(fit).collect()
}

/// Codes of a row's kept elements.
fn encode_row(w: &[f32], keep: &[bool], bits: u8, group_size: usize, scales: &[f32]) -> Vec<u8> {
    let zero = 1i32 << (bits - 1);
    let kept = w.iter().zip(keep).enumerate().filter(|(_, (_, k))| **k);
    kept.map(|(c, (&w, _))| (code(w, scales[c / group_size], bits) + zero) as u8).collect()
}

/// The signed code of a value.
pub(crate) fn code(w: f32, scale: f32, bits: u8) -> i32 {
    let (low, high) = (-(1i32 << (bits - 1)), Quantized::symmetric_max(bits));
    if scale == 0.0 { 0 } else { (w / scale).round_ties_even().clamp(low as f32, high as f32) as i32 }
}

/// The f16 scale of a group's kept values with the least (weighted) squared error.
fn fit_scale(w: &[f32], keep: &[bool], bits: u8, strength: Option<&[f32]>) -> f32 {
    let kept = || w.iter().zip(keep).enumerate().filter(|(_, (_, k))| **k).map(|(i, (&w, _))| (i, w));
    let largest = kept().fold(0.0f32, |m, (_, w)| m.max(w.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0);
    for step in 0..=STEPS {
        let reach = 1.0 - 0.6 * step as f32 / STEPS as f32;
        let scale = Quantized::f16_scale(largest * reach / Quantized::symmetric_max(bits) as f32).to_f32();
        let error: f32 = kept()
            .map(|(i, w)| {
                let d = w - scale * code(w, scale, bits) as f32;
                strength.map_or(1.0, |s| s[i]) * d * d
            })
            .sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}
