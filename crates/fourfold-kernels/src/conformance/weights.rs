//! Numbers that look random, and weights of every form.

use fourfold_tensor::{
    DType, Dense, Double, DoubleCodes, FloatBuffer, Fp8, LowRank, Offsets, Quantized, Scales, Sparse, SparseCodes,
    SparseValues, Sum, Weight, mask_words_per_row, pack_row, packed_words_per_row,
};

use crate::Tensor;

/// A generator of values in [−1, 1) (xorshift).
pub struct Noise(u64);

impl Noise {
    /// The same values for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// 44 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 20
    }

    /// One value.
    pub fn value(&mut self) -> f32 {
        (self.bits() & 0xFF_FFFF) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Several.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

/// A tensor of noise.
pub fn noise(rows: usize, cols: usize, seed: u64) -> Tensor {
    Tensor::new(rows, cols, Noise::new(seed).values(rows * cols))
}

/// A form of weight to check linear layers with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Floats of this type.
    Dense(DType),
    /// Codes with a scale a group.
    Symmetric {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// The same with integer offsets.
    ZeroPoint {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// The same with real offsets.
    Min {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// Codes of 4 bits that are looked up.
    Codebook {
        /// Columns of a group.
        group: usize,
    },
    /// Scales of a byte, with a float a row.
    DoubleScales {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// As GGUF's K-quants: runs of groups share a float, scales and offsets alike.
    DoubleRuns {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// Columns that name their group.
    ActOrder {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// One scale for all.
    PerTensor {
        /// Bits of a code.
        bits: u8,
    },
    /// 8-bit floats with a scale for each block of so many rows and columns.
    Fp8 {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
        /// The scales' type.
        scales: DType,
    },
    /// Of 64 elements about this many kept; floats.
    Sparse {
        /// Of 64 elements.
        kept: u64,
        /// Their type.
        dtype: DType,
    },
    /// The same in codes.
    SparseCodes {
        /// Of 64 elements.
        kept: u64,
        /// Bits of a code.
        bits: u8,
        /// Columns of a group.
        group: usize,
    },
    /// Factors of these forms.
    LowRank {
        /// The inner dimension.
        rank: usize,
        /// `[rows, rank]`.
        up: &'static Form,
        /// `[rank, cols]`.
        down: &'static Form,
    },
    /// The sum of these.
    Sum(&'static [Form]),
}

/// What every backend has to read.
pub const FORMS: &[Form] = &[
    Form::Dense(DType::F32),
    Form::Dense(DType::F16),
    Form::Dense(DType::Bf16),
    Form::Symmetric { bits: 4, group: 32 },
    Form::Symmetric { bits: 3, group: 64 },
    Form::Symmetric { bits: 8, group: 1 << 20 },
    Form::ZeroPoint { bits: 4, group: 24 },
    Form::ZeroPoint { bits: 2, group: 16 },
    Form::Min { bits: 5, group: 32 },
    Form::Codebook { group: 32 },
    Form::DoubleScales { bits: 6, group: 16 },
    Form::DoubleRuns { bits: 4, group: 32 },
    Form::DoubleRuns { bits: 2, group: 16 },
    Form::ActOrder { bits: 4, group: 16 },
    Form::PerTensor { bits: 8 },
    Form::Fp8 { rows: 128, cols: 128, scales: DType::F32 },
    Form::Fp8 { rows: 24, cols: 20, scales: DType::Bf16 },
    Form::Fp8 { rows: 1, cols: 1 << 20, scales: DType::F16 },
    Form::Fp8 { rows: 1 << 20, cols: 1 << 20, scales: DType::F32 },
    Form::Fp8 { rows: 1, cols: 16, scales: DType::F32 },
    Form::Sparse { kept: 32, dtype: DType::F32 },
    Form::Sparse { kept: 60, dtype: DType::F16 },
    Form::Sparse { kept: 20, dtype: DType::Bf16 },
    Form::Sparse { kept: 0, dtype: DType::Bf16 },
    Form::SparseCodes { kept: 32, bits: 4, group: 128 },
    Form::SparseCodes { kept: 40, bits: 3, group: 1 << 20 },
    Form::SparseCodes { kept: 64, bits: 8, group: 64 },
    Form::SparseCodes { kept: 30, bits: 6, group: 24 },
    Form::LowRank { rank: 5, up: &Form::Dense(DType::Bf16), down: &Form::Symmetric { bits: 8, group: 32 } },
    Form::LowRank { rank: 33, up: &Form::Sparse { kept: 32, dtype: DType::F32 }, down: &Form::Dense(DType::F32) },
    Form::Sum(&[
        Form::Symmetric { bits: 4, group: 32 },
        Form::LowRank { rank: 3, up: &Form::Dense(DType::Bf16), down: &Form::Dense(DType::Bf16) },
        Form::SparseCodes { kept: 4, bits: 8, group: 64 },
    ]),
];

/// A weight `[rows, cols]` of a form, of magnitude about 1.
pub fn weight(form: Form, rows: usize, cols: usize, seed: u64) -> Weight {
    let mut noise = Noise::new(seed);
    if let Form::Dense(dtype) = form {
        let data = FloatBuffer::from_f32(noise.values(rows * cols), dtype);
        return Dense::new(vec![rows, cols], data).into();
    }
    match form {
        Form::Fp8 { rows: block_rows, cols: block_cols, scales } => {
            // All codes but the two that are no numbers.
            let code = |noise: &mut Noise| (noise.bits() % 127) as u8 | (noise.bits() as u8 & 0x80);
            let codes: Vec<u8> = (0..rows * cols).map(|_| code(&mut noise)).collect();
            let blocks = rows.div_ceil(block_rows) * cols.div_ceil(block_cols);
            let values = (0..blocks).map(|_| (1.0 + 0.5 * noise.value()) / 256.0).collect();
            let scales = FloatBuffer::from_f32(values, scales);
            return Fp8::new(rows, cols, codes.into(), (block_rows, block_cols), scales).unwrap().into();
        }
        Form::Sparse { kept, dtype } => {
            let (mask, kept) = mask(rows, cols, kept, &mut noise);
            let values = SparseValues::Float(FloatBuffer::from_f32(noise.values(kept), dtype));
            return Sparse::new(rows, cols, mask.into(), values).unwrap().into();
        }
        Form::SparseCodes { kept, bits, group } => {
            let (mask, kept) = mask(rows, cols, kept, &mut noise);
            let codes: Vec<u8> = (0..kept).map(|_| (noise.bits() % (1 << bits)) as u8).collect();
            let mut packed = vec![0; packed_words_per_row(kept, bits)];
            pack_row(&codes, bits, &mut packed);
            let top = (1u32 << (bits - 1)) as f32;
            let scales = (0..rows * cols.div_ceil(group)).map(|_| (1.0 + 0.5 * noise.value()) / top).collect();
            let scales = FloatBuffer::from_f32(scales, DType::F16);
            let codes = SparseCodes { bits, group_size: group, packed: packed.into(), scales };
            return Sparse::new(rows, cols, mask.into(), SparseValues::Codes(codes)).unwrap().into();
        }
        Form::LowRank { rank, up, down } => {
            let (up, down) = (weight(*up, rows, rank, seed + 1), weight(*down, rank, cols, seed + 2));
            return LowRank::new(up, down).unwrap().into();
        }
        Form::Sum(terms) => {
            let terms = terms.iter().zip(seed..).map(|(&form, seed)| weight(form, rows, cols, seed)).collect();
            return Sum::new(terms).unwrap().into();
        }
        _ => {}
    }
    let (bits, group) = match form {
        Form::Dense(_)
        | Form::Fp8 { .. }
        | Form::Sparse { .. }
        | Form::SparseCodes { .. }
        | Form::LowRank { .. }
        | Form::Sum(_) => {
            unreachable!()
        }
        Form::Codebook { group } => (4, group),
        Form::PerTensor { bits } => (bits, cols),
        Form::Symmetric { bits, group }
        | Form::ZeroPoint { bits, group }
        | Form::Min { bits, group }
        | Form::DoubleScales { bits, group }
        | Form::DoubleRuns { bits, group }
        | Form::ActOrder { bits, group } => (bits, group.min(cols)),
    };
    let groups = cols.div_ceil(group);
    let words = packed_words_per_row(cols, bits);
    let mut packed = vec![0u32; rows * words];
    for row in packed.chunks_exact_mut(words) {
        let codes: Vec<u8> = (0..cols).map(|_| (noise.bits() % (1 << bits)) as u8).collect();
        pack_row(&codes, bits, row);
    }
    let top = if matches!(form, Form::Codebook { .. }) { 127.0 } else { (1u32 << (bits - 1)) as f32 };
    let count = if matches!(form, Form::PerTensor { .. }) { 1 } else { rows * groups };
    let scale_values: Vec<f32> = (0..count).map(|_| (1.0 + 0.5 * noise.value()) / top).collect();
    let scales = match form {
        Form::DoubleScales { .. } => Scales::Double(Double::by_row(
            FloatBuffer::from_f32((0..rows).map(|_| 1.0 / (200.0 * top)).collect(), DType::F32),
            (0..count).map(|_| (100 + noise.bits() % 156) as u8).collect(),
            groups,
        )),
        Form::DoubleRuns { .. } => Scales::Double(Double {
            floats: FloatBuffer::from_f32(vec![1.0 / (100.0 * top); rows * groups.div_ceil(2)], DType::F16),
            codes: DoubleCodes::Signed((0..count).map(|_| noise.bits() as i8).collect::<Vec<_>>().into()),
            span: 2,
        }),
        _ => Scales::Float(FloatBuffer::from_f32(scale_values.clone(), DType::F16)),
    };
    let offsets = match form {
        Form::ZeroPoint { .. } => {
            Offsets::ZeroPoint((0..count).map(|_| (noise.bits() % (1 << bits)) as u8).collect::<Vec<_>>().into())
        }
        Form::DoubleRuns { .. } => Offsets::Double(Double {
            floats: FloatBuffer::from_f32(vec![1.0 / 30.0; rows * groups.div_ceil(4)], DType::F16),
            codes: DoubleCodes::Unsigned((0..count).map(|_| (noise.bits() % 64) as u8).collect::<Vec<_>>().into()),
            span: 4,
        }),
        Form::Min { .. } => Offsets::Min(FloatBuffer::from_f32(
            scale_values.iter().map(|s| s * top * (1.0 + 0.2 * noise.value())).collect(),
            DType::F16,
        )),
        _ => Offsets::Symmetric,
    };
    let codebook = matches!(form, Form::Codebook { .. })
        .then(|| vec![-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);
    let g_idx = matches!(form, Form::ActOrder { .. })
        .then(|| (0..cols).map(|c| ((c * 7 + 3) % cols / group) as u32).collect::<Vec<_>>().into());
    Quantized { rows, cols, bits, group_size: group, packed: packed.into(), scales, offsets, codebook, g_idx }.into()
}

/// A mask that keeps about `kept` of 64 elements, and how many it keeps.
fn mask(rows: usize, cols: usize, kept: u64, noise: &mut Noise) -> (Vec<u64>, usize) {
    let words = mask_words_per_row(cols);
    let mut mask = vec![0u64; rows * words];
    let mut count = 0;
    for r in 0..rows {
        for c in 0..cols {
            if noise.bits() % 64 < kept {
                mask[r * words + c / 64] |= 1 << (c % 64);
                count += 1;
            }
        }
    }
    (mask, count)
}
