//! Scales and offsets, sixteen rows side by side: `[strips, groups, 16]`.

use fourfold_tensor::{FloatBuffer, Offsets, Quantized, Scales};
use half::{bf16, f16};

use super::layout::STRIP;
use super::simd::Simd;

/// Floats as the file stores them, in strip order.
pub(super) enum Floats {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

/// What multiplies the codes.
pub(super) enum StripScales {
    /// One scale for all.
    One(f32),
    /// `[strips, groups, 16]`.
    Groups(Floats),
    /// `row [strips, 16] · codes [strips, groups, 16]`.
    Double { row: Floats, codes: Vec<u8> },
}

/// What is subtracted.
pub(super) enum StripOffsets {
    /// The zero point is `2^shift` everywhere: 128, the bias of a codebook's values, included.
    PowerOfTwo(u32),
    /// One zero point for all.
    OneZero(f32),
    /// Zero points, two in a byte: see [`Simd::load_nibbles`].
    Nibbles(Vec<u8>),
    /// Zero points, a byte each.
    Bytes(Vec<u8>),
    /// Products of scale and zero point.
    Mins(Floats),
}

/// How the offsets enter a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OffsetKind {
    /// As a shift of the integer sums.
    Shift(u32),
    /// As a factor of the integer sums.
    Zero,
    /// In f32.
    Min,
}

/// `[rows, groups]` row-major to `[strips, groups, 16]`, rows beyond the last filled with `T::default()`.
pub(super) fn to_strips<T: Copy + Default>(from: &[T], rows: usize, groups: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows.div_ceil(STRIP) * groups * STRIP];
    for (r, row) in from.chunks_exact(groups.max(1)).enumerate() {
        for (g, &value) in row.iter().enumerate() {
            out[((r / STRIP) * groups + g) * STRIP + r % STRIP] = value;
        }
    }
    out
}

impl Floats {
    /// Takes `[rows, groups]` values into strip order.
    pub fn new(from: &FloatBuffer, rows: usize, groups: usize) -> Self {
        match from {
            FloatBuffer::F32(v) => Self::F32(to_strips(v, rows, groups)),
            FloatBuffer::F16(v) => {
                Self::F16(to_strips(&v.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), rows, groups))
            }
            FloatBuffer::Bf16(v) => {
                Self::Bf16(to_strips(&v.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), rows, groups))
            }
        }
    }

    /// Value `i`.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(v) => v[i],
            Self::F16(v) => f16::from_bits(v[i]).to_f32(),
            Self::Bf16(v) => bf16::from_bits(v[i]).to_f32(),
        }
    }

    /// Values `at .. at + 16`.
    ///
    /// # Safety
    /// They exist, and the instruction set is available.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, at: usize) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::F32(v) => S::load(v.as_ptr().add(at)),
                Self::F16(v) => S::load_f16(v.as_ptr().add(at)),
                Self::Bf16(v) => S::load_bf16(v.as_ptr().add(at)),
            }
        }
    }

    fn byte_len(&self) -> usize {
        match self {
            Self::F32(v) => v.len() * 4,
            Self::F16(v) | Self::Bf16(v) => v.len() * 2,
        }
    }
}

impl StripScales {
    pub fn new(source: &Quantized, groups: usize) -> Self {
        match &source.scales {
            Scales::Float(s) if s.len() == 1 => Self::One(s.get(0)),
            Scales::Float(s) => Self::Groups(Floats::new(s, source.rows, groups)),
            Scales::Double { row, codes } => {
                Self::Double { row: Floats::new(row, source.rows, 1), codes: to_strips(codes, source.rows, groups) }
            }
        }
    }

    /// The scale of row `row`; `at` is that of its strip and group, `(strip · groups + group) · 16`.
    pub fn get(&self, row: usize, at: usize) -> f32 {
        match self {
            Self::One(scale) => *scale,
            Self::Groups(scales) => scales.get(at + row % STRIP),
            Self::Double { row: scales, codes } => scales.get(row) * f32::from(codes[at + row % STRIP]),
        }
    }

    /// The scales of a strip's rows.
    ///
    /// # Safety
    /// The strip and the group exist, and the instruction set is available.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, strip: usize, at: usize) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::One(scale) => S::splat(*scale),
                Self::Groups(scales) => scales.load::<S>(at),
                Self::Double { row, codes } => S::mul(row.load::<S>(strip * STRIP), S::load_u8(codes.as_ptr().add(at))),
            }
        }
    }

    pub fn byte_len(&self) -> usize {
        match self {
            Self::One(_) => 4,
            Self::Groups(scales) => scales.byte_len(),
            Self::Double { row, codes } => row.byte_len() + codes.len(),
        }
    }
}

impl StripOffsets {
    pub fn new(source: &Quantized, groups: usize) -> Self {
        if source.codebook.is_some() {
            return Self::PowerOfTwo(7);
        }
        match &source.offsets {
            Offsets::Symmetric => Self::PowerOfTwo(u32::from(source.bits) - 1),
            Offsets::ZeroPoint(zeros) if zeros.len() == 1 => Self::OneZero(f32::from(zeros[0])),
            Offsets::ZeroPoint(zeros) => {
                let bytes = to_strips(zeros, source.rows, groups);
                if zeros.iter().all(|&z| z < 16) {
                    let pair =
                        |strip: &[u8; STRIP]| -> [u8; 8] { std::array::from_fn(|i| strip[i] | strip[i + 8] << 4) };
                    Self::Nibbles(bytes.as_chunks().0.iter().flat_map(pair).collect())
                } else {
                    Self::Bytes(bytes)
                }
            }
            Offsets::Min(mins) => Self::Mins(Floats::new(mins, source.rows, groups)),
        }
    }

    /// How they enter a kernel.
    pub fn kind(&self) -> OffsetKind {
        match self {
            Self::PowerOfTwo(shift) => OffsetKind::Shift(*shift),
            Self::OneZero(_) | Self::Nibbles(_) | Self::Bytes(_) => OffsetKind::Zero,
            Self::Mins(_) => OffsetKind::Min,
        }
    }

    /// Zero point or min of row `row`; `at` as for [`StripScales::get`].
    pub fn get(&self, row: usize, at: usize) -> f32 {
        let lane = row % STRIP;
        match self {
            Self::PowerOfTwo(shift) => (1u32 << shift) as f32,
            Self::OneZero(zero) => *zero,
            Self::Nibbles(zeros) => f32::from((zeros[at / 2 + lane % 8] >> (lane / 8 * 4)) & 15),
            Self::Bytes(zeros) => f32::from(zeros[at + lane]),
            Self::Mins(mins) => mins.get(at + lane),
        }
    }

    /// Zero points or mins of a strip's rows.
    ///
    /// # Safety
    /// The strip and the group exist, and the instruction set is available.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, at: usize) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::PowerOfTwo(shift) => S::splat((1u32 << shift) as f32),
                Self::OneZero(zero) => S::splat(*zero),
                Self::Nibbles(zeros) => S::load_nibbles(zeros.as_ptr().add(at / 2)),
                Self::Bytes(zeros) => S::load_u8(zeros.as_ptr().add(at)),
                Self::Mins(mins) => mins.load::<S>(at),
            }
        }
    }

    pub fn byte_len(&self) -> usize {
        match self {
            Self::PowerOfTwo(_) | Self::OneZero(_) => 0,
            Self::Nibbles(zeros) | Self::Bytes(zeros) => zeros.len(),
            Self::Mins(mins) => mins.byte_len(),
        }
    }
}
