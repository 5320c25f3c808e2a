//! Reservations: room beside the weights that a process fills, followed while it does, and what is learned when it has ended.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{AllocationId, ApiError, Basis, Bytes, DeviceId, Footprint, FootprintPage, ModelName};
use vramd_core::Tick;
use vramd_core::footprints::Run;
use vramd_core::ledger::Allocation;

use super::{Allocate, Event, OnStored, Reply, State};
use crate::platform;
use crate::store::Change;

/// An active reservation.
#[derive(Debug)]
pub(super) struct Reserved {
    since: Tick,
    /// What its owner said is in use, and when.
    told: Option<(Tick, u64)>,
    /// Its process had others on the device: how much of what it took was for this one, only its owner can say.
    is_shared: bool,
    /// Its owner released it.
    is_released: bool,
    /// And said how much was in use at most.
    peak_told: Option<u64>,
}

impl State {
    /// Decides how much room a reservation needs, and asks for it like anybody.
    pub(super) fn reserve(&mut self, mut allocate: Allocate, reply: Reply<vramd_api::Allocation>) {
        match self.expect(&mut allocate) {
            Ok(()) => self.allocate(allocate, reply),
            Err(error) => self.answer(reply, Err(error)),
        }
    }

    fn expect(&self, allocate: &mut Allocate) -> Result<(), ApiError> {
        let request = &mut allocate.request;
        let Some(room) = &mut request.room else { return Ok(()) };
        let expected = match &room.model {
            None => room.estimate_bytes.map(|bytes| (bytes, Basis::Estimate)),
            Some(name) => {
                // Beside its weights, if they are somewhere.
                if let (None, Some(model)) = (&allocate.on, self.models.get(name)) {
                    let all: Vec<_> = model.components.keys().cloned().collect();
                    allocate.on = self.most_parts(model, &all);
                }
                let on: Vec<DeviceId> = match &allocate.on {
                    Some(device) => vec![device.clone()],
                    None => self.nearest_devices(),
                };
                let known = |device| {
                    let limit = self.ledger.limit(device).unwrap_or_default();
                    // What the device could never hold was told or measured wrongly, or before a limit was set.
                    let expected = self.footprints.expect(name, device, &room.shape, room.estimate_bytes)?;
                    let said = room.estimate_bytes.map(|bytes| (bytes, Basis::Estimate));
                    Some(if expected.0 > limit { said.unwrap_or(expected) } else { expected })
                };
                let rank = |basis| match basis {
                    Basis::Learned => 2,
                    Basis::Estimate => 1,
                    Basis::Interpolated => 0,
                };
                // What one device needed goes before what is only said of another.
                on.iter().filter_map(known).max_by_key(|(bytes, basis)| (rank(*basis), *bytes))
            }
        };
        let Some((bytes, basis)) = expected else {
            let what = "how much to reserve is not known: no such run was measured";
            return Err(ApiError::invalid("sizeBytes", what).hint("say sizeBytes the first time"));
        };
        request.size_bytes = bytes.clamp(1, Bytes::MAX);
        room.basis = basis;
        room.learned_bytes = (basis == Basis::Learned).then_some(bytes);
        Ok(())
    }

    /// A reservation has its room. What its process used before is measured first, if it is to be followed.
    pub(super) fn begin_reservation(&mut self, id: AllocationId) {
        let Some(allocation) = self.ledger.allocation(id) else { return };
        let Some(pid) = allocation.request.room.as_ref().and_then(|room| room.pid) else {
            return self.ready(id);
        };
        let device = allocation.device.clone();
        self.spawn(&device, move |on| {
            let used = on.used_by(&[pid]).map(|used| used.get(&pid).copied());
            Event::BaseMeasured { reservation: id, outcome: used }
        });
    }

    pub(super) fn base_measured(&mut self, id: AllocationId, used: Option<u64>) {
        self.ledger.note_room(id, |room| {
            room.base_bytes = used.map(|used| used.saturating_sub(room.held_bytes));
        });
        self.ready(id);
    }

    /// A reservation is there.
    pub(super) fn follow(&mut self, id: AllocationId) {
        let Some(room) = self.ledger.room(id) else { return };
        let told = (room.pid.is_none() && room.held_bytes > 0).then_some((self.now.tick, room.held_bytes));
        let mine = self.process_of(id);
        let others =
            self.reservations.keys().filter(|other| mine.is_some() && self.process_of(**other) == mine);
        let others: Vec<AllocationId> = others.copied().collect();
        for other in &others {
            if let Some(other) = self.reservations.get_mut(other) {
                other.is_shared = true;
            }
        }
        let reserved = Reserved {
            since: self.now.tick,
            told,
            is_shared: !others.is_empty(),
            is_released: false,
            peak_told: None,
        };
        self.reservations.insert(id, reserved);
    }

    /// The process that is followed for a reservation, and where.
    fn process_of(&self, id: AllocationId) -> Option<(u32, DeviceId)> {
        let pid = self.ledger.room(id).filter(|room| room.base_bytes.is_some())?.pid?;
        Some((pid, self.ledger.allocation(id)?.device.clone()))
    }

