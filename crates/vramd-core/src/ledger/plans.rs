//! Books as they will be, for plans: on a copy.

use std::sync::Arc;

use vramd_api::AllocationId;

use super::{Allocation, Ledger, Release, State};
use crate::Now;

impl Ledger {
    /// Takes all that is on its way back out of the books.
    pub fn settle(&mut self, now: Now) {
        let goes =
            |it: &&Arc<Allocation>| self.books.get(&it.device).is_some_and(|book| book.goes(it.segment));
        let leaving: Vec<_> = self.allocations.values().filter(goes).map(|it| it.request.id).collect();
        for id in leaving {
            self.forget(id, now);
        }
        let releasing = self.allocations.values().filter(|it| it.state == State::Releasing);
        for id in releasing.map(|it| it.request.id).collect::<Vec<_>>() {
            self.released(id);
        }
        for book in self.books.values_mut() {
            let gone: Vec<_> = book.segments.keys().copied().filter(|id| book.goes(*id)).collect();
            for id in gone {
                book.remove(id);
            }
        }
    }

    /// Takes an allocation out of the books, as if it had been released and were back.
    pub fn forget(&mut self, id: AllocationId, now: Now) {
        if matches!(self.release(id, now), Ok(Release::Work(_))) {
            self.released(id);
        }
    }
}
