//! Rows of codes and groups, and the [`Quantized`] they make.

use fourfold_tensor::{
    Buffer, DType, Double, FloatBuffer, Offsets, Quantized, Scales, Weight, pack_row, packed_words_per_row,
};
use half::{bf16, f16};
use rayon::prelude::*;

use super::grid::{Granularity, GridSpec, Levels, ScaleFormat, ZeroKind};
use super::lattice::{Group, round_small};
use crate::MethodError;
use crate::methods::range::{Stored, check_f16};
use crate::vector::{LANES, sum, vectorized};

/// Rows that one task takes together.
pub(crate) const ROWS: usize = 32;

/// A quantized matrix in the making.
pub(crate) struct Parts {
    spec: GridSpec,
    rows: usize,
    cols: usize,
    per_row: usize,
    words: usize,
    packed: Vec<u32>,
    groups: Vec<Group>,
    row_scales: Vec<f32>,
    errors: Vec<(f64, f64)>,
}

/// Some of its rows, to be filled by one task.
pub(crate) struct Slot<'a> {
    /// First row.
    pub row: usize,
    /// Rows.
    pub count: usize,
    /// `[count, groups]`.
    pub groups: &'a mut [Group],
    /// `[count]`: row scales of double quantization.
    pub row_scales: &'a mut [f32],
    /// Energy of error and of output.
    pub error: &'a mut (f64, f64),
    packed: &'a mut [u32],
    words: usize,
    bits: u8,
}

impl Slot<'_> {
    /// Packs the codes of row `i` of the slot.
    pub fn pack(&mut self, i: usize, codes: &[u8]) {
        pack_row(codes, self.bits, &mut self.packed[i * self.words..(i + 1) * self.words]);
    }
}

impl Parts {
    pub fn new(spec: GridSpec, rows: usize, cols: usize) -> Self {
        let per_row = cols.div_ceil(spec.group_size(cols));
        let words = packed_words_per_row(cols, spec.bits);
        Self {
            spec,
            rows,
            cols,
            per_row,
            words,
            packed: vec![0; rows * words],
            groups: vec![Group::default(); rows * per_row],
            row_scales: vec![0.0; rows],
            errors: vec![(0.0, 0.0); rows.div_ceil(ROWS)],
        }
    }

    /// Runs `task` on every [`ROWS`] rows, in parallel; what comes out does not depend on the order.
    pub fn fill(&mut self, task: impl Fn(&mut Slot) -> Result<(), MethodError> + Sync) -> Result<(), MethodError> {
        let (words, bits, rows) = (self.words, self.spec.bits, self.rows);
        // A tensor without columns has nothing to fill.
        if self.cols == 0 || rows == 0 {
            return Ok(());
        }
        let results: Vec<Result<(), MethodError>> = self
            .packed
            .par_chunks_mut(ROWS * words)
            .zip(self.groups.par_chunks_mut(ROWS * self.per_row))
            .zip(self.row_scales.par_chunks_mut(ROWS))
            .zip(self.errors.par_iter_mut())
            .enumerate()
            .map(|(i, (((packed, groups), row_scales), error))| {
                let row = i * ROWS;
                let count = ROWS.min(rows - row);
                task(&mut Slot { row, count, groups, row_scales, error, packed, words, bits })
            })
            .collect();
        // The first in the matrix, not the first in time.
        results.into_iter().collect()
    }

    /// Energy of the error relative to the output's.
    pub fn relative_error(&self) -> f64 {
        let (error, energy) = self.errors.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        if energy > 0.0 { error / energy } else { 0.0 }
    }

