//! Room for those who have to wait for it: what goes for them, and the loads that wait.
//!
//! A request that may evict has idle components unloaded until what it lacks is on its way back. It claims that room, so that nobody
//! who does not wait takes it, and stands in the queue like everybody else. What is attached, at work, pinned, of a higher priority or
//! waited for stays.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{
    AllocationId, ApiError, ComponentName, DeviceId, ErrorCode, EvictedComponent as Evicted, EvictionPolicy,
    ModelName, OperationId,
};
use vramd_core::Tick;
use vramd_core::eviction::{self, Candidate};
use vramd_core::ledger::{Grant, Request, Shortage, State as AllocationState};
use vramd_core::models::{Model, Residency};
use vramd_core::queue::Waiting as Queued;
use vramd_core::trial::{Trial, Use};

use super::allocations::OnReady;
use super::refusals::{refusal, timed_out, too_many_wait};
use super::tiers::Shared;
use super::{Load, State};
use crate::source::Prepared;

/// What a load is taken to need, before one was measured.
pub(super) const BYTES_PER_SECOND: f64 = 1e9;
/// How long bytes may take to come back before who waits for them hears of it.
const RETURN_SECONDS: u64 = 30;
/// What was loaded and not attached yet stays as long as that took, and so long at least.
pub(super) const GRACE_SECONDS: f64 = 1.0;
/// As many of those that stayed are named.
const NAMED: usize = 5;
/// The most files that loads keep open while they wait.
const WAITING_FILES: usize = 256;

/// A load that waits for room.
#[derive(Debug)]
pub(super) struct WaitingLoad {
    pub load: Load,
    pub prepared: BTreeMap<ComponentName, Prepared>,
    /// What is there for others.
    pub shared: BTreeMap<ComponentName, Shared>,
    /// All that is to be there in the end.
    pub wanted: Vec<ComponentName>,
    pub evicted: Vec<Evicted>,
    /// The devices that had no room for it, if it goes to host memory instead.
    pub spilled_from: Vec<DeviceId>,
    /// Its first block.
    id: AllocationId,
}

impl WaitingLoad {
    pub(super) fn new(
        load: Load,
        prepared: BTreeMap<ComponentName, Prepared>,
        shared: BTreeMap<ComponentName, Shared>,
        wanted: Vec<ComponentName>,
    ) -> Self {
        let (evicted, spilled_from) = (Vec::new(), Vec::new());
        let id = AllocationId(uuid::Uuid::nil());
        Self { load, prepared, shared, wanted, evicted, spilled_from, id }
    }
}

/// Whether there will be room.
pub(super) enum Room {
    /// It is on its way back.
    Coming,
    /// Idle models have it that were loaded for somebody who has not come yet, and stay until then.
    Soon(Tick),
    No,
}

/// A block of components that could go.
pub(super) struct Idle {
    pub allocation: AllocationId,
    /// Until then at least.
    pub stays: Tick,
    pub candidate: Candidate,
    /// One, but for what several share.
    pub parts: Vec<Evicted>,
}

/// What could go on one device.
struct Choice {
    device: DeviceId,
    chosen: Vec<Vec<Evicted>>,
    stayed: Vec<Evicted>,
    loss: f64,
}

