//! A typed client: every call of the HTTP interface, and the event stream. The attach socket has `vramd-attach`.
//!
//! Owns addresses, the envelope and what can go wrong on the way. It keeps no state beyond the connections
//! and does not retry: only the caller knows whether a second try is wanted.

mod calls;
mod error;
mod events;

use std::path::PathBuf;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use calls::AllocationFilter;
pub use error::ClientError;

use crate::{Failure, Success};

/// Time enough for a loopback or a local network; work that takes long is an operation.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What names a local socket as a server, before its path.
const LOCAL: &str = if cfg!(windows) { "pipe:" } else { "unix:" };

/// The path of a local socket given as a server, as in `unix:/run/vramd/vramd.sock` or, on Windows, `pipe:\\.\pipe\vramd`.
pub fn local_path(server: &str) -> Option<PathBuf> {
    if cfg!(windows) {
        return server.strip_prefix(LOCAL).map(PathBuf::from);
    }
    server.strip_prefix(LOCAL).map(|path| PathBuf::from(path.strip_prefix("//").unwrap_or(path)))
}

#[cfg(unix)]
fn local(builder: reqwest::ClientBuilder, path: PathBuf) -> reqwest::ClientBuilder {
    builder.unix_socket(path)
}

#[cfg(windows)]
fn local(builder: reqwest::ClientBuilder, path: PathBuf) -> reqwest::ClientBuilder {
    builder.windows_named_pipe(path)
}

/// Speaks to one daemon. Cheap to clone; connections are kept and shared.
#[derive(Debug, Clone)]
pub struct Client {
    server: String,
    base: Url,
    http: reqwest::Client,
}

impl Client {
    /// A client for `http://host:port`, or `unix:/path` (on Windows `pipe:\\.\pipe\name`). Nothing is sent before the first call.
    pub fn new(server: &str) -> Result<Self, ClientError> {
        let bad = |reason: String| ClientError::Server { server: server.to_owned(), reason };
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy();
        let base = if let Some(path) = local_path(server) {
            if path.as_os_str().is_empty() {
                return Err(bad("the path of the socket is missing".to_owned()));
            }
            builder = local(builder, path);
            Url::parse("http://localhost").map_err(|error| bad(error.to_string()))?
        } else {
            if !server.starts_with("http://") {
                return Err(bad(format!("it does not begin with http:// or {LOCAL}")));
            }
            Url::parse(server).map_err(|error| bad(error.to_string()))?
        };
        let http = builder.build().map_err(|error| bad(error.to_string()))?;
        Ok(Self { server: server.to_owned(), base, http })
    }

    /// As given to [`Client::new`].
    pub fn server(&self) -> &str {
        &self.server
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path);
        }
        self.http.request(method, url)
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, ClientError> {
        self.send(self.request(Method::GET, path)).await
    }

    async fn get_with<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(self.request(Method::GET, path).query(query)).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    async fn delete<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, ClientError> {
        self.send(self.request(Method::DELETE, path)).await
    }

    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = request.send().await.map_err(|error| self.transport(error))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.transport(error))?;
        if !status.is_success() {
            return Err(self.refusal(status, &body));
        }
        serde_json::from_slice::<Success<T>>(&body)
            .map(|answer| answer.data)
            .map_err(|error| self.protocol(format!("the answer is not what this version expects: {error}")))
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<Failure>(body) {
            Ok(Failure { error, request_id, .. }) => ClientError::Api { error: Box::new(error), request_id },
            Err(_) => self.protocol(format!("it answered {status} without an error of vramd")),
        }
    }

    fn transport(&self, error: reqwest::Error) -> ClientError {
        let server = self.server.clone();
        if error.is_connect() {
            ClientError::Connect { server, source: error.without_url() }
        } else {
            ClientError::Broken { server, source: error.without_url() }
        }
    }

    fn protocol(&self, what: String) -> ClientError {
        ClientError::Protocol { server: self.server.clone(), what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_checked_before_anything_is_sent() {
        let (local, elsewhere) = if cfg!(windows) {
            ([r"pipe:\\.\pipe\vramd", r"pipe:\\.\pipe\a b"], "unix:/run/a")
        } else {
            assert_eq!(local_path("unix:///run/a"), Some(PathBuf::from("/run/a")));
            (["unix:/run/vramd/vramd.sock", "unix:///run/a"], r"pipe:\\.\pipe\vramd")
        };
        for good in ["http://127.0.0.1:8726", "http://[::1]:1/"].into_iter().chain(local) {
            assert!(Client::new(good).is_ok(), "{good}");
        }
        for bad in ["", "127.0.0.1:8726", "https://localhost", LOCAL, elsewhere, "ftp://x", "/run/vramd.sock"]
        {
            assert!(matches!(Client::new(bad), Err(ClientError::Server { .. })), "{bad}");
        }
    }

    #[test]
    fn names_in_paths_cannot_leave_their_place() {
        let client = Client::new("http://127.0.0.1:8726/").expect("a good address");
        let request = client.request(Method::GET, &["api", "models", "../x?y#z"]).build().expect("a request");
        assert_eq!(request.url().as_str(), "http://127.0.0.1:8726/api/models/..%2Fx%3Fy%23z");
    }
}
