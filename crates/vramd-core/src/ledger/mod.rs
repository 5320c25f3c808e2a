//! The ledger: devices, segments, blocks, allocations, leases and reservations; who holds which byte.
//!
//! It decides and keeps the books; it touches no memory. A decision that needs the device comes back as [`Work`],
//! and its outcome is told by [`Ledger::segment_created`], [`Ledger::segment_failed`], [`Ledger::released`] or
//! [`Ledger::destroyed`]. A reservation is taken at once, so that two requests never count the same byte.
//!
//! Small blocks of one owner and of about one size share segments; larger ones get their own. The last empty shared
//! segment stays as a spare, if nobody ever touched it, so that small allocations do not go to the driver each time.
//! How a block gets another place is in [`moves`], what requests lack and have kept for them in [`room`],
//! what owners and purposes may have in [`limits`], room that others fill in [`reservations`].

mod allocation;
mod book;
mod limits;
mod moves;
mod plans;
mod reservations;
mod room;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use vramd_api::{AllocationId, DeviceId, Holder, LeaseId, OwnerName, Placement};

pub use allocation::{Allocation, Lease, Request, Room, State, Task};
use book::{Book, Key, Segment, SegmentState, Sharing};
pub use book::{DeviceFacts, Measured, Usage};
pub use limits::Limits;
pub use moves::{Fixed, Group, Place as NewPlace};

use crate::placement::{self, Offer, Standing};
use crate::ranges::Ranges;
use crate::{Now, Tick};

/// Blocks up to this size share segments with others as small.
pub const SMALL_BYTES: u64 = 64 << 10;
/// Blocks up to this size share segments with others between.
pub const MEDIUM_BYTES: u64 = 1 << 20;
/// The size of a shared segment.
pub const SHARED_SEGMENT_BYTES: u64 = 4 << 20;
/// Blocks in shared segments are multiples of this.
pub const BLOCK_QUANTUM: u64 = 256;

/// Names one segment; counted up, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u64);

/// What a device has to do for a decision to come true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Destroy `first`, if given, then create a segment. The books have forgotten `first` already: its bytes are the
    /// new segment's.
    Create { device: DeviceId, segment: SegmentId, bytes: u64, sealed: bool, first: Option<SegmentId> },
    /// Zero a block of a shared segment, before it is free again.
    Zero { device: DeviceId, segment: SegmentId, offset: u64, bytes: u64, allocation: AllocationId },
    /// Nothing: nobody has ever seen the block's segment, so it is still zero, or it is only room. Its bytes are free at once.
    Free { allocation: AllocationId },
    /// Give the segment of an allocation back, once those who had it attached have it mapped no more.
    Release { device: DeviceId, segment: SegmentId, allocation: AllocationId, seen_by: Vec<Holder> },
    /// Give an empty segment back.
    Destroy { device: DeviceId, segment: SegmentId },
}

/// A request that was admitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Grant {
    pub device: DeviceId,
    pub placement: Placement,
    pub readiness: Readiness,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Its segment is live: activate it.
    Ready,
    /// It may be activated; the spare segment, whose bytes it counts on, is given back by this work.
    ReadyAfter(Work),
    /// It waits for its segment, which this work makes.
    Needs(Work),
    /// It waits for a segment that is under way.
    Waits,
}

/// A request that was not admitted, with the figures of the device that came closest.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortage {
    /// The device that came closest, which the figures are of.
    pub closest: Option<DeviceId>,
    pub requested_bytes: u64,
    pub available_bytes: u64,
    pub largest_free_bytes: u64,
    /// What one block could get if all went that may go for it. What that is, these books do not say: until the caller adds it, as
    /// much as now.
    pub largest_after_eviction_bytes: u64,
    /// What one block could get if the shared segments of one device were packed, at most; of all that it may go to.
    pub largest_after_compaction_bytes: u64,
    /// The device to pack for it, if that helps.
    pub pack: Option<DeviceId>,
    /// Who holds the rest, largest first, five at most.
    pub holders: Vec<(OwnerName, u64)>,
    pub placement: Placement,
    /// It would fit on some device, were that empty.
    pub could_fit: bool,
    /// Every device that was asked for is lost.
    pub lost: bool,
    /// The limit of an owner or a purpose that is in its way, in words.
    pub limited_by: Option<String>,
}

