//! Copies of blocks, which moves, transfers and defragmentations are made of.
//!
//! `waiting for its target → copying → (journal) → ended`. Both blocks are kept by a lease of the operation meanwhile, so
//! a source that is released half-way goes only once the copy has stopped, and a target that nobody got goes by itself.
//! What becomes of the target is the copy's [`Purpose`]; what becomes of the operation is decided where that is
//! kept ([`State::copy_ended`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;
use vramd_api::{AllocationId, ApiError, DeviceId, ErrorCode, EventKind, LeaseId, OperationId};
use vramd_core::ledger::{Fixed, Lease, NewPlace, Request, Task};
use vramd_device::{Range, SegmentId};

use super::allocations::{OnReady, OnReleased};
use super::attachments::Pending;
use super::operations::Running;
use super::{Event, OnStored, State};
use crate::mover::{CopyFailure, Job, Opened, Outcome};
use crate::store::{Change, StoredAllocation};

/// Names a copy; counted up.
pub type CopyId = u64;

/// What becomes of the target.
#[derive(Debug)]
pub(super) enum Purpose {
    /// The source gets the target's place, and goes on as it was.
    Move,
    /// It is an allocation of its own, kept for so many seconds from then on, or until it is released.
    Keep(Option<u64>),
    /// It is a model's component on another device: the transfer knows. `moves`: the source goes, so that nobody may
    /// have it attached by then.
    Component { moves: bool },
    /// It was there before.
    Into,
}

/// One copy under way.
#[derive(Debug)]
pub(super) struct Copy {
    pub operation: OperationId,
    pub source: AllocationId,
    pub target: AllocationId,
    pub purpose: Purpose,
    /// In the source and in the target.
    pub offsets: (u64, u64),
    pub bytes: u64,
    pub checksum: bool,
    source_lease: LeaseId,
    /// None until the target is there.
    pub target_lease: Option<LeaseId>,
    /// How often somebody had begun to write to the source.
    writes: u64,
    cancelled: Arc<AtomicBool>,
}

/// Why a copy came to nothing.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The source changed meanwhile.
    Stale(Fixed),
    Failed(ApiError),
}

impl CopyError {
    pub(super) fn to_api(&self, source: AllocationId) -> ApiError {
        match self {
            Self::Failed(error) => error.clone(),
            Self::Stale(fixed) => {
                let again = "it is as it was, without a copy; try again";
                let (why, hint) = match fixed {
                    Fixed::Written => ("was written to", again),
                    Fixed::Reader => ("was attached", again),
                    Fixed::Busy => ("was released", "there is no copy of it"),
                };
                ApiError::new(ErrorCode::Conflict, format!("allocation {source} {why} meanwhile")).hint(hint)
            }
        }
    }
}

/// What a copy is to do.
pub(super) struct NewCopy {
    pub operation: OperationId,
    pub source: AllocationId,
    pub target: AllocationId,
    pub purpose: Purpose,
    pub offsets: (u64, u64),
    pub bytes: u64,
    pub checksum: bool,
}

