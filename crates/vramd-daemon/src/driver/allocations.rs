//! Allocations: admitted or lined up, made ready by the device, kept by leases, released.

use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;
use vramd_api::{
    AllocationId, ApiError, DeviceId, ErrorCode, EventKind, Holder, LeaseId, OperationId, OwnerName,
    Placement, PlacementReason, Released, RenewRequest,
};
use vramd_core::Tick;
use vramd_core::ledger::{
    Allocation, Grant, Lease, Readiness, Release, Request, SegmentId, Shortage, State as AllocationState,
    Work,
};
use vramd_core::queue::Waiting as Queued;
use vramd_device::{Device, DeviceError, Range, SegmentId as Segment, Writers};

use super::copies::CopyId;
use super::refusals::{
    attached, being_released, nothing_to_evict, only_room, owned, refusal, refused, timed_out, too_many_wait,
};
use super::{Allocate, Caller, Event, OnStored, Reply, State};
use crate::store::{Change, StoredAllocation};
use crate::{devices, platform};

/// A client's request on its way: in the queue, or waiting for its segment.
#[derive(Debug)]
pub struct Waiting {
    pub(super) allocate: Allocate,
    pub(super) placement: Option<Placement>,
    pub(super) reply: Reply<vramd_api::Allocation>,
}

/// What happens when a reservation becomes ready.
#[derive(Debug)]
pub enum OnReady {
    Client(Box<Waiting>),
    Load(OperationId),
    /// A load that waits for room: all of its blocks, by the first.
    WaitingLoad(OperationId),
    Copy(CopyId),
    /// A persistent allocation of an earlier run, and whose it is.
    Restore(OwnerName),
}

impl OnReady {
    /// Answers a client that waits.
    pub(super) fn refuse(self, outbox: &mut Vec<Box<dyn FnOnce() + Send>>, error: impl FnOnce() -> ApiError) {
        if let Self::Client(waiting) = self {
            let error = error();
            outbox.push(Box::new(move || {
                let _ = waiting.reply.send(Err(error));
            }));
        }
    }
}

/// The data of `allocation.created`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Created {
    allocation_id: AllocationId,
    device_id: DeviceId,
    size_bytes: u64,
    owner: OwnerName,
    purpose: String,
    generation: u64,
    /// It is only room.
    is_reservation: bool,
}

/// The data of `allocation.released`.
#[derive(Debug, Serialize)]
struct ReleasedEvent<'a> {
    #[serde(flatten)]
    released: &'a Released,
    owner: &'a OwnerName,
    purpose: &'a str,
}

/// What happens when an allocation's bytes are back.
#[derive(Debug)]
pub enum OnReleased {
    Reply(Reply<Released>),
    Operation(OperationId),
}

/// How often it is looked whether packing would help those who wait: it walks all allocations.
const LOOK_FOR_WAITING_MS: u64 = 1000;

