//! `/api/models`.

use std::collections::BTreeMap;

use axum::extract::State;
use vramd_api::{
    ApiError, Bytes, DeviceId, LoadRequest, MemoryType, Model, ModelName, ModelPage, OnShortage, Operation,
    PrefetchRequest, RegisterModel, Success, TouchRequest, UnloadRequest,
};
use vramd_core::eviction::Popularity;
use vramd_core::models;

use super::extract::{Body, NoParams, OptionalBody, Params, Path};
use super::idempotency::IdempotencyKey;
use super::operations::{self, WaitParams};
use super::reply::{Answer, Errors, created, ok};
use super::{App, bad_path};
use crate::clock;
use crate::driver::{Event, Load};
use crate::loader;
use crate::requests;

/// The most components of one model.
const MAX_COMPONENTS: usize = 64;

fn name(text: &str) -> Result<ModelName, ApiError> {
    text.parse().map_err(|error| bad_path("name", &error))
}

/// All registered models
#[utoipa::path(get, path = "/api/models", tag = "models",
    responses((status = 200, body = Success<ModelPage>), Errors))]
pub async fn list(State(app): State<App>, _: Params<NoParams>) -> Answer<ModelPage> {
    let snapshot = app.driver.snapshot();
    ok(ModelPage {
        models: snapshot.models.iter().map(|model| model.to_api(&snapshot.allocations)).collect(),
    })
}

/// Register a model
///
/// Its files are opened and their headers checked; nothing is loaded. Kept over restarts.
#[utoipa::path(post, path = "/api/models", tag = "models", request_body = RegisterModel,
    params(IdempotencyKey),
    responses((status = 201, body = Success<Model>), Errors))]
pub async fn register(
    State(app): State<App>,
    _: Params<NoParams>,
    Body(body): Body<RegisterModel>,
) -> Answer<Model> {
    if !(1..=MAX_COMPONENTS).contains(&body.components.len()) {
        let error = ApiError::invalid("components", format!("a model has 1 to {MAX_COMPONENTS} components"))
            .hint("call the only one `weights`: {\"weights\": {\"path\": \"/…/model.safetensors\"}}");
        return Err(error.into());
    }
    let sources: BTreeMap<_, _> =
        body.components.iter().map(|(name, source)| (name.clone(), source.path.clone())).collect();
    let mut prepared = loader::prepare(&app.roots, sources).await?;
    let total = prepared.values().try_fold(0u64, |sum, part| sum.checked_add(part.plan.layout.block_bytes));
    if total.is_none_or(|total| total > Bytes::MAX) {
        return Err(ApiError::invalid(
            "components",
            "the components together are larger than 2^63 - 1 bytes",
        )
        .into());
    }
    let components = body
        .components
        .into_iter()
        .filter_map(|(name, source)| {
            let plan = prepared.remove(&name)?.plan;
            Some((
                name,
                models::Component {
                    path: source.path,
                    plan: Ok(plan),
                    residency: BTreeMap::new(),
                    load_seconds: BTreeMap::new(),
                    checksum: None,
                },
            ))
        })
        .collect();
    let model = models::Model {
        name: body.name,
        components,
        pinned: body.pinned,
        priority: body.priority,
        popularity: Popularity::default(),
        keep_alive: body.keep_alive.unwrap_or_default(),
        registered_at: clock::wall(),
        last_used: None,
    };
    created(app.driver.ask(|reply| Event::Register(Box::new(model), reply)).await?)
}

/// One model
#[utoipa::path(get, path = "/api/models/{name}", tag = "models", params(("name" = ModelName, Path)),
    responses((status = 200, body = Success<Model>), Errors))]
pub async fn get(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Model> {
    let name = name(&text)?;
    let snapshot = app.driver.snapshot();
    let model = snapshot.models.get(&name).ok_or_else(|| {
        ApiError::not_found("model", &name).hint("`vramd models` lists the registered ones")
    })?;
    ok(model.to_api(&snapshot.allocations))
}

/// Forget a model that is not resident
#[utoipa::path(delete, path = "/api/models/{name}", tag = "models", params(("name" = ModelName, Path)),
    responses((status = 200, body = Success<Model>), Errors))]
