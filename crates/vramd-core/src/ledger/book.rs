//! The books of one device: its segments, its limit and what was last measured.
//!
//! `held = allocated + reserved + pool free`, where `held` is the sum of all segments.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vramd_api::{AllocationId, Bytes, DeviceId, MemoryType, OwnerName, SetLimits};

use super::{MEDIUM_BYTES, Request, SMALL_BYTES, SegmentId, Work};
use crate::ranges::Ranges;

/// What the ledger has to know of a device; none of it changes.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFacts {
    pub device: DeviceId,
    pub memory_type: MemoryType,
    pub total_bytes: u64,
    /// A segment's size is a multiple of it. A power of two.
    pub granularity_bytes: u64,
    /// A segment is no larger.
    pub max_segment_bytes: u64,
    /// The pages of an importer's mapping: an attached block moves by whole ones. A power of two.
    pub page_bytes: u64,
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
    /// The part of `available_bytes` whose pages were made ahead.
    pub ready_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SegmentState {
    Creating,
    Live,
    Destroying,
}

/// Blocks of about one size share segments, so that a few small ones do not hold a place for a larger one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SizeClass {
    Small,
    Medium,
}

impl SizeClass {
    /// None: a segment of its own.
    pub fn of(bytes: u64) -> Option<Self> {
        match bytes {
            ..=SMALL_BYTES => Some(Self::Small),
            bytes if bytes <= MEDIUM_BYTES => Some(Self::Medium),
            _ => None,
        }
    }
}

/// What blocks in one segment have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// A descriptor shows a whole segment, so owners never share one.
    pub owner: OwnerName,
    pub class: SizeClass,
    /// No importer can ever write to it: models.
    pub sealed: bool,
}

impl Key {
    /// None: a segment of its own, or only room.
    pub fn of(request: &Request) -> Option<Self> {
        if request.room.is_some() {
            return None;
        }
        let class = SizeClass::of(request.size_bytes)?;
        Some(Self { owner: request.owner.clone(), class, sealed: request.sealed })
    }
}

/// Who may have blocks in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sharing {
    /// One block, all of it.
    Exclusive,
    Shared(Key),
    /// Empty and never touched: the next owner takes it over.
    Spare,
}

#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub state: SegmentState,
    pub sharing: Sharing,
    pub ranges: Ranges,
    /// Somebody has seen it, or written to it: its blocks are zeroed before they are given out again.
    pub touched: bool,
    /// The reservations that become allocations when it is live.
    pub waiting: Vec<AllocationId>,
    /// What is in it is about to go.
    pub leaving: bool,
}

/// The figures of one device, derived from its books.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub allocated_bytes: u64,
    pub reserved_bytes: u64,
    pub worker_bytes: u64,
    pub pool_free_bytes: u64,
    pub ready_bytes: u64,
    pub foreign_bytes: u64,
    pub used_bytes: u64,
    pub available_bytes: u64,
    pub largest_free_bytes: u64,
    /// The largest new segment.
    pub largest_new_bytes: u64,
    pub limit_bytes: u64,
    pub allocation_count: u64,
    pub hole_count: u64,
    pub segment_count: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Book {
    pub facts: DeviceFacts,
    pub limits: Arc<SetLimits>,
    pub lost: bool,
    pub measured: Option<Measured>,
    pub segments: BTreeMap<SegmentId, Segment>,
    /// Those that hold several blocks.
    pub shared: BTreeMap<Key, BTreeSet<SegmentId>>,
    /// The holes of all segments, and the largest of each: (bytes, segment).
    hole_count: u64,
    largest: BTreeSet<(u64, SegmentId)>,
    /// The sum of all segments.
    pub held: u64,
    /// The sum of active and releasing blocks.
    pub allocated: u64,
    /// The sum of reserved blocks, and of room that others fill.
    pub reserved: u64,
    /// What they have filled of it: not ours, but charged to them already.
    pub filled: u64,
    /// What workers were last measured to have beside that and what they have attached.
    pub workers: u64,
    pub allocation_count: u64,
    pub spare: Option<SegmentId>,
    /// Segments on their way back to the device.
    pub destroying: usize,
    /// The room that is kept for those who wait.
    pub claimed: u64,
}

impl Book {
    pub fn new(facts: DeviceFacts) -> Self {
        Self {
            facts,
            limits: Arc::default(),
            lost: false,
            measured: None,
            segments: BTreeMap::new(),
            shared: BTreeMap::new(),
            hole_count: 0,
            largest: BTreeSet::new(),
            held: 0,
            allocated: 0,
            reserved: 0,
            filled: 0,
            workers: 0,
            allocation_count: 0,
            spare: None,
            destroying: 0,
            claimed: 0,
        }
    }

