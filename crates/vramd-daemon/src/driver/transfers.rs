//! Transfers between devices, and copies from one allocation into another.
//!
//! Every item is looked at and has its room before the first byte moves: a transfer that cannot be done whole is not
//! begun. The items are copied side by side; one that fails leaves its old copy as it was, and the others go on. The
//! operation then fails with the first error and names every item in its details.

use std::collections::BTreeMap;

use uuid::Uuid;
use vramd_api::{
    AllocationId, ApiError, Checksum, ComponentName, CopyRequest, DeviceId, ErrorCode, EventKind, Holder,
    ModelName, Operation, OperationId, OperationKind, TransferItem, TransferMode, TransferRequest,
    Transferred,
};
use vramd_core::ledger::{Allocation, Fixed, Lease, Readiness, Release, Request};
use vramd_core::models::{Plan, Residency};

use super::copies::{Copy, CopyError, CopyId, NewCopy, Purpose, flow};
use super::models::{no_component, no_model, not_resident};
use super::operations::Running;
use super::refusals::{attached, refusal};
use super::{Caller, Reply, State};
use crate::requests::DEFAULT_LEASE_SECONDS;
use crate::store::Change;

/// A transfer or a copy under way.
#[derive(Debug)]
pub(super) struct Transferring {
    items: BTreeMap<CopyId, Item>,
    mode: TransferMode,
    ended: Vec<Transferred>,
    failed: Vec<(AllocationId, ApiError)>,
    /// Bytes that moves leave behind, on their way back.
    /// What moves have left behind and is not back yet, and the index of each in `ended`.
    releasing: BTreeMap<AllocationId, usize>,
}

/// One item: what it is called in the answer.
#[derive(Debug)]
struct Item {
    source: AllocationId,
    target: AllocationId,
    from: DeviceId,
    to: DeviceId,
    component: Option<(ModelName, ComponentName, std::sync::Arc<Plan>)>,
    bytes: u64,
}

/// An item that was looked at.
struct Chosen {
    source: AllocationId,
    from: DeviceId,
    component: Option<(ModelName, ComponentName, std::sync::Arc<Plan>)>,
}

impl Chosen {
    fn called(&self) -> String {
        match &self.component {
            Some((model, component, _)) => format!("{model}/{component}"),
            None => format!("allocation {}", self.source),
        }
    }
}

impl State {
    pub(super) fn transfer(&mut self, request: &TransferRequest, caller: Caller, reply: Reply<Operation>) {
        let answer = self.try_transfer(request, caller);
        self.answer(reply, answer);
    }

    fn try_transfer(&mut self, request: &TransferRequest, caller: Caller) -> Result<Operation, ApiError> {
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        let target = self.devices.id(&request.target_device_id)?;
        let mut chosen: Vec<Chosen> = Vec::new();
        for (index, item) in request.items.iter().enumerate() {
            let found = self.choose(item, &target, request.mode, caller).map_err(|mut error| {
                error.message = format!("items[{index}]: {}", error.message);
                error
            })?;
            for one in found {
                if chosen.iter().any(|other| other.source == one.source) {
                    return Err(ApiError::invalid(
                        "items",
                        format!("items[{index}] names what another item names already"),
                    ));
                }
                chosen.push(one);
            }
        }
        let places = self.reserve_targets(&chosen, &target, request.mode)?;
        let bytes = |id: AllocationId| self.ledger.allocation(id).map_or(0, |one| one.request.size_bytes);
        let total = chosen.iter().map(|one| bytes(one.source)).sum();
        let subject = match chosen.as_slice() {
            [one] => format!("{} to {target}", one.called()),
            many => format!("{} items to {target}", many.len()),
        };
        let operation = self.operations.begin(OperationKind::Transfer, subject, total, self.now);
        self.join_turns(operation, request.priority, request.max_bytes_per_second);
        let transferring = Transferring {
            items: BTreeMap::new(),
            mode: request.mode,
            ended: Vec::new(),
            failed: Vec::new(),
            releasing: BTreeMap::new(),
        };
        self.operations.running.insert(operation, Running::Transfer(transferring));
        let shown = self.operations.show(operation)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        let mut begun = Vec::new();
        for (one, (place, readiness)) in chosen.into_iter().zip(places) {
            begun.push((place, readiness));
            self.begin_item(operation, one, place, &target, request);
        }
        for (place, readiness) in begun {
            self.proceed(place, readiness);
        }
        Ok(shown)
    }

