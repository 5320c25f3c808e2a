//! `/api/memory/operations/defragment`.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use vramd_api::{ApiError, DefragmentPlans, DefragmentRequest, DeviceId, Operation, Success};

use crate::driver::Event;
use crate::http::App;
use crate::http::extract::{OptionalBody, Params, Path};
use crate::http::idempotency::IdempotencyKey;
use crate::http::operations::{self, WaitParams};
use crate::http::reply::{Answer, Errors, Reply};

/// A plan when it was a dry run, else the operation.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "one is made for each answer")]
pub enum DefragmentAnswer {
    Plans(DefragmentPlans),
    Operation(Operation),
}

/// Defragment all devices, one after another
///
/// Blocks that share segments are packed into fewer, and what is empty then goes back to the device. Processes that have
/// a block attached and follow moves do not notice; what cannot move is named with its reason. It can be bounded,
/// paused and cancelled: what has moved stays moved. Blocks with segments of their own, such as those of models, never
/// need it.
#[utoipa::path(post, path = "/api/memory/operations/defragment", tag = "memory",
    request_body = Option<DefragmentRequest>, params(WaitParams, IdempotencyKey),
    responses((status = 200, description = "The plan, or the operation that has ended", body = Success<DefragmentAnswer>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn all(
    State(app): State<App>,
    Params(wait): Params<WaitParams>,
    OptionalBody(body): OptionalBody<DefragmentRequest>,
) -> Answer<DefragmentAnswer> {
    defragment(&app, &body, None, &wait).await
}

/// Defragment one device
#[utoipa::path(post, path = "/api/memory/operations/defragment/{deviceId}", tag = "memory",
    request_body = Option<DefragmentRequest>,
    params(("deviceId" = String, Path, description = "A device's id or uuid"), WaitParams, IdempotencyKey),
    responses((status = 200, description = "The plan, or the operation that has ended", body = Success<DefragmentAnswer>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn one(
    State(app): State<App>,
    Path(name): Path,
    Params(wait): Params<WaitParams>,
    OptionalBody(body): OptionalBody<DefragmentRequest>,
) -> Answer<DefragmentAnswer> {
    let device = app.driver.devices.id(&name)?;
    defragment(&app, &body, Some(device), &wait).await
}

async fn defragment(
    app: &App,
    body: &DefragmentRequest,
    device: Option<DeviceId>,
    wait: &WaitParams,
) -> Answer<DefragmentAnswer> {
    let wait = wait.seconds()?;
    for (bound, field) in [(body.max_moves, "maxMoves"), (body.max_milliseconds, "maxMilliseconds")] {
        if bound == Some(0) {
            return Err(ApiError::invalid(field, format!("{field} 0 allows nothing"))
                .hint("leave it out, or plan with dryRun")
                .into());
        }
    }
    let request = body.clone();
    if body.dry_run {
        let plans = app.driver.ask(|reply| Event::PlanDefragment(request, device, reply)).await?;
        return Ok(Reply(StatusCode::OK, DefragmentAnswer::Plans(plans)));
    }
    let operation = app.driver.ask(|reply| Event::Defragment(request, device, reply)).await?;
    let Reply(status, operation) = operations::answer(app, operation, wait).await?;
    Ok(Reply(status, DefragmentAnswer::Operation(operation)))
}