impl Copy {
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl State {
    /// Takes a copy into the books; its target is reserved, or there ([`Purpose::Into`]).
    pub(super) fn begin_copy(&mut self, new: NewCopy) -> CopyId {
        let NewCopy { operation, source, target, purpose, offsets, bytes, checksum } = new;
        let task = if matches!(purpose, Purpose::Move) { Task::Move } else { Task::Read };
        let source_lease = LeaseId(Uuid::now_v7());
        let granted = self.ledger.grant(source, source_lease, Lease::Operation { task }, self.now);
        debug_assert!(granted, "whoever begins a copy has looked at its source");
        self.last_copy += 1;
        let id = self.last_copy;
        let copy = Copy {
            operation,
            source,
            target,
            offsets,
            bytes,
            checksum,
            source_lease,
            target_lease: None,
            writes: self.ledger.allocation(source).map_or(0, |source| source.writes),
            cancelled: Arc::default(),
            purpose,
        };
        let into = matches!(copy.purpose, Purpose::Into);
        self.copies.insert(id, copy);
        if into {
            let lease = LeaseId(Uuid::now_v7());
            self.ledger.grant(target, lease, Lease::Operation { task: Task::Write }, self.now);
            self.submit(id, lease);
        } else {
            self.waiting.insert(target, OnReady::Copy(id));
        }
        id
    }

    /// Begins to move an allocation to `at`; None if that place is taken.
    pub(super) fn begin_move(
        &mut self,
        operation: OperationId,
        source: AllocationId,
        at: NewPlace,
    ) -> Option<CopyId> {
        let allocation = self.ledger.allocation(source)?;
        let (device, bytes) = (allocation.device.clone(), allocation.request.size_bytes);
        let target = AllocationId(Uuid::now_v7());
        self.ledger.reserve_place(target, source, &device, Some(at), self.now)?;
        let copy = self.begin_copy(NewCopy {
            operation,
            source,
            target,
            purpose: Purpose::Move,
            offsets: (0, 0),
            bytes,
            checksum: false,
        });
        self.ready(target);
        Some(copy)
    }

    /// A copy's target is there.
    pub(super) fn target_ready(&mut self, id: CopyId) {
        let Some(target) = self.copies.get(&id).map(|copy| copy.target) else { return };
        let lease = LeaseId(Uuid::now_v7());
        self.ledger.activate(target, lease, Lease::Operation { task: Task::Place }, self.now);
        self.emit_created(target);
        self.submit(id, lease);
    }

    /// A copy's target cannot be had; its reservation is gone.
    pub(super) fn target_failed(&mut self, id: CopyId, error: ApiError) {
        self.give_up(id, CopyError::Failed(error));
    }

    fn submit(&mut self, id: CopyId, target_lease: LeaseId) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.target_lease = Some(target_lease);
        let block = |allocation: AllocationId, offset: u64| {
            let block = self.ledger.allocation(allocation)?;
            let device = self.devices.get(&block.device)?.clone();
            let segment = SegmentId(block.segment.0);
            let range = Range { segment, offset: block.offset + offset, bytes: copy.bytes };
            Some((Arc::new(Opened(device)), range))
        };
        let (Some(from), Some(to)) = (block(copy.source, copy.offsets.0), block(copy.target, copy.offsets.1))
        else {
            unreachable!("both are kept by the operation's leases, on devices that opened");
        };
        let progress = self.operations.progress(copy.operation).unwrap_or_default();
        let job = Job {
            flow: flow(copy.operation),
            from,
            to,
            checksum: copy.checksum,
            bounded: self.operations.is_bounded(copy.operation),
            progress,
            cancelled: copy.cancelled.clone(),
        };
        let sender = self.sender.clone();
        self.jobs += 1;
        self.mover.submit(
            job,
            Box::new(move |outcome| {
                let _ = sender.blocking_send(Event::Copied { copy: id, outcome });
            }),
        );
    }

    /// The threads are done with a copy.
    pub(super) fn copied(&mut self, id: CopyId, outcome: Outcome) {
        let Some(copy) = self.copies.get(&id) else { return };
        let (source, target, writes) = (copy.source, copy.target, copy.writes);
        let checksum = match outcome {
            Ok(checksum) => checksum,
            Err(failure) => {
                let released = self.ledger.allocation(source).is_none_or(|source| !source.is_kept());
                let wanted = self.operations.cancelled(copy.operation);
                let error = match failure {
                    CopyFailure::Cancelled if released => CopyError::Stale(Fixed::Busy),
                    CopyFailure::Cancelled if !wanted => target_released(target),
                    failure => CopyError::Failed(self.copy_failed(failure)),
                };
                return self.give_up(id, error);
            }
        };
        let stale = match &copy.purpose {
            // Its row in the journal goes: what is written after that would bring it back.
            _ if self.removing.contains(&source) || self.removing.contains(&target) => Some(Fixed::Busy),
            Purpose::Move => self.ledger.stale(source, target, writes),
            // Both ranges are of the one allocation, which the copy itself writes to.
            Purpose::Into if source == target => None,
            // Its last piece was under way when it was told to stop.
            Purpose::Keep(_) if self.releasing.contains_key(&target) => {
                return self.give_up(id, target_released(target));
            }
            purpose @ (Purpose::Keep(_) | Purpose::Component { .. } | Purpose::Into) => {
                let moves = matches!(purpose, Purpose::Component { moves: true });
                match self.ledger.allocation(source) {
                    Some(source) if source.writes == writes && !source.is_written() => {
                        let used = source.is_attached() || source.model_count() > 1;
                        (moves && used).then_some(Fixed::Reader)
                    }
                    _ => Some(Fixed::Written),
                }
            }
        };
        if let Some(fixed) = stale {
            return self.give_up(id, CopyError::Stale(fixed));
        }
        match self.change_of(copy) {
            Some(change) => self.store(change, OnStored::Copied(id, checksum)),
            None => self.copy_stored(id, checksum, Ok(())),
        }
    }

