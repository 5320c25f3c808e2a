//! `/api/devices`.

use axum::extract::State;
use vramd_api::{Device, DevicePage, Success};

use super::App;
use super::extract::{NoParams, Params, Path};
use super::reply::{Answer, Errors, ok};
use crate::devices::to_api;

/// All devices
#[utoipa::path(get, path = "/api/devices", tag = "devices",
    responses((status = 200, body = Success<DevicePage>), Errors))]
pub async fn list(State(app): State<App>, _: Params<NoParams>) -> Answer<DevicePage> {
    let snapshot = app.driver.snapshot();
    let lost = |device: &Device| snapshot.device(&device.device_id).is_some_and(|view| view.lost);
    let devices = app.driver.devices.iter().map(|device| {
        let shown = to_api(device.as_ref(), false);
        if lost(&shown) { to_api(device.as_ref(), true) } else { shown }
    });
    ok(DevicePage { devices: devices.collect() })
}

/// One device
#[utoipa::path(get, path = "/api/devices/{deviceId}", tag = "devices",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    responses((status = 200, body = Success<Device>), Errors))]
pub async fn get(State(app): State<App>, Path(name): Path, _: Params<NoParams>) -> Answer<Device> {
    let device = app.driver.devices.named(&name)?;
    let lost = app.driver.snapshot().device(&device.facts().device).is_some_and(|view| view.lost);
    ok(to_api(device.as_ref(), lost))
}
