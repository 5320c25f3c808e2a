//! How a block gets another place.
//!
//! A move is two allocations of the ledger: the one that moves, and a second that holds the other place. The second is
//! reserved like any allocation, the bytes are copied, then [`Ledger::swap_places`] gives each the place of the other.
//! What holds the old place then goes like any allocation: when its last lease ends, which is the operation's, or that
//! of a reader who still has the old pages mapped. So every sum holds at every step, and a move that is given up only
//! ends its leases.
//!
//! Both are kept by a [`Lease::Operation`] meanwhile: an allocation that is released, or whose other leases end, goes
//! once the copy has stopped.

use std::collections::BTreeMap;
use std::sync::Arc;

use vramd_api::attach::Access;
use vramd_api::{AllocationId, AllocationType, DeviceId, LeaseId};

use super::allocation::{Allocation, Lease, Request, State, Task};
use super::book::{Book, Key, SegmentState, Sharing};
use super::{BLOCK_QUANTUM, Ledger, Place as Found, Readiness, SegmentId};
use crate::Now;
use crate::compaction::{Block, Pool};

/// A place in a shared segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub segment: SegmentId,
    pub offset: u64,
}

/// Why a block stays where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fixed {
    /// A process or an operation may write to it.
    Written,
    /// A process has it attached that does not follow moves, or has not answered to an earlier one.
    Reader,
    /// An operation is at work on it, or it is on its way in or out.
    Busy,
}

/// The segments that blocks of one kind share, as a plan sees them. The index in `allocations` is a block's id.
#[derive(Debug, Clone, Default)]
pub struct Group {
    pub pools: Vec<Pool>,
    pub allocations: Vec<AllocationId>,
    pub fixed: Vec<(AllocationId, Fixed)>,
}

impl Ledger {
    /// Whether a block of `id` may get another place now.
    pub fn fixed(&self, id: AllocationId) -> Option<Fixed> {
        let Some(allocation) = self.allocation(id).filter(|found| found.state == State::Active) else {
            return Some(Fixed::Busy);
        };
        let follows = |lease: &Lease| match lease {
            Lease::Connection { moves, .. } => *moves,
            Lease::TimeToLive { .. } | Lease::Persistent | Lease::Model | Lease::Operation { .. } => true,
        };
        if allocation.place_of.is_some() {
            // A reader of the one that has moved still has it mapped.
            Some(Fixed::Reader)
        } else if allocation.is_written() {
            Some(Fixed::Written)
        } else if allocation.tasks().next().is_some() || !allocation.is_kept() {
            Some(Fixed::Busy)
        } else if !allocation.leases.values().all(follows) {
            Some(Fixed::Reader)
        } else {
            None
        }
    }

    /// What could be compacted on a device: the shared segments by what their blocks have in common.
    pub fn groups(&self, device: &DeviceId, fixed: impl Fn(AllocationId) -> Option<Fixed>) -> Vec<Group> {
        let Some(book) = self.books.get(device) else { return Vec::new() };
        let mut blocks: BTreeMap<SegmentId, Vec<&Arc<Allocation>>> = BTreeMap::new();
        for allocation in self.allocations.values().filter(|allocation| allocation.device == *device) {
            blocks.entry(allocation.segment).or_default().push(allocation);
        }
        let group = |key: &Key| {
            let mut group = Group::default();
            for (id, segment) in book.open_shared(key).filter(|(_, one)| one.state == SegmentState::Live) {
                let mut pool = Pool { id: id.0, bytes: segment.ranges.bytes(), blocks: Vec::new() };
                for allocation in blocks.get(&id).into_iter().flatten() {
                    let request = &allocation.request;
                    let why = fixed(request.id).or_else(|| self.fixed(request.id));
                    pool.blocks.push(Block {
                        id: group.allocations.len() as u64,
                        offset: allocation.offset,
                        bytes: allocation.block_bytes,
                        alignment: request.alignment.max(BLOCK_QUANTUM),
                        congruence: allocation.is_attached().then_some(book.facts.page_bytes),
                        movable: why.is_none(),
                    });
                    group.allocations.push(request.id);
                    // An old place that is on its way out holds nothing up.
                    let goes = allocation.place_of.is_some() && allocation.state == State::Releasing;
                    let whose = allocation.place_of.unwrap_or(request.id);
                    group.fixed.extend(why.filter(|_| !goes).map(|why| (whose, why)));
                }
                group.pools.push(pool);
            }
            group
        };
        book.shared.keys().map(group).filter(|group| !group.pools.is_empty()).collect()
    }

