//! Random histories of the ledger against the dullest model that could be right: a list of who holds how much.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use proptest::prelude::*;
use uuid::Uuid;
use vramd_api::attach::Access;
use vramd_api::{
    AllocationId, AllocationType, Bytes, DeviceId, Holder, LeaseId, MemoryType, Priority, SetLimits,
};
use vramd_core::ledger::{
    BLOCK_QUANTUM, DeviceFacts, Lease, Ledger, Measured, NewPlace as Place, Readiness, Release, Request,
    SHARED_SEGMENT_BYTES, SegmentId, State, Task, Work,
};
use vramd_core::{Now, Tick};

pub const GRANULARITY: u64 = 64 << 10;
pub const MIB: u64 = 1 << 20;

pub fn now(tick: u64) -> Now {
    Now { tick: Tick(tick), wall: Timestamp::UNIX_EPOCH }
}

pub fn limit(bytes: Option<u64>) -> SetLimits {
    SetLimits { limit_bytes: bytes.and_then(Bytes::new), ..SetLimits::default() }
}

pub fn device(n: u8) -> DeviceId {
    format!("sim:{n}").parse().unwrap()
}

pub fn facts(n: u8, total_bytes: u64) -> DeviceFacts {
    DeviceFacts {
        device: device(n),
        memory_type: MemoryType::Vram,
        total_bytes,
        granularity_bytes: GRANULARITY,
        max_segment_bytes: u64::MAX,
        page_bytes: 4096,
        limit_bytes: total_bytes,
    }
}

pub fn request(id: u128, size_bytes: u64) -> Request {
    Request {
        id: AllocationId(Uuid::from_u128(id)),
        size_bytes,
        alignment: 256,
        allocation_type: AllocationType::Buffer,
        memory_type: None,
        purpose: String::new(),
        priority: Priority::Normal,
        owner: "one".parse().unwrap(),
        persistent: false,
        generation: 1,
        sealed: false,
        room: None,
    }
}

/// The lease of a process that is attached.
fn attached(access: Access, moves: bool) -> Lease {
    Lease::Connection { holder: Holder { pid: 1, uid: 1, command: "python".into() }, access, moves }
}

fn reader() -> Lease {
    attached(Access::Read, true)
}

/// What the model remembers of an allocation.
#[derive(Debug, Clone)]
struct Held {
    device: DeviceId,
    size: u64,
    leases: BTreeSet<LeaseId>,
    active: bool,
}

/// A move under way: the block, its other place, and the leases that the operation has on both.
#[derive(Debug, Clone, Copy)]
struct Moving {
    id: AllocationId,
    place: AllocationId,
    lease: LeaseId,
    /// None until the place is there.
    place_lease: Option<LeaseId>,
    writes: u64,
}

