//! Block codecs: ggml's interleaved blocks taken apart into [`Quantized`], without loss.
//!
//! ggml puts each block's scales beside its codes; [`Quantized`] keeps all codes of a row together and the scales apart.
//! Every block type here is one of three grids over groups of 16 or 32 columns:
//!
//! ```text
//! symmetric   w = scale · (code − 2^(bits−1))     Q4_0 Q5_0 Q8_0 Q3_K Q6_K
//! min         w = scale · code − min              Q4_1 Q5_1 Q2_K Q4_K Q5_K
//! codebook    w = scale · value[code]             IQ4_NL IQ4_XS MXFP4
//! ```
//!
//! The K- and IQ-quants hold a group's scale as an f16 times a small integer. The product has up to 19 significant bits, so
//! it is kept as f32 wherever a narrower type would round it: the values are exactly the file's, and the price is 16 bits or
//! less a group (Q4_K takes 6.0 bits a weight in memory, 4.5 in the file).

mod kquant;
mod legacy;
mod nonlinear;

use fourfold_tensor::{DType, Dense, FloatBuffer, Offsets, Quantized, Scales, Weight, pack_row, packed_words_per_row};
use half::{bf16, f16};

use super::{GgmlType, GgufError};

/// Most elements of a block.
const MAX_BLOCK: usize = 256;
/// Most groups of a block.
const MAX_GROUPS: usize = 16;

/// One block taken apart. A codec fills as many entries as its block has.
struct Block {
    codes: [u8; MAX_BLOCK],
    scales: [f32; MAX_GROUPS],
    mins: [f32; MAX_GROUPS],
}

