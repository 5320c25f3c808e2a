//! `/healthz` and `/readyz`.

use axum::extract::State;
use vramd_api::{ApiError, ErrorCode, Health, Success, VERSION};

use super::App;
use super::extract::{NoParams, Params};
use super::reply::{Answer, Errors, ok};

fn health() -> Health {
    Health { status: "ok".to_owned(), version: VERSION.to_owned() }
}

/// The process runs
#[utoipa::path(get, path = "/healthz", tag = "daemon", responses((status = 200, body = Success<Health>), Errors))]
pub async fn healthz(_: Params<NoParams>) -> Answer<Health> {
    ok(health())
}

/// The daemon serves: every device was measured
#[utoipa::path(get, path = "/readyz", tag = "daemon", responses((status = 200, body = Success<Health>), Errors))]
pub async fn readyz(State(app): State<App>, _: Params<NoParams>) -> Answer<Health> {
    let snapshot = app.driver.snapshot();
    if snapshot.ready() {
        return ok(health());
    }
    let what = if snapshot.stopping { "stopping" } else { "starting" };
    Err(ApiError::new(ErrorCode::Unavailable, format!("the daemon is {what}"))
        .hint("try again in a moment")
        .into())
}
