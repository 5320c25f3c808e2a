//! `/api/memory/usage`.

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use vramd_api::{
    ApiError, DeviceId, DeviceUsage, KeepAlive, MAX_USAGE_POINTS, Success, USAGE_SECONDS, UsagePage,
};

use crate::clock;
use crate::http::App;
use crate::http::extract::{Params, Path};
use crate::http::reply::{Answer, Errors, ok};

/// How many steps an answer has that names none.
const STEPS: u64 = 60;
/// All that is kept, in that many steps.
pub const HOUR: (u64, u64) = (USAGE_SECONDS, USAGE_SECONDS / STEPS);

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsageParams {
    /// How far back: a duration such as `90s`, `15m` or `1h`, an hour at most. Default: `1h`
    #[param(required = false, pattern = "^([1-9][0-9]{0,3}s?|[1-9]m|[1-5][0-9]m|60m|1h)$")]
    window: Option<String>,
    /// The length of one step, such as `10s`, no longer than the window. Default: a sixtieth of the window
    #[param(required = false, pattern = "^([1-9][0-9]{0,3}s?|[1-9]m|[1-5][0-9]m|60m|1h)$")]
    step: Option<String>,
}

impl UsageParams {
    /// The window and the step, in seconds.
    fn parse(&self) -> Result<(u64, u64), ApiError> {
        let window = seconds("window", self.window.as_deref(), USAGE_SECONDS, USAGE_SECONDS)?;
        let step = seconds("step", self.step.as_deref(), (window / STEPS).max(1), window)?;
        debug_assert!(window / step <= MAX_USAGE_POINTS);
        Ok((window, step))
    }
}

fn seconds(field: &str, text: Option<&str>, default: u64, most: u64) -> Result<u64, ApiError> {
    let Some(text) = text else { return Ok(default) };
    match text.parse() {
        Ok(KeepAlive::Seconds(seconds)) if (1..=most).contains(&seconds) => Ok(seconds),
        _ => Err(ApiError::invalid(field, format!("{field} {text:?} is no duration from 1s to {most}s"))
            .hint("write it such as 90s, 15m or 1h")),
    }
}

pub fn show(app: &App, device: &DeviceId, (window, step): (u64, u64)) -> DeviceUsage {
    let now = clock::wall().as_second();
    app.usage.with(|history| history.show(device, now, window, step))
}

/// Use over time of all devices
///
/// An hour of samples, one a second, since the daemon started: levels, peaks, averages, rates, and who and what it was for.
#[utoipa::path(get, path = "/api/memory/usage", tag = "memory", params(UsageParams),
    responses((status = 200, body = Success<UsagePage>), Errors))]
pub async fn all(State(app): State<App>, Params(params): Params<UsageParams>) -> Answer<UsagePage> {
    let asked = params.parse()?;
    let devices = app.driver.devices.iter().map(|device| show(&app, &device.facts().device, asked));
    ok(UsagePage { devices: devices.collect() })
}

/// Use over time of one device
#[utoipa::path(get, path = "/api/memory/usage/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid"), UsageParams),
    responses((status = 200, body = Success<DeviceUsage>), Errors))]
pub async fn one(
    State(app): State<App>,
    Path(name): Path,
    Params(params): Params<UsageParams>,
) -> Answer<DeviceUsage> {
    let device = app.driver.devices.id(&name)?;
    ok(show(&app, &device, params.parse()?))
}
