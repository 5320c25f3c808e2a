//! Clearing: the free pool, idle models, an owner's allocations, or the bytes of one.
//!
//! What is to go is chosen at once and released as if it had been asked for piece by piece. When all of it has been
//! answered, the devices are measured once more: the answer says what was asked, what the devices acknowledged, and what
//! their measured use fell by.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::oneshot;
use uuid::Uuid;
use vramd_api::{
    AllocationId, ApiError, ClearRequest, ClearTarget, Cleared, DeviceId, ErrorCode, EventKind, FixedBlock,
    FixedReason, LeaseId, ModelName, Operation, OperationId, OperationKind, Released,
};
use vramd_core::ledger::{Lease, SegmentId, Task};
use vramd_device::{DeviceError, Range, SegmentId as Segment};

use super::operations::Running;
use super::refusals::{attached, owned};
use super::{Caller, Event, Reply, State};

/// A clearing under way.
#[derive(Debug)]
pub(super) struct Clearing {
    answer: Cleared,
    allocations: BTreeSet<AllocationId>,
    segments: BTreeMap<SegmentId, u64>,
    unloads: BTreeSet<OperationId>,
    /// The lease on what is being zeroed.
    zeroing: Option<LeaseId>,
    used_before: BTreeMap<DeviceId, u64>,
    /// Devices to be measured since then.
    unmeasured: BTreeSet<DeviceId>,
    since: Option<vramd_core::Tick>,
    /// One of them could not be.
    unknown: bool,
    failed: Option<ApiError>,
}

/// What a request would clear.
#[derive(Debug, Default)]
struct Chosen {
    devices: Vec<DeviceId>,
    pools: Vec<(DeviceId, SegmentId, u64)>,
    models: BTreeMap<ModelName, (Vec<DeviceId>, u64)>,
    allocations: Vec<(AllocationId, u64)>,
    kept: Vec<FixedBlock>,
}

impl State {
    pub(super) fn plan_clear(
        &mut self,
        request: &ClearRequest,
        device: Option<DeviceId>,
        caller: Caller,
        reply: Reply<Cleared>,
    ) {
        let answer = self.choose_clear(request, device, caller).map(|chosen| chosen.answer(true));
        self.answer(reply, answer);
    }

    pub(super) fn clear(
        &mut self,
        request: &ClearRequest,
        device: Option<DeviceId>,
        caller: Caller,
        reply: Reply<Operation>,
    ) {
        let answer = self.begin_clear(request, device, caller);
        self.answer(reply, answer);
    }

