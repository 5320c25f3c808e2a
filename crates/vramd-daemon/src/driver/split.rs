//! Loads whose components may go to different devices: a load for each device, and one operation over them. Either all
//! components are there in the end, or none of those that it brought.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use vramd_api::{
    AllocationType, ApiError, ComponentName, DeviceId, ErrorCode, EventKind, ModelName, OperationId,
    OperationKind, OperationState,
};
use vramd_core::ledger::{Request, Shortage};
use vramd_core::models::{Model, Residency};
use vramd_core::{placement, split};

use super::allocations::refusal;
use super::operations::Running;
use super::room::{BYTES_PER_SECOND, nothing_to_evict};
use super::{Load, LoadAnswer, State};
use crate::source::Prepared;

/// A load over several devices.
#[derive(Debug)]
pub(super) struct Splitting {
    model: ModelName,
    /// All that is to be there in the end, wherever.
    wanted: BTreeSet<ComponentName>,
    /// The loads that bring what was missing, one for each device.
    loads: BTreeMap<OperationId, Group>,
    reason: String,
    /// What gives back what came, after something else did not.
    unloads: Vec<OperationId>,
    failed: Option<ApiError>,
}

impl Splitting {
    pub(super) fn brings(&self, wanted: &[ComponentName]) -> bool {
        wanted.iter().all(|name| self.wanted.contains(name))
    }
}

/// Components that go to one device.
#[derive(Debug, Clone)]
struct Group {
    device: DeviceId,
    components: BTreeSet<ComponentName>,
}

/// What counts as room on a device.
#[derive(Debug, Clone, Copy)]
enum Capacity {
    /// What there is.
    Free,
    /// What there would be without all that may go.
    Evictable,
    /// What there would be if it were empty.
    Limit,
}

