//! Unloading: because somebody says so, to make room, or because nobody has used a model for long enough.

use std::collections::BTreeSet;

use vramd_api::{
    AllocationId, ApiError, ComponentName, DeviceId, ErrorCode, ModelName, Operation, OperationKind,
};
use vramd_core::ledger::{Release, State as AllocationState};
use vramd_core::models::{Busy, Residency};

use super::allocations::{OnReleased, attached};
use super::models::{no_model, not_resident, refuse};
use super::operations::{Running, Unloading};
use super::{Reply, State};

impl State {
    pub(super) fn unload(&mut self, name: &ModelName, device: Option<&DeviceId>, reply: Reply<Operation>) {
        let answer = self.try_unload(name, device);
        self.answer(reply, answer);
    }

    fn try_unload(&mut self, name: &ModelName, device: Option<&DeviceId>) -> Result<Operation, ApiError> {
        let model = self.changeable(name)?;
        let holders = model.holders(device, self.ledger.allocations());
        if !holders.is_empty() {
            return Err(attached(&format!("model {name}"), &holders));
        }
        let waiting = self.waiting_load(name).map(|(operation, _)| operation);
        if let Some(operation) = model.operation(device).or(waiting) {
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
        self.begin_unload(name, devices, None)
    }

    /// Unloads a model, or some components of it, from devices where nobody has them attached.
    pub(super) fn begin_unload(
        &mut self,
        name: &ModelName,
        devices: Vec<DeviceId>,
        components: Option<&BTreeSet<ComponentName>>,
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
            .filter(|allocation| allocation.state == AllocationState::Active)
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
        };
        self.operations.running.insert(operation, Running::Unload(unloading));
        for (component, device, allocation) in parts {
            if let Some(entry) =
                self.models.get_mut(name).and_then(|model| model.components.get_mut(&component))
            {
                entry.residency.insert(device, Residency::Evicting { allocation, operation });
            }
            let work = self.ledger.release(allocation, self.now).expect("nobody is attached, as was checked");
            self.releasing.insert(allocation, OnReleased::Operation(operation));
            match work {
                Release::Work(work) => self.perform(work),
                // What an operation still reads goes when that has ended.
                Release::Later => self.cancel_copies_of(allocation),
                Release::NotActive => {}
            }
        }
        self.operations.show(operation)
    }

    /// Unloads what was kept alive long enough.
    pub(super) fn expire_models(&mut self) {
        for (name, devices) in self.models.expired(self.now.tick, self.ledger.allocations()) {
            let loading = self.models.get(&name).is_some_and(|model| self.is_on_its_way(model));
            if loading || self.changing.contains(&name) {
                continue;
            }
            if let Err(error) = self.begin_unload(&name, devices.into_iter().collect(), None) {
                tracing::warn!(model = %name, %error, "an idle model could not be unloaded");
            }
        }
    }
}
