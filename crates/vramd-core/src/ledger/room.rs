//! Room: what requests lack, where they could go, and what is kept for those who wait.

use std::collections::BTreeMap;

use vramd_api::{AllocationId, Bytes, DeviceId};

use super::book::{Book, Key};
use super::{Ledger, MEDIUM_BYTES, Request, SHARED_SEGMENT_BYTES, largest, segment_bytes};
use crate::placement;

impl Ledger {
    /// How many bytes too few a device has for all of `requests`; None if it could not hold them even empty. What is on its way back
    /// counts as there; what others have claimed does not.
    pub fn lacks(&self, requests: &[Request], device: &DeviceId) -> Option<u64> {
        let needed = self.held_for(requests, device)?;
        let book = self.books.get(device).filter(|book| !book.lost && needed <= book.limit())?;
        let standing = self.standing(book, &requests.iter().collect::<Vec<_>>(), true);
        // Of what has limits of its own, only models may go for models.
        if standing.above > 0 {
            return None;
        }
        Some(book.lacks(needed.saturating_add(standing.kept)).max(standing.above_models))
    }

    /// Whether a device has room for all of `requests` now.
    pub fn has_room(&self, requests: &[Request], device: &DeviceId) -> bool {
        let Some(book) = self.books.get(device) else { return false };
        let standing = self.standing(book, &requests.iter().collect::<Vec<_>>(), false);
        let room = book.room_without_spare().saturating_sub(standing.kept);
        let allowed = standing.above == 0 && standing.above_models == 0;
        allowed && self.held_for(requests, device).is_some_and(|bytes| bytes <= room)
    }

    /// What a device has for such requests in all, as far as their limits go.
    pub fn room_for(&self, requests: &[Request], device: &DeviceId) -> u64 {
        let Some(book) = self.books.get(device) else { return 0 };
        let (kept, most) = self.left_by_limits(book, requests, false);
        book.room_without_spare().saturating_sub(kept).min(most)
    }

    /// What it will have once what is on its way back is there, and `more`.
    pub fn room_with(&self, requests: &[Request], device: &DeviceId, more: u64) -> u64 {
        let Some(book) = self.books.get(device) else { return 0 };
        let (kept, most) = self.left_by_limits(book, requests, true);
        book.room_with(more).saturating_sub(kept).min(most)
    }

    /// The same, with that share of the device left free and its soft limit kept.
    pub fn has_room_to_spare(&self, requests: &[Request], device: &DeviceId, share: f64) -> bool {
        let Some(book) = self.books.get(device) else { return false };
        let soft = book.limits.soft_limit_bytes.map_or(u64::MAX, Bytes::get);
        let left = (book.facts.total_bytes as f64 * share) as u64;
        let (held, free) = (book.staying(), book.free_bytes());
        let needed = self.held_for(requests, device).unwrap_or(u64::MAX);
        self.has_room(requests, device)
            && held.saturating_add(needed) <= soft
            && needed.saturating_add(left) <= free
    }

    /// What `requests` would hold on a device, at most; None if one is too large for a segment of it.
    pub fn held_for(&self, requests: &[Request], device: &DeviceId) -> Option<u64> {
        let book = self.books.get(device)?;
        let mut shared: BTreeMap<Key, u64> = BTreeMap::new();
        let mut sum = 0_u64;
        for request in requests {
            let bytes = segment_bytes(request.size_bytes, book);
            if bytes > largest(request, book) {
                return None;
            }
            match Key::of(request) {
                Some(key) => *shared.entry(key).or_default() += request.size_bytes,
                None => sum = sum.checked_add(bytes)?,
            }
        }
        // Before a block that does not fit any more, less than one is left free.
        let filled = SHARED_SEGMENT_BYTES - MEDIUM_BYTES;
        let segment = SHARED_SEGMENT_BYTES.next_multiple_of(book.facts.granularity_bytes);
        shared.values().try_fold(sum, |sum, bytes| sum.checked_add(bytes.div_ceil(filled) * segment))
    }

    /// Whether waiting can help all of `requests`: see [`could_fit`](Self::could_fit).
    pub fn could_fit_all(&self, requests: &[Request], on: &[DeviceId]) -> bool {
        if let [only] = requests {
            return self.could_fit(only, on);
        }
        let Some(first) = requests.first() else { return true };
        self.devices_for(first, on).iter().any(|device| {
            let book = self.books.get(device).filter(|book| !book.lost && Self::may_ever(book, requests));
            let total = book.map_or(0, |book| book.facts.total_bytes);
            self.held_for(requests, device).is_some_and(|bytes| bytes <= total)
        })
    }

    /// An allocation is about to go: its segment counts as on its way back for those who wait.
    pub fn count_as_leaving(&mut self, id: AllocationId) {
        let Some(allocation) = self.allocations.get(&id) else { return };
        if let Some(book) = self.books.get_mut(&allocation.device)
            && let Some(segment) = book.segments.get_mut(&allocation.segment)
        {
            segment.leaving = true;
        }
    }

    /// What a device was last measured to have free for anybody, by what was taken and given back since; what is on its way back
    /// counts as there.
    pub fn free_bytes(&self, device: &DeviceId) -> u64 {
        self.books.get(device).map_or(0, Book::free_bytes)
    }

    /// Of the devices that could hold all of `requests`, were they empty, those of the nearest kind of memory.
    pub fn nearest(&self, requests: &[Request]) -> Vec<DeviceId> {
        let Some(first) = requests.first() else { return Vec::new() };
        let mut able = self.devices_for(first, &[]);
        // A limit may be raised, but a device with too low a one is not for these.
        let allowed = |device: &DeviceId| {
            let most = self.limit(device).unwrap_or_default();
            self.held_for(requests, device).is_some_and(|bytes| bytes <= most)
        };
        able.retain(|device| allowed(device) && self.could_fit_all(requests, std::slice::from_ref(device)));
        let rank = |device: &DeviceId| {
            self.books.get(device).map(|it| placement::rank(it.facts.memory_type, first.allocation_type))
        };
        let nearest = able.iter().filter_map(rank).min();
        able.retain(|device| rank(device) == nearest);
        able
    }

    /// Where room is kept for requests that wait.
    pub fn claimed_on(&self, id: AllocationId) -> Option<&DeviceId> {
        self.claims.get(&id).map(|(device, _)| device)
    }

    /// Keeps room on a device for requests that wait there, against those who do not.
    pub fn claim(&mut self, id: AllocationId, device: &DeviceId, bytes: u64) {
        self.give_up_claim(id);
        if let Some(book) = self.books.get_mut(device) {
            book.claimed += bytes;
            self.claims.insert(id, (device.clone(), bytes));
        }
    }

    /// Ends a claim; answers what it was.
    pub fn give_up_claim(&mut self, id: AllocationId) -> Option<(DeviceId, u64)> {
        let (device, bytes) = self.claims.remove(&id)?;
        if let Some(book) = self.books.get_mut(&device) {
            book.claimed -= bytes;
        }
        Some((device, bytes))
    }
}
