//! The segments of one device by their ids, and the checks that every call makes of its caller.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Call, DeviceError, Range, SegmentId};

/// A segment, of whatever backend.
pub(crate) trait Extent {
    fn bytes(&self) -> u64;
}

/// The lock is held for a look-up only: whoever works on a segment holds the segment itself.
pub(crate) struct Table<S>(Mutex<HashMap<SegmentId, Arc<S>>>);

impl<S> Default for Table<S> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<S> std::fmt::Debug for Table<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

impl<S: Extent> Table<S> {
    /// Checks what `create` is asked for.
    pub(crate) fn check_new(&self, id: SegmentId, bytes: u64, granularity: u64) -> Result<(), DeviceError> {
        if bytes == 0 || !bytes.is_multiple_of(granularity) {
            return Err(misuse(Call::Create, id, "its size is no multiple of the granularity above 0"));
        }
        if self.lock().contains_key(&id) {
            return Err(misuse(Call::Create, id, "its id is in use"));
        }
        Ok(())
    }

    pub(crate) fn insert(&self, id: SegmentId, segment: S) -> Result<(), DeviceError> {
        match self.lock().entry(id) {
            Entry::Occupied(_) => Err(misuse(Call::Create, id, "its id is in use")),
            Entry::Vacant(place) => {
                place.insert(Arc::new(segment));
                Ok(())
            }
        }
    }

    /// Undoes a removal.
    #[cfg(unix)]
    pub(crate) fn put_back(&self, id: SegmentId, segment: Arc<S>) {
        self.lock().insert(id, segment);
    }

    pub(crate) fn remove(&self, id: SegmentId) -> Result<Arc<S>, DeviceError> {
        self.lock().remove(&id).ok_or_else(|| misuse(Call::Destroy, id, "there is no such segment"))
    }

    pub(crate) fn get(&self, call: Call, id: SegmentId) -> Result<Arc<S>, DeviceError> {
        self.lock().get(&id).cloned().ok_or_else(|| misuse(call, id, "there is no such segment"))
    }

    /// The segment of a range that is inside of it.
    pub(crate) fn get_range(&self, call: Call, range: Range) -> Result<Arc<S>, DeviceError> {
        let segment = self.get(call, range.segment)?;
        match range.offset.checked_add(range.bytes) {
            Some(end) if end <= segment.bytes() => Ok(segment),
            _ => Err(misuse(call, range.segment, "the range is not inside of the segment")),
        }
    }

    /// The segments of a copy between two ranges that do not overlap.
    pub(crate) fn get_copy(
        &self,
        from: Range,
        to: SegmentId,
        to_offset: u64,
    ) -> Result<(Arc<S>, Arc<S>), DeviceError> {
        let source = self.get_range(Call::Copy, from)?;
        let target =
            self.get_range(Call::Copy, Range { segment: to, offset: to_offset, bytes: from.bytes })?;
        if from.segment == to && from.offset.abs_diff(to_offset) < from.bytes {
            return Err(misuse(Call::Copy, to, "the two ranges overlap"));
        }
        Ok((source, target))
    }
}

impl<S> Table<S> {
    #[cfg(unix)]
    pub(crate) fn all(&self) -> Vec<Arc<S>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SegmentId, Arc<S>>> {
        // No operation under this lock can leave the map half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn misuse(call: Call, segment: SegmentId, reason: &'static str) -> DeviceError {
    DeviceError::Misuse { call, segment, reason }
}