    /// The processes whose use of a device is to be measured.
    pub(super) fn followed(&self, device: &DeviceId) -> Vec<u32> {
        let all = self.reservations.keys().filter_map(|id| self.process_of(*id));
        let here: BTreeSet<u32> = all.filter(|(_, on)| on == device).map(|(pid, _)| pid).collect();
        here.into_iter().collect()
    }

    /// Takes in what was measured on a device since `began`.
    pub(super) fn fill_reservations(&mut self, device: &DeviceId, used: &BTreeMap<u32, u64>, began: Tick) {
        // What each process took since its oldest reservation here, and has not been charged yet.
        let mut taken: BTreeMap<u32, u64> = BTreeMap::new();
        for (id, reserved) in &self.reservations {
            let Some(held) = self.ledger.allocation(*id).filter(|it| it.device == *device) else { continue };
            let Some(room) = &held.request.room else { continue };
            // Neither what was said nor what was begun meanwhile is in these figures for certain.
            let when = reserved.told.map_or(reserved.since, |(when, _)| when);
            if when >= began {
                continue;
            }
            // Of a process that cannot be measured any more, nothing is known to be in use.
            let left = room.pid.zip(room.base_bytes).map(|(pid, base)| {
                let grown = used.get(&pid).map_or(0, |used| used.saturating_sub(base));
                taken.entry(pid).or_insert(grown)
            });
            let own = match (reserved.told, &left) {
                (Some((_, bytes)), _) => bytes,
                (None, Some(left)) if reserved.is_shared => (**left).min(held.block_bytes),
                (None, Some(left)) => **left,
                (None, None) => continue,
            };
            if let Some(left) = left {
                *left = left.saturating_sub(own);
            }
            self.ledger.fill(*id, own);
        }
    }

    /// Ends the reservations of processes that have ended, and on devices that are lost.
    pub(super) fn end_reservations(&mut self) {
        let ended = |id: &&AllocationId| {
            let pid = self.ledger.room(**id).and_then(|room| room.pid);
            let lost = self.ledger.allocation(**id).is_some_and(|it| self.ledger.is_lost(&it.device));
            lost || pid.is_some_and(|pid| !platform::lives(pid))
        };
        for id in self.reservations.keys().filter(ended).copied().collect::<Vec<_>>() {
            let leases = self.ledger.allocation(id).map(|it| it.leases.keys().copied().collect::<Vec<_>>());
            for lease in leases.unwrap_or_default() {
                self.lease_ended(lease);
            }
        }
    }

    /// Checks that an allocation is a reservation, for a field that only these have.
    pub(super) fn is_reservation(&self, id: AllocationId, field: &str) -> Result<(), ApiError> {
        if self.ledger.room(id).is_some() {
            return Ok(());
        }
        Err(ApiError::invalid(field, format!("allocation {id} is no reservation"))
            .hint(format!("leave {field} out")))
    }

    /// What its owner says is in use of a reservation now.
    pub(super) fn told_used(&mut self, id: AllocationId, bytes: u64) {
        let Some(reserved) = self.reservations.get_mut(&id) else { return };
        reserved.told = Some((self.now.tick, bytes));
        // Less is true at once; more is taken off what is free once the device shows it.
        if self.ledger.room(id).is_some_and(|room| bytes < room.used_bytes) {
            self.ledger.fill(id, bytes);
        }
        self.ledger.note_room(id, |room| room.peak_bytes = room.peak_bytes.max(Some(bytes)));
    }

    /// Its owner releases a reservation, and says perhaps how much was in use at most.
    pub(super) fn ends_well(&mut self, id: AllocationId, peak: Option<u64>) {
        if let Some(reserved) = self.reservations.get_mut(&id) {
            (reserved.is_released, reserved.peak_told) = (true, peak);
        }
    }

    /// A reservation is over: what it took is learned, if its owner released it and that is known.
    pub(super) fn learn(&mut self, allocation: &Allocation) -> Option<Footprint> {
        let room = allocation.request.room.as_deref()?;
        let reserved = self.reservations.remove(&allocation.request.id).filter(|it| it.is_released)?;
        let measured = room.peak_bytes.filter(|_| !reserved.is_shared || reserved.told.is_some());
        // Nobody took more than there is.
        let total = self.devices.get(&allocation.device)?.facts().total_bytes;
        let run = Run {
            model: room.model.clone()?,
            device: allocation.device.clone(),
            shape: room.shape.clone(),
            estimate_bytes: room.estimate_bytes,
            reserved_bytes: allocation.request.size_bytes,
            peak_bytes: reserved.peak_told.or(measured).filter(|bytes| *bytes > 0)?.min(total),
            ended_at: self.now.wall,
        };
        let (footprint, forgotten) = self.footprints.learn(run);
        let mut changes: Vec<_> = forgotten.into_iter().map(remove).collect();
        changes.push(Change::PutFootprint(Box::new(footprint.clone())));
        self.store_all(changes, OnStored::Nothing);
        Some(footprint)
    }

    /// Forgets what runs of a model took; answers that.
    pub(super) fn forget_footprints(&mut self, model: &ModelName) -> FootprintPage {
        let footprints = self.footprints.forget(model);
        if !footprints.is_empty() {
            self.store_all(footprints.iter().cloned().map(remove).collect(), OnStored::Nothing);
        }
        FootprintPage { footprints }
    }
}

fn remove(footprint: Footprint) -> Change {
    Change::RemoveFootprint(Box::new(footprint))
}
