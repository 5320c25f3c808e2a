//! Loads: a load takes the blocks of all its parts at once, has them made, and reads files or copies blocks into them on a thread of
//! its own. Then either all parts are resident or none is.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use vramd_api::{
    AllocationId, AllocationType, ApiError, Checksum, ComponentName, DeviceId, ErrorCode, EventKind, Holder,
    LeaseId, OperationId, OperationKind, Priority,
};
use vramd_core::ledger::{Grant, Lease, Request, Shortage, Task};
use vramd_core::models::{Model, Residency};
use vramd_core::{Now, Tick};
use vramd_device::SegmentId;

use super::allocations::{OnReady, OnReleased};
use super::copies::flow;
use super::models::no_component;
use super::operations::{Loading, Running, Unloading};
use super::refusals::{nothing_to_evict, refusal, too_many_wait};
use super::room::{GRACE_SECONDS, WaitingLoad};
use super::tiers::{PROMOTE_LATER_SECONDS, Shared};
use super::{Event, Load, LoadAnswer, LoadFailure, OnStored, Part, Reply, State};
use crate::loader::{self, From, Target};
use crate::source::Prepared;
use crate::store::Change;

impl State {
    pub(super) fn load(
        &mut self,
        load: &Load,
        prepared: Option<BTreeMap<ComponentName, Prepared>>,
        reply: Reply<LoadAnswer>,
    ) {
        let answer = self.try_load(load, prepared);
        self.answer(reply, answer);
    }

    fn try_load(
        &mut self,
        load: &Load,
        prepared: Option<BTreeMap<ComponentName, Prepared>>,
    ) -> Result<LoadAnswer, ApiError> {
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        if let Some(answer) = self.check_prefetch(load)? {
            return Ok(answer);
        }
        let model = self.changeable(&load.model)?;
        let wanted: Vec<ComponentName> = match &load.components {
            None => model.components.keys().cloned().collect(),
            Some(names) => names.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect(),
        };
        for name in &wanted {
            if !model.components.contains_key(name) {
                return Err(no_component(model, name));
            }
        }
        if let Some((operation, splitting)) = self.splitting(&load.model).filter(|_| load.device.is_none()) {
            if splitting.has_failed() {
                return Ok(LoadAnswer::After(operation));
            }
            return self.join(load, operation, splitting.brings(&wanted));
        }
        let on = |name: &ComponentName, device: &DeviceId| model.components[name].residency.get(device);
        let device = load.device.clone().or_else(|| self.most_parts(model, &wanted));
        // What is on its way out there, or wherever it may go, is loaded again once it is gone.
        let going =
            wanted.iter().flat_map(|name| &model.components[name].residency).find_map(|(on, residency)| {
                let here = device.as_ref().is_none_or(|device| device == on);
                match residency {
                    Residency::Evicting { operation, .. } if here => Some(*operation),
                    _ => None,
                }
            });
        if let Some(going) = going {
            return Ok(LoadAnswer::After(going));
        }
        if let Some(device) = &device {
            let here: Vec<_> = wanted.iter().map(|name| on(name, device)).collect();
            if let Some(operation) = here.iter().flatten().find_map(|residency| residency.operation()) {
                // It comes to RAM for who unloads it elsewhere.
                if matches!(self.operations.running.get(&operation), Some(Running::Unload(_))) {
                    return Ok(LoadAnswer::After(operation));
                }
                let brings_all = brings_all(operation, &here);
                return self.join(load, operation, brings_all);
            }
            if here.iter().all(Option::is_some) {
                let device = device.clone();
                return self.loaded_already(load, &[device]);
            }
        }
        let places = self.places(model, &wanted);
        if load.device.is_none() && places.len() == wanted.len() {
            let devices: BTreeSet<DeviceId> = places.into_values().collect();
            return self.loaded_already(load, &devices.into_iter().collect::<Vec<_>>());
        }
        let split = load.split && load.device.is_none();
        if split && let Some(operation) = model.operation(None) {
            // Of what comes or goes anywhere, it cannot be said yet where it will be.
            return Ok(LoadAnswer::After(operation));
        }
        if let Some((operation, waiting)) = self.waiting_load(&load.model) {
            let same = load.device.is_none() || load.device == waiting.load.device;
            let there = |name: &ComponentName| {
                let device = waiting.load.device.as_ref();
                device.is_some_and(|device| matches!(on(name, device), Some(Residency::Resident { .. })))
            };
            let brings_all =
                same && wanted.iter().all(|name| waiting.prepared.contains_key(name) || there(name));
            let waits = load.shortage.evict || load.shortage.wait_seconds.is_some();
            if brings_all && waits {
                self.wait_with(operation, load.shortage);
            } else if brings_all {
                let error = ApiError::new(
                    ErrorCode::InsufficientMemory,
                    format!("a load of model {} waits for room already", load.model),
                );
                return Err(error
                    .hint("wait with it: load without onShortage=fail")
                    .detail("operationId", operation.to_string()));
            }
            return self.join(load, operation, brings_all);
        }
        let missing: BTreeMap<ComponentName, String> = wanted
            .iter()
            .filter(|name| match &device {
                _ if split => !places.contains_key(*name),
                Some(device) => on(name, device).is_none(),
                None => true,
            })
            .map(|name| (name.clone(), model.components[name].path.clone()))
            .collect();
        // What was prepared may be of another registration, or of less than what is missing by now.
        let fitting = prepared.filter(|prepared| {
            prepared.len() == missing.len()
                && prepared.iter().all(|(name, file)| missing.get(name) == Some(&file.path))
        });
        let Some(mut prepared) = fitting else { return Ok(LoadAnswer::Prepare(missing)) };
        if !split {
            return self.begin_load(load, device, prepared, wanted);
        }
        if let Some(begun) = self.begin_split(load, &mut prepared, &wanted)? {
            return Ok(begun);
        }
        let missing = prepared.keys().cloned().collect();
        // What is only kept in RAM may go to another card than it came from.
        let device = device.filter(|_| !places.is_empty());
        self.begin_load(&Load { split: false, ..load.clone() }, device, prepared, missing)
    }

