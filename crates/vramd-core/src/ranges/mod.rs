//! Ranges of one segment: what is given out, what is free, lowest offset first.
//!
//! Owns the books of one address space. Leaves out who has what, and all of the device. The holes lie in a B+ tree
//! by offset that knows the longest hole below each node, so that the lowest hole that fits is one descent away,
//! and the neighbours of what comes back another.
//!
//! Alignment costs nothing as long as every hole starts at a multiple of it, as it does where sizes are rounded.
//! Where not, the first request of an alignment adds an index for it, a few of them at most; a further one looks
//! at holes that could be too short by their padding, one after the other. Each answer is exact in any case.

mod lengths;
mod tree;

use tree::{Hole, Path, Tree};

/// Each costs every change a little.
const MOST_INDEXES: usize = 4;

/// The free ranges of a segment. Adjacent free ranges are always merged.
#[derive(Debug, Clone)]
pub struct Ranges {
    bytes: u64,
    free: u64,
    hole_count: usize,
    /// Every bit that was set in the offset of a hole since the segment was empty.
    offset_bits: u64,
    histogram: [u32; 64],
    holes: Tree,
}

impl Ranges {
    /// One free range of `bytes`.
    pub fn new(bytes: u64) -> Self {
        let holes = Tree::new();
        let mut ranges = Self { bytes, free: 0, hole_count: 0, offset_bits: 0, histogram: [0; 64], holes };
        if bytes > 0 {
            ranges.holes.insert(&Path::default(), 0, Hole { offset: 0, length: bytes });
            ranges.note(0, bytes);
            ranges.free = bytes;
        }
        ranges
    }

    /// The lowest offset, a multiple of `alignment` (a power of two), at which `bytes` are free.
    pub fn find(&self, bytes: u64, alignment: u64) -> Option<u64> {
        self.find_congruent(bytes, alignment, 0)
    }

    /// The lowest offset that leaves `remainder` when divided by `modulus` (a power of two), at which `bytes` are
    /// free.
    pub fn find_congruent(&self, bytes: u64, modulus: u64, remainder: u64) -> Option<u64> {
        self.search(bytes, modulus, remainder, &mut Path::default()).map(|(_, offset)| offset)
    }

    /// Takes what [`Self::find`] finds.
    pub fn take(&mut self, bytes: u64, alignment: u64) -> Option<u64> {
        if !self.starts_at_multiples(alignment) {
            self.holes.index(alignment, MOST_INDEXES);
        }
        let mut path = Path::default();
        let (slot, offset) = self.search(bytes, alignment, 0, &mut path)?;
        self.cut(&path, slot, offset, bytes);
        Some(offset)
    }

    /// Takes `bytes` at `offset`, if they are free.
    #[must_use]
    pub fn take_at(&mut self, offset: u64, bytes: u64) -> bool {
        let mut path = Path::default();
        let Some(slot) = self.hole_with(offset, bytes, &mut path) else { return false };
        self.cut(&path, slot, offset, bytes);
        true
    }

    pub fn is_free(&self, offset: u64, bytes: u64) -> bool {
        self.hole_with(offset, bytes, &mut Path::default()).is_some()
    }

    /// Gives a range back that `take` had given.
    pub fn give(&mut self, offset: u64, bytes: u64) {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes);
        let end = end.unwrap_or_else(|| panic!("the range {offset}+{bytes} lies outside of its segment"));
        if bytes == 0 {
            return;
        }
        let mut path = Path::default();
        let slot = self.holes.locate(offset, &mut path);
        let (previous, next);
        let before = if let Some(slot) = slot.checked_sub(1) {
            Some((&path, slot))
        } else {
            previous = self.holes.before(&path);
            previous.as_ref().map(|path| (path, self.holes.count(path) - 1))
        };
        let after = if slot < self.holes.count(&path) {
            Some((&path, slot))
        } else {
            next = self.holes.after(&path);
            next.as_ref().map(|path| (path, 0))
        };
        let before = before.map(|(path, slot)| (path, slot, self.holes.hole(path, slot)));
        let after = after.map(|(path, slot)| (path, slot, self.holes.hole(path, slot)));
        let twice = before.is_some_and(|(_, _, hole)| hole.end() > offset)
            || after.is_some_and(|(_, _, hole)| hole.offset < end);
        assert!(!twice, "the range {offset}+{bytes} is given back twice");

