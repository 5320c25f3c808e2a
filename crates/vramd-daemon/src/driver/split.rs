//! Loads whose components may go to different devices: a load for each device, and one operation over them. Either all
//! components are there in the end, or none of those that it brought.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use vramd_api::{
    AllocationType, ApiError, ComponentName, DeviceId, ErrorCode, EventKind, EvictedComponent, ModelName,
    Operation, OperationId, OperationKind, OperationState,
};
use vramd_core::ledger::{Request, Shortage};
use vramd_core::models::{Model, Residency};
use vramd_core::{Tick, placement, split};

use super::models::no_model;
use super::operations::Running;
use super::refusals::{nothing_to_evict, refusal, timed_out};
use super::room::{BYTES_PER_SECOND, files};
use super::{Load, LoadAnswer, OnShortage, State};
use crate::source::Prepared;

/// A load over several devices.
#[derive(Debug)]
pub(super) struct Splitting {
    model: ModelName,
    /// All that is to be there in the end, wherever.
    wanted: Vec<ComponentName>,
    /// It has not begun: there is no room yet.
    waiting: Option<WaitingSplit>,
    /// What each device is to have of what was missing.
    groups: Vec<Group>,
    reason: String,
    /// What gives back what came, after something else did not.
    unloads: Vec<OperationId>,
    /// What came and stays all the same.
    stays: Vec<String>,
    failed: Option<ApiError>,
}

const NOTHING_LEFT: &str = "nothing of it is left";

/// It holds nothing while it waits, so that two of them never wait for each other.
#[derive(Debug)]
struct WaitingSplit {
    load: Load,
    prepared: BTreeMap<ComponentName, Prepared>,
    deadline: Tick,
}

/// Components that go to one device.
#[derive(Debug, Clone)]
struct Group {
    device: DeviceId,
    components: BTreeSet<ComponentName>,
    /// The load that brings them.
    load: OperationId,
    /// How it ended.
    ended: Option<Operation>,
}

/// Which components go to which devices, and why.
type Way = (BTreeMap<DeviceId, BTreeSet<ComponentName>>, String);

/// What is to come, and beside what.
struct Missing<'a> {
    load: &'a Load,
    prepared: &'a BTreeMap<ComponentName, Prepared>,
    requests: Vec<(ComponentName, Request)>,
    there: BTreeSet<DeviceId>,
}

impl Missing<'_> {
    fn all(&self) -> Vec<Request> {
        self.requests.iter().map(|(_, request)| request.clone()).collect()
    }
}

/// What counts as room on a device.
#[derive(Debug, Clone, Copy)]
enum Capacity {
    /// What there is.
    Free,
    /// What there will be without all that may go.
    Evictable,
    /// What there would be without anybody else.
    Limit,
}

impl Splitting {
    pub(super) fn brings(&self, wanted: &[ComponentName]) -> bool {
        wanted.iter().all(|name| self.wanted.contains(name))
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }
}

impl State {
    /// The split load of a model that is under way.
    pub(super) fn splitting(&self, name: &ModelName) -> Option<(OperationId, &Splitting)> {
        self.operations.running.iter().find_map(|(id, running)| match running {
            Running::Split(splitting) if splitting.model == *name => Some((*id, splitting)),
            _ => None,
        })
    }

    pub(super) fn files_of_waiting_splits(&self) -> usize {
        let waiting = self.operations.running.values().filter_map(|running| match running {
            Running::Split(splitting) => splitting.waiting.as_ref(),
            _ => None,
        });
        waiting.map(|waiting| files(&waiting.prepared)).sum()
    }

    /// Where each of `wanted` is that is somewhere of itself.
    pub(super) fn places(
        &self,
        model: &Model,
        wanted: &[ComponentName],
    ) -> BTreeMap<ComponentName, DeviceId> {
        let place = |name: &ComponentName| {
            model.components.get(name)?.residency.iter().find_map(|(device, residency)| match residency {
                Residency::Resident { cached_from: None, .. } if !self.ledger.is_lost(device) => {
                    Some(device.clone())
                }
                _ => None,
            })
        };
        wanted.iter().filter_map(|name| Some((name.clone(), place(name)?))).collect()
    }