/// What came of a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// This gives the bytes back.
    Work(Work),
    /// It goes as soon as the operations that are at work on it have ended.
    Later,
    NotActive,
}

/// A release that was refused: processes are attached.
#[derive(Debug, Clone, PartialEq)]
pub struct InUse {
    pub holders: Vec<Holder>,
}

/// All allocations by id; a clone is a cheap snapshot that does not change.
pub type Allocations = OrdMap<AllocationId, Arc<Allocation>>;

/// All books.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    books: BTreeMap<DeviceId, Book>,
    allocations: Allocations,
    leases: BTreeMap<LeaseId, AllocationId>,
    deadlines: BTreeSet<(Tick, LeaseId)>,
    last_segment: u64,
    /// Room that is kept for those who wait.
    claims: BTreeMap<AllocationId, (DeviceId, u64)>,
}

impl Ledger {
    pub fn add_device(&mut self, facts: DeviceFacts) {
        self.books.insert(facts.device.clone(), Book::new(facts));
    }

    pub fn devices(&self) -> impl Iterator<Item = &DeviceFacts> {
        self.books.values().map(|book| &book.facts)
    }

    pub fn allocations(&self) -> &Allocations {
        &self.allocations
    }

    pub fn allocation(&self, id: AllocationId) -> Option<&Allocation> {
        self.allocations.get(&id).map(AsRef::as_ref)
    }

    /// The size of the segment that an allocation lies in.
    pub fn segment_bytes(&self, id: AllocationId) -> Option<u64> {
        let allocation = self.allocations.get(&id)?;
        let segment = self.books.get(&allocation.device)?.segments.get(&allocation.segment)?;
        Some(segment.ranges.bytes())
    }

    pub fn usage(&self, device: &DeviceId) -> Option<Usage> {
        self.books.get(device).map(Book::usage)
    }

    /// Takes a measurement in.
    pub fn observe(&mut self, device: &DeviceId, measured: Measured) {
        if let Some(book) = self.books.get_mut(device) {
            book.measured = Some(measured);
        }
    }

    pub fn is_lost(&self, device: &DeviceId) -> bool {
        self.books.get(device).is_some_and(|book| book.lost)
    }

    /// Nothing is given out on it any more; what is there can still be released. True if that is news.
    pub fn lose(&mut self, device: &DeviceId) -> bool {
        self.books.get_mut(device).is_some_and(|book| !std::mem::replace(&mut book.lost, true))
    }

    /// Whether a lost device has nothing of ours any more, so that it may be given out again if it is back.
    pub fn is_closed(&self, device: &DeviceId) -> bool {
        self.books.get(device).is_some_and(|book| book.lost && book.segments.is_empty())
    }

    /// A lost device is back: its books begin anew. False if they are not closed.
    pub fn regain(&mut self, device: &DeviceId) -> bool {
        let closed = self.is_closed(device);
        if let Some(book) = self.books.get_mut(device).filter(|_| closed) {
            book.lost = false;
            book.measured = None;
        }
        closed
    }

    /// How the devices stand towards `request`, in order of their ids: those of `on`, or all if it is empty.
    pub fn offers(&self, request: &Request, on: &[DeviceId]) -> Vec<Offer> {
        self.books
            .values()
            .filter(|book| on.is_empty() || on.contains(&book.facts.device))
            .map(|book| {
                let usage = book.usage();
                let standing = if book.lost {
                    Standing::Lost
                } else if self.find(book, request).is_some() {
                    Standing::Fits
                } else {
                    Standing::NotEnoughMemory
                };
                let used_after = usage.used_bytes.saturating_add(request.size_bytes);
                let (open, largest) = book.open_to(Key::of(request).as_ref());
                let available_bytes = open.saturating_sub(self.standing(book, &[request], false).kept);
                let largest_free_bytes = largest.min(available_bytes);
                Offer {
                    device: book.facts.device.clone(),
                    memory_type: book.facts.memory_type,
                    available_bytes,
                    largest_free_bytes,
                    used_after: used_after as f64 / book.facts.total_bytes.max(1) as f64,
                    standing,
                }
            })
            .collect()
    }

