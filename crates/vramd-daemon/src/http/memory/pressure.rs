//! `/api/memory/pressure` and `/api/memory/model`.

use std::collections::BTreeMap;

use axum::extract::State;
use jiff::Timestamp;
use vramd_api::{
    ApiError, DeviceId, DevicePressure, LoadedModel, ModelMemory, ModelStatus, ModelsOptimized,
    OptimizeModels, PressurePage, Success, WorkerMemoryStatus, WorkerModelState, WorkerShare, WorkerState,
};
use vramd_core::models::Residency;

use crate::clock;
use crate::driver::{Caller, Event, Snapshot};
use crate::http::App;
use crate::http::extract::{NoParams, OptionalBody, Params, Path};
use crate::http::reply::{Answer, Errors, ok};

const MAX_MILLISECONDS: u64 = 600_000;
const MAX_EXCLUDED: usize = 1024;
const MAX_MODELS: u32 = 100_000;

/// How tight memory is on all devices
#[utoipa::path(get, path = "/api/memory/pressure", tag = "memory",
    responses((status = 200, body = Success<PressurePage>), Errors))]
pub async fn all(State(app): State<App>, _: Params<NoParams>) -> Answer<PressurePage> {
    ok(PressurePage { devices: app.driver.ask(|reply| Event::Pressure(None, reply)).await? })
}

/// How tight memory is on one device
///
/// The ratio is what is neither free nor may go at once, over all: a card full of idle models is under no pressure. Levels begin at
/// the configured ratios (0.70, 0.85 and 0.95) and end 0.03 below. `High` is also where others take the last twentieth (4 GiB at most), where
/// nothing would be left within a second, and, for host memory from `Moderate` on, where the system says that tasks wait for it (`Critical` if all do).
/// From `High` on the daemon frees `neededBytes` by itself.
#[utoipa::path(get, path = "/api/memory/pressure/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    responses((status = 200, body = Success<DevicePressure>), Errors))]
pub async fn one(State(app): State<App>, Path(name): Path, _: Params<NoParams>) -> Answer<DevicePressure> {
    ok(pressure(&app, app.driver.devices.id(&name)?).await?)
}

async fn pressure(app: &App, device: DeviceId) -> Result<DevicePressure, ApiError> {
    let mut found = app.driver.ask(|reply| Event::Pressure(Some(device.clone()), reply)).await?;
    found.pop().ok_or_else(|| ApiError::not_found("device", device))
}

/// System memory and model memory of a device in one view
///
/// What the daemon holds of models and what workers hold of their own. Weights that workers have attached are counted once, as the
/// daemon's. Of a worker that does not answer, what its process was measured to have counts, and `notes` says so.
#[utoipa::path(get, path = "/api/memory/model/status/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    responses((status = 200, body = Success<ModelStatus>), Errors))]
pub async fn model_status(
    State(app): State<App>,
    Path(name): Path,
    _: Params<NoParams>,
) -> Answer<ModelStatus> {
    let device = app.driver.devices.named(&name)?;
    let id = device.facts().device.clone();
    let pressure = pressure(&app, id.clone()).await?;
    let snapshot = app.driver.snapshot();
    let view = snapshot.device(&id).ok_or_else(|| ApiError::not_found("device", &id))?;
    let now = clock::wall();
    let (worker_memory, of_processes, last_synchronized, mut of_workers) = workers(&snapshot, &id);
    let (resident_bytes, attached_bytes, mut loaded_models) = models(&snapshot, &id);
    let status = view.status(device.as_ref());
    let idle_bytes = pressure.available_memory.saturating_sub(pressure.free_memory);
    let idle_bytes = idle_bytes.saturating_sub(status.pool_free_bytes).min(resident_bytes);
    loaded_models.append(&mut of_workers);
    let unload = |action: &str| format!("POST /api/models/{{name}}/{action}");
    let mut available_operations = vec![unload("load"), unload("unload")];
    available_operations.push(format!("POST /api/memory/model/optimize/{id}"));
    if !worker_memory.workers.is_empty() {
        available_operations.push("POST /api/workers/{worker}/call".to_owned());
    }
    ok(ModelStatus {
        total_memory_usage: resident_bytes + of_processes,
        available_for_models: pressure.available_memory.min(status.limit_bytes),
        loaded_model_count: loaded_models.len() as u64,
        model_memory: ModelMemory { resident_bytes, attached_bytes, idle_bytes },
        worker_memory,
        loaded_models,
        pressure_level: pressure.pressure_level,
        available_operations,
        optimization_recommendations: pressure.recommended_actions,
        last_synchronized,
        last_updated: now,
        system_memory: status,
        device_id: id,
    })
}