impl State {
    /// Unloads what costs least until `requests` have room on one of `on`, and claims it for them. `model`: whose they are; `waits`:
    /// they keep to the line.
    pub(super) fn make_room(
        &mut self,
        requests: &[Request],
        on: &[DeviceId],
        model: Option<&ModelName>,
        waits: bool,
    ) -> (Room, Vec<Evicted>) {
        let id = requests[0].id;
        let before = self.ledger.give_up_claim(id);
        let mut soon: Option<Tick> = None;
        let mut best: Option<Choice> = None;
        for device in self.ledger.devices_for(&requests[0], on) {
            let Some(lacks) = self.ledger.lacks(requests, &device) else { continue };
            if lacks == 0 {
                // It is on its way back, and nothing need go.
                best = Some(Choice { device, chosen: Vec::new(), stayed: Vec::new(), loss: 0.0 });
                break;
            }
            let (mut old, mut young, mut until) = (Vec::new(), Vec::new(), Tick::default());
            for idle in self.candidates_for(&device, &requests[0], model) {
                if idle.stays <= self.now.tick {
                    old.push(idle);
                } else {
                    until = until.max(idle.stays);
                    young.push(idle.candidate);
                }
            }
            let candidates: Vec<Candidate> = old.iter().map(|idle| idle.candidate).collect();
            let Some(chosen) = eviction::choose(&candidates, lacks, self.policy_on(&device)) else {
                young.extend(candidates);
                if eviction::choose(&young, lacks, EvictionPolicy::LargestFirst).is_some() {
                    soon = Some(soon.map_or(until, |before| before.min(until)));
                }
                continue;
            };
            let loss = chosen.iter().map(|at| candidates[*at].loss()).sum();
            // Of devices where as much is lost the first.
            if best.as_ref().is_none_or(|best| loss < best.loss) {
                let mut stayed: Vec<_> = (0..old.len()).filter(|at| !chosen.contains(at)).collect();
                stayed.sort_by(|a, b| candidates[*a].loss().total_cmp(&candidates[*b].loss()));
                let named = |at: usize| old[at].parts.clone();
                best = Some(Choice {
                    device,
                    stayed: stayed.into_iter().take(NAMED).flat_map(named).collect(),
                    chosen: chosen.into_iter().map(named).collect(),
                    loss,
                });
            }
        }
        let Some(Choice { device, chosen, stayed, .. }) = best else {
            if let Some((device, bytes)) = before {
                self.ledger.claim(id, &device, bytes);
            }
            return (soon.map_or(Room::No, Room::Soon), Vec::new());
        };
        // What comes back by itself is for whoever is first in the line, unless nobody there can use it.
        let free = !waits && self.ledger.has_room(requests, &device);
        let made = free || !chosen.is_empty() || before.is_some_and(|(on, _)| on == device);
        if let Some(bytes) = self.ledger.held_for(requests, &device).filter(|_| made) {
            self.ledger.claim(id, &device, bytes);
        }
        let purpose = &requests[0].purpose;
        let whose = model.map_or_else(|| requests[0].owner.to_string(), ToString::to_string);
        let chosen: Vec<Evicted> = chosen.into_iter().flatten().collect();
        self.tell_evicted(&chosen, self.policy_on(&device), &whose, purpose, &stayed);
        self.unload_evicted(&chosen, true);
        (Room::Coming, chosen)
    }

    /// By what is chosen there now.
    pub(super) fn policy_on(&self, device: &DeviceId) -> EvictionPolicy {
        match self.policy {
            EvictionPolicy::LowestCost => self.trials.get(device).map_or(self.policy, Trial::better),
            other => other,
        }
    }

    /// A model is used on a device: what would each policy have loaded for it?
    pub(super) fn try_policies(&mut self, name: &ModelName, device: &DeviceId) {
        let Some(model) = self.models.get(name) else { return };
        let rate = self.load_rates.get(device).copied().unwrap_or(BYTES_PER_SECOND);
        let mut used = Use { bytes: 0, load_seconds: 0.0, priority: model.priority };
        for entry in model.components.values().filter(|entry| entry.residency.contains_key(device)) {
            let bytes = entry.plan.as_ref().map_or(0, |plan| plan.layout.block_bytes);
            used.bytes = used.bytes.saturating_add(bytes);
            used.load_seconds += entry.load_seconds.get(device).copied().unwrap_or(bytes as f64 / rate);
        }
        let limit = self.ledger.limit(device).unwrap_or_default();
        self.trials.entry(device.clone()).or_default().used(name, used, limit, self.now.tick);
    }

    /// A load of it waits, or some of it comes or goes.
    pub(super) fn is_on_its_way(&self, model: &Model) -> bool {
        model.operation(None).is_some()
            || self.waiting_load(&model.name).is_some()
            || self.splitting(&model.name).is_some()
    }

    /// Unloads what was chosen to go. `keep`: in RAM, where that pays.
    pub(super) fn unload_evicted(&mut self, chosen: &[Evicted], keep: bool) -> Vec<OperationId> {
        let mut begun = Vec::new();
        let mut parts: BTreeMap<(&ModelName, &DeviceId), BTreeSet<ComponentName>> = BTreeMap::new();
        for Evicted { model, device_id, component, .. } in chosen {
            parts.entry((model, device_id)).or_default().insert(component.clone());
        }
        for ((name, device), components) in parts {
            match self.begin_unload(name, vec![device.clone()], Some(&components), keep) {
                Ok(operation) => begun.push(operation.operation_id),
                Err(error) => tracing::warn!(model = %name, %error, "an idle model could not be unloaded"),
            }
        }
        begun
    }

