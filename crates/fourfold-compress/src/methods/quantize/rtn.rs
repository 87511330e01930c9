//! Round to nearest: every weight to the closest level, with scales chosen group by group.

use fourfold_tensor::{Form, Weight};
use serde::{Deserialize, Serialize};

use super::codebook;
use super::fit::Fitter;
use super::grid::{Granularity, GridSpec, Levels, ScaleFormat, ZeroKind};
use super::lattice::{self, Group, Lattice};
use super::store::{Parts, read_finite, round_group, round_row};
use crate::MethodError;
use crate::methods::{Compressed, Method, Needs, Stats};
use crate::vector::{LANES, sum, vectorized};

/// The name in plans.
pub const NAME: &str = "rtn";

/// Round to nearest on a grid. With second moments of the inputs, scales minimise Σ E\[x_i²\]·(w_i − ŵ_i)² instead of the
/// plain squared error.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(transparent)]
pub struct Rtn {
    /// The grid.
    pub grid: GridSpec,
}

/// The fitter of a grid, and its codebook where it has one.
pub(crate) fn fitter(weight: &Weight, spec: &GridSpec, h: &[f32]) -> Result<(Fitter, Option<Vec<i8>>), MethodError> {
    let (lattice, levels) = match spec.levels {
        Levels::Uniform => (Lattice::uniform(spec.bits), None),
        Levels::Learned => {
            let levels = codebook::learn(weight, spec, h)?;
            (Lattice::codebook(levels.iter().map(|&v| f32::from(v)).collect()), Some(levels))
        }
    };
    let signed = spec.zero == ZeroKind::Symmetric && spec.scales != ScaleFormat::Double;
    Ok((Fitter { lattice, bits: spec.bits, zero: spec.zero, rule: spec.rule, signed }, levels))
}

/// The column weights of `stats`, empty where there are none.
pub(crate) fn column_weights<'a>(stats: &Stats<'a>, cols: usize) -> Result<&'a [f32], MethodError> {
    match stats.moments {
        None => Ok(&[]),
        Some(m) if m.len() == cols => Ok(m),
        Some(m) => Err(MethodError::Width { found: m.len(), expected: cols }),
    }
}

impl Method for Rtn {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        self.grid.validate()?;
        Ok(Some(Form::Quantized(self.grid.form(rows, cols))))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let spec = self.grid;
        spec.validate()?;
        let cols = weight.cols();
        let h = column_weights(&stats, cols)?;
        let (fitter, levels) = fitter(weight, &spec, h)?;
        let whole = match spec.granularity {
            Granularity::Tensor => Some(fit_tensor(weight, &fitter, h, spec.scales)?),
            Granularity::Channel | Granularity::Group(_) => None,
        };
        let size = spec.group_size(cols);
        let mut parts = Parts::new(spec, weight.rows(), cols);
        parts.fill(|slot| {
            let mut row = vec![0.0f32; cols];
            let mut codes = vec![0u8; cols];
            let per_row = slot.groups.len() / slot.count;
            for i in 0..slot.count {
                read_finite(weight, slot.row + i, &mut row)?;
                let groups = &mut slot.groups[i * per_row..(i + 1) * per_row];
                match whole {
                    Some(group) => groups.fill(group),
                    None => {
                        for (g, (x, group)) in row.chunks(size).zip(groups.iter_mut()).enumerate() {
                            let h = if h.is_empty() { h } else { &h[g * size..g * size + x.len()] };
                            *group = fitter.fit(x, h);
                        }
                        slot.row_scales[i] = round_row(groups, spec.scales);
                    }
                }
                let (error, energy) = vectorized!(encode_row(&fitter.lattice, &row, h, size, groups, &mut codes));
                slot.error.0 += error;
                slot.error.1 += energy;
                slot.pack(i, &codes);
            }
            Ok(())
        })?;
        let error = parts.relative_error();
        Ok(Compressed { weight: parts.finish(levels)?, error })
    }
}

/// Rounds a row; returns the energy of the error and of the row.
#[inline(always)]
pub(crate) fn encode_row(
    lattice: &Lattice,
    row: &[f32],
    h: &[f32],
    size: usize,
    groups: &[Group],
    codes: &mut [u8],
) -> (f64, f64) {
    let (mut error, mut energy) = (0.0f64, 0.0f64);
    for (g, (x, codes)) in row.chunks(size).zip(codes.chunks_mut(size)).enumerate() {
        let mut sums = Sums::default();
        for (k, (x, codes)) in x.chunks(LANES).zip(codes.chunks_mut(LANES)).enumerate() {
            let h = if h.is_empty() { &ONES[..x.len()] } else { &h[g * size + k * LANES..][..x.len()] };
            // Arrays of a known length become vectors.
            match (
                <&[f32; LANES]>::try_from(x),
                <&[f32; LANES]>::try_from(h),
                <&mut [u8; LANES]>::try_from(&mut *codes),
            ) {
                (Ok(x), Ok(h), Ok(codes)) => sums.encode(lattice, &groups[g], x, h, codes),
                _ => sums.encode_short(lattice, &groups[g], x, h, codes),
            }
        }
        error += f64::from(sum(&sums.error));
        energy += f64::from(sum(&sums.energy));
    }
    (error, energy)
}

/// Weights where every element counts the same.
static ONES: [f32; LANES] = [1.0; LANES];

/// Energies of a group's error and values, lane by lane.
#[derive(Default)]
struct Sums {
    error: [f32; LANES],
    energy: [f32; LANES],
}

impl Sums {
    #[inline(always)]
    fn encode(
        &mut self,
        lattice: &Lattice,
        group: &Group,
        x: &[f32; LANES],
        h: &[f32; LANES],
        codes: &mut [u8; LANES],
    ) {
        match lattice {
            Lattice::Uniform { top } => {
                for i in 0..LANES {
                    let level = lattice::nearest(x[i], group, *top);
                    codes[i] = lattice::small_code(level);
                    let d = x[i] - (group.scale * (level - group.zero) - group.min);
                    self.error[i] += h[i] * d * d;
                    self.energy[i] += h[i] * x[i] * x[i];
                }
            }
            Lattice::Codebook { .. } => self.encode_short(lattice, group, x, h, codes),
        }
    }

    #[inline(always)]
    fn encode_short(&mut self, lattice: &Lattice, group: &Group, x: &[f32], h: &[f32], codes: &mut [u8]) {
        for (i, ((&x, code), &h)) in x.iter().zip(codes).zip(h).enumerate() {
            *code = lattice.encode(x, group);
            let d = x - lattice.value(*code, group);
            self.error[i] += h * d * d;
            self.energy[i] += h * x * x;
        }
    }
}

/// One scale for the whole tensor.
pub(crate) fn fit_tensor(
    weight: &Weight,
    fitter: &Fitter,
    h: &[f32],
    scales: ScaleFormat,
) -> Result<Group, MethodError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut all = vec![0.0f32; rows * cols];
    for (r, row) in all.chunks_exact_mut(cols.max(1)).enumerate() {
        read_finite(weight, r, row)?;
    }
    let weights: Vec<f32> = if h.is_empty() { Vec::new() } else { h.iter().copied().cycle().take(all.len()).collect() };
    let mut group = fitter.fit(&all, &weights);
    round_group(&mut group, scales, 0.0);
    Ok(group)
}
