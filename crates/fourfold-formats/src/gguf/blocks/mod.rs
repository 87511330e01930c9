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
//! The K-quants and IQ4_XS hold a group's scale as the block's f16 times a small integer, and stay so ([`Double`]): the product
//! has up to 19 significant bits, exact in f32 where a kernel forms it, and a byte a group is all it takes in memory.

mod encode;
mod kquant;
mod legacy;
mod nonlinear;

pub use encode::encode;
use fourfold_tensor::{
    DType, Dense, Double, DoubleCodes, FloatBuffer, Offsets, Quantized, Scales, Weight, pack_row, packed_words_per_row,
};
use half::{bf16, f16};

use super::{GgmlType, GgufError};

/// Most elements of a block.
const MAX_BLOCK: usize = 256;
/// Most groups of a block.
const MAX_GROUPS: usize = 16;

/// One block taken apart. A codec fills as many entries as its block has.
struct Block {
    codes: [u8; MAX_BLOCK],
    /// The block's, or that of its one group.
    scale: f32,
    min: f32,
    /// What each group multiplies them with, where the block has groups; signed ones in two's complement.
    scale_codes: [u8; MAX_GROUPS],
    min_codes: [u8; MAX_GROUPS],
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
    groups: Groups,
    decode: fn(&[u8], &mut Block),
}

/// What is stored of a group's scale and minimum.
#[derive(Clone, Copy, PartialEq)]
enum Groups {
    /// A block is a group: floats.
    Floats,
    /// Unsigned bytes beside the block's floats.
    Unsigned,
    /// Signed bytes beside the block's floats.
    Signed,
}

fn codec(ggml_type: GgmlType) -> Option<Codec> {
    let (bits, group_size, grid, groups, decode): (_, _, _, _, fn(&[u8], &mut Block)) = match ggml_type {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => return None,
        GgmlType::Q4_0 => (4, 32, Grid::Symmetric, Groups::Floats, legacy::q4_0),
        GgmlType::Q4_1 => (4, 32, Grid::Min, Groups::Floats, legacy::q4_1),
        GgmlType::Q5_0 => (5, 32, Grid::Symmetric, Groups::Floats, legacy::q5_0),
        GgmlType::Q5_1 => (5, 32, Grid::Min, Groups::Floats, legacy::q5_1),
        GgmlType::Q8_0 => (8, 32, Grid::Symmetric, Groups::Floats, legacy::q8_0),
        GgmlType::Q2_K => (2, 16, Grid::Min, Groups::Unsigned, kquant::q2_k),
        GgmlType::Q3_K => (3, 16, Grid::Symmetric, Groups::Signed, kquant::q3_k),
        GgmlType::Q4_K => (4, 32, Grid::Min, Groups::Unsigned, kquant::q4_k),
        GgmlType::Q5_K => (5, 32, Grid::Min, Groups::Unsigned, kquant::q5_k),
        GgmlType::Q6_K => (6, 16, Grid::Symmetric, Groups::Signed, kquant::q6_k),
        GgmlType::IQ4_NL => (4, 32, Grid::Codebook(&nonlinear::IQ4_VALUES), Groups::Floats, nonlinear::iq4_nl),
        GgmlType::IQ4_XS => (4, 32, Grid::Codebook(&nonlinear::IQ4_VALUES), Groups::Signed, nonlinear::iq4_xs),
        GgmlType::MXFP4 => (4, 32, Grid::Codebook(&nonlinear::FP4_VALUES), Groups::Floats, nonlinear::mxfp4),
    };
    Some(Codec { bits, group_size, grid, groups, decode })
}

/// Decodes the bytes of a whole tensor: see [`Decoder`].
///
/// # Errors
/// A scale that is not finite.
pub fn decode(ggml_type: GgmlType, shape: &[usize], bytes: &[u8]) -> Result<Weight, GgufError> {
    let mut decoder = Decoder::new(ggml_type, shape);
    decoder.push(bytes)?;
    Ok(decoder.finish())
}

/// Decodes a tensor some rows at a time, so that its bytes need never be in memory beside what they become. Vectors become
/// dense whatever their type; matrices of a block type become [`Weight::Quantized`].
pub struct Decoder {
    shape: Vec<usize>,
    state: State,
}

enum State {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Blocks(Box<Rows>),
}

impl Decoder {
    /// A decoder for a tensor of logical `shape`, outermost first, of whole blocks: the header's parser has checked it.
    pub fn new(ggml_type: GgmlType, shape: &[usize]) -> Self {
        let elements = shape.iter().product::<usize>();
        let state = match (codec(ggml_type), ggml_type) {
            (Some(codec), _) => {
                State::Blocks(Box::new(Rows::new(ggml_type, codec, elements, shape.last().copied().unwrap_or(1))))
            }
            (None, GgmlType::F16) => State::F16(Vec::with_capacity(elements)),
            (None, GgmlType::BF16) => State::Bf16(Vec::with_capacity(elements)),
            (None, _) => State::F32(Vec::with_capacity(elements)),
        };
        Self { shape: shape.to_vec(), state }
    }

