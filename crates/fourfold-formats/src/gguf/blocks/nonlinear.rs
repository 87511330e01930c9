//! Block types whose codes index sixteen fixed values.

use super::{Block, half_at, nibbles};

/// The values of IQ4_NL and IQ4_XS.
pub(super) use fourfold_tensor::IQ4_VALUES;

/// The values of FP4 E2M1 (OCP Microscaling Formats 1.0, section 5.3.3), doubled so that all are integers.
pub(super) const FP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// f16 scale, 16 bytes of codes.
pub(super) fn iq4_nl(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    nibbles(&bytes[2..18], &mut block.codes[..32]);
}

/// f16 scale; upper bit pairs, then low nibbles of eight scales less 32; 128 bytes of codes.
pub(super) fn iq4_xs(bytes: &[u8], block: &mut Block) {
    block.scale = half_at(bytes, 0);
    let high = u16::from_le_bytes([bytes[2], bytes[3]]);
    let low = &bytes[4..8];
    for g in 0..8 {
        let low = low[g / 2] >> (4 * (g % 2)) & 15;
        let high = (high >> (2 * g) & 3) as u8;
        block.scale_codes[g] = (low | high << 4).wrapping_sub(32);
    }
    for (bytes, codes) in bytes[8..136].chunks_exact(16).zip(block.codes.chunks_exact_mut(32)) {
        nibbles(bytes, codes);
    }
}

/// A shared exponent (E8M0, bias 127), 16 bytes of codes. The values being doubled, the scale is half of 2^(exponent − 127).
/// Exponent 255, "not a number" in the standard, is a power of two here as it is to ggml.
pub(super) fn mxfp4(bytes: &[u8], block: &mut Block) {
    let exponent = u32::from(bytes[0]);
    // 2^−128 and 2^−127 are subnormal: their one bit lies in the mantissa.
    block.scale = f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 });
    nibbles(&bytes[1..17], &mut block.codes[..32]);
}
