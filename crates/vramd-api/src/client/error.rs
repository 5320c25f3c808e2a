//! What can go wrong between a client and the daemon.

use crate::ApiError;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon answered, and the answer is an error.
    #[error("{error}")]
    Api { error: Box<ApiError>, request_id: String },
    /// No connection could be made.
    #[error("no vramd answers at {server}")]
    Connect { server: String, source: reqwest::Error },
    /// The connection broke before the answer was complete.
    #[error("the connection to {server} broke")]
    Broken { server: String, source: reqwest::Error },
    /// What answered does not speak as this version of vramd does.
    #[error("what answers at {server} does not speak as this vramd does: {what}")]
    Protocol { server: String, what: String },
    /// The server's address cannot be used.
    #[error("{server:?} is not the address of a server: {reason}")]
    Server { server: String, reason: String },
}

impl ClientError {
    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Api { error, request_id } => error.hint.clone().or_else(|| {
                (error.status >= 500).then(|| format!("the daemon's log has more under request {request_id}"))
            }),
            Self::Connect { .. } => Some(
                "is it running? `vramd serve` starts it; --server or VRAMD_SERVER names another address"
                    .to_owned(),
            ),
            Self::Broken { .. } => Some("the daemon may have stopped: look at its log".to_owned()),
            Self::Protocol { .. } => {
                Some("compare `vramd --version` with the version of the daemon (GET /healthz)".to_owned())
            }
            Self::Server { .. } => {
                let local = if cfg!(windows) { r"pipe:\\.\pipe\vramd" } else { "unix:/run/vramd/vramd.sock" };
                Some(format!("write http://127.0.0.1:8726 or {local}"))
            }
        }
    }

    /// The daemon's error, if it is one.
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Api { error, .. } => Some(error),
            Self::Connect { .. } | Self::Broken { .. } | Self::Protocol { .. } | Self::Server { .. } => None,
        }
    }
}
