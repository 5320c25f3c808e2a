//! What was known before a restart is known again: limits, models, persistent allocations.
//!
//! Bytes are not kept over a restart. A persistent allocation comes back zeroed and one generation higher; the
//! models that were resident are loaded again by [`crate::serve`], once the daemon answers.

use std::collections::BTreeMap;

use vramd_api::{AllocateRequest, ApiError, ComponentName, ComponentSource, ErrorCode, EventKind};
use vramd_core::eviction::Popularity;
use vramd_core::ledger::Request;
use vramd_core::models::{Component, Model};

use super::allocations::OnReady;
use super::{OnStored, State};
use crate::requests;
use crate::store::{Change, Stored, StoredAllocation, StoredModel};
use crate::workers;

impl State {
    pub(super) fn begin(&mut self, stored: Stored) {
        for facts in self.devices.clone().facts() {
            self.ledger.add_device(facts);
        }
        for (device, limits) in stored.limits {
            self.ledger.set_limits(&device, limits);
        }
        for footprint in stored.footprints {
            self.footprints.insert(footprint);
        }
        for model in stored.models {
            match restored_model(&model) {
                Ok(model) => self.models.insert(model),
                Err(error) => {
                    tracing::error!(model = %model.name, %error, "a registered model cannot be read back");
                }
            }
        }
        for allocation in stored.allocations {
            let id = allocation.id;
            if let Err(error) = self.restore_allocation(allocation) {
                tracing::error!(%id, %error, "a persistent allocation is not back; it will be tried at the next start");
            }
        }
        workers::sweep(&self.home.mark);
        self.emit(EventKind::DaemonStarted, serde_json::json!({ "version": vramd_api::VERSION }));
        self.measure();
    }

    fn restore_allocation(&mut self, stored: StoredAllocation) -> Result<(), ApiError> {
        let unreadable =
            |error: &dyn std::fmt::Display| ApiError::new(ErrorCode::StoreFailed, error.to_string());
        let body: AllocateRequest =
            serde_json::from_str(&stored.request).map_err(|error| unreadable(&error))?;
        let generation = stored.generation + 1;
        let owner = body.owner.clone().ok_or_else(|| unreadable(&"it has no owner"))?;
        // Known as missing until it is back.
        self.unrestored.insert(stored.id, (stored.device.clone(), owner.clone()));
        // It may have moved to another type of memory than it was once asked for.
        let memory_type = None;
        let request =
            Request { generation, memory_type, ..requests::request(stored.id, &body, owner.clone()) };
        if self.devices.get(&stored.device).is_none() {
            return Err(ApiError::not_found("device", &stored.device));
        }
        let grant = self
            .ledger
            .reserve(request, std::slice::from_ref(&stored.device), self.now)
            .map_err(|shortage| super::refusals::refusal(&shortage))?;
        let id = stored.id;
        self.store(Change::PutAllocation(StoredAllocation { generation, ..stored }), OnStored::Nothing);
        self.unrestored.remove(&id);
        self.waiting.insert(id, OnReady::Restore(owner));
        self.granted(id, grant);
        Ok(())
    }
}

/// A model as it was registered; its files are looked at when it is loaded.
fn restored_model(stored: &StoredModel) -> Result<Model, serde_json::Error> {
    let sources: BTreeMap<ComponentName, ComponentSource> = serde_json::from_str(&stored.components)?;
    let unread = || {
        ApiError::new(ErrorCode::NotResident, "its files were not read since the daemon started")
            .hint(format!("load it: `vramd load {}`", stored.name))
    };
    let components = sources
        .into_iter()
        .map(|(name, source)| {
            let component = Component {
                path: source.path,
                plan: Err(Box::new(unread())),
                residency: BTreeMap::new(),
                load_seconds: BTreeMap::new(),
                checksum: None,
            };
            (name, component)
        })
        .collect();
    Ok(Model {
        name: stored.name.clone(),
        components,
        pinned: stored.pinned,
        priority: stored.priority,
        popularity: Popularity::default(),
        keep_alive: stored.keep_alive,
        registered_at: stored.registered_at,
        last_used: None,
    })
}
