//! The books of one device: its segments, its limit and what was last measured.
//!
//! `held = allocated + reserved + pool free`, where `held` is the sum of all segments.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{AllocationId, DeviceId, MemoryType, OwnerName};

use super::SegmentId;
use crate::ranges::Ranges;

/// What the ledger has to know of a device; none of it changes.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFacts {
    pub device: DeviceId,
    pub memory_type: MemoryType,
    pub total_bytes: u64,
    /// A segment's size is a multiple of it. A power of two.
    pub granularity_bytes: u64,
    /// The most that may be held here, unless a call sets another limit.
    pub limit_bytes: u64,
}

/// What was measured on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    pub used_bytes: u64,
    pub available_bytes: u64,
    /// The part of `used_bytes` that is ours.
    pub held_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SegmentState {
    Creating,
    Live,
    Destroying,
}

/// Who may have blocks in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sharing {
    /// One block, all of it.
    Exclusive,
    /// Small blocks of one owner: a descriptor shows a whole segment, so owners never share one.
    Shared(OwnerName),
    /// Empty, zeroed and never exported: the next owner takes it over.
    Spare,
}

#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub state: SegmentState,
    pub sharing: Sharing,
    pub ranges: Ranges,
    pub exported: bool,
    /// The reservations that become allocations when it is live.
    pub waiting: Vec<AllocationId>,
}

/// The figures of one device, derived from its books.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub allocated_bytes: u64,
    pub reserved_bytes: u64,
    pub pool_free_bytes: u64,
    pub foreign_bytes: u64,
    pub used_bytes: u64,
    pub available_bytes: u64,
    pub largest_free_bytes: u64,
    pub limit_bytes: u64,
    pub allocation_count: u64,
    pub hole_count: u64,
    pub segment_count: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Book {
    pub facts: DeviceFacts,
    pub limit_override: Option<u64>,
    pub lost: bool,
    pub measured: Option<Measured>,
    pub segments: BTreeMap<SegmentId, Segment>,
    /// Those that hold several blocks, and the spare: the only ones with holes.
    pub shared: BTreeSet<SegmentId>,
    /// The sum of all segments.
    pub held: u64,
    /// The sum of active and releasing blocks.
    pub allocated: u64,
    /// The sum of reserved blocks.
    pub reserved: u64,
    pub allocation_count: u64,
    pub spare: Option<SegmentId>,
}

impl Book {
    pub fn new(facts: DeviceFacts) -> Self {
        Self {
            facts,
            limit_override: None,
            lost: false,
            measured: None,
            segments: BTreeMap::new(),
            shared: BTreeSet::new(),
            held: 0,
            allocated: 0,
            reserved: 0,
            allocation_count: 0,
            spare: None,
        }
    }

    pub fn limit(&self) -> u64 {
        self.limit_override.unwrap_or(self.facts.limit_bytes).min(self.facts.total_bytes)
    }

    /// How many bytes of new segments could be taken now: what the limit and the last measurement both allow.
    pub fn room(&self) -> u64 {
        self.room_beside(self.held)
    }

    /// The same, were the spare segment given back first.
    pub fn room_without_spare(&self) -> u64 {
        self.room_beside(self.held - self.spare_bytes())
    }

    fn room_beside(&self, held: u64) -> u64 {
        if self.lost {
            return 0;
        }
        let by_device = self
            .measured
            .map_or(u64::MAX, |measured| measured.available_bytes.saturating_add(measured.held_bytes));
        self.limit().min(by_device).saturating_sub(held)
    }

    fn spare_bytes(&self) -> u64 {
        self.spare.and_then(|id| self.segments.get(&id)).map_or(0, |segment| segment.ranges.bytes())
    }

    /// Takes a live segment out of the books.
    pub fn remove(&mut self, id: SegmentId) {
        self.shared.remove(&id);
        if let Some(segment) = self.segments.remove(&id) {
            self.held -= segment.ranges.bytes();
        }
    }

    /// The segments with holes that blocks can go into.
    pub fn open_shared(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        self.shared
            .iter()
            .filter_map(|id| self.segments.get(id).map(|segment| (*id, segment)))
            .filter(|(_, segment)| segment.state != SegmentState::Destroying)
    }

    /// The largest new segment that could be made, at the spare's expense if need be.
    fn largest_new(&self) -> u64 {
        self.room_without_spare() & !(self.facts.granularity_bytes - 1)
    }

    /// What is open to one owner, in all and in one piece: new segments, and for small blocks the holes in the
    /// owner's own segments.
    pub fn open_to(&self, owner: &OwnerName, small: bool) -> (u64, u64) {
        let own = self
            .open_shared()
            .map(|(_, segment)| segment)
            .filter(|segment| small && matches!(&segment.sharing, Sharing::Shared(of) if of == owner));
        let new = (self.room_without_spare(), self.largest_new());
        own.fold(new, |(free, largest), segment| {
            (free + segment.ranges.free(), largest.max(segment.ranges.largest_free()))
        })
    }

    pub fn usage(&self) -> Usage {
        let pool_free = self.held - self.allocated - self.reserved;
        let foreign =
            self.measured.map_or(0, |measured| measured.used_bytes.saturating_sub(measured.held_bytes));
        let (largest_hole, hole_count) = self.open_shared().fold((0, 0), |(largest, count), (_, segment)| {
            (segment.ranges.largest_free().max(largest), count + segment.ranges.hole_count() as u64)
        });
        let open = self.room_without_spare() + (pool_free - self.spare_bytes());
        Usage {
            allocated_bytes: self.allocated,
            reserved_bytes: self.reserved,
            pool_free_bytes: pool_free,
            foreign_bytes: foreign,
            used_bytes: self.held + foreign,
            available_bytes: if self.lost { 0 } else { open },
            largest_free_bytes: if self.lost { 0 } else { largest_hole.max(self.largest_new()) },
            limit_bytes: self.limit(),
            allocation_count: self.allocation_count,
            hole_count,
            segment_count: self.segments.len() as u64,
        }
    }
}