    pub fn limit(&self) -> u64 {
        let set = self.limits.limit_bytes.map(Bytes::get);
        set.unwrap_or(self.facts.limit_bytes).min(self.facts.total_bytes)
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
        if self.lost { 0 } else { self.most().saturating_sub(held.saturating_add(self.claimed)) }
    }

    /// What may be held, by the limit and the last measurement.
    fn most(&self) -> u64 {
        let by_device = self.measured.map_or(u64::MAX, |measured| self.ours_and_free(measured));
        let left = self.limits.reserve_bytes.map_or(0, Bytes::get);
        self.limit().min(by_device.saturating_sub(left))
    }

    /// What is free and what is in our books. What others have filled of their room is in these and is measured as theirs.
    fn ours_and_free(&self, measured: Measured) -> u64 {
        measured.available_bytes.saturating_add(measured.held_bytes).saturating_add(self.filled)
    }

    /// How many bytes have to go before `needed` more can be held, once what is on its way back is there.
    pub fn lacks(&self, needed: u64) -> u64 {
        needed.saturating_add(self.staying()).saturating_add(self.claimed).saturating_sub(self.most())
    }

    /// What can be taken once what is on its way back is there, and `more`.
    pub fn room_with(&self, more: u64) -> u64 {
        let held = self.staying().saturating_add(self.claimed);
        if self.lost { 0 } else { self.most().saturating_add(more).saturating_sub(held).min(self.limit()) }
    }

    /// Whether a segment is on its way back.
    pub fn goes(&self, id: SegmentId) -> bool {
        let segment = self.segments.get(&id);
        segment.is_some_and(|one| one.leaving || one.state == SegmentState::Destroying)
    }

    /// What is held once what is on its way back is there.
    pub fn staying(&self) -> u64 {
        self.held - self.spare_bytes() - self.returning()
    }

    fn returning(&self) -> u64 {
        let goes = |one: &&Segment| one.leaving || one.state == SegmentState::Destroying;
        self.segments.values().filter(goes).map(|segment| segment.ranges.bytes()).sum()
    }

    pub fn free_bytes(&self) -> u64 {
        let most = self.measured.map_or(self.facts.total_bytes, |measured| self.ours_and_free(measured));
        most.saturating_sub(self.held - self.returning())
    }

    fn spare_bytes(&self) -> u64 {
        self.spare.and_then(|id| self.segments.get(&id)).map_or(0, |segment| segment.ranges.bytes())
    }

    /// Enters a segment.
    pub fn insert(&mut self, id: SegmentId, segment: Segment) {
        self.held += segment.ranges.bytes();
        self.share(id, &segment.sharing);
        self.segments.insert(id, segment);
        self.count(id, true);
    }

    /// Takes a segment out of the books.
    pub fn remove(&mut self, id: SegmentId) -> Option<Segment> {
        self.count(id, false);
        let segment = self.segments.remove(&id)?;
        self.held -= segment.ranges.bytes();
        self.destroying -= usize::from(segment.state == SegmentState::Destroying);
        self.unshare(id, &segment.sharing);
        Some(segment)
    }

    /// Changes what a segment has free.
    pub fn change<T>(&mut self, id: SegmentId, change: impl FnOnce(&mut Ranges) -> T) -> Option<T> {
        self.count(id, false);
        let changed = self.segments.get_mut(&id).map(|segment| change(&mut segment.ranges));
        self.count(id, true);
        changed
    }

