//! Keeps web pages out: a page that a browser shows must not reach the daemon by a name that resolves to loopback.

use axum::extract::Request;
use axum::http::{HeaderMap, Method, header};
use vramd_api::{ApiError, ErrorCode};

use super::extract::Peer;

/// On TCP the `Host` has to be loopback, and an `Origin` has to be the daemon's own.
pub fn check(request: &Request, port: Option<u16>) -> Result<(), ApiError> {
    let local = request.extensions().get::<Peer>().is_some_and(|peer| peer.0.uid.is_some());
    if !local {
        check_headers(request.headers(), port)?;
    }
    if request.method() == Method::OPTIONS {
        return Err(ApiError::new(
            ErrorCode::MethodNotAllowed,
            "OPTIONS is not answered: pages of others may not call",
        ));
    }
    Ok(())
}

fn check_headers(headers: &HeaderMap, port: Option<u16>) -> Result<(), ApiError> {
    let denied = |what: &str, value: &str| {
        ApiError::new(ErrorCode::PermissionDenied, format!("the {what} {value:?} is not this daemon"))
            .hint("call it as 127.0.0.1, [::1] or localhost")
    };
    if let Some(host) = headers.get(header::HOST) {
        let host = host.to_str().unwrap_or("?");
        if !is_loopback(host) {
            return Err(denied("Host", host));
        }
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.to_str().unwrap_or("?");
        let host = origin.strip_prefix("http://").unwrap_or("?");
        let same_port = port.is_none_or(|port| port_of(host) == Some(port));
        if !is_loopback(host) || !same_port {
            return Err(denied("Origin", origin));
        }
    }
    Ok(())
}

fn port_of(host: &str) -> Option<u16> {
    host.rsplit_once(':').map_or(Some(80), |(_, port)| port.parse().ok())
}

fn is_loopback(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(address, _)| {
            address.parse::<std::net::Ipv6Addr>().is_ok_and(|address| address.is_loopback())
        });
    }
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_reach_the_daemon() {
        for good in ["127.0.0.1:8726", "localhost", "LOCALHOST:1", "[::1]:8726", "127.9.9.9"] {
            assert!(is_loopback(good), "{good}");
        }
        for bad in
            ["example.com", "127.0.0.1.example.com", "[::2]:1", "10.0.0.1", "", "localhost.example", "[::1"]
        {
            assert!(!is_loopback(bad), "{bad}");
        }
    }

    #[test]
    fn an_origin_has_to_be_our_own() {
        let headers = |origin: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().expect("a header"));
            headers
        };
        assert!(check_headers(&headers("http://127.0.0.1:8726"), Some(8726)).is_ok());
        for bad in ["http://127.0.0.1:3000", "https://evil.example", "null", "http://evil.example:8726"] {
            assert!(check_headers(&headers(bad), Some(8726)).is_err(), "{bad}");
        }
    }
}
