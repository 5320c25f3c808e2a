//! Models: registered, pinned, kept alive, removed.

use std::collections::BTreeMap;
use std::sync::Arc;

use vramd_api::{ApiError, ComponentName, DeviceId, ErrorCode, EventKind, KeepAlive, ModelName};
use vramd_core::models::{Busy, MAX_MODELS, Model, Plan};

use super::refusals::attached;
use super::{OnStored, Reply, State};
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
        let waiting = self.waiting_load(&model.name).map(|(operation, _)| operation);
        let splitting = self.splitting(&model.name).map(|(operation, _)| operation);
        match waiting.or(splitting) {
            Some(operation) => Err(Busy::Operation(operation)),
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
            self.succession.forget(name);
            self.forget_footprints(name);
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
        self.note_use(name);
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