    /// Admits a request, on one of `on` (all devices if it is empty), or says why not. An admitted request has
    /// its bytes from now on, as a reservation.
    pub fn reserve(&mut self, request: Request, on: &[DeviceId], now: Now) -> Result<Grant, Box<Shortage>> {
        let offers = self.offers(&request, on);
        let (chosen, placement) = placement::choose(&offers, request.allocation_type, request.memory_type);
        let found = chosen.and_then(|device| {
            let place = self.find(self.books.get(&device)?, &request)?;
            Some((device, place))
        });
        let Some((device, place)) = found else {
            return Err(Box::new(self.shortage(&request, &offers, placement)));
        };
        let readiness = self.put(request, &device, place, now);
        Ok(Grant { device, placement, readiness })
    }

    /// Admits all of `requests` on one device of `on` (all if it is empty); None, and nothing has changed, if they do not all fit
    /// on any.
    pub fn reserve_all(
        &mut self,
        requests: &[Request],
        on: &[DeviceId],
        now: Now,
    ) -> Option<Vec<(AllocationId, Grant)>> {
        if let [only] = requests {
            return Some(vec![(only.id, self.reserve(only.clone(), on, now).ok()?)]);
        }
        // Whatever has to have a segment of its own first: the small ones find their places beside it.
        let mut order: Vec<&Request> = requests.iter().collect();
        order.sort_by_key(|request| std::cmp::Reverse(request.size_bytes));
        let largest = *order.first()?;
        let mut offers = self.offers(largest, on);
        loop {
            let (device, _) = placement::choose(&offers, largest.allocation_type, largest.memory_type);
            let device = device?;
            let mut trial = self.clone();
            let grants: Option<BTreeMap<_, _>> = order
                .iter()
                .map(|request| {
                    let grant = trial.reserve((*request).clone(), std::slice::from_ref(&device), now);
                    Some((request.id, grant.ok()?))
                })
                .collect();
            if let Some(mut grants) = grants {
                *self = trial;
                let granted = |request: &Request| Some((request.id, grants.remove(&request.id)?));
                return requests.iter().map(granted).collect();
            }
            offers.retain(|offer| offer.device != device);
        }
    }

    /// Why `request` cannot be admitted now, in figures.
    pub fn refusal(&self, request: &Request, on: &[DeviceId]) -> Shortage {
        let offers = self.offers(request, on);
        let (_, placement) = placement::choose(&offers, request.allocation_type, request.memory_type);
        self.shortage(request, &offers, placement)
    }

    /// Whether waiting can help: some device that `request` may go to could hold it, were it empty and without a
    /// limit, which may be raised meanwhile.
    pub fn could_fit(&self, request: &Request, on: &[DeviceId]) -> bool {
        self.candidates(request, on).any(|book| {
            !book.lost
                && segment_bytes(request.size_bytes, book)
                    <= book.facts.total_bytes.min(largest(request, book))
                && Self::may_ever(book, std::slice::from_ref(request))
        })
    }

    /// The devices that `request` may go to, lost ones too.
    pub fn devices_for(&self, request: &Request, on: &[DeviceId]) -> Vec<DeviceId> {
        self.candidates(request, on).map(|book| book.facts.device.clone()).collect()
    }

    fn candidates(&self, request: &Request, on: &[DeviceId]) -> impl Iterator<Item = &Book> {
        self.books
            .values()
            .filter(|book| on.is_empty() || on.contains(&book.facts.device))
            .filter(|book| request.memory_type.is_none_or(|wanted| wanted == book.facts.memory_type))
    }