    /// The device, not a lost one, that most of the wanted components are on, on the way to, or had to go from.
    pub(super) fn most_parts(&self, model: &Model, wanted: &[ComponentName]) -> Option<DeviceId> {
        let mut counts: BTreeMap<&DeviceId, usize> = BTreeMap::new();
        let residencies = wanted.iter().flat_map(|name| &model.components[name].residency);
        let staying = residencies.filter(|(_, residency)| !matches!(residency, Residency::Evicting { .. }));
        for (device, residency) in staying {
            let device = residency.cached_from().filter(|from| !self.ledger.is_lost(from)).unwrap_or(device);
            *counts.entry(device).or_default() += usize::from(!self.ledger.is_lost(device));
        }
        let most = counts.into_iter().max_by_key(|(_, count)| *count);
        most.filter(|(_, count)| *count > 0).map(|(device, _)| device.clone())
    }

    /// Joins a load under way, if it brings all that is wanted.
    fn join(
        &mut self,
        load: &Load,
        operation: OperationId,
        brings_all: bool,
    ) -> Result<LoadAnswer, ApiError> {
        if brings_all {
            self.set_keep_alive(load);
            if let Some(Running::Load(loading)) = self.operations.running.get_mut(&operation)
                && !load.unasked
                && std::mem::take(&mut loading.unasked)
            {
                // Now somebody waits for it.
                let device = loading.device.clone();
                loading.cache_for = None;
                self.try_policies(&load.model, &device);
            }
            return Ok(LoadAnswer::Operation(Box::new(self.operations.show(operation)?)));
        }
        Err(ApiError::new(
            ErrorCode::Conflict,
            format!("other components of model {} are being loaded or unloaded", load.model),
        )
        .hint("wait for that operation, then load again")
        .detail("operationId", operation.to_string()))
    }

