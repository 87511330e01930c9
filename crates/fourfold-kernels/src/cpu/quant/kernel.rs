//! The integer kernel: sixteen rows of codes times a tile of rounded tokens.
//!
//! For each block of 32 columns the codes are unpacked once, into eight vectors, and multiplied with every token of the tile:
//! eight `vpdpbusd` a token, then one conversion, one product with the token's scale and one fused product with the weights'
//! scales. With one token the kernel needs some 30 instructions for 256 bytes of 4-bit codes and waits for memory; with
//! sixteen, eleven instructions a token do 1024 operations, and the integer products are what bounds it.

// Several arrays share each index here.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::QuantWeight;
use super::activations::ActBlock;
use super::factors::{OffsetKind, Spot};
use super::layout::{BLOCK, Columns, Grouping, Line, QUAD, QUADS, STRIP};
use super::simd::Simd;
use super::transposed;
use crate::cpu::Isa;

/// A kernel: multiplies a strip with a tile. Arguments: weight, strip, the tile's blocks, its piece sums, and the result,
/// `[width][16]`.
pub(super) type TileKernel = unsafe fn(&QuantWeight, usize, *const u8, *const i32, *mut [f32; STRIP]);

/// Writes 16 rows x some columns of weights as f32: weight, strip, first block, blocks, and the result
/// `[blocks · 32][16]` in stream order.
pub(super) type PanelKernel = unsafe fn(&QuantWeight, usize, usize, usize, *mut [f32; STRIP]);

/// The transposed product of one token with a block's columns: weight, strips, block, the token's input for the first strip,
/// the distance to that for the next, and the result in stream order.
pub(super) type BlockKernel =
    unsafe fn(&QuantWeight, Range<usize>, usize, *const [f32; STRIP], usize, &mut [f32; BLOCK]);

/// Unpacks a block's codes: vector q is quad q.
///
/// # Safety
/// `lines` are the `BITS` vectors of a block; the instruction set is available.
#[inline(always)]
unsafe fn unpack<S: Simd, const BITS: u32>(lines: *const Line) -> [S::Int; QUADS] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut codes = [S::splat_int(0); QUADS];
        let (mut first, mut low) = (0, 0);
        // The order of `layout::places`. Every condition is a constant for a given BITS.
        if BITS & 8 != 0 {
            (first, low) = plane::<S, 8>(lines, first, low, &mut codes);
        }
        if BITS & 4 != 0 {
            (first, low) = plane::<S, 4>(lines, first, low, &mut codes);
        }
        if BITS & 2 != 0 {
            (first, low) = plane::<S, 2>(lines, first, low, &mut codes);
        }
        if BITS & 1 != 0 {
            plane::<S, 1>(lines, first, low, &mut codes);
        }
        codes
    }
}

/// Adds the plane of `WIDTH` bits that begins at vector `first` to the codes, from their bit `low` on. Returns where the next
/// plane begins.
#[inline(always)]
unsafe fn plane<S: Simd, const WIDTH: u32>(
    lines: *const Line,
    first: usize,
    low: u32,
    codes: &mut [S::Int; QUADS],
) -> (usize, u32) {
    // SAFETY: promised by the caller.
    unsafe {
        let mask = S::splat_int((((1u32 << WIDTH) - 1) << low).wrapping_mul(0x0101_0101) as i32);
        for l in 0..WIDTH as usize {
            let packed = S::load_int(lines.add(first + l).cast());
            for part in 0..8 / WIDTH {
                let quad = part as usize * WIDTH as usize + l;
                let shift = part * WIDTH;
                // Bits of a neighbouring byte that a shift brings in fall to the mask.
                let moved = if shift >= low { S::shr(packed, shift - low) } else { S::shl(packed, low - shift) };
                let bits = if WIDTH == 8 { moved } else { S::and(moved, mask) };
                codes[quad] = if low == 0 { bits } else { S::or(codes[quad], bits) };
            }
        }
        (first + WIDTH as usize, low + WIDTH)
    }
}

/// Unpacks a block and, where there is a codebook, looks its values up.
#[inline(always)]
pub(super) unsafe fn operands<S: Simd, const BITS: u32, const TABLE: bool>(
    w: &QuantWeight,
    lines: *const Line,
) -> [S::Int; QUADS] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut codes = unpack::<S, BITS>(lines);
        if TABLE {
            let table = S::load_table(&w.table);
            for code in &mut codes {
                *code = S::lookup(table, *code);
            }
        }
        codes
    }
}

/// `FORM` of a kernel for groups of whole blocks and offsets that are a shift: symmetric grids and codebooks.
const SHIFT: u8 = 0;
/// `FORM` of a kernel for groups of whole blocks and any offsets.
const ANY: u8 = 1;
/// `FORM` of a kernel for groups of pieces and any offsets.
const PIECES: u8 = 2;

