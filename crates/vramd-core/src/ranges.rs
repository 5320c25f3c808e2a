//! Ranges of one segment: what is given out, what is free, lowest offset first.

use std::collections::{BTreeMap, BTreeSet};

/// The free ranges of a segment. Adjacent free ranges are always merged.
#[derive(Debug, Clone)]
pub struct Ranges {
    bytes: u64,
    free: u64,
    /// Free ranges by offset.
    holes: BTreeMap<u64, u64>,
    /// The same as (length, offset), for the largest.
    by_length: BTreeSet<(u64, u64)>,
}

impl Ranges {
    /// One free range of `bytes`.
    pub fn new(bytes: u64) -> Self {
        let mut ranges = Self { bytes, free: 0, holes: BTreeMap::new(), by_length: BTreeSet::new() };
        if bytes > 0 {
            ranges.insert(0, bytes);
        }
        ranges
    }

    /// The lowest offset, a multiple of `alignment` (a power of two), at which `bytes` are free.
    pub fn find(&self, bytes: u64, alignment: u64) -> Option<u64> {
        if bytes == 0 || bytes > self.largest_free() {
            return None;
        }
        self.holes.iter().find_map(|(&hole, &length)| {
            let offset = hole.checked_next_multiple_of(alignment)?;
            let end = offset.checked_add(bytes)?;
            (end <= hole + length).then_some(offset)
        })
    }

    /// Takes what [`Self::find`] finds.
    pub fn take(&mut self, bytes: u64, alignment: u64) -> Option<u64> {
        let offset = self.find(bytes, alignment)?;
        let (&hole, &length) = self.holes.range(..=offset).next_back()?;
        self.remove(hole, length);
        if offset > hole {
            self.insert(hole, offset - hole);
        }
        let (end, hole_end) = (offset + bytes, hole + length);
        if end < hole_end {
            self.insert(end, hole_end - end);
        }
        Some(offset)
    }

    /// Gives a range back that `take` had given.
    pub fn give(&mut self, offset: u64, bytes: u64) {
        let (mut start, mut end) = (offset, offset + bytes);
        assert!(end <= self.bytes, "the range {offset}+{bytes} lies outside of its segment");
        if let Some((&before, &length)) = self.holes.range(..=offset).next_back() {
            assert!(before + length <= offset, "the range {offset}+{bytes} is given back twice");
            if before + length == offset {
                self.remove(before, length);
                start = before;
            }
        }
        if let Some((&after, &length)) = self.holes.range(offset..).next() {
            assert!(after >= end, "the range {offset}+{bytes} is given back twice");
            if after == end {
                self.remove(after, length);
                end = after + length;
            }
        }
        self.insert(start, end - start);
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn free(&self) -> u64 {
        self.free
    }

    pub fn largest_free(&self) -> u64 {
        self.by_length.last().map_or(0, |(length, _)| *length)
    }

    pub fn hole_count(&self) -> usize {
        self.holes.len()
    }

    /// Nothing is given out.
    pub fn is_empty(&self) -> bool {
        self.free == self.bytes
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.holes.insert(offset, length);
        self.by_length.insert((length, offset));
        self.free += length;
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.holes.remove(&offset);
        self.by_length.remove(&(length, offset));
        self.free -= length;
    }
}
