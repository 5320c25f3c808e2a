//! Reservations: room beside the weights that a process fills, followed while it does, and what is learned when it has ended.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{AllocationId, ApiError, Basis, Bytes, DeviceId, Footprint, FootprintPage, ModelName};
use vramd_core::Tick;
use vramd_core::footprints::Run;
use vramd_core::ledger::{Allocation, Request};

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

    /// How much it is to have, and where, if that was not said.
    fn expect(&self, allocate: &mut Allocate) -> Result<(), ApiError> {
        let Some(room) = allocate.request.room.clone() else { return Ok(()) };
        let (devices, reason) = match (&allocate.on, &room.model) {
            (Some(device), _) => (vec![device.clone()], None),
            (None, name) => {
                let beside = name.as_ref().map(|name| (name, self.parts_on(name)));
                match beside {
                    Some((name, devices)) if !devices.is_empty() => {
                        (devices, Some(format!("it is for {name}, whose weights are there")))
                    }
                    _ => (self.emptiest_first(), Some("the emptiest that has room for it".to_owned())),
                }
            }
        };
        let expected = |device| self.expected(room.model.as_ref(), device, &room.shape, room.estimate_bytes);
        let mut known = devices.iter().filter_map(|device| Some((device, expected(device)?))).peekable();
        let first = known.peek().copied();
        let sized = |bytes| Request { size_bytes: bytes, ..allocate.request.clone() };
        let fits = known.find(|(device, (bytes, _))| self.ledger.has_room(&[sized(*bytes)], device));
        let Some((device, (bytes, basis))) = fits.or(first) else {
            let names: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
            let what =
                format!("how much to reserve is not known: no such run was measured on {}", names.join(", "));
            let hint =
                "say sizeBytes; `vramd footprints` shows what was measured, by model, device and shape";
            return Err(ApiError::invalid("sizeBytes", what).hint(hint));
        };
        let total = self.devices.get(device).map_or(0, |it| it.facts().total_bytes);
        if room.held_bytes > total {
            let what = format!("heldBytes {} is more than {device} has, which is {total}", room.held_bytes);
            return Err(ApiError::invalid("heldBytes", what));
        }
        allocate.on = Some(device.clone());
        allocate.reason = reason;
        allocate.request.size_bytes = bytes.clamp(1, Bytes::MAX);
        if let Some(room) = &mut allocate.request.room {
            room.basis = basis;
            room.learned_bytes = (basis == Basis::Learned).then_some(bytes);
        }
        Ok(())
    }

    /// How much a run is taken to need on a device.
    pub(super) fn expected(
        &self,
        model: Option<&ModelName>,
        device: &DeviceId,
        shape: &[u64],
        estimate: Option<u64>,
    ) -> Option<(u64, Basis)> {
        let known = model.and_then(|name| self.footprints.expect(name, device, shape, estimate));
        // What the device could never hold was learned before a limit was set, or is of a shape that never ran.
        let limit = self.ledger.limit(device).unwrap_or_default();
        known.filter(|(bytes, _)| *bytes <= limit).or(estimate.map(|bytes| (bytes, Basis::Estimate)))
    }

    /// The devices that have parts of a model, those with most first.
    fn parts_on(&self, name: &ModelName) -> Vec<DeviceId> {
        let Some(model) = self.models.get(name) else { return Vec::new() };
        let all: Vec<_> = model.components.keys().cloned().collect();
        let most = self.most_parts(model, &all);
        let others = self.places(model, &all).into_values().filter(|device| Some(device) != most.as_ref());
        let others: BTreeSet<DeviceId> = others.collect();
        most.iter().cloned().chain(others).collect()
    }

    fn emptiest_first(&self) -> Vec<DeviceId> {
        let mut devices = self.nearest_devices();
        let used = |device: &DeviceId| {
            let limit = self.ledger.limit(device).unwrap_or_default().max(1);
            self.ledger.usage(device).map_or(1.0, |usage| 1.0 - usage.available_bytes as f64 / limit as f64)
        };
        devices.sort_by(|a, b| used(a).total_cmp(&used(b)));
        devices
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
        let others = self.process_of(id).map(|mine| self.of_process(&mine)).unwrap_or_default();
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
        // What each process took beyond what it had before its reservations here, and has not been charged yet.
        let mut taken: BTreeMap<u32, u64> = BTreeMap::new();
        // What was said goes before what can only be guessed.
        for told in [true, false] {
            for (id, reserved) in self.reservations.iter().filter(|(_, it)| it.told.is_some() == told) {
                let Some(held) = self.ledger.allocation(*id).filter(|it| it.device == *device) else {
                    continue;
                };
                // Of a process that cannot be measured any more, nothing is known to be in use.
                let left = self.process_of(*id).map(|(pid, _)| {
                    let base = self.base_of(pid, device);
                    taken.entry(pid).or_insert(used.get(&pid).map_or(0, |used| used.saturating_sub(base)))
                });
                // Neither what was said nor what was begun meanwhile is in these figures for certain.
                let when = reserved.told.map_or(reserved.since, |(when, _)| when);
                if when >= began {
                    let used = self.ledger.room(*id).map_or(0, |room| room.used_bytes);
                    if let Some(left) = left {
                        *left = left.saturating_sub(used);
                    }
                    continue;
                }
                let most = left.as_ref().map_or(u64::MAX, |left| **left);
                let own = match reserved.told {
                    Some((_, bytes)) => bytes.min(most),
                    None if left.is_none() => continue,
                    None if reserved.is_shared => most.min(held.block_bytes),
                    None => most,
                };
                if let Some(left) = left {
                    *left -= own;
                }
                self.ledger.fill(*id, own);
            }
        }
    }

    /// What a process used on a device before any of its reservations there.
    fn base_of(&self, pid: u32, device: &DeviceId) -> u64 {
        let bases = self.of_process(&(pid, device.clone()));
        bases.into_iter().filter_map(|id| self.ledger.room(id)?.base_bytes).min().unwrap_or_default()
    }

    /// What of processes' use of a device fills their reservations.
    pub(super) fn filled_on(&self, device: &DeviceId) -> BTreeMap<u32, u64> {
        let mut filled = BTreeMap::new();
        for id in self.reservations.keys() {
            if let (Some((pid, on)), Some(room)) = (self.process_of(*id), self.ledger.room(*id))
                && on == *device
            {
                *filled.entry(pid).or_insert(0) += room.used_bytes;
            }
        }
        filled
    }

    fn of_process(&self, process: &(u32, DeviceId)) -> Vec<AllocationId> {
        let of = |id: &&AllocationId| self.process_of(**id).as_ref() == Some(process);
        self.reservations.keys().filter(of).copied().collect()
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

    /// Checks what was said of the use of an allocation: it has to be a reservation, and its device as large.
    pub(super) fn check_use(&self, id: AllocationId, field: &str, bytes: u64) -> Result<(), ApiError> {
        let held = self.ledger.allocation(id).filter(|held| held.request.room.is_some());
        let Some(device) = held.and_then(|held| self.devices.get(&held.device)) else {
            let what = format!("allocation {id} is no reservation");
            return Err(ApiError::invalid(field, what).hint(format!("leave {field} out")));
        };
        let (id, total) = (&device.facts().device, device.facts().total_bytes);
        if bytes > total {
            let what = format!("{field} {bytes} is more than {id} has, which is {total}");
            return Err(ApiError::invalid(field, what));
        }
        Ok(())
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
        self.workers_changed = true;
        let reserved = self.reservations.remove(&allocation.request.id);
        // What its process gives back with it is no use of those that it still has.
        if let (Some(pid), Some(base)) = (room.pid, room.base_bytes) {
            for other in self.of_process(&(pid, allocation.device.clone())) {
                self.ledger.note_room(other, |room| room.base_bytes = room.base_bytes.min(Some(base)));
            }
        }
        let reserved = reserved.filter(|it| it.is_released)?;
        let measured = room.peak_bytes.filter(|_| !reserved.is_shared || reserved.told.is_some());
        let run = Run {
            model: room.model.clone()?,
            device: allocation.device.clone(),
            shape: room.shape.clone(),
            estimate_bytes: room.estimate_bytes,
            reserved_bytes: allocation.request.size_bytes,
            peak_bytes: reserved.peak_told.or(measured).filter(|bytes| *bytes > 0)?,
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