/// What a code stands for.
#[derive(Clone, Copy)]
enum Grid {
    Symmetric,
    Min,
    Codebook(&'static [i8; 16]),
}

/// How blocks of one type are read.
struct Codec {
    bits: u8,
    group_size: usize,
    grid: Grid,
    decode: fn(&[u8], &mut Block),
}

fn codec(ggml_type: GgmlType) -> Option<Codec> {
    let (bits, group_size, grid, decode): (_, _, _, fn(&[u8], &mut Block)) = match ggml_type {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => return None,
        GgmlType::Q4_0 => (4, 32, Grid::Symmetric, legacy::q4_0),
        GgmlType::Q4_1 => (4, 32, Grid::Min, legacy::q4_1),
        GgmlType::Q5_0 => (5, 32, Grid::Symmetric, legacy::q5_0),
        GgmlType::Q5_1 => (5, 32, Grid::Min, legacy::q5_1),
        GgmlType::Q8_0 => (8, 32, Grid::Symmetric, legacy::q8_0),
        GgmlType::Q2_K => (2, 16, Grid::Min, kquant::q2_k),
        GgmlType::Q3_K => (3, 16, Grid::Symmetric, kquant::q3_k),
        GgmlType::Q4_K => (4, 32, Grid::Min, kquant::q4_k),
        GgmlType::Q5_K => (5, 32, Grid::Min, kquant::q5_k),
        GgmlType::Q6_K => (6, 16, Grid::Symmetric, kquant::q6_k),
        GgmlType::IQ4_NL => (4, 32, Grid::Codebook(&nonlinear::IQ4_VALUES), nonlinear::iq4_nl),
        GgmlType::IQ4_XS => (4, 32, Grid::Codebook(&nonlinear::IQ4_VALUES), nonlinear::iq4_xs),
        GgmlType::MXFP4 => (4, 32, Grid::Codebook(&nonlinear::FP4_VALUES), nonlinear::mxfp4),
    };
    Some(Codec { bits, group_size, grid, decode })
}

/// Decodes the bytes of a tensor of logical `shape` (outermost first). Vectors become dense whatever their type; matrices of
/// a block type become [`Weight::Quantized`].
///
/// `bytes` holds whole rows of whole blocks: the header's parser has checked it.
///
/// # Errors
/// A scale that is not finite.
pub fn decode(ggml_type: GgmlType, shape: &[usize], bytes: &[u8]) -> Result<Weight, GgufError> {
    let Some(codec) = codec(ggml_type) else {
        return Ok(Dense::new(shape.to_vec(), plain(ggml_type, bytes)).into());
    };
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().product::<usize>() / cols;
    let quantized = quantized(ggml_type, &codec, rows, cols, bytes)?;
    if shape.len() == 2 {
        return Ok(quantized.into());
    }
    Ok(Dense::from_f32(shape.to_vec(), Weight::Quantized(quantized).to_f32()).into())
}

/// Elements of a float type.
fn plain(ggml_type: GgmlType, bytes: &[u8]) -> FloatBuffer {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match ggml_type {
        GgmlType::F16 => FloatBuffer::F16(halves().map(f16::from_bits).collect::<Vec<_>>().into()),
        GgmlType::BF16 => FloatBuffer::Bf16(halves().map(bf16::from_bits).collect::<Vec<_>>().into()),
        _ => {
            let words = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            FloatBuffer::F32(words.collect::<Vec<_>>().into())
        }
    }
}

fn quantized(
    ggml_type: GgmlType,
    codec: &Codec,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<Quantized, GgufError> {
    let block_len = ggml_type.block_len() as usize;
    let row_bytes = cols / block_len * ggml_type.block_bytes() as usize;
    let block_groups = block_len / codec.group_size;
    let groups = cols / codec.group_size;
    let words = packed_words_per_row(cols, codec.bits);
    let has_mins = matches!(codec.grid, Grid::Min);

    let mut packed = vec![0u32; rows * words];
    let mut scales = Narrowest::with_capacity(rows * groups);
    let mut mins = Narrowest::with_capacity(if has_mins { rows * groups } else { 0 });
    let mut codes = vec![0u8; cols];
    let mut block = Block { codes: [0; MAX_BLOCK], scales: [0.0; MAX_GROUPS], mins: [0.0; MAX_GROUPS] };
    for (row, (row_words, row_bytes)) in packed.chunks_exact_mut(words).zip(bytes.chunks_exact(row_bytes)).enumerate() {
        let blocks = row_bytes.chunks_exact(ggml_type.block_bytes() as usize);
        for (block_bytes, block_codes) in blocks.zip(codes.chunks_exact_mut(block_len)) {
            (codec.decode)(block_bytes, &mut block);
            block_codes.copy_from_slice(&block.codes[..block_len]);
            scales.extend(&block.scales[..block_groups]);
            if has_mins {
                mins.extend(&block.mins[..block_groups]);
            }
        }
        if !(scales.finite && mins.finite) {
            return Err(GgufError::NonFinite { row });
        }
        pack_row(&codes, codec.bits, row_words);
    }
    Ok(Quantized {
        rows,
        cols,
        bits: codec.bits,
        group_size: codec.group_size,
        packed: packed.into(),
        scales: Scales::Float(scales.finish()),
        offsets: if has_mins { Offsets::Min(mins.finish()) } else { Offsets::Symmetric },
        codebook: match codec.grid {
            Grid::Codebook(values) => Some(values.to_vec()),
            Grid::Symmetric | Grid::Min => None,
        },
        g_idx: None,
    })
}

/// Collects floats and stores them in the narrowest type that holds each of them exactly.
struct Narrowest {
    values: Vec<f32>,
    fits_f16: bool,
    fits_bf16: bool,
    finite: bool,
}

impl Narrowest {
    fn with_capacity(capacity: usize) -> Self {
        Self { values: Vec::with_capacity(capacity), fits_f16: true, fits_bf16: true, finite: true }
    }

    fn extend(&mut self, values: &[f32]) {
        for &v in values {
            self.finite &= v.is_finite();
            self.fits_f16 = self.fits_f16 && f16::from_f32(v).to_f32() == v;
            self.fits_bf16 = self.fits_bf16 && v.to_bits() & 0xffff == 0;
        }
        self.values.extend_from_slice(values);
    }

    fn finish(self) -> FloatBuffer {
        let dtype = match (self.fits_f16, self.fits_bf16) {
            (true, _) => DType::F16,
            (false, true) => DType::Bf16,
            (false, false) => DType::F32,
        };
        FloatBuffer::from_f32(self.values, dtype)
    }
}

/// The f16 at byte `at`, as f32.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// 4-bit codes of a group of `2 · bytes.len()`: the low halves are its first half, the high halves its second.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((l, h), b) in low.iter_mut().zip(high).zip(bytes) {
        *l = b & 15;
        *h = b >> 4;
    }
}