    fn choose_clear(
        &self,
        request: &ClearRequest,
        device: Option<DeviceId>,
        caller: Caller,
    ) -> Result<Chosen, ApiError> {
        if request.force && !caller.is_admin() {
            return Err(ApiError::new(
                ErrorCode::PermissionDenied,
                "only root and the daemon's own user may force",
            )
            .hint("leave out force: what nobody has attached is cleared without it"));
        }
        if request.force && matches!(request.what, ClearTarget::Cache | ClearTarget::Unused) {
            return Err(ApiError::invalid("force", "only Allocations and Zero can be forced")
                .hint("models are unloaded once the processes that have them attached have closed them"));
        }
        let devices: Vec<DeviceId> = device.map_or_else(
            || self.ledger.devices().map(|facts| facts.device.clone()).collect(),
            |one| vec![one],
        );
        let mut chosen = Chosen { devices, ..Chosen::default() };
        match request.what {
            ClearTarget::Cache => self.choose_pools(&mut chosen),
            ClearTarget::Unused => {
                self.choose_models(&mut chosen);
                self.choose_pools(&mut chosen);
            }
            ClearTarget::Allocations => {
                let owner = request.owner.as_ref().ok_or_else(|| {
                    ApiError::invalid("owner", "clearing allocations needs an owner")
                        .hint("`vramd ps` shows who owns what")
                })?;
                for (id, allocation) in self.ledger.allocations() {
                    let meant = allocation.is_open()
                        && !allocation.request.sealed
                        && allocation.request.owner == *owner
                        && chosen.devices.contains(&allocation.device);
                    if !meant {
                        continue;
                    }
                    owned(*id, owner, caller)?;
                    if allocation.is_attached() && !request.force {
                        let holders = allocation.holders().cloned().collect();
                        chosen.kept.push(FixedBlock {
                            allocation_id: *id,
                            reason: FixedReason::Attached,
                            holders,
                        });
                    } else {
                        chosen.allocations.push((*id, allocation.block_bytes));
                    }
                }
            }
            ClearTarget::Zero => {
                let id = request
                    .allocation_id
                    .ok_or_else(|| ApiError::invalid("allocationId", "zeroing needs an allocation"))?;
                let allocation = self.open_to(id, caller)?;
                if !chosen.devices.contains(&allocation.device) {
                    return Err(ApiError::not_found("allocation", id));
                }
                if allocation.request.sealed {
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("allocation {id} belongs to a model"),
                    )
                    .hint("unload the model instead"));
                }
                if allocation.tasks().next().is_some() {
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("an operation is at work on allocation {id}"),
                    )
                    .hint("wait until it has ended: `vramd operations`"));
                }
                if allocation.is_attached() && !request.force {
                    let holders: Vec<_> = allocation.holders().cloned().collect();
                    return Err(attached(&format!("allocation {id}"), &holders));
                }
                self.all_follow(id)?;
                chosen.devices = vec![allocation.device.clone()];
                chosen.allocations.push((id, 0));
            }
        }
        Ok(chosen)
    }

    fn choose_pools(&self, chosen: &mut Chosen) {
        for device in &chosen.devices {
            if let Some((segment, bytes)) = self.ledger.spare(device) {
                chosen.pools.push((device.clone(), segment, bytes));
            }
        }
    }

    fn choose_models(&self, chosen: &mut Chosen) {
        let allocations = self.ledger.allocations();
        for model in self.models.iter() {
            if self.is_on_its_way(model) || self.changing.contains(&model.name) {
                continue;
            }
            let residencies = model.components.values().flat_map(|component| &component.residency);
            let here = residencies.filter(|(device, _)| chosen.devices.contains(device));
            for allocation in here.filter_map(|(_, residency)| allocations.get(&residency.allocation())) {
                let holders: Vec<_> = allocation.holders().cloned().collect();
                if model.pinned || !holders.is_empty() {
                    let reason = if model.pinned { FixedReason::Pinned } else { FixedReason::Attached };
                    chosen.kept.push(FixedBlock { allocation_id: allocation.request.id, reason, holders });
                }
            }
            if model.pinned {
                continue;
            }
            let idle = |device: &&DeviceId| model.holders(Some(*device), allocations).is_empty();
            let resident = model.resident_on();
            let on: Vec<DeviceId> = chosen
                .devices
                .iter()
                .filter(|device| resident.contains(device))
                .filter(idle)
                .cloned()
                .collect();
            let bytes = model
                .components
                .values()
                .flat_map(|component| &component.residency)
                .filter(|(device, _)| on.contains(device))
                .filter_map(|(_, residency)| allocations.get(&residency.allocation()))
                .map(|allocation| allocation.block_bytes)
                .sum();
            if !on.is_empty() {
                chosen.models.insert(model.name.clone(), (on, bytes));
            }
        }
    }

    fn begin_clear(
        &mut self,
        request: &ClearRequest,
        device: Option<DeviceId>,
        caller: Caller,
    ) -> Result<Operation, ApiError> {
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        let chosen = self.choose_clear(request, device, caller)?;
        let what = match request.what {
            ClearTarget::Cache => "the free pool".to_owned(),
            ClearTarget::Unused => "what is unused".to_owned(),
            ClearTarget::Allocations => {
                request.owner.as_ref().map(|owner| format!("allocations of {owner}")).unwrap_or_default()
            }
            ClearTarget::Zero => {
                request.allocation_id.map(|id| format!("the bytes of allocation {id}")).unwrap_or_default()
            }
        };
        let answer = chosen.answer(false);
        let id = self.operations.begin(OperationKind::Clear, what, answer.asked_bytes, self.now);
        // Only where something goes: on the others the use of other programs would be counted.
        let devices = self.devices_of(&chosen);
        let used = |device: &DeviceId| Some((device.clone(), self.ledger.usage(device)?.used_bytes));
        let clearing = Clearing {
            answer,
            allocations: chosen.allocations.iter().map(|(id, _)| *id).collect(),
            segments: chosen.pools.iter().map(|(_, segment, bytes)| (*segment, *bytes)).collect(),
            unloads: BTreeSet::new(),
            zeroing: None,
            used_before: devices.iter().filter_map(used).collect(),
            unmeasured: devices,
            since: None,
            unknown: false,
            failed: None,
        };
        self.operations.running.insert(id, Running::Clear(clearing));
        let shown = self.operations.show(id)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        for (device, segment, _) in chosen.pools {
            if let Some(work) = self.ledger.release_spare(&device, segment) {
                self.perform(work);
            }
        }
        for (name, (devices, _)) in chosen.models {
            if let Ok(unload) = self.begin_unload(&name, devices, None, false)
                && let Some(clearing) = self.clearing(id)
            {
                clearing.answer.operations.push(unload.operation_id);
                clearing.unloads.insert(unload.operation_id);
            }
        }
        for (allocation, _) in chosen.allocations {
            if request.what == ClearTarget::Zero {
                self.zero(id, allocation);
            } else {
                // Or it would go with the last process that keeps it, and be released a second time.
                let lease = LeaseId(Uuid::now_v7());
                self.ledger.grant(allocation, lease, Lease::Operation { task: Task::Read }, self.now);
                self.detach_all(allocation);
                self.release_part(id, allocation, caller);
                self.finish_lease(lease);
            }
        }
        self.to_go_on.insert(id);
        Ok(shown)
    }

    fn devices_of(&self, chosen: &Chosen) -> BTreeSet<DeviceId> {
        let pools = chosen.pools.iter().map(|(device, ..)| device.clone());
        let models = chosen.models.values().flat_map(|(devices, _)| devices.clone());
        let allocations = chosen.allocations.iter().filter_map(|(id, _)| self.ledger.allocation(*id));
        pools.chain(models).chain(allocations.map(|allocation| allocation.device.clone())).collect()
    }

    fn clearing(&mut self, id: OperationId) -> Option<&mut Clearing> {
        match self.operations.running.get_mut(&id) {
            Some(Running::Clear(clearing)) => Some(clearing),
            _ => None,
        }
    }

    /// Releases one allocation as if it had been asked for; the answer comes back as an event.
    fn release_part(&mut self, operation: OperationId, id: AllocationId, caller: Caller) {
        let (reply, answer) = oneshot::channel();
        self.release(id, None, caller, reply);
        let sender = self.sender.clone();
        self.jobs += 1;
        tokio::spawn(async move {
            let outcome = answer
                .await
                .unwrap_or_else(|_| Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping")));
            let _ = sender.send(Event::PartCleared { operation, allocation: id, outcome }).await;
        });
    }

    fn zero(&mut self, operation: OperationId, id: AllocationId) {
        let lease = LeaseId(Uuid::now_v7());
        self.ledger.grant(id, lease, Lease::Operation { task: Task::Write }, self.now);
        let Some(allocation) = self.ledger.allocation(id) else { return };
        let device = allocation.device.clone();
        let range = Range {
            segment: Segment(allocation.segment.0),
            offset: allocation.offset,
            bytes: allocation.request.size_bytes,
        };
        if let Some(clearing) = self.clearing(operation) {
            clearing.zeroing = Some(lease);
        }
        let on = device.clone();
        self.spawn(&device, move |device| {
            let outcome = device.zero(range);
            Event::Zeroed { operation, allocation: id, device: on, outcome }
        });
    }

    pub(super) fn zeroed(
        &mut self,
        operation: OperationId,
        id: AllocationId,
        device: &DeviceId,
        outcome: Result<(), DeviceError>,
    ) {
        let failed = outcome.err().map(|error| {
            self.note_failure(device, Some(&error));
            crate::devices::error(device, &error)
        });
        let Some(clearing) = self.clearing(operation) else { return };
        clearing.allocations.remove(&id);
        clearing.failed = failed;
        let lease = clearing.zeroing.take();
        if let Some(lease) = lease {
            self.finish_lease(lease);
        }
        self.to_go_on.insert(operation);
    }

    pub(super) fn part_cleared(
        &mut self,
        operation: OperationId,
        id: AllocationId,
        outcome: Result<Released, ApiError>,
    ) {
        let Some(clearing) = self.clearing(operation) else { return };
        clearing.allocations.remove(&id);
        match outcome {
            Ok(released) => clearing.answer.acknowledged_bytes += released.released_bytes,
            // Somebody else released it meanwhile.
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => {
                clearing.failed.get_or_insert(error.detail("allocationId", id.to_string()));
            }
        }
        self.to_go_on.insert(operation);
    }

    /// An empty segment has gone back to its device.
    pub(super) fn pool_freed(&mut self, segment: SegmentId) {
        for (id, running) in &mut self.operations.running {
            if let Running::Clear(clearing) = running
                && let Some(bytes) = clearing.segments.remove(&segment)
            {
                clearing.answer.acknowledged_bytes += bytes;
                self.to_go_on.insert(*id);
            }
        }
    }

    /// A device was measured: `began` is when that began.
    pub(super) fn measured_since(&mut self, device: &DeviceId, began: vramd_core::Tick) {
        for (id, running) in &mut self.operations.running {
            if let Running::Clear(clearing) = running
                && clearing.since.is_some_and(|since| began >= since)
                && clearing.unmeasured.remove(device)
            {
                self.to_go_on.insert(*id);
            }
        }
    }

    /// A device could not be measured: what its use fell by is not known then.
    pub(super) fn not_measured(&mut self, device: &DeviceId) {
        for (id, running) in &mut self.operations.running {
            if let Running::Clear(clearing) = running
                && clearing.since.is_some()
                && clearing.unmeasured.remove(device)
            {
                clearing.unknown = true;
                self.to_go_on.insert(*id);
            }
        }
    }

    /// Ends a clearing once all has been answered and measured.
    pub(super) fn go_on_clearing(&mut self, id: OperationId) {
        let Some(Running::Clear(clearing)) = self.operations.running.get(&id) else { return };
        let unloads: Vec<_> =
            clearing.unloads.iter().filter_map(|unload| self.operations.show(*unload).ok()).collect();
        let open = unloads.iter().any(|unload| !unload.state.ended());
        if open || !clearing.allocations.is_empty() || !clearing.segments.is_empty() {
            return;
        }
        let lost: Vec<_> =
            clearing.unmeasured.iter().filter(|device| self.ledger.is_lost(device)).cloned().collect();
        let tick = self.now.tick;
        let Some(clearing) = self.clearing(id) else { return };
        clearing.unmeasured.retain(|device| !lost.contains(device));
        // One that began in this very millisecond may have been too early.
        let since = *clearing.since.get_or_insert(vramd_core::Tick(tick.0 + 1));
        if !clearing.unmeasured.is_empty() {
            if tick < since {
                return;
            }
            return self.measure();
        }
        let Some(Running::Clear(mut clearing)) = self.operations.running.remove(&id) else { return };
        let unloaded =
            unloads.iter().filter_map(|unload| unload.result.as_ref()?.get("releasedBytes")?.as_u64());
        clearing.answer.acknowledged_bytes += unloaded.sum::<u64>();
        let fell = clearing.used_before.iter().filter(|(device, _)| !lost.contains(device)).map(
            |(device, before)| {
                before.saturating_sub(self.ledger.usage(device).map_or(0, |usage| usage.used_bytes))
            },
        );
        let known = lost.is_empty() && !clearing.unknown;
        clearing.answer.measured_bytes = known.then(|| fell.sum());
        let outcome = match clearing.failed {
            Some(error) => Err(error.detail("cleared", serde_json::json!(clearing.answer))),
            None => Ok(serde_json::json!(clearing.answer)),
        };
        self.end_operation(id, outcome);
    }
}

impl Chosen {
    fn answer(&self, dry_run: bool) -> Cleared {
        let pools = self.pools.iter().map(|(_, _, bytes)| bytes);
        let models = self.models.values().map(|(_, bytes)| bytes);
        let allocations = self.allocations.iter().map(|(_, bytes)| bytes);
        Cleared {
            dry_run,
            asked_bytes: pools.chain(models).chain(allocations).sum(),
            acknowledged_bytes: 0,
            measured_bytes: None,
            allocations: self.allocations.iter().map(|(id, _)| *id).collect(),
            models: self.models.keys().cloned().collect(),
            kept: self.kept.clone(),
            operations: Vec::new(),
        }
    }
}