    fn find(&self, book: &Book, request: &Request) -> Option<Place> {
        let standing = self.standing(book, &[request], false);
        if book.lost || standing.above > 0 || standing.above_models > 0 {
            return None;
        }
        let room = book.room().saturating_sub(standing.kept);
        let room_without_spare = book.room_without_spare().saturating_sub(standing.kept);
        let block = request.size_bytes.checked_next_multiple_of(BLOCK_QUANTUM)?;
        if let Some(key) = Key::of(request) {
            let fitting = book.open_shared(&key).find_map(|(id, segment)| {
                let offset = segment.ranges.find(block, request.alignment)?;
                Some(Place::In { segment: id, offset, block })
            });
            if fitting.is_some() {
                return fitting;
            }
            // The spare was not made to be sealed.
            if let Some(spare) = book.spare.filter(|_| !request.sealed) {
                return Some(Place::In { segment: spare, offset: 0, block });
            }
            let shared = SHARED_SEGMENT_BYTES.next_multiple_of(book.facts.granularity_bytes);
            if shared <= room {
                return Some(Place::New { bytes: shared, block, key: Some(key), first: None });
            }
            if shared <= room_without_spare {
                return Some(Place::New { bytes: shared, block, key: Some(key), first: book.spare });
            }
        }
        let bytes = segment_bytes(request.size_bytes, book);
        if bytes > largest(request, book) {
            None
        } else if bytes <= room {
            Some(Place::New { bytes, block: bytes, key: None, first: None })
        } else if bytes <= room_without_spare {
            Some(Place::New { bytes, block: bytes, key: None, first: book.spare })
        } else {
            None
        }
    }

    fn put(&mut self, request: Request, device: &DeviceId, place: Place, now: Now) -> Readiness {
        let book = self.books.get_mut(device).expect("the place was found in this book");
        let (segment_id, offset, block_bytes, readiness) = match place {
            Place::In { segment: id, offset, block } => {
                let taken = book.change(id, |ranges| ranges.take_at(offset, block));
                assert_eq!(taken, Some(true), "the place that was found is there");
                if book.spare == Some(id) {
                    let key = Key::of(&request).expect("only blocks that share segments take the spare");
                    book.set_sharing(id, Sharing::Shared(key));
                }
                let segment = book.segments.get_mut(&id).expect("the place was found in this segment");
                let ready = segment.state == SegmentState::Live;
                if !ready {
                    segment.waiting.push(request.id);
                }
                (id, offset, block, if ready { Readiness::Ready } else { Readiness::Waits })
            }
            Place::New { bytes, block, key, first } => {
                let is_room = request.room.is_some();
                self.last_segment += 1;
                let id = SegmentId(self.last_segment);
                let mut ranges = Ranges::new(bytes);
                let offset =
                    ranges.take(block, request.alignment).expect("a new segment has room for its block");
                let segment = Segment {
                    state: if is_room { SegmentState::Live } else { SegmentState::Creating },
                    sharing: key.map_or(Sharing::Exclusive, Sharing::Shared),
                    ranges,
                    touched: false,
                    waiting: if is_room { Vec::new() } else { vec![request.id] },
                    leaving: false,
                };
                book.insert(id, segment);
                let readiness = if is_room {
                    first.map_or(Readiness::Ready, |spare| Readiness::ReadyAfter(book.end_spare(spare)))
                } else {
                    if let Some(first) = first {
                        book.remove(first);
                    }
                    let (device, sealed) = (device.clone(), request.sealed);
                    Readiness::Needs(Work::Create { device, segment: id, bytes, sealed, first })
                };
                (id, offset, block, readiness)
            }
        };
        book.reserved += block_bytes;
        let allocation = Allocation {
            device: device.clone(),
            segment: segment_id,
            offset,
            block_bytes,
            state: State::Reserved,
            leases: BTreeMap::new(),
            created_at: now.wall,
            history: std::collections::VecDeque::new(),
            writes: 0,
            seen_by: std::collections::VecDeque::new(),
            place_of: None,
            request,
        };
        self.allocations.insert(allocation.request.id, Arc::new(allocation));
        readiness
    }

