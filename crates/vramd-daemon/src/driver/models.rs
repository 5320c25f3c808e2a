//! Models: registered, loaded in parts, kept alive.
//!
//! A load reserves the blocks of all its parts at once, has them made, reads the files into them on a thread of
//! its own, and then either all parts are resident or none is.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;
use vramd_api::{
    AllocationId, AllocationType, ApiError, ComponentName, DeviceId, ErrorCode, EventKind, Holder, KeepAlive,
    LeaseId, ModelName, OperationId, OperationKind, Priority,
};
use vramd_core::ledger::{Grant, Lease, Request, Shortage, Task};
use vramd_core::models::{Busy, MAX_MODELS, Model, Plan, Residency};
use vramd_core::{Now, Tick};

use super::allocations::{OnReady, OnReleased, attached, refusal, too_many_wait};
use super::operations::{Loading, Running, Unloading};
use super::room::{GRACE_SECONDS, WaitingLoad, nothing_to_evict};
use super::{Event, Load, LoadAnswer, LoadFailure, OnStored, Part, Reply, State};
use crate::loader::{self, Target};
use crate::source::Prepared;
use crate::store::{Change, StoredModel};

impl State {
    pub(super) fn register(&mut self, model: Box<Model>, reply: Reply<vramd_api::Model>) {
        let refused = if self.models.get(&model.name).is_some() || self.changing.contains(&model.name) {
            ApiError::new(ErrorCode::Conflict, format!("there is a model {} already", model.name))
                .hint("choose another name, or remove that one first")
        } else if self.models.len() >= MAX_MODELS {
            ApiError::new(ErrorCode::TooManyRequests, format!("{MAX_MODELS} models are registered already"))
                .hint("remove some: `vramd models rm NAME`")
                .detail("limit", MAX_MODELS)
        } else {
            self.changing.insert(model.name.clone());
            let row = stored(&model);
            return self.store(Change::PutModel(row), OnStored::Register(model, reply));
        };
        self.answer(reply, Err(refused));
    }

    pub(super) fn registered(
        &mut self,
        model: Model,
        reply: Reply<vramd_api::Model>,
        stored: Result<(), ApiError>,
    ) {
        self.changing.remove(&model.name);
        let answer = stored.map(|()| {
            let shown = model.to_api(self.ledger.allocations());
            self.emit(
                EventKind::ModelRegistered,
                serde_json::json!({ "name": model.name, "sizeBytes": shown.size_bytes }),
            );
            self.models.insert(model);
            shown
        });
        self.answer(reply, answer);
    }

    pub(super) fn inspected(
        &mut self,
        name: &ModelName,
        plans: BTreeMap<ComponentName, Result<Arc<Plan>, Box<ApiError>>>,
    ) {
        let Some(model) = self.models.get_mut(name) else { return };
        for (component, plan) in plans {
            if let Some(entry) = model.components.get_mut(&component).filter(|entry| entry.plan.is_err()) {
                entry.plan = plan;
            }
        }
    }

    pub(super) fn remove(&mut self, name: ModelName, reply: Reply<vramd_api::Model>) {
        let refused = match self.changeable(&name) {
            Err(error) => error,
            Ok(model) => match self.removable(model) {
                Ok(()) => {
                    self.changing.insert(name.clone());
                    return self.store(Change::RemoveModel(name.clone()), OnStored::Remove(name, reply));
                }
                Err(busy) => refuse(&name, busy),
            },
        };
        self.answer(reply, Err(refused));
    }

    fn removable(&self, model: &Model) -> Result<(), Busy> {
        match self.waiting_load(&model.name) {
            Some((operation, _)) => Err(Busy::Operation(operation)),
            None => model.removable(self.ledger.allocations()),
        }
    }

    pub(super) fn removed(
        &mut self,
        name: &ModelName,
        reply: Reply<vramd_api::Model>,
        stored: Result<(), ApiError>,
    ) {
        self.changing.remove(name);
        let shown = self.models.get(name).map(|model| model.to_api(self.ledger.allocations()));
        let answer = stored.and_then(|()| {
            self.models.remove(name);
            self.trials.values_mut().for_each(|trial| trial.forget(name));
            self.emit(EventKind::ModelRemoved, serde_json::json!({ "name": name }));
            shown.ok_or_else(|| no_model(name))
        });
        self.answer(reply, answer);
    }

