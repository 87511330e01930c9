//! A linear layer's input rounded to int8: for each token and block of 32 columns, 32 signed bytes and an f32 scale
//! (absmax / 127, as GGUF's `Q8_0` has it), and the sum of the bytes, which turns offsets of the weights into one term.
//!
//! Tokens are taken in tiles of 16, 4 or 1; a tile's blocks follow each other, each with all its tokens, so that a kernel
//! addresses everything at constant distances. A token with a NaN or an infinity in a block gets a NaN scale there, and so
//! NaN in every output.

use super::super::pool::{Pool, SendPtr};
use super::layout::{BLOCK, Columns, Grouping, Line, QUAD};
use crate::Tensor;

/// One block of a tile of `T` tokens.
#[repr(C)]
pub(super) struct ActBlock<const T: usize> {
    /// The rounded values.
    pub bytes: [[i8; BLOCK]; T],
    /// What a unit of them stands for.
    pub scale: [f32; T],
    /// Minus their sum.
    pub sum: [i32; T],
    /// `scale · sum`.
    pub scaled_sum: [f32; T],
}

/// Bytes of a block for one token.
const BLOCK_BYTES: usize = size_of::<ActBlock<1>>();

/// Tokens that a kernel takes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// First token.
    pub first: usize,
    /// Tokens; at most `width`.
    pub tokens: usize,
    /// 16, 4 or 1: the tile's room.
    pub width: usize,
    /// Room of the tiles before.
    pub before: usize,
}

/// The prepared input of weights that share a stream order.
pub(super) struct Rounded {
    /// The tiles.
    pub tiles: Vec<Tile>,
    blocks: usize,
    pieces: usize,
    data: Vec<Line>,
    /// For each tile, piece and token, minus the sum of the bytes; empty where pieces are blocks.
    piece_sums: Vec<i32>,
}

/// Splits `tokens` into tiles of at most `widest`.
pub(super) fn tiles(tokens: usize, widest: usize) -> Vec<Tile> {
    let (mut tiles, mut first, mut before) = (Vec::new(), 0, 0);
    while first < tokens {
        let left = tokens - first;
        let width = match left {
            1 => 1,
            2..=8 => 4,
            _ => widest,
        };
        let tokens = left.min(width);
        tiles.push(Tile { first, tokens, width, before });
        first += tokens;
        before += width;
    }
    tiles
}

impl Rounded {
    /// Rounds `x` `[tokens, cols]` for weights of `columns`, in tiles of at most `widest` tokens.
    pub fn new(pool: &Pool, x: &Tensor, columns: &Columns, widest: usize) -> Self {
        let tiles = tiles(x.rows(), widest);
        let room = tiles.last().map_or(0, |t| t.before + t.width);
        let blocks = columns.blocks;
        let pieces = match &columns.grouping {
            Grouping::Uniform(_) => 0,
            Grouping::Pieces { pieces, .. } => pieces.len(),
        };
        let mut data = vec![Line([0; 64]); (room * blocks * BLOCK_BYTES).div_ceil(size_of::<Line>())];
        let mut piece_sums = vec![0; room * pieces];
        let (to, sums) = (SendPtr::new(&mut data), SendPtr::new(&mut piece_sums));
        // A tile of a small model's input takes some microseconds: less than waking others for one or two.
        pool.for_ranges(tiles.len(), 4, |range| {
            let mut stream = vec![0.0; blocks * BLOCK];
            for tile in &tiles[range] {
                for token in 0..tile.tokens {
                    columns.gather(x.row(tile.first + token), &mut stream);
                    // SAFETY: the buffers have room for all tiles, and a tile's part is written by one thread.
                    unsafe {
                        let to = to.get().cast::<u8>().add(tile.before * blocks * BLOCK_BYTES);
                        round_row(&stream, to, tile.width, token);
                        let sums = sums.get().add(tile.before * pieces);
                        sum_pieces(columns, to, tile.width, token, sums);
                    }
                }
            }
        });
        Self { tiles, blocks, pieces, data, piece_sums }
    }

    /// The blocks of a tile, as the kernels of its width want them.
    pub fn blocks(&self, tile: Tile) -> *const u8 {
        // SAFETY: the buffer has room for all tiles.
        unsafe { self.data.as_ptr().cast::<u8>().add(tile.before * self.blocks * BLOCK_BYTES) }
    }

    /// The piece sums of a tile.
    pub fn piece_sums(&self, tile: Tile) -> *const i32 {
        // SAFETY: the buffer has room for all tiles.
        unsafe { self.piece_sums.as_ptr().add(tile.before * self.pieces) }
    }