    /// Nothing more goes into a segment: it is given back.
    pub fn destroy(&mut self, id: SegmentId) {
        self.count(id, false);
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.state = SegmentState::Destroying;
            self.destroying += 1;
        }
    }

    /// The spare goes.
    pub fn end_spare(&mut self, id: SegmentId) -> Work {
        self.set_sharing(id, Sharing::Exclusive);
        self.destroy(id);
        Work::Destroy { device: self.facts.device.clone(), segment: id }
    }

    /// Changes who may have blocks in a segment.
    pub fn set_sharing(&mut self, id: SegmentId, sharing: Sharing) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        let before = std::mem::replace(&mut segment.sharing, sharing);
        self.unshare(id, &before);
        if let Some(sharing) = self.segments.get(&id).map(|segment| segment.sharing.clone()) {
            self.share(id, &sharing);
        }
    }

    fn share(&mut self, id: SegmentId, sharing: &Sharing) {
        match sharing {
            Sharing::Shared(key) => {
                self.shared.entry(key.clone()).or_default().insert(id);
            }
            Sharing::Spare => self.spare = Some(id),
            Sharing::Exclusive => {}
        }
    }

    fn unshare(&mut self, id: SegmentId, sharing: &Sharing) {
        match sharing {
            Sharing::Shared(key) => {
                if let Some(segments) = self.shared.get_mut(key) {
                    segments.remove(&id);
                    if segments.is_empty() {
                        self.shared.remove(key);
                    }
                }
            }
            Sharing::Spare => self.spare = None,
            Sharing::Exclusive => {}
        }
    }

    /// Takes a segment's holes into the sums, or out of them.
    fn count(&mut self, id: SegmentId, add: bool) {
        // What is on its way out holds nothing that could be given out.
        let open = |segment: &&Segment| segment.state != SegmentState::Destroying;
        let Some(segment) = self.segments.get(&id).filter(open) else { return };
        let (holes, largest) = (segment.ranges.hole_count() as u64, segment.ranges.largest_free());
        if holes == 0 {
            return;
        }
        if add {
            self.hole_count += holes;
            self.largest.insert((largest, id));
        } else {
            self.hole_count -= holes;
            self.largest.remove(&(largest, id));
        }
    }

    /// The segments that blocks of one kind can go into.
    pub fn open_shared(&self, key: &Key) -> impl Iterator<Item = (SegmentId, &Segment)> {
        self.shared
            .get(key)
            .into_iter()
            .flatten()
            .filter_map(|id| self.segments.get(id).map(|segment| (*id, segment)))
            .filter(|(_, segment)| segment.state != SegmentState::Destroying)
    }

    /// The largest new segment that could be made, at the spare's expense if need be.
    fn largest_new(&self) -> u64 {
        self.room_without_spare().min(self.facts.max_segment_bytes) & !(self.facts.granularity_bytes - 1)
    }

    /// What is open to blocks of one kind, in all and in one piece: new segments, and the holes in segments of that kind.
    pub fn open_to(&self, key: Option<&Key>) -> (u64, u64) {
        let own = key.into_iter().flat_map(|key| self.open_shared(key));
        let new = (self.room_without_spare(), self.largest_new());
        own.fold(new, |(free, largest), (_, segment)| {
            (free + segment.ranges.free(), largest.max(segment.ranges.largest_free()))
        })
    }

    /// Adds the indexes up anew.
    pub fn check(&self) -> Result<(), String> {
        let shared = |id: &SegmentId, segment: &Segment| match &segment.sharing {
            Sharing::Shared(key) => self.shared.get(key).is_some_and(|ids| ids.contains(id)),
            Sharing::Spare => self.spare == Some(*id),
            Sharing::Exclusive => self.spare != Some(*id),
        };
        let listed: usize = self.shared.values().map(BTreeSet::len).sum();
        let sharing = self.segments.values().filter(|one| matches!(one.sharing, Sharing::Shared(_))).count();
        if listed != sharing || !self.segments.iter().all(|(id, segment)| shared(id, segment)) {
            return Err("the index of shared segments is wrong".to_owned());
        }
        let with_holes = || {
            let open = |segment: &Segment| segment.state != SegmentState::Destroying;
            self.segments.iter().filter(move |(_, one)| open(one) && one.ranges.hole_count() > 0)
        };
        let holes: u64 = with_holes().map(|(_, segment)| segment.ranges.hole_count() as u64).sum();
        let largest: BTreeSet<_> =
            with_holes().map(|(id, segment)| (segment.ranges.largest_free(), *id)).collect();
        let destroying = self.segments.values().filter(|one| one.state == SegmentState::Destroying).count();
        if destroying != self.destroying {
            return Err(format!("{destroying} segments are on their way back, {} counted", self.destroying));
        }
        if (holes, &largest) != (self.hole_count, &self.largest) {
            return Err("the sums of the holes are wrong".to_owned());
        }
        Ok(())
    }

    pub fn usage(&self) -> Usage {
        let pool_free = self.held - self.allocated - self.reserved;
        let of_others =
            self.measured.map_or(0, |measured| measured.used_bytes.saturating_sub(measured.held_bytes));
        let foreign = of_others.saturating_sub(self.filled);
        let workers = self.workers.min(foreign);
        let largest_hole = self.largest.last().map_or(0, |(bytes, _)| *bytes);
        let open = self.room_without_spare() + (pool_free - self.spare_bytes());
        Usage {
            allocated_bytes: self.allocated,
            reserved_bytes: self.reserved - self.filled,
            worker_bytes: self.filled + workers,
            pool_free_bytes: pool_free,
            ready_bytes: self.measured.map_or(0, |measured| measured.ready_bytes),
            foreign_bytes: foreign - workers,
            used_bytes: self.held + foreign,
            available_bytes: if self.lost { 0 } else { open },
            largest_free_bytes: if self.lost { 0 } else { largest_hole.max(self.largest_new()) },
            largest_new_bytes: self.largest_new(),
            limit_bytes: self.limit(),
            allocation_count: self.allocation_count,
            hole_count: self.hole_count,
            segment_count: self.segments.len() as u64,
        }
    }
}
