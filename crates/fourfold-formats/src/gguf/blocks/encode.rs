//! Blocks put together again: the inverse of decoding, without loss, for matrices on a block type's own grid.

use fourfold_tensor::{
    BlockType, Double, DoubleCodes, FloatBuffer, Offsets, Quantized, Scales, packed_words_per_row, unpack_row,
};
use half::f16;

/// The floats and small integers of one block.
struct Parts {
    scale: f16,
    /// The offset as the file has it: subtracted by K-quants, added by Q4_1 and Q5_1.
    min: f16,
    scale_codes: [u8; 16],
    min_codes: [u8; 16],
}

/// Appends rows `rows` of a matrix to `out`, as blocks of `kind`, which [`BlockType::of`] has found.
pub fn encode(kind: BlockType, weight: &Quantized, rows: std::ops::Range<usize>, out: &mut Vec<u8>) {
    let (blocks, groups) = (weight.cols / kind.block_len(), kind.groups());
    let words = packed_words_per_row(weight.cols, weight.bits);
    let mut codes = vec![0u8; weight.cols];
    out.reserve(rows.len() * blocks * kind.block_bytes());
    for r in rows {
        unpack_row(&weight.packed[r * words..(r + 1) * words], weight.bits, &mut codes);
        for (b, codes) in codes.chunks_exact(kind.block_len()).enumerate() {
            let mut parts = Parts { scale: f16::ZERO, min: f16::ZERO, scale_codes: [0; 16], min_codes: [0; 16] };
            let block = r * blocks + b;
            match &weight.scales {
                Scales::Float(scales) => parts.scale = half(scales, block),
                Scales::Double(double) => {
                    parts.scale = half(&double.floats, block);
                    small(double, block, groups, &mut parts.scale_codes);
                }
            }
            match &weight.offsets {
                Offsets::Min(mins) => parts.min = -half(mins, block),
                Offsets::Double(double) => {
                    parts.min = half(&double.floats, block);
                    small(double, block, groups, &mut parts.min_codes);
                }
                Offsets::Symmetric | Offsets::ZeroPoint(_) => {}
            }
            put(kind, &parts, codes, out);
        }
    }
}

fn half(floats: &FloatBuffer, i: usize) -> f16 {
    f16::from_f32(floats.get(i))
}

fn small(double: &Double, block: usize, groups: usize, codes: &mut [u8; 16]) {
    let from = block * groups;
    match &double.codes {
        DoubleCodes::Unsigned(all) => codes[..groups].copy_from_slice(&all[from..from + groups]),
        DoubleCodes::Signed(all) => {
            codes.iter_mut().zip(&all[from..from + groups]).for_each(|(code, &v)| *code = v as u8);
        }
    }
}

/// One block, laid out as its decoder reads it.
fn put(kind: BlockType, parts: &Parts, codes: &[u8], out: &mut Vec<u8>) {
    let float = |out: &mut Vec<u8>, v: f16| out.extend(v.to_le_bytes());
    match kind {
        BlockType::Q4_0 | BlockType::IQ4_NL => {
            float(out, parts.scale);
            nibbles(codes, out);
        }
        BlockType::Q4_1 => {
            float(out, parts.scale);
            float(out, parts.min);
            nibbles(codes, out);
        }
        BlockType::Q5_0 => {
            float(out, parts.scale);
            fifth_bits(codes, out);
            nibbles(codes, out);
        }
        BlockType::Q5_1 => {
            float(out, parts.scale);
            float(out, parts.min);
            fifth_bits(codes, out);
            nibbles(codes, out);
        }
        BlockType::Q8_0 => {
            float(out, parts.scale);
            out.extend(codes.iter().map(|code| code ^ 0x80));
        }
        BlockType::Q2_K => {
            out.extend((0..16).map(|g| parts.scale_codes[g] & 15 | parts.min_codes[g] << 4));
            two_bits(codes, out);
            float(out, parts.scale);
            float(out, parts.min);
        }
        BlockType::Q3_K => {
            third_bits(codes, out);
            two_bits(codes, out);
            let mut packed = [0u8; 12];
            for g in 0..16 {
                let code = parts.scale_codes[g].wrapping_add(32);
                packed[g % 8] |= (code & 15) << (4 * (g / 8));
                packed[8 + g % 4] |= (code >> 4 & 3) << (2 * (g / 4));
            }
            out.extend(packed);
            float(out, parts.scale);
        }
        BlockType::Q4_K | BlockType::Q5_K => {
            float(out, parts.scale);
            float(out, parts.min);
            let mut packed = [0u8; 12];
            for g in 0..4 {
                let ((s, m), (later_s, later_m)) =
                    ((parts.scale_codes[g], parts.min_codes[g]), (parts.scale_codes[4 + g], parts.min_codes[4 + g]));
                packed[g] = s & 63 | later_s >> 4 << 6;
                packed[4 + g] = m & 63 | later_m >> 4 << 6;
                packed[8 + g] = later_s & 15 | later_m << 4;
            }
            out.extend(packed);
            if kind == BlockType::Q5_K {
                out.extend((0..32).map(|i| (0..8).fold(0, |byte, g| byte | (codes[32 * g + i] >> 4 & 1) << g)));
            }
            codes.chunks_exact(64).for_each(|codes| nibbles(codes, out));
        }
        BlockType::Q6_K => {
            for half in codes.chunks_exact(128) {
                // Groups of 32: the first two are the low nibbles of 64 bytes, the other two the high ones.
                out.extend((0..64).map(|i| half[i] & 15 | half[64 + i] << 4));
            }
            for half in codes.chunks_exact(128) {
                out.extend((0..32).map(|i| (0..4).fold(0, |byte, g| byte | (half[32 * g + i] >> 4 & 3) << (2 * g))));
            }
            out.extend(parts.scale_codes);
            float(out, parts.scale);
        }
        BlockType::IQ4_XS => {
            float(out, parts.scale);
            let (mut high, mut low) = (0u16, [0u8; 4]);
            for g in 0..8 {
                let code = parts.scale_codes[g].wrapping_add(32);
                high |= u16::from(code >> 4 & 3) << (2 * g);
                low[g / 2] |= (code & 15) << (4 * (g % 2));
            }
            out.extend(high.to_le_bytes());
            out.extend(low);
            codes.chunks_exact(32).for_each(|codes| nibbles(codes, out));
        }
    }
}

/// The first half's low nibbles in the low halves of the bytes, the second half's in the high ones.
fn nibbles(codes: &[u8], out: &mut Vec<u8>) {
    let (low, high) = codes.split_at(codes.len() / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| l & 15 | h << 4));
}

/// Bit i of four bytes is the fifth bit of code i.
fn fifth_bits(codes: &[u8], out: &mut Vec<u8>) {
    let word = codes.iter().enumerate().fold(0u32, |word, (i, code)| word | u32::from(code >> 4 & 1) << i);
    out.extend(word.to_le_bytes());
}

/// Bit g of byte i is the third bit of code 32·g + i.
fn third_bits(codes: &[u8], out: &mut Vec<u8>) {
    out.extend((0..32).map(|i| (0..8).fold(0, |byte, g| byte | (codes[32 * g + i] >> 2 & 1) << g)));
}

/// 128 codes in 32 bytes: four groups of 32, one in each bit pair.
fn two_bits(codes: &[u8], out: &mut Vec<u8>) {
    for codes in codes.chunks_exact(128) {
        out.extend((0..32).map(|i| (0..4).fold(0, |byte, g| byte | (codes[32 * g + i] & 3) << (2 * g))));
    }
}
