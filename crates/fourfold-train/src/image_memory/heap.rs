//! The system's heap without its memory: where buffers of known sizes, made and dropped in a known order, come to lie, and how much
//! the heap takes then with the holes between them.
//!
//! As glibc's `malloc` does for large buffers: the smallest hole that is large enough (best fit: Knuth, The Art of Computer
//! Programming 1, 2.5), otherwise the end of the heap or, from [`MAPPED_BYTES`] on, a map of its own, of which nothing stays; holes side
//! by side become one; what is freed in the heap stays with the program. Before training begins, a map that is freed has buffers of its
//! size lie in the heap from then on (`mallopt(3)`, `M_MMAP_THRESHOLD`).

use std::collections::BTreeMap;
use std::ops::Range;

use fourfold_kernels::cpu::MAPPED_BYTES;

/// Bytes of a buffer that are the allocator's.
const HEADER: u64 = 16;

/// Bytes from which on a buffer is a map before anything is freed, and the most that this may become.
const FIRST_MAPPED: u64 = 128 << 10;
const MOST_MAPPED: u64 = 32 << 20;

/// Buffers in memory.
pub(super) struct Heap {
    /// Addresses below the end that no buffer takes.
    free: Ranges,
    /// Those that the system has back until they are used again.
    returned: Ranges,
    end: u64,
    mapped: u64,
    /// Bytes from which on a buffer is a map, and whether they change.
    threshold: u64,
    changes: bool,
}

/// A buffer's place.
pub(super) enum Place {
    Heap(Range<u64>),
    Mapped(u64),
}

impl Heap {
    /// The heap of a program that begins.
    pub fn new() -> Self {
        let (free, returned) = (Ranges::default(), Ranges::default());
        Self { free, returned, end: 0, mapped: 0, threshold: FIRST_MAPPED, changes: true }
    }

    /// As [`fourfold_kernels::cpu::keep_freed_memory`] does.
    pub fn keep_freed(&mut self) {
        self.give_back();
        (self.threshold, self.changes) = (MAPPED_BYTES as u64, false);
    }

    /// Bytes that the heap and the maps take.
    pub fn resident(&self) -> u64 {
        self.end - self.returned.len() + self.mapped
    }

    /// Makes a buffer.
    pub fn allocate(&mut self, bytes: u64) -> Place {
        // Half of a hole's bytes do not fit twice into it.
        let bytes = if bytes == 0 { 0 } else { (bytes + HEADER).next_multiple_of(HEADER) };
        // What is free at the end is no hole, but what the heap grows from.
        let rest = self.free.iter().last().filter(|last| last.end == self.end).unwrap_or(self.end..self.end);
        let holes = self.free.iter().filter(|hole| hole.end < self.end && hole.end - hole.start >= bytes);
        let start = match holes.min_by_key(|hole| hole.end - hole.start) {
            Some(hole) => hole.start,
            None if rest.end - rest.start >= bytes || bytes < self.threshold => rest.start,
            None => {
                self.mapped += bytes;
                return Place::Mapped(bytes);
            }
        };
        let place = start..start + bytes;
        self.end = self.end.max(place.end);
        self.free.remove(&place);
        self.returned.remove(&place);
        Place::Heap(place)
    }

    /// Drops a buffer.
    pub fn free(&mut self, place: Place) {
        match place {
            Place::Heap(place) => self.free.insert(place),
            Place::Mapped(bytes) => {
                self.mapped -= bytes;
                if self.changes && bytes <= MOST_MAPPED {
                    self.threshold = self.threshold.max(bytes);
                }
            }
        }
    }

    /// Gives all holes back to the system.
    pub fn give_back(&mut self) {
        self.free.iter().for_each(|hole| self.returned.insert(hole));
    }
}