/// The `FORM` of a weight's kernel.
fn form(w: &QuantWeight) -> u8 {
    match (&w.columns.grouping, w.offsets.kind()) {
        (Grouping::Pieces { .. }, _) => PIECES,
        (Grouping::Uniform(_), OffsetKind::Shift(_)) => SHIFT,
        (Grouping::Uniform(_), OffsetKind::Zero | OffsetKind::Min) => ANY,
    }
}

/// The kind of offsets, as far as `FORM` says it a constant.
#[inline(always)]
fn kind_of<const FORM: u8>(w: &QuantWeight) -> OffsetKind {
    match w.offsets.kind() {
        OffsetKind::Shift(shift) => OffsetKind::Shift(shift),
        // Not reached, but the compiler shall know no other kind.
        OffsetKind::Zero | OffsetKind::Min if FORM == SHIFT => OffsetKind::Shift(0),
        kind @ (OffsetKind::Zero | OffsetKind::Min) => kind,
    }
}

/// See [`TileKernel`].
#[inline(always)]
unsafe fn tile<S: Simd, const BITS: u32, const TABLE: bool, const FORM: u8, const T: usize>(
    w: &QuantWeight,
    strip: usize,
    blocks: *const u8,
    piece_sums: *const i32,
    out: *mut [f32; STRIP],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let blocks = blocks.cast::<ActBlock<T>>();
        let columns = &w.columns;
        let mut lines = w.codes.as_ptr().add(strip * columns.blocks * BITS as usize);
        let kind = kind_of::<FORM>(w);
        let mut total = [S::splat(0.0); T];
        match &columns.grouping {
            Grouping::Uniform(blocks_of_group) if FORM != PIECES => {
                let mut block = 0;
                for group in 0..columns.groups {
                    let spot = Spot::new(strip, group, columns.groups);
                    let scale = w.scales.load::<S>(spot);
                    let offset = w.offsets.load::<S>(spot);
                    let end = (block + blocks_of_group).min(columns.blocks);
                    while block < end {
                        let codes = operands::<S, BITS, TABLE>(w, lines);
                        lines = lines.add(BITS as usize);
                        let act = &*blocks.add(block);
                        // Tokens by fours: four chains of products hide the latency of each.
                        for fours in (0..T).step_by(4) {
                            let mut acc = [S::splat_int(0); 4];
                            for i in 0..T.min(4) {
                                acc[i] = start::<S>(kind, act.sum[fours + i]);
                            }
                            for q in 0..QUADS {
                                for i in 0..T.min(4) {
                                    acc[i] = multiply::<S, BITS, TABLE>(acc[i], codes[q], &act.bytes[fours + i], q);
                                }
                            }
                            for i in 0..T.min(4) {
                                let t = fours + i;
                                let (sum, scaled_sum) = (act.sum[t], act.scaled_sum[t]);
                                total[t] =
                                    finish::<S>(acc[i], kind, sum, act.scale[t], scaled_sum, scale, offset, total[t]);
                            }
                        }
                        block += 1;
                    }
                }
            }
            Grouping::Pieces { pieces, first, .. } if FORM == PIECES => {
                for block in 0..columns.blocks {
                    let codes = operands::<S, BITS, TABLE>(w, lines);
                    lines = lines.add(BITS as usize);
                    let act = &*blocks.add(block);
                    for p in first[block] as usize..first[block + 1] as usize {
                        let piece = pieces[p];
                        let spot = Spot::new(strip, piece.group as usize, columns.groups);
                        let scale = w.scales.load::<S>(spot);
                        let offset = w.offsets.load::<S>(spot);
                        for t in 0..T {
                            let sum = *piece_sums.add(p * T + t);
                            let mut acc = start::<S>(kind, sum);
                            for q in usize::from(piece.start)..usize::from(piece.end) {
                                acc = multiply::<S, BITS, TABLE>(acc, codes[q], &act.bytes[t], q);
                            }
                            let scaled_sum = act.scale[t] * sum as f32;
                            total[t] = finish::<S>(acc, kind, sum, act.scale[t], scaled_sum, scale, offset, total[t]);
                        }
                    }
                }
            }
            // The dispatch below gives each weight the kernel of its grouping.
            Grouping::Uniform(_) | Grouping::Pieces { .. } => unreachable!(),
        }
        for (t, total) in total.into_iter().enumerate() {
            S::store(out.add(t).cast(), total);
        }
    }
}