pub async fn remove(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Model> {
    let name = name(&text)?;
    ok(app.driver.ask(|reply| Event::Remove(name, reply)).await?)
}

/// Load a model
///
/// All components of it, or those named, are resident when the operation has completed; if it fails or is cancelled,
/// none of them is. Without room, idle models go for it; while it waits for that, the operation is `Queued`. A model that is being loaded answers with that operation; one that is resident with a completed
/// one.
#[utoipa::path(post, path = "/api/models/{name}/load", tag = "models", request_body = Option<LoadRequest>,
    params(("name" = ModelName, Path), WaitParams,
        IdempotencyKey),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn load(
    State(app): State<App>,
    Path(text): Path,
    Params(wait): Params<WaitParams>,
    OptionalBody(body): OptionalBody<LoadRequest>,
) -> Answer<Operation> {
    let wait = wait.seconds()?;
    if body.components.as_ref().is_some_and(Vec::is_empty) {
        return Err(
            ApiError::invalid("components", "name a component, or leave out components for all").into()
        );
    }
    let device = body.device_id.as_ref().map(|name| app.driver.devices.id(name)).transpose()?;
    if body.split && device.is_some() {
        let what = "components that may go to different devices name none";
        return Err(ApiError::invalid("split", what).hint("leave out one of split and deviceId").into());
    }
    let shortage = requests::shortage(body.on_shortage.unwrap_or(OnShortage::Evict), body.timeout_seconds)?;
    let (components, keep_alive, checksum) = (body.components, body.keep_alive, body.checksum);
    let load = Load {
        model: name(&text)?,
        device,
        components,
        keep_alive,
        shortage,
        split: body.split,
        checksum,
        unasked: false,
        cache_for: None,
    };
    let operation = loader::begin(&app.driver, &app.roots, &load).await?;
    operations::answer(&app, operation, wait).await
}

/// Bring a model to host memory before it is used
///
/// For its next use on a device, `deviceId`; left out, the nearest that could hold it. Nothing that is worth more goes for it, it is no use
/// of the model, and while other models are loaded it is refused. The next load to that device copies it from there. What usually follows another model is
/// prefetched without being asked.
#[utoipa::path(post, path = "/api/models/{name}/prefetch", tag = "models", request_body = Option<PrefetchRequest>,
    params(("name" = ModelName, Path), WaitParams,
        IdempotencyKey),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn prefetch(
    State(app): State<App>,
    Path(text): Path,
    Params(wait): Params<WaitParams>,
    OptionalBody(body): OptionalBody<PrefetchRequest>,
) -> Answer<Operation> {
    let wait = wait.seconds()?;
    let name = name(&text)?;
    let device = match &body.device_id {
        Some(device) => app.driver.devices.id(device)?,
        None => usual_device(&app, &name)?,
    };
    let load = Load::prefetch(name, device, &app.driver.devices)?;
    let operation = loader::begin(&app.driver, &app.roots, &load).await?;
    operations::answer(&app, operation, wait).await
}

/// The first card that could hold a model.
fn usual_device(app: &App, name: &ModelName) -> Result<DeviceId, ApiError> {
    let snapshot = app.driver.snapshot();
    let model = snapshot.models.get(name).ok_or_else(|| ApiError::not_found("model", name))?;
    let bytes = model.to_api(&snapshot.allocations).size_bytes;
    let fits =
        |facts: &&vramd_device::Facts| facts.memory_type == MemoryType::Vram && facts.total_bytes >= bytes;
    let cards = app.driver.devices.iter().map(|device| device.facts());
    cards.filter(fits).map(|facts| facts.device.clone()).next().ok_or_else(|| {
        ApiError::invalid("deviceId", format!("no card could hold {name}"))
            .hint("load it into host memory instead: `vramd load --device cpu:0`")
    })
}

/// Unload a model
///
/// Refused while processes have it attached, and while it is pinned.
#[utoipa::path(post, path = "/api/models/{name}/unload", tag = "models", request_body = Option<UnloadRequest>,
    params(("name" = ModelName, Path), WaitParams,
        IdempotencyKey),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn unload(
    State(app): State<App>,
    Path(text): Path,
    Params(wait): Params<WaitParams>,
    OptionalBody(body): OptionalBody<UnloadRequest>,
) -> Answer<Operation> {
    let wait = wait.seconds()?;
    let device = body.device_id.as_ref().map(|name| app.driver.devices.id(name)).transpose()?;
    let name = name(&text)?;
    let operation = app.driver.ask(|reply| Event::Unload(name, device, reply)).await?;
    operations::answer(&app, operation, wait).await
}

/// Keep a model resident until it is unpinned
#[utoipa::path(post, path = "/api/models/{name}/pin", tag = "models", params(("name" = ModelName, Path)),
    responses((status = 200, body = Success<Model>), Errors))]
pub async fn pin(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Model> {
    let name = name(&text)?;
    ok(app.driver.ask(|reply| Event::Pin(name, true, reply)).await?)
}

/// Let a model go again when it is idle
#[utoipa::path(post, path = "/api/models/{name}/unpin", tag = "models", params(("name" = ModelName, Path)),
    responses((status = 200, body = Success<Model>), Errors))]
pub async fn unpin(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Model> {
    let name = name(&text)?;
    ok(app.driver.ask(|reply| Event::Pin(name, false, reply)).await?)
}

/// Say that a model was used: its keep-alive begins anew
#[utoipa::path(post, path = "/api/models/{name}/touch", tag = "models", request_body = Option<TouchRequest>,
    params(("name" = ModelName, Path)),
    responses((status = 200, body = Success<Model>), Errors))]
pub async fn touch(
    State(app): State<App>,
    Path(text): Path,
    _: Params<NoParams>,
    OptionalBody(body): OptionalBody<TouchRequest>,
) -> Answer<Model> {
    let name = name(&text)?;
    ok(app.driver.ask(|reply| Event::Touch(name, body.keep_alive, reply)).await?)
}
