//! Tiers: what has to go from a card is kept in RAM where that pays, comes back from there, and what is of the same files is held once.
//!
//! RAM is a cache here, of what nobody asked for in RAM: it is bounded, goes when something dearer comes or other programs need
//! the memory, and is nothing that a load or an attachment without a device finds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;
use vramd_api::{
    AllocationId, ComponentName, DeviceId, EventKind, EvictedComponent as Evicted, EvictionPolicy, KeepAlive,
    LeaseId, MemoryType, ModelName, OperationId, Priority,
};
use vramd_core::eviction::{self, Candidate};
use vramd_core::ledger::{Lease, Readiness, Request, Task};
use vramd_core::models::{Component, Plan, Residency};
use vramd_core::tiers::Prospect;
use vramd_core::{Now, Tick};
use vramd_device::SegmentId;

use super::copies::{NewCopy, Purpose};
use super::operations::Running;
use super::room::{BYTES_PER_SECOND, Idle};
use super::{Load, OnShortage, OnStored, State};
use crate::loader::From;
use crate::mover::Opened;
use crate::source::Prepared;
use crate::store::Change;

/// What copies between two devices are taken to reach before one was measured.
const COPY_BYTES_PER_SECOND: f64 = 4e9;
/// How long something waits for its place in RAM, while others wait for its place on the device.
const PLACE_SECONDS: u64 = 5;
/// What takes longer to bring to RAM goes at once: others wait for its place.
const LEAVE_SECONDS: f64 = 10.0;
/// After so long a copy to RAM is given up.
const COPY_SECONDS: u64 = 15;
/// What comes back by itself leaves this share of its device free: other programs want some too.
const LEFT_FREE: f64 = 0.15;
/// After something came back, or was to, nothing else does for so long; longer if it had to go again.
const PROMOTE_SECONDS: u64 = 5;
pub(super) const PROMOTE_LATER_SECONDS: u64 = 60;
/// How long nothing was loaded or unloaded before what was evicted comes back by itself.
const QUIET_SECONDS: u64 = 2;

/// What RAM holds of models that nobody asked for there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tiers {
    /// The most of it.
    pub ram_bytes: u64,
    /// It goes when other programs are left less than this.
    pub reserve_bytes: u64,
}

/// A component on its way to RAM.
#[derive(Debug, Clone)]
pub(super) struct Demotion {
    operation: OperationId,
    model: ModelName,
    component: ComponentName,
    from: DeviceId,
    allocation: AllocationId,
    plan: Arc<Plan>,
    until: Tick,
    /// When its copy began.
    begun: Option<Tick>,
}

impl Demotion {
    pub(super) fn new(
        operation: OperationId,
        model: &ModelName,
        component: ComponentName,
        from: DeviceId,
        (allocation, plan): (AllocationId, Arc<Plan>),
        now: Now,
    ) -> Self {
        let until = now.tick.after_seconds(PLACE_SECONDS);
        Self { operation, model: model.clone(), component, from, allocation, plan, until, begun: None }
    }
}

/// A component whose block is another's too.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub allocation: AllocationId,
    pub plan: Arc<Plan>,
    /// The model's own.
    pub lease: LeaseId,
}

/// The block that a component is copied from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub device: DeviceId,
    allocation: AllocationId,
    /// The operation's.
    pub lease: LeaseId,
}

/// What becomes of a component that would be kept in RAM.
enum Place {
    Found(Request),
    /// It is on its way back.
    Coming,
    No,
}