    /// The next rows, whole.
    ///
    /// # Errors
    /// A scale that is not finite.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match &mut self.state {
            State::F32(out) => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            State::F16(out) => out.extend(halves().map(f16::from_bits)),
            State::Bf16(out) => out.extend(halves().map(bf16::from_bits)),
            State::Blocks(rows) => rows.push(bytes)?,
        }
        Ok(())
    }

    /// The tensor, once all its rows have been pushed.
    pub fn finish(self) -> Weight {
        let dense = |shape, data| Dense::new(shape, data).into();
        match self.state {
            State::F32(values) => dense(self.shape, FloatBuffer::F32(values.into())),
            State::F16(values) => dense(self.shape, FloatBuffer::F16(values.into())),
            State::Bf16(values) => dense(self.shape, FloatBuffer::Bf16(values.into())),
            State::Blocks(rows) => {
                let matrix = Weight::Quantized(rows.finish());
                if self.shape.len() == 2 {
                    return matrix;
                }
                dense(self.shape, FloatBuffer::F32(matrix.to_f32().into()))
            }
        }
    }
}

/// Rows of blocks being taken apart.
struct Rows {
    ggml_type: GgmlType,
    codec: Codec,
    rows: usize,
    cols: usize,
    packed: Vec<u32>,
    scales: Narrowest,
    scale_codes: Vec<u8>,
    mins: Narrowest,
    min_codes: Vec<u8>,
    codes: Vec<u8>,
    done: usize,
}

impl Rows {
    fn new(ggml_type: GgmlType, codec: Codec, elements: usize, cols: usize) -> Self {
        let rows = elements / cols;
        let blocks = elements / ggml_type.block_len() as usize;
        let codes = if codec.groups == Groups::Floats { 0 } else { elements / codec.group_size };
        let has_mins = usize::from(matches!(codec.grid, Grid::Min));
        Self {
            ggml_type,
            rows,
            cols,
            packed: vec![0; rows * packed_words_per_row(cols, codec.bits)],
            scales: Narrowest::with_capacity(blocks),
            scale_codes: Vec::with_capacity(codes),
            mins: Narrowest::with_capacity(blocks * has_mins),
            min_codes: Vec::with_capacity(codes * has_mins),
            codes: vec![0; cols],
            codec,
            done: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let (block_len, block_bytes) = (self.ggml_type.block_len() as usize, self.ggml_type.block_bytes() as usize);
        let codes = if self.codec.groups == Groups::Floats { 0 } else { block_len / self.codec.group_size };
        let has_mins = matches!(self.codec.grid, Grid::Min);
        let words = packed_words_per_row(self.cols, self.codec.bits);
        let mut block = Block {
            codes: [0; MAX_BLOCK],
            scale: 0.0,
            min: 0.0,
            scale_codes: [0; MAX_GROUPS],
            min_codes: [0; MAX_GROUPS],
        };
        for row_bytes in bytes.chunks_exact(self.cols / block_len * block_bytes) {
            let blocks = row_bytes.chunks_exact(block_bytes);
            for (block_bytes, block_codes) in blocks.zip(self.codes.chunks_exact_mut(block_len)) {
                (self.codec.decode)(block_bytes, &mut block);
                block_codes.copy_from_slice(&block.codes[..block_len]);
                self.scales.push(block.scale);
                self.scale_codes.extend_from_slice(&block.scale_codes[..codes]);
                if has_mins {
                    self.mins.push(block.min);
                    self.min_codes.extend_from_slice(&block.min_codes[..codes]);
                }
            }
            if !(self.scales.finite && self.mins.finite) {
                return Err(GgufError::NonFinite { row: self.done });
            }
            pack_row(&self.codes, self.codec.bits, &mut self.packed[self.done * words..][..words]);
            self.done += 1;
        }
        Ok(())
    }

    fn finish(self) -> Quantized {
        let span = self.ggml_type.block_len() as usize / self.codec.group_size;
        let double = |floats: Narrowest, codes: Vec<u8>| {
            let codes = match self.codec.groups {
                Groups::Floats => return Err(floats.finish()),
                Groups::Unsigned => DoubleCodes::Unsigned(codes.into()),
                Groups::Signed => DoubleCodes::Signed(bytemuck::cast_vec::<u8, i8>(codes).into()),
            };
            Ok(Double { floats: floats.finish(), codes, span })
        };
        Quantized {
            rows: self.rows,
            cols: self.cols,
            bits: self.codec.bits,
            group_size: self.codec.group_size,
            packed: self.packed.into(),
            scales: double(self.scales, self.scale_codes).map_or_else(Scales::Float, Scales::Double),
            offsets: match self.codec.grid {
                Grid::Min => double(self.mins, self.min_codes).map_or_else(Offsets::Min, Offsets::Double),
                Grid::Symmetric | Grid::Codebook(_) => Offsets::Symmetric,
            },
            codebook: match self.codec.grid {
                Grid::Codebook(values) => Some(values.to_vec()),
                Grid::Symmetric | Grid::Min => None,
            },
            g_idx: None,
        }
    }
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

    fn push(&mut self, v: f32) {
        self.finite &= v.is_finite();
        self.fits_f16 = self.fits_f16 && f16::from_f32(v).to_f32() == v;
        self.fits_bf16 = self.fits_bf16 && v.to_bits() & 0xffff == 0;
        self.values.push(v);
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
