//! `/api/memory/operations/clear`.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use vramd_api::{ApiError, ClearRequest, ClearTarget, Cleared, DeviceId, Operation, Success};

use crate::driver::{Caller, Event};
use crate::http::App;
use crate::http::extract::{Body, Params, Path};
use crate::http::idempotency::IdempotencyKey;
use crate::http::operations::{self, WaitParams};
use crate::http::reply::{Answer, Errors, Reply};

/// What would be cleared when it was a dry run, else the operation.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "one is made for each answer")]
pub enum ClearAnswer {
    Cleared(Cleared),
    Operation(Operation),
}

/// Clear on all devices
///
/// The free pool, unused models, the allocations of an owner, or the bytes of one allocation. What processes have attached
/// stays, and is named, unless it is forced. The result says what was asked, acknowledged and measured.
#[utoipa::path(post, path = "/api/memory/operations/clear", tag = "memory", request_body = ClearRequest,
    params(WaitParams, IdempotencyKey),
    responses((status = 200, description = "The dry run, or the operation that has ended", body = Success<ClearAnswer>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn all(
    State(app): State<App>,
    caller: Caller,
    Params(wait): Params<WaitParams>,
    Body(body): Body<ClearRequest>,
) -> Answer<ClearAnswer> {
    clear(&app, body, None, caller, &wait).await
}

/// Clear on one device
#[utoipa::path(post, path = "/api/memory/operations/clear/{deviceId}", tag = "memory", request_body = ClearRequest,
    params(("deviceId" = String, Path, description = "A device's id or uuid"), WaitParams, IdempotencyKey),
    responses((status = 200, description = "The dry run, or the operation that has ended", body = Success<ClearAnswer>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn one(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path,
    Params(wait): Params<WaitParams>,
    Body(body): Body<ClearRequest>,
) -> Answer<ClearAnswer> {
    let device = app.driver.devices.id(&name)?;
    clear(&app, body, Some(device), caller, &wait).await
}

async fn clear(
    app: &App,
    body: ClearRequest,
    device: Option<DeviceId>,
    caller: Caller,
    wait: &WaitParams,
) -> Answer<ClearAnswer> {
    let wait = wait.seconds()?;
    if body.owner.is_some() && body.what != ClearTarget::Allocations {
        return Err(ApiError::invalid("owner", "owner goes with what=Allocations only").into());
    }
    if body.allocation_id.is_some() && body.what != ClearTarget::Zero {
        return Err(ApiError::invalid("allocationId", "allocationId goes with what=Zero only").into());
    }
    let body = Box::new(body);
    if body.dry_run {
        let cleared = app.driver.ask(|reply| Event::PlanClear(body, device, caller, reply)).await?;
        return Ok(Reply(StatusCode::OK, ClearAnswer::Cleared(cleared)));
    }
    let operation = app.driver.ask(|reply| Event::Clear(body, device, caller, reply)).await?;
    let Reply(status, operation) = operations::answer(app, operation, wait).await?;
    Ok(Reply(status, ClearAnswer::Operation(operation)))
}
