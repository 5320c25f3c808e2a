//! Reservations: room beside the weights that a process fills, followed while it does, and what is learned when it has ended.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use vramd_api::{AllocationId, ApiError, Basis, Bytes, DeviceId, ErrorCode, Footprint, ModelName};
use vramd_core::Tick;
use vramd_core::footprints::Run;
use vramd_core::ledger::Allocation;

use super::{Allocate, Event, OnStored, Reply, State};
use crate::platform;
use crate::store::Change;

/// An active reservation.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    /// What its owner said is in use, and when.
    told: Option<(Tick, u64)>,
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
                    None => self.ledger.devices().map(|facts| facts.device.clone()).collect(),
                };
                let known = |device| self.footprints.expect(name, device, &room.shape, room.estimate_bytes);
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
        self.spawn(&device, move |on| Event::BaseMeasured { reservation: id, outcome: on.used_by(pid) });
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
        let of = |id| Some((self.ledger.room(id)?.pid?, &self.ledger.allocation(id)?.device));
        let mine = of(id);
        let others = self.reservations.keys().filter(|other| mine.is_some() && of(**other) == mine);
        let mut together: Vec<_> = others.copied().collect();
        self.reservations.insert(id, Reserved { told });
        if !together.is_empty() {
            // How much of what a process uses is for which of its reservations, only its owner can say.
            together.push(id);
            for id in together {
                self.ledger.fill(id, 0);
                self.ledger.note_room(id, |room| (room.base_bytes, room.peak_bytes) = (None, None));
            }
        }
    }

    /// The processes whose use of a device is to be measured.
    pub(super) fn followed(&self, device: &DeviceId) -> Vec<u32> {
        let here = |id: &&AllocationId| self.ledger.allocation(**id).is_some_and(|it| it.device == *device);
        let room = |id| self.ledger.room(id).filter(|room| room.base_bytes.is_some());
        self.reservations.keys().filter(here).filter_map(|id| room(*id)?.pid).collect()
    }

    /// Takes in what was measured on a device since `began`.
    pub(super) fn fill_reservations(&mut self, device: &DeviceId, used: &BTreeMap<u32, u64>, began: Tick) {
        for (id, reserved) in &self.reservations {
            let here = self.ledger.allocation(*id).filter(|it| it.device == *device);
            let Some(room) = here.and_then(|it| it.request.room.as_ref()) else { continue };
            let measured = room.pid.and_then(|pid| Some(used.get(&pid)?.saturating_sub(room.base_bytes?)));
            // What was said meanwhile may not be in the device's figures yet.
            let in_use = match reserved.told {
                Some((when, bytes)) => (when < began).then_some(bytes),
                None => measured,
            };
            if let Some(bytes) = in_use {
                self.ledger.fill(*id, bytes);
            }
        }
    }

    /// Ends the reservations of processes that have ended.
    pub(super) fn end_reservations(&mut self) {
        let ended = |id: &&AllocationId| {
            self.ledger.room(**id).and_then(|room| room.pid).is_some_and(|pid| !platform::lives(pid))
        };
        for id in self.reservations.keys().filter(ended).copied().collect::<Vec<_>>() {
            // What it took before it died says little of a run that does not.
            self.ledger.note_room(id, |room| room.peak_bytes = None);
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
        if let Some(reserved) = self.reservations.get_mut(&id) {
            reserved.told = Some((self.now.tick, bytes));
            self.ledger.note_room(id, |room| room.peak_bytes = room.peak_bytes.max(Some(bytes)));
        }
    }

    /// A reservation is over: what it took is learned, if that is known.
    pub(super) fn learn(&mut self, allocation: &Allocation) -> Option<Footprint> {
        let room = allocation.request.room.as_deref()?;
        self.reservations.remove(&allocation.request.id)?;
        // Nobody took more than there is.
        let total = self.devices.get(&allocation.device)?.facts().total_bytes;
        let run = Run {
            model: room.model.clone()?,
            device: allocation.device.clone(),
            shape: room.shape.clone(),
            estimate_bytes: room.estimate_bytes,
            reserved_bytes: allocation.request.size_bytes,
            peak_bytes: room.peak_bytes.filter(|bytes| *bytes > 0)?.min(total),
            ended_at: self.now.wall,
        };
        let (footprint, forgotten) = Arc::make_mut(&mut self.footprints).learn(run);
        let mut changes: Vec<_> =
            forgotten.into_iter().map(|one| Change::RemoveFootprint(Box::new(one))).collect();
        changes.push(Change::PutFootprint(Box::new(footprint.clone())));
        self.store_all(changes, OnStored::Nothing);
        Some(footprint)
    }

    /// A model is no more.
    pub(super) fn forget_footprints(&mut self, model: &ModelName) {
        let forgotten = Arc::make_mut(&mut self.footprints).forget(model);
        if !forgotten.is_empty() {
            let gone = forgotten.into_iter().map(|one| Change::RemoveFootprint(Box::new(one)));
            self.store_all(gone.collect(), OnStored::Nothing);
        }
    }
}

/// What only its owner's process can do with a reservation.
pub(super) fn only_room(id: AllocationId) -> ApiError {
    ApiError::new(ErrorCode::Conflict, format!("allocation {id} is only room: vramd has no bytes of it"))
        .hint("the process that it is reserved for makes them")
        .detail("allocationId", json!(id))
}