impl State {
    pub(super) fn allocate(&mut self, allocate: Allocate, reply: Reply<vramd_api::Allocation>) {
        if self.stopping {
            let error = ApiError::new(ErrorCode::Unavailable, "the daemon is stopping");
            return self.answer(reply, Err(error));
        }
        let id = allocate.request.id;
        let on: Vec<DeviceId> = allocate.on.iter().cloned().collect();
        let wait = allocate.shortage.wait_seconds;
        let others_wait = !self.queue.is_empty() && self.ledger.could_fit(&allocate.request, &on);
        if let Some(seconds) = wait.filter(|_| others_wait) {
            // Who can wait does not overtake those who do.
            self.line_up(allocate, on, self.now.tick.after_seconds(seconds), reply);
            return self.admit();
        }
        match self.ledger.reserve(allocate.request.clone(), &on, self.now) {
            Ok(grant) => {
                self.waiting
                    .insert(id, OnReady::Client(Box::new(Waiting { allocate, placement: None, reply })));
                self.granted(id, grant);
            }
            Err(shortage) => {
                if let Some(grant) = self.spill(&allocate, &shortage) {
                    self.waiting
                        .insert(id, OnReady::Client(Box::new(Waiting { allocate, placement: None, reply })));
                    return self.granted(id, grant);
                }
                if let Some(device) = shortage.closest.clone() {
                    self.counts.entry(device).or_default().refusals += 1;
                }
                let packing = self.pack_for(&shortage);
                let fits = self.ledger.could_fit(&allocate.request, &on);
                let (requests, how) = ([allocate.request.clone()], allocate.shortage);
                if fits && how.evict && self.queue.is_full() {
                    return self.answer(reply, Err(too_many_wait()));
                }
                let model = allocate.request.room.as_ref().and_then(|room| room.model.clone());
                let wait = |state: &mut Self| state.wait_for_room(&requests, &on, how, model.as_ref()).0;
                let deadline = if fits { wait(self) } else { None };
                if let Some(deadline) = deadline {
                    return self.line_up(allocate, on, deadline, reply);
                }
                let shortage = self.with_evictable(*shortage, &requests[0], model.as_ref());
                let error = refused(&shortage, packing);
                let evicted = how.evict && packing.is_none();
                self.answer(reply, Err(if evicted { nothing_to_evict(error) } else { error }));
            }
        }
    }

    /// Has one that may be in host memory instead go there.
    fn spill(&mut self, allocate: &Allocate, shortage: &Shortage) -> Option<Grant> {
        let ram = self.ram().filter(|_| allocate.shortage.spill)?;
        let considered = &shortage.placement.considered;
        let full = considered.iter().filter(|it| it.reason == PlacementReason::NotEnoughMemory);
        let full: Vec<DeviceId> = full.map(|it| it.device_id.clone()).collect();
        if full.is_empty() || full.contains(&ram) {
            return None;
        }
        let request = Request { memory_type: None, ..allocate.request.clone() };
        let mut grant = self.ledger.reserve(request, std::slice::from_ref(&ram), self.now).ok()?;
        let names: Vec<_> = full.iter().map(DeviceId::as_str).collect();
        grant.placement.reason = format!("no room on {}: it is in host memory instead", names.join(", "));
        grant.placement.spilled_from = full;
        Some(grant)
    }

    /// Begins to defragment where that could make the room that a request lacks.
    fn pack_for(&mut self, shortage: &Shortage) -> Option<OperationId> {
        self.defragment_for(shortage.pack.as_ref()?)
    }

    /// The same for those who are next on some device: their room may have come up meanwhile, in pieces.
    pub(super) fn pack_for_waiting(&mut self) {
        if self.queue.is_empty() || self.now.tick.0 < self.looked_for_waiting.0 + LOOK_FOR_WAITING_MS {
            return;
        }
        self.looked_for_waiting = self.now.tick;
        let may = |device: &DeviceId| self.defragmenting(device).is_none() && self.may_defragment_for(device);
        let mut shortages = Vec::new();
        for (waiting, mut on) in self.queue.next_on(&self.ledger) {
            on.retain(may);
            let claims = self.ledger.claimed_on(waiting.id()).is_some();
            if let ([request], false, false) = (waiting.requests.as_slice(), on.is_empty(), claims) {
                shortages.push(self.ledger.refusal(request, &on));
            }
        }
        for shortage in shortages {
            self.pack_for(&shortage);
        }
    }

    fn line_up(
        &mut self,
        allocate: Allocate,
        on: Vec<DeviceId>,
        deadline: Tick,
        reply: Reply<vramd_api::Allocation>,
    ) {
        let request = allocate.request.clone();
        let id = request.id;
        if self.queue.push(Queued { requests: vec![request], on, deadline }) {
            self.waiting.insert(id, OnReady::Client(Box::new(Waiting { allocate, placement: None, reply })));
            return;
        }
        self.ledger.give_up_claim(id);
        self.answer(reply, Err(too_many_wait()));
    }

