//! `Idempotency-Key`: a POST that is sent again gets the first answer, and does nothing.
//!
//! Answers are kept for a day, ten thousand at most, and not over a restart. While the first runs, the second is
//! refused with 409; the same key on another request is refused with 422. Refusals whose cause may pass are not kept:
//! conflicts, too many requests, server errors.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tower::Service as _;
use utoipa::IntoParams;
use vramd_api::{ApiError, ErrorCode};

use super::App;
use super::extract::{Peer, read};
use super::reply::{Refusal, in_this_request};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MAX_KEY: usize = 256;
const KEPT: usize = 10_000;
const KEPT_FOR: Duration = Duration::from_hours(24);

/// The header as the document shows it.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
pub struct IdempotencyKey {
    /// Sent again with the same body, it gets the first answer
    #[param(rename = "Idempotency-Key", required = false, pattern = "^[!-~]{1,256}$")]
    #[allow(dead_code)] // only its description is used
    key: Option<String>,
}

/// The keys seen, and their answers.
#[derive(Debug, Default)]
pub struct Keys(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    entries: HashMap<Id, Entry>,
    order: VecDeque<(Instant, Id)>,
}

/// A key belongs to the caller that sent it.
type Id = (Option<u32>, String);

#[derive(Debug)]
struct Entry {
    request: blake3::Hash,
    answer: Option<(StatusCode, Bytes)>,
}

/// Forgets the key of a request that ended without an answer: its client went away.
struct Claim<'a> {
    keys: &'a Keys,
    id: Option<Id>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.keys.seen().entries.remove(&id);
        }
    }
}

impl Keys {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a key, or answers what it was used for.
    fn claim(&self, id: &Id, request: blake3::Hash) -> Result<Option<(StatusCode, Bytes)>, ApiError> {
        let mut seen = self.seen();
        let now = Instant::now();
        while seen.order.front().is_some_and(|(at, _)| now.duration_since(*at) > KEPT_FOR)
            || seen.order.len() > KEPT
        {
            if let Some((_, old)) = seen.order.pop_front() {
                seen.entries.remove(&old);
            }
        }
        match seen.entries.get(id) {
            Some(entry) if entry.request != request => Err(ApiError::new(
                ErrorCode::IdempotencyMismatch,
                "this Idempotency-Key was used for another request",
            )
            .hint("use a new key for a new request")),
            Some(Entry { answer: None, .. }) => Err(ApiError::new(
                ErrorCode::Conflict,
                "the first request with this Idempotency-Key is still running",
            )
            .hint("wait for it, then send this again")),
            Some(Entry { answer: Some(answer), .. }) => Ok(Some(answer.clone())),
            None => {
                seen.entries.insert(id.clone(), Entry { request, answer: None });
                Ok(None)
            }
        }
    }
}

/// Whether the same request would be answered so again: not when the cause may pass.
fn is_kept(status: StatusCode) -> bool {
    !status.is_server_error() && !matches!(status, StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS)
}

/// Answers by `router`, or with the answer that was given before.
pub async fn once(app: &App, request: Request, router: Router) -> Response {
    let Some(key) = request.headers().get(&KEY).filter(|_| request.method() == Method::POST) else {
        return answer(router, request).await;
    };
    let key = match key.to_str() {
        Ok(key) if (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic()) => {
            key.to_owned()
        }
        _ => {
            let error = ApiError::invalid(
                "Idempotency-Key",
                format!("an Idempotency-Key has 1 to {MAX_KEY} printable ASCII characters without spaces"),
            );
            return Refusal(error).into_response();
        }
    };
    let (parts, body) = request.into_parts();
    let body = match read(body).await {
        Ok(body) => body,
        Err(error) => return Refusal(error).into_response(),
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(parts.uri.to_string().as_bytes()).update(&[0]).update(&body);
    let id = (parts.extensions.get::<Peer>().and_then(|peer| peer.0.uid), key);
    match app.idempotency.claim(&id, hasher.finalize()) {
        Err(error) => Refusal(error).into_response(),
        Ok(Some((status, body))) => {
            let json = HeaderValue::from_static("application/json");
            let replayed = HeaderValue::from_static("true");
            (status, [(header::CONTENT_TYPE, json), (REPLAYED, replayed)], body).into_response()
        }
        Ok(None) => {
            // A client that goes away must not undo what its key will be asked for again: the request runs on.
            let inner = app.clone();
            let task = tokio::spawn(in_this_request(async move {
                let mut claim = Claim { keys: &inner.idempotency, id: Some(id.clone()) };
                let response = answer(router, Request::from_parts(parts, Body::from(body))).await;
                let (parts, body) = response.into_parts();
                let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else {
                    return Response::from_parts(parts, Body::empty());
                };
                if is_kept(parts.status) {
                    claim.id = None;
                    let mut seen = inner.idempotency.seen();
                    if let Some(entry) = seen.entries.get_mut(&id) {
                        entry.answer = Some((parts.status, body.clone()));
                        seen.order.push_back((Instant::now(), id));
                    }
                }
                Response::from_parts(parts, Body::from(body))
            }));
            task.await.unwrap_or_else(|_| {
                Refusal(ApiError::new(ErrorCode::Internal, "the request failed; see the daemon's log"))
                    .into_response()
            })
        }
    }
}

async fn answer(mut router: Router, request: Request) -> Response {
    let Ok(response) = router.call(request).await;
    response
}