    /// Segments are on their way back to the device.
    pub fn gives_back(&self, device: &DeviceId) -> bool {
        self.books.get(device).is_some_and(|book| book.destroying > 0)
    }

    /// What could be had in one piece on a device if its shared segments were packed: at most that, since a
    /// block may not fit where room is.
    pub fn largest_after_compaction(&self, device: &DeviceId) -> u64 {
        let Some(book) = self.books.get(device) else { return 0 };
        let emptied: u64 = self.groups(device, |_| None).iter().map(emptied_at_most).sum();
        let room = (book.room_without_spare() + emptied).min(book.facts.max_segment_bytes);
        let room = room & !(book.facts.granularity_bytes - 1);
        room.max(book.usage().largest_free_bytes)
    }

    /// Reserves a place for what `of` is to get: `at`, or wherever there is room on `device`. None if there is none.
    pub fn reserve_place(
        &mut self,
        id: AllocationId,
        of: AllocationId,
        device: &DeviceId,
        at: Option<Place>,
        now: Now,
    ) -> Option<Readiness> {
        let moving = self.allocation(of)?;
        let request = Request {
            id,
            allocation_type: AllocationType::Staging,
            memory_type: None,
            persistent: false,
            ..moving.request.clone()
        };
        let book = self.books.get(device)?;
        let place = match at {
            None => self.find(book, &request)?,
            Some(at) => Self::place_in(book, &request, at)?,
        };
        let readiness = self.put(request, device, place, now);
        if let Some(reserved) = self.allocations.get_mut(&id) {
            Arc::make_mut(reserved).place_of = Some(of);
        }
        Some(readiness)
    }

    fn place_in(book: &Book, request: &Request, at: Place) -> Option<Found> {
        let segment = book.segments.get(&at.segment).filter(|one| one.state == SegmentState::Live)?;
        let block = request.size_bytes.checked_next_multiple_of(BLOCK_QUANTUM)?;
        let alike = Key::of(request).is_some_and(|key| segment.sharing == Sharing::Shared(key));
        let fits = !book.lost
            && alike
            && at.offset.is_multiple_of(request.alignment)
            && segment.ranges.is_free(at.offset, block);
        fits.then_some(Found::In { segment: at.segment, offset: at.offset, block })
    }

    /// Why the bytes that were copied from `id` to `place` must not be used: `writes` is how often somebody had begun
    /// to write when the copy began.
    pub fn stale(&self, id: AllocationId, place: AllocationId, writes: u64) -> Option<Fixed> {
        let (Some(moving), Some(place)) = (self.allocation(id), self.allocation(place)) else {
            return Some(Fixed::Busy);
        };
        let page = self.books.get(&moving.device).map_or(1, |book| book.facts.page_bytes);
        let follows = |lease: &Lease| !matches!(lease, Lease::Connection { moves: false, .. });
        if moving.is_written() || moving.writes != writes {
            Some(Fixed::Written)
        } else if !moving.is_kept() || moving.tasks().any(|task| task != Task::Move) {
            Some(Fixed::Busy)
        } else if moving.is_attached()
            && (moving.device != place.device
                || moving.offset % page != place.offset % page
                || !moving.leases.values().all(follows))
        {
            Some(Fixed::Reader)
        } else {
            None
        }
    }