    /// Gives waiting requests what there is now.
    pub(super) fn admit(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        for (id, grants) in self.queue.admit(&mut self.ledger, self.now) {
            if let Some(OnReady::WaitingLoad(operation)) = self.waiting.get(&id) {
                let operation = *operation;
                self.waiting.remove(&id);
                self.load_admitted(operation, grants);
            } else {
                for (id, grant) in grants {
                    self.granted(id, grant);
                }
            }
        }
    }

    pub(super) fn expire_waiting(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        for queued in self.queue.expired(self.now.tick) {
            self.ledger.give_up_claim(queued.id());
            let Some(on_ready) = self.waiting.remove(&queued.id()) else { continue };
            if let OnReady::WaitingLoad(operation) = on_ready {
                self.load_expired(operation, &queued);
                continue;
            }
            let request = &queued.requests[0];
            let shortage = self.ledger.refusal(request, &queued.on);
            let model = request.room.as_ref().and_then(|room| room.model.as_ref());
            let shortage = self.with_evictable(shortage, request, model);
            on_ready.refuse(&mut self.outbox, || timed_out(refusal(&shortage)));
        }
        let waiting = &mut self.waiting;
        let gone = self.queue.retain(|id| match waiting.get(&id) {
            Some(OnReady::Client(client)) if client.reply.is_closed() => {
                waiting.remove(&id);
                false
            }
            found => found.is_some(),
        });
        for id in gone {
            self.ledger.give_up_claim(id);
        }
    }

    pub(super) fn granted(&mut self, id: AllocationId, grant: Grant) {
        if let Some(OnReady::Client(client)) = self.waiting.get_mut(&id) {
            let mut placement = grant.placement;
            if let Some(reason) = client.allocate.reason.take().filter(|_| placement.spilled_from.is_empty())
            {
                placement.reason = reason;
            }
            client.placement = Some(placement);
        }
        self.proceed(id, grant.readiness);
    }

    /// A reservation becomes ready, at once or once its memory is there.
    pub(super) fn proceed(&mut self, id: AllocationId, readiness: Readiness) {
        match readiness {
            Readiness::Ready if self.ledger.room(id).is_some() => self.begin_reservation(id),
            Readiness::Ready => self.ready(id),
            Readiness::ReadyAfter(work) => {
                self.perform(work);
                self.begin_reservation(id);
            }
            Readiness::Waits => {}
            Readiness::Needs(work) => self.perform(work),
        }
    }

    /// Sends work to its device.
    pub(super) fn perform(&mut self, work: Work) {
        match work {
            Work::Create { device, segment, bytes, sealed, first } => {
                let writers = if sealed { Writers::DeviceOnly } else { Writers::Importers };
                let id = device.clone();
                self.spawn(&id, move |on| {
                    if let Some(first) = first
                        && let Err(error) = on.destroy(Segment(first.0))
                    {
                        return Event::SegmentCreated {
                            device,
                            segment,
                            kept: Some(first),
                            outcome: Err(error),
                        };
                    }
                    let begun = Instant::now();
                    let outcome = on.create(Segment(segment.0), bytes, writers);
                    // Pages that only the device writes to may come later.
                    let rate = bytes as f64 / begun.elapsed().as_secs_f64().max(1e-6);
                    let outcome = outcome.map(|()| (!sealed).then_some(rate));
                    Event::SegmentCreated { device, segment, kept: None, outcome }
                });
            }
            Work::Zero { device, segment, offset, bytes, allocation } => self.spawn(&device, move |on| {
                let outcome = on.zero(Range { segment: Segment(segment.0), offset, bytes });
                Event::BlockReleased { allocation, outcome: outcome.map(|()| Vec::new()) }
            }),
            Work::Free { allocation } => self.bytes_back(allocation, Vec::new()),
            Work::Release { device, segment, allocation, seen_by } => self.spawn(&device, move |on| {
                let held_by = importers(on, Segment(segment.0), seen_by);
                Event::BlockReleased { allocation, outcome: on.destroy(Segment(segment.0)).map(|()| held_by) }
            }),
            Work::Destroy { device, segment } => {
                let id = device.clone();
                self.spawn(&id, move |on| {
                    let outcome = on.destroy(Segment(segment.0));
                    Event::SegmentDestroyed { device, segment, outcome }
                });
            }
        }
    }

