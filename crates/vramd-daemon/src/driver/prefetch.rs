//! Prefetches: models that are used soon come to RAM before, because somebody says so or because they usually follow.
//!
//! A prefetch is a load into RAM's cache. Nothing that is worth more goes for it, it is no use of the model, and it begins only while
//! nothing else is loaded.

use vramd_api::{ApiError, DeviceId, ErrorCode, ModelName, OperationKind};
use vramd_core::ledger::Request;
use vramd_core::models::{Model, Residency};

use super::operations::Running;
use super::{Load, LoadAnswer, OnShortage, State};
use crate::devices::Devices;

/// Who says that it is used soon expects it within so many seconds.
const SOON_SECONDS: f64 = 60.0;

impl State {
    /// A model is used: what usually follows is prefetched.
    pub(super) fn note_use(&mut self, name: &ModelName) {
        let Some(next) = self.succession.used(name) else { return };
        let Some(model) = self.models.get(&next) else { return };
        let Some(device) = self.usual_device(model) else { return };
        if self.is_only_on_disk(model)
            && let Ok(load) = Load::prefetch(next, device, &self.devices)
        {
            // Nobody waits for it: one that finds no listener is none.
            let _ = self.unasked.send(load);
        }
    }

    /// Where a model was loaded last, or could be.
    fn usual_device(&self, model: &Model) -> Option<DeviceId> {
        let loaded = model.components.values().flat_map(|entry| entry.load_seconds.keys());
        loaded.filter(|device| !self.ledger.is_lost(device)).max().cloned()
    }

    fn is_only_on_disk(&self, model: &Model) -> bool {
        !self.is_on_its_way(model) && model.components.values().all(|entry| entry.residency.is_empty())
    }

    /// Looks at a prefetch before it is a load: an answer if there is nothing to do.
    pub(super) fn check_prefetch(&mut self, load: &Load) -> Result<Option<LoadAnswer>, ApiError> {
        let Some(device) = load.cache_for.clone() else { return Ok(None) };
        let model = self.changeable(&load.model)?;
        let (priority, name) = (model.priority, model.name.clone());
        let ram = self.ram().filter(|ram| *ram != device && self.tiers.ram_bytes > 0);
        let Some(ram) = ram else {
            return Err(ApiError::invalid("deviceId", format!("host memory keeps nothing for {device}"))
                .hint("prefetch for a card, with a RAM tier (`--ram-tier`); else load it"));
        };
        let resident = |entry: &vramd_core::models::Component| {
            let there = |on: &DeviceId| matches!(entry.residency.get(on), Some(Residency::Resident { .. }));
            there(&device) || there(&ram)
        };
        if model.components.values().all(resident) {
            let subject = format!("{name} on {ram}");
            let id = self.operations.begin(OperationKind::Load, subject, 0, self.now);
            let data = serde_json::json!({ "model": name, "deviceId": ram, "loaded": false });
            self.end_operation(id, Ok(data));
            return Ok(Some(LoadAnswer::Operation(Box::new(self.operations.show(id)?))));
        }
        let loads = self.operations.running.values().any(|running| matches!(running, Running::Load(_)));
        if loads || !self.queue.is_empty() {
            let error = ApiError::new(ErrorCode::Conflict, "other models are being loaded");
            return Err(error.hint("a prefetch waits for nothing and holds up nothing: try again later"));
        }
        let blocks: Vec<u64> = model
            .components
            .values()
            .filter(|entry| !resident(entry))
            .filter_map(|entry| Some(entry.plan.as_ref().ok()?.layout.block_bytes))
            .collect();
        let requests: Vec<Request> =
            blocks.iter().map(|bytes| Self::weights(load, None, *bytes, priority)).collect();
        let Some(missing) = self.missing_in_ram(&requests, &ram).filter(|_| !requests.is_empty()) else {
            return Err(no_room(&name));
        };
        if missing == 0 {
            return Ok(None);
        }
        let bytes = blocks.iter().sum::<u64>() as f64;
        let rate = self.load_rates.get(&device).copied().unwrap_or(super::room::BYTES_PER_SECOND);
        let worth = bytes / rate / SOON_SECONDS;
        match self.shrink_cache(&ram, missing, worth, name.as_str()).and_then(|goes| goes.first().copied()) {
            Some(unload) => Ok(Some(LoadAnswer::After(unload))),
            None => Err(no_room(&name)),
        }
    }
}

fn no_room(name: &ModelName) -> ApiError {
    let what = format!("host memory has no room for {name} beside what is worth more");
    ApiError::new(ErrorCode::InsufficientMemory, what)
        .hint("a larger `--ram-tier` keeps more; a load makes room on the device itself")
}

impl Load {
    /// One into RAM, for its next use on a device.
    pub fn prefetch(model: ModelName, device: DeviceId, devices: &Devices) -> Result<Self, ApiError> {
        let ram = devices.iter().map(|it| it.facts()).find(|facts| super::tiers::is_ram(facts));
        let ram =
            ram.ok_or_else(|| ApiError::invalid("deviceId", "there is no host memory to keep it in"))?;
        Ok(Self {
            model,
            device: Some(ram.device.clone()),
            components: None,
            keep_alive: None,
            shortage: OnShortage { evict: false, spill: false, wait_seconds: None },
            split: false,
            checksum: false,
            unasked: true,
            cache_for: Some(device),
        })
    }
}
