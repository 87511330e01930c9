//! Scales and offsets, sixteen rows side by side: `[strips, groups, 16]`.

use fourfold_tensor::{Double, DoubleCodes, FloatBuffer, Offsets, Quantized, Scales};
use half::{bf16, f16};

use super::layout::STRIP;
use super::simd::Simd;

/// Floats as the file stores them, in strip order.
pub(super) enum Floats {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

/// Small integers in strip order, in as few bits as hold them.
pub(super) enum Bytes {
    /// Two in a byte: see [`Simd::load_nibbles`].
    Nibbles(Vec<u8>),
    Unsigned(Vec<u8>),
    Signed(Vec<i8>),
}

/// See [`Double`].
pub(super) struct StripDouble {
    /// `[strips, spans, 16]`.
    floats: Floats,
    /// `[strips, groups, 16]`.
    codes: Bytes,
    /// Floats of a row.
    spans: usize,
    /// Group `g` has float `g >> shift`.
    shift: u32,
}

/// A strip's place among scales and offsets.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    strip: usize,
    group: usize,
    /// `(strip · groups + group) · 16`.
    at: usize,
}

impl Spot {
    /// Group `group` of `groups`.
    #[inline(always)]
    pub fn new(strip: usize, group: usize, groups: usize) -> Self {
        Self { strip, group, at: (strip * groups + group) * STRIP }
    }
}

/// What multiplies the codes.
pub(super) enum StripScales {
    /// One scale for all.
    One(f32),
    /// `[strips, groups, 16]`.
    Groups(Floats),
    /// Floats times integers.
    Double(StripDouble),
}

/// What is subtracted.
pub(super) enum StripOffsets {
    /// The zero point is `2^shift` everywhere: 128, the bias of a codebook's values, included.
    PowerOfTwo(u32),
    /// One zero point for all.
    OneZero(f32),
    /// Zero points.
    Zeros(Bytes),
    /// Products of scale and zero point.
    Mins(Floats),
    /// The same, as floats times integers.
    DoubleMins(StripDouble),
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

impl Bytes {
    /// Takes `[rows, groups]` numbers into strip order.
    fn unsigned(from: &[u8], rows: usize, groups: usize) -> Self {
        let bytes = to_strips(from, rows, groups);
        if bytes.iter().any(|&b| b > 15) {
            return Self::Unsigned(bytes);
        }
        let pair = |strip: &[u8; STRIP]| -> [u8; 8] { std::array::from_fn(|i| strip[i] | strip[i + 8] << 4) };
        Self::Nibbles(bytes.as_chunks().0.iter().flat_map(pair).collect())
    }

    /// Number `lane` of those at `at`.
    fn get(&self, at: usize, lane: usize) -> f32 {
        match self {
            Self::Nibbles(v) => f32::from((v[at / 2 + lane % 8] >> (lane / 8 * 4)) & 15),
            Self::Unsigned(v) => f32::from(v[at + lane]),
            Self::Signed(v) => f32::from(v[at + lane]),
        }
    }

    /// Numbers `at .. at + 16`.
    ///
    /// # Safety
    /// They exist, and the instruction set is available.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, at: usize) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::Nibbles(v) => S::load_nibbles(v.as_ptr().add(at / 2)),
                Self::Unsigned(v) => S::load_u8(v.as_ptr().add(at)),
                Self::Signed(v) => S::load_i8(v.as_ptr().add(at)),
            }
        }
    }

    fn byte_len(&self) -> usize {
        match self {
            Self::Nibbles(v) | Self::Unsigned(v) => v.len(),
            Self::Signed(v) => v.len(),
        }
    }
}

impl StripDouble {
    /// `source.groups()` and `groups` differ only where one group is left of many.
    fn new(double: &Double, rows: usize, groups: usize) -> Self {
        let spans = double.spans(groups);
        // All groups of a row may be any number; no group is 2^31.
        let shift = if spans == 1 { u32::BITS - 1 } else { double.span.trailing_zeros() };
        let codes = match &double.codes {
            DoubleCodes::Unsigned(codes) => Bytes::unsigned(codes, rows, groups),
            DoubleCodes::Signed(codes) => Bytes::Signed(to_strips(codes, rows, groups)),
        };
        Self { floats: Floats::new(&double.floats, rows, spans), codes, spans, shift }
    }