    fn loaded_already(&mut self, load: &Load, devices: &[DeviceId]) -> Result<LoadAnswer, ApiError> {
        self.set_keep_alive(load);
        let now = self.now;
        for device in devices {
            self.try_policies(&load.model, device);
            if let Some(model) = self.models.get_mut(&load.model) {
                let here = model.components.values_mut().filter_map(|entry| entry.residency.get_mut(device));
                for residency in here {
                    // Who asks again and again and never comes does not keep it for ever.
                    if let Residency::Resident { awaited: awaited @ None, .. } = residency {
                        *awaited = Some(stays(now, 0.0));
                    }
                }
            }
            self.asked_for(&load.model, device);
        }
        let places: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
        let subject = format!("{} on {}", load.model, places.join(", "));
        let id = self.operations.begin(OperationKind::Load, subject, 0, self.now);
        let result = if let [device] = devices {
            serde_json::json!({ "model": load.model, "deviceId": device, "loaded": false })
        } else {
            let devices: Vec<_> = devices.iter().map(|on| serde_json::json!({ "deviceId": on })).collect();
            serde_json::json!({ "model": load.model, "devices": devices, "loaded": false })
        };
        self.end_operation(id, Ok(result));
        Ok(LoadAnswer::Operation(Box::new(self.operations.show(id)?)))
    }

    /// A part of a split load is no use of its own.
    fn count_use(&mut self, load: &Load) {
        if !load.split {
            self.set_keep_alive(load);
        }
    }

    pub(super) fn set_keep_alive(&mut self, load: &Load) {
        if load.unasked {
            return;
        }
        let Some(model) = self.models.get_mut(&load.model) else { return };
        model.used(self.now);
        self.note_use(&load.model);
        let Some(model) = self.models.get_mut(&load.model) else { return };
        if let Some(keep_alive) = load.keep_alive.filter(|keep_alive| *keep_alive != model.keep_alive) {
            model.keep_alive = keep_alive;
            self.store(Change::SetKeepAlive(load.model.clone(), keep_alive), OnStored::Nothing);
        }
    }

    pub(super) fn begin_load(
        &mut self,
        load: &Load,
        device: Option<DeviceId>,
        mut prepared: BTreeMap<ComponentName, Prepared>,
        wanted: Vec<ComponentName>,
    ) -> Result<LoadAnswer, ApiError> {
        let device = device.or_else(|| self.has_all(load, &prepared));
        let shared = match &device {
            // What may go elsewhere as a whole has no part here.
            Some(device) if !load.shortage.spill => self.share(device, &mut prepared),
            _ => BTreeMap::new(),
        };
        let leases: Vec<_> = shared.values().map(|part| (part.allocation, part.lease)).collect();
        let begun = self.admit_load(load, device.as_ref(), prepared, shared, wanted);
        if begun.is_err() {
            for (allocation, lease) in leases {
                self.give_up_share(allocation, lease);
            }
        }
        begun
    }