    /// Those of [`Self::candidates`] that may go for a request: no more than their owners and purposes have above their reserves.
    pub(super) fn candidates_for(
        &self,
        device: &DeviceId,
        request: &Request,
        asking: Option<&ModelName>,
    ) -> Vec<Idle> {
        let mut all = self.candidates(device, request.priority, asking);
        let blocks: Vec<_> = all.iter().map(|idle| (idle.allocation, idle.candidate.loss())).collect();
        let mut may = self.ledger.above_reserves(device, &blocks, request).into_iter();
        all.retain(|_| may.next().unwrap_or(true));
        all
    }

    /// A shortage with what one block could get if all went that may go for it.
    pub(super) fn with_evictable(
        &self,
        mut shortage: Shortage,
        request: &Request,
        asking: Option<&ModelName>,
    ) -> Shortage {
        if let Some(device) = &shortage.closest {
            let idle = self.candidates_for(device, request, asking);
            let bytes = idle.iter().fold(0_u64, |sum, idle| sum.saturating_add(idle.candidate.bytes));
            shortage.largest_after_eviction_bytes = shortage.largest_free_bytes.saturating_add(bytes);
        }
        shortage
    }

    /// The idle components on a device, and until when each stays at least. What several models share goes from all of them or not
    /// at all.
    pub(super) fn candidates(
        &self,
        device: &DeviceId,
        priority: vramd_api::Priority,
        asking: Option<&ModelName>,
    ) -> Vec<Idle> {
        let mut found: BTreeMap<AllocationId, Idle> = BTreeMap::new();
        // What is being loaded is to be there as a whole.
        let may_go = |model: &Model| {
            !(model.pinned
                || model.priority > priority
                || asking == Some(&model.name)
                || self.changing.contains(&model.name)
                || self.waiting_load(&model.name).is_some()
                || self.splitting(&model.name).is_some())
        };
        let here =
            |model: &&Model| model.components.values().any(|entry| entry.residency.contains_key(device));
        for model in self.models.iter().filter(here).filter(|model| may_go(model)) {
            let idle = model.last_used.map_or(0, |used| self.now.tick.0.saturating_sub(used.tick.0));
            for (component, entry) in &model.components {
                let (allocation, awaited, least) = match entry.residency.get(device) {
                    Some(Residency::Resident { .. }) if model.is_loading() => continue,
                    Some(Residency::Resident { allocation, awaited, stays, .. }) => {
                        (*allocation, *awaited, *stays)
                    }
                    // Once it is there, and whoever it is for has had time to come, it may be idle.
                    Some(Residency::Loading { allocation, .. }) => {
                        (*allocation, None, self.now.tick.after_seconds(self.minimum_stay))
                    }
                    Some(Residency::Evicting { .. }) | None => continue,
                };
                // Nobody waits that long.
                if least > self.now.tick.after_seconds(RETURN_SECONDS) {
                    continue;
                }
                let Some(held) = self.ledger.allocation(allocation) else { continue };
                let is_loading = model.is_loading();
                let busy = held.state != AllocationState::Active
                    || held.is_attached()
                    || held.tasks().next().is_some();
                // What shares its segment frees nothing that others could use.
                if (busy && !is_loading) || self.ledger.segment_bytes(allocation) != Some(held.block_bytes) {
                    continue;
                }
                let bytes = held.block_bytes;
                let load_seconds = self.seconds_to_get_back(entry, device, bytes);
                let uses_per_second = model.popularity.uses_per_second(self.now.tick);
                let candidate = Candidate {
                    bytes,
                    priority: model.priority,
                    idle_seconds: idle as f64 / 1000.0,
                    uses_per_second,
                    reload_seconds: load_seconds,
                };
                let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
                let evicted = Evicted {
                    model: model.name.clone(),
                    component: component.clone(),
                    device_id: device.clone(),
                    bytes,
                    idle_seconds: rounded(candidate.idle_seconds),
                    uses_per_hour: rounded(uses_per_second * 3600.0),
                    load_seconds: rounded(load_seconds),
                };
                let stays = if is_loading {
                    Tick(self.now.tick.0 + ((load_seconds + GRACE_SECONDS) * 1000.0) as u64)
                } else {
                    awaited.unwrap_or_default()
                };
                let stays = stays.max(least);
                found
                    .entry(allocation)
                    .and_modify(|idle| {
                        let all = &mut idle.candidate;
                        idle.stays = idle.stays.max(stays);
                        all.priority = all.priority.max(candidate.priority);
                        all.idle_seconds = all.idle_seconds.min(candidate.idle_seconds);
                        all.uses_per_second += candidate.uses_per_second;
                        idle.parts.push(evicted.clone());
                    })
                    .or_insert_with(|| Idle { allocation, stays, candidate, parts: vec![evicted] });
            }
        }
        let of_all = |idle: &Idle| {
            let held = self.ledger.allocation(idle.allocation);
            held.is_some_and(|held| held.model_count().max(1) == idle.parts.len())
        };
        found.into_values().filter(of_all).collect()
    }