    fn shortage(&self, request: &Request, offers: &[Offer], placement: Placement) -> Shortage {
        let wanted = |offer: &&Offer| request.memory_type.is_none_or(|wanted| wanted == offer.memory_type);
        let closest = offers.iter().filter(wanted).max_by_key(|offer| offer.largest_free_bytes);
        let mut holders: BTreeMap<OwnerName, u64> = BTreeMap::new();
        for allocation in self.allocations.values() {
            if closest.is_some_and(|offer| offer.device == allocation.device) {
                *holders.entry(allocation.request.owner.clone()).or_default() += allocation.block_bytes;
            }
        }
        let mut holders: Vec<_> = holders.into_iter().collect();
        holders.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        holders.truncate(5);
        let largest = closest.map_or(0, |offer| offer.largest_free_bytes);
        let on: Vec<_> = offers.iter().map(|offer| offer.device.clone()).collect();
        let packed = offers
            .iter()
            .filter(wanted)
            .map(|offer| (self.largest_after_compaction(&offer.device), offer))
            .max_by_key(|(largest, _)| *largest);
        let helps = |(after, offer): &(u64, &Offer)| {
            (offer.largest_free_bytes..*after).contains(&(request.size_bytes - 1))
        };
        Shortage {
            closest: closest.map(|offer| offer.device.clone()),
            requested_bytes: request.size_bytes,
            available_bytes: closest.map_or(0, |offer| offer.available_bytes),
            largest_free_bytes: largest,
            largest_after_eviction_bytes: largest,
            largest_after_compaction_bytes: packed.map_or(0, |(largest, _)| largest),
            pack: packed.filter(helps).map(|(_, offer)| offer.device.clone()),
            holders,
            placement,
            could_fit: self.could_fit(request, &on),
            limited_by: self.candidates(request, &on).find_map(|book| self.limited_by(book, request)),
            lost: closest.is_some() && offers.iter().filter(wanted).all(|o| o.standing == Standing::Lost),
        }
    }

    /// The device made a segment. Answers the reservations that waited for it.
    pub fn segment_created(&mut self, device: &DeviceId, id: SegmentId) -> Vec<AllocationId> {
        let Some(book) = self.books.get_mut(device) else { return Vec::new() };
        let Some(segment) = book.segments.get_mut(&id) else { return Vec::new() };
        segment.state = SegmentState::Live;
        std::mem::take(&mut segment.waiting)
    }

    /// The device could not make a segment. Its reservations are gone; answers them.
    pub fn segment_failed(&mut self, device: &DeviceId, id: SegmentId) -> Vec<AllocationId> {
        let Some(book) = self.books.get_mut(device) else { return Vec::new() };
        let Some(segment) = book.remove(id) else { return Vec::new() };
        for allocation in segment.waiting.iter().filter_map(|id| self.allocations.remove(id)) {
            book.reserved -= allocation.block_bytes;
        }
        segment.waiting
    }

    /// A reservation becomes an allocation, kept by its first lease.
    pub fn activate(&mut self, id: AllocationId, lease_id: LeaseId, lease: Lease, now: Now) {
        let Some(allocation) = self.allocations.get_mut(&id).map(Arc::make_mut) else { return };
        debug_assert_eq!(allocation.state, State::Reserved);
        allocation.state = State::Active;
        allocation.created_at = now.wall;
        allocation.note(now, format!("created on {}", allocation.device));
        let (device, block) = (allocation.device.clone(), allocation.block_bytes);
        let is_room = allocation.request.room.is_some();
        if let Some(book) = self.books.get_mut(&device) {
            if !is_room {
                book.reserved -= block;
                book.allocated += block;
            }
            book.allocation_count += 1;
        }
        self.grant(id, lease_id, lease, now);
    }