    pub(super) fn pin(&mut self, name: ModelName, pinned: bool, reply: Reply<vramd_api::Model>) {
        match self.changeable(&name) {
            Err(error) => self.answer(reply, Err(error)),
            Ok(_) => self.store(Change::SetPinned(name.clone(), pinned), OnStored::Pin(name, pinned, reply)),
        }
    }

    pub(super) fn pinned(
        &mut self,
        name: &ModelName,
        pinned: bool,
        reply: Reply<vramd_api::Model>,
        stored: Result<(), ApiError>,
    ) {
        let now = self.now;
        let answer = stored.and_then(|()| {
            self.change(name, |model| {
                model.pinned = pinned;
                model.last_used = Some(now);
            })
        });
        self.answer(reply, answer);
    }

    pub(super) fn touch(
        &mut self,
        name: ModelName,
        keep_alive: Option<KeepAlive>,
        reply: Reply<vramd_api::Model>,
    ) {
        match (self.changeable(&name), keep_alive) {
            (Err(error), _) => self.answer(reply, Err(error)),
            (Ok(_), None) => self.touched(&name, None, reply, Ok(())),
            (Ok(_), Some(keep_alive)) => self.store(
                Change::SetKeepAlive(name.clone(), keep_alive),
                OnStored::Touch(name, keep_alive, reply),
            ),
        }
    }

    pub(super) fn touched(
        &mut self,
        name: &ModelName,
        keep_alive: Option<KeepAlive>,
        reply: Reply<vramd_api::Model>,
        stored: Result<(), ApiError>,
    ) {
        let now = self.now;
        let answer = stored.and_then(|()| {
            self.change(name, |model| {
                model.keep_alive = keep_alive.unwrap_or(model.keep_alive);
                model.used(now);
            })
        });
        self.answer(reply, answer);
    }

    fn change(
        &mut self,
        name: &ModelName,
        change: impl FnOnce(&mut Model),
    ) -> Result<vramd_api::Model, ApiError> {
        let model = self.models.get_mut(name).ok_or_else(|| no_model(name))?;
        change(model);
        let shown = model.to_api(self.ledger.allocations());
        self.emit(
            EventKind::ModelChanged,
            serde_json::json!({ "name": name, "pinned": shown.pinned, "keepAlive": shown.keep_alive }),
        );
        Ok(shown)
    }