    /// The stored form. `levels` are a codebook's.
    ///
    /// # Errors
    /// [`MethodError::BeyondF16`]: what is to be stored as f16 is beyond it.
    pub fn finish(self, levels: Option<Vec<i8>>) -> Result<Weight, MethodError> {
        let spec = self.spec;
        let dtype = spec.scale_dtype();
        let take = |pick: fn(&Group) -> f32| self.groups.iter().map(pick).collect::<Vec<f32>>();
        let single = spec.granularity == Granularity::Tensor;
        let mut scales = take(|g| g.scale);
        let mut zeros: Vec<u8> = self.groups.iter().map(|g| g.zero as u8).collect();
        if single {
            scales.truncate(1);
            zeros.truncate(1);
        }
        let scales = match spec.scales {
            ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::F32 => {
                if dtype == DType::F16 {
                    check_f16(&scales, Stored::Scales)?;
                }
                Scales::Float(FloatBuffer::from_f32(scales, dtype))
            }
            ScaleFormat::Double => {
                check_f16(&self.row_scales, Stored::RowScales)?;
                let rows = FloatBuffer::from_f32(self.row_scales, DType::F16);
                Scales::Double(Double::by_row(rows, self.groups.iter().map(|g| g.code).collect(), self.per_row))
            }
        };
        let offsets = match spec.zero {
            ZeroKind::Symmetric => Offsets::Symmetric,
            ZeroKind::ZeroPoint => Offsets::ZeroPoint(Buffer::from(zeros)),
            ZeroKind::Min => {
                let mins = take(|g| g.min);
                check_f16(&mins, Stored::Offsets)?;
                Offsets::Min(FloatBuffer::from_f32(mins, DType::F16))
            }
        };
        debug_assert_eq!(spec.levels == Levels::Learned, levels.is_some());
        Ok(Weight::Quantized(Quantized {
            rows: self.rows,
            cols: self.cols,
            bits: spec.bits,
            group_size: spec.group_size(self.cols),
            packed: self.packed.into(),
            scales,
            offsets,
            codebook: levels,
            g_idx: None,
        }))
    }
}

/// Rounds a scale to its float type, never to zero or infinity.
pub(crate) fn round_scale(scale: f32, format: ScaleFormat) -> f32 {
    match format {
        ScaleFormat::F16 => {
            let rounded = Quantized::f16_scale(scale).to_f32();
            // The smallest subnormal keeps the sign that the helper drops.
            if scale < 0.0 { -rounded.abs() } else { rounded }
        }
        ScaleFormat::Bf16 => bf16::from_f32(scale).to_f32(),
        ScaleFormat::F32 => scale,
        // By `round_row`, which knows the row's scale.
        ScaleFormat::Double => scale,
    }
}

/// Rounds an offset to f16.
pub(crate) fn round_min(min: f32) -> f32 {
    f16::from_f32(min).clamp(f16::MIN, f16::MAX).to_f32()
}

/// The scale of double quantization's codes for a row whose largest group scale is `largest`.
pub(crate) fn row_scale(largest: f32) -> f32 {
    if largest > 0.0 { Quantized::f16_scale(largest / 255.0).to_f32() } else { 0.0 }
}

/// Rounds a group's scale to a multiple of its row's; a scale that is not zero keeps a code that is not.
pub(crate) fn round_double(group: &mut Group, row_scale: f32) {
    if row_scale == 0.0 || group.scale == 0.0 {
        group.code = 0;
        group.scale = 0.0;
        return;
    }
    group.code = round_small((group.scale / row_scale).clamp(1.0, 255.0)) as u8;
    group.scale = row_scale * f32::from(group.code);
}

/// Rounds the groups of one row to what is stored. Returns the row's scale.
pub(crate) fn round_row(groups: &mut [Group], format: ScaleFormat) -> f32 {
    let row = match format {
        ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::F32 => 0.0,
        ScaleFormat::Double => row_scale(groups.iter().fold(0.0f32, |m, g| m.max(g.scale))),
    };
    for group in groups.iter_mut() {
        round_group(group, format, row);
    }
    row
}

/// Rounds one group to what is stored.
pub(crate) fn round_group(group: &mut Group, format: ScaleFormat, row_scale: f32) {
    match format {
        ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::F32 => group.scale = round_scale(group.scale, format),
        ScaleFormat::Double => round_double(group, row_scale),
    }
    group.min = round_min(group.min);
}

/// Σ |x|.
#[inline(always)]
fn magnitude(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = v.abs();
    }
    for x in chunks {
        for (lane, v) in lanes.iter_mut().zip(x) {
            *lane += v.abs();
        }
    }
    sum(&lanes)
}

/// Reads row `r`, refusing what is not finite.
pub(crate) fn read_finite(weight: &Weight, r: usize, out: &mut [f32]) -> Result<(), MethodError> {
    weight.read_row(r, out);
    // A sum is finite only where every term is; terms that overflow together are looked at one by one.
    if vectorized!(magnitude(out)).is_finite() {
        return Ok(());
    }
    match out.iter().position(|v| !v.is_finite()) {
        Some(col) => Err(MethodError::NotFinite { row: r, col, value: out[col] }),
        None => Ok(()),
    }
}