    fn admit_load(
        &mut self,
        load: &Load,
        device: Option<&DeviceId>,
        prepared: BTreeMap<ComponentName, Prepared>,
        shared: BTreeMap<ComponentName, Shared>,
        wanted: Vec<ComponentName>,
    ) -> Result<LoadAnswer, ApiError> {
        let priority = self.changeable(&load.model)?.priority;
        let blocks = |prepared: &Prepared| prepared.plan.layout.block_bytes;
        let requests: Vec<Request> = prepared
            .iter()
            .map(|(component, one)| Self::weights(load, Some(component), blocks(one), priority))
            .collect();
        let whole = prepared.values().map(blocks).fold(0, u64::saturating_add);
        let whole = Self::weights(load, None, whole, priority);
        // Without a device it goes to the nearest memory that could hold it: elsewhere would be slower, and nobody said so.
        let on: Vec<DeviceId> =
            device.map_or_else(|| self.ledger.nearest(&requests), |device| vec![device.clone()]);
        let payload =
            prepared.values().fold(0, |sum, part| u64::saturating_add(sum, part.plan.layout.payload_bytes));
        // What is shared is there already.
        let none_lacks = requests.is_empty();
        let fits = none_lacks || self.ledger.could_fit_all(&requests, &on);
        let others_wait = !self.queue.is_empty() && fits && load.shortage.wait_seconds.is_some();
        let grants = if none_lacks {
            Some(Vec::new())
        } else if others_wait {
            None
        } else {
            self.ledger.reserve_all(&requests, &on, self.now)
        };
        let mut spilled_from = Vec::new();
        let ram = self.ram().filter(|ram| load.shortage.spill && !on.contains(ram));
        let grants = match ram {
            Some(ram) if grants.is_none() => {
                let model = self.changeable(&load.model)?;
                let in_ram = |name: &ComponentName| model.components[name].residency.get(&ram);
                if wanted.iter().all(|name| matches!(in_ram(name), Some(Residency::Resident { .. }))) {
                    return self.loaded_already(load, &[ram]);
                }
                // All of it goes there, or none.
                if prepared.len() == wanted.len() && wanted.iter().all(|name| in_ram(name).is_none()) {
                    spilled_from.clone_from(&on);
                    self.ledger.reserve_all(&requests, &[ram], self.now)
                } else {
                    None
                }
            }
            _ => grants,
        };
        let load = Load { device: device.cloned(), ..load.clone() };
        let operation = |state: &mut Self, waits: bool| {
            let subject = device
                .as_ref()
                .map_or_else(|| load.model.to_string(), |on| format!("{} on {on}", load.model));
            let kind = OperationKind::Load;
            if waits {
                state.operations.line_up(kind, subject, payload, state.now)
            } else {
                state.operations.begin(kind, subject, payload, state.now)
            }
        };
        let id = if let Some(grants) = grants {
            let id = operation(self, false);
            self.count_use(&load);
            let mut admitted = WaitingLoad::new(load, prepared, shared, wanted);
            admitted.spilled_from = spilled_from;
            self.start_load(id, admitted, grants);
            id
        } else {
            let waits = load.shortage.evict || load.shortage.wait_seconds.is_some();
            if fits && waits {
                self.check_line(&prepared)?;
            }
            let (deadline, evicted) = if fits {
                self.wait_for_room(&requests, &on, load.shortage, Some(&load.model))
            } else {
                (None, Vec::new())
            };
            let Some(deadline) = deadline else {
                let shortage = self.ledger.refusal(&whole, &on);
                let shortage = self.with_evictable(shortage, &whole, Some(&load.model));
                let shortage = Shortage { could_fit: fits, ..shortage };
                let error = refusal(&shortage);
                if !fits && requests.len() > 1 && self.nearest_devices().len() > 1 {
                    let hint = "no single device could hold all of it: with split (`vramd load --split`) its components may go to several";
                    return Err(error.hint(hint));
                }
                return Err(if load.shortage.evict { nothing_to_evict(error) } else { error });
            };
            let id = operation(self, true);
            self.count_use(&load);
            let mut waiting = WaitingLoad::new(load, prepared, shared, wanted);
            waiting.evicted = evicted;
            if !self.line_up_load(id, (requests, on), waiting, deadline) {
                self.end_operation(id, Err(too_many_wait()));
                return Err(too_many_wait());
            }
            if let Ok(shown) = self.operations.show(id) {
                self.emit(EventKind::OperationChanged, serde_json::json!(shown));
            }
            self.admit();
            id
        };
        let shown = self.operations.show(id)?;
        Ok(LoadAnswer::Operation(Box::new(shown)))
    }