        let before = before.filter(|(_, _, hole)| hole.end() == offset);
        let after = after.filter(|(_, _, hole)| hole.offset == end);
        self.free += bytes;
        match (before, after) {
            (Some((left, left_slot, low)), Some((right, right_slot, high))) => {
                let hole = Hole { offset: low.offset, length: high.end() - low.offset };
                self.note(low.length, hole.length);
                self.note(high.length, 0);
                self.holes.replace(left, left_slot, hole);
                if right_slot == 0 {
                    self.holes.separate(right, hole.end());
                }
                self.holes.remove(right, right_slot);
            }
            (Some((left, left_slot, low)), None) => {
                let hole = Hole { offset: low.offset, length: low.length + bytes };
                self.note(low.length, hole.length);
                self.holes.replace(left, left_slot, hole);
                if slot == 0 {
                    self.holes.separate(&path, end);
                }
            }
            (None, Some((right, right_slot, high))) => {
                let hole = Hole { offset, length: bytes + high.length };
                self.note(high.length, hole.length);
                self.offset_bits |= offset;
                self.holes.replace(right, right_slot, hole);
                if right_slot == 0 {
                    self.holes.separate(right, offset);
                }
            }
            (None, None) => {
                self.note(0, bytes);
                self.offset_bits |= offset;
                self.holes.insert(&path, slot, Hole { offset, length: bytes });
            }
        }
        if self.is_empty() {
            self.offset_bits = 0;
            self.holes.forget_indexes();
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn free(&self) -> u64 {
        self.free
    }

    pub fn largest_free(&self) -> u64 {
        self.holes.longest()
    }

    pub fn hole_count(&self) -> usize {
        self.hole_count
    }

    /// The free ranges, offset and length, from the lowest on.
    pub fn holes(&self) -> impl Iterator<Item = (u64, u64)> {
        self.holes.iter().map(|hole| (hole.offset, hole.length))
    }

    /// What of the free bytes one request cannot have: 1 − largest free / free, 0 where nothing is free.
    pub fn fragmentation(&self) -> f64 {
        if self.free == 0 { 0.0 } else { 1.0 - self.largest_free() as f64 / self.free as f64 }
    }

    /// How many holes have a length of 2ⁿ up to 2ⁿ⁺¹ − 1, by n.
    pub fn histogram(&self) -> &[u32; 64] {
        &self.histogram
    }

    /// Nothing is given out.
    pub fn is_empty(&self) -> bool {
        self.free == self.bytes
    }

    /// The hole's slot, and the offset in it.
    #[inline]
    fn search(&self, bytes: u64, modulus: u64, remainder: u64, path: &mut Path) -> Option<(usize, u64)> {
        let remainder = remainder & (modulus - 1);
        if bytes == 0 || bytes > self.free {
            return None;
        }
        let slot = if self.starts_at_multiples(modulus) {
            let least = bytes.checked_add(remainder).filter(|least| *least <= self.free)?;
            self.holes.search(1, least, path, |_| true)
        } else {
            let fits = |hole: Hole| hole.usable(modulus, remainder) >= bytes;
            self.holes.search(if remainder == 0 { modulus } else { 1 }, bytes, path, fits)
        }?;
        let hole = self.holes.hole(path, slot);
        Some((slot, hole.offset + hole.padding(modulus, remainder)))
    }

    /// Every hole starts at a multiple of `modulus`.
    fn starts_at_multiples(&self, modulus: u64) -> bool {
        assert!(modulus.is_power_of_two(), "{modulus} is not a power of two");
        self.offset_bits & (modulus - 1) == 0
    }

    fn hole_with(&self, offset: u64, bytes: u64, path: &mut Path) -> Option<usize> {
        let end = offset.checked_add(bytes).filter(|end| bytes > 0 && *end <= self.bytes)?;
        let slot = self.holes.locate(offset, path).checked_sub(1)?;
        (end <= self.holes.hole(path, slot).end()).then_some(slot)
    }

    /// Takes a part of a hole, or all of it.
    #[inline]
    fn cut(&mut self, path: &Path, slot: usize, offset: u64, bytes: u64) {
        let hole = self.holes.hole(path, slot);
        let front = Hole { offset: hole.offset, length: offset - hole.offset };
        let back = Hole { offset: offset + bytes, length: hole.end() - (offset + bytes) };
        self.free -= bytes;
        match (front.length > 0, back.length > 0) {
            (false, false) => {
                self.note(hole.length, 0);
                self.holes.remove(path, slot);
            }
            (false, true) => {
                self.note(hole.length, back.length);
                self.offset_bits |= back.offset;
                self.holes.replace(path, slot, back);
            }
            (true, false) => {
                self.note(hole.length, front.length);
                self.holes.replace(path, slot, front);
            }
            (true, true) => {
                self.note(hole.length, front.length);
                self.note(0, back.length);
                self.offset_bits |= back.offset;
                self.holes.replace(path, slot, front);
                self.holes.insert(path, slot + 1, back);
            }
        }
    }

    /// A hole was this long and now is that long, 0 for none: for the figures.
    #[inline]
    fn note(&mut self, was: u64, is: u64) {
        if let Some(power) = was.checked_ilog2() {
            self.histogram[power as usize] -= 1;
            self.hole_count -= 1;
        }
        if let Some(power) = is.checked_ilog2() {
            self.histogram[power as usize] += 1;
            self.hole_count += 1;
        }
    }
}