    pub(super) fn segment_created(
        &mut self,
        device: &DeviceId,
        segment: SegmentId,
        outcome: Result<Option<f64>, DeviceError>,
    ) {
        let error = match outcome {
            Ok(rate) => {
                if let Some(rate) = rate {
                    self.rates.entry(device.clone()).or_insert(rate);
                }
                for id in self.ledger.segment_created(device, segment) {
                    self.ready(id);
                }
                return;
            }
            Err(error) => error,
        };
        self.note_failure(device, Some(&error));
        for id in self.ledger.segment_failed(device, segment) {
            let shown = devices::error(device, &error);
            match self.waiting.remove(&id) {
                Some(OnReady::Load(operation)) => self.part_failed(operation, id, shown),
                Some(OnReady::Copy(copy)) => self.target_failed(copy, shown),
                Some(OnReady::Restore(owner)) => {
                    self.unrestored.insert(id, (device.clone(), owner));
                    tracing::error!(%id, error = %shown, "a persistent allocation is not back");
                }
                Some(client) => client.refuse(&mut self.outbox, || shown),
                None => {}
            }
        }
        self.admit();
    }

    /// The bytes of a reservation are there.
    pub(super) fn ready(&mut self, id: AllocationId) {
        match self.waiting.remove(&id) {
            // The client went away while it waited: nobody knows the id.
            Some(OnReady::Client(waiting)) if waiting.reply.is_closed() => self.discard(id),
            Some(OnReady::Client(waiting)) if waiting.allocate.lease_seconds.is_none() => {
                let Some(allocation) = self.ledger.allocation(id) else { return };
                let row = StoredAllocation {
                    id,
                    device: allocation.device.clone(),
                    generation: allocation.request.generation,
                    request: serde_json::to_string(&waiting.allocate.body)
                        .expect("a request that was read prints"),
                };
                self.store(Change::PutAllocation(row), OnStored::Activate(id, waiting));
            }
            Some(OnReady::Client(waiting)) => self.activated(id, *waiting, Ok(())),
            Some(OnReady::Load(operation)) => self.part_ready(operation, id),
            Some(OnReady::WaitingLoad(_)) => unreachable!("its blocks are admitted together"),
            Some(OnReady::Copy(copy)) => self.target_ready(copy),
            Some(OnReady::Restore(_)) => {
                self.ledger.activate(id, LeaseId(Uuid::now_v7()), Lease::Persistent, self.now);
                self.emit_created(id);
            }
            None => self.discard(id),
        }
    }

    /// Gives back what nobody waits for any more.
    fn discard(&mut self, id: AllocationId) {
        self.ledger.activate(id, LeaseId(Uuid::now_v7()), Lease::Persistent, self.now);
        self.emit_created(id);
        if let Ok(Release::Work(work)) = self.ledger.release(id, self.now) {
            self.perform(work);
        }
    }