    /// Begins a load whose components may go to different devices; None if one device is to have all of them: then it is a load like
    /// others.
    pub(super) fn begin_split(
        &mut self,
        load: &Load,
        prepared: &mut BTreeMap<ComponentName, Prepared>,
        wanted: &[ComponentName],
    ) -> Result<Option<LoadAnswer>, ApiError> {
        let missing = self.missing(load, prepared, wanted)?;
        let (whole, devices) = (missing.all(), self.nearest_devices());
        let is_whole = missing.there.is_empty();
        let on_one = |fits: &dyn Fn(&DeviceId) -> bool| is_whole && devices.iter().any(fits);
        if is_whole && self.has_all(load, prepared).is_some()
            || on_one(&|device| self.ledger.has_room(&whole, device))
        {
            return Ok(None);
        }
        let found = self.way(&missing);
        if let Some((groups, _)) = &found
            && groups.len() == 1
        {
            let device = groups.first_key_value().map(|(device, _)| device.clone()).filter(|_| !is_whole);
            // Where all of it goes to one device, that is chosen by what is lost there.
            let Some(device) = device else { return Ok(None) };
            let one = Load { device: Some(device.clone()), split: false, ..load.clone() };
            let missing = prepared.keys().cloned().collect();
            let own = std::mem::take(prepared);
            return self.begin_load(&one, Some(device), own, missing).map(Some);
        }
        let payload =
            prepared.values().fold(0, |sum, part| u64::saturating_add(sum, part.plan.layout.payload_bytes));
        let subject = load.model.to_string();
        let mut splitting = Splitting {
            model: load.model.clone(),
            wanted: wanted.to_vec(),
            waiting: None,
            groups: Vec::new(),
            reason: String::new(),
            unloads: Vec::new(),
            stays: Vec::new(),
            failed: None,
        };
        let id = if let Some((groups, reason)) = found {
            self.set_keep_alive(load);
            splitting.reason = reason;
            let id = self.operations.begin(OperationKind::Load, subject, payload, self.now);
            self.begin_groups(&mut splitting, load, std::mem::take(prepared), groups);
            id
        } else {
            let fits_one = on_one(&|device| self.ledger.could_fit_all(&whole, std::slice::from_ref(device)));
            let never = || self.spread(&missing, Capacity::Limit).is_none();
            if load.shortage.spill || !fits_one && never() {
                return Ok(None);
            }
            let Some(seconds) = load.shortage.wait_seconds else {
                if fits_one {
                    return Ok(None);
                }
                let error = self.no_way(&load.model, &whole, &devices);
                return Err(if load.shortage.evict { nothing_to_evict(error) } else { error });
            };
            self.check_line(prepared)?;
            self.set_keep_alive(load);
            let deadline = self.now.tick.after_seconds(seconds);
            let prepared = std::mem::take(prepared);
            splitting.waiting = Some(WaitingSplit { load: load.clone(), prepared, deadline });
            self.operations.line_up(OperationKind::Load, subject, payload, self.now)
        };
        self.operations.running.insert(id, Running::Split(splitting));
        let shown = self.operations.show(id)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        self.to_go_on.insert(id);
        Ok(Some(LoadAnswer::Operation(Box::new(shown))))
    }

