//! `/api/memory/reservations` and `/api/memory/footprints`.

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use vramd_api::{Allocation, ApiError, FootprintPage, ModelName, ReserveRequest, Success};

use crate::driver::{Caller, Event};
use crate::http::extract::{Body, NoParams, Params, Path};
use crate::http::idempotency::IdempotencyKey;
use crate::http::reply::{Answer, Errors, created, ok};
use crate::http::{App, bad_path};
use crate::requests;

/// Reserve room for working memory
///
/// For what a framework allocates while a model runs: activations, a KV cache. Nobody else is given that room while the reservation
/// lasts; the bytes themselves are made by the caller's process. How much is what runs of this model, device and shape were measured
/// to take, or `sizeBytes` before there was one. It is an allocation like others: it is listed, renewed and released by its
/// `allocationId`, and a release with `peakBytes` says how much the run really took.
#[utoipa::path(post, path = "/api/memory/reservations", tag = "memory", request_body = ReserveRequest,
    params(IdempotencyKey),
    responses((status = 201, body = Success<Allocation>), Errors))]
pub async fn reserve(
    State(app): State<App>,
    caller: Caller,
    _: Params<NoParams>,
    Body(body): Body<ReserveRequest>,
) -> Answer<Allocation> {
    let device = body.device_id.as_ref().map(|name| app.driver.devices.id(name)).transpose()?;
    let allocate = requests::reserve(body, device, caller)?;
    created(app.driver.ask(|reply| Event::Reserve(Box::new(allocate), reply)).await?)
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub struct FootprintParams {
    #[param(required = false, value_type = String)]
    model: Option<ModelName>,
}

/// What runs took beside the weights
///
/// By model, device and shape: what was expected, what was learned, and by how much reservations were wrong.
#[utoipa::path(get, path = "/api/memory/footprints", tag = "memory", params(FootprintParams),
    responses((status = 200, body = Success<FootprintPage>), Errors))]
pub async fn footprints(
    State(app): State<App>,
    Params(params): Params<FootprintParams>,
) -> Answer<FootprintPage> {
    let snapshot = app.driver.snapshot();
    let meant =
        snapshot.footprints.iter().filter(|one| params.model.as_ref().is_none_or(|it| *it == one.model));
    ok(FootprintPage { footprints: meant.cloned().collect() })
}

/// Forget what runs of a model took
///
/// Of all devices and shapes; answers what was forgotten. The next reservation says `sizeBytes` again.
#[utoipa::path(delete, path = "/api/memory/footprints/{model}", tag = "memory", params(("model" = ModelName, Path)),
    responses((status = 200, body = Success<FootprintPage>), Errors))]
pub async fn forget(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<FootprintPage> {
    let model: ModelName = text.parse().map_err(|error| bad_path("model", &error))?;
    let forgotten = app.driver.ask(|reply| Event::ForgetFootprints(model.clone(), reply)).await?;
    if forgotten.footprints.is_empty() {
        let error = ApiError::not_found("footprint of model", &model);
        return Err(error.hint("`vramd footprints` shows what is known").into());
    }
    ok(forgotten)
}
