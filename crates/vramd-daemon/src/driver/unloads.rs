//! Unloading: because somebody says so, to make room, or because nobody has used a model for long enough.

use std::collections::BTreeSet;

use vramd_api::{
    AllocationId, ApiError, ComponentName, DeviceId, ErrorCode, Holder, LeaseId, ModelName, Operation,
    OperationId, OperationKind,
};
use vramd_core::ledger::{Release, State as AllocationState};
use vramd_core::models::{Busy, Model, Residency};

use super::allocations::OnReleased;
use super::models::{no_model, not_resident, refuse};
use super::operations::{Running, Unloading};
use super::refusals::attached;
use super::tiers::Demotion;
use super::{Reply, State};

impl State {
    pub(super) fn unload(&mut self, name: &ModelName, device: Option<&DeviceId>, reply: Reply<Operation>) {
        let answer = self.try_unload(name, device);
        self.answer(reply, answer);
    }

    fn try_unload(&mut self, name: &ModelName, device: Option<&DeviceId>) -> Result<Operation, ApiError> {
        let model = self.changeable(name)?;
        let holders = self.holders_by(model, device, None);
        if !holders.is_empty() {
            return Err(attached(&format!("model {name}"), &holders));
        }
        let waiting = self.waiting_load(name).map(|(operation, _)| operation);
        let splitting = self.splitting(name).map(|(operation, _)| operation);
        if let Some(operation) = model.operation(device).or(waiting).or(splitting) {
            return Err(refuse(name, Busy::Operation(operation)));
        }
        let devices: Vec<DeviceId> =
            model.resident_on().into_iter().filter(|on| device.is_none_or(|device| device == on)).collect();
        if devices.is_empty() {
            let place = device.map_or_else(|| "any device".to_owned(), ToString::to_string);
            return Err(not_resident(name, &place)
                .hint("there is nothing to unload: `vramd models` shows where it is"));
        }
        if model.pinned {
            return Err(ApiError::new(ErrorCode::Conflict, format!("model {name} is pinned"))
                .hint(format!("unpin it first: `vramd unpin {name}`")));
        }
        self.begin_unload(name, devices, None, false)
    }

    /// Who has a model attached, or one component of it: by that name, where its bytes are another model's too.
    pub(super) fn holders_by(
        &self,
        model: &Model,
        device: Option<&DeviceId>,
        component: Option<&ComponentName>,
    ) -> Vec<Holder> {
        let shared = |id: AllocationId| self.ledger.allocation(id).is_some_and(|it| it.model_count() > 1);
        let by_name = |lease: &LeaseId| {
            let reader = self.attachments.get(lease);
            reader.is_none_or(|reader| reader.model.as_ref() == Some(&model.name))
        };
        let meant = model.components.iter().filter(|(name, _)| component.is_none_or(|one| one == *name));
        let all = meant.flat_map(|(_, entry)| &entry.residency);
        let here = all.filter(|(on, _)| device.is_none_or(|device| device == *on));
        here.filter_map(|(_, residency)| self.ledger.allocation(residency.allocation()))
            .flat_map(|held| held.leases.iter().map(move |(id, lease)| (held.request.id, id, lease)))
            .filter(|(allocation, lease, _)| !shared(*allocation) || by_name(lease))
            .filter_map(|(_, _, lease)| lease.holder().cloned())
            .collect()
    }

