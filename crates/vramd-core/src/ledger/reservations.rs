//! Room that processes of its owners fill: nothing of it is ours, but nobody else is given it.

use std::sync::Arc;

use vramd_api::{AllocationId, DeviceId};

use super::{Ledger, Room};

impl Ledger {
    pub fn room(&self, id: AllocationId) -> Option<&Room> {
        self.allocation(id)?.request.room.as_deref()
    }

    /// Changes what is known of room, but what is used of it: that is [`fill`](Self::fill)'s.
    pub fn note_room(&mut self, id: AllocationId, change: impl FnOnce(&mut Room)) {
        let Some(allocation) = self.allocations.get_mut(&id).map(Arc::make_mut) else { return };
        if let Some(room) = &mut allocation.request.room {
            let used = room.used_bytes;
            change(room);
            room.used_bytes = used;
        }
    }

    /// So much of room is in use. To be told only of what a later measurement of the device shows as somebody else's: it is
    /// charged once.
    pub fn fill(&mut self, id: AllocationId, bytes: u64) {
        let Some(allocation) = self.allocations.get(&id) else { return };
        // What goes beyond its room is as foreign as anything.
        let used = bytes.min(allocation.block_bytes);
        let same = |room: &Room| room.used_bytes == used && room.peak_bytes >= Some(bytes);
        // Most of the time nothing has changed, and snapshots share what did not.
        if allocation.request.room.as_deref().is_none_or(same) {
            return;
        }
        let Some(allocation) = self.allocations.get_mut(&id).map(Arc::make_mut) else { return };
        let (Some(room), Some(book)) = (&mut allocation.request.room, self.books.get_mut(&allocation.device))
        else {
            return;
        };
        book.filled = book.filled - room.used_bytes + used;
        room.used_bytes = used;
        room.peak_bytes = room.peak_bytes.max(Some(bytes));
    }

    /// What workers have on a device of their own, beside reservations: theirs, not anybody's.
    pub fn note_workers(&mut self, device: &DeviceId, bytes: u64) {
        if let Some(book) = self.books.get_mut(device) {
            book.workers = bytes;
        }
    }
}