    /// Adds a lease to an active allocation; false if it is not active.
    pub fn grant(&mut self, id: AllocationId, lease_id: LeaseId, lease: Lease, now: Now) -> bool {
        let Some(allocation) = self.allocations.get_mut(&id).map(Arc::make_mut) else { return false };
        if allocation.state != State::Active {
            return false;
        }
        if let Lease::Connection { holder, .. } = &lease {
            allocation.note(now, format!("attached by {} ({})", holder.command, holder.pid));
            allocation.seen(holder);
        }
        allocation.writes += u64::from(lease.writes());
        if !matches!(lease, Lease::TimeToLive { .. } | Lease::Persistent) {
            let book = self.books.get_mut(&allocation.device);
            if let Some(segment) = book.and_then(|book| book.segments.get_mut(&allocation.segment)) {
                segment.touched = true;
            }
        }
        self.deadlines.extend(lease.deadline().map(|deadline| (deadline, lease_id)));
        allocation.leases.insert(lease_id, lease);
        self.leases.insert(lease_id, id);
        true
    }

    /// Renews the time to live of an allocation; None if it has no such lease. Without `seconds` it gets its old
    /// length again.
    pub fn renew(&mut self, id: AllocationId, seconds: Option<u64>, now: Now) -> Option<()> {
        let allocation = Arc::make_mut(self.allocations.get_mut(&id)?);
        if allocation.state != State::Active {
            return None;
        }
        let (lease_id, old) =
            allocation.leases.iter_mut().find(|(_, lease)| matches!(lease, Lease::TimeToLive { .. }))?;
        let Lease::TimeToLive { seconds: before, deadline, .. } = *old else { return None };
        let renewed = Lease::time_to_live(seconds.unwrap_or(before), now);
        self.deadlines.remove(&(deadline, *lease_id));
        self.deadlines.extend(renewed.deadline().map(|deadline| (deadline, *lease_id)));
        *old = renewed;
        allocation.note(now, "lease renewed");
        Some(())
    }

    /// A lease ended. If it was the last, its allocation is released by the work that comes back.
    pub fn end_lease(&mut self, lease_id: LeaseId, now: Now) -> Option<(AllocationId, Option<Work>)> {
        let id = self.leases.remove(&lease_id)?;
        let allocation = Arc::make_mut(self.allocations.get_mut(&id)?);
        let lease = allocation.leases.remove(&lease_id)?;
        if let Some(deadline) = lease.deadline() {
            self.deadlines.remove(&(deadline, lease_id));
        }
        match &lease {
            Lease::Connection { holder, .. } => {
                allocation.note(now, format!("detached by {} ({})", holder.command, holder.pid));
            }
            Lease::TimeToLive { .. } => allocation.note(now, "lease ended"),
            Lease::Persistent | Lease::Model | Lease::Operation { .. } => {}
        }
        let last = allocation.leases.is_empty() && allocation.state == State::Active;
        Some((id, last.then(|| self.start_release(id, now)).flatten()))
    }

    /// The leases that have ended by themselves.
    pub fn expired(&self, tick: Tick) -> Vec<LeaseId> {
        self.deadlines.iter().take_while(|(deadline, _)| *deadline <= tick).map(|(_, lease)| *lease).collect()
    }