    /// A client's allocation is ready, and in the journal if it has to be.
    pub(super) fn activated(&mut self, id: AllocationId, waiting: Waiting, stored: Result<(), ApiError>) {
        let Waiting { allocate, placement, reply } = waiting;
        if let Err(error) = stored {
            self.discard(id);
            return self.answer(reply, Err(error));
        }
        if reply.is_closed() {
            if allocate.lease_seconds.is_none() {
                self.store(Change::RemoveAllocation(id), OnStored::Nothing);
            }
            return self.discard(id);
        }
        let lease = allocate
            .lease_seconds
            .map_or(Lease::Persistent, |seconds| Lease::time_to_live(seconds, self.now));
        self.ledger.activate(id, LeaseId(Uuid::now_v7()), lease, self.now);
        self.follow(id);
        self.emit_created(id);
        let mut shown = self.ledger.allocation(id).and_then(Allocation::to_api);
        if let Some(allocation) = &mut shown {
            allocation.placement = placement;
        }
        self.answer(reply, shown.ok_or_else(|| ApiError::not_found("allocation", id)));
    }

    /// Tells of an allocation that is there now. The other place of one that moves is none.
    pub(super) fn emit_created(&mut self, id: AllocationId) {
        let Some(allocation) = self.ledger.allocation(id).filter(|one| one.place_of.is_none()) else {
            return;
        };
        let request = &allocation.request;
        let created = Created {
            allocation_id: id,
            device_id: allocation.device.clone(),
            size_bytes: request.size_bytes,
            owner: request.owner.clone(),
            purpose: request.purpose.clone(),
            generation: request.generation,
            is_reservation: request.room.is_some(),
        };
        let counts = self.counts.entry(allocation.device.clone()).or_default();
        counts.allocations += 1;
        counts.allocated_bytes += allocation.block_bytes;
        self.emit(EventKind::AllocationCreated, created);
    }

    /// An allocation of `caller`'s whose bytes can be read, written and attached.
    pub(super) fn open_to(&self, id: AllocationId, caller: Caller) -> Result<&Allocation, ApiError> {
        let found = self.ledger.allocation(id).filter(|one| one.is_open());
        let allocation = found.ok_or_else(|| ApiError::not_found("allocation", id))?;
        owned(id, &allocation.request.owner, caller)?;
        if allocation.request.room.is_some() {
            return Err(only_room(id));
        }
        Ok(allocation)
    }

    /// A live allocation that `caller` may release and renew.
    fn of_caller(&self, id: AllocationId, caller: Caller) -> Result<&Allocation, ApiError> {
        let found = self.ledger.allocation(id).filter(|found| found.state != AllocationState::Reserved);
        let allocation = found.ok_or_else(|| ApiError::not_found("allocation", id))?;
        owned(id, &allocation.request.owner, caller)?;
        Ok(allocation)
    }

    pub(super) fn release(
        &mut self,
        id: AllocationId,
        peak: Option<u64>,
        caller: Caller,
        reply: Reply<Released>,
    ) {
        if let Some((_, owner)) = self.unrestored.get(&id) {
            return match owned(id, owner, caller) {
                Ok(()) => self.store(Change::RemoveAllocation(id), OnStored::Forget(id, reply)),
                Err(error) => self.answer(reply, Err(error)),
            };
        }
        let allocation = match self.of_caller(id, caller) {
            Ok(allocation) => allocation,
            Err(error) => return self.answer(reply, Err(error)),
        };
        if allocation.request.sealed {
            let model = allocation.request.purpose.split('/').next().unwrap_or_default();
            let error =
                ApiError::new(ErrorCode::Conflict, format!("allocation {id} belongs to model {model}"))
                    .hint(format!("unload the model instead: `vramd unload {model}`"));
            return self.answer(reply, Err(error));
        }
        let goes = self.removing.contains(&id) || self.releasing.contains_key(&id);
        if allocation.state == AllocationState::Releasing || goes {
            return self.answer(reply, Err(being_released(id)));
        }
        if let Some(of) = allocation.place_of {
            let error = ApiError::new(ErrorCode::Conflict, format!("{id} is the other place of {of}"))
                .hint("it goes by itself; release that one instead");
            return self.answer(reply, Err(error));
        }
        if allocation.is_attached() {
            let holders = allocation.holders().cloned().collect::<Vec<_>>();
            return self.answer(reply, Err(attached(&format!("allocation {id}"), &holders)));
        }
        let is_persistent = allocation.request.persistent;
        if let Some(bytes) = peak {
            if let Err(error) = self.check_use(id, "peakBytes", bytes) {
                return self.answer(reply, Err(error));
            }
            self.ledger.note_room(id, |room| room.peak_bytes = room.peak_bytes.max(Some(bytes)));
        }
        self.ends_well(id, peak);
        if is_persistent {
            self.removing.insert(id);
            self.store(Change::RemoveAllocation(id), OnStored::Release(id, reply));
        } else {
            self.release_stored(id, reply, Ok(()));
        }
    }

