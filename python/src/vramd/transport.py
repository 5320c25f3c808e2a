"""HTTP to the daemon, over TCP or its Unix socket: one connection for each request.

A fresh connection costs a tenth of a millisecond on one machine, and spares every question about threads,
forks, and requests that a kept connection may or may not have delivered.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from .errors import ConnectionFailed, ProtocolError, Timeout, VramdError, from_body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Transport:
    """Where the daemon is, and how a request gets there and back."""

    def __init__(self, server: str, timeout: float) -> None:
        self.server = server
        self.timeout = timeout
        self._unix_path: str | None = None
        self._host, self._port = "", 0
        if server.startswith("unix:"):
            self._unix_path = server.removeprefix("unix:")
            if not self._unix_path:
                raise ValueError("unix: needs a path, such as unix:/run/vramd/vramd.sock")
            return
        url = urlsplit(server)
        if url.scheme != "http" or not url.hostname or url.path not in ("", "/") or url.query:
            raise ValueError(f"{server!r} is no server: write http://HOST:PORT or unix:PATH")
        self._host, self._port = url.hostname, url.port or 80

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        wait: float = 0,
    ) -> Any:
        """Sends a request and opens the envelope of its answer; ``wait`` comes on top of the timeout."""
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        payload = None if body is None else json.dumps(body).encode()
        with self.open(method, _with_query(path, query), payload, headers, self.timeout + wait) as response:
            data = response.read()
        return _unwrap(response, data)

    @contextmanager
    def open(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(timeout)
        try:
            connection.request(method, path, body, dict(headers))
            yield connection.getresponse()
        except TimeoutError as error:
            raise Timeout(
                f"{method} {path}: no answer from {self.server} in {timeout:g} s", retryable=True
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionFailed(
                f"{method} {path}: no answer from {self.server}: {error or type(error).__name__}",
                hint="is vramd serve running there?",
                retryable=True,
            ) from error
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._unix_path is not None:
            return _UnixConnection(self._unix_path, timeout)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)


def failure(response: http.client.HTTPResponse, data: bytes) -> VramdError:
    """The error in an answer that is not a success."""
    envelope = _parse(response, data)
    if "error" not in envelope:
        return ProtocolError(f"the server answered {response.status} without an error body")
    return from_body(envelope["error"], envelope.get("requestId"))


def _unwrap(response: http.client.HTTPResponse, data: bytes) -> Any:
    if response.status >= 400:
        raise failure(response, data)
    envelope = _parse(response, data)
    return envelope["data"] if envelope.get("success") is True and "data" in envelope else envelope


def _parse(response: http.client.HTTPResponse, data: bytes) -> dict[str, Any]:
    try:
        envelope = json.loads(data)
    except ValueError:
        envelope = None
    if not isinstance(envelope, dict):
        raise ProtocolError(
            f"the server answered {response.status} with something that is not vramd's JSON",
            hint="does the address belong to another server?",
        )
    return envelope


def _with_query(path: str, query: Mapping[str, Any] | None) -> str:
    pairs = {key: _text(value) for key, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(pairs)}" if pairs else path


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