    /// Makes room for a request that may evict, if that can help; answers how long it waits then, and what went for it.
    pub(super) fn wait_for_room(
        &mut self,
        requests: &[Request],
        on: &[DeviceId],
        shortage: super::OnShortage,
        model: Option<&ModelName>,
    ) -> (Option<Tick>, Vec<Evicted>) {
        let patience = |from: Tick, seconds: u64| from.after_seconds(seconds.saturating_add(RETURN_SECONDS));
        let wait = shortage.wait_seconds;
        let now = self.now.tick;
        if !shortage.evict {
            // What RAM keeps that nobody asked for there is in nobody's way.
            let returns = self.room_from_cache(requests, on).then(|| patience(now, wait.unwrap_or(0)));
            return (returns.max(wait.map(|seconds| now.after_seconds(seconds))), Vec::new());
        }
        // Those before have the first choice of what has become idle.
        self.make_room_for_waiting();
        let (room, evicted) = self.make_room(requests, on, model, wait.is_some());
        let deadline = match room {
            Room::Coming => Some(patience(now, wait.unwrap_or(0))),
            Room::Soon(then) => Some(patience(then, wait.unwrap_or(0))),
            Room::No => wait.map(|seconds| now.after_seconds(seconds)),
        };
        (deadline, evicted)
    }

    /// Has what RAM keeps go for requests that may go there; answers whether that makes room.
    fn room_from_cache(&mut self, requests: &[Request], on: &[DeviceId]) -> bool {
        let Some(ram) = self.ram().filter(|ram| on.is_empty() || on.contains(ram)) else { return false };
        let Some(lacks) = self.ledger.lacks(requests, &ram).filter(|_| self.cached_bytes(&ram) > 0) else {
            return false;
        };
        let whose = requests[0].owner.to_string();
        lacks == 0 || self.shrink_cache(&ram, lacks, f64::INFINITY, &whose).is_some()
    }

    /// Looks again for room for those who may evict, in order: a model may be idle now that was not.
    pub(super) fn make_room_for_waiting(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        let line: Vec<_> = self.queue.iter().map(|it| (it.requests.clone(), it.on.clone())).collect();
        for (requests, on) in line {
            let id = requests[0].id;
            let (operation, own) = match self.waiting.get(&id) {
                Some(OnReady::WaitingLoad(operation)) => (Some(*operation), None),
                Some(OnReady::Client(client)) => (None, Some(client.allocate.shortage)),
                _ => continue,
            };
            let waiting = operation.and_then(|operation| self.waiting_loads.get(&operation));
            let Some(how) = waiting.map(|waiting| waiting.load.shortage).or(own).filter(|how| how.evict)
            else {
                continue;
            };
            let room = requests[0].room.as_ref().and_then(|room| room.model.clone());
            let model = waiting.map(|waiting| waiting.load.model.clone()).or(room);
            let waits = how.wait_seconds.is_some();
            let (_, evicted) = self.make_room(&requests, &on, model.as_ref(), waits);
            if !evicted.is_empty() {
                self.queue.extend(id, self.now.tick.after_seconds(RETURN_SECONDS));
            }
            if let Some(waiting) = operation.and_then(|operation| self.waiting_loads.get_mut(&operation)) {
                waiting.evicted.extend(evicted);
            }
        }
        self.admit();
    }

    /// Refuses a load that finds no place in the line: nothing is to go for it.
    pub(super) fn check_line(&self, prepared: &BTreeMap<ComponentName, Prepared>) -> Result<(), ApiError> {
        if self.queue.is_full() {
            return Err(too_many_wait());
        }
        let open: usize = self.waiting_loads.values().map(|waiting| files(&waiting.prepared)).sum();
        let open = open + self.files_of_waiting_splits();
        if open > 0 && open + files(prepared) > WAITING_FILES {
            let what = format!("loads that wait keep {open} files open already");
            return Err(ApiError::new(ErrorCode::TooManyRequests, what)
                .hint("try again later")
                .detail("limit", WAITING_FILES));
        }
        Ok(())
    }

