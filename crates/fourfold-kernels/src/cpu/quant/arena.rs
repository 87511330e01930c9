//! Memory for packed codes, in huge pages where the system has them.
//!
//! A layer's weights are read from start to end once a token. With pages of 4 KiB the prefetcher stops and the address
//! translation misses at every page: on the machine this was written on reading is a fifth to a third slower. Most weights are
//! smaller than a huge page, so they lie one after the other in large chunks. A chunk is given back when its last weight is
//! dropped; the part of it that nobody has touched takes no memory.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

use super::layout::Line;

/// Bytes of a huge page.
const PAGE: usize = 2 << 20;

/// Lines of a chunk that several weights share.
const CHUNK: usize = (16 << 20) / size_of::<Line>();

/// Anonymous memory of many lines, given out from start to end.
struct Chunk {
    /// Keeps the memory.
    _map: MmapMut,
    first: *mut Line,
    lines: usize,
}

// SAFETY: the pointer is to the map's own memory, whose parts belong to one `Lines` each.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(lines: usize) -> Option<Self> {
        // A page more, so that the lines can begin at the start of a huge page.
        let mut map = MmapMut::map_anon(lines * size_of::<Line>() + PAGE).ok()?;
        // Refused where the system has none: then pages are small, and all else works.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        // SAFETY: less than a page, which the map has to spare.
        let first = unsafe { start.add(start.align_offset(PAGE)) }.cast::<Line>();
        Some(Self { _map: map, first, lines })
    }
}

/// The chunk that is being filled, and how many of its lines are given out.
static CURRENT: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

/// Some lines of memory, zero at first. Dereferences to a slice.
pub(in crate::cpu) struct Lines(Memory);

enum Memory {
    /// Part of a chunk.
    Chunked { first: *mut Line, len: usize, _chunk: Arc<Chunk> },
    /// Memory of the allocator's, where there are no maps.
    Owned(Vec<Line>),
}

// SAFETY: the pointer is to `len` lines that are this value's alone, in a chunk that it keeps.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// `len` lines of zeros.
    pub fn zeros(len: usize) -> Self {
        let part = |chunk: &Arc<Chunk>, from: usize| {
            // SAFETY: the chunk has `from + len` lines.
            let first = unsafe { chunk.first.add(from) };
            Self(Memory::Chunked { first, len, _chunk: Arc::clone(chunk) })
        };
        if len > CHUNK / 2 {
            return match Chunk::new(len) {
                Some(chunk) => part(&Arc::new(chunk), 0),
                None => Self(Memory::Owned(vec![Line([0; 64]); len])),
            };
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        // A chunk of which no weight is left goes, so that models loaded a block at a time do not pile up.
        if current.as_ref().is_some_and(|(chunk, _)| Arc::strong_count(chunk) == 1) {
            *current = None;
        }
        if let Some((chunk, used)) = current.as_mut().filter(|(chunk, used)| chunk.lines - *used >= len) {
            let lines = part(chunk, *used);
            *used += len;
            return lines;
        }
        match Chunk::new(CHUNK) {
            Some(chunk) => {
                let chunk = Arc::new(chunk);
                let lines = part(&chunk, 0);
                *current = Some((chunk, len));
                lines
            }
            None => Self(Memory::Owned(vec![Line([0; 64]); len])),
        }
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match &self.0 {
            // SAFETY: the lines are in a living chunk and nobody else's.
            Memory::Chunked { first, len, .. } => unsafe { std::slice::from_raw_parts(*first, *len) },
            Memory::Owned(lines) => lines,
        }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        match &mut self.0 {
            // SAFETY: the lines are in a living chunk and nobody else's.
            Memory::Chunked { first, len, .. } => unsafe { std::slice::from_raw_parts_mut(*first, *len) },
            Memory::Owned(lines) => lines,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zero_and_do_not_overlap() {
        let sizes = [0, 1, 1000, CHUNK / 2, CHUNK / 2, CHUNK / 2 + 1, 3];
        let mut parts: Vec<Lines> = sizes.iter().map(|&len| Lines::zeros(len)).collect();
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.len(), sizes[i]);
            if let Some(ends) = (!part.is_empty()).then(|| [0, part.len() - 1]) {
                for end in ends {
                    assert_eq!(part[end].0, [0; 64]);
                }
                for end in ends {
                    part[end].0 = [i as u8; 64];
                }
            }
        }
        for (i, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            assert_eq!((part[0].0[0], part[part.len() - 1].0[63]), (i as u8, i as u8));
        }
    }
}