/// The integer sum's start: minus zero point times sum of the activations, where the zero point is a power of two.
#[inline(always)]
unsafe fn start<S: Simd>(kind: OffsetKind, negative_sum: i32) -> S::Int {
    // SAFETY: promised by the caller.
    unsafe {
        match kind {
            OffsetKind::Shift(shift) => S::splat_int(negative_sum << shift),
            OffsetKind::Zero | OffsetKind::Min => S::splat_int(0),
        }
    }
}

/// Adds quad `q`'s products.
#[inline(always)]
unsafe fn multiply<S: Simd, const BITS: u32, const TABLE: bool>(
    acc: S::Int,
    codes: S::Int,
    activations: &[i8; BLOCK],
    q: usize,
) -> S::Int {
    // SAFETY: promised by the caller; `q` is below 8.
    unsafe {
        let four = activations.as_ptr().add(q * QUAD).cast::<i32>().read_unaligned();
        if BITS == 8 || TABLE { S::dot::<true>(acc, codes, four) } else { S::dot::<false>(acc, codes, four) }
    }
}

/// Scales an integer sum and adds it to `total`. All integers are below 2^24: exact in f32.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn finish<S: Simd>(
    acc: S::Int,
    kind: OffsetKind,
    negative_sum: i32,
    act_scale: f32,
    act_scaled_sum: f32,
    scale: S::Float,
    offset: S::Float,
    total: S::Float,
) -> S::Float {
    // SAFETY: promised by the caller.
    unsafe {
        let sum = S::to_float(acc);
        match kind {
            OffsetKind::Shift(_) => S::fma(S::mul(sum, S::splat(act_scale)), scale, total),
            OffsetKind::Zero => {
                let sum = S::fma(offset, S::splat(negative_sum as f32), sum);
                S::fma(S::mul(sum, S::splat(act_scale)), scale, total)
            }
            OffsetKind::Min => {
                let total = S::fma(offset, S::splat(act_scaled_sum), total);
                S::fma(S::mul(sum, S::splat(act_scale)), scale, total)
            }
        }
    }
}

/// See [`PanelKernel`]. Rounds as [`fourfold_tensor::Quantized::dequantize_row`] does.
#[inline(always)]
unsafe fn panel<S: Simd, const BITS: u32, const TABLE: bool>(
    w: &QuantWeight,
    strip: usize,
    first: usize,
    blocks: usize,
    out: *mut [f32; STRIP],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let columns = &w.columns;
        let is_min = w.offsets.kind() == OffsetKind::Min;
        for block in first..first + blocks {
            let lines = w.codes.as_ptr().add((strip * columns.blocks + block) * BITS as usize);
            let codes = operands::<S, BITS, TABLE>(w, lines);
            for (q, codes) in codes.into_iter().enumerate() {
                let spot = Spot::new(strip, columns.quad_group(block, q), columns.groups);
                let (scale, offset) = (w.scales.load::<S>(spot), w.offsets.load::<S>(spot));
                for i in 0..QUAD {
                    let code = S::byte_to_float(codes, i as u32);
                    let value =
                        if is_min { S::sub(S::mul(scale, code), offset) } else { S::mul(scale, S::sub(code, offset)) };
                    S::store(out.add((block - first) * BLOCK + q * QUAD + i).cast(), value);
                }
            }
        }
    }
}

