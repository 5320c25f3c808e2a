//! `/api/memory/limits`.

use axum::extract::State;
use vramd_api::{ApiError, Bytes, DeviceId, DeviceLimits, LimitsPage, SetLimits, Success};

use crate::driver::{DeviceView, Event};
use crate::http::App;
use crate::http::extract::{Body, NoParams, Params, Path};
use crate::http::reply::{Answer, Errors, ok};

fn limits(view: &DeviceView) -> DeviceLimits {
    DeviceLimits {
        device_id: view.device.clone(),
        limit_bytes: view.usage.limit_bytes,
        overridden: view.limit_overridden,
    }
}

/// The limits of all devices
#[utoipa::path(get, path = "/api/memory/limits", tag = "memory",
    responses((status = 200, body = Success<LimitsPage>), Errors))]
pub async fn list(State(app): State<App>, _: Params<NoParams>) -> Answer<LimitsPage> {
    ok(LimitsPage { limits: app.driver.snapshot().devices.iter().map(limits).collect() })
}

/// The limits of one device
#[utoipa::path(get, path = "/api/memory/limits/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    responses((status = 200, body = Success<DeviceLimits>), Errors))]
pub async fn get(State(app): State<App>, Path(name): Path, _: Params<NoParams>) -> Answer<DeviceLimits> {
    let device: DeviceId = app.driver.devices.named(&name)?.facts().device.clone();
    let snapshot = app.driver.snapshot();
    ok(snapshot.device(&device).map(limits).ok_or_else(|| ApiError::not_found("device", &name))?)
}

/// Set the limits of one device
///
/// Kept over restarts. What is held above a new limit stays; new requests are held to it.
#[utoipa::path(put, path = "/api/memory/limits/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    request_body = SetLimits,
    responses((status = 200, body = Success<DeviceLimits>), Errors))]
pub async fn put(
    State(app): State<App>,
    Path(name): Path,
    _: Params<NoParams>,
    Body(body): Body<SetLimits>,
) -> Answer<DeviceLimits> {
    let device = app.driver.devices.named(&name)?.facts().device.clone();
    let limit = body.limit_bytes.map(Bytes::get);
    ok(app.driver.ask(|reply| Event::SetLimit(device, limit, reply)).await?)
}
