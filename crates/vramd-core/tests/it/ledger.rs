//! Random histories of the ledger against the dullest model that could be right: a list of who holds how much.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use proptest::prelude::*;
use uuid::Uuid;
use vramd_api::{AllocationId, AllocationType, DeviceId, Holder, LeaseId, MemoryType, Priority};
use vramd_core::ledger::{
    BLOCK_QUANTUM, DeviceFacts, Lease, Ledger, Measured, Readiness, Request, SHARED_SEGMENT_BYTES, State,
    Work,
};
use vramd_core::queue::{Queue, Waiting};
use vramd_core::{Now, Tick};

const GRANULARITY: u64 = 64 << 10;
const MIB: u64 = 1 << 20;

fn now(tick: u64) -> Now {
    Now { tick: Tick(tick), wall: Timestamp::UNIX_EPOCH }
}

fn device(n: u8) -> DeviceId {
    format!("sim:{n}").parse().unwrap()
}

fn facts(n: u8, total_bytes: u64) -> DeviceFacts {
    DeviceFacts {
        device: device(n),
        memory_type: MemoryType::Vram,
        total_bytes,
        granularity_bytes: GRANULARITY,
        limit_bytes: total_bytes,
    }
}

fn request(id: u128, size_bytes: u64) -> Request {
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
    }
}

fn holder() -> Holder {
    Holder { pid: 1, uid: 1, command: "python".into() }
}

/// What the model remembers of an allocation.
#[derive(Debug, Clone)]
struct Held {
    device: DeviceId,
    size: u64,
    leases: BTreeSet<LeaseId>,
    active: bool,
}

/// A ledger, its model, and a device that does its work in any order.
struct World {
    ledger: Ledger,
    held: BTreeMap<AllocationId, Held>,
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
        on: Option<u8>,
    },
    /// The device does one piece of its work, well or badly.
    Work {
        which: usize,
        fails: bool,
    },
    Attach(usize),
    EndLease(usize),
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
        6 => (size, 0u32..22, any::<bool>(), prop::bool::weighted(0.2), prop::option::of(0u8..2))
            .prop_map(|(size, alignment, owner, sealed, on)| Step::Reserve { size, alignment, owner, sealed, on }),
        8 => (any::<usize>(), prop::bool::weighted(0.1)).prop_map(|(which, fails)| Step::Work { which, fails }),
        2 => any::<usize>().prop_map(Step::Attach),
        3 => any::<usize>().prop_map(Step::EndLease),
        3 => any::<usize>().prop_map(Step::Release),
        1 => (0u64..3000).prop_map(Step::Expire),
        1 => (0u8..2, prop::option::of(0u64..64)).prop_map(|(device, mib)| Step::Limit { device, mib }),
        1 => (0u8..2, prop::array::uniform3(1u64..8 * MIB)).prop_map(|(device, sizes)| Step::Parts { device, sizes }),
        1 => (0u8..2, 0u64..8).prop_map(|(device, foreign_mib)| Step::Observe { device, foreign_mib }),
    ];
    prop::collection::vec(step, 1..200)
}

impl World {
    fn new() -> Self {
        let mut ledger = Ledger::default();
        ledger.add_device(facts(0, 32 * MIB));
        ledger.add_device(facts(1, 16 * MIB));
        Self { ledger, held: BTreeMap::new(), work: Vec::new(), next: 0, tick: 0 }
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
        let lease = self.lease();
        self.ledger.activate(id, lease, Lease::time_to_live(1, now(self.tick)), now(self.tick));
        let held = self.held.get_mut(&id).unwrap();
        held.active = true;
        held.leases.insert(lease);
    }