    pub(super) fn changeable(&self, name: &ModelName) -> Result<&Model, ApiError> {
        let model = self.models.get(name).ok_or_else(|| no_model(name))?;
        if self.changing.contains(name) {
            return Err(ApiError::new(ErrorCode::Conflict, format!("model {name} is being removed"))
                .hint("register it again once it is gone"));
        }
        Ok(model)
    }

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
        let model = self.changeable(&load.model)?;
        let wanted: Vec<ComponentName> = match &load.components {
            None => model.components.keys().cloned().collect(),
            Some(names) => names.clone(),
        };
        for name in &wanted {
            if !model.components.contains_key(name) {
                return Err(no_component(model, name));
            }
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
                let brings_all = brings_all(operation, &here);
                return self.join(load, operation, brings_all);
            }
            if here.iter().all(Option::is_some) {
                let device = device.clone();
                return self.loaded_already(load, &device);
            }
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
            .filter(|name| device.as_ref().is_none_or(|device| on(name, device).is_none()))
            .map(|name| (name.clone(), model.components[name].path.clone()))
            .collect();
        // What was prepared may be of another registration, or of less than what is missing by now.
        let fitting = prepared.filter(|prepared| {
            prepared.len() == missing.len()
                && prepared.iter().all(|(name, file)| missing.get(name) == Some(&file.path))
        });
        match fitting {
            Some(prepared) => self.begin_load(load, device, prepared, wanted),
            None => Ok(LoadAnswer::Prepare(missing)),
        }
    }

    /// The device, not a lost one, that most of the wanted components are on, or on the way to.
    fn most_parts(&self, model: &Model, wanted: &[ComponentName]) -> Option<DeviceId> {
        let mut counts: BTreeMap<&DeviceId, usize> = BTreeMap::new();
        let residencies = wanted.iter().flat_map(|name| &model.components[name].residency);
        let staying = residencies.filter(|(_, residency)| !matches!(residency, Residency::Evicting { .. }));
        for (device, _) in staying {
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
            return Ok(LoadAnswer::Operation(Box::new(self.operations.show(operation)?)));
        }
        Err(ApiError::new(
            ErrorCode::Conflict,
            format!("other components of model {} are being loaded or unloaded", load.model),
        )
        .hint("wait for that operation, then load again")
        .detail("operationId", operation.to_string()))
    }

    fn loaded_already(&mut self, load: &Load, device: &DeviceId) -> Result<LoadAnswer, ApiError> {
        self.set_keep_alive(load);
        self.try_policies(&load.model, device);
        let now = self.now;
        if let Some(model) = self.models.get_mut(&load.model) {
            let here = model.components.values_mut().filter_map(|entry| entry.residency.get_mut(device));
            for residency in here {
                // Who asks again and again and never comes does not keep it for ever.
                if let Residency::Resident { awaited: awaited @ None, .. } = residency {
                    *awaited = Some(stays(now, 0.0));
                }
            }
        }
        let subject = format!("{} on {device}", load.model);
        let id = self.operations.begin(OperationKind::Load, subject, 0, self.now);
        self.end_operation(
            id,
            Ok(serde_json::json!({ "model": load.model, "deviceId": device, "loaded": false })),
        );
        Ok(LoadAnswer::Operation(Box::new(self.operations.show(id)?)))
    }

    fn set_keep_alive(&mut self, load: &Load) {
        let Some(model) = self.models.get_mut(&load.model) else { return };
        model.used(self.now);
        if let Some(keep_alive) = load.keep_alive.filter(|keep_alive| *keep_alive != model.keep_alive) {
            model.keep_alive = keep_alive;
            self.store(Change::SetKeepAlive(load.model.clone(), keep_alive), OnStored::Nothing);
        }
    }

    fn begin_load(
        &mut self,
        load: &Load,
        device: Option<DeviceId>,
        prepared: BTreeMap<ComponentName, Prepared>,
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
        let on: Vec<DeviceId> = device.into_iter().collect();
        let payload =
            prepared.values().fold(0, |sum, part| u64::saturating_add(sum, part.plan.layout.payload_bytes));
        let fits = self.ledger.could_fit_all(&requests, &on);
        let others_wait = !self.queue.is_empty() && fits && load.shortage.wait_seconds.is_some();
        let grants = if others_wait { None } else { self.ledger.reserve_all(&requests, &on, self.now) };
        let load = Load { device: on.first().cloned(), ..load.clone() };
        let operation = |state: &mut Self, waits: bool| {
            let subject =
                on.first().map_or_else(|| load.model.to_string(), |on| format!("{} on {on}", load.model));
            let kind = OperationKind::Load;
            if waits {
                state.operations.line_up(kind, subject, payload, state.now)
            } else {
                state.operations.begin(kind, subject, payload, state.now)
            }
        };
        let id = if let Some(grants) = grants {
            let id = operation(self, false);
            self.set_keep_alive(&load);
            self.start_load(id, WaitingLoad::new(load, prepared, wanted), grants);
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
                let shortage = Shortage { could_fit: fits, ..self.ledger.refusal(&whole, &on) };
                let error = refusal(&shortage);
                return Err(if load.shortage.evict { nothing_to_evict(error) } else { error });
            };
            let id = operation(self, true);
            self.set_keep_alive(&load);
            let mut waiting = WaitingLoad::new(load, prepared, wanted);
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
        let WaitingLoad { load, prepared, evicted, wanted, .. } = waiting;
        let Some(device) = grants.first().map(|(_, grant)| grant.device.clone()) else { return };
        // It may have come there otherwise while the load waited, or the rest of it may have gone.
        let changed = |model: &Model| {
            wanted.iter().any(|name| {
                let there = model.components.get(name).and_then(|entry| entry.residency.get(&device));
                match there {
                    None => !prepared.contains_key(name),
                    Some(Residency::Resident { .. }) => prepared.contains_key(name),
                    Some(_) => true,
                }
            })
        };
        if self.changeable(&load.model).map_or(true, changed) {
            for (allocation, grant) in grants {
                self.granted(allocation, grant);
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
        };
        for ((component, prepared), (allocation, _)) in prepared.into_iter().zip(&grants) {
            let (allocation, plan) = (*allocation, prepared.plan.clone());
            let model = self.models.get_mut(&load.model).expect("it was found above");
            let entry = model.components.get_mut(&component).expect("it was found above");
            entry.plan = Ok(plan.clone());
            entry
                .residency
                .insert(device.clone(), Residency::Loading { allocation, operation, plan: plan.clone() });
            loading.parts.push(Part { component, allocation, plan, writing: LeaseId(Uuid::now_v7()) });
            loading.prepared.push(prepared);
        }
        self.operations.running.insert(operation, Running::Load(loading));
        self.try_policies(&load.model, &device);
        if let Ok(shown) = self.operations.show(operation) {
            self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        }
        for (allocation, grant) in grants {
            self.waiting.insert(allocation, OnReady::Load(operation));
            self.granted(allocation, grant);
        }
    }

    /// A request for the block of one component, or of all of a model together.
    fn weights(load: &Load, component: Option<&ComponentName>, bytes: u64, priority: Priority) -> Request {
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
        }
    }

    /// The segment of one part is there.
    pub(super) fn part_ready(&mut self, id: OperationId, allocation: AllocationId) {
        let Some(Running::Load(loading)) = self.operations.running.get_mut(&id) else { return };
        loading.unready -= 1;
        if let Some(part) = loading.parts.iter().find(|part| part.allocation == allocation) {
            self.ledger.activate(allocation, part.writing, Lease::Operation { task: Task::Write }, self.now);
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
        let allocations: Vec<_> = loading.parts.iter().map(|part| part.allocation).collect();
        let targets: Vec<Target> = allocations
            .iter()
            .zip(prepared)
            .filter_map(|(allocation, prepared)| {
                let allocation = self.ledger.allocation(*allocation)?;
                Some(Target { segment: allocation.segment.0, offset: allocation.offset, prepared })
            })
            .collect();
        let progress = self.operations.progress(id).expect("a running operation has progress");
        let on = device.clone();
        self.spawn(&device, move |device| {
            let outcome = loader::read(device, &targets, &progress).map_err(|failure| match failure {
                Some(error) => LoadFailure::Device(on, error),
                None => LoadFailure::Cancelled,
            });
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
    pub(super) fn load_read(&mut self, id: OperationId, outcome: Result<(), LoadFailure>) {
        let failure = match outcome {
            Ok(()) if !self.operations.cancelled(id) => return self.loaded(id),
            Ok(()) | Err(LoadFailure::Cancelled) => {
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

    fn loaded(&mut self, id: OperationId) {
        let Some(Running::Load(loading)) = self.operations.running.remove(&id) else { return };
        for part in &loading.parts {
            self.finish_lease(part.writing);
        }
        let Some(model) = self.models.get_mut(&loading.model) else { return };
        let bytes: u64 = loading.parts.iter().map(|part| part.plan.layout.payload_bytes).sum();
        let seconds = self.now.tick.0.saturating_sub(loading.began.0) as f64 / 1000.0;
        for part in &loading.parts {
            if let Some(component) = model.components.get_mut(&part.component) {
                let (allocation, plan) = (part.allocation, part.plan.clone());
                let share = plan.layout.payload_bytes as f64 / bytes.max(1) as f64;
                let awaited = Some(stays(self.now, seconds));
                let resident = Residency::Resident { allocation, plan, awaited };
                component.residency.insert(loading.device.clone(), resident);
                component.load_seconds.insert(loading.device.clone(), seconds * share);
            }
        }
        model.last_used = Some(self.now);
        self.note_load(&loading.device, bytes, seconds);
        let data = serde_json::json!({
            "model": loading.model, "deviceId": loading.device, "bytes": bytes, "loaded": true,
            "evicted": loading.evicted,
            "components": loading.parts.iter().map(|part| part.component.as_str()).collect::<Vec<_>>(),
        });
        self.emit(EventKind::ModelLoaded, data.clone());
        let residents = loading
            .parts
            .into_iter()
            .map(|part| Change::PutResident(loading.model.clone(), part.component, loading.device.clone()));
        self.store_all(residents.collect(), OnStored::Nothing);
        self.end_operation(id, Ok(data));
    }

    /// A load has failed: what its parts have goes back, then it ends.
    fn give_parts_back(&mut self, id: OperationId) {
        let Some(Running::Load(loading)) = self.operations.running.get(&id) else { return };
        let mut works = Vec::new();
        for part in &loading.parts {
            // Its own lease is what keeps it now; one that never got a segment has none.
            let _ = self.ledger.release(part.allocation, self.now);
            if let Some((allocation, Some(work))) = self.ledger.end_lease(part.writing, self.now) {
                self.releasing.insert(allocation, OnReleased::Operation(id));
                works.push(work);
            }
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
            Some(Running::Clear(_)) | None => return,
        }
        self.end_if_given_back(id);
    }

    fn end_if_given_back(&mut self, id: OperationId) {
        match self.operations.running.get_mut(&id) {
            Some(Running::Load(Loading { releasing: 0, failed, .. })) => {
                let error =
                    failed.take().unwrap_or_else(|| ApiError::new(ErrorCode::Internal, "the load failed"));
                self.end_operation(id, Err(error));
            }
            Some(Running::Unload(Unloading { releasing: 0, model, devices, parts, bytes, held_by })) => {
                let data = serde_json::json!({
                    "model": model, "devices": devices, "releasedBytes": bytes,
                    "verified": held_by.is_empty(), "heldBy": held_by,
                });
                // Not more: others may have been loaded to the same device meanwhile.
                let gone = parts
                    .drain(..)
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
            Some(Running::Transfer(_) | Running::Defragment(_) | Running::Clear(_)) | None => return,
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

pub(super) fn no_model(name: &ModelName) -> ApiError {
    ApiError::not_found("model", name).hint("`vramd models` lists the registered ones")
}

pub(super) fn no_component(model: &Model, name: &ComponentName) -> ApiError {
    let known: Vec<_> = model.components.keys().map(ComponentName::as_str).collect();
    ApiError::new(ErrorCode::NotFound, format!("model {} has no component {name}", model.name))
        .hint(format!("its components are: {}", known.join(", ")))
}

pub(super) fn not_resident(name: &ModelName, place: &str) -> ApiError {
    ApiError::new(ErrorCode::NotResident, format!("model {name} is not resident on {place}"))
        .hint(format!("load it first: `vramd load {name}`"))
}

pub(super) fn refuse(name: &ModelName, busy: Busy) -> ApiError {
    match busy {
        Busy::Attached(holders) => attached(&format!("model {name}"), &holders),
        Busy::Operation(operation) => {
            ApiError::new(ErrorCode::Conflict, format!("model {name} is being loaded or unloaded"))
                .hint("wait for that operation, or cancel it: `vramd cancel ID`")
                .detail("operationId", operation.to_string())
        }
        Busy::Resident(devices) => {
            let places: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
            ApiError::new(ErrorCode::Conflict, format!("model {name} is resident on {}", places.join(", ")))
                .hint(format!("unload it first: `vramd unload {name}`"))
        }
    }
}

fn stored(model: &Model) -> StoredModel {
    let sources: BTreeMap<&ComponentName, serde_json::Value> = model
        .components
        .iter()
        .map(|(name, component)| (name, serde_json::json!({ "path": component.path })))
        .collect();
    StoredModel {
        name: model.name.clone(),
        components: serde_json::to_string(&sources).expect("names and paths always print"),
        keep_alive: model.keep_alive,
        pinned: model.pinned,
        priority: model.priority,
        registered_at: model.registered_at,
    }
}