    pub(super) fn release_stored(
        &mut self,
        id: AllocationId,
        reply: Reply<Released>,
        stored: Result<(), ApiError>,
    ) {
        self.removing.remove(&id);
        if let Err(error) = stored {
            return self.answer(reply, Err(error));
        }
        match self.ledger.release(id, self.now) {
            Ok(Release::Work(work)) => {
                self.releasing.insert(id, OnReleased::Reply(reply));
                self.perform(work);
            }
            Ok(Release::Later) => {
                self.releasing.insert(id, OnReleased::Reply(reply));
                self.cancel_copies_of(id);
            }
            Ok(Release::NotActive) => self.answer(reply, Err(ApiError::not_found("allocation", id))),
            Err(in_use) => self.answer(reply, Err(attached(&format!("allocation {id}"), &in_use.holders))),
        }
    }

    /// A persistent allocation that was not back is forgotten.
    pub(super) fn forgotten(
        &mut self,
        id: AllocationId,
        reply: Reply<Released>,
        stored: Result<(), ApiError>,
    ) {
        let answer = stored.and_then(|()| {
            let (device_id, _) =
                self.unrestored.remove(&id).ok_or_else(|| ApiError::not_found("allocation", id))?;
            Ok(Released {
                allocation_id: id,
                device_id,
                released_bytes: 0,
                verified: true,
                held_by: Vec::new(),
                footprint: None,
            })
        });
        self.answer(reply, answer);
    }

    /// The device has given bytes back, or failed at it: then they stay charged and are given back again later.
    pub(super) fn block_released(&mut self, id: AllocationId, outcome: Result<Vec<Holder>, DeviceError>) {
        let Some(device) = self.ledger.allocation(id).map(|allocation| allocation.device.clone()) else {
            return;
        };
        let error = match outcome {
            Ok(held_by) => return self.bytes_back(id, held_by),
            Err(error) => error,
        };
        self.note_failure(&device, Some(&error));
        if self.ledger.is_lost(&device) {
            // There is nothing left to give back, and nobody gets these bytes any more.
            return self.bytes_back(id, Vec::new());
        }
        self.unreleased.insert(id);
        if let Some(OnReleased::Reply(_)) = self.releasing.get(&id)
            && let Some(OnReleased::Reply(reply)) = self.releasing.remove(&id)
        {
            let shown = devices::error(&device, &error)
                .hint("its bytes stay charged; the daemon goes on trying to give them back");
            self.answer(reply, Err(shown));
        }
    }

    pub(super) fn segment_destroyed(
        &mut self,
        device: DeviceId,
        segment: SegmentId,
        outcome: &Result<(), DeviceError>,
    ) {
        self.note_failure(&device, outcome.as_ref().err());
        if outcome.is_err() && !self.ledger.is_lost(&device) {
            self.undestroyed.insert((device, segment));
            return;
        }
        self.ledger.destroyed(&device, segment);
        self.pool_freed(segment);
        self.to_go_on.extend(self.operations.running.keys());
        self.admit();
    }

