//! How a quantized weight lies in memory.
//!
//! Sixteen rows make a *strip*, 32 columns a *block*, four columns a *quad*. Unpacked, the codes of a strip's quad fill one
//! 64-byte vector: lane r holds row r's four codes, as `vpdpbusd` and its like want them. A block of b-bit codes is stored in
//! b vectors, one bit plane after the other: eight codes of 4 bits need four vectors (quad l low, quad l + 4 high in each
//! byte), codes of 2 bits two, codes of 1 bit one; 3 bits are a 2-bit plane and a 1-bit plane, 7 bits all three. So every
//! width takes exactly its bits, and unpacking is shifts and masks of whole vectors.
//!
//! The columns are in *stream* order: that of the file, padded with zeros to whole blocks, where groups are whole blocks (or
//! the row is one group). Otherwise columns are sorted by group (GPTQ's act-order) and each group is padded to whole quads;
//! the runs of quads of one block that share a group are then listed as *pieces*.

use std::ops::Range;

use fourfold_tensor::Quantized;

/// Rows of a strip.
pub(super) const STRIP: usize = super::simd::LANES;
/// Columns of a block, which share a scale when activations are rounded to int8.
pub(super) const BLOCK: usize = 32;
/// Columns of a quad.
pub(super) const QUAD: usize = 4;
/// Quads of a block.
pub(super) const QUADS: usize = BLOCK / QUAD;

/// A vector's worth of packed codes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::cpu) struct Line(pub [u8; 64]);

/// Marks padding in [`Columns::order`].
const PADDING: u32 = u32::MAX;

/// Quads of one block that share a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Piece {
    /// First quad, within the block.
    pub start: u8,
    /// One past the last quad.
    pub end: u8,
    /// The group.
    pub group: u32,
}

/// Where the columns of a weight lie in the stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Columns {
    /// Columns of the matrix.
    pub cols: usize,
    /// Blocks of a row.
    pub blocks: usize,
    /// Groups of a row.
    pub groups: usize,
    /// How the groups lie.
    pub grouping: Grouping,
}

/// See [`Columns`].
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Grouping {
    /// The file's order; a group is this many blocks.
    Uniform(usize),
    /// Any order and any groups.
    Pieces {
        /// For each stream position the column it holds, or `PADDING`.
        order: Vec<u32>,
        /// All blocks' pieces.
        pieces: Vec<Piece>,
        /// Pieces of block i: `first[i] .. first[i + 1]`.
        first: Vec<u32>,
    },
}

impl Columns {
    /// The stream order of a weight. `one_group` where one scale and zero serve whole rows whatever `group_size` says.
    pub fn new(source: &Quantized, one_group: bool) -> Self {
        let cols = source.cols;
        let groups = if one_group { 1 } else { source.groups() };
        if groups <= 1 {
            let blocks = cols.div_ceil(BLOCK);
            return Self { cols, blocks, groups: 1, grouping: Grouping::Uniform(blocks.max(1)) };
        }
        if source.g_idx.is_none() && source.group_size.is_multiple_of(BLOCK) {
            let grouping = Grouping::Uniform(source.group_size / BLOCK);
            return Self { cols, blocks: cols.div_ceil(BLOCK), groups, grouping };
        }
        let mut members = vec![Vec::new(); groups];
        (0..cols).for_each(|c| members[source.group_of(c)].push(c as u32));
        let (mut order, mut quad_groups) = (Vec::new(), Vec::new());
        for (group, columns) in members.iter().enumerate() {
            order.extend(columns);
            order.resize(order.len().next_multiple_of(QUAD), PADDING);
            quad_groups.resize(order.len() / QUAD, group as u32);
        }
        order.resize(order.len().next_multiple_of(BLOCK), PADDING);
        // Padding quads at the end join the last piece: their codes and activations are zero.
        quad_groups.resize(order.len() / QUAD, quad_groups.last().copied().unwrap_or(0));
        let (mut pieces, mut first) = (Vec::new(), vec![0]);
        for block in quad_groups.chunks_exact(QUADS) {
            let mut start = 0;
            for run in block.chunk_by(|a, b| a == b) {
                let end = start + run.len();
                pieces.push(Piece { start: start as u8, end: end as u8, group: run[0] });
                start = end;
            }
            first.push(pieces.len() as u32);
        }
        Self { cols, blocks: first.len() - 1, groups, grouping: Grouping::Pieces { order, pieces, first } }
    }

    /// The stream order, where it is not the file's.
    pub fn order(&self) -> Option<&[u32]> {
        match &self.grouping {
            Grouping::Uniform(_) => None,
            Grouping::Pieces { order, .. } => Some(order),
        }
    }