    /// Bytes of a token.
    pub fn bytes_of_token(&self) -> usize {
        self.blocks * BLOCK_BYTES
    }
}

/// Rounds one token's stream to its place in a tile.
///
/// # Safety
/// `to` has room for the tile's blocks.
unsafe fn round_row(stream: &[f32], to: *mut u8, width: usize, token: usize) {
    for (b, values) in stream.as_chunks::<BLOCK>().0.iter().enumerate() {
        let (bytes, scale, sum) = round_block(values);
        // SAFETY: within the block `b` of the tile, laid out as `ActBlock<width>`, whose fields are aligned to 4 bytes.
        unsafe {
            let block = to.add(b * width * BLOCK_BYTES);
            block.add(token * BLOCK).cast::<[i8; BLOCK]>().write(bytes);
            let scales = block.add(width * BLOCK).cast::<f32>();
            scales.add(token).write(scale);
            scales.cast::<i32>().add(width + token).write(-sum);
            scales.add(2 * width + token).write(-scale * sum as f32);
        }
    }
}

/// Bytes, scale, and sum of the bytes. Written so that the compiler vectorises it: magnitudes are compared as integers, which
/// order as floats do and put infinities and NaN on top; adding 1.5 · 2^23 rounds to the nearest integer.
fn round_block(values: &[f32; BLOCK]) -> ([i8; BLOCK], f32, i32) {
    const INFINITY: u32 = 0x7f80_0000;
    const MAGIC: f32 = 12_582_912.0;
    let magnitude = values.iter().fold(0, |most, v| most.max(v.to_bits() & 0x7fff_ffff));
    if magnitude >= INFINITY {
        return ([0; BLOCK], f32::NAN, 0);
    }
    let scale = f32::from_bits(magnitude) / 127.0;
    // Below this the inverse would not be a number; such activations count as zero.
    if scale < f32::MIN_POSITIVE {
        return ([0; BLOCK], 0.0, 0);
    }
    let inverse = 1.0 / scale;
    let (mut bytes, mut sum) = ([0; BLOCK], 0);
    for (byte, v) in bytes.iter_mut().zip(values) {
        let rounded = (v * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        *byte = rounded as i8;
        sum += rounded;
    }
    (bytes, scale, sum)
}

/// Minus the sums of one token's bytes over each piece.
///
/// # Safety
/// `from` is the tile that [`round_row`] wrote, `sums` has room for its pieces.
unsafe fn sum_pieces(columns: &Columns, from: *const u8, width: usize, token: usize, sums: *mut i32) {
    let Grouping::Pieces { pieces, first, .. } = &columns.grouping else { return };
    for b in 0..columns.blocks {
        let of_block = first[b] as usize..first[b + 1] as usize;
        for (p, piece) in of_block.clone().zip(&pieces[of_block]) {
            // SAFETY: within block `b` of the tile.
            unsafe {
                let bytes = &*from.add(b * width * BLOCK_BYTES + token * BLOCK).cast::<[i8; BLOCK]>();
                let quads = usize::from(piece.start) * QUAD..usize::from(piece.end) * QUAD;
                let sum: i32 = bytes[quads].iter().map(|&v| i32::from(v)).sum();
                sums.add(p * width + token).write(-sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_tokens() {
        for widest in [4, 16] {
            for tokens in 0..70 {
                let tiles = tiles(tokens, widest);
                let (mut next, mut room) = (0, 0);
                for t in &tiles {
                    assert_eq!((t.first, t.before), (next, room));
                    assert!(t.tokens >= 1 && t.tokens <= t.width && t.width <= widest);
                    next += t.tokens;
                    room += t.width;
                }
                assert_eq!(next, tokens);
            }
        }
    }

    #[test]
    fn rounding_is_within_half_a_unit_and_marks_what_is_not_finite() {
        let values: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 * 1.7).sin() * 3.0);
        for factor in [1.0, 1e-30, 1e38] {
            let values = values.map(|v| v * factor);
            let (bytes, scale, sum) = round_block(&values);
            assert_eq!(sum, bytes.iter().map(|&b| i32::from(b)).sum::<i32>());
            assert!(bytes.iter().any(|b| b.abs() == 127));
            for (v, b) in values.iter().zip(bytes) {
                assert!((v - f32::from(b) * scale).abs() <= scale * 0.5001, "{v} {b} {scale}");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = values;
            values[7] = bad;
            assert!(round_block(&values).1.is_nan());
        }
        assert_eq!(round_block(&[1e-44; BLOCK]), ([0; BLOCK], 0.0, 0));
        assert_eq!(round_block(&[0.0; BLOCK]), ([0; BLOCK], 0.0, 0));
    }
}