/// A ledger, its model, and a device that does its work in any order.
pub struct World {
    pub ledger: Ledger,
    held: BTreeMap<AllocationId, Held>,
    moves: Vec<Moving>,
    work: Vec<Work>,
    next: u128,
    tick: u64,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Reserve {
        size: u64,
        alignment: u32,
        owner: bool,
        sealed: bool,
        room: bool,
        on: Option<u8>,
    },
    /// A process has filled so much of its room by the time the device is measured.
    Fill {
        which: usize,
        bytes: u64,
    },
    /// The device does one piece of its work, well or badly.
    Work {
        which: usize,
        fails: bool,
    },
    Attach {
        which: usize,
        writes: bool,
        moves: bool,
    },
    /// A block begins to move: to a hole of its own device, or to any place on `on`.
    Move {
        which: usize,
        on: Option<u8>,
        hole: usize,
    },
    /// The bytes of a move were copied; the readers that do not `follow` keep the old ones.
    Copied {
        which: usize,
        follow: bool,
    },
    EndLease(usize),
    /// The leases of all that is active in one segment end together.
    Empty(usize),
    Release(usize),
    Expire(u64),
    Limit {
        device: u8,
        mib: Option<u64>,
    },
    Observe {
        device: u8,
        foreign_mib: u64,
    },
    /// The parts of a model, reserved together.
    Parts {
        device: u8,
        sizes: [u64; 3],
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![3 => 1u64..2000, 3 => 1u64..=MIB, 2 => MIB..20 * MIB, 1 => Just(u64::MAX / 2)];
    let step = prop_oneof![
        6 => (size, 0u32..22, any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2), prop::option::of(0u8..2))
            .prop_map(|(size, alignment, owner, sealed, room, on)| {
                Step::Reserve { size, alignment, owner, sealed: sealed && !room, room, on }
            }),
        2 => (any::<usize>(), 0u64..24 * MIB).prop_map(|(which, bytes)| Step::Fill { which, bytes }),
        8 => (any::<usize>(), prop::bool::weighted(0.1)).prop_map(|(which, fails)| Step::Work { which, fails }),
        2 => (any::<usize>(), prop::bool::weighted(0.2), prop::bool::weighted(0.8))
            .prop_map(|(which, writes, moves)| Step::Attach { which, writes, moves }),
        4 => (any::<usize>(), prop::option::of(0u8..2), any::<usize>())
            .prop_map(|(which, on, hole)| Step::Move { which, on, hole }),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(which, follow)| Step::Copied { which, follow }),
        3 => any::<usize>().prop_map(Step::EndLease),
        2 => any::<usize>().prop_map(Step::Empty),
        3 => any::<usize>().prop_map(Step::Release),
        1 => (0u64..3000).prop_map(Step::Expire),
        1 => (0u8..2, prop::option::of(0u64..64)).prop_map(|(device, mib)| Step::Limit { device, mib }),
        1 => (0u8..2, prop::array::uniform3(1u64..8 * MIB)).prop_map(|(device, sizes)| Step::Parts { device, sizes }),
        1 => (0u8..2, 0u64..8).prop_map(|(device, foreign_mib)| Step::Observe { device, foreign_mib }),
    ];
    prop::collection::vec(step, 1..200)
}

impl World {
    pub fn new() -> Self {
        let mut ledger = Ledger::default();
        ledger.add_device(facts(0, 32 * MIB));
        ledger.add_device(facts(1, 16 * MIB));
        Self { ledger, held: BTreeMap::new(), moves: Vec::new(), work: Vec::new(), next: 0, tick: 0 }
    }

    fn lease(&mut self) -> LeaseId {
        self.next += 1;
        LeaseId(Uuid::from_u128(self.next))
    }

    fn pick(&self, which: usize, wanted: impl Fn(&Held) -> bool) -> Option<AllocationId> {
        let ids: Vec<_> = self.held.iter().filter(|(_, held)| wanted(held)).map(|(id, _)| *id).collect();
        (!ids.is_empty()).then(|| ids[which % ids.len()])
    }

    fn activate(&mut self, id: AllocationId) {
        let id_of_lease = self.lease();
        let moving = self.moves.iter_mut().find(|moving| moving.place == id);
        let lease = match moving {
            Some(moving) => {
                moving.place_lease = Some(id_of_lease);
                Lease::Operation { task: Task::Place }
            }
            None => Lease::time_to_live(1, now(self.tick)),
        };
        self.ledger.activate(id, id_of_lease, lease, now(self.tick));
        let held = self.held.get_mut(&id).unwrap();
        held.active = true;
        held.leases.insert(id_of_lease);
    }

    fn proceed(&mut self, id: AllocationId, readiness: Readiness) {
        match readiness {
            Readiness::Ready => self.activate(id),
            Readiness::ReadyAfter(work) => {
                self.work.push(work);
                self.activate(id);
            }
            Readiness::Needs(work) => self.work.push(work),
            Readiness::Waits => {}
        }
    }

    /// An active one whose bytes are the ledger's own, or one that others fill.
    fn pick_active(&self, which: usize, room: bool) -> Option<AllocationId> {
        let kind = |id: &AllocationId| self.ledger.room(*id).is_some() == room;
        let ids: Vec<_> = self.held.iter().filter(|(id, held)| held.active && kind(id)).collect();
        (!ids.is_empty()).then(|| *ids[which % ids.len()].0)
    }