    /// Begins a load that has its bytes.
    pub(super) fn start_load(
        &mut self,
        operation: OperationId,
        waiting: WaitingLoad,
        grants: Vec<(AllocationId, Grant)>,
    ) {
        let WaitingLoad { load, prepared, shared, evicted, spilled_from, wanted, .. } = waiting;
        let granted = grants.first().map(|(_, grant)| grant.device.clone());
        let Some(device) = granted.or_else(|| load.device.clone()) else { return };
        // It may have come there otherwise while the load waited, or the rest of it may have gone.
        let changed = |model: &Model| {
            wanted.iter().any(|name| {
                let Some(entry) = model.components.get(name) else { return true };
                let comes = prepared.contains_key(name) || shared.contains_key(name);
                match entry.residency.get(&device) {
                    None => !comes,
                    Some(Residency::Resident { .. }) => comes,
                    Some(_) => true,
                }
            })
        };
        if self.changeable(&load.model).map_or(true, changed) {
            for (allocation, grant) in grants {
                self.granted(allocation, grant);
            }
            for part in shared.into_values() {
                self.give_up_share(part.allocation, part.lease);
            }
            let error = ApiError::new(ErrorCode::Conflict, format!("model {} changed meanwhile", load.model))
                .hint("load it again: some of it may be there already");
            return self.end_operation(operation, Err(error));
        }
        self.operations.start(operation, format!("{} on {device}", load.model), self.now);
        let mut loading = Loading {
            model: load.model.clone(),
            device: device.clone(),
            parts: Vec::new(),
            prepared: Vec::new(),
            unready: prepared.len(),
            releasing: 0,
            failed: None,
            began: self.now.tick,
            evicted,
            spilled_from,
            unasked: load.unasked,
            cache_for: load.cache_for.clone(),
        };
        for ((component, prepared), (allocation, _)) in prepared.into_iter().zip(&grants) {
            let (allocation, plan) = (*allocation, prepared.plan.clone());
            let origin = self.origin(&plan, &device);
            loading.parts.push(Part {
                component,
                allocation,
                plan,
                lease: LeaseId(Uuid::now_v7()),
                is_shared: false,
                origin,
                sums: false,
                checksum: None,
            });
            loading.prepared.push(prepared);
        }
        for (component, Shared { allocation, plan, lease }) in shared {
            let (is_shared, sums, origin, checksum) = (true, false, None, None);
            loading.parts.push(Part {
                component,
                allocation,
                plan,
                lease,
                is_shared,
                origin,
                sums,
                checksum,
            });
        }
        for part in &mut loading.parts {
            let model = self.models.get_mut(&load.model).expect("it was found above");
            let entry = model.components.get_mut(&part.component).expect("it was found above");
            let (allocation, plan) = (part.allocation, part.plan.clone());
            let before = entry.checksum.as_ref().filter(|(of, _)| of.is_same(&plan)).map(|(_, value)| *value);
            (part.sums, part.checksum) = (load.checksum || before.is_some(), before);
            entry.plan = Ok(plan.clone());
            entry.residency.insert(device.clone(), Residency::Loading { allocation, operation, plan });
        }
        let all_there = loading.unready == 0;
        self.operations.running.insert(operation, Running::Load(loading));
        if !load.unasked {
            self.try_policies(&load.model, &device);
            self.asked_for(&load.model, &device);
        }
        if let Ok(shown) = self.operations.show(operation) {
            self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        }
        for (allocation, grant) in grants {
            self.waiting.insert(allocation, OnReady::Load(operation));
            self.granted(allocation, grant);
        }
        if all_there {
            self.loaded(operation);
        }
    }

    /// A request for the block of one component, or of all of a model together.
    pub(super) fn weights(
        load: &Load,
        component: Option<&ComponentName>,
        bytes: u64,
        priority: Priority,
    ) -> Request {
        let purpose = match component {
            Some(component) => format!("{}/{component}", load.model),
            None => load.model.to_string(),
        };
        Request {
            id: AllocationId(Uuid::now_v7()),
            size_bytes: bytes,
            alignment: 4096,
            allocation_type: AllocationType::Weights,
            memory_type: None,
            purpose,
            priority,
            owner: "vramd".parse().expect("a valid owner"),
            persistent: false,
            generation: 1,
            sealed: true,
            room: None,
        }
    }

