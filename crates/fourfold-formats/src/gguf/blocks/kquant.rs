//! K-quants: super-blocks of 256 elements with an f16 scale (and minimum) over small integer scales (and minimums) of
//! groups of 16 or 32.

use super::{Block, half_at, nibbles};

/// 16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit codes, f16 scale, f16 minimum.
pub(super) fn q2_k(bytes: &[u8], block: &mut Block) {
    (block.scale, block.min) = (half_at(bytes, 80), half_at(bytes, 82));
    for (g, &b) in bytes[..16].iter().enumerate() {
        (block.scale_codes[g], block.min_codes[g]) = (b & 15, b >> 4);
    }
    two_bits(&bytes[16..80], &mut block.codes);
}

/// 32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales less 32, f16 scale; zero point 4.
pub(super) fn q3_k(bytes: &[u8], block: &mut Block) {
    two_bits(&bytes[32..96], &mut block.codes);
    for (i, code) in block.codes.iter_mut().enumerate() {
        *code |= (bytes[i % 32] >> (i / 32) & 1) << 2;
    }
    let (low, high) = (&bytes[96..104], &bytes[104..108]);
    block.scale = half_at(bytes, 108);
    for g in 0..16 {
        let low = low[g % 8] >> (4 * (g / 8)) & 15;
        let high = high[g % 4] >> (2 * (g / 4)) & 3;
        block.scale_codes[g] = (low | high << 4).wrapping_sub(32);
    }
}

/// f16 scale, f16 minimum, 12 bytes of 6-bit scales and minimums, 128 bytes of codes.
pub(super) fn q4_k(bytes: &[u8], block: &mut Block) {
    scales_and_mins(bytes, block);
    four_bits(&bytes[16..144], &mut block.codes);
}

/// As [`q4_k`], with 32 bytes of fifth bits before the codes: bit g of byte i is element i of group g.
pub(super) fn q5_k(bytes: &[u8], block: &mut Block) {
    scales_and_mins(bytes, block);
    four_bits(&bytes[48..176], &mut block.codes);
    let high = &bytes[16..48];
    for (i, code) in block.codes.iter_mut().enumerate() {
        *code |= (high[i % 32] >> (i / 32) & 1) << 4;
    }
}

/// 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, f16 scale; zero point 32.
pub(super) fn q6_k(bytes: &[u8], block: &mut Block) {
    let (low, high) = (&bytes[..128], &bytes[128..192]);
    for (h, codes) in block.codes.chunks_exact_mut(128).enumerate() {
        nibbles(&low[64 * h..64 * h + 64], codes);
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= (high[32 * h + i % 32] >> (2 * (i / 32)) & 3) << 4;
        }
    }
    block.scale = half_at(bytes, 208);
    block.scale_codes.copy_from_slice(&bytes[192..208]);
}

/// Each 32 bytes hold 128 codes: four groups of 32, one in each bit pair.
fn two_bits(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = bytes[i % 32] >> (2 * (i / 32)) & 3;
        }
    }
}

/// Each 32 bytes hold 64 codes: a group in the low nibbles, the next in the high ones.
fn four_bits(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        nibbles(bytes, codes);
    }
}

/// The eight 6-bit scales and minimums of [`q4_k`] and [`q5_k`]. The first four of each are the low six bits of bytes 0–3
/// and 4–7; the last four have their low nibbles in bytes 8–11 and their upper two bits atop bytes 0–3 and 4–7.
fn scales_and_mins(bytes: &[u8], block: &mut Block) {
    (block.scale, block.min) = (half_at(bytes, 0), half_at(bytes, 2));
    let packed = &bytes[4..16];
    for g in 0..4 {
        let (s, m, last) = (packed[g], packed[4 + g], packed[8 + g]);
        (block.scale_codes[g], block.min_codes[g]) = (s & 63, m & 63);
        block.scale_codes[4 + g] = last & 15 | s >> 6 << 4;
        block.min_codes[4 + g] = last >> 4 | m >> 6 << 4;
    }
}