    fn end_lease(&mut self, lease: LeaseId) {
        let (id, work) = self.ledger.end_lease(lease, now(self.tick)).expect("the model knows this lease");
        let held = self.held.get_mut(&id).unwrap();
        assert!(held.leases.remove(&lease), "a lease ended that was not of this allocation");
        assert_eq!(work.is_some(), held.leases.is_empty(), "the last lease releases, and no other");
        held.active = !held.leases.is_empty();
        self.work.extend(work);
    }

    fn of_operation(&self, lease: LeaseId) -> bool {
        self.moves.iter().any(|moving| moving.lease == lease || moving.place_lease == Some(lease))
    }

    fn begin_move(&mut self, id: AllocationId, on: Option<u8>, hole: usize) {
        let allocation = self.ledger.allocation(id).unwrap();
        let (from, writes, size) =
            (allocation.device.clone(), allocation.writes, allocation.request.size_bytes);
        let at = on.is_none().then(|| {
            let groups = self.ledger.groups(&from, |_| None);
            let pools: Vec<_> = groups.iter().flat_map(|group| &group.pools).collect();
            let segment = pools.get(hole % pools.len().max(1))?;
            let offset = (hole as u64 % 64) << 16;
            Some(Place { segment: SegmentId(segment.id), offset })
        });
        let (on, at) = match (on, at) {
            (Some(n), _) => (device(n), None),
            (None, Some(Some(at))) => (from, Some(at)),
            (None, _) => return,
        };
        self.next += 1;
        let place = AllocationId(Uuid::from_u128(self.next));
        let Some(readiness) = self.ledger.reserve_place(place, id, &on, at, now(self.tick)) else { return };
        let lease = self.lease();
        assert!(self.ledger.grant(id, lease, Lease::Operation { task: Task::Move }, now(self.tick)));
        self.held.get_mut(&id).unwrap().leases.insert(lease);
        self.held.insert(place, Held { device: on, size, leases: BTreeSet::new(), active: false });
        self.moves.push(Moving { id, place, lease, place_lease: None, writes });
        self.proceed(place, readiness);
    }

    fn empty(&mut self, id: AllocationId) {
        let place = |id: &AllocationId| {
            let allocation = self.ledger.allocation(*id).unwrap();
            (allocation.device.clone(), allocation.segment)
        };
        let (on, segment) = place(&id);
        let together: Vec<_> =
            self.held.iter().filter(|(id, held)| held.active && place(id) == (on.clone(), segment)).collect();
        let leases: Vec<_> = together.iter().flat_map(|(_, held)| held.leases.iter().copied()).collect();
        let bytes: u64 =
            together.iter().map(|(id, _)| self.ledger.allocation(**id).unwrap().block_bytes).sum();
        let alone = together.iter().all(|(_, held)| held.leases.len() == 1);
        let mut ids: Vec<_> = together.iter().map(|(id, _)| **id).collect();
        if leases.iter().any(|lease| self.of_operation(*lease)) {
            return;
        }
        let whole = self.ledger.holds_only(&on, segment, bytes);
        match self.ledger.empty_segment(&on, segment, &leases, bytes, now(self.tick)) {
            Some(mut emptied) => {
                emptied.sort_unstable();
                ids.sort_unstable();
                assert_eq!(emptied, ids);
                for id in ids {
                    let held = self.held.get_mut(&id).unwrap();
                    (held.active, held.leases) = (false, BTreeSet::new());
                    // Whatever comes between now and then finds no room in that segment.
                    self.work.push(Work::Free { allocation: id });
                }
            }
            None => assert!(!(whole && alone), "nothing but these leases keeps the segment"),
        }
    }

