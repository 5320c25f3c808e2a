from __future__ import annotations

import json
import resource
import socket
import threading
from functools import partial
from typing import Any

import pytest

import vramd
from support import GOLDEN, PAGE, FakeDaemon, Row, attached_body, count_descriptors, memfd, until
from vramd import frames, kernel

KINDS = {
    "attach": frames.ATTACH,
    "attached": frames.ATTACHED,
    "error": frames.ERROR,
    "moved": frames.MOVED,
    "acknowledge": frames.ACKNOWLEDGE,
}
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
GOOD = [case for case in CASES if "kind" in case]
BAD = [case for case in CASES if "error" in case]
MESSAGES = {
    "magic": "does not begin with VRMD",
    "version": "speaks version 1",
    "kind": "no frame of kind",
    "body": "frame's body has",
    "descriptors": "announces",
}
ROWS = [("x", "F32", [2], 0, 8)]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["file"])
def test_golden_frames_read_as_listed_and_are_written_to_the_byte(case: dict[str, Any]) -> None:
    data = (GOLDEN / case["file"]).read_bytes()
    header = frames.decode_header(data[: frames.HEADER.size])
    body = data[frames.HEADER.size :]
    assert header == frames.Header(KINDS[case["kind"]], len(body), case["descriptors"])
    assert json.loads(body) == case["body"]
    assert frames.encode(header.kind, case["body"], header.descriptors) == data


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["file"])
def test_golden_frames_that_break_a_rule_are_refused_by_that_rule(case: dict[str, Any]) -> None:
    data = (GOLDEN / case["file"]).read_bytes()
    with pytest.raises(vramd.ProtocolError, match=MESSAGES[case["error"]]):
        frames.decode_header(data[: frames.HEADER.size])


def test_the_golden_answer_has_its_three_tensors() -> None:
    body = next(case["body"] for case in GOOD if case["file"] == "attached-model.bin")
    reply = frames.read_reply(body, 1)
    assert list(reply.tensors) == ["weight", "scale", "empty"]
    assert reply.tensors["weight"] == ["weight", "F32", [2, 3], 0, 24]


def test_a_frame_in_single_bytes_is_read_like_any_other() -> None:
    data = frames.encode(frames.ERROR, {"code": "NOT_FOUND"})
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(10)

        def send() -> None:
            for byte in data:
                near.send(bytes([byte]))

        thread = threading.Thread(target=send)
        thread.start()
        assert frames.receive(far) == (frames.ERROR, {"code": "NOT_FOUND"}, [])
        thread.join()


GOOD_FRAME = frames.encode(frames.ATTACHED, attached_body(ROWS, 8), 1)