    fn missing<'a>(
        &self,
        load: &'a Load,
        prepared: &'a BTreeMap<ComponentName, Prepared>,
        wanted: &[ComponentName],
    ) -> Result<Missing<'a>, ApiError> {
        let model = self.changeable(&load.model)?;
        let request = |(name, one): (&ComponentName, &Prepared)| {
            (name.clone(), Self::weights(load, Some(name), one.plan.layout.block_bytes, model.priority))
        };
        let requests = prepared.iter().map(request).collect();
        let there = self.places(model, wanted).into_values().collect();
        Ok(Missing { load, prepared, requests, there })
    }

    /// Why there is no room for all of `requests` on these devices together, now.
    fn no_way(&self, name: &ModelName, requests: &[Request], devices: &[DeviceId]) -> ApiError {
        let size_bytes = requests.iter().fold(0_u64, |sum, one| sum.saturating_add(one.size_bytes));
        let whole = Request { size_bytes, ..requests[0].clone() };
        let shortage = self.with_evictable(self.ledger.refusal(&whole, devices), &whole, Some(name));
        let mut error = refusal(&Shortage { could_fit: true, ..shortage });
        error.message = format!("not over {} devices either: {}", devices.len(), error.message);
        error
    }

    /// Where components could go now.
    fn way(&self, missing: &Missing<'_>) -> Option<Way> {
        let evicts = missing.load.shortage.evict;
        let evictable = || evicts.then(|| self.spread(missing, Capacity::Evictable)).flatten();
        self.spread(missing, Capacity::Free).or_else(evictable)
    }

    /// The devices of the nearest kind of memory that there is.
    pub(super) fn nearest_devices(&self) -> Vec<DeviceId> {
        let rank =
            |it: &vramd_core::ledger::DeviceFacts| placement::rank(it.memory_type, AllocationType::Weights);
        let alive = || self.ledger.devices().filter(|it| !self.ledger.is_lost(&it.device));
        let nearest = alive().map(rank).min();
        alive().filter(|it| Some(rank(it)) == nearest).map(|it| it.device.clone()).collect()
    }

    /// Where each component would go, and why there.
    fn spread(&self, missing: &Missing<'_>, capacity: Capacity) -> Option<Way> {
        let Missing { load, prepared, requests, there } = missing;
        let (all, devices) = (missing.all(), self.nearest_devices());
        let first = all.first()?;
        let place = |device: &DeviceId| {
            let limit = self.ledger.limit(device).unwrap_or_default();
            let bytes = match capacity {
                Capacity::Free => self.ledger.room_for(&all, device),
                Capacity::Evictable => {
                    let idle = self.evictable(prepared, device, first, &load.model);
                    self.ledger.room_with(&all, device, idle)
                }
                Capacity::Limit => limit.saturating_sub(self.held_by_model(&load.model, device)),
            };
            split::Place {
                bytes: bytes.min(limit),
                total_bytes: limit,
                bytes_per_second: self.load_rates.get(device).copied().unwrap_or(BYTES_PER_SECOND),
                is_used: there.contains(device),
            }
        };
        let places: Vec<split::Place> = devices.iter().map(place).collect();
        let part = |(name, request): &(ComponentName, Request)| {
            let plan = prepared.get(name).map(|one| &one.plan);
            let held = |device: &DeviceId| match plan {
                Some(plan) if self.has_bytes(plan, device) => Some(0),
                _ => self.ledger.held_for(std::slice::from_ref(request), device),
            };
            devices.iter().map(held).collect()
        };
        let parts: Vec<Vec<Option<u64>>> = requests.iter().map(part).collect();
        let (way, seconds) = split::split(&parts, &places)?;
        let mut groups: BTreeMap<DeviceId, BTreeSet<ComponentName>> = BTreeMap::new();
        for ((name, _), at) in requests.iter().zip(way) {
            groups.entry(devices[at].clone()).or_default().insert(name.clone());
        }
        let named = |(device, components): (&DeviceId, &BTreeSet<ComponentName>)| {
            let names: Vec<_> = components.iter().map(ComponentName::as_str).collect();
            format!("{} on {device}", names.join(", "))
        };
        let limited = matches!(capacity, Capacity::Limit);
        if !limited
            && !groups.iter().all(|(device, names)| self.is_possible(missing, device, names, capacity))
        {
            return None;
        }
        let shown: Vec<_> = groups.iter().map(named).collect();
        let went = if matches!(capacity, Capacity::Evictable) { " without others going" } else { "" };
        let reason = format!(
            "{}: no device has room for all of it{went}; of the ways over as few devices it is there soonest so, in {seconds:.1} s by the rates that loads came to",
            shown.join("; ")
        );
        Some((groups, reason))
    }

    /// What may go on a device for a model that shares none of it.
    fn evictable(
        &self,
        prepared: &BTreeMap<ComponentName, Prepared>,
        device: &DeviceId,
        request: &Request,
        name: &ModelName,
    ) -> u64 {
        let idle = self.candidates_for(device, request, Some(name));
        let is_shared = |part: &EvictedComponent| {
            let entry = self.models.get(&part.model).and_then(|model| model.components.get(&part.component));
            let plan = entry.and_then(|entry| entry.plan.as_ref().ok());
            plan.is_some_and(|plan| prepared.values().any(|one| one.plan.is_same(plan)))
        };
        let others = idle.iter().filter(|one| !one.parts.iter().any(is_shared));
        others.fold(0, |sum, one| sum.saturating_add(one.candidate.bytes))
    }

    /// Whether a device can really have a group: as its own load will be asked for it.
    fn is_possible(
        &self,
        missing: &Missing<'_>,
        device: &DeviceId,
        names: &BTreeSet<ComponentName>,
        capacity: Capacity,
    ) -> bool {
        let comes = |name: &ComponentName| {
            missing.prepared.get(name).is_some_and(|one| !self.has_bytes(&one.plan, device))
        };
        let requests = missing.requests.iter().filter(|(name, _)| names.contains(name) && comes(name));
        let requests: Vec<Request> = requests.map(|(_, request)| request.clone()).collect();
        let Some(first) = requests.first() else { return true };
        match capacity {
            Capacity::Free => self.ledger.has_room(&requests, device),
            Capacity::Evictable | Capacity::Limit => {
                let idle = || self.evictable(missing.prepared, device, first, &missing.load.model);
                self.ledger.lacks(&requests, device).is_some_and(|lacks| lacks == 0 || lacks <= idle())
            }
        }
    }

    /// What a device has of a model.
    fn held_by_model(&self, name: &ModelName, device: &DeviceId) -> u64 {
        let components = self.models.get(name).into_iter().flat_map(|model| model.components.values());
        let here = components.filter_map(|entry| entry.residency.get(device));
        here.filter_map(|it| self.ledger.allocation(it.allocation())).map(|held| held.block_bytes).sum()
    }

    fn begin_groups(
        &mut self,
        splitting: &mut Splitting,
        load: &Load,
        mut prepared: BTreeMap<ComponentName, Prepared>,
        groups: BTreeMap<DeviceId, BTreeSet<ComponentName>>,
    ) {
        // Room was found for all of them: nobody waits longer than what goes for it takes to be back.
        let shortage = OnShortage { spill: false, wait_seconds: None, ..load.shortage };
        for (device, components) in groups {
            let names: Vec<ComponentName> = components.iter().cloned().collect();
            let own = names.iter().filter_map(|name| prepared.remove_entry(name)).collect();
            let one = Load {
                device: Some(device.clone()),
                components: Some(names.clone()),
                shortage,
                split: true,
                ..load.clone()
            };
            match self.begin_load(&one, Some(device.clone()), own, names) {
                Ok(LoadAnswer::Operation(begun)) => {
                    let load = begun.operation_id;
                    splitting.groups.push(Group { device, components, load, ended: None });
                }
                Ok(LoadAnswer::Prepare(_) | LoadAnswer::After(_)) => unreachable!("all of it is prepared"),
                Err(error) => {
                    splitting.failed = Some(error);
                    return;
                }
            }
        }
    }

    /// Looks how the loads of a split one stand.
    pub(super) fn go_on_splitting(&mut self, id: OperationId) {
        if !matches!(self.operations.running.get(&id), Some(Running::Split(_))) {
            return;
        }
        let Some(Running::Split(mut splitting)) = self.operations.running.remove(&id) else { return };
        match self.look_at_split(id, &mut splitting) {
            None => drop(self.operations.running.insert(id, Running::Split(splitting))),
            Some(outcome) => self.end_operation(id, outcome),
        }
    }

    /// Takes its next step; answers what came of it, once it is over.
    fn look_at_split(
        &mut self,
        id: OperationId,
        splitting: &mut Splitting,
    ) -> Option<Result<serde_json::Value, ApiError>> {
        let cancelled = self.operations.cancelled(id);
        if cancelled && splitting.failed.is_none() {
            let what = format!("the load was cancelled; {NOTHING_LEFT}");
            splitting.failed = Some(ApiError::new(ErrorCode::Cancelled, what));
        }
        if let Some(waiting) = splitting.waiting.take() {
            self.end_waiting_split(id, splitting, waiting)?;
        }
        for group in splitting.groups.iter_mut().filter(|group| group.ended.is_none()) {
            group.ended = self.operations.show(group.load).ok().filter(|load| load.state.ended());
        }
        let error = splitting.groups.iter().find_map(|group| group.ended.as_ref()?.error.clone());
        splitting.failed = splitting.failed.take().or(error);
        let open: Vec<OperationId> =
            splitting.groups.iter().filter(|group| group.ended.is_none()).map(|group| group.load).collect();
        if let Some(progress) = self.operations.progress(id).filter(|_| !splitting.groups.is_empty()) {
            let now = |group: &Group| {
                let ended = group.ended.as_ref().map(|load| load.bytes_done);
                ended.or_else(|| self.operations.show(group.load).ok().map(|load| load.bytes_done))
            };
            progress.done.store(splitting.groups.iter().filter_map(now).sum(), Ordering::Relaxed);
        }
        if splitting.failed.is_some() {
            for load in &open {
                self.begin_cancel(*load);
            }
        }
        if !open.is_empty() {
            return None;
        }
        if splitting.failed.is_none() {
            let model = self.models.get(&splitting.model);
            let places = model.map(|model| self.places(model, &splitting.wanted)).unwrap_or_default();
            if splitting.wanted.iter().all(|name| places.contains_key(name)) {
                let group = |group: &Group| {
                    let Group { device, components, load, .. } = group;
                    serde_json::json!({ "deviceId": device, "components": components, "operationId": load })
                };
                let devices: Vec<_> = splitting.groups.iter().map(group).collect();
                let results =
                    splitting.groups.iter().filter_map(|group| group.ended.as_ref()?.result.as_ref());
                let evicted: Vec<_> =
                    results.filter_map(|result| result["evicted"].as_array()).flatten().collect();
                return Some(Ok(serde_json::json!({
                    "model": splitting.model, "loaded": !devices.is_empty(), "devices": devices,
                    "reason": splitting.reason, "evicted": evicted,
                })));
            }
            let what = format!("model {} changed meanwhile", splitting.model);
            let error = ApiError::new(ErrorCode::Conflict, what);
            splitting.failed = Some(error.hint("load it again: some of it may be there already"));
        }
        // What came is of no use without the rest.
        for group in std::mem::take(&mut splitting.groups) {
            if group.ended.is_some_and(|load| load.state == OperationState::Completed) {
                let (unload, stays) = self.unload_group(&splitting.model, &group.device, group.components);
                splitting.unloads.extend(unload);
                splitting.stays.extend(stays);
            }
        }
        let ended = |unload: &OperationId| self.operations.show(*unload).map_or(true, |it| it.state.ended());
        if !splitting.unloads.iter().all(ended) {
            return None;
        }
        let mut error = splitting.failed.take()?;
        if !splitting.stays.is_empty() {
            let stays = splitting.stays.join(", ");
            error.message = error.message.replace(NOTHING_LEFT, "what somebody has attached meanwhile stays");
            error = error.detail("stays", stays);
        }
        Some(Err(error))
    }

    /// Looks whether there is room by now for one that waits; None while there is none.
    fn end_waiting_split(
        &mut self,
        id: OperationId,
        splitting: &mut Splitting,
        waiting: WaitingSplit,
    ) -> Option<()> {
        if splitting.failed.is_some() {
            return Some(());
        }
        let WaitingSplit { load, mut prepared, deadline } = waiting;
        let Some(model) = self.models.get(&load.model) else {
            splitting.failed = Some(no_model(&load.model));
            return Some(());
        };
        if model.operation(None).is_none() {
            let places = self.places(model, &splitting.wanted);
            prepared.retain(|name, _| !places.contains_key(name));
            let is_gone =
                |name: &&ComponentName| !places.contains_key(*name) && !prepared.contains_key(*name);
            if let Some(name) = splitting.wanted.iter().find(is_gone) {
                let what = format!("{}/{name} went while the load waited", load.model);
                splitting.failed = Some(ApiError::new(ErrorCode::Conflict, what).hint("load it again"));
                return Some(());
            }
            if prepared.is_empty() {
                return Some(());
            }
            let missing = match self.missing(&load, &prepared, &splitting.wanted) {
                Ok(missing) => missing,
                Err(error) => {
                    splitting.failed = Some(error);
                    return Some(());
                }
            };
            if let Some((groups, reason)) = self.way(&missing) {
                self.operations.start(id, load.model.to_string(), self.now);
                splitting.reason = reason;
                self.begin_groups(splitting, &load, prepared, groups);
                return Some(());
            }
            if deadline <= self.now.tick {
                let error = self.no_way(&load.model, &missing.all(), &self.nearest_devices());
                splitting.failed = Some(timed_out(error));
                return Some(());
            }
        } else if deadline <= self.now.tick {
            let what = format!("some of model {} was being loaded or unloaded all the time", load.model);
            splitting.failed = Some(ApiError::new(ErrorCode::Timeout, what));
            return Some(());
        }
        splitting.waiting = Some(WaitingSplit { load, prepared, deadline });
        None
    }

    /// Gives back what came for a load that has failed, but what somebody has attached meanwhile.
    fn unload_group(
        &mut self,
        name: &ModelName,
        device: &DeviceId,
        components: BTreeSet<ComponentName>,
    ) -> (Option<OperationId>, Vec<String>) {
        let Some(model) = self.models.get(name) else { return (None, Vec::new()) };
        let (goes, stays): (BTreeSet<_>, BTreeSet<_>) = components
            .into_iter()
            .partition(|component| self.holders_by(model, Some(device), Some(component)).is_empty());
        let unload = (!goes.is_empty())
            .then(|| self.begin_unload(name, vec![device.clone()], Some(&goes), false))
            .and_then(Result::ok);
        let stays = stays.into_iter().map(|component| format!("{component} on {device}"));
        (unload.map(|begun| begun.operation_id), stays.collect())
    }
}
