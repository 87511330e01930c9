//! Memory for packed codes, in huge pages where the system has them.
//!
//! A layer's weights are read from start to end once a token. With pages of 4 KiB the prefetcher stops and the address
//! translation misses at every page: on the machine this was written on reading is a fifth to a third slower. Most weights are
//! smaller than a huge page, so they lie one after the other in large chunks. A chunk is given back when its last weight is
//! dropped; the part of it that nobody has touched takes no memory, and what a dropped weight had is given out again: where a model is
//! loaded a block at a time beside a weight that stays (its embedding), the blocks do not pile up.

use std::ops::{Deref, DerefMut, Range};
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

/// The chunk that is being filled.
static CURRENT: Mutex<Option<Filling>> = Mutex::new(None);

/// A chunk and what of it is given out.
struct Filling {
    chunk: Arc<Chunk>,
    /// Lines from which on none is given out.
    used: usize,
    /// Lines from which on none has ever been: they are zero.
    touched: usize,
    /// Lines before `used` that are not given out: ranges that do not touch, in order.
    free: Vec<Range<usize>>,
}

impl Filling {
    /// Takes `len` lines, zeroed: the smallest hole that has them, or what follows.
    fn take(&mut self, len: usize) -> Option<Memory> {
        let holes = self.free.iter().enumerate().filter(|(_, hole)| hole.len() >= len);
        let from = match holes.min_by_key(|(_, hole)| hole.len()).map(|(i, hole)| (i, hole.start)) {
            Some((i, start)) => {
                self.free[i].start += len;
                self.free.retain(|hole| !hole.is_empty());
                start
            }
            None if self.chunk.lines - self.used >= len => {
                self.used += len;
                self.used - len
            }
            None => return None,
        };
        // SAFETY: the lines are in the chunk and nobody's.
        let first = unsafe { self.chunk.first.add(from) };
        let again = self.touched.min(from + len).saturating_sub(from);
        // SAFETY: as above.
        unsafe { first.write_bytes(0, again) };
        self.touched = self.touched.max(from + len);
        Some(Memory::Chunked(Part { first, len, from, chunk: Arc::clone(&self.chunk) }))
    }

    fn give_back(&mut self, lines: Range<usize>) {
        if lines.is_empty() {
            return;
        }
        let at = self.free.partition_point(|hole| hole.start < lines.start);
        self.free.insert(at, lines);
        self.free.dedup_by(|next, hole| {
            let touch = hole.end == next.start;
            if touch {
                hole.end = next.end;
            }
            touch
        });
        if let Some(last) = self.free.pop_if(|last| last.end == self.used) {
            self.used = last.start;
        }
    }
}

/// Some lines of memory, zero at first. Dereferences to a slice.
pub(in crate::cpu) struct Lines(Memory);

enum Memory {
    Chunked(Part),
    /// Memory of the allocator's, where there are no maps.
    Owned(Vec<Line>),
}

/// Part of a chunk, which goes back to it.
struct Part {
    first: *mut Line,
    len: usize,
    /// The first line's number in the chunk.
    from: usize,
    chunk: Arc<Chunk>,
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(filling) = current.as_mut().filter(|filling| Arc::ptr_eq(&filling.chunk, &self.chunk)) {
            filling.give_back(self.from..self.from + self.len);
        }
    }
}

// SAFETY: the pointer is to `len` lines that are this value's alone, in a chunk that it keeps.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// `len` lines of zeros.
    pub fn zeros(len: usize) -> Self {
        let owned = || Memory::Owned(vec![Line([0; 64]); len]);
        let fill = |lines| {
            Chunk::new(lines).map(|chunk| Filling { chunk: Arc::new(chunk), used: 0, touched: 0, free: Vec::new() })
        };
        if len > CHUNK / 2 {
            return Self(fill(len).and_then(|mut alone| alone.take(len)).unwrap_or_else(owned));
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        // A chunk of which no weight is left goes.
        if current.as_ref().is_some_and(|filling| Arc::strong_count(&filling.chunk) == 1) {
            *current = None;
        }
        if let Some(memory) = current.as_mut().and_then(|filling| filling.take(len)) {
            return Self(memory);
        }
        *current = fill(CHUNK);
        Self(current.as_mut().and_then(|filling| filling.take(len)).unwrap_or_else(owned))
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match &self.0 {
            // SAFETY: the lines are in a living chunk and nobody else's.
            Memory::Chunked(part) => unsafe { std::slice::from_raw_parts(part.first, part.len) },
            Memory::Owned(lines) => lines,
        }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        match &mut self.0 {
            // SAFETY: the lines are in a living chunk and nobody else's.
            Memory::Chunked(part) => unsafe { std::slice::from_raw_parts_mut(part.first, part.len) },
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

    #[test]
    fn what_is_dropped_is_given_out_again_as_zeros() {
        let chunk = Chunk::new(100).expect("anonymous memory");
        let mut filling = Filling { chunk: Arc::new(chunk), used: 0, touched: 0, free: Vec::new() };
        let take = |filling: &mut Filling, len| {
            let mut lines = Lines(filling.take(len)?);
            assert!(lines.iter().all(|line| line.0 == [0; 64]));
            lines.fill(Line([1; 64]));
            match &lines.0 {
                Memory::Chunked(part) => Some(part.from),
                Memory::Owned(_) => panic!("not of the chunk"),
            }
        };
        assert_eq!([10, 20, 30, 40].map(|len| take(&mut filling, len)), [Some(0), Some(10), Some(30), Some(60)]);
        assert_eq!(take(&mut filling, 1), None);
        filling.give_back(30..60);
        filling.give_back(0..10);
        assert_eq!([5, 10, 21].map(|len| take(&mut filling, len)), [Some(0), Some(30), None]);
        // 5..40 is free, and from 40 on the hole of before.
        filling.give_back(10..30);
        filling.give_back(30..40);
        assert_eq!((filling.free.len(), filling.free[0].clone(), filling.used), (1, 5..60, 100));
        filling.give_back(60..100);
        assert_eq!((filling.free.is_empty(), filling.used), (true, 5));
        assert_eq!(take(&mut filling, 95), Some(5));
    }
}