    fn copied(&mut self, moving: Moving, follow: bool) {
        if self.ledger.stale(moving.id, moving.place, moving.writes).is_none() {
            let before = self.ledger.allocation(moving.id).unwrap().clone();
            self.ledger.swap_places(moving.id, moving.place, now(self.tick));
            let after = self.ledger.allocation(moving.id).unwrap();
            assert_eq!(after.request.generation, before.request.generation + 1);
            assert_eq!(after.leases, before.leases, "a move ends no lease");
            if after.is_attached() {
                assert_eq!(after.offset % 4096, before.offset % 4096, "addresses stay");
            }
            let old = self.held[&moving.id].device.clone();
            let new = std::mem::replace(&mut self.held.get_mut(&moving.place).unwrap().device, old);
            self.held.get_mut(&moving.id).unwrap().device = new;
            for (_, lease) in self.ledger.readers(moving.id) {
                if !follow {
                    let kept = self.lease();
                    assert!(self.ledger.grant(moving.place, kept, lease, now(self.tick)));
                    self.held.get_mut(&moving.place).unwrap().leases.insert(kept);
                }
            }
        }
        self.moves.retain(|other| other.place != moving.place);
        self.end_lease(moving.lease);
        self.end_lease(moving.place_lease.unwrap());
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Reserve { size, alignment, owner, sealed, room, on } => {
                self.next += 1;
                let mut request = request(self.next, size);
                request.alignment = 1 << alignment;
                request.owner = if owner { "one" } else { "two" }.parse().unwrap();
                request.sealed = sealed;
                request.room = room.then(Box::default);
                let on: Vec<_> = on.map(device).into_iter().collect();
                let before: Vec<_> = (0..2).map(|n| self.ledger.usage(&device(n)).unwrap()).collect();
                match self.ledger.reserve(request.clone(), &on, now(self.tick)) {
                    Ok(grant) => {
                        let held =
                            Held { device: grant.device, size, leases: BTreeSet::new(), active: false };
                        self.held.insert(request.id, held);
                        self.proceed(request.id, grant.readiness);
                    }
                    Err(shortage) => {
                        let after: Vec<_> = (0..2).map(|n| self.ledger.usage(&device(n)).unwrap()).collect();
                        assert_eq!(before, after, "a refusal changes nothing");
                        assert!(
                            size > shortage.largest_free_bytes || 1 << alignment > BLOCK_QUANTUM,
                            "{size} was refused where {} was free in one piece",
                            shortage.largest_free_bytes
                        );
                    }
                }
            }
            Step::Fill { which, bytes } => {
                if let Some(id) = self.pick_active(which, true) {
                    let place = self.ledger.allocation(id).unwrap();
                    let (on, charged) = (place.device.clone(), place.block_bytes);
                    let before = self.ledger.usage(&on).unwrap();
                    let old = self.ledger.room(id).unwrap().used_bytes;
                    self.ledger.fill(id, bytes);
                    let after = self.ledger.usage(&on).unwrap();
                    assert_eq!(after.worker_bytes + old, before.worker_bytes + bytes.min(charged));
                    let both = |usage: &vramd_core::ledger::Usage| usage.worker_bytes + usage.reserved_bytes;
                    assert_eq!(both(&after), both(&before), "it is charged once, full or not");
                }
            }
            Step::Work { which, fails } => {
                if self.work.is_empty() {
                    return;
                }
                let work = self.work.swap_remove(which % self.work.len());
                self.perform(work, fails);
            }
            Step::Attach { which, writes, moves } => {
                let kept = |id: &AllocationId| self.ledger.allocation(*id).unwrap().is_kept();
                if let Some(id) = self.pick_active(which, false).filter(kept) {
                    let lease = self.lease();
                    let access = if writes { Access::Write } else { Access::Read };
                    assert!(self.ledger.grant(id, lease, attached(access, moves), now(self.tick)));
                    self.held.get_mut(&id).unwrap().leases.insert(lease);
                }
            }
            Step::Move { which, on, hole } => {
                let movable = |id: &AllocationId| self.ledger.fixed(*id).is_none();
                if let Some(id) = self.pick_active(which, false).filter(movable) {
                    self.begin_move(id, on, hole);
                }
            }
            Step::Copied { which, follow } => {
                let ready: Vec<_> =
                    self.moves.iter().filter(|moving| moving.place_lease.is_some()).copied().collect();
                if !ready.is_empty() {
                    self.copied(ready[which % ready.len()], follow);
                }
            }
            Step::EndLease(which) => {
                if let Some(id) = self.pick(which, |held| held.active) {
                    let leases: Vec<_> = self.held[&id].leases.iter().copied().collect();
                    let lease = leases[which % leases.len()];
                    if !self.of_operation(lease) {
                        self.end_lease(lease);
                    }
                }
            }
            Step::Empty(which) => {
                if let Some(id) = self.pick_active(which, false) {
                    self.empty(id);
                }
            }
            Step::Release(which) => {
                if let Some(id) = self.pick(which, |held| held.active) {
                    let attached = self.ledger.allocation(id).unwrap().is_attached();
                    match self.ledger.release(id, now(self.tick)) {
                        Ok(released) => {
                            assert!(!attached, "what is attached cannot be released");
                            let moves = self.moves.clone();
                            let held = self.held.get_mut(&id).unwrap();
                            held.leases.retain(|lease| {
                                moves.iter().any(|one| one.lease == *lease || one.place_lease == Some(*lease))
                            });
                            held.active = !held.leases.is_empty();
                            match released {
                                Release::Work(work) => self.work.push(work),
                                Release::Later => assert!(held.active, "the operation still has it"),
                                Release::NotActive => panic!("it was active"),
                            }
                        }
                        Err(in_use) => assert!(attached && !in_use.holders.is_empty()),
                    }
                }
            }
            Step::Expire(by) => {
                self.tick += by;
                for lease in self.ledger.expired(Tick(self.tick)) {
                    self.end_lease(lease);
                }
            }
            Step::Parts { device: n, sizes } => {
                let requests: Vec<_> = sizes
                    .iter()
                    .map(|size| {
                        self.next += 1;
                        Request { sealed: true, ..request(self.next, *size) }
                    })
                    .collect();
                let before = self.ledger.usage(&device(n));
                let Some(grants) = self.ledger.reserve_all(&requests, &[device(n)], now(self.tick)) else {
                    assert_eq!(self.ledger.usage(&device(n)), before, "a refusal changes nothing");
                    return;
                };
                for ((id, grant), size) in grants.into_iter().zip(sizes) {
                    let held = Held { device: grant.device, size, leases: BTreeSet::new(), active: false };
                    self.held.insert(id, held);
                    self.proceed(id, grant.readiness);
                }
            }
            Step::Limit { device: n, mib } => {
                self.ledger.set_limits(&device(n), limit(mib.map(|mib| mib * MIB)));
            }
            Step::Observe { device: n, foreign_mib } => {
                let total = if n == 0 { 32 * MIB } else { 16 * MIB };
                let usage = self.ledger.usage(&device(n)).unwrap();
                let rooms = self
                    .ledger
                    .allocations()
                    .values()
                    .filter(|one| one.device == device(n) && one.request.room.is_some());
                let charged: u64 = rooms.map(|one| one.block_bytes).sum();
                let given = usage.allocated_bytes + usage.reserved_bytes + usage.worker_bytes;
                let held_bytes = given + usage.pool_free_bytes - charged;
                let used_bytes = (held_bytes + usage.worker_bytes + foreign_mib * MIB).min(total);
                let measured =
                    Measured { used_bytes, available_bytes: total - used_bytes, held_bytes, ready_bytes: 0 };
                self.ledger.observe(&device(n), measured);
            }
        }
    }

    fn perform(&mut self, work: Work, fails: bool) {
        match work {
            Work::Create { device, segment, .. } => {
                if fails {
                    for id in self.ledger.segment_failed(&device, segment) {
                        assert!(
                            !self.held.remove(&id).unwrap().active,
                            "only reservations fail with a segment"
                        );
                        let given_up = self.moves.extract_if(.., |moving| moving.place == id).next();
                        if let Some(moving) = given_up {
                            self.end_lease(moving.lease);
                        }
                    }
                } else {
                    for id in self.ledger.segment_created(&device, segment) {
                        self.activate(id);
                    }
                }
            }
            // A device that failed is asked again.
            Work::Zero { allocation, .. } | Work::Release { allocation, .. } if fails => {
                self.work.push(self.ledger.release_work(allocation).expect("it is still being released"));
            }
            Work::Zero { allocation, .. } | Work::Release { allocation, .. } | Work::Free { allocation } => {
                let (released, left) = self.ledger.released(allocation).expect("it was being released");
                let held = self.held.remove(&allocation).unwrap();
                assert_eq!((held.size, held.device), (released.request.size_bytes, released.device.clone()));
                self.work.extend(left);
            }
            Work::Destroy { device, segment } => self.ledger.destroyed(&device, segment),
        }
    }

    fn check(&self) {
        self.ledger.check().unwrap();
        assert_eq!(self.ledger.allocations().len(), self.held.len(), "none lost, none too many");
        for n in 0..2 {
            let usage = self.ledger.usage(&device(n)).unwrap();
            let sizes: u64 =
                self.held.values().filter(|held| held.device == device(n)).map(|held| held.size).sum();
            let given = usage.allocated_bytes + usage.reserved_bytes + usage.worker_bytes;
            assert!(given >= sizes, "{given} are charged for {sizes}");
            assert_eq!(usage.used_bytes, given + usage.pool_free_bytes + usage.foreign_bytes);
            let total = if n == 0 { 32 * MIB } else { 16 * MIB };
            // Room may count on a spare that is still on its way back.
            let goes = |work: &&Work| matches!(work, Work::Destroy { device: on, .. } if *on == device(n));
            let returning = self.work.iter().filter(goes).count() as u64 * SHARED_SEGMENT_BYTES;
            assert!(given + usage.pool_free_bytes <= total + returning, "more is held than the device has");
            assert!(usage.largest_free_bytes <= usage.available_bytes.max(usage.pool_free_bytes));
        }
    }

    /// Ends everything and lets the device finish.
    fn wind_up(&mut self) {
        while !self.work.is_empty() || self.held.values().any(|held| held.active) {
            while let Some(work) = self.work.pop() {
                self.perform(work, false);
            }
            for moving in self.moves.clone() {
                self.copied(moving, false);
            }
            let leases: Vec<_> = self.held.values().flat_map(|held| held.leases.iter().copied()).collect();
            for lease in leases {
                self.end_lease(lease);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_byte_is_counted_twice_and_none_is_lost(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            world.check();
        }
        world.wind_up();
        world.check();
        prop_assert!(world.held.is_empty());
        for n in 0..2 {
            let usage = world.ledger.usage(&device(n)).unwrap();
            prop_assert_eq!(usage.allocated_bytes + usage.reserved_bytes + usage.worker_bytes, 0);
            prop_assert!(usage.pool_free_bytes <= SHARED_SEGMENT_BYTES, "at most one spare segment stays");
        }
    }

    #[test]
    fn the_same_history_gives_the_same_ledger(steps in steps()) {
        let run = || {
            let mut world = World::new();
            for step in steps.clone() {
                world.take(step);
            }
            format!("{:?}", world.ledger)
        };
        prop_assert_eq!(run(), run());
    }
}

/// Reserves and lets the device do its work; the id of the active allocation.
pub fn allocate(world: &mut World, size: u64) -> Option<AllocationId> {
    world.next += 1;
    let request = request(world.next, size);
    let grant = world.ledger.reserve(request.clone(), &[device(0)], now(0)).ok()?;
    world
        .held
        .insert(request.id, Held { device: grant.device, size, leases: BTreeSet::new(), active: false });
    match grant.readiness {
        Readiness::Ready => world.activate(request.id),
        Readiness::Needs(work) => world.perform(work, false),
        Readiness::Waits | Readiness::ReadyAfter(_) => unreachable!("nothing else is under way"),
    }
    Some(request.id)
}

pub fn release(world: &mut World, id: AllocationId) {
    let Ok(Release::Work(work)) = world.ledger.release(id, now(0)) else { panic!("it is active") };
    world.perform(work, false);
    while let Some(work) = world.work.pop() {
        world.perform(work, false);
    }
}

#[test]
fn the_spare_segment_makes_way_for_a_request_that_needs_its_bytes() {
    let mut world = World::new();
    let small = allocate(&mut world, 1000).unwrap();
    release(&mut world, small);
    assert_eq!(world.ledger.usage(&device(0)).unwrap().pool_free_bytes, SHARED_SEGMENT_BYTES);
    let available = world.ledger.usage(&device(0)).unwrap().available_bytes;
    assert_eq!(available, 32 * MIB, "a spare segment is available memory");
    allocate(&mut world, available).expect("all that is said to be available can be had");
    world.check();
}

#[test]
fn owners_never_share_a_segment_because_a_descriptor_shows_all_of_it() {
    let mut world = World::new();
    let one = allocate(&mut world, 1000).unwrap();
    let mut other = request(99, 1000);
    other.owner = "two".parse().unwrap();
    world.ledger.reserve(other.clone(), &[device(0)], now(0)).unwrap();
    let segment = |id| world.ledger.allocation(id).unwrap().segment;
    assert_ne!(segment(one), segment(other.id));
}

#[test]
fn a_segment_that_anybody_has_seen_is_never_reused() {
    let mut world = World::new();
    let id = allocate(&mut world, 1000).unwrap();
    let lease = world.lease();
    world.ledger.grant(id, lease, reader(), now(0));
    world.ledger.end_lease(lease, now(0));
    release(&mut world, id);
    assert_eq!(world.ledger.usage(&device(0)).unwrap().pool_free_bytes, 0);
}

#[test]
fn a_lost_device_refuses_and_can_still_be_cleared() {
    let mut world = World::new();
    let id = allocate(&mut world, 5 * MIB).unwrap();
    assert!(world.ledger.lose(&device(0)));
    assert!(!world.ledger.lose(&device(0)), "it is news only once");
    let shortage = world.ledger.reserve(request(99, 1), &[device(0)], now(0)).unwrap_err();
    assert!(shortage.lost);
    release(&mut world, id);
    assert_eq!(world.ledger.usage(&device(0)).unwrap().allocated_bytes, 0);
}

#[test]
fn a_refusal_names_who_holds_the_rest() {
    let mut world = World::new();
    allocate(&mut world, 20 * MIB).unwrap();
    let shortage = world.ledger.reserve(request(99, 20 * MIB), &[device(0)], now(0)).unwrap_err();
    assert_eq!(shortage.available_bytes, 12 * MIB);
    assert_eq!(shortage.largest_free_bytes, 12 * MIB);
    assert_eq!(shortage.holders, [("one".parse().unwrap(), 20 * MIB)]);
}

#[test]
fn foreign_memory_is_never_given_out() {
    let mut world = World::new();
    let measured = Measured { used_bytes: 30 * MIB, available_bytes: 2 * MIB, held_bytes: 0, ready_bytes: 0 };
    world.ledger.observe(&device(0), measured);
    let usage = world.ledger.usage(&device(0)).unwrap();
    assert_eq!((usage.foreign_bytes, usage.available_bytes), (30 * MIB, 2 * MIB));
    assert!(world.ledger.reserve(request(99, 3 * MIB), &[device(0)], now(0)).is_err());
}

#[test]
fn reservations_are_not_listed_and_not_attached() {
    let mut ledger = Ledger::default();
    ledger.add_device(facts(0, 32 * MIB));
    let wanted = request(1, 5 * MIB);
    ledger.reserve(wanted.clone(), &[], now(0)).unwrap();
    let allocation = ledger.allocation(wanted.id).unwrap();
    assert_eq!(allocation.state, State::Reserved);
    assert!(allocation.to_api().is_none());
    let lease = LeaseId(Uuid::from_u128(5));
    assert!(!ledger.grant(wanted.id, lease, reader(), now(0)));
}

#[test]
fn a_limit_below_what_is_held_promises_nothing_of_the_spare() {
    let mut world = World::new();
    let small = allocate(&mut world, 1000).unwrap();
    release(&mut world, small);
    world.ledger.set_limits(&device(0), limit(Some(1)));
    let part = Request { sealed: true, ..request(98, GRANULARITY) };
    assert!(world.ledger.reserve_all(&[part], &[device(0)], now(0)).is_none());
    assert_eq!(world.ledger.usage(&device(0)).unwrap().available_bytes, 1, "what the limit allows");
    assert!(allocate(&mut world, 5 * MIB).is_none());
    assert!(world.ledger.could_fit(&request(99, 5 * MIB), &[device(0)]), "the limit may be raised");
    assert!(!world.ledger.could_fit(&request(99, 33 * MIB), &[device(0)]));
}

#[test]
fn a_device_whose_pieces_are_bounded_refuses_more_than_one_at_once() {
    let mut ledger = Ledger::default();
    ledger.add_device(DeviceFacts { max_segment_bytes: 8 * MIB, ..facts(0, 64 * MIB) });
    let on = [device(0)];
    assert_eq!(ledger.usage(&device(0)).unwrap().largest_free_bytes, 8 * MIB);
    let shortage = ledger.reserve(request(1, 8 * MIB + 1), &on, now(0)).unwrap_err();
    assert_eq!(
        (shortage.available_bytes, shortage.largest_free_bytes, shortage.could_fit, shortage.pack),
        (64 * MIB, 8 * MIB, false, None)
    );
    for id in 1..=8 {
        assert!(ledger.reserve(request(id, 8 * MIB), &on, now(0)).is_ok());
    }
    assert!(ledger.reserve(request(9, 8 * MIB), &on, now(0)).is_err());
    ledger.check().unwrap();
}

#[test]
fn room_that_its_owner_fills_is_charged_once_and_only_once_it_is_measured() {
    let mut world = World::new();
    let mut room = request(99, 20 * MIB);
    room.room = Some(Box::default());
    let grant = world.ledger.reserve(room.clone(), &[device(0)], now(0)).unwrap();
    assert_eq!(grant.readiness, Readiness::Ready, "no device has to do anything");
    world.held.insert(
        room.id,
        Held { device: device(0), size: room.size_bytes, leases: BTreeSet::new(), active: false },
    );
    world.activate(room.id);
    let available = |world: &World| world.ledger.usage(&device(0)).unwrap().available_bytes;
    assert_eq!(available(&world), 12 * MIB);
    let measured = |used_mib: u64| Measured {
        used_bytes: used_mib * MIB,
        available_bytes: (32 - used_mib) * MIB,
        held_bytes: 0,
        ready_bytes: 0,
    };
    world.ledger.observe(&device(0), measured(15));
    assert_eq!(available(&world), 0, "until it is known whose they are, they are somebody else's");
    world.ledger.fill(room.id, 15 * MIB);
    world.check();
    assert_eq!(available(&world), 12 * MIB);
    world.ledger.observe(&device(0), measured(25));
    world.ledger.fill(room.id, 25 * MIB);
    let usage = world.ledger.usage(&device(0)).unwrap();
    assert_eq!(
        (usage.worker_bytes, usage.foreign_bytes, usage.available_bytes),
        (20 * MIB, 5 * MIB, 7 * MIB)
    );
    assert_eq!(world.ledger.room(room.id).unwrap().peak_bytes, Some(25 * MIB));
    release(&mut world, room.id);
    let usage = world.ledger.usage(&device(0)).unwrap();
    assert_eq!((usage.worker_bytes, usage.reserved_bytes, usage.foreign_bytes), (0, 0, 25 * MIB));
}