/// Addresses, as ranges that do not touch: start to end.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(&start, &end)| start..end)
    }

    fn len(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// Takes out the ranges that meet or touch one.
    fn take_around(&mut self, range: &Range<u64>) -> Vec<Range<u64>> {
        let around: Vec<_> = self.iter().filter(|r| r.start <= range.end && range.start <= r.end).collect();
        self.0.retain(|start, _| around.iter().all(|r| r.start != *start));
        around
    }

    fn put(&mut self, range: Range<u64>) {
        if range.start < range.end {
            self.0.insert(range.start, range.end);
        }
    }

    fn insert(&mut self, range: Range<u64>) {
        let around = self.take_around(&range);
        let start = around.iter().map(|r| r.start).fold(range.start, u64::min);
        let end = around.iter().map(|r| r.end).fold(range.end, u64::max);
        self.put(start..end);
    }

    fn remove(&mut self, range: &Range<u64>) {
        for r in self.take_around(range) {
            self.put(r.start..r.end.min(range.start));
            self.put(r.start.max(range.end)..r.end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Heap {
        let mut heap = Heap::new();
        heap.keep_freed();
        heap
    }

    /// A buffer that takes so many units with its header.
    fn allocate(heap: &mut Heap, units: u64) -> Place {
        heap.allocate(units * HEADER - HEADER)
    }

    fn start(place: &Place) -> u64 {
        match place {
            Place::Heap(range) => range.start / HEADER,
            Place::Mapped(_) => panic!("a map of its own"),
        }
    }

    #[test]
    fn the_smallest_hole_that_is_large_enough_is_used_and_holes_side_by_side_are_one() {
        let mut heap = training();
        let [a, b, c, _d, e] = [100, 10, 40, 10, 50].map(|units| allocate(&mut heap, units));
        heap.free(a);
        heap.free(c);
        assert_eq!(start(&allocate(&mut heap, 30)), 110);
        assert_eq!(start(&allocate(&mut heap, 50)), 0);
        assert_eq!(heap.resident(), 210 * HEADER);
        // 50..110: what is left of `a`, and `b`.
        heap.free(b);
        assert_eq!(start(&allocate(&mut heap, 60)), 50);
        // The last one is the end, from which the heap grows.
        heap.free(e);
        assert_eq!(start(&allocate(&mut heap, 70)), 160);
        assert_eq!(heap.resident(), 230 * HEADER);
    }

    #[test]
    fn what_is_given_back_counts_again_when_it_is_used() {
        let mut heap = training();
        let [a, _b] = [100, 100].map(|units| allocate(&mut heap, units));
        heap.free(a);
        assert_eq!(heap.resident(), 200 * HEADER);
        heap.give_back();
        assert_eq!(heap.resident(), 100 * HEADER);
        allocate(&mut heap, 30);
        assert_eq!(heap.resident(), 130 * HEADER);
    }

    #[test]
    fn a_large_buffer_uses_a_hole_and_is_otherwise_a_map_of_which_nothing_stays() {
        let large = MAPPED_BYTES as u64 / HEADER;
        let mut heap = training();
        let mapped = allocate(&mut heap, large + 1);
        assert!(matches!(mapped, Place::Mapped(_)));
        heap.free(mapped);
        assert_eq!(heap.resident(), 0);
        let [a, b, _last] = [large - 1, 2, 2].map(|units| allocate(&mut heap, units));
        heap.free(a);
        heap.free(b);
        assert_eq!(start(&allocate(&mut heap, large + 1)), 0);
        assert_eq!(heap.resident(), (large + 3) * HEADER);
    }

    #[test]
    fn before_training_maps_become_larger() {
        let units = FIRST_MAPPED / HEADER;
        let mut heap = Heap::new();
        let first = allocate(&mut heap, 2 * units);
        assert!(matches!(first, Place::Mapped(_)));
        heap.free(first);
        assert_eq!(start(&allocate(&mut heap, units)), 0);
        assert!(matches!(allocate(&mut heap, 3 * units), Place::Mapped(_)));
    }
}