impl State {
    /// The split load of a model that is under way.
    pub(super) fn splitting(&self, name: &ModelName) -> Option<(OperationId, &Splitting)> {
        self.operations.running.iter().find_map(|(id, running)| match running {
            Running::Split(splitting) if splitting.model == *name => Some((*id, splitting)),
            _ => None,
        })
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

    /// Begins a load whose components may go to different devices; None if one device, or none, is to have all of them: then it is a
    /// load like others.
    pub(super) fn begin_split(
        &mut self,
        load: &Load,
        prepared: &mut BTreeMap<ComponentName, Prepared>,
        wanted: &[ComponentName],
    ) -> Result<Option<LoadAnswer>, ApiError> {
        let model = self.changeable(&load.model)?;
        let priority = model.priority;
        let there: BTreeSet<DeviceId> = self.places(model, wanted).into_values().collect();
        let requests: Vec<(ComponentName, Request)> = prepared
            .iter()
            .map(|(name, one)| {
                (name.clone(), Self::weights(load, Some(name), one.plan.layout.block_bytes, priority))
            })
            .collect();
        let devices = self.nearest_devices();
        let spread = |capacity| self.spread(load, &requests, &devices, &there, capacity);
        let shortage = load.shortage;
        let found = spread(Capacity::Free)
            .or_else(|| spread(Capacity::Evictable).filter(|_| shortage.evict))
            .or_else(|| spread(Capacity::Limit).filter(|_| shortage.wait_seconds.is_some()));
        let Some((groups, reason)) = found else {
            let whole: Vec<Request> = requests.iter().map(|(_, request)| request.clone()).collect();
            let fits_one =
                devices.iter().any(|on| self.ledger.could_fit_all(&whole, std::slice::from_ref(on)));
            if fits_one || shortage.spill || spread(Capacity::Limit).is_none() {
                return Ok(None);
            }
            let largest =
                whole.iter().max_by_key(|request| request.size_bytes).expect("something is missing");
            let size_bytes = whole.iter().fold(0_u64, |sum, one| sum.saturating_add(one.size_bytes));
            let all = Request { size_bytes, ..largest.clone() };
            let shortage = Shortage { could_fit: true, ..self.ledger.refusal(&all, &devices) };
            let error = refusal(&shortage);
            return Err(if load.shortage.evict { nothing_to_evict(error) } else { error });
        };
        if let [only] = &groups[..] {
            // Beside what is there, or all of it together.
            let one = Load { device: Some(only.device.clone()), ..load.clone() };
            let components = only.components.iter().cloned().collect();
            return self
                .begin_load(&one, Some(only.device.clone()), std::mem::take(prepared), components)
                .map(Some);
        }
        self.begin_groups(load, prepared, wanted, groups, reason).map(Some)
    }

    /// The devices of the nearest kind of memory that there is.
    fn nearest_devices(&self) -> Vec<DeviceId> {
        let rank =
            |it: &vramd_core::ledger::DeviceFacts| placement::rank(it.memory_type, AllocationType::Weights);
        let alive = || self.ledger.devices().filter(|it| !self.ledger.is_lost(&it.device));
        let nearest = alive().map(rank).min();
        alive().filter(|it| Some(rank(it)) == nearest).map(|it| it.device.clone()).collect()
    }

    /// Where each component would go, and why there.
    fn spread(
        &self,
        load: &Load,
        requests: &[(ComponentName, Request)],
        devices: &[DeviceId],
        there: &BTreeSet<DeviceId>,
        capacity: Capacity,
    ) -> Option<(Vec<Group>, String)> {
        let (_, first) = requests.first()?;
        let place = |device: &DeviceId| {
            let limit = self.ledger.limit(device).unwrap_or_default();
            let free = self.ledger.room_for(first, device);
            let bytes = match capacity {
                Capacity::Free => free,
                Capacity::Evictable => {
                    let idle = self.candidates_for(device, first, Some(&load.model));
                    idle.iter().fold(free, |sum, one| sum.saturating_add(one.candidate.bytes))
                }
                Capacity::Limit => limit,
            };
            split::Place {
                bytes: bytes.min(limit),
                total_bytes: limit,
                bytes_per_second: self.load_rates.get(device).copied().unwrap_or(BYTES_PER_SECOND),
                is_used: there.contains(device),
            }
        };
        let places: Vec<split::Place> = devices.iter().map(place).collect();
        let part = |request: &Request| {
            let held = |device| self.ledger.held_for(std::slice::from_ref(request), device);
            devices.iter().map(held).collect()
        };
        let parts: Vec<Vec<Option<u64>>> = requests.iter().map(|(_, request)| part(request)).collect();
        let (way, seconds) = split::split(&parts, &places)?;
        let mut groups: BTreeMap<&DeviceId, BTreeSet<ComponentName>> = BTreeMap::new();
        for ((name, _), at) in requests.iter().zip(way) {
            groups.entry(&devices[at]).or_default().insert(name.clone());
        }
        let named = |(device, components): (&&DeviceId, &BTreeSet<ComponentName>)| {
            let names: Vec<_> = components.iter().map(ComponentName::as_str).collect();
            format!("{} on {device}", names.join(", "))
        };
        let shown: Vec<_> = groups.iter().map(named).collect();
        let why = match capacity {
            Capacity::Free => "no device has room for all of it",
            Capacity::Evictable => "no device has room for all of it without those that may go",
            Capacity::Limit => "it waits for room",
        };
        let reason = format!(
            "{}: {why}; of the ways over as few devices it is there soonest so, in {seconds:.1} s by the rates that loads came to",
            shown.join("; ")
        );
        let group = |(device, components): (&DeviceId, _)| Group { device: device.clone(), components };
        Some((groups.into_iter().map(group).collect(), reason))
    }

    fn begin_groups(
        &mut self,
        load: &Load,
        prepared: &mut BTreeMap<ComponentName, Prepared>,
        wanted: &[ComponentName],
        groups: Vec<Group>,
        reason: String,
    ) -> Result<LoadAnswer, ApiError> {
        let payload =
            prepared.values().fold(0, |sum, part| u64::saturating_add(sum, part.plan.layout.payload_bytes));
        let mut loads: BTreeMap<OperationId, Group> = BTreeMap::new();
        for group in groups {
            let device = group.device.clone();
            let components: Vec<ComponentName> = group.components.iter().cloned().collect();
            let own = components.iter().filter_map(|name| prepared.remove_entry(name)).collect();
            let one =
                Load { device: Some(device.clone()), components: Some(components.clone()), ..load.clone() };
            match self.begin_load(&one, Some(device), own, components) {
                Ok(LoadAnswer::Operation(begun)) => drop(loads.insert(begun.operation_id, group)),
                Ok(LoadAnswer::Prepare(_) | LoadAnswer::After(_)) => unreachable!("all of it is prepared"),
                Err(error) => {
                    for begun in loads.into_keys() {
                        self.begin_cancel(begun);
                    }
                    return Err(error);
                }
            }
        }
        let devices: Vec<_> = loads.values().map(|group| group.device.as_str()).collect();
        let subject = format!("{} on {}", load.model, devices.join(", "));
        let id = self.operations.begin(OperationKind::Load, subject, payload, self.now);
        let splitting = Splitting {
            model: load.model.clone(),
            wanted: wanted.iter().cloned().collect(),
            loads,
            reason,
            unloads: Vec::new(),
            failed: None,
        };
        self.operations.running.insert(id, Running::Split(splitting));
        let shown = self.operations.show(id)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        self.to_go_on.insert(id);
        Ok(LoadAnswer::Operation(Box::new(shown)))
    }

    /// Looks how the loads of a split one stand.
    pub(super) fn go_on_splitting(&mut self, id: OperationId) {
        let Some(Running::Split(splitting)) = self.operations.running.get(&id) else { return };
        let cancelled = self.operations.cancelled(id);
        let loads: Vec<_> =
            splitting.loads.keys().filter_map(|load| self.operations.show(*load).ok()).collect();
        if let Some(progress) = self.operations.progress(id) {
            progress.done.store(loads.iter().map(|load| load.bytes_done).sum(), Ordering::Relaxed);
        }
        let mut failed = splitting.failed.clone();
        let wrong = |error: &ApiError| error.code != ErrorCode::Cancelled || !cancelled;
        failed = failed.or_else(|| loads.iter().find_map(|load| load.error.clone().filter(&wrong)));
        if cancelled {
            let error = "the load was cancelled; nothing of it is left";
            failed = failed.or_else(|| Some(ApiError::new(ErrorCode::Cancelled, error)));
        }
        let open: Vec<_> =
            loads.iter().filter(|load| !load.state.ended()).map(|load| load.operation_id).collect();
        if failed.is_some() {
            for load in &open {
                self.begin_cancel(*load);
            }
        }
        let Some(Running::Split(splitting)) = self.operations.running.get_mut(&id) else { return };
        splitting.failed.clone_from(&failed);
        if !open.is_empty() {
            return;
        }
        let Some(error) = failed else {
            let Some(Running::Split(all)) = self.operations.running.remove(&id) else { return };
            let devices: Vec<_> = all.loads.iter().map(|(operation, group)| {
                serde_json::json!({ "deviceId": group.device, "components": group.components, "operationId": operation })
            }).collect();
            let result = serde_json::json!({
                "model": all.model, "loaded": true, "devices": devices, "reason": all.reason,
            });
            return self.end_operation(id, Ok(result));
        };
        // What came is of no use without the rest. What somebody has attached meanwhile stays.
        let came = loads.iter().filter(|load| load.state == OperationState::Completed);
        let came: Vec<_> = came.filter_map(|load| splitting.loads.remove(&load.operation_id)).collect();
        let model = splitting.model.clone();
        let mut begun = Vec::new();
        for Group { device, components } in came {
            if let Ok(unload) = self.unload_part(&model, &device, &components) {
                begun.push(unload);
            }
        }
        let Some(Running::Split(splitting)) = self.operations.running.get_mut(&id) else { return };
        splitting.unloads.extend(begun);
        let unloads = splitting.unloads.clone();
        let ended = |unload: &OperationId| self.operations.show(*unload).is_ok_and(|one| one.state.ended());
        if unloads.iter().all(ended) {
            self.end_operation(id, Err(error));
        }
    }

    fn unload_part(
        &mut self,
        model: &ModelName,
        device: &DeviceId,
        components: &BTreeSet<ComponentName>,
    ) -> Result<OperationId, ApiError> {
        let entry = self.changeable(model)?;
        let attached = components.iter().any(|name| {
            let residency = entry.components.get(name).and_then(|it| it.residency.get(device));
            let held = residency.and_then(|it| self.ledger.allocation(it.allocation()));
            held.is_some_and(vramd_core::ledger::Allocation::is_attached)
        });
        if attached {
            return Err(ApiError::new(ErrorCode::Conflict, format!("{model} is attached on {device}")));
        }
        self.begin_unload(model, vec![device.clone()], Some(components), false)
            .map(|begun| begun.operation_id)
    }
}
