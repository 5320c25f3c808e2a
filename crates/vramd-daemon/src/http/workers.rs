//! `/api/workers`.

use std::time::{Duration, Instant};

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use vramd_api::{
    ApiError, CallWorker, ErrorCode, StartWorker, Success, Worker, WorkerAnswer, WorkerPage, WorkerState,
};

use super::App;
use super::extract::{Body, NoParams, Params, Path};
use super::idempotency::IdempotencyKey;
use super::reply::{Answer, Errors, created, ok};
use crate::driver::{Caller, Event, named_worker};
use crate::requests;

const DEFAULT_CALL_SECONDS: u64 = 30;
const MAX_CALL_SECONDS: u64 = 3600;
const MAX_ACTION: usize = 128;

/// All workers
///
/// Those that the daemon started and those that joined, also those that have ended lately.
#[utoipa::path(get, path = "/api/workers", tag = "workers",
    responses((status = 200, body = Success<WorkerPage>), Errors))]
pub async fn list(State(app): State<App>, _: Params<NoParams>) -> Answer<WorkerPage> {
    let snapshot = app.driver.snapshot();
    ok(WorkerPage { workers: snapshot.workers.values().map(|worker| worker.to_api()).collect() })
}

/// Start a worker
///
/// One of the programs that the configuration allows, as the daemon's user. Answers as soon as its process is about to be started:
/// `state` tells when it is `Ready`, or why it is not.
#[utoipa::path(post, path = "/api/workers", tag = "workers", request_body = StartWorker,
    params(IdempotencyKey),
    responses((status = 201, body = Success<Worker>), Errors))]
pub async fn start(
    State(app): State<App>,
    caller: Caller,
    _: Params<NoParams>,
    Body(body): Body<StartWorker>,
) -> Answer<Worker> {
    if !caller.is_admin() {
        let error = ApiError::new(ErrorCode::PermissionDenied, "workers run as the daemon's user");
        return Err(error.hint("ask as that user; a program that you start yourself may join").into());
    }
    requests::environment(&body, &app.programs)?;
    let launch = requests::start_worker(body, &app.programs, &app.driver.devices)?;
    created(app.driver.ask(|reply| Event::StartWorker(Box::new(launch), reply)).await?)
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub struct GetParams {
    /// `logs`: also the last lines that it wrote.
    #[param(required = false, value_type = String, example = "logs")]
    include: Option<String>,
}

/// One worker
#[utoipa::path(get, path = "/api/workers/{worker}", tag = "workers",
    params(("worker" = String, Path, description = "Its id or its name"), GetParams),
    responses((status = 200, body = Success<Worker>), Errors))]
pub async fn get(
    State(app): State<App>,
    Path(name): Path,
    caller: Caller,
    Params(params): Params<GetParams>,
) -> Answer<Worker> {
    let snapshot = app.driver.snapshot();
    let worker = named_worker(&snapshot.workers, &name)?;
    let mut shown = worker.to_api();
    match params.include.as_deref() {
        None => {}
        Some("logs") => {
            worker.may(caller)?;
            shown.logs = Some(worker.logs());
        }
        Some(other) => {
            let what = format!("include {other:?} is not known");
            return Err(ApiError::invalid("include", what).hint("the only one is logs").into());
        }
    }
    ok(shown)
}

/// End a worker
///
/// It is asked to end, then told by a signal, then killed with all the processes that it started; answers once it has ended. One that
/// has ended is taken off the list, and not started again.
#[utoipa::path(delete, path = "/api/workers/{worker}", tag = "workers",
    params(("worker" = String, Path, description = "Its id or its name")),
    responses((status = 200, body = Success<Worker>), Errors))]
pub async fn stop(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path,
    _: Params<NoParams>,
) -> Answer<Worker> {
    ok(app.driver.ask(|reply| Event::StopWorker(name, caller, reply)).await?)
}

/// Ask a worker to do something
///
/// One of its `actions`, as the worker protocol has them, but for those by which the daemon leads its life. Many may be under way
/// at once. When the caller hangs up, or time is over, the worker is told that nobody waits.
#[utoipa::path(post, path = "/api/workers/{worker}/call", tag = "workers", request_body = CallWorker,
    params(("worker" = String, Path, description = "Its id or its name")),
    responses((status = 200, body = Success<WorkerAnswer>), Errors))]
pub async fn call(
    State(app): State<App>,
    Path(name): Path,
    caller: Caller,
    _: Params<NoParams>,
    Body(body): Body<CallWorker>,
) -> Answer<WorkerAnswer> {
    let seconds = body.timeout_seconds.unwrap_or(DEFAULT_CALL_SECONDS);
    if !(1..=MAX_CALL_SECONDS).contains(&seconds) {
        let what = format!("timeoutSeconds {seconds} is not from 1 to {MAX_CALL_SECONDS}");
        return Err(ApiError::invalid("timeoutSeconds", what).into());
    }
    if body.action.is_empty() || body.action.len() > MAX_ACTION || body.action.chars().any(char::is_control) {
        return Err(ApiError::invalid("action", "action is no name of one").into());
    }
    let snapshot = app.driver.snapshot();
    let worker = named_worker(&snapshot.workers, &name)?.clone();
    drop(snapshot);
    worker.may(caller)?;
    let greeting = worker
        .greeting
        .as_deref()
        .filter(|_| matches!(worker.state, WorkerState::Ready | WorkerState::Unresponsive));
    let Some(greeting) = greeting else {
        let what = format!("worker {} is {:?}", worker.name, worker.state);
        let hint = match worker.state {
            WorkerState::Starting | WorkerState::Restarting => "ask once it is Ready".to_owned(),
            _ => format!("`vramd workers show {}` says how it ended", worker.name),
        };
        return Err(ApiError::new(ErrorCode::Conflict, what).hint(hint).into());
    };
    let is_ours = |action: &str| matches!(action, "hello" | "shutdown" | "cancel");
    if is_ours(&body.action) || !greeting.actions.contains(&body.action) {
        let what = if is_ours(&body.action) { "is the daemon's to ask" } else { "is none of its actions" };
        let error = ApiError::invalid("action", format!("{} {what}", body.action));
        let theirs: Vec<_> =
            greeting.actions.iter().map(String::as_str).filter(|action| !is_ours(action)).collect();
        return Err(error.hint(format!("worker {} has: {}", worker.name, theirs.join(", "))).into());
    }
    let begun = Instant::now();
    let answer = worker.link.call(&body.action, &body.data, Duration::from_secs(seconds)).await;
    let data = answer.map_err(|error| {
        let log = format!("its log may say more: `vramd workers logs {}`", worker.name);
        let silent = error.code == ErrorCode::WorkerFailed && error.hint.is_none();
        if silent { error.hint(log) } else { error }
    })?;
    let milliseconds = begun.elapsed().as_secs_f64() * 1000.0;
    ok(WorkerAnswer { worker_id: worker.id, action: body.action, data, milliseconds })
}