/// Compiles the kernels for an instruction set, and picks one. `$widest` is its widest tile; `$shift` is `SHIFT` where kernels
/// of that form of their own are worth the time to compile them, else `ANY`.
macro_rules! kernels_of {
    ($module:ident, $simd:ty, $widest:literal, $shift:ident $(, $features:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            unsafe fn tile<const BITS: u32, const TABLE: bool, const FORM: u8, const T: usize>(
                w: &QuantWeight,
                strip: usize,
                blocks: *const u8,
                piece_sums: *const i32,
                out: *mut [f32; STRIP],
            ) {
                // SAFETY: `TileKernel`'s promises are the caller's.
                unsafe { super::tile::<$simd, BITS, TABLE, FORM, T>(w, strip, blocks, piece_sums, out) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn panel<const BITS: u32, const TABLE: bool>(
                w: &QuantWeight,
                strip: usize,
                first: usize,
                blocks: usize,
                out: *mut [f32; STRIP],
            ) {
                // SAFETY: `PanelKernel`'s promises are the caller's.
                unsafe { super::panel::<$simd, BITS, TABLE>(w, strip, first, blocks, out) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn block<const BITS: u32, const TABLE: bool>(
                w: &QuantWeight,
                strips: Range<usize>,
                block: usize,
                x: *const [f32; STRIP],
                stride: usize,
                out: &mut [f32; BLOCK],
            ) {
                // SAFETY: `BlockKernel`'s promises are the caller's.
                unsafe { transposed::block::<$simd, BITS, TABLE>(w, strips, block, x, stride, out) }
            }

            fn of_width<const BITS: u32, const TABLE: bool, const FORM: u8>(width: usize) -> TileKernel {
                match width {
                    1 => tile::<BITS, TABLE, FORM, 1>,
                    4 => tile::<BITS, TABLE, FORM, 4>,
                    _ => tile::<BITS, TABLE, FORM, $widest>,
                }
            }

            fn of_form<const BITS: u32, const TABLE: bool>(form: u8, width: usize) -> TileKernel {
                match (form, width) {
                    (SHIFT, _) => of_width::<BITS, TABLE, { $shift }>(width),
                    (ANY, _) => of_width::<BITS, TABLE, ANY>(width),
                    (_, 1) => tile::<BITS, TABLE, PIECES, 1>,
                    (_, _) => tile::<BITS, TABLE, PIECES, 4>,
                }
            }

            pub fn tile_kernel(bits: u32, table: bool, form: u8, width: usize) -> TileKernel {
                match (bits, table) {
                    (2, true) => of_form::<2, true>(form, width),
                    (3, true) => of_form::<3, true>(form, width),
                    (4, true) => of_form::<4, true>(form, width),
                    (2, _) => of_form::<2, false>(form, width),
                    (3, _) => of_form::<3, false>(form, width),
                    (4, _) => of_form::<4, false>(form, width),
                    (5, _) => of_form::<5, false>(form, width),
                    (6, _) => of_form::<6, false>(form, width),
                    (7, _) => of_form::<7, false>(form, width),
                    // `Quantized::validate` admits 2 to 8.
                    (_, _) => of_form::<8, false>(form, width),
                }
            }

            pub fn panel_kernel(bits: u32, table: bool) -> PanelKernel {
                match (bits, table) {
                    (2, false) => panel::<2, false>,
                    (3, false) => panel::<3, false>,
                    (4, false) => panel::<4, false>,
                    (5, _) => panel::<5, false>,
                    (6, _) => panel::<6, false>,
                    (7, _) => panel::<7, false>,
                    (2, true) => panel::<2, true>,
                    (3, true) => panel::<3, true>,
                    (4, true) => panel::<4, true>,
                    (_, _) => panel::<8, false>,
                }
            }

            pub fn block_kernel(bits: u32, table: bool) -> BlockKernel {
                match (bits, table) {
                    (2, false) => block::<2, false>,
                    (3, false) => block::<3, false>,
                    (4, false) => block::<4, false>,
                    (5, _) => block::<5, false>,
                    (6, _) => block::<6, false>,
                    (7, _) => block::<7, false>,
                    (2, true) => block::<2, true>,
                    (3, true) => block::<3, true>,
                    (4, true) => block::<4, true>,
                    (_, _) => block::<8, false>,
                }
            }
        }
    };
}

kernels_of!(portable, super::super::simd::Portable, 4, ANY);
#[cfg(target_arch = "x86_64")]
kernels_of!(avx2, super::super::simd::Avx2, 4, ANY, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels_of!(avx512, super::super::simd::Avx512, 16, SHIFT, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

/// Tokens of the widest tile for weights that lie so.
pub(super) const fn widest_tile(isa: Isa, columns: &Columns) -> usize {
    match (isa, &columns.grouping) {
        (Isa::Avx512, Grouping::Uniform(_)) => 16,
        (Isa::Avx512, Grouping::Pieces { .. }) | (Isa::Portable | Isa::Avx2, _) => 4,
    }
}

/// The kernel for `w` and tiles of `width`.
pub(super) fn tile_kernel(isa: Isa, w: &QuantWeight, width: usize) -> TileKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::tile_kernel(w.bits, w.has_table, form(w), width),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::tile_kernel(w.bits, w.has_table, form(w), width),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512 | Isa::Avx2 => portable::tile_kernel(w.bits, w.has_table, form(w), width),
        Isa::Portable => portable::tile_kernel(w.bits, w.has_table, form(w), width),
    }
}

/// The kernel that writes `w` out as f32.
pub(super) fn panel_kernel(isa: Isa, w: &QuantWeight) -> PanelKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::panel_kernel(w.bits, w.has_table),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::panel_kernel(w.bits, w.has_table),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512 | Isa::Avx2 => portable::panel_kernel(w.bits, w.has_table),
        Isa::Portable => portable::panel_kernel(w.bits, w.has_table),
    }
}

/// The kernel of the transposed product.
pub(super) fn block_kernel(isa: Isa, w: &QuantWeight) -> BlockKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::block_kernel(w.bits, w.has_table),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::block_kernel(w.bits, w.has_table),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512 | Isa::Avx2 => portable::block_kernel(w.bits, w.has_table),
        Isa::Portable => portable::block_kernel(w.bits, w.has_table),
    }
}
