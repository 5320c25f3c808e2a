//! Answers: the envelope, the request id, and errors of routing.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::IntoResponses;
use uuid::Uuid;
use vramd_api::{ApiError, ErrorCode, Failure, Success};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids of callers are replaced by our own.
const MAX_REQUEST_ID: usize = 128;

tokio::task_local! {
    static CURRENT: String;
}

/// `data` with a status.
#[derive(Debug)]
pub struct Reply<T>(pub StatusCode, pub T);

/// An error that a handler answers with `?`.
#[derive(Debug)]
pub struct Refusal(pub ApiError);

pub type Answer<T> = Result<Reply<T>, Refusal>;

/// What any call may answer besides what it lists.
#[derive(IntoResponses)]
pub enum Errors {
    /// Any error, in the same envelope; `error.code` tells which, `error.hint` what to do.
    #[response(status = "default")]
    #[allow(dead_code)] // only its description is used
    Any(Failure),
}

#[allow(clippy::unnecessary_wraps)] // every handler ends with it
pub fn ok<T>(data: T) -> Answer<T> {
    Ok(Reply(StatusCode::OK, data))
}

#[allow(clippy::unnecessary_wraps)] // as above
pub fn created<T>(data: T) -> Answer<T> {
    Ok(Reply(StatusCode::CREATED, data))
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        let envelope = Success { success: true, request_id: request_id(), data: self.1 };
        json(self.0, &envelope)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let later = matches!(status.as_u16(), 429 | 503);
        let envelope = Failure { success: false, request_id: request_id(), error };
        let mut response = json(status, &envelope);
        if later {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

fn json(status: StatusCode, envelope: &impl Serialize) -> Response {
    let bytes = serde_json::to_vec(envelope).expect("wire bodies are plain data");
    let json = HeaderValue::from_static("application/json");
    (status, [(header::CONTENT_TYPE, json)], Body::from(bytes)).into_response()
}

fn request_id() -> String {
    CURRENT.try_with(Clone::clone).unwrap_or_default()
}

/// Goes on with the present request's id in another task.
pub fn in_this_request<F: Future>(work: F) -> impl Future<Output = F::Output> {
    CURRENT.scope(request_id(), work)
}

/// Gives every request an id: the caller's `X-Request-Id` if it has a sound one, else a new one.
pub async fn with_request_id(request: Request, answer: impl AsyncFnOnce(Request) -> Response) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let id = given
        .filter(|id| !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(|| Uuid::now_v7().to_string(), ToOwned::to_owned);
    let shown = HeaderValue::from_str(&id);
    let mut response = CURRENT.scope(id, answer(request)).await;
    if let Ok(value) = shown {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

pub async fn not_found(uri: Uri) -> Refusal {
    Refusal(
        ApiError::new(ErrorCode::NotFound, format!("there is no path {}", uri.path()))
            .hint("GET /api/openapi.json lists the paths, /docs shows them"),
    )
}

pub async fn method_not_allowed(method: Method, uri: Uri) -> Refusal {
    Refusal(
        ApiError::new(ErrorCode::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
            .hint("GET /api/openapi.json lists the paths and their methods"),
    )
}