    /// What the journal has to know before the copy counts.
    fn change_of(&self, copy: &Copy) -> Option<Change> {
        let (source, target) = (self.ledger.allocation(copy.source)?, self.ledger.allocation(copy.target)?);
        let (id, generation) = match &copy.purpose {
            Purpose::Move if source.request.persistent => (copy.source, source.request.generation + 1),
            Purpose::Keep(None) => (copy.target, 1),
            Purpose::Move | Purpose::Keep(_) | Purpose::Component { .. } | Purpose::Into => return None,
        };
        Some(row(id, &source.request, target.device.clone(), generation))
    }

    /// The journal has what it has to know: the copy counts.
    pub(super) fn copy_stored(&mut self, id: CopyId, checksum: Option<u64>, stored: Result<(), ApiError>) {
        if let Err(error) = stored {
            return self.give_up(id, CopyError::Failed(error));
        }
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let (source, target, writes) = (copy.source, copy.target, copy.writes);
        match std::mem::replace(&mut copy.purpose, Purpose::Into) {
            Purpose::Move => {
                // The journal may have taken its time.
                let removing = self.removing.contains(&source).then_some(Fixed::Busy);
                if let Some(fixed) = removing.or_else(|| self.ledger.stale(source, target, writes)) {
                    self.remember_place(source);
                    return self.give_up(id, CopyError::Stale(fixed));
                }
                self.swap(source, target);
            }
            Purpose::Keep(seconds) => {
                let lease =
                    seconds.map_or(Lease::Persistent, |seconds| Lease::time_to_live(seconds, self.now));
                self.ledger.grant(target, LeaseId(Uuid::now_v7()), lease, self.now);
            }
            Purpose::Component { .. } | Purpose::Into => {}
        }
        let Some(mut copy) = self.copies.remove(&id) else { return };
        self.copy_ended(copy.operation, id, Ok((&mut copy, checksum)));
        self.end_copy_leases(&copy);
    }

    /// The source gets the new place; those who have it attached are told, and keep the old one until they answer.
    fn swap(&mut self, source: AllocationId, place: AllocationId) {
        let Some(from) = self.ledger.allocation(source).map(|allocation| allocation.device.clone()) else {
            return;
        };
        self.ledger.swap_places(source, place, self.now);
        let Some(allocation) = self.ledger.allocation(source).cloned() else { return };
        let generation = allocation.request.generation;
        for (lease, kept) in self.ledger.readers(source) {
            let old = LeaseId(Uuid::now_v7());
            self.ledger.grant(place, old, kept, self.now);
            self.tell_reader(lease, &allocation, Pending { generation, old, refused: false });
        }
        let data = serde_json::json!({
            "allocationId": source, "generation": generation, "sourceDeviceId": from,
            "deviceId": allocation.device, "sizeBytes": allocation.request.size_bytes,
        });
        self.emit(EventKind::AllocationMoved, data);
    }