    /// Gives each of two active allocations the place of the other, and the first a new generation.
    pub fn swap_places(&mut self, id: AllocationId, place: AllocationId, now: Now) {
        let (Some(one), Some(two)) =
            (self.allocations.get(&id).cloned(), self.allocations.get(&place).cloned())
        else {
            return;
        };
        debug_assert_eq!((one.state, two.state), (State::Active, State::Active));
        let mut moved = put_at(&one, &two);
        moved.request.generation += 1;
        moved.note(now, format!("moved to {}", moved.device));
        if moved.is_attached()
            && let Some(segment) =
                self.books.get_mut(&moved.device).and_then(|book| book.segments.get_mut(&moved.segment))
        {
            segment.touched = true;
        }
        let mut left = put_at(&two, &one);
        // They have the old place's memory, and those that are attached will have the new one's.
        left.seen_by = std::mem::take(&mut moved.seen_by);
        moved.seen_by = moved.holders().cloned().collect();
        self.allocations.insert(id, Arc::new(moved));
        self.allocations.insert(place, Arc::new(left));
    }

    /// Whether blocks of so many bytes are all that is in a shared segment.
    pub fn holds_only(&self, device: &DeviceId, segment: SegmentId, bytes: u64) -> bool {
        let found = self.books.get(device).and_then(|book| book.segments.get(&segment));
        found.is_some_and(|found| {
            matches!(found.sharing, Sharing::Shared(_))
                && found.state == SegmentState::Live
                && found.ranges.free() + bytes == found.ranges.bytes()
        })
    }

    /// Ends leases that alone keep all the blocks of one shared segment, `bytes` in all: it goes back as a whole, so that
    /// none of them has to be zeroed. Answers the allocations, whose bytes are back at once; None, and nothing has
    /// changed, while something else is in it.
    pub fn empty_segment(
        &mut self,
        device: &DeviceId,
        segment: SegmentId,
        leases: &[LeaseId],
        bytes: u64,
        now: Now,
    ) -> Option<Vec<AllocationId>> {
        if !self.holds_only(device, segment, bytes) {
            return None;
        }
        let alone = |lease: &LeaseId| {
            let id = self.leases.get(lease)?;
            let allocation = self.allocation(*id)?;
            let there = (&allocation.device, allocation.segment) == (device, segment);
            (there && allocation.state == State::Active && allocation.leases.len() == 1).then_some(*id)
        };
        let ids = leases.iter().map(alone).collect::<Option<Vec<_>>>()?;
        self.books.get_mut(device)?.destroy(segment);
        for lease in leases {
            self.end_lease(*lease, now);
        }
        Some(ids)
    }

    /// The readers of an allocation: they have to map its new place.
    pub fn readers(&self, id: AllocationId) -> Vec<(LeaseId, Lease)> {
        let reader = |lease: &Lease| matches!(lease, Lease::Connection { access: Access::Read, .. });
        self.allocation(id)
            .into_iter()
            .flat_map(|allocation| &allocation.leases)
            .filter(|(_, lease)| reader(lease))
            .map(|(id, lease)| (*id, lease.clone()))
            .collect()
    }
}

fn put_at(allocation: &Allocation, place: &Allocation) -> Allocation {
    Allocation {
        device: place.device.clone(),
        segment: place.segment,
        offset: place.offset,
        block_bytes: place.block_bytes,
        ..allocation.clone()
    }
}

/// How many bytes of a group's segments could become empty: as many as its blocks could do without, and none that a
/// fixed block is in.
fn emptied_at_most(group: &Group) -> u64 {
    let used = |pool: &Pool| pool.blocks.iter().map(|block| block.bytes).sum::<u64>();
    let free: u64 = group.pools.iter().map(|pool| pool.bytes - used(pool)).sum();
    let mut movable: Vec<u64> = group
        .pools
        .iter()
        .filter(|pool| pool.blocks.iter().all(|block| block.movable))
        .map(|pool| pool.bytes)
        .collect();
    movable.sort_unstable();
    let mut left = free;
    movable
        .into_iter()
        .take_while(|bytes| {
            let fits = *bytes <= left;
            left = left.saturating_sub(*bytes);
            fits
        })
        .sum()
}