/// What the daemon holds of models on a device, the part that is attached, and each model.
fn models(snapshot: &Snapshot, device: &DeviceId) -> (u64, u64, Vec<LoadedModel>) {
    let mut blocks: BTreeMap<_, (u64, bool)> = BTreeMap::new();
    let mut all = Vec::new();
    for model in snapshot.models.iter() {
        let here = model.components.values().filter_map(|entry| match entry.residency.get(device)? {
            Residency::Resident { allocation, .. } => snapshot.allocations.get(allocation),
            _ => None,
        });
        let held: Vec<_> = here.collect();
        if held.is_empty() {
            continue;
        }
        for block in &held {
            // One that several models share is there once.
            blocks.insert(block.request.id, (block.block_bytes, block.is_attached()));
        }
        let in_use = |pid: u32| {
            let of = snapshot.workers.values().filter(|worker| worker.pids.contains(&pid));
            let mut reports =
                of.flat_map(|worker| worker.models.iter()).filter(|it| it.is_of(&model.name)).peekable();
            // Who does not say otherwise uses what it has attached.
            reports.peek().is_none() || reports.any(|report| report.busy)
        };
        let attached_count = held.iter().map(|block| block.holders().count() as u64).sum();
        all.push(LoadedModel {
            name: model.name.to_string(),
            worker: None,
            bytes: held.iter().map(|block| block.block_bytes).sum(),
            busy: held.iter().any(|block| block.holders().any(|holder| in_use(holder.pid))),
            attached_count,
            last_used_at: model.last_used.map(|used| used.wall),
        });
    }
    let resident = blocks.values().map(|(bytes, _)| bytes).sum();
    let attached = blocks.values().filter(|(_, attached)| *attached).map(|(bytes, _)| bytes).sum();
    (resident, attached, all)
}

/// What workers hold on a device, their sum, when the one that is silent for longest last spoke, and the models of their own.
fn workers(
    snapshot: &Snapshot,
    device: &DeviceId,
) -> (WorkerMemoryStatus, u64, Option<Timestamp>, Vec<LoadedModel>) {
    let mut status = WorkerMemoryStatus::default();
    let (mut last, mut all) = (None::<Timestamp>, Vec::new());
    let (mut processes, mut unmeasured) = (BTreeMap::new(), 0);
    for worker in snapshot.workers.values().filter(|worker| worker.state.is_there()) {
        let shown = worker.to_api();
        let memory = shown.memory.iter().find(|memory| memory.device_id == *device);
        let here = || shown.models.iter().filter(|model| model.device_id == *device);
        if memory.is_none() && here().next().is_none() && shown.device_id.as_ref() != Some(device) {
            continue;
        }
        let measured = memory.and_then(|memory| memory.measured_bytes);
        processes.extend(worker.measured_by_process(device).into_iter().flatten());
        let reported = memory.and_then(|memory| memory.reported_bytes);
        // What was measured goes before what is said.
        if measured.is_none() {
            unmeasured += reported.unwrap_or(0);
        }
        status.reported_bytes += reported.unwrap_or(0);
        if worker.state != WorkerState::Ready {
            let what = format!("worker {} is {:?}", shown.name, shown.state);
            status.notes.push(format!("{what}: what its processes were measured to have counts"));
        } else if let Some(at) = shown.last_synchronized {
            last = Some(last.map_or(at, |before| before.min(at)));
        } else {
            status.notes.push(format!("worker {} has not said which models it has", shown.name));
        }
        if measured.is_none() {
            status.notes.push(format!(
                "what the process of worker {} has on {device} cannot be measured",
                shown.name
            ));
        }
        for model in here().filter(|model| model.own_bytes > 0 || model.state == WorkerModelState::Offloaded)
        {
            all.push(LoadedModel {
                name: model.name.clone(),
                worker: Some(shown.name.clone()),
                bytes: model.own_bytes,
                busy: model.busy,
                attached_count: 0,
                last_used_at: model.last_used_at,
            });
        }
        status.workers.push(WorkerShare {
            worker_id: shown.worker_id,
            state: shown.state,
            measured_bytes: measured,
            reported_bytes: reported,
            attached_bytes: here().map(|model| model.attached_bytes).sum(),
            last_synchronized: shown.last_synchronized,
            name: shown.name.clone(),
        });
    }
    let sum: u64 = processes.values().sum();
    status.measured_bytes = sum;
    (status, sum + unmeasured, last, all)
}

/// Have models go from a device
///
/// The daemon's own and the workers' in one order of cost: idle ones of the daemon's are unloaded, workers are asked for theirs, and
/// to let go of what they have attached and do not use. Never what is busy or pinned. It stops as soon as enough is free, and answers
/// then; `memoryFreed` is what was measured, not what was said.
#[utoipa::path(post, path = "/api/memory/model/optimize/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    request_body = Option<OptimizeModels>,
    responses((status = 200, body = Success<ModelsOptimized>), Errors))]
pub async fn optimize(
    State(app): State<App>,
    Path(name): Path,
    caller: Caller,
    _: Params<NoParams>,
    OptionalBody(body): OptionalBody<OptimizeModels>,
) -> Answer<ModelsOptimized> {
    let device = app.driver.devices.id(&name)?;
    let milliseconds = body.max_optimization_time_ms;
    if let Some(bad) = milliseconds.filter(|it| !(1..=MAX_MILLISECONDS).contains(it)) {
        let what = format!("maxOptimizationTimeMs {bad} is not from 1 to {MAX_MILLISECONDS}");
        return Err(ApiError::invalid("maxOptimizationTimeMs", what).into());
    }
    if let Some(bad) = body.max_models_to_unload.filter(|it| !(1..=MAX_MODELS).contains(it)) {
        let what = format!("maxModelsToUnload {bad} is not from 1 to {MAX_MODELS}");
        let error = ApiError::invalid("maxModelsToUnload", what);
        return Err(error.hint("leave it out for as many as it takes").into());
    }
    if body.exclude_models.len() > MAX_EXCLUDED {
        let what = format!("excludeModels names {}, {MAX_EXCLUDED} at most", body.exclude_models.len());
        return Err(ApiError::invalid("excludeModels", what).into());
    }
    ok(app.driver.ask(|reply| Event::OptimizeModels(device, Box::new(body), caller, reply)).await?)
}
