//! `/api/memory/transfer` and `/api/memory/copy`.

use axum::extract::State;
use vramd_api::{
    ApiError, CopyRequest, MAX_TRANSFER_ITEMS, Operation, OperationId, OperationKind, Success,
    TransferRequest,
};

use crate::driver::{Caller, Event};
use crate::http::App;
use crate::http::extract::{Body, Params, Path};
use crate::http::idempotency::IdempotencyKey;
use crate::http::operations::{self, WaitParams};
use crate::http::reply::{Answer, Errors, ok};

fn id(app: &App, text: &str) -> Result<OperationId, ApiError> {
    let id: OperationId = text
        .parse()
        .map_err(|error: vramd_api::BadName| ApiError::invalid("transferId", error.to_string()))?;
    let snapshot = app.driver.snapshot();
    let kind = snapshot.operations.get(&id).map(|entry| entry.operation().kind);
    let moves = matches!(kind, Some(OperationKind::Transfer | OperationKind::Copy));
    if moves {
        Ok(id)
    } else {
        Err(ApiError::not_found("transfer", text).hint("`vramd operations` lists those that are there"))
    }
}

/// Move or copy to another device
///
/// Allocations, models and components of them; all of them, or none is begun. A moved allocation keeps its id. What
/// fails or is cancelled leaves the old copy as it was; what arrived before stays where it is.
#[utoipa::path(post, path = "/api/memory/transfer", tag = "memory", request_body = TransferRequest,
    params(WaitParams, IdempotencyKey),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn begin(
    State(app): State<App>,
    caller: Caller,
    Params(wait): Params<WaitParams>,
    Body(body): Body<TransferRequest>,
) -> Answer<Operation> {
    let wait = wait.seconds()?;
    if !(1..=MAX_TRANSFER_ITEMS).contains(&body.items.len()) {
        return Err(
            ApiError::invalid("items", format!("a transfer has 1 to {MAX_TRANSFER_ITEMS} items")).into()
        );
    }
    let operation = app.driver.ask(|reply| Event::Transfer(Box::new(body), caller, reply)).await?;
    operations::answer(&app, operation, wait).await
}

/// One transfer
#[utoipa::path(get, path = "/api/memory/transfer/{transferId}", tag = "memory",
    params(("transferId" = OperationId, Path), WaitParams),
    responses((status = 200, body = Success<Operation>), Errors))]
pub async fn get(
    State(app): State<App>,
    Path(text): Path,
    Params(wait): Params<WaitParams>,
) -> Answer<Operation> {
    let (id, wait) = (id(&app, &text)?, wait.seconds()?);
    ok(operations::wait_for(&app, id, wait).await?)
}

/// Cancel a transfer
///
/// The old copy stays as it was. Items that had arrived stay where they are.
#[utoipa::path(delete, path = "/api/memory/transfer/{transferId}", tag = "memory",
    params(("transferId" = OperationId, Path), WaitParams),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is ending", body = Success<Operation>), Errors))]
pub async fn cancel(
    State(app): State<App>,
    Path(text): Path,
    Params(wait): Params<WaitParams>,
) -> Answer<Operation> {
    let (id, wait) = (id(&app, &text)?, wait.seconds()?);
    let operation = app.driver.ask(|reply| Event::Cancel(id, reply)).await?;
    operations::answer(&app, operation, wait).await
}

/// Copy from one allocation into another
///
/// On one device or between two. Both stay what they are; the target's range has the source's bytes afterwards. If it
/// fails or is cancelled, that range is undefined.
#[utoipa::path(post, path = "/api/memory/copy", tag = "memory", request_body = CopyRequest,
    params(WaitParams, IdempotencyKey),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is under way", body = Success<Operation>), Errors))]
pub async fn copy(
    State(app): State<App>,
    caller: Caller,
    Params(wait): Params<WaitParams>,
    Body(body): Body<CopyRequest>,
) -> Answer<Operation> {
    let wait = wait.seconds()?;
    let operation = app.driver.ask(|reply| Event::Copy(Box::new(body), caller, reply)).await?;
    operations::answer(&app, operation, wait).await
}