    fn end_lease(&mut self, lease: LeaseId) {
        let (id, work) = self.ledger.end_lease(lease, now(self.tick)).expect("the model knows this lease");
        let held = self.held.get_mut(&id).unwrap();
        assert!(held.leases.remove(&lease), "a lease ended that was not of this allocation");
        assert_eq!(work.is_some(), held.leases.is_empty(), "the last lease releases, and no other");
        held.active = !held.leases.is_empty();
        self.work.extend(work);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Reserve { size, alignment, owner, sealed, on } => {
                self.next += 1;
                let mut request = request(self.next, size);
                request.alignment = 1 << alignment;
                request.owner = if owner { "one" } else { "two" }.parse().unwrap();
                request.sealed = sealed;
                let on: Vec<_> = on.map(device).into_iter().collect();
                let before: Vec<_> = (0..2).map(|n| self.ledger.usage(&device(n)).unwrap()).collect();
                match self.ledger.reserve(request.clone(), &on, now(self.tick)) {
                    Ok(grant) => {
                        let held =
                            Held { device: grant.device, size, leases: BTreeSet::new(), active: false };
                        self.held.insert(request.id, held);
                        match grant.readiness {
                            Readiness::Ready => self.activate(request.id),
                            Readiness::Needs(work) => self.work.push(work),
                            Readiness::Waits => {}
                        }
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
            Step::Work { which, fails } => {
                if self.work.is_empty() {
                    return;
                }
                let work = self.work.swap_remove(which % self.work.len());
                self.perform(work, fails);
            }
            Step::Attach(which) => {
                if let Some(id) = self.pick(which, |held| held.active) {
                    let lease = self.lease();
                    assert!(self.ledger.grant(
                        id,
                        lease,
                        Lease::Connection { holder: holder() },
                        now(self.tick)
                    ));
                    self.held.get_mut(&id).unwrap().leases.insert(lease);
                }
            }
            Step::EndLease(which) => {
                if let Some(id) = self.pick(which, |held| held.active) {
                    let leases: Vec<_> = self.held[&id].leases.iter().copied().collect();
                    self.end_lease(leases[which % leases.len()]);
                }
            }
            Step::Release(which) => {
                if let Some(id) = self.pick(which, |held| held.active) {
                    let attached = self.ledger.allocation(id).unwrap().is_attached();
                    match self.ledger.release(id, now(self.tick)) {
                        Ok(work) => {
                            assert!(!attached, "what is attached cannot be released");
                            let held = self.held.get_mut(&id).unwrap();
                            held.active = false;
                            held.leases.clear();
                            self.work.push(work.expect("an active allocation has bytes to give back"));
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
                if !self.ledger.fits_sealed(&device(n), &sizes) {
                    return;
                }
                for size in sizes {
                    self.next += 1;
                    let request = Request { sealed: true, ..request(self.next, size) };
                    let grant = self.ledger.reserve(request.clone(), &[device(n)], now(self.tick));
                    let grant = grant.expect("what fits together fits one by one");
                    let held = Held { device: grant.device, size, leases: BTreeSet::new(), active: false };
                    self.held.insert(request.id, held);
                    let Readiness::Needs(work) = grant.readiness else {
                        panic!("a sealed block has its segment")
                    };
                    self.work.push(work);
                }
            }
            Step::Limit { device: n, mib } => self.ledger.set_limit(&device(n), mib.map(|mib| mib * MIB)),
            Step::Observe { device: n, foreign_mib } => {
                let total = if n == 0 { 32 * MIB } else { 16 * MIB };
                let usage = self.ledger.usage(&device(n)).unwrap();
                let held_bytes = usage.allocated_bytes + usage.reserved_bytes + usage.pool_free_bytes;
                let used_bytes = (held_bytes + foreign_mib * MIB).min(total);
                let measured = Measured { used_bytes, available_bytes: total - used_bytes, held_bytes };
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
            let given = usage.allocated_bytes + usage.reserved_bytes;
            assert!(given >= sizes, "{given} are charged for {sizes}");
            assert_eq!(
                usage.used_bytes,
                usage.allocated_bytes + usage.reserved_bytes + usage.pool_free_bytes + usage.foreign_bytes
            );
            let total = if n == 0 { 32 * MIB } else { 16 * MIB };
            assert!(given + usage.pool_free_bytes <= total, "more is held than the device has");
            assert!(usage.largest_free_bytes <= usage.available_bytes.max(usage.pool_free_bytes));
        }
    }

    /// Ends everything and lets the device finish.
    fn wind_up(&mut self) {
        while !self.work.is_empty() || self.held.values().any(|held| held.active) {
            while let Some(work) = self.work.pop() {
                self.perform(work, false);
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
            prop_assert_eq!(usage.allocated_bytes + usage.reserved_bytes, 0);
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
fn allocate(world: &mut World, size: u64) -> Option<AllocationId> {
    world.next += 1;
    let request = request(world.next, size);
    let grant = world.ledger.reserve(request.clone(), &[device(0)], now(0)).ok()?;
    world
        .held
        .insert(request.id, Held { device: grant.device, size, leases: BTreeSet::new(), active: false });
    match grant.readiness {
        Readiness::Ready => world.activate(request.id),
        Readiness::Needs(work) => world.perform(work, false),
        Readiness::Waits => unreachable!("nothing else is under way"),
    }
    Some(request.id)
}

fn release(world: &mut World, id: AllocationId) {
    let work = world.ledger.release(id, now(0)).unwrap().unwrap();
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
    world.ledger.grant(id, lease, Lease::Connection { holder: holder() }, now(0));
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
    let measured = Measured { used_bytes: 30 * MIB, available_bytes: 2 * MIB, held_bytes: 0 };
    world.ledger.observe(&device(0), measured);
    let usage = world.ledger.usage(&device(0)).unwrap();
    assert_eq!((usage.foreign_bytes, usage.available_bytes), (30 * MIB, 2 * MIB));
    assert!(world.ledger.reserve(request(99, 3 * MIB), &[device(0)], now(0)).is_err());
}

fn waiting(id: u128, size: u64, priority: Priority, deadline: u64) -> Waiting {
    let request = Request { priority, ..request(id, size) };
    Waiting { request, on: vec![device(0)], deadline: Tick(deadline) }
}

#[test]
fn those_who_wait_go_by_priority_then_by_age_and_nobody_overtakes() {
    let mut world = World::new();
    let all = allocate(&mut world, 32 * MIB).unwrap();
    let mut queue = Queue::default();
    assert!(queue.push(waiting(1001, 20 * MIB, Priority::Normal, 100)));
    assert!(queue.push(waiting(1002, 2 * MIB, Priority::Normal, 100)));
    assert!(queue.push(waiting(1003, 20 * MIB, Priority::High, 100)));
    assert!(queue.admit(&mut world.ledger, now(0)).is_empty());
    release(&mut world, all);
    let granted: Vec<_> =
        queue.admit(&mut world.ledger, now(0)).into_iter().map(|(id, _)| id.0.as_u128()).collect();
    assert_eq!(granted, [1003], "the small one waits behind the older large one");
    assert_eq!(queue.expired(Tick(100)).len(), 2);
    assert!(queue.is_empty());
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
    assert!(!ledger.grant(wanted.id, lease, Lease::Connection { holder: holder() }, now(0)));
}

#[test]
fn a_request_of_another_memory_type_closes_no_device_to_those_behind_it() {
    let mut world = World::new();
    let mut queue = Queue::default();
    let ram = Request { memory_type: Some(MemoryType::Ram), ..request(1001, MIB) };
    assert!(queue.push(Waiting { request: ram, on: vec![], deadline: Tick(100) }));
    assert!(queue.push(waiting(1002, 2 * MIB, Priority::Normal, 100)));
    assert_eq!(queue.admit(&mut world.ledger, now(0)).len(), 1);
}

#[test]
fn a_limit_below_what_is_held_promises_nothing_of_the_spare() {
    let mut world = World::new();
    let small = allocate(&mut world, 1000).unwrap();
    release(&mut world, small);
    world.ledger.set_limit(&device(0), Some(1));
    assert!(!world.ledger.fits_sealed(&device(0), &[GRANULARITY]));
    assert_eq!(world.ledger.usage(&device(0)).unwrap().available_bytes, 1, "what the limit allows");
    assert!(allocate(&mut world, 5 * MIB).is_none());
    assert!(world.ledger.could_fit(&request(99, 5 * MIB), &[device(0)]), "the limit may be raised");
    assert!(!world.ledger.could_fit(&request(99, 33 * MIB), &[device(0)]));
}
