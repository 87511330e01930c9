//! The levels of a grid, and rounding to them. The inner loops run under [`pulp`]'s dispatch: compiled for the machine's
//! vector width, with sums in a fixed number of lanes, so that results are the same on every machine.

/// Scale and offset of a group: level `v` stands for `scale · (v − zero) − min`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Group {
    /// As stored, rounded.
    pub scale: f32,
    /// An integer code; 0 with a codebook or real offsets.
    pub zero: f32,
    /// A real offset; 0 elsewhere.
    pub min: f32,
    /// The scale's code under double quantization.
    pub code: u8,
}

/// The levels of a grid.
#[derive(Clone, Debug)]
pub(crate) enum Lattice {
    /// Codes are levels: 0 ..= top.
    Uniform { top: f32 },
    /// Ascending values and the midpoints between them.
    Codebook { levels: Vec<f32>, midpoints: Vec<f32> },
}

/// Leaves no fraction bits when added to |x| < 2²².
pub(crate) const SHIFT: f32 = 12_582_912.0;

/// Nearest integer, ties to even, for |x| < 2²².
#[inline(always)]
pub(crate) fn round_small(x: f32) -> f32 {
    (x + SHIFT) - SHIFT
}

/// An integer `0..=255` as a byte: the low bits of the shifted number, without the tests of a conversion.
#[inline(always)]
pub(crate) fn small_code(x: f32) -> u8 {
    (x + SHIFT).to_bits() as u8
}

/// The uniform grid's code nearest to `x`, not yet a byte.
#[inline(always)]
pub(crate) fn nearest(x: f32, group: &Group, top: f32) -> f32 {
    let y = if group.scale == 0.0 { 0.0 } else { (x + group.min) / group.scale };
    round_small(clamp(y + group.zero, top))
}

/// `x` between 0 and `top`. Written so that it becomes one `max` and one `min`; the bounds also keep [`round_small`] exact.
#[inline(always)]
fn clamp(x: f32, top: f32) -> f32 {
    let x = if x > 0.0 { x } else { 0.0 };
    if x < top { x } else { top }
}

impl Lattice {
    pub(crate) fn uniform(bits: u8) -> Self {
        Self::Uniform { top: ((1u32 << bits) - 1) as f32 }
    }

    pub(crate) fn codebook(levels: Vec<f32>) -> Self {
        let midpoints = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        Self::Codebook { levels, midpoints }
    }

    /// The level of a code, less the group's zero.
    #[inline(always)]
    pub(crate) fn level(&self, code: u8, group: &Group) -> f32 {
        match self {
            Self::Uniform { .. } => f32::from(code) - group.zero,
            Self::Codebook { levels, .. } => levels[code as usize],
        }
    }

    /// What a code stands for; the rounding is [`fourfold_tensor::Quantized::dequantize_row`]'s.
    #[inline(always)]
    pub(crate) fn value(&self, code: u8, group: &Group) -> f32 {
        group.scale * self.level(code, group) - group.min
    }

    /// The code nearest to `x`.
    #[inline(always)]
    pub(crate) fn encode(&self, x: f32, group: &Group) -> u8 {
        match self {
            Self::Uniform { top } => small_code(nearest(x, group, *top)),
            Self::Codebook { midpoints, .. } => {
                let y = if group.scale == 0.0 { 0.0 } else { (x + group.min) / group.scale };
                midpoints.iter().map(|&m| u8::from(y > m)).sum()
            }
        }
    }
}
