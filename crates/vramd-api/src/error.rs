//! The envelope around every answer, and the closed list of error codes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])* $variant:ident = $status:literal, $retryable:literal;)*) => {
        /// What went wrong. The list is closed: a client may match on it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
        pub enum ErrorCode {
            $($(#[doc = $doc])* $variant,)*
        }

        impl ErrorCode {
            /// Every code, in order of status.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The HTTP status that carries this code.
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Whether the same request may succeed later without a change.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$variant => $retryable,)* }
            }

            /// What the code means, in one sentence; the source of `docs/errors.md`.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*).trim_ascii(),)* }
            }
        }
    };
}

error_codes! {
    /// A field, parameter or header has a value that is not allowed; `details.field` names it.
    InvalidArgument = 400, false;
    /// A model file is not what its format demands; `details.path` names it.
    InvalidModelFile = 400, false;
    /// The path lies outside the configured model roots, or the caller does not own what it names.
    PermissionDenied = 403, false;
    /// Nothing has that id, name or path.
    NotFound = 404, false;
    /// The path exists, but not with that HTTP method.
    MethodNotAllowed = 405, false;
    /// The thing is in a state that does not allow this: the name is taken, it is in use, it is being released.
    Conflict = 409, true;
    /// The model is registered, but not resident on that device.
    NotResident = 409, true;
    /// The body or a frame is larger than the limit.
    PayloadTooLarge = 413, false;
    /// The body is not JSON by its Content-Type.
    UnsupportedMediaType = 415, false;
    /// The Idempotency-Key was used before with another request.
    IdempotencyMismatch = 422, false;
    /// Too many connections, waiting requests or registered things; `details.limit` says how many are allowed.
    TooManyRequests = 429, true;
    /// The operation was cancelled.
    Cancelled = 499, false;
    /// A bug in vramd: please report it with the log.
    Internal = 500, false;
    /// A worker did not do what it was asked, or answered what nobody can read; `details.workerCode` is its own word for it.
    WorkerFailed = 502, false;
    /// A model file could not be read: the disk or the file system failed.
    ModelReadFailed = 503, true;
    /// What arrived on a device is not what was sent to it. The old bytes are as they were.
    ChecksumMismatch = 503, true;
    /// The device is gone or its driver failed.
    DeviceLost = 503, true;
    /// The daemon's own store could not be written: the disk is full or failed. Nothing was changed.
    StoreFailed = 503, true;
    /// The daemon is starting or stopping, or a process that was to do it ended meanwhile or does not answer.
    Unavailable = 503, true;
    /// The wait ended before there was room, and `details` has the same figures as `INSUFFICIENT_MEMORY`; or before an answer was there.
    Timeout = 504, true;
    /// There is not enough memory; `details` says how much was asked, is free and who holds the rest.
    InsufficientMemory = 507, true;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// An error as every interface shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
#[serde(rename_all = "camelCase")]
pub struct ApiError {
    pub code: ErrorCode,
    /// What happened, to what.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Figures and names for programs; the keys depend on the code.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    #[schema(value_type = Object)]
    pub details: serde_json::Map<String, serde_json::Value>,
    /// The HTTP status of `code`.
    pub status: u16,
    /// Whether the same request may succeed later without a change.
    pub retryable: bool,
}

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            details: serde_json::Map::new(),
            status: code.status(),
            retryable: code.retryable(),
        }
    }

    /// A value that is not allowed in `field`.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
            .hint("/docs and GET /api/openapi.json say what is allowed")
            .detail("field", field)
    }

    /// No `what` (device, allocation, model, operation) is called `name`.
    pub fn not_found(what: &str, name: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::NotFound, format!("there is no {what} {name}"))
            .hint(format!("`vramd {what}s` lists those that are there"))
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn detail(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }
}

/// The envelope of an answer that succeeded.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Success<T> {
    /// Always true.
    pub success: bool,
    pub request_id: String,
    pub data: T,
}

/// The envelope of an answer that did not.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Always false.
    pub success: bool,
    pub request_id: String,
    pub error: ApiError,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_printed_as_they_are_written_in_json() {
        assert_eq!(ErrorCode::InsufficientMemory.to_string(), "INSUFFICIENT_MEMORY");
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(code).ok(), Some(format!("\"{code}\"")));
            assert!(!code.meaning().is_empty());
        }
    }
}