    /// Lines a load up; false if too many wait.
    pub(super) fn line_up_load(
        &mut self,
        operation: OperationId,
        (requests, on): (Vec<Request>, Vec<DeviceId>),
        waiting: WaitingLoad,
        deadline: Tick,
    ) -> bool {
        let id = requests[0].id;
        if !self.queue.push(Queued { requests, on, deadline }) {
            self.ledger.give_up_claim(id);
            return false;
        }
        self.waiting.insert(id, OnReady::WaitingLoad(operation));
        self.waiting_loads.insert(operation, WaitingLoad { id, ..waiting });
        true
    }

    /// The load of a model that waits for room.
    pub(super) fn waiting_load(&self, name: &ModelName) -> Option<(OperationId, &WaitingLoad)> {
        let mut all = self.waiting_loads.iter();
        all.find(|(_, waiting)| waiting.load.model == *name).map(|(id, waiting)| (*id, waiting))
    }

    /// Another load of what one waits for: it waits as long as either, and evicts if one of them may.
    pub(super) fn wait_with(&mut self, operation: OperationId, shortage: super::OnShortage) {
        let Some(waiting) = self.waiting_loads.get_mut(&operation) else { return };
        let id = waiting.id;
        waiting.load.shortage.evict |= shortage.evict;
        let seconds = shortage.wait_seconds.unwrap_or(RETURN_SECONDS);
        self.queue.extend(id, self.now.tick.after_seconds(seconds));
        self.make_room_for_waiting();
    }

    /// There is room for a load.
    pub(super) fn load_admitted(&mut self, operation: OperationId, grants: Vec<(AllocationId, Grant)>) {
        let Some(waiting) = self.waiting_loads.remove(&operation) else { return };
        self.start_load(operation, waiting, grants);
    }

    /// A load waits no more.
    pub(super) fn end_waiting_load(&mut self, operation: OperationId, mut error: ApiError) {
        let Some(waiting) = self.waiting_loads.remove(&operation) else { return };
        if !waiting.evicted.is_empty() {
            error = error.detail("evicted", serde_json::json!(waiting.evicted));
        }
        self.waiting.remove(&waiting.id);
        self.queue.retain(|id| id != waiting.id);
        self.ledger.give_up_claim(waiting.id);
        for part in waiting.shared.into_values() {
            self.give_up_share(part.allocation, part.lease);
        }
        self.end_operation(operation, Err(error));
    }

    pub(super) fn stop_waiting_loads(&mut self) {
        for operation in self.waiting_loads.keys().copied().collect::<Vec<_>>() {
            let error = ApiError::new(ErrorCode::Unavailable, "the daemon is stopping");
            self.end_waiting_load(operation, error);
        }
    }

    /// No room came up in time.
    pub(super) fn load_expired(&mut self, operation: OperationId, queued: &Queued) {
        let whole = queued.requests.iter().fold(0_u64, |sum, one| sum.saturating_add(one.size_bytes));
        let request = Request { size_bytes: whole, ..queued.requests[0].clone() };
        let could_fit = self.ledger.could_fit_all(&queued.requests, &queued.on);
        let model = self.waiting_loads.get(&operation).map(|waiting| &waiting.load.model);
        let shortage = self.with_evictable(self.ledger.refusal(&request, &queued.on), &request, model);
        let shortage = Shortage { could_fit, ..shortage };
        let error = timed_out(refusal(&shortage));
        self.end_waiting_load(operation, error);
    }

    /// Remembers how long a load took.
    pub(super) fn note_load(&mut self, device: &DeviceId, bytes: u64, seconds: f64) {
        // Small ones say more of the disk's first answer than of its speed.
        if bytes >= 1 << 20 && seconds > 0.0 {
            let rate = bytes as f64 / seconds;
            self.load_rates
                .entry(device.clone())
                .and_modify(|old| *old += (rate - *old) / 4.0)
                .or_insert(rate);
        }
    }
}

pub(super) fn files(prepared: &BTreeMap<ComponentName, Prepared>) -> usize {
    prepared.values().map(|prepared| prepared.files.len()).sum()
}
