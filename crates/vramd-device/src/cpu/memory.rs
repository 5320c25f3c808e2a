//! A segment, and which of its pages have come.
//!
//! Making pages takes about as long as reading them from a fast disk. Those of a large segment that is read from files come piece
//! by piece, each just before it is read into, while other threads read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::segment::Segment;
use crate::table::Extent;

/// Pages come in chunks of it: two huge pages, and as much as a load reads at once.
pub(super) const CHUNK_BYTES: u64 = 4 << 20;

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) segment: Segment,
    /// Which chunks have not come.
    missing: Mutex<Vec<bool>>,
    missing_bytes: AtomicU64,
}

impl Extent for Memory {
    fn bytes(&self) -> u64 {
        self.segment.bytes()
    }
}

impl Memory {
    pub(super) fn all_there(segment: Segment) -> Self {
        Self { segment, missing: Mutex::default(), missing_bytes: AtomicU64::new(0) }
    }

    /// The first `there` bytes have come, whole chunks or all.
    pub(super) fn coming(segment: Segment, there: u64) -> Self {
        let bytes = segment.bytes();
        let missing = (0..bytes.div_ceil(CHUNK_BYTES)).map(|chunk| chunk * CHUNK_BYTES >= there).collect();
        Self { segment, missing: Mutex::new(missing), missing_bytes: AtomicU64::new(bytes - there) }
    }

    pub(super) fn missing_bytes(&self) -> u64 {
        self.missing_bytes.load(Ordering::Acquire)
    }

    pub(super) fn is_coming(&self) -> bool {
        self.missing_bytes() > 0
    }

    /// The chunks of a range that have not come, as offset and size.
    pub(super) fn missing(&self, offset: u64, bytes: u64) -> Vec<(u64, u64)> {
        let chunks = offset / CHUNK_BYTES..(offset + bytes).div_ceil(CHUNK_BYTES);
        let missing = self.lock();
        let is_missing = |chunk: &u64| missing.get(*chunk as usize).copied().unwrap_or(false);
        let place = |chunk: u64| {
            let offset = chunk * CHUNK_BYTES;
            (offset, CHUNK_BYTES.min(self.bytes() - offset))
        };
        chunks.filter(is_missing).map(place).collect()
    }

    /// A chunk has come; answers how many bytes that is news for: two may have seen to it.
    pub(super) fn came(&self, offset: u64, bytes: u64) -> u64 {
        let news = std::mem::replace(&mut self.lock()[(offset / CHUNK_BYTES) as usize], false);
        if !news {
            return 0;
        }
        self.missing_bytes.fetch_sub(bytes, Ordering::AcqRel);
        bytes
    }

    fn lock(&self) -> MutexGuard<'_, Vec<bool>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::Writers;
    use crate::segment::Backing;

    #[test]
    fn each_chunk_comes_once() {
        let bytes = 3 * CHUNK_BYTES + 8192;
        let segment = Segment::create("test", bytes, Writers::DeviceOnly, Backing::SmallPages).unwrap();
        let memory = Memory::coming(segment, CHUNK_BYTES);
        assert_eq!(memory.missing(0, CHUNK_BYTES), []);
        let rest = [(CHUNK_BYTES, CHUNK_BYTES), (2 * CHUNK_BYTES, CHUNK_BYTES), (3 * CHUNK_BYTES, 8192)];
        assert_eq!(memory.missing(0, bytes), rest);
        assert_eq!(memory.missing(2 * CHUNK_BYTES - 1, 2), rest[..2]);
        assert_eq!((memory.came(3 * CHUNK_BYTES, 8192), memory.came(3 * CHUNK_BYTES, 8192)), (8192, 0));
        assert_eq!(memory.missing_bytes(), 2 * CHUNK_BYTES);
        for (offset, bytes) in memory.missing(0, bytes) {
            assert_eq!(memory.came(offset, bytes), bytes);
        }
        assert!(!memory.is_coming());
    }
}