@pytest.mark.parametrize(
    ("data", "descriptors", "message"),
    [
        (b"", 0, "closed the connection before it answered"),
        (GOOD_FRAME[:7], 1, "9 bytes before the end"),
        (GOOD_FRAME[:-1], 1, "1 bytes before the end"),
        (b"HTTP/1.1 400 Bad Request\r\n", 0, "does not begin with VRMD"),
        (GOOD_FRAME, 0, "announces 1 descriptors and 0 came"),
        (GOOD_FRAME, 2, "announces 1 descriptors and 2 came"),
        (frames.HEADER.pack(b"VRMD", 1, frames.ATTACHED, 3, 1) + b"{]}", 1, "not JSON"),
        (frames.HEADER.pack(b"VRMD", 1, frames.ATTACHED, 2, 1) + b"[]", 1, "malformed"),
        (frames.encode(frames.ATTACH, {}, 0), 0, "a frame of kind 1"),
    ],
)
def test_a_broken_answer_is_named_and_leaks_nothing(
    fake: FakeDaemon, data: bytes, descriptors: int, message: str
) -> None:
    before = count_descriptors()
    fake.then(data, [memfd(b"") for _ in range(descriptors)], stay=False)
    with pytest.raises(vramd.ProtocolError, match=message):
        vramd.attach("toy", socket=fake.path)
    until(lambda: count_descriptors() <= before, "the end of all descriptors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": []}, "malformed"),
        ({"segments": [{"bytes": PAGE, "pageBytes": PAGE}]}, "behind its segment"),
        ({"segments": [{"bytes": 3 * PAGE + 1, "pageBytes": PAGE}]}, "cannot be mapped"),
        ({"segments": [{"bytes": 2 * PAGE, "pageBytes": 0}]}, "cannot be mapped"),
        ({"segments": [{"bytes": 2 * PAGE, "pageBytes": PAGE}] * 2}, "1 descriptors came for 2 segments"),
        ({"segments": [{"bytes": 1 << 40, "pageBytes": PAGE}],
          "block": {"segment": 0, "offset": 1 << 30, "bytes": 8}}, "cannot be mapped"),
        ({"block": {"segment": 1, "offset": 0, "bytes": 8}}, "malformed"),
        ({"block": {"segment": 0, "offset": -1, "bytes": 8}}, "not a natural number"),
        ({"block": {"segment": 0, "offset": PAGE}}, "malformed"),
        ({"tensors": [("x", "F32", [2], 0)]}, "a row that is not"),
        ({"tensors": [("x", "F32", [1], 0, 4), ("x", "F32", [1], 4, 4)]}, "names a tensor twice"),
        ({"leaseId": 7}, "where a text belongs"),
        ({"access": "write"}, "asked for read access"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_add_up_is_refused_and_leaks_nothing(
    fake: FakeDaemon, changes: dict[str, Any], message: str
) -> None:
    before = count_descriptors()
    fake.then_attached(attached_body(ROWS, 8) | changes, bytes(8))
    with pytest.raises(vramd.ProtocolError, match=message):
        vramd.attach("toy", socket=fake.path)
    until(lambda: count_descriptors() <= before, "the end of all descriptors")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "F32", [2], 4, 8), "behind its block"),
        (("x", "F32", [2], -4, 8), "not a natural number"),
        (("x", "F32", [2], 0.0, 8), "not a natural number"),
        (("x", "F32", [3], 0, 8), "3 times F32, does not have 8 bytes"),
        (("x", "F32", [-1, -2], 0, 8), "not a natural number"),
        (("x", "F32", [2.0], 0, 8), "not a natural number"),
    ],
)
def test_a_tensor_that_does_not_fit_its_block_is_refused_when_it_is_used(
    fake: FakeDaemon, row: Row, message: str
) -> None:
    fake.then_attached(attached_body([row], 8), bytes(8))
    with vramd.attach("toy", socket=fake.path) as weights:
        for use in (weights.__getitem__, weights.info, weights.raw):
            with pytest.raises(vramd.ProtocolError, match=message):
                use("x")


def test_descriptors_that_the_kernel_drops_are_noticed(fake: FakeDaemon) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fake.then(frames.encode(frames.ATTACHED, attached_body(ROWS, 8), 8), [memfd(b"") for _ in range(8)])
    before = count_descriptors()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        connection.connect(fake.path)
        connection.sendall(frames.encode(frames.ATTACH, {"model": "toy"}))
        connection.recv(1, socket.MSG_PEEK)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(vramd.ProtocolError, match="dropped descriptors"):
                frames.receive(connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: count_descriptors() <= before, "the end of all descriptors")


def test_a_socket_with_nothing_to_read_is_not_waited_for() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert frames.Moves().read(partial(kernel.recvmsg, near.fileno())) is None


def test_the_daemons_refusal_is_raised_as_what_it_is(fake: FakeDaemon) -> None:
    fake.then((GOLDEN / "error-not-resident.bin").read_bytes(), stay=False)
    with pytest.raises(vramd.NotResident) as caught:
        vramd.attach("sdxl", "cpu:0", socket=fake.path)
    error = caught.value
    assert (error.code, error.status, error.retryable) == ("NOT_RESIDENT", 409, True)
    assert error.hint == "load it first: vramd load sdxl"
    assert error.details == {"model": "sdxl", "deviceId": "cpu:0"}


def test_a_daemon_that_says_nothing_is_a_timeout(fake: FakeDaemon) -> None:
    fake.then(b"")
    with pytest.raises(vramd.Timeout):
        vramd.attach("toy", socket=fake.path, timeout=0.05)