    /// Looks at one item: what it names, and whether it can go.
    fn choose(
        &self,
        item: &TransferItem,
        target: &DeviceId,
        mode: TransferMode,
        caller: Caller,
    ) -> Result<Vec<Chosen>, ApiError> {
        match (item.allocation_id, &item.model) {
            (Some(id), None) if item.component.is_none() && item.source_device_id.is_none() => {
                let allocation = self.open_to(id, caller)?;
                if allocation.request.sealed {
                    let purpose = &allocation.request.purpose;
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("allocation {id} belongs to {purpose}"),
                    )
                    .hint("name the model and its component instead"));
                }
                let one = Chosen { source: id, from: allocation.device.clone(), component: None };
                self.may_go(&one, target, mode)?;
                Ok(vec![one])
            }
            (None, Some(model)) => self.choose_components(item, model, target, mode),
            _ => Err(ApiError::invalid("items", "an item names either an allocation or a model").hint(
                "send `allocationId`, or `model` with `component` and `sourceDeviceId` where it needs them",
            )),
        }
    }

    fn choose_components(
        &self,
        item: &TransferItem,
        name: &ModelName,
        target: &DeviceId,
        mode: TransferMode,
    ) -> Result<Vec<Chosen>, ApiError> {
        let model = self.models.get(name).ok_or_else(|| no_model(name))?;
        let source = match &item.source_device_id {
            Some(named) => Some(self.devices.id(named)?),
            None => None,
        };
        if let Some(component) = item.component.as_ref().filter(|one| !model.components.contains_key(*one)) {
            return Err(no_component(model, component));
        }
        let waiting = self.waiting_load(name).map(|(operation, _)| operation);
        if let Some(operation) = model.operation(None).or(waiting) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("model {name} is being loaded, unloaded or moved"),
            )
            .hint("wait for that operation, or cancel it: `vramd cancel ID`")
            .detail("operationId", operation.to_string()));
        }
        // What RAM only keeps is no place that anybody means.
        let cached = |device: &DeviceId| {
            let mut here = model.components.values().filter_map(|it| it.residency.get(device));
            here.all(|residency| residency.cached_from().is_some())
        };
        let meant = || model.resident_on().into_iter().filter(|on| on != target && !cached(on)).collect();
        let from: Vec<DeviceId> = source.map_or_else(meant, |source| vec![source]);
        let from = match from.as_slice() {
            [one] => one.clone(),
            [] if model.resident_on().contains(target) => {
                return Err(same_place(&format!("model {name}"), target));
            }
            [] => return Err(not_resident(name, "any device")),
            many => {
                let places: Vec<_> = many.iter().map(DeviceId::as_str).collect();
                return Err(ApiError::invalid(
                    "sourceDeviceId",
                    format!("model {name} is resident on {}", places.join(", ")),
                )
                .hint("name one of these devices"));
            }
        };
        let mut found = Vec::new();
        for (component, entry) in &model.components {
            if item.component.as_ref().is_some_and(|wanted| wanted != component) {
                continue;
            }
            let Some(Residency::Resident { allocation, plan, .. }) = entry.residency.get(&from) else {
                continue;
            };
            let component = (name.clone(), component.clone(), plan.clone());
            if entry.residency.contains_key(target) {
                return Err(same_place(&format!("{name}/{}", component.1), target));
            }
            let one = Chosen { source: *allocation, from: from.clone(), component: Some(component) };
            self.may_go(&one, target, mode)?;
            found.push(one);
        }
        if found.is_empty() { Err(not_resident(name, from.as_str())) } else { Ok(found) }
    }

    fn may_go(&self, one: &Chosen, target: &DeviceId, mode: TransferMode) -> Result<(), ApiError> {
        let what = one.called();
        if one.from == *target && mode == TransferMode::Move {
            return Err(same_place(&what, target));
        }
        for device in [&one.from, target] {
            if self.ledger.is_lost(device) {
                return Err(ApiError::new(ErrorCode::DeviceLost, format!("{device} is lost")));
            }
        }
        let Some(allocation) = self.ledger.allocation(one.source) else {
            return Err(ApiError::not_found("allocation", one.source));
        };
        if mode == TransferMode::Move && allocation.is_attached() {
            let holders: Vec<_> = allocation.holders().cloned().collect();
            let error = attached(&what, &holders);
            return Err(error.hint(
                "a process cannot follow to another device: close it there first, or copy (mode=copy)",
            ));
        }
        if mode == TransferMode::Move && allocation.model_count() > 1 {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("{what} is of the same files as another component"),
            )
            .hint("both have the one block: copy instead (mode=copy), or unload the other model first"));
        }
        match self.ledger.fixed(one.source) {
            Some(Fixed::Written) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("{what} may be written to now"))
                    .hint("a copy would be of no one moment: close who has it attached for writing"))
            }
            Some(Fixed::Busy) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("an operation is at work on {what}"))
                    .hint("wait until it has ended: `vramd operations`"))
            }
            Some(Fixed::Reader) | None => Ok(()),
        }
    }

    /// Reserves the targets of all items, or of none.
    fn reserve_targets(
        &mut self,
        chosen: &[Chosen],
        target: &DeviceId,
        mode: TransferMode,
    ) -> Result<Vec<(AllocationId, Readiness)>, ApiError> {
        let mut trial = self.ledger.clone();
        let mut places = Vec::new();
        for one in chosen {
            let id = AllocationId(Uuid::now_v7());
            let Some(source) = self.ledger.allocation(one.source) else { continue };
            let request = Request { id, generation: 1, memory_type: None, ..source.request.clone() };
            let readiness = if mode == TransferMode::Move && one.component.is_none() {
                trial.reserve_place(id, one.source, target, None, self.now)
            } else {
                let on = std::slice::from_ref(target);
                trial.reserve(request.clone(), on, self.now).ok().map(|grant| grant.readiness)
            };
            let Some(readiness) = readiness else {
                return Err(refusal(&trial.refusal(&request, std::slice::from_ref(target))));
            };
            places.push((id, readiness));
        }
        self.ledger = trial;
        Ok(places)
    }

    fn begin_item(
        &mut self,
        operation: OperationId,
        one: Chosen,
        place: AllocationId,
        target: &DeviceId,
        request: &TransferRequest,
    ) {
        let Some(source) = self.ledger.allocation(one.source) else { return };
        let bytes = source.request.size_bytes;
        let purpose = match (&one.component, request.mode) {
            (Some((model, component, plan)), _) => {
                let residency = Residency::Loading { allocation: place, operation, plan: plan.clone() };
                if let Some(entry) =
                    self.models.get_mut(model).and_then(|model| model.components.get_mut(component))
                {
                    entry.residency.insert(target.clone(), residency);
                }
                Purpose::Component { moves: request.mode == TransferMode::Move }
            }
            (None, TransferMode::Move) => Purpose::Move,
            (None, TransferMode::Copy) if source.request.persistent => Purpose::Keep(None),
            (None, TransferMode::Copy) => {
                // One that only processes keep by now gets the time that everybody gets who asks for none.
                let seconds = source.leases.values().find_map(|lease| match lease {
                    Lease::TimeToLive { seconds, .. } => Some(*seconds),
                    _ => None,
                });
                Purpose::Keep(Some(seconds.unwrap_or(DEFAULT_LEASE_SECONDS)))
            }
        };
        let item = Item {
            source: one.source,
            target: place,
            from: one.from,
            to: target.clone(),
            component: one.component,
            bytes,
        };
        let id = self.begin_copy(NewCopy {
            operation,
            source: one.source,
            target: place,
            purpose,
            offsets: (0, 0),
            bytes,
            checksum: request.checksum,
        });
        if let Some(Running::Transfer(transferring)) = self.operations.running.get_mut(&operation) {
            transferring.items.insert(id, item);
        }
    }

    /// One item has ended.
    pub(super) fn item_ended(
        &mut self,
        operation: OperationId,
        id: CopyId,
        outcome: Result<(&mut Copy, Option<u64>), (&Copy, CopyError)>,
    ) {
        let Some(Running::Transfer(transferring)) = self.operations.running.get_mut(&operation) else {
            return;
        };
        let Some(item) = transferring.items.remove(&id) else { return };
        let mode = transferring.mode;
        match outcome {
            Ok((copy, checksum)) => {
                let moved = mode == TransferMode::Move;
                let (model, component) = item
                    .component
                    .as_ref()
                    .map(|(model, component, _)| (model.clone(), component.clone()))
                    .unzip();
                transferring.ended.push(Transferred {
                    allocation_id: item.source,
                    copy_allocation_id: (!moved && item.source != item.target).then_some(item.target),
                    model,
                    component,
                    source_device_id: item.from.clone(),
                    target_device_id: item.to.clone(),
                    bytes: item.bytes,
                    held_by: Vec::new(),
                    checksum: checksum.map(Checksum::crc64),
                });
                match &item.component {
                    Some(component) => self.component_arrived(operation, &item, component, moved),
                    None if moved && item.source != item.target => {
                        transferring.releasing.insert(copy.target, transferring.ended.len() - 1);
                        self.await_release(operation, copy.target);
                    }
                    None => {}
                }
            }
            Err((copy, error)) => {
                transferring.failed.push((item.source, error.to_api(item.source)));
                if let Some((model, component, _)) = &item.component
                    && let Some(entry) =
                        self.models.get_mut(model).and_then(|model| model.components.get_mut(component))
                {
                    entry.residency.retain(|_, residency| residency.allocation() != copy.target);
                }
            }
        }
        self.to_go_on.insert(operation);
    }

    /// A component is on its new device; when it moves, the old one goes: nobody has it attached, as was checked.
    fn component_arrived(
        &mut self,
        operation: OperationId,
        item: &Item,
        (model, component, plan): &(ModelName, ComponentName, std::sync::Arc<Plan>),
        moved: bool,
    ) {
        self.ledger.grant(item.target, vramd_api::LeaseId(Uuid::now_v7()), Lease::Model, self.now);
        let (now, kept) = (self.now, self.ledger.allocation(item.source).is_some_and(Allocation::is_kept));
        let mut changes = vec![Change::PutResident(model.clone(), component.clone(), item.to.clone())];
        let Some(entry) = self.models.get_mut(model) else { return };
        entry.last_used = Some(now);
        let Some(entry) = entry.components.get_mut(component) else { return };
        let stays = match entry.residency.get(&item.from) {
            Some(Residency::Resident { stays, .. }) if moved => *stays,
            _ => vramd_core::Tick::default(),
        };
        let resident = Residency::Resident {
            allocation: item.target,
            plan: plan.clone(),
            awaited: None,
            stays,
            cached_from: None,
        };
        entry.residency.insert(item.to.clone(), resident);
        if moved && kept {
            entry
                .residency
                .insert(item.from.clone(), Residency::Evicting { allocation: item.source, operation });
            changes.push(Change::RemoveResident(model.clone(), component.clone(), item.from.clone()));
            self.await_release(operation, item.source);
            if let Some(Running::Transfer(transferring)) = self.operations.running.get_mut(&operation) {
                transferring.releasing.insert(item.source, transferring.ended.len() - 1);
            }
            // The operation's own lease is still on it: it goes when that ends.
            let released = self.ledger.release(item.source, self.now);
            debug_assert!(matches!(released, Ok(Release::Later)));
        }
        self.store_all(changes, super::OnStored::Nothing);
    }

    /// The bytes that a moved item has left behind are back.
    pub(super) fn item_released(
        &mut self,
        operation: OperationId,
        allocation: AllocationId,
        held_by: &[Holder],
    ) {
        if let Some(Running::Transfer(transferring)) = self.operations.running.get_mut(&operation) {
            let index = transferring.releasing.remove(&allocation);
            if let Some(ended) = index.and_then(|index| transferring.ended.get_mut(index)) {
                ended.held_by = held_by.to_vec();
            }
            for model in transferring.ended.iter().filter_map(|ended| ended.model.clone()).collect::<Vec<_>>()
            {
                let components =
                    self.models.get_mut(&model).into_iter().flat_map(|model| model.components.values_mut());
                for component in components {
                    component.residency.retain(|_, residency| residency.allocation() != allocation);
                }
            }
        }
        self.to_go_on.insert(operation);
    }

    /// Ends a transfer once all of its items have.
    pub(super) fn end_transfer(&mut self, operation: OperationId) {
        match self.operations.running.get(&operation) {
            Some(Running::Transfer(one)) if one.items.is_empty() && one.releasing.is_empty() => {}
            _ => return,
        }
        let Some(Running::Transfer(ended)) = self.operations.running.remove(&operation) else { return };
        self.mover.leave(flow(operation));
        let items = serde_json::json!(ended.ended);
        let outcome = match ended.failed.into_iter().next() {
            None => Ok(serde_json::json!({ "items": items })),
            Some((source, error)) => {
                Err(error.detail("allocationId", source.to_string()).detail("items", items))
            }
        };
        self.end_operation(operation, outcome);
    }

    pub(super) fn copy_into(&mut self, request: &CopyRequest, caller: Caller, reply: Reply<Operation>) {
        let answer = self.try_copy_into(request, caller);
        self.answer(reply, answer);
    }

    fn try_copy_into(&mut self, request: &CopyRequest, caller: Caller) -> Result<Operation, ApiError> {
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        let (source_id, target_id) = (request.source_allocation_id, request.target_allocation_id);
        let mut sizes = Vec::new();
        for (id, field) in [(source_id, "sourceAllocationId"), (target_id, "targetAllocationId")] {
            let allocation = self.open_to(id, caller).map_err(|error| error.detail("field", field))?;
            if self.ledger.is_lost(&allocation.device) {
                return Err(ApiError::new(ErrorCode::DeviceLost, format!("{} is lost", allocation.device)));
            }
            sizes.push((allocation.request.size_bytes, allocation.device.clone()));
        }
        let (source, target) = (&sizes[0], &sizes[1]);
        if self.ledger.allocation(target_id).is_some_and(|target| target.request.sealed) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("allocation {target_id} belongs to a model"),
            )
            .hint("a model's weights are never written to; copy into an allocation of your own"));
        }
        let bytes = match request.size_bytes {
            Some(bytes) => bytes.get(),
            None => source.0.saturating_sub(request.source_offset),
        };
        let within = |offset: u64, whole: u64| offset.checked_add(bytes).is_some_and(|end| end <= whole);
        for (offset, whole, field) in [
            (request.source_offset, source.0, "sourceOffset"),
            (request.target_offset, target.0, "targetOffset"),
        ] {
            if bytes == 0 || !within(offset, whole) {
                let which = field.trim_end_matches("Offset");
                let what = match bytes {
                    0 => format!("nothing is left of the {which}'s {whole} bytes from byte {offset} on"),
                    _ => format!(
                        "{bytes} bytes from byte {offset} on do not lie inside the {which}'s {whole} bytes"
                    ),
                };
                return Err(ApiError::invalid(field, what));
            }
        }
        if source_id == target_id && request.source_offset.abs_diff(request.target_offset) < bytes {
            return Err(ApiError::invalid("targetOffset", "the two ranges of the allocation overlap")
                .hint("copy in two steps through another allocation"));
        }
        for id in [source_id, target_id] {
            if self.ledger.allocation(id).is_some_and(|one| one.tasks().next().is_some()) {
                return Err(ApiError::new(
                    ErrorCode::Conflict,
                    format!("an operation is at work on allocation {id}"),
                )
                .hint("wait until it has ended: `vramd operations`"));
            }
        }
        if source_id != target_id && self.ledger.allocation(source_id).is_some_and(Allocation::is_written) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("allocation {source_id} may be written to now"),
            )
            .hint("a copy would be of no one moment: close who has it attached for writing"));
        }
        self.all_follow(target_id)?;
        let (from, to) = (source.1.clone(), target.1.clone());
        let subject = format!("allocation {source_id} into {target_id}");
        let operation = self.operations.begin(OperationKind::Copy, subject, bytes, self.now);
        self.join_turns(operation, request.priority, request.max_bytes_per_second);
        let running = Transferring {
            items: BTreeMap::new(),
            mode: TransferMode::Copy,
            ended: Vec::new(),
            failed: Vec::new(),
            releasing: BTreeMap::new(),
        };
        self.operations.running.insert(operation, Running::Transfer(running));
        let shown = self.operations.show(operation)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        let id = self.begin_copy(NewCopy {
            operation,
            source: source_id,
            target: target_id,
            purpose: Purpose::Into,
            offsets: (request.source_offset, request.target_offset),
            bytes,
            checksum: request.checksum,
        });
        let item = Item { source: source_id, target: target_id, from, to, component: None, bytes };
        if let Some(Running::Transfer(running)) = self.operations.running.get_mut(&operation) {
            running.items.insert(id, item);
        }
        Ok(shown)
    }
}

fn same_place(what: &str, target: &DeviceId) -> ApiError {
    ApiError::invalid("targetDeviceId", format!("{what} is on {target} already"))
        .hint("name another device; `vramd devices` lists them")
}
