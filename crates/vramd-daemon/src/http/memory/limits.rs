//! `/api/memory/limits`.

use axum::extract::State;
use vramd_api::{ApiError, Bytes, DeviceId, DeviceLimits, LimitsPage, SetLimits, Success};

use crate::driver::{DeviceView, Event};
use crate::http::App;
use crate::http::extract::{Body, NoParams, Params, Path};
use crate::http::reply::{Answer, Errors, ok};

/// The most owners and purposes that have limits of their own on a device: each is counted for each request.
const MAX_SHARES: usize = 16;
const MAX_PURPOSE: usize = 128;

/// The limits of all devices
#[utoipa::path(get, path = "/api/memory/limits", tag = "memory",
    responses((status = 200, body = Success<LimitsPage>), Errors))]
pub async fn list(State(app): State<App>, _: Params<NoParams>) -> Answer<LimitsPage> {
    let snapshot = app.driver.snapshot();
    let shown = |view: &DeviceView| view.limits.to_api(&view.device, &snapshot.allocations);
    ok(LimitsPage { limits: snapshot.devices.iter().map(shown).collect() })
}

/// The limits of one device
#[utoipa::path(get, path = "/api/memory/limits/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid")),
    responses((status = 200, body = Success<DeviceLimits>), Errors))]
pub async fn get(State(app): State<App>, Path(name): Path, _: Params<NoParams>) -> Answer<DeviceLimits> {
    let device: DeviceId = app.driver.devices.id(&name)?;
    let snapshot = app.driver.snapshot();
    let view = snapshot.device(&device).ok_or_else(|| ApiError::not_found("device", &name))?;
    ok(view.limits.to_api(&view.device, &snapshot.allocations))
}

/// Set the limits of one device
///
/// All of them anew, kept over restarts: what is left out is lifted. What is held above them and in use stays; idle models go for a limit
/// that is lower than what is held, those whose absence costs least. The answer says what goes (`evicted`) and what is still above
/// (`aboveBytes`). New requests are held to the limits at once.
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
    let device = app.driver.devices.named(&name)?;
    check(&body, device.facts().total_bytes)?;
    let device = device.facts().device.clone();
    ok(app.driver.ask(|reply| Event::SetLimits(device, Box::new(body), reply)).await?)
}

/// Limits that no request could keep to are a mistake.
fn check(body: &SetLimits, total: u64) -> Result<(), ApiError> {
    let most = body.limit_bytes.map_or(total, Bytes::get);
    let above = |field: &str, bytes: Option<Bytes>| match bytes.map(Bytes::get) {
        Some(bytes) if bytes > most => {
            let what = format!("{field} {bytes} is more than the {most} bytes that may be held here");
            Err(ApiError::invalid(field, what))
        }
        _ => Ok(()),
    };
    above("softLimitBytes", body.soft_limit_bytes)?;
    if let Some(reserve) = body.reserve_bytes.map(Bytes::get).filter(|reserve| *reserve > total) {
        let what = format!("reserveBytes {reserve} is more than the device has: {total}");
        return Err(ApiError::invalid("reserveBytes", what));
    }
    if body.owners.len() + body.purposes.len() > MAX_SHARES {
        let what = format!("at most {MAX_SHARES} owners and purposes have limits of their own");
        return Err(ApiError::invalid("owners", what));
    }
    let mut reserved = 0_u64;
    let owners = body.owners.iter().map(|(name, share)| ("owners", name.as_str(), share));
    let purposes = body.purposes.iter().map(|(name, share)| ("purposes", name.as_str(), share));
    for (field, name, share) in owners.chain(purposes) {
        if name.is_empty() || name.len() > MAX_PURPOSE || name.chars().any(char::is_control) {
            return Err(ApiError::invalid(field, format!("{field} has a name that nobody can have")));
        }
        let (limit, reserve) = (share.limit_bytes.map(Bytes::get), share.reserve_bytes.map_or(0, Bytes::get));
        if limit.is_some_and(|limit| reserve > limit) {
            return Err(ApiError::invalid(field, format!("the reserve of {name} is above its limit")));
        }
        reserved = reserved.saturating_add(reserve);
    }
    if reserved > most {
        let what = format!("{reserved} bytes are to be reserved together, of {most} that may be held here");
        return Err(ApiError::invalid("owners", what));
    }
    Ok(())
}