    /// Whether two weights take the same prepared activations.
    pub fn same_stream(&self, other: &Self) -> bool {
        match (&self.grouping, &other.grouping) {
            (Grouping::Uniform(_), Grouping::Uniform(_)) => self.cols == other.cols,
            (Grouping::Pieces { .. }, Grouping::Pieces { .. }) => self == other,
            (Grouping::Uniform(_), Grouping::Pieces { .. }) | (Grouping::Pieces { .. }, Grouping::Uniform(_)) => false,
        }
    }

    /// Copies a row of `cols` values into stream order, zeros where there is padding; `to` has `blocks · BLOCK` elements.
    pub fn gather<T: Copy + Default>(&self, from: &[T], to: &mut [T]) {
        match self.order() {
            None => {
                to[..self.cols].copy_from_slice(from);
                to[self.cols..].fill(T::default());
            }
            Some(order) => {
                for (to, &c) in to.iter_mut().zip(order) {
                    *to = if c == PADDING { T::default() } else { from[c as usize] };
                }
            }
        }
    }

    /// The inverse of [`Columns::gather`], for the stream positions of `blocks` alone.
    pub fn scatter(&self, blocks: Range<usize>, from: &[f32], mut write: impl FnMut(usize, f32)) {
        self.places(blocks, |position, column| write(column, from[position]));
    }

    /// Calls `at(position, column)` for the columns that the stream positions of `blocks` hold, counted from the first.
    pub fn places(&self, blocks: Range<usize>, mut at: impl FnMut(usize, usize)) {
        let start = blocks.start * BLOCK;
        match self.order() {
            None => (start..self.cols.min(blocks.end * BLOCK)).for_each(|column| at(column - start, column)),
            Some(order) => {
                let columns = order[start..blocks.end * BLOCK].iter().enumerate();
                columns.filter(|&(_, &c)| c != PADDING).for_each(|(i, &c)| at(i, c as usize));
            }
        }
    }

    /// The group of each quad of `block`.
    pub fn quad_group(&self, block: usize, quad: usize) -> usize {
        match &self.grouping {
            Grouping::Uniform(blocks_of_group) => block / blocks_of_group,
            Grouping::Pieces { pieces, first, .. } => {
                let of_block = &pieces[first[block] as usize..first[block + 1] as usize];
                of_block.iter().find(|p| quad < usize::from(p.end)).map_or(0, |p| p.group as usize)
            }
        }
    }

    /// Bytes of the tables.
    pub fn byte_len(&self) -> usize {
        match &self.grouping {
            Grouping::Uniform(_) => 0,
            Grouping::Pieces { order, pieces, first } => {
                (order.len() + first.len()) * 4 + pieces.len() * size_of::<Piece>()
            }
        }
    }
}

/// Packs a block of a strip: `codes[r]` are row r's 32 codes in stream order, `lines` the block's `bits` vectors.
pub(super) fn pack_block(codes: &[[u8; BLOCK]; STRIP], bits: u32, lines: &mut [Line]) {
    lines.fill(Line([0; 64]));
    for quad in 0..QUADS {
        for place in places(bits, quad) {
            let mask = u32::from(place.mask()) * 0x0101_0101;
            for (lane, row) in lines[place.line].0.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                let four = u32::from_le_bytes(row.as_chunks::<QUAD>().0[quad]);
                *lane = (u32::from_le_bytes(*lane) | ((four >> place.low) & mask) << place.shift).to_le_bytes();
            }
        }
    }
}

/// The codes at row `r` of the strip and quad `quad` of the block.
pub(super) fn quad_at(lines: &[Line], bits: u32, r: usize, quad: usize) -> [u8; QUAD] {
    let mut codes = 0;
    for place in places(bits, quad) {
        let mask = u32::from(place.mask()) * 0x0101_0101;
        let packed = u32::from_le_bytes(lines[place.line].0.as_chunks::<QUAD>().0[r]);
        codes |= ((packed >> place.shift) & mask) << place.low;
    }
    codes.to_le_bytes()
}

/// Where a bit plane of a quad's codes lies.
pub(super) struct Place {
    /// Vector of the block.
    pub line: usize,
    /// Lowest bit within each byte there.
    pub shift: u32,
    /// Lowest bit of the code that the plane holds.
    pub low: u32,
    /// Bits of the plane.
    pub width: u32,
}

impl Place {
    fn mask(&self) -> u8 {
        ((1u32 << self.width) - 1) as u8
    }
}

/// The planes of a code of `bits`, for the codes of `quad`: the widest first, and in the code's lowest bits.
pub(super) fn places(bits: u32, quad: usize) -> impl Iterator<Item = Place> {
    let (mut first, mut low) = (0, 0);
    [8, 4, 2, 1].into_iter().filter(move |width| bits & width != 0).map(move |width| {
        // The block's 8 quads of `width` bits a code fill `width` vectors.
        let vectors = width as usize;
        let place = Place { line: first + quad % vectors, shift: (quad / vectors) as u32 * width, low, width };
        first += vectors;
        low += width;
        place
    })
}
