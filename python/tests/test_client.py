"""What the client does with answers that a healthy daemon does not give; the rest is in test_daemon.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import vramd

Answer = Callable[[BaseHTTPRequestHandler], None]


class FakeServer(ThreadingHTTPServer):
    """Answers each request with the next of its scripts, and keeps what was asked."""

    def __init__(self) -> None:
        self.scripts: list[Answer] = []
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), FakeHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def then(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)

        self.scripts.append(answer)

    def then_drop(self) -> None:
        self.scripts.append(lambda handler: None)

    def then_events(self, text: str) -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.end_headers()
            handler.wfile.write(text.encode())

        self.scripts.append(answer)


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path, dict(self.headers), body))
        self.server.scripts.pop(0)(self)

    do_GET = do_POST = do_PUT = do_DELETE = _answer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


def ok(data: Any) -> dict[str, Any]:
    return {"success": True, "requestId": "r-1", "data": data}


def refused(code: str, status: int, **more: Any) -> dict[str, Any]:
    error = {"code": code, "message": f"it said {code}", "status": status, "retryable": False, **more}
    return {"success": False, "requestId": "r-7", "error": error}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("NOT_FOUND", 404, vramd.NotFound),
        ("CONFLICT", 409, vramd.Conflict),
        ("NOT_RESIDENT", 409, vramd.NotResident),
        ("TIMEOUT", 504, vramd.Timeout),
        ("INSUFFICIENT_MEMORY", 507, vramd.InsufficientMemory),
        ("CANCELLED", 499, vramd.Cancelled),
        ("A_CODE_OF_TOMORROW", 500, vramd.VramdError),
    ],
)
def test_a_refusal_carries_all_that_the_daemon_said(
    server: FakeServer, code: str, status: int, kind: type[vramd.VramdError]
) -> None:
    server.then(status, refused(code, status, hint="do this", details={"free": 7}))
    with pytest.raises(kind, match=rf"it said {code} \[{code}\]\nhint: do this") as caught:
        vramd.Client(server.url).devices()
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.status, error.request_id, error.details) == (code, status, "r-7", {"free": 7})


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (502, b"Bad Gateway"), (500, b"{}"), (200, [])]
)
def test_an_answer_of_another_server_is_named(server: FakeServer, status: int, body: Any) -> None:
    server.then(status, body)
    with pytest.raises(vramd.ProtocolError, match="the server answered"):
        vramd.Client(server.url).devices()


def test_a_dropped_connection_and_no_server_are_connections_that_failed(server: FakeServer) -> None:
    server.then_drop()
    with pytest.raises(vramd.ConnectionFailed, match="GET /api/devices: no answer"):
        vramd.Client(server.url).devices()
    for nowhere in ("http://127.0.0.1:1", "unix:/nowhere/vramd.sock"):
        with pytest.raises(vramd.ConnectionFailed, match="is vramd serve running"):
            vramd.Client(nowhere).devices()


def test_a_server_that_says_nothing_is_a_timeout(server: FakeServer) -> None:
    released = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        released.wait(10)

    server.scripts.append(answer)
    with pytest.raises(vramd.Timeout):
        vramd.Client(server.url, timeout=0.05).devices()
    released.set()


@pytest.mark.parametrize("address", ["https://a", "localhost:8726", "http://a/b", "unix:", "http://"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match=r"http://HOST:PORT|unix:"):
        vramd.Client(address)


def test_only_what_was_given_is_sent(server: FakeServer) -> None:
    server.then(201, ok({}))
    server.then(200, ok({}))
    server.then(200, ok({}))
    client = vramd.Client(server.url)
    client.allocate(8, device="cpu:0", persistent=False, idempotency_key="once")
    client.allocations(persistent=True, page_size=3)
    client.set_limits("cpu:0", limit_bytes=None)
    (method, path, headers, body), listing, limits = server.requests
    assert (method, path) == ("POST", "/api/memory/allocations/allocate/cpu:0")
    assert json.loads(body) == {"sizeBytes": 8, "persistent": False}
    assert (headers["Idempotency-Key"], headers["Content-Type"]) == ("once", "application/json")
    assert listing[1] == "/api/memory/allocations?persistent=true&pageSize=3"
    assert json.loads(limits[3]) == {"limitBytes": None}


def test_names_cannot_leave_their_place_in_the_path(server: FakeServer) -> None:
    server.then(404, refused("NOT_FOUND", 404))
    with pytest.raises(vramd.NotFound):
        vramd.Client(server.url).model("../x?y#z")
    assert server.requests[0][1] == "/api/models/..%2Fx%3Fy%23z"


def operation(state: str, **more: Any) -> dict[str, Any]:
    return {"operationId": "op", "subject": "toy on cpu:0", "state": state, **more}


def test_a_load_that_fails_later_raises_its_error(server: FakeServer) -> None:
    server.then(202, ok(operation("Queued")))
    server.then(200, ok(operation("Running")))
    failure = refused("INSUFFICIENT_MEMORY", 507)["error"]
    server.then(200, ok(operation("Failed", error=failure)))
    seen: list[str] = []
    with pytest.raises(vramd.InsufficientMemory):
        vramd.Client(server.url).load("toy", progress=lambda operation: seen.append(operation["state"]))
    assert seen == ["Queued", "Running", "Failed"]


def test_a_wait_that_ends_first_leaves_the_operation_running(server: FakeServer) -> None:
    server.then(202, ok(operation("Running")))
    with pytest.raises(vramd.Timeout, match="goes on") as caught:
        vramd.Client(server.url).load("toy", timeout=0)
    assert caught.value.details == {"operationId": "op"}


def event(number: int) -> str:
    data = json.dumps({"id": str(number), "event": "model.loaded", "at": "", "data": {"n": number}})
    return f"id: {number}\nevent: model.loaded\ndata: {data}\n\n"


def test_events_resume_where_the_connection_broke(server: FakeServer) -> None:
    server.then_events(":\n\n" + event(1) + event(2) + event(3)[:20])
    server.then(503, refused("UNAVAILABLE", 503, retryable=True))
    server.then_events(event(3))
    with vramd.Client(server.url).events("0") as events:
        assert [next(events)["data"]["n"] for _ in range(3)] == [1, 2, 3]
    resumed = [headers.get("Last-Event-ID") for _, _, headers, _ in server.requests]
    assert resumed == ["0", "2", "2"]
    with pytest.raises(StopIteration):
        next(events)


def test_events_end_with_an_error_when_the_daemon_stays_away(server: FakeServer) -> None:
    server.then_events(event(1))
    server.then_drop()
    with vramd.Client(server.url).events(retry_seconds=0) as events:
        assert next(events)["id"] == "1"
        with pytest.raises(vramd.ConnectionFailed):
            next(events)