    fn float_at(&self, spot: Spot) -> usize {
        (spot.strip * self.spans + (spot.group >> self.shift)) * STRIP
    }

    fn get(&self, spot: Spot, lane: usize) -> f32 {
        self.floats.get(self.float_at(spot) + lane) * self.codes.get(spot.at, lane)
    }

    /// # Safety
    /// The spot exists, and the instruction set is available.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, spot: Spot) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe { S::mul(self.floats.load::<S>(self.float_at(spot)), self.codes.load::<S>(spot.at)) }
    }

    fn byte_len(&self) -> usize {
        self.floats.byte_len() + self.codes.byte_len()
    }
}

impl StripScales {
    pub fn new(source: &Quantized, groups: usize) -> Self {
        match &source.scales {
            Scales::Float(s) if s.len() == 1 => Self::One(s.get(0)),
            Scales::Float(s) => Self::Groups(Floats::new(s, source.rows, groups)),
            Scales::Double(double) => Self::Double(StripDouble::new(double, source.rows, groups)),
        }
    }

    /// The scale of a row: of `lane` of the strip.
    pub fn get(&self, spot: Spot, lane: usize) -> f32 {
        match self {
            Self::One(scale) => *scale,
            Self::Groups(scales) => scales.get(spot.at + lane),
            Self::Double(double) => double.get(spot, lane),
        }
    }

    /// The scales of a strip's rows.
    ///
    /// # Safety
    /// The spot exists, and the instruction set is available.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, spot: Spot) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::One(scale) => S::splat(*scale),
                Self::Groups(scales) => scales.load::<S>(spot.at),
                Self::Double(double) => double.load::<S>(spot),
            }
        }
    }

    pub fn byte_len(&self) -> usize {
        match self {
            Self::One(_) => 4,
            Self::Groups(scales) => scales.byte_len(),
            Self::Double(double) => double.byte_len(),
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
            Offsets::ZeroPoint(zeros) => Self::Zeros(Bytes::unsigned(zeros, source.rows, groups)),
            Offsets::Min(mins) => Self::Mins(Floats::new(mins, source.rows, groups)),
            Offsets::Double(double) => Self::DoubleMins(StripDouble::new(double, source.rows, groups)),
        }
    }

    /// How they enter a kernel.
    pub fn kind(&self) -> OffsetKind {
        match self {
            Self::PowerOfTwo(shift) => OffsetKind::Shift(*shift),
            Self::OneZero(_) | Self::Zeros(_) => OffsetKind::Zero,
            Self::Mins(_) | Self::DoubleMins(_) => OffsetKind::Min,
        }
    }

    /// Zero point or min of a row: of `lane` of the strip.
    pub fn get(&self, spot: Spot, lane: usize) -> f32 {
        match self {
            Self::PowerOfTwo(shift) => (1u32 << shift) as f32,
            Self::OneZero(zero) => *zero,
            Self::Zeros(zeros) => zeros.get(spot.at, lane),
            Self::Mins(mins) => mins.get(spot.at + lane),
            Self::DoubleMins(double) => double.get(spot, lane),
        }
    }

    /// Zero points or mins of a strip's rows.
    ///
    /// # Safety
    /// The spot exists, and the instruction set is available.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, spot: Spot) -> S::Float {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::PowerOfTwo(shift) => S::splat((1u32 << shift) as f32),
                Self::OneZero(zero) => S::splat(*zero),
                Self::Zeros(zeros) => zeros.load::<S>(spot.at),
                Self::Mins(mins) => mins.load::<S>(spot.at),
                Self::DoubleMins(double) => double.load::<S>(spot),
            }
        }
    }

    pub fn byte_len(&self) -> usize {
        match self {
            Self::PowerOfTwo(_) | Self::OneZero(_) => 0,
            Self::Zeros(zeros) => zeros.byte_len(),
            Self::Mins(mins) => mins.byte_len(),
            Self::DoubleMins(double) => double.byte_len(),
        }
    }
}