    /// Releases an active allocation, whatever lease it has, unless a process is attached. What an operation is at
    /// work on goes when that ends.
    pub fn release(&mut self, id: AllocationId, now: Now) -> Result<Release, InUse> {
        let Some(allocation) = self.allocation(id).filter(|found| found.state == State::Active) else {
            return Ok(Release::NotActive);
        };
        if allocation.is_attached() {
            return Err(InUse { holders: allocation.holders().cloned().collect() });
        }
        if allocation.tasks().next().is_none() {
            return Ok(self.start_release(id, now).map_or(Release::NotActive, Release::Work));
        }
        let kept = allocation.leases.iter().filter(|(_, lease)| !matches!(lease, Lease::Operation { .. }));
        for lease in kept.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end_lease(lease, now);
        }
        Ok(Release::Later)
    }

    fn start_release(&mut self, id: AllocationId, now: Now) -> Option<Work> {
        let allocation = Arc::make_mut(self.allocations.get_mut(&id)?);
        allocation.state = State::Releasing;
        allocation.note(now, "releasing");
        for (lease_id, lease) in std::mem::take(&mut allocation.leases) {
            self.leases.remove(&lease_id);
            if let Some(deadline) = lease.deadline() {
                self.deadlines.remove(&(deadline, lease_id));
            }
        }
        let book = self.books.get_mut(&allocation.device)?;
        if book.segments.get(&allocation.segment)?.sharing == Sharing::Exclusive {
            book.destroy(allocation.segment);
        }
        self.release_work(id)
    }

    /// What gives the bytes of a releasing allocation back; again, if the device failed at it.
    pub fn release_work(&self, id: AllocationId) -> Option<Work> {
        let allocation = self.allocation(id).filter(|allocation| allocation.state == State::Releasing)?;
        let segment = self.books.get(&allocation.device)?.segments.get(&allocation.segment)?;
        let (device, segment_id) = (allocation.device.clone(), allocation.segment);
        Some(if allocation.request.room.is_some() {
            Work::Free { allocation: id }
        } else if segment.sharing == Sharing::Exclusive {
            let seen_by = allocation.seen_by.iter().cloned().collect();
            Work::Release { device, segment: segment_id, allocation: id, seen_by }
        } else if segment.touched && segment.state != SegmentState::Destroying {
            let (offset, bytes) = (allocation.offset, allocation.block_bytes);
            Work::Zero { device, segment: segment_id, offset, bytes, allocation: id }
        } else {
            Work::Free { allocation: id }
        })
    }

    /// The device is done with an allocation's bytes; they are free. Answers the allocation, and what is left to
    /// do when its segment is empty now.
    pub fn released(&mut self, id: AllocationId) -> Option<(Arc<Allocation>, Option<Work>)> {
        let allocation = self.allocations.remove(&id)?;
        let book = self.books.get_mut(&allocation.device)?;
        if let Some(room) = &allocation.request.room {
            book.reserved -= allocation.block_bytes;
            book.filled -= room.used_bytes;
        } else {
            book.allocated -= allocation.block_bytes;
        }
        book.allocation_count -= 1;
        let segment = book.segments.get_mut(&allocation.segment)?;
        if segment.sharing == Sharing::Exclusive {
            book.remove(allocation.segment);
            return Some((allocation, None));
        }
        let (touched, goes) = (segment.touched, segment.state == SegmentState::Destroying);
        let (offset, bytes) = (allocation.offset, allocation.block_bytes);
        let empty = book.change(allocation.segment, |ranges| {
            ranges.give(offset, bytes);
            ranges.is_empty()
        })?;
        if !empty {
            return Some((allocation, None));
        }
        if book.spare.is_none() && !touched && !goes && !book.lost {
            book.set_sharing(allocation.segment, Sharing::Spare);
            return Some((allocation, None));
        }
        if !goes {
            book.destroy(allocation.segment);
        }
        let work = Work::Destroy { device: allocation.device.clone(), segment: allocation.segment };
        Some((allocation, Some(work)))
    }

    /// The empty segment that is kept for the next small block, and its size.
    pub fn spare(&self, device: &DeviceId) -> Option<(SegmentId, u64)> {
        let book = self.books.get(device)?;
        let id = book.spare?;
        Some((id, book.segments.get(&id)?.ranges.bytes()))
    }

    /// Gives the spare segment back, if it still is one.
    pub fn release_spare(&mut self, device: &DeviceId, id: SegmentId) -> Option<Work> {
        let book = self.books.get_mut(device).filter(|book| book.spare == Some(id))?;
        Some(book.end_spare(id))
    }

    /// A spare that was to go before another segment came ([`Work::Create`]) did not: it is in the books again, on its way out.
    pub fn not_destroyed(&mut self, device: &DeviceId, id: SegmentId) {
        let Some(book) = self.books.get_mut(device) else { return };
        let segment = Segment {
            state: SegmentState::Live,
            sharing: Sharing::Exclusive,
            ranges: Ranges::new(SHARED_SEGMENT_BYTES.next_multiple_of(book.facts.granularity_bytes)),
            touched: false,
            waiting: Vec::new(),
            leaving: false,
        };
        book.insert(id, segment);
        book.destroy(id);
    }

    /// An empty segment is gone.
    pub fn destroyed(&mut self, device: &DeviceId, id: SegmentId) {
        if let Some(book) = self.books.get_mut(device) {
            book.remove(id);
        }
    }

    /// Adds everything up anew and compares. An error names the first sum that is wrong.
    pub fn check(&self) -> Result<(), String> {
        let mut blocks: BTreeMap<(&DeviceId, SegmentId), Vec<(u64, u64)>> = BTreeMap::new();
        let mut sums: BTreeMap<&DeviceId, (u64, u64, u64, u64)> = BTreeMap::new();
        let mut lease_count = 0;
        for allocation in self.allocations.values() {
            let sum = sums.entry(&allocation.device).or_default();
            match (&allocation.request.room, allocation.state) {
                (Some(room), _) => {
                    sum.1 += allocation.block_bytes;
                    sum.3 += room.used_bytes;
                }
                (None, State::Reserved) => sum.1 += allocation.block_bytes,
                (None, State::Active | State::Releasing) => sum.0 += allocation.block_bytes,
            }
            sum.2 += u64::from(allocation.state != State::Reserved);
            if allocation.state == State::Active && allocation.leases.is_empty() {
                return Err(format!("{} is active and nothing keeps it", allocation.request.id));
            }
            lease_count += allocation.leases.len();
            let place = (&allocation.device, allocation.segment);
            blocks.entry(place).or_default().push((allocation.offset, allocation.block_bytes));
        }
        if lease_count != self.leases.len() {
            return Err(format!("{lease_count} leases are held, {} are indexed", self.leases.len()));
        }
        for (device, book) in &self.books {
            let (allocated, reserved, count, filled) = sums.remove(device).unwrap_or_default();
            let held: u64 = book.segments.values().map(|segment| segment.ranges.bytes()).sum();
            let free: u64 = book.segments.values().map(|segment| segment.ranges.free()).sum();
            let kept = (book.held, book.allocated, book.reserved, book.allocation_count);
            if kept != (held, allocated, reserved, count) || held != allocated + reserved + free {
                return Err(format!(
                    "{device}: kept {kept:?}, counted {:?} and {free} free",
                    (held, allocated, reserved, count)
                ));
            }
            if book.filled != filled {
                return Err(format!("{device}: {filled} bytes of room are filled, {} counted", book.filled));
            }
            book.check().map_err(|wrong| format!("{device}: {wrong}"))?;
            for id in book.segments.keys() {
                let mut ranges = blocks.remove(&(device, *id)).unwrap_or_default();
                ranges.sort_unstable();
                if ranges.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
                    return Err(format!("{device}: two blocks overlap in {id:?}"));
                }
            }
        }
        for (device, book) in &self.books {
            let claimed: u64 =
                self.claims.values().filter(|(on, _)| on == device).map(|(_, bytes)| bytes).sum();
            if claimed != book.claimed {
                return Err(format!("{device}: {claimed} bytes are claimed, {} counted", book.claimed));
            }
        }
        if let Some(((device, segment), _)) = blocks.first_key_value() {
            return Err(format!("{device}: blocks lie in {segment:?}, which is not there"));
        }
        Ok(())
    }
}

/// Where a request would go.
#[derive(Debug, Clone)]
enum Place {
    In { segment: SegmentId, offset: u64, block: u64 },
    New { bytes: u64, block: u64, key: Option<Key>, first: Option<SegmentId> },
}

/// The most that a request may have in one piece. Room is none.
fn largest(request: &Request, book: &Book) -> u64 {
    if request.room.is_some() { u64::MAX } else { book.facts.max_segment_bytes }
}

fn segment_bytes(size: u64, book: &Book) -> u64 {
    size.checked_next_multiple_of(book.facts.granularity_bytes).unwrap_or(u64::MAX)
}
