//! ggml's first block types: 32 elements, one f16 scale, for the `_1` types an f16 minimum too.

use super::{Block, half_at, nibbles};

/// f16 scale, 16 bytes of codes; zero point 8.
pub(super) fn q4_0(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    nibbles(&bytes[2..18], &mut block.codes[..32]);
}

/// f16 scale, f16 minimum (added), 16 bytes of codes.
pub(super) fn q4_1(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    block.min = -half_at(bytes, 2);
    nibbles(&bytes[4..20], &mut block.codes[..32]);
}

/// f16 scale, 32 fifth bits, 16 bytes of low bits; zero point 16.
pub(super) fn q5_0(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    nibbles(&bytes[6..22], &mut block.codes[..32]);
    fifth_bits(&bytes[2..6], &mut block.codes[..32]);
}

/// f16 scale, f16 minimum (added), 32 fifth bits, 16 bytes of low bits.
pub(super) fn q5_1(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    block.min = -half_at(bytes, 2);
    nibbles(&bytes[8..24], &mut block.codes[..32]);
    fifth_bits(&bytes[4..8], &mut block.codes[..32]);
}

/// f16 scale, 32 signed bytes.
pub(super) fn q8_0(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    for (code, &byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
        // Two's complement plus 128 is a flip of the top bit.
        *code = byte ^ 0x80;
    }
}

/// Bit i of the word belongs to element i.
fn fifth_bits(word: &[u8], codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (word[i / 8] >> (i % 8) & 1) << 4;
    }
}