    /// Unloads a model, or some components of it, from devices where nobody has them attached. `keep`: in RAM, where that pays.
    pub(super) fn begin_unload(
        &mut self,
        name: &ModelName,
        devices: Vec<DeviceId>,
        components: Option<&BTreeSet<ComponentName>>,
        keep: bool,
    ) -> Result<Operation, ApiError> {
        let places: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
        let subject = format!("{name} on {}", places.join(", "));
        let parts: Vec<(ComponentName, DeviceId, AllocationId)> = self
            .models
            .get(name)
            .ok_or_else(|| no_model(name))?
            .components
            .iter()
            .filter(|(component, _)| components.is_none_or(|wanted| wanted.contains(*component)))
            .flat_map(|(component, entry)| {
                entry.residency.iter().map(move |residency| (component, residency))
            })
            .filter(|(_, (device, residency))| {
                devices.contains(device) && matches!(residency, Residency::Resident { .. })
            })
            .map(|(component, (device, residency))| {
                (component.clone(), device.clone(), residency.allocation())
            })
            .collect();
        let bytes = parts
            .iter()
            .filter_map(|(_, _, allocation)| self.ledger.allocation(*allocation))
            .filter(|allocation| allocation.state == AllocationState::Active && allocation.model_count() < 2)
            .map(|allocation| allocation.block_bytes)
            .sum();
        let operation = self.operations.begin(OperationKind::Unload, subject, bytes, self.now);
        let unloading = Unloading {
            model: name.clone(),
            devices,
            parts: parts.iter().map(|(component, device, _)| (component.clone(), device.clone())).collect(),
            releasing: parts.len(),
            bytes,
            held_by: BTreeSet::new(),
            cached: BTreeSet::new(),
        };
        self.operations.running.insert(operation, Running::Unload(unloading));
        for (component, device, allocation) in parts {
            let model = self.models.get_mut(name);
            let Some(entry) = model.and_then(|model| model.components.get_mut(&component)) else { continue };
            // What another model has too stays for that one.
            let held = self.ledger.allocation(allocation).filter(|held| held.model_count() > 1);
            if let Some(lease) = held.and_then(|held| held.model_leases().next()) {
                entry.residency.remove(&device);
                self.finish_lease(lease);
                if let Some(Running::Unload(unloading)) = self.operations.running.get_mut(&operation) {
                    unloading.releasing -= 1;
                }
                continue;
            }
            let before =
                entry.residency.insert(device.clone(), Residency::Evicting { allocation, operation });
            let demotion = match before {
                Some(Residency::Resident { plan, .. }) if keep => {
                    Some(Demotion::new(operation, name, component, device, (allocation, plan), self.now))
                }
                _ => None,
            };
            match demotion.filter(|demotion| self.pays(demotion)) {
                Some(demotion) => self.demote(demotion),
                None => self.release_part_of(operation, allocation),
            }
        }
        self.end_if_given_back(operation);
        self.operations.show(operation)
    }

    /// Gives the bytes of a component that nobody has attached back.
    pub(super) fn release_part_of(&mut self, operation: OperationId, allocation: AllocationId) {
        let work = self.ledger.release(allocation, self.now).expect("nobody is attached, as was checked");
        self.releasing.insert(allocation, OnReleased::Operation(operation));
        match work {
            Release::Work(work) => self.perform(work),
            // What an operation still reads goes when that has ended.
            Release::Later => self.cancel_copies_of(allocation),
            Release::NotActive if self.ledger.allocation(allocation).is_none() => {
                self.releasing.remove(&allocation);
                self.part_released(operation, allocation, &[]);
            }
            Release::NotActive => {}
        }
    }

    /// Ends a model's share of a block, by whichever lease is left of it: they are all alike.
    pub(super) fn give_up_share(&mut self, allocation: AllocationId, lease: LeaseId) {
        let held = self.ledger.allocation(allocation);
        let has = held.is_some_and(|held| held.leases.contains_key(&lease));
        let other = held.and_then(|held| held.model_leases().next());
        if let Some(lease) = if has { Some(lease) } else { other } {
            self.finish_lease(lease);
        }
    }

    /// Unloads what was kept alive long enough.
    pub(super) fn expire_models(&mut self) {
        for (name, devices) in self.models.expired(self.now.tick, self.ledger.allocations()) {
            let loading = self.models.get(&name).is_some_and(|model| self.is_on_its_way(model));
            if loading || self.changing.contains(&name) {
                continue;
            }
            if let Err(error) = self.begin_unload(&name, devices.into_iter().collect(), None, false) {
                tracing::warn!(model = %name, %error, "an idle model could not be unloaded");
            }
        }
    }
}