    /// The segment of one part is there.
    pub(super) fn part_ready(&mut self, id: OperationId, allocation: AllocationId) {
        let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) else { return };
        loading.unready -= 1;
        if let Some(part) = loading.parts.iter().find(|part| part.allocation == allocation) {
            self.ledger.activate(allocation, part.lease, Lease::Operation { task: Task::Write }, self.now);
            self.ledger.grant(allocation, LeaseId(Uuid::now_v7()), Lease::Model, self.now);
        }
        self.emit_created(allocation);
        let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) else { return };
        if loading.unready > 0 {
            return;
        }
        if loading.failed.is_some() {
            return self.give_parts_back(id);
        }
        let (device, prepared) = (loading.device.clone(), std::mem::take(&mut loading.prepared));
        let parts = loading.parts.iter().filter(|part| !part.is_shared);
        let parts: Vec<_> = parts.map(|part| (part.allocation, part.origin.clone(), part.sums)).collect();
        let targets: Vec<Target> = parts
            .into_iter()
            .zip(prepared)
            .map(|((allocation, origin, checksum), prepared)| {
                let allocation = self.ledger.allocation(allocation).expect("the operation's lease keeps it");
                let plan = prepared.plan.clone();
                let from = match origin {
                    Some(origin) => self.block(&origin, prepared),
                    None => From::Files(prepared),
                };
                let segment = SegmentId(allocation.segment.0);
                Target { segment, offset: allocation.offset, plan, from, checksum }
            })
            .collect();
        let progress = self.operations.progress(id).expect("a running operation has progress");
        self.spawn(&device, move |device| {
            let outcome = loader::read(device, &targets, &progress);
            Event::LoadRead { operation: id, outcome }
        });
    }

    /// The segment of one part could not be made; its reservation is gone.
    pub(super) fn part_failed(&mut self, id: OperationId, allocation: AllocationId, error: ApiError) {
        let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) else { return };
        loading.failed.get_or_insert(error);
        loading.unready -= 1;
        let unready = loading.unready;
        self.forget_part(id, allocation);
        if unready == 0 {
            self.give_parts_back(id);
        }
    }

    /// The thread that read the files has ended.
    pub(super) fn load_read(&mut self, id: OperationId, outcome: Result<Vec<Option<u64>>, LoadFailure>) {
        let failure = match outcome {
            Ok(sums) if !self.operations.cancelled(id) => match self.hold_to_checksums(id, &sums) {
                Ok(()) => return self.loaded(id),
                Err(error) => error,
            },
            Ok(_) | Err(LoadFailure::Cancelled) => {
                ApiError::new(ErrorCode::Cancelled, "the load was cancelled; nothing of it is left")
            }
            Err(LoadFailure::Device(device, error)) => {
                self.note_failure(&device, Some(&error));
                crate::devices::error(&device, &error)
            }
        };
        let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) else { return };
        loading.failed.get_or_insert(failure);
        self.give_parts_back(id);
    }

    /// What has arrived is what had arrived before; what was not summed yet is remembered.
    fn hold_to_checksums(&mut self, id: OperationId, sums: &[Option<u64>]) -> Result<(), ApiError> {
        let Some(Running::Load(loading)) = self.operations.running.get(&id) else { return Ok(()) };
        let read = || loading.parts.iter().filter(|part| !part.is_shared).zip(sums);
        for (part, sum) in read() {
            if let (Some(before), Some(sum)) = (part.checksum, sum)
                && before != *sum
            {
                let what = format!("{}/{} is not what was loaded before", loading.model, part.component);
                let error = ApiError::new(ErrorCode::ChecksumMismatch, what)
                    .hint("its files have the size and the time of then: the disk or the memory may be failing; fetch them again");
                return Err(error
                    .detail("before", serde_json::json!(Checksum::crc64(before)))
                    .detail("now", serde_json::json!(Checksum::crc64(*sum))));
            }
        }
        let Some(model) = self.models.get_mut(&loading.model) else { return Ok(()) };
        for (part, sum) in read() {
            if let (Some(entry), Some(sum)) = (model.components.get_mut(&part.component), sum) {
                entry.checksum = Some((part.plan.clone(), *sum));
            }
        }
        Ok(())
    }

    fn loaded(&mut self, id: OperationId) {
        let Some(Running::Load(loading)) = self.operations.running.remove(&id) else { return };
        for part in loading.parts.iter().filter(|part| !part.is_shared) {
            self.finish_lease(part.lease);
            if let Some(origin) = &part.origin {
                self.finish_lease(origin.lease);
            }
        }
        let Some(model) = self.models.get_mut(&loading.model) else { return };
        let of = |part: &Part| part.plan.layout.payload_bytes;
        let read = || loading.parts.iter().filter(|part| !part.is_shared);
        let bytes: u64 = read().map(of).sum();
        let seconds = self.now.tick.0.saturating_sub(loading.began.0) as f64 / 1000.0;
        let from_files = read().all(|part| part.origin.is_none());
        let now = self.now;
        for part in &loading.parts {
            if let Some(component) = model.components.get_mut(&part.component) {
                let (allocation, plan) = (part.allocation, part.plan.clone());
                let awaited = (!loading.unasked).then(|| stays(now, seconds));
                let cached_from = loading.cache_for.clone();
                let least = if loading.unasked { 0 } else { self.minimum_stay };
                let stays = now.tick.after_seconds(least);
                let resident = Residency::Resident { allocation, plan, awaited, stays, cached_from };
                component.residency.insert(loading.device.clone(), resident);
                if from_files && !part.is_shared {
                    let share = of(part) as f64 / bytes.max(1) as f64;
                    component.load_seconds.insert(loading.device.clone(), seconds * share);
                }
            }
        }
        if !loading.unasked {
            model.last_used = Some(now);
        }
        let origins: BTreeSet<DeviceId> =
            read().filter_map(|part| Some(part.origin.as_ref()?.device.clone())).collect();
        let shared: Vec<_> =
            loading.parts.iter().filter(|part| part.is_shared).map(|part| part.component.clone()).collect();
        match origins.first() {
            _ if from_files => self.note_load(&loading.device, bytes, seconds),
            Some(origin) if read().all(|part| part.origin.is_some()) => {
                self.note_copy(origin, &loading.device, bytes, seconds);
            }
            _ => {}
        }
        let data = serde_json::json!({
            "model": loading.model, "deviceId": loading.device, "bytes": bytes, "loaded": true,
            "evicted": loading.evicted, "copiedFrom": origins, "shared": shared,
            "spilledFrom": loading.spilled_from,
            "components": loading.parts.iter().map(|part| part.component.as_str()).collect::<Vec<_>>(),
        });
        self.emit(EventKind::ModelLoaded, data.clone());
        let kept = loading.parts.into_iter().filter(|_| loading.cache_for.is_none());
        let residents = kept
            .map(|part| Change::PutResident(loading.model.clone(), part.component, loading.device.clone()));
        self.store_all(residents.collect(), OnStored::Nothing);
        self.end_operation(id, Ok(data));
    }

    /// A load has failed: what its parts have goes back, then it ends.
    fn give_parts_back(&mut self, id: OperationId) {
        let Some(Running::Load(loading)) = self.operations.running.get(&id) else { return };
        let (mut works, mut ended, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for part in &loading.parts {
            if part.is_shared {
                shares.push((part.allocation, part.lease));
                let model = self.models.get_mut(&loading.model);
                if let Some(entry) = model.and_then(|model| model.components.get_mut(&part.component)) {
                    entry.residency.remove(&loading.device);
                }
                continue;
            }
            // Its own lease is what keeps it now; one that never got a segment has none.
            let _ = self.ledger.release(part.allocation, self.now);
            if let Some((allocation, Some(work))) = self.ledger.end_lease(part.lease, self.now) {
                self.releasing.insert(allocation, OnReleased::Operation(id));
                works.push(work);
            }
            ended.extend(part.origin.as_ref().map(|origin| origin.lease));
        }
        let unasked = loading.unasked;
        for lease in ended {
            self.finish_lease(lease);
        }
        for (allocation, lease) in shares {
            self.give_up_share(allocation, lease);
        }
        if unasked {
            self.promote_later(PROMOTE_LATER_SECONDS);
        }
        if let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) {
            loading.releasing = works.len();
        }
        for work in works {
            self.perform(work);
        }
        self.end_if_given_back(id);
    }

    /// The bytes of one part are back.
    pub(super) fn part_released(&mut self, id: OperationId, allocation: AllocationId, held_by: &[Holder]) {
        self.forget_part(id, allocation);
        match self.operations.running.get_mut(&id) {
            Some(Running::Load(Loading { releasing, .. })) => *releasing -= 1,
            Some(Running::Unload(Unloading { releasing, held_by: holders, .. })) => {
                *releasing -= 1;
                holders.extend(held_by.iter().cloned());
            }
            Some(Running::Transfer(_)) => return self.item_released(id, allocation, held_by),
            Some(Running::Defragment(_)) => return self.place_freed(id, allocation),
            Some(Running::Clear(_) | Running::Split(_) | Running::Relief(_)) | None => return,
        }
        self.end_if_given_back(id);
    }

    pub(super) fn end_if_given_back(&mut self, id: OperationId) {
        match self.operations.running.get_mut(&id) {
            Some(Running::Load(Loading { releasing: 0, failed, .. })) => {
                let error =
                    failed.take().unwrap_or_else(|| ApiError::new(ErrorCode::Internal, "the load failed"));
                self.end_operation(id, Err(error));
            }
            Some(Running::Unload(Unloading {
                releasing: 0,
                model,
                devices,
                parts,
                bytes,
                held_by,
                cached,
            })) => {
                let data = serde_json::json!({
                    "model": model, "devices": devices, "releasedBytes": bytes,
                    "verified": held_by.is_empty(), "heldBy": held_by, "cached": cached,
                });
                self.mover.leave(flow(id));
                // Not more: others may have been loaded to the same device meanwhile.
                let of = self.models.get(model);
                let there = |component: &ComponentName, device: &DeviceId| {
                    let entry = of.and_then(|model| model.components.get(component));
                    entry.is_some_and(|entry| entry.residency.contains_key(device))
                };
                let gone = parts
                    .drain(..)
                    .filter(|(component, device)| !there(component, device))
                    .map(|(component, device)| Change::RemoveResident(model.clone(), component, device))
                    .collect();
                self.store_all(gone, OnStored::Nothing);
                self.emit(EventKind::ModelUnloaded, data.clone());
                self.end_operation(id, Ok(data));
            }
            _ => {}
        }
    }

    /// A part of a model is on that device no more.
    fn forget_part(&mut self, id: OperationId, allocation: AllocationId) {
        let name = match self.operations.running.get(&id) {
            Some(Running::Load(loading)) => loading.model.clone(),
            Some(Running::Unload(unloading)) => unloading.model.clone(),
            Some(
                Running::Transfer(_)
                | Running::Defragment(_)
                | Running::Clear(_)
                | Running::Split(_)
                | Running::Relief(_),
            )
            | None => return,
        };
        if let Some(model) = self.models.get_mut(&name) {
            for component in model.components.values_mut() {
                component.residency.retain(|_, residency| residency.allocation() != allocation);
            }
        }
    }
}

/// Until when what was loaded in so many seconds is kept for whom it was loaded.
fn stays(now: Now, seconds: f64) -> Tick {
    Tick(now.tick.0 + (seconds.max(GRACE_SECONDS) * 1000.0) as u64)
}

/// Whether all that is wanted is resident, or on the way by `operation`.
fn brings_all(operation: OperationId, here: &[Option<&Residency>]) -> bool {
    here.iter().all(|residency| match residency {
        Some(Residency::Loading { operation: brings, .. }) => *brings == operation,
        Some(Residency::Resident { .. }) => true,
        Some(Residency::Evicting { .. }) | None => false,
    })
}