impl State {
    /// Components that are resident with the same bytes.
    fn with_bytes_of<'a>(
        &'a self,
        plan: &'a Plan,
    ) -> impl Iterator<Item = (&'a DeviceId, AllocationId, bool)> {
        let entries = self.models.iter().flat_map(|model| model.components.values());
        let places = entries.flat_map(|entry| &entry.residency);
        places.filter_map(|(device, residency)| match residency {
            Residency::Resident { allocation, plan: there, cached_from, .. }
                if there.is_same(plan) && !self.ledger.is_lost(device) =>
            {
                Some((device, *allocation, cached_from.is_some()))
            }
            _ => None,
        })
    }

    /// Whether a device has a component's bytes, for whatever model.
    pub(super) fn has_bytes(&self, plan: &Plan, device: &DeviceId) -> bool {
        self.with_bytes_of(plan).any(|(on, ..)| on == device)
    }

    /// A device that has all of what would be loaded, for other models, and is among the nearest.
    pub(super) fn has_all(
        &self,
        load: &Load,
        prepared: &BTreeMap<ComponentName, Prepared>,
    ) -> Option<DeviceId> {
        let requests: Vec<Request> = prepared
            .iter()
            .map(|(name, one)| Self::weights(load, Some(name), one.plan.layout.block_bytes, Priority::Normal))
            .collect();
        let nearest = self.ledger.nearest(&requests);
        let having = |one: &Prepared| -> BTreeSet<DeviceId> {
            let there = self.with_bytes_of(&one.plan).filter(|(_, _, cached)| !cached);
            there.map(|(device, ..)| device.clone()).collect()
        };
        let all = prepared.values().map(having).reduce(|all, more| &all & &more)?;
        all.into_iter().find(|device| nearest.contains(device))
    }

    /// Takes out of `prepared` what a device has for other components; it is this model's too from now on.
    pub(super) fn share(
        &mut self,
        device: &DeviceId,
        prepared: &mut BTreeMap<ComponentName, Prepared>,
    ) -> BTreeMap<ComponentName, Shared> {
        let mut found = BTreeMap::new();
        for (component, one) in &*prepared {
            let quiet = |id: AllocationId| {
                let held = self.ledger.allocation(id);
                held.is_some_and(|held| held.is_open() && held.tasks().all(|task| task == Task::Read))
            };
            let there = self.with_bytes_of(&one.plan).find(|(on, id, _)| *on == device && quiet(*id));
            let Some((_, allocation, _)) = there else { continue };
            let lease = LeaseId(Uuid::now_v7());
            if self.ledger.grant(allocation, lease, Lease::Model, self.now) {
                found.insert(component.clone(), Shared { allocation, plan: one.plan.clone(), lease });
            }
        }
        prepared.retain(|component, _| !found.contains_key(component));
        found
    }

    /// From where a component for `device` can be copied rather than read: from host memory best. What is found stays until the
    /// lease ends.
    pub(super) fn origin(&mut self, plan: &Plan, device: &DeviceId) -> Option<Origin> {
        let still = |id: AllocationId| {
            let held = self.ledger.allocation(id);
            held.is_some_and(|held| held.is_open() && held.tasks().all(|task| task == Task::Read))
        };
        let in_ram = |on: &DeviceId| {
            self.devices.get(on).is_some_and(|device| device.facts().capabilities.host_access)
        };
        let elsewhere = self.with_bytes_of(plan).filter(|(on, id, _)| *on != device && still(*id));
        let (on, allocation, _) = elsewhere.max_by_key(|(on, ..)| in_ram(on))?;
        let origin = Origin { device: on.clone(), allocation, lease: LeaseId(Uuid::now_v7()) };
        let reads = Lease::Operation { task: Task::Read };
        self.ledger.grant(allocation, origin.lease, reads, self.now).then_some(origin)
    }

    /// The block of an origin.
    pub(super) fn block(&self, origin: &Origin, files: Prepared) -> From {
        let block = self.ledger.allocation(origin.allocation).expect("the operation's lease keeps it");
        let device = self.devices.get(&origin.device).expect("what has blocks has opened").clone();
        From::Block {
            device: Arc::new(Opened(device)),
            segment: SegmentId(block.segment.0),
            offset: block.offset,
            files,
        }
    }

    /// Somebody wants a model where it is: it is no cache there any more.
    pub(super) fn asked_for(&mut self, name: &ModelName, device: &DeviceId) {
        let Some(model) = self.models.get_mut(name) else { return };
        let mut changes = Vec::new();
        for (component, entry) in &mut model.components {
            if let Some(Residency::Resident { cached_from, .. }) = entry.residency.get_mut(device)
                && cached_from.take().is_some()
            {
                changes.push(Change::PutResident(name.clone(), component.clone(), device.clone()));
            }
        }
        if !changes.is_empty() {
            self.store_all(changes, OnStored::Nothing);
        }
    }

    /// Remembers how long a copy took.
    pub(super) fn note_copy(&mut self, from: &DeviceId, to: &DeviceId, bytes: u64, seconds: f64) {
        if bytes >= 1 << 20 && seconds > 0.0 {
            let rate = bytes as f64 / seconds;
            let known = self.copy_rates.entry((from.clone(), to.clone()));
            known.and_modify(|old| *old += (rate - *old) / 4.0).or_insert(rate);
        }
    }

    fn copy_seconds(&self, from: &DeviceId, to: &DeviceId, bytes: u64) -> f64 {
        let rate = self.copy_rates.get(&(from.clone(), to.clone())).copied();
        bytes as f64 / rate.unwrap_or(COPY_BYTES_PER_SECOND)
    }

    fn read_seconds(&self, entry: &Component, device: &DeviceId, bytes: u64) -> f64 {
        let rate = || self.load_rates.get(device).copied().unwrap_or(BYTES_PER_SECOND);
        entry.load_seconds.get(device).copied().unwrap_or_else(|| bytes as f64 / rate())
    }

    /// What it takes to bring a component to a device again: from where else it is, or from its files.
    pub(super) fn seconds_to_get_back(&self, entry: &Component, device: &DeviceId, bytes: u64) -> f64 {
        let elsewhere = entry.residency.iter().filter(|(on, residency)| {
            *on != device && matches!(residency, Residency::Resident { .. }) && !self.ledger.is_lost(on)
        });
        let copied = elsewhere.map(|(on, _)| self.copy_seconds(on, device, bytes));
        // What waits in RAM is missed where it is used.
        let used_on = entry.residency.get(device).and_then(Residency::cached_from).unwrap_or(device);
        copied.reduce(f64::min).unwrap_or_else(|| self.read_seconds(entry, used_on, bytes))
    }

    /// The device of host memory.
    pub(super) fn ram(&self) -> Option<DeviceId> {
        let ram = self.devices.iter().find(|device| is_ram(device.facts()))?;
        Some(ram.facts().device.clone()).filter(|device| !self.ledger.is_lost(device))
    }

    /// Whether what goes from a device is to be kept in RAM, if there is room.
    pub(super) fn pays(&self, demotion: &Demotion) -> bool {
        let Demotion { model, component, from, allocation, .. } = demotion;
        let is_card = self.devices.get(from).is_some_and(|it| it.facts().memory_type == MemoryType::Vram);
        let Some(ram) = self.ram().filter(|_| is_card && !self.stopping && !self.ledger.is_lost(from)) else {
            return false;
        };
        let Some(model) = self.models.get(model) else { return false };
        let Some(entry) = model.components.get(component) else { return false };
        let Some(held) = self.ledger.allocation(*allocation) else { return false };
        let (bytes, now) = (held.block_bytes, self.now.tick);
        let idle = model.last_used.map_or(0, |used| now.0.saturating_sub(used.tick.0)) as f64 / 1000.0;
        let prospect = Prospect {
            uses_per_second: model.popularity.uses_per_second(now),
            kept_seconds: match model.keep_alive {
                KeepAlive::Seconds(seconds) => (seconds as f64 - idle).max(0.0),
                KeepAlive::Forever => f64::INFINITY,
            },
            read_seconds: self.read_seconds(entry, from, bytes),
            return_seconds: self.copy_seconds(&ram, from, bytes),
            leave_seconds: self.copy_seconds(from, &ram, bytes),
        };
        bytes <= self.tiers.ram_bytes
            && prospect.leave_seconds <= LEAVE_SECONDS
            && !self.has_bytes(&demotion.plan, &ram)
            && prospect.pays()
    }

    /// Keeps a component in RAM, now or once there is room; then its bytes go from where it was.
    pub(super) fn demote(&mut self, demotion: Demotion) {
        // Those who wait for its place need have nothing else go.
        self.ledger.count_as_leaving(demotion.allocation);
        self.demotions.push(demotion);
        self.begin_demotions();
    }

    /// Begins those that have room now, and gives up those that waited too long.
    pub(super) fn begin_demotions(&mut self) {
        for mut demotion in std::mem::take(&mut self.demotions) {
            if let Some(begun) = demotion.begun {
                if begun.after_seconds(COPY_SECONDS) <= self.now.tick {
                    self.cancel_copy_from(demotion.allocation);
                }
                self.demotions.push(demotion);
                continue;
            }
            let place = match self.ram() {
                Some(ram) if self.now.tick < demotion.until && !self.stopping => {
                    (self.place_in_ram(&demotion, &ram), Some(ram))
                }
                _ => (Place::No, None),
            };
            match place {
                (Place::Found(request), Some(ram)) => {
                    match self.ledger.reserve(request.clone(), std::slice::from_ref(&ram), self.now) {
                        Ok(grant) => {
                            demotion.begun = Some(self.now.tick);
                            self.demotions.push(demotion.clone());
                            self.copy_to_ram(&demotion, &ram, &request, grant.readiness);
                        }
                        Err(_) => self.demotions.push(demotion),
                    }
                }
                (Place::Coming, _) => self.demotions.push(demotion),
                _ => self.release_part_of(demotion.operation, demotion.allocation),
            }
        }
    }

    fn copy_to_ram(&mut self, demotion: &Demotion, ram: &DeviceId, request: &Request, readiness: Readiness) {
        let Demotion { operation, model, component, allocation, plan, .. } = demotion;
        let (operation, target) = (*operation, request.id);
        let model = self.models.get_mut(model);
        if let Some(entry) = model.and_then(|model| model.components.get_mut(component)) {
            let loading = Residency::Loading { allocation: target, operation, plan: plan.clone() };
            entry.residency.insert(ram.clone(), loading);
        }
        self.join_turns(operation, Priority::High, None);
        self.begin_copy(NewCopy {
            operation,
            source: *allocation,
            target,
            purpose: Purpose::Component { moves: true },
            offsets: (0, 0),
            bytes: request.size_bytes,
            checksum: false,
        });
        self.proceed(target, readiness);
    }

    /// Looks for room in RAM; has what is worth less go for it.
    fn place_in_ram(&mut self, demotion: &Demotion, ram: &DeviceId) -> Place {
        let Some(source) = self.ledger.allocation(demotion.allocation) else { return Place::No };
        let Some(model) = self.models.get(&demotion.model) else { return Place::No };
        let Some(entry) = model.components.get(&demotion.component) else { return Place::No };
        // It may have been loaded there meanwhile, and those who wait for RAM are before it.
        let waited_for = self.queue.iter().any(|it| it.on.is_empty() || it.on.contains(ram));
        if waited_for || entry.residency.contains_key(ram) {
            return Place::No;
        }
        let id = AllocationId(Uuid::now_v7());
        let request = Request { id, generation: 1, memory_type: None, ..source.request.clone() };
        let Some(missing) = self.missing_in_ram(std::slice::from_ref(&request), ram) else {
            return Place::No;
        };
        if missing == 0 {
            return Place::Found(request);
        }
        let own = Candidate {
            bytes: source.block_bytes,
            priority: model.priority,
            idle_seconds: 0.0,
            uses_per_second: model.popularity.uses_per_second(self.now.tick),
            reload_seconds: self.read_seconds(entry, &demotion.from, source.block_bytes),
        };
        let whose = demotion.model.to_string();
        match self.shrink_cache(ram, missing, own.loss(), &whose) {
            Some(_) => Place::Coming,
            None => Place::No,
        }
    }

    /// How many bytes too few RAM has as a cache for `requests`; None if it could never have as many.
    pub(super) fn missing_in_ram(&self, requests: &[Request], ram: &DeviceId) -> Option<u64> {
        let (needed, lacks) = self.ledger.held_for(requests, ram).zip(self.ledger.lacks(requests, ram))?;
        let over = (self.cached_bytes(ram) + needed).saturating_sub(self.tiers.ram_bytes);
        let kept_back = self.tiers.reserve_bytes.saturating_add(needed);
        let short = kept_back.saturating_sub(self.ledger.free_bytes(ram));
        (needed <= self.tiers.ram_bytes).then(|| over.max(lacks).max(short))
    }

    /// What RAM keeps of models that nobody asked for there, and what is on its way to it.
    pub(super) fn cached_bytes(&self, ram: &DeviceId) -> u64 {
        let here = self.models.iter().flat_map(|model| model.components.values());
        let here = here.filter_map(|entry| entry.residency.get(ram));
        let cached: BTreeSet<AllocationId> = here
            .filter(|residency| match residency {
                Residency::Resident { cached_from, .. } => cached_from.is_some(),
                Residency::Loading { operation, .. } => match self.operations.running.get(operation) {
                    Some(Running::Unload(_)) => true,
                    Some(Running::Load(loading)) => loading.cache_for.is_some(),
                    _ => false,
                },
                Residency::Evicting { .. } => false,
            })
            .map(Residency::allocation)
            .collect();
        cached.iter().filter_map(|id| self.ledger.allocation(*id)).map(|held| held.block_bytes).sum()
    }

    /// Has `bytes` of what RAM keeps go, the least worth first, if that is worth less than `most`; answers how it goes.
    pub(super) fn shrink_cache(
        &mut self,
        ram: &DeviceId,
        bytes: u64,
        most: f64,
        whose: &str,
    ) -> Option<Vec<OperationId>> {
        let idle = self.idle_cache(ram);
        let candidates: Vec<Candidate> = idle.iter().map(|idle| idle.candidate).collect();
        let chosen = eviction::choose(&candidates, bytes, EvictionPolicy::LowestCost)?;
        if chosen.iter().map(|at| candidates[*at].loss()).sum::<f64>() >= most {
            return None;
        }
        let goes: Vec<Evicted> = chosen.into_iter().flat_map(|at| idle[at].parts.clone()).collect();
        self.tell_evicted(&goes, EvictionPolicy::LowestCost, whose, "a place in RAM", &[]);
        Some(self.unload_evicted(&goes, false))
    }

    /// A component has come to RAM, or has not: its bytes on the device go.
    pub(super) fn demoted(
        &mut self,
        operation: OperationId,
        arrived: bool,
        (source, target): (AllocationId, AllocationId),
    ) {
        let Some(at) = self.demotions.iter().position(|one| one.allocation == source) else { return };
        let Demotion { model, component, from, plan, begun, .. } = self.demotions.swap_remove(at);
        let ram = self.ledger.allocation(target).map(|target| target.device.clone());
        let entry = self.models.get_mut(&model).and_then(|model| model.components.get_mut(&component));
        if let (Some(entry), Some(ram), true) = (entry, ram, arrived) {
            self.ledger.grant(target, LeaseId(Uuid::now_v7()), Lease::Model, self.now);
            let cached_from = Some(from.clone());
            let (awaited, stays) = (None, Tick::default());
            let resident = Residency::Resident { allocation: target, plan, awaited, stays, cached_from };
            entry.residency.insert(ram.clone(), resident);
            let bytes = self.ledger.allocation(target).map_or(0, |target| target.block_bytes);
            let began = begun.unwrap_or(self.now.tick);
            let seconds = self.now.tick.0.saturating_sub(began.0) as f64 / 1000.0;
            self.note_copy(&from, &ram, bytes, seconds);
            if let Some(Running::Unload(unloading)) = self.operations.running.get_mut(&operation) {
                unloading.cached.insert(component);
            }
        } else if let Some(model) = self.models.get_mut(&model)
            && let Some(entry) = model.components.get_mut(&component)
        {
            entry.residency.retain(|_, residency| residency.allocation() != target);
        }
        self.release_part_of(operation, source);
    }

    /// Keeps RAM within its bounds, and brings what had to go back once there is room.
    pub(super) fn look_after_tiers(&mut self) {
        self.begin_demotions();
        let Some(ram) = self.ram().filter(|_| !self.stopping) else { return };
        let cached = self.cached_bytes(&ram);
        let over = cached.saturating_sub(self.tiers.ram_bytes);
        let short = self.tiers.reserve_bytes.saturating_sub(self.ledger.free_bytes(&ram));
        let goes = over.max(short.min(cached));
        if goes > 0 && self.shrink_cache(&ram, goes, f64::INFINITY, "other programs").is_none() {
            // What is attached stays; the rest may still help.
            let idle: u64 = self.idle_cache(&ram).iter().map(|idle| idle.candidate.bytes).sum();
            if idle > 0 {
                self.shrink_cache(&ram, idle.min(goes), f64::INFINITY, "other programs");
            }
        }
        let busy =
            self.operations.running.values().any(|it| matches!(it, Running::Load(_) | Running::Unload(_)));
        if busy || !self.queue.is_empty() {
            self.models_changed_at = self.now.tick;
        } else if cached > 0
            && self.promote_after <= self.now.tick
            && self.models_changed_at.after_seconds(QUIET_SECONDS) <= self.now.tick
        {
            self.promote(&ram);
        }
    }

    /// What RAM keeps of models that nobody asked for there, and could let go.
    fn idle_cache(&self, ram: &DeviceId) -> Vec<Idle> {
        let is_cached = |part: &Evicted| {
            let entry = self.models.get(&part.model).and_then(|model| model.components.get(&part.component));
            let here = entry.and_then(|entry| entry.residency.get(ram));
            here.is_some_and(|residency| residency.cached_from().is_some())
        };
        let mut all = self.candidates(ram, Priority::Critical, None);
        all.retain(|idle| idle.parts.iter().all(is_cached));
        all
    }

    /// Has the model brought back to its device that is worth most there, if there is room to spare.
    fn promote(&mut self, ram: &DeviceId) {
        let mut best: Option<(f64, Load)> = None;
        for model in self.models.iter().filter(|model| !self.changing.contains(&model.name)) {
            let cached = |device: &DeviceId| -> Vec<(&ComponentName, u64)> {
                let entries = model.components.iter().filter_map(|(name, entry)| {
                    let Some(Residency::Resident { plan, cached_from: Some(from), .. }) =
                        entry.residency.get(ram)
                    else {
                        return None;
                    };
                    let goes = from == device && !entry.residency.contains_key(device);
                    goes.then_some((name, plan.layout.block_bytes))
                });
                entries.collect()
            };
            let from: BTreeSet<&DeviceId> =
                model.components.values().filter_map(|it| it.residency.get(ram)?.cached_from()).collect();
            for device in from {
                let parts = cached(device);
                let mut load = Load::unasked(&model.name, device);
                load.components = Some(parts.iter().map(|(name, _)| (*name).clone()).collect());
                let requests: Vec<Request> = parts
                    .iter()
                    .map(|(name, bytes)| Self::weights(&load, Some(name), *bytes, model.priority))
                    .collect();
                if requests.is_empty()
                    || self.ledger.is_lost(device)
                    || !self.ledger.has_room_to_spare(&requests, device, LEFT_FREE)
                {
                    continue;
                }
                let bytes: u64 = requests.iter().map(|request| request.size_bytes).sum();
                let saved = self.copy_seconds(ram, device, bytes);
                let worth = model.popularity.uses_per_second(self.now.tick) * saved;
                if best.as_ref().is_none_or(|(most, _)| worth > *most) {
                    best = Some((worth, load));
                }
            }
        }
        if let Some((_, load)) = best {
            self.promote_later(PROMOTE_SECONDS);
            // By way of those who open its files: what was written to since is not brought back.
            let _ = self.unasked.send(load);
        }
    }

    /// Nothing comes back by itself for a while.
    pub(super) fn promote_later(&mut self, seconds: u64) {
        self.promote_after = self.promote_after.max(self.now.tick.after_seconds(seconds));
    }

    /// Gives a copy up that is under way.
    fn cancel_copy_from(&self, source: AllocationId) {
        for copy in self.copies.values().filter(|copy| copy.source == source) {
            copy.cancel();
        }
        self.mover.sweep();
    }

    /// Tells who goes, for whom, and who could have gone and stayed.
    pub(super) fn tell_evicted(
        &mut self,
        goes: &[Evicted],
        policy: EvictionPolicy,
        whose: &str,
        purpose: &str,
        stayed: &[Evicted],
    ) {
        for evicted in goes {
            let data = serde_json::json!({
                "evicted": evicted, "policy": policy, "for": whose, "purpose": purpose, "stayed": stayed,
            });
            self.emit(EventKind::ModelEvicted, data);
        }
    }
}

pub(super) fn is_ram(facts: &vramd_device::Facts) -> bool {
    facts.memory_type == MemoryType::Ram && facts.capabilities.host_access
}

impl Load {
    /// Brings back what had to go: no use of the model, and nothing goes for it.
    fn unasked(model: &ModelName, device: &DeviceId) -> Self {
        Self {
            model: model.clone(),
            device: Some(device.clone()),
            components: None,
            keep_alive: None,
            shortage: OnShortage { evict: false, spill: false, wait_seconds: None },
            split: false,
            checksum: false,
            unasked: true,
            cache_for: None,
        }
    }
}
