//! `/api/operations`.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;
use vramd_api::{ApiError, Operation, OperationId, OperationPage, OperationState, Success};

use super::extract::{NoParams, Params, Path};
use super::idempotency::IdempotencyKey;
use super::reply::{Answer, Errors, Reply, ok};
use super::{App, bad_path};
use crate::driver::Event;

const MAX_WAIT_SECONDS: u64 = 600;

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WaitParams {
    /// Answer when the operation has ended, or after this many seconds. Default: 0
    #[param(required = false, minimum = 0, maximum = 600)]
    wait: Option<u64>,
}

impl WaitParams {
    pub fn seconds(&self) -> Result<Duration, ApiError> {
        let seconds = self.wait.unwrap_or(0);
        if seconds > MAX_WAIT_SECONDS {
            return Err(ApiError::invalid(
                "wait",
                format!("wait {seconds} is more than {MAX_WAIT_SECONDS} seconds"),
            ));
        }
        Ok(Duration::from_secs(seconds))
    }
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListParams {
    #[param(required = false)]
    state: Option<OperationState>,
}

fn id(text: &str) -> Result<OperationId, ApiError> {
    text.parse().map_err(|error| bad_path("operationId", &error))
}

/// The operation once it has ended, or as it is after `wait`.
pub async fn wait_for(app: &App, id: OperationId, wait: Duration) -> Result<Operation, ApiError> {
    let mut snapshots = app.driver.snapshots();
    let ended =
        snapshots.wait_for(|snapshot| snapshot.operations.get(&id).is_none_or(|entry| entry.state().ended()));
    // Running out of time is no error: the answer says that it still runs.
    let _ = tokio::time::timeout(wait, ended).await;
    let entry = app.driver.snapshot().operations.get(&id).cloned();
    entry.map(|entry| entry.operation()).ok_or_else(|| ApiError::not_found("operation", id))
}

/// The operation as it is once it has ended, or after `wait`.
pub async fn answer(app: &App, operation: Operation, wait: std::time::Duration) -> Answer<Operation> {
    let operation = wait_for(app, operation.operation_id, wait).await?;
    let status = if operation.state.ended() { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok(Reply(status, operation))
}

/// The operations that run, and those that ended within a day
#[utoipa::path(get, path = "/api/operations", tag = "operations", params(ListParams),
    responses((status = 200, body = Success<OperationPage>), Errors))]
pub async fn list(State(app): State<App>, Params(params): Params<ListParams>) -> Answer<OperationPage> {
    let snapshot = app.driver.snapshot();
    let wanted =
        snapshot.operations.values().filter(|entry| params.state.is_none_or(|state| state == entry.state()));
    ok(OperationPage { operations: wanted.map(|entry| entry.operation()).collect() })
}

/// One operation
#[utoipa::path(get, path = "/api/operations/{operationId}", tag = "operations",
    params(("operationId" = OperationId, Path), WaitParams),
    responses((status = 200, body = Success<Operation>), Errors))]
pub async fn get(
    State(app): State<App>,
    Path(text): Path,
    Params(params): Params<WaitParams>,
) -> Answer<Operation> {
    ok(wait_for(&app, id(&text)?, params.seconds()?).await?)
}

/// Cancel an operation
///
/// It ends as `Cancelled` once everything that it had taken is back; `wait` waits for that.
#[utoipa::path(delete, path = "/api/operations/{operationId}", tag = "operations",
    params(("operationId" = OperationId, Path), WaitParams),
    responses((status = 200, description = "The operation has ended", body = Success<Operation>),
        (status = 202, description = "The operation is ending", body = Success<Operation>), Errors))]
pub async fn cancel(
    State(app): State<App>,
    Path(text): Path,
    Params(params): Params<WaitParams>,
) -> Answer<Operation> {
    let (id, wait) = (id(&text)?, params.seconds()?);
    let operation = app.driver.ask(|reply| Event::Cancel(id, reply)).await?;
    answer(&app, operation, wait).await
}

/// Hold an operation that moves bytes
///
/// What is in flight ends, nothing new begins. Transfers, copies and defragmentations can be paused.
#[utoipa::path(post, path = "/api/operations/{operationId}/pause", tag = "operations",
    params(("operationId" = OperationId, Path), IdempotencyKey),
    responses((status = 200, body = Success<Operation>), Errors))]
pub async fn pause(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Operation> {
    let id = id(&text)?;
    ok(app.driver.ask(|reply| Event::Pause(id, true, reply)).await?)
}

/// Let a paused operation go on
#[utoipa::path(post, path = "/api/operations/{operationId}/resume", tag = "operations",
    params(("operationId" = OperationId, Path), IdempotencyKey),
    responses((status = 200, body = Success<Operation>), Errors))]
pub async fn resume(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Operation> {
    let id = id(&text)?;
    ok(app.driver.ask(|reply| Event::Pause(id, false, reply)).await?)
}