    /// Asks devices again for what they failed to give back.
    pub(super) fn release_again(&mut self) {
        for id in std::mem::take(&mut self.unreleased) {
            if let Some(work) = self.ledger.release_work(id) {
                self.perform(work);
            }
        }
        for (device, segment) in std::mem::take(&mut self.undestroyed) {
            self.perform(Work::Destroy { device, segment });
        }
    }

    pub(super) fn bytes_back(&mut self, id: AllocationId, held_by: Vec<Holder>) {
        let Some((allocation, left)) = self.ledger.released(id) else { return };
        if let Some(work) = left {
            self.perform(work);
        }
        let released = Released {
            allocation_id: id,
            device_id: allocation.device.clone(),
            released_bytes: allocation.block_bytes,
            verified: held_by.is_empty(),
            held_by,
            footprint: self.learn(&allocation),
        };
        if allocation.place_of.is_none() {
            let data = ReleasedEvent {
                released: &released,
                owner: &allocation.request.owner,
                purpose: &allocation.request.purpose,
            };
            self.emit(EventKind::AllocationReleased, data);
            let counts = self.counts.entry(allocation.device.clone()).or_default();
            counts.releases += 1;
            counts.released_bytes += allocation.block_bytes;
        }
        match self.releasing.remove(&id) {
            Some(OnReleased::Reply(reply)) => self.answer(reply, Ok(released)),
            Some(OnReleased::Operation(operation)) => self.part_released(operation, id, &released.held_by),
            None => {}
        }
        self.admit();
        self.begin_demotions();
    }

    pub(super) fn renew(
        &mut self,
        id: AllocationId,
        request: &RenewRequest,
        caller: Caller,
        reply: Reply<vramd_api::Allocation>,
    ) {
        let used = request.used_bytes.map(|bytes| self.check_use(id, "usedBytes", bytes));
        if let Err(error) = self.of_caller(id, caller).and(used.unwrap_or(Ok(()))) {
            return self.answer(reply, Err(error));
        }
        if let Some(bytes) = request.used_bytes {
            self.told_used(id, bytes);
        }
        let renewed = self.ledger.renew(id, request.lease_seconds, self.now);
        let shown = self.ledger.allocation(id).and_then(Allocation::to_api);
        let answer = renewed.and(shown).ok_or_else(|| {
            ApiError::new(ErrorCode::Conflict, format!("allocation {id} has no lease with a time to live"))
                .hint("persistent allocations and models are kept without one")
        });
        self.answer(reply, answer);
    }

    /// A lease ended, by itself or because its connection closed.
    pub(super) fn lease_ended(&mut self, lease: LeaseId) {
        let Some((id, work)) = self.ledger.end_lease(lease, self.now) else { return };
        self.emit(EventKind::LeaseEnded, serde_json::json!({ "leaseId": lease, "allocationId": id }));
        self.detached(id, lease);
        self.cancel_copies_of(id);
        if let Some(work) = work {
            self.perform(work);
        }
    }
}

/// How long processes that had a segment attached may take to let go of it before they are named.
const LET_GO: Duration = Duration::from_millis(1200);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Which of those that had a segment attached still have its memory, after a while in which they may let go of it.
/// Blocks.
fn importers(on: &dyn Device, segment: Segment, mut seen_by: Vec<Holder>) -> Vec<Holder> {
    let begun = Instant::now();
    while !seen_by.is_empty() {
        let processes: Vec<_> = seen_by.iter().map(|holder| holder.pid).collect();
        // What the device cannot tell holds up no release.
        let Some(left) = on.importers(segment, &processes).unwrap_or(Some(Vec::new())) else {
            // Whoever lives may have it still.
            seen_by.retain(|holder| platform::lives(holder.pid));
            break;
        };
        seen_by.retain(|holder| left.contains(&holder.pid));
        if begun.elapsed() >= LET_GO {
            break;
        }
        if !seen_by.is_empty() {
            std::thread::park_timeout(LOOK_AGAIN);
        }
    }
    seen_by
}
