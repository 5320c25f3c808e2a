//! Reading requests, with errors in our envelope: bodies, queries, callers.

use axum::body::{Body as HttpBody, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::{header, request::Parts};
use serde::de::DeserializeOwned;
use vramd_api::{ApiError, ErrorCode};

use super::reply::Refusal;
use super::{App, MAX_BODY_BYTES};
use crate::driver::Caller;

/// A JSON body; every unknown field is refused by name.
#[derive(Debug)]
pub struct Body<T>(pub T);

/// A JSON body that may be left out.
#[derive(Debug)]
pub struct OptionalBody<T>(pub T);

/// The query; every unknown parameter is refused by name.
#[derive(Debug)]
pub struct Params<T>(pub T);

/// The one name in the path.
#[derive(Debug)]
pub struct Path(pub String);

/// The query of a call that takes none: `Params<NoParams>`.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// The peer of a connection; the server puts one into each request.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub Caller);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &App) -> Result<Self, Refusal> {
        require_json(&request)?;
        Ok(Self(parse(&read(request.into_body()).await?)?))
    }
}

impl<T: DeserializeOwned + Default> FromRequest<App> for OptionalBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &App) -> Result<Self, Refusal> {
        let json = require_json(&request);
        let bytes = read(request.into_body()).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        json?;
        Ok(Self(parse(&bytes)?))
    }
}

impl<T: DeserializeOwned> FromRequestParts<App> for Params<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Refusal> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(params)| Self(params))
            .map_err(|error| {
                let text =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                Refusal(ApiError::invalid("query", format!("the query cannot be read: {text}")))
            })
    }
}

impl FromRequestParts<App> for Path {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        axum::extract::Path::from_request_parts(parts, app)
            .await
            .map(|axum::extract::Path(name)| Self(name))
            .map_err(|error| Refusal(ApiError::invalid("path", error.body_text())))
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Peer>().map_or(Caller { uid: None }, |peer| peer.0))
    }
}

/// How long a body may take to arrive.
const BODY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Reads a body up to the limit.
pub async fn read(body: HttpBody) -> Result<axum::body::Bytes, ApiError> {
    let whole = tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY_BYTES)).await.map_err(|_| {
        ApiError::new(
            ErrorCode::Timeout,
            format!("the body did not arrive within {} seconds", BODY_TIMEOUT.as_secs()),
        )
        .hint("send the whole body at once")
    })?;
    whole.map_err(|error| {
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            if cause.to_string().contains("length limit") {
                return ApiError::new(
                    ErrorCode::PayloadTooLarge,
                    format!("the body has more than {MAX_BODY_BYTES} bytes"),
                )
                .detail("limitBytes", MAX_BODY_BYTES);
            }
            source = cause.source();
        }
        ApiError::invalid("body", "the body could not be read to its end")
    })
}

fn require_json(request: &Request) -> Result<(), ApiError> {
    let given = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media = given.and_then(|value| value.split(';').next()).map(str::trim);
    if media.is_some_and(|media| media.eq_ignore_ascii_case("application/json")) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::UnsupportedMediaType,
        format!("the Content-Type is {}, not application/json", given.unwrap_or("missing")),
    )
    .hint("send the header Content-Type: application/json"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    const OBJECT: &str = "the body has to be one JSON object";
    // Serde would read an array as the values of the fields in their order.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(ApiError::invalid("body", "body: it is no JSON object").hint(OBJECT));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let text = inner.to_string();
        let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
        let field = match text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
            Some(missing) if path == "." => missing.to_owned(),
            Some(missing) => format!("{path}.{missing}"),
            None if path == "." || path == "?" => "body".to_owned(),
            None => path,
        };
        let named =
            if text.contains(&format!("`{field}`")) { text.to_owned() } else { format!("{field}: {text}") };
        let error = ApiError::invalid(&field, named);
        if inner.is_syntax() || inner.is_eof() { error.hint(OBJECT) } else { error }
    })?;
    deserializer.end().map_err(|_| ApiError::invalid("body", "body: there is more after the JSON value"))?;
    Ok(value)
}