    /// The journal knows a move that came to nothing: it is told where the allocation is.
    fn remember_place(&mut self, id: AllocationId) {
        let Some(allocation) = self.ledger.allocation(id).filter(|it| it.is_kept() && it.request.persistent)
        else {
            return;
        };
        if self.removing.contains(&id) {
            return;
        }
        let request = &allocation.request;
        let change = row(id, request, allocation.device.clone(), request.generation);
        self.store(change, OnStored::Nothing);
    }

    fn give_up(&mut self, id: CopyId, error: CopyError) {
        let Some(copy) = self.copies.remove(&id) else { return };
        self.copy_ended(copy.operation, id, Err((&copy, error)));
        self.end_copy_leases(&copy);
    }

    fn end_copy_leases(&mut self, copy: &Copy) {
        self.finish_lease(copy.source_lease);
        if let Some(lease) = copy.target_lease {
            self.finish_lease(lease);
        }
    }

    /// Ends a lease of our own; what is left without one goes.
    pub(super) fn finish_lease(&mut self, lease: LeaseId) {
        match self.ledger.end_lease(lease, self.now) {
            Some((_, Some(work))) => self.perform(work),
            Some((id, None)) => self.place_let_go(id),
            None => {}
        }
    }

    fn copy_failed(&mut self, failure: CopyFailure) -> ApiError {
        match failure {
            CopyFailure::Cancelled => {
                ApiError::new(ErrorCode::Cancelled, "it was cancelled; the old bytes are as they were")
            }
            CopyFailure::Device(device, error) => {
                self.note_failure(&device, Some(&error));
                crate::devices::error(&device, &error)
            }
            CopyFailure::Checksum(device) => ApiError::new(
                ErrorCode::ChecksumMismatch,
                format!("what arrived on {device} is not what was sent"),
            )
            .hint("the old bytes are as they were; the device or its memory may be failing"),
        }
    }

    /// Copies of what nobody keeps any more need not go on.
    pub(super) fn cancel_copies_of(&mut self, id: AllocationId) {
        if self.copies.is_empty()
            || self.ledger.allocation(id).is_some_and(vramd_core::ledger::Allocation::is_kept)
        {
            return;
        }
        for copy in self.copies.values().filter(|copy| copy.source == id || copy.target == id) {
            copy.cancel();
        }
        self.mover.sweep();
    }

    /// A copy has ended, and so far its blocks are still kept: what its operation does next.
    fn copy_ended(
        &mut self,
        operation: OperationId,
        id: CopyId,
        outcome: Result<(&mut Copy, Option<u64>), (&Copy, CopyError)>,
    ) {
        match self.operations.running.get(&operation) {
            Some(Running::Defragment(_)) => self.block_moved(operation, id, outcome),
            Some(Running::Transfer(_)) => self.item_ended(operation, id, outcome),
            Some(Running::Unload(_)) => {
                let copy = match &outcome {
                    Ok((copy, _)) => &**copy,
                    Err((copy, _)) => copy,
                };
                self.demoted(operation, outcome.is_ok(), (copy.source, copy.target));
            }
            Some(Running::Load(_) | Running::Clear(_) | Running::Split(_) | Running::Relief(_)) | None => {}
        }
    }

    /// Waits until the bytes that an operation's copy leaves behind are back.
    pub(super) fn await_release(&mut self, operation: OperationId, left: AllocationId) {
        self.releasing.insert(left, OnReleased::Operation(operation));
    }
}

fn target_released(target: AllocationId) -> CopyError {
    let what = format!("allocation {target}, which it was copied to, was released meanwhile");
    CopyError::Failed(ApiError::new(ErrorCode::Conflict, what).hint("the source is as it was"))
}

/// An allocation as the journal keeps it.
fn row(id: AllocationId, request: &Request, device: DeviceId, generation: u64) -> Change {
    let request = serde_json::to_string(&crate::requests::body(request)).expect("a request prints");
    Change::PutAllocation(StoredAllocation { id, device, generation, request })
}

/// The flow of an operation's copies.
pub(super) fn flow(operation: OperationId) -> u64 {
    let (high, low) = operation.0.as_u64_pair();
    high ^ low
}
