from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vramd as api
from support import PAGE, Vramd, attached_body, count_descriptors, memfd, running, until
from vramd import frames, kernel, moves

PAYLOAD = bytes(range(256)) * 16
ROWS = [("a", "U8", [len(PAYLOAD)], 0, len(PAYLOAD))]


class Mover:
    """A daemon that attaches one client and moves its bytes when it is told to."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = str(path)
        self.body = attached_body(ROWS, len(PAYLOAD), **changes)
        self.generation = self.body["generation"]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(10)
        _, self.request, _ = frames.receive(self.connection)
        self.send(frames.encode(frames.ATTACHED, self.body, 1), PAYLOAD)

    def send(self, frame: bytes, payload: bytes, before: int = PAGE) -> None:
        descriptor = memfd(payload, before)
        socket.send_fds(self.connection, [frame], [descriptor])
        os.close(descriptor)

    def move(self, payload: bytes = PAYLOAD, before: int = PAGE) -> dict[str, Any]:
        """Moves to another file, where the block lies behind ``before`` bytes; the client's answer."""
        self.send(self.moved(payload, before), payload, before)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        kind, body, _ = frames.receive(self.connection)
        assert kind == frames.ACKNOWLEDGE
        assert isinstance(body, dict)
        return body

    def moved(self, payload: bytes = PAYLOAD, before: int = PAGE, **changes: Any) -> bytes:
        self.generation += 1
        pages = -(-(before + len(payload)) // PAGE)
        body = {
            "generation": self.generation,
            "deviceId": "cpu:0",
            "segments": [{"bytes": pages * PAGE, "pageBytes": PAGE}],
            "block": {"segment": 0, "offset": before, "bytes": len(payload)},
        }
        return frames.encode(frames.MOVED, body | changes, 1)

    def ended(self) -> bool:
        """Whether the client has closed the connection."""
        with suppress(ConnectionResetError):
            return self.connection.recv(1) == b""
        return True

    def stop(self) -> None:
        self._thread.join(10)
        self.connection.close()
        self._listener.close()


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[Mover]:
    daemon = Mover(tmp_path / "socket")
    yield daemon
    daemon.stop()


@pytest.fixture(params=["brief", "long"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the kernel that keep the interpreter, and such as give it up meanwhile."""
    if request.param == "long":
        monkeypatch.setattr(kernel, "_BRIEF_BYTES", 0)


@pytest.mark.usefixtures("length")
def test_arrays_keep_their_addresses_and_their_bytes_over_many_moves(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        assert mover.request["moves"] is True
        array, raw = attached["a"], attached.raw("a")
        address = array.ctypes.data
        stop, wrong = threading.Event(), []

        def read() -> None:
            # A thread that only computes would keep the interpreter from the one that moves.
            while not stop.wait(0.0002):
                if bytes(raw) != PAYLOAD or int(np.asarray(array).sum()) != sum(PAYLOAD):
                    wrong.append("other bytes")

        reader = threading.Thread(target=read)
        reader.start()
        descriptors = count_descriptors()
        for number in range(100):
            before = PAGE * (number % 3)
            assert mover.move(before=before) == {"generation": mover.generation, "moved": True}
        stop.set()
        reader.join(10)
        assert not wrong
        assert array.ctypes.data == address
        assert attached.generation == mover.generation
        until(lambda: count_descriptors() <= descriptors, "no descriptor is left open")
        # They are the new pages, not the old ones.
        mover.move(PAYLOAD[::-1])
        assert bytes(raw) == PAYLOAD[::-1]
        assert bytes(attached.raw("a")) == PAYLOAD[::-1]


@pytest.mark.usefixtures("length")
def test_a_private_mapping_moves_until_it_is_written_to(tmp_path: Path) -> None:
    mover = Mover(tmp_path / "socket")
    try:
        # What framework="torch" does, without torch.
        def build(connection: Any, reply: Any, buffer: Any, base: int) -> api.AllocationAttachment:
            return api.AllocationAttachment(connection, reply, buffer, base, private=True)

        from vramd.attachment import _attach

        attached = _attach({"model": "toy", "access": "read", "moves": True}, mover.path, 10, True, build)
        with attached:
            buffer = attached.buffer
            assert mover.move()["moved"] is True
            buffer[0] = 77
            answer = mover.move()
            assert answer["moved"] is False
            assert "written" in answer["reason"]
            assert buffer[0] == 77, "a writer keeps what it wrote"
            assert bytes(buffer[1:]) == PAYLOAD[1:]
    finally:
        mover.stop()


CHANGES: list[dict[str, Any]] = [
    {"block": {"segment": 0, "offset": PAGE + 8, "bytes": len(PAYLOAD)}},
    {"block": {"segment": 0, "offset": PAGE, "bytes": len(PAYLOAD) - 1}},
    {"block": {"segment": 1, "offset": PAGE, "bytes": len(PAYLOAD)}},
    {"block": {"segment": 0, "offset": 1 << 40, "bytes": len(PAYLOAD)}},
    {"segments": [{"bytes": 1 << 30, "pageBytes": 2 << 20}]},
    {"segments": []},
    {"generation": 3},
    {"deviceId": 7},
    # The file is shorter.
    {
        "segments": [{"bytes": 64 * PAGE, "pageBytes": PAGE}],
        "block": {"segment": 0, "offset": 40 * PAGE, "bytes": len(PAYLOAD)},
    },
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_move_that_cannot_be_is_declined_and_the_next_one_followed(
    mover: Mover, changes: dict[str, Any]
) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        mover.send(mover.moved(**changes), PAYLOAD)
        answer = mover.answer()
        assert answer["generation"] == changes.get("generation", mover.generation)
        assert answer["moved"] is False
        assert answer["reason"]
        assert attached.generation < mover.generation
        assert mover.move()["moved"] is True
        assert attached.ended is None
        assert bytes(np.asarray(array)) == PAYLOAD


def test_a_place_that_is_no_file_is_declined(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        ends = os.pipe()
        socket.send_fds(mover.connection, [mover.moved()], ends[:1])
        assert "shorter than announced" in mover.answer()["reason"]
        frames.close_all(list(ends))
        assert bytes(np.asarray(array)) == PAYLOAD


@pytest.mark.parametrize("came", [0, 2])
def test_descriptors_that_were_not_announced_are_declined(mover: Mover, came: int) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        before = count_descriptors()
        descriptors = [memfd(PAYLOAD, PAGE) for _ in range(came)]
        socket.send_fds(mover.connection, [mover.moved()], descriptors)
        frames.close_all(descriptors)
        answer = mover.answer()
        assert answer["moved"] is False
        assert f"{came} came" in answer["reason"]
        assert attached.ended is None
        until(lambda: count_descriptors() <= before, "the descriptors to be closed")


# In a process of its own: the limit, and what becomes of warnings, are everybody's.
FULL = """
import os, resource, sys, threading
sys.path.insert(0, os.path.join(sys.argv[1], "tests"))
from pathlib import Path
import tempfile
from test_moves import PAYLOAD, Mover
import vramd
mover = Mover(Path(tempfile.mkdtemp()) / "socket")
attached = vramd.attach("toy", socket=mover.path)
raw = attached.raw("a")
frame = mover.moved()
descriptor = os.memfd_create("x")
os.ftruncate(descriptor, 1 << 20)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
import socket
socket.send_fds(mover.connection, [frame], [descriptor])
answer = mover.answer()
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
assert not answer["moved"] and "ulimit -n" in answer["reason"], answer
assert mover.move()["moved"]
assert bytes(raw) == PAYLOAD
mover.connection.sendall(b"HTTP/1.1 400 Bad Request")
while attached.ended is None:
    pass
assert "VRMD" in attached.ended, attached.ended
other = Mover(Path(tempfile.mkdtemp()) / "socket")
second = vramd.attach("toy", socket=other.path)
assert other.move()["moved"], "the thread lives"
mover.stop(), other.stop()
"""


def test_no_descriptor_left_and_warnings_that_are_errors_stop_nothing() -> None:
    place = str(Path(__file__).parent.parent)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", FULL, place]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def ended(mover: Mover, attached: api.Attachment[Any], send: Callable[[], object]) -> str:
    """Sends what cannot be read, and waits until the client has given up on its daemon."""
    send()
    until(lambda: attached.ended is not None, "the end of the following")
    with moves._follower.lock:  # the warning comes under it
        pass
    assert not attached.closed
    assert attached.ended is not None
    return attached.ended


def is_open(mover: Mover) -> bool:
    """The client has not closed: or the daemon would give its pages to others."""
    mover.connection.setblocking(False)
    try:
        return bool(mover.connection.recv(1))
    except BlockingIOError:
        return True


@pytest.mark.parametrize("text", [b"HTTP/1.1 400 Bad Request", None])
def test_what_cannot_be_read_ends_the_following_and_keeps_the_lease(mover: Mover, text: bytes | None) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        before = count_descriptors()
        frame = text or mover.moved(generation="2")
        with pytest.warns(RuntimeWarning, match="follows no moves"):
            ended(mover, attached, lambda: mover.send(frame, PAYLOAD))
        assert bytes(np.asarray(array)) == PAYLOAD
        assert is_open(mover)
        until(lambda: count_descriptors() <= before, "the descriptors to be closed")
    mover.connection.setblocking(True)
    assert mover.ended()


def test_a_second_move_before_the_first_is_answered_ends_the_following(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        with pytest.warns(RuntimeWarning, match="more came than one frame"):
            ended(mover, attached, lambda: mover.send(mover.moved() + mover.moved(), PAYLOAD))
        assert bytes(np.asarray(array)) == PAYLOAD


def test_when_the_daemon_goes_the_bytes_stay_and_nobody_is_warned(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        why = ended(mover, attached, lambda: mover.connection.shutdown(socket.SHUT_WR))
        assert why == "the daemon has closed the connection"
        assert bytes(np.asarray(array)) == PAYLOAD


def test_an_end_within_a_frame_ends_the_following_and_leaves_no_descriptor(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        descriptors = count_descriptors()
        mover.send(mover.moved()[:40], PAYLOAD)
        with pytest.warns(RuntimeWarning, match="ended within a frame"):
            ended(mover, attached, lambda: mover.connection.shutdown(socket.SHUT_WR))
        until(lambda: count_descriptors() <= descriptors, "the end of the frame's descriptor")
        assert bytes(np.asarray(array)) == PAYLOAD


def test_who_does_not_follow_says_so(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path, moves=False) as attached:
        assert mover.request["moves"] is False
        assert bytes(attached.raw("a")) == PAYLOAD


def test_a_frame_in_pieces_keeps_no_other_waiting(tmp_path: Path) -> None:
    slow, other = Mover(tmp_path / "slow"), Mover(tmp_path / "other")
    with api.attach("toy", socket=slow.path) as first, api.attach("toy", socket=other.path) as second:
        frame = slow.moved(PAYLOAD[::-1])
        slow.send(frame[:1], PAYLOAD[::-1])
        for place in range(1, len(frame)):
            if place in (1, 16, 40):
                assert other.move()["moved"] is True
            slow.connection.sendall(frame[place : place + 1])
        assert slow.answer() == {"generation": slow.generation, "moved": True}
        assert bytes(first.raw("a")) == PAYLOAD[::-1]
        assert bytes(second.raw("a")) == PAYLOAD
    slow.stop()
    other.stop()


def test_after_a_fork_the_bytes_stay_where_they_are(mover: Mover) -> None:
    with api.attach("toy", socket=mover.path) as attached:
        array = attached["a"]
        child = os.fork()
        if child == 0:
            os._exit(0 if bytes(np.asarray(array)) == PAYLOAD else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        answer = mover.move(PAYLOAD[::-1])
        assert answer["moved"] is False
        assert "fork" in answer["reason"]
        assert bytes(np.asarray(array)) == PAYLOAD


def test_a_fork_marks_all_attachments_though_some_are_collected_meanwhile(tmp_path: Path) -> None:
    movers = [Mover(tmp_path / f"socket-{number}") for number in range(6)]
    attached: list[Any] = [api.attach("toy", socket=mover.path) for mover in movers]

    class Reference:
        """Drops another attachment when it is looked at, as a collection at that moment would."""

        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self) -> Any:
            found = attached[self.number]
            if self.number == 1:
                attached[4].close()
            return found

    with moves._follower.lock:
        for number, (descriptor, followed) in enumerate(moves._follower._followed.items()):
            replaced = followed._replace(attached=Reference(number))  # type: ignore[arg-type]
            moves._follower._followed[descriptor] = replaced
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for number, mover in enumerate(movers):
        if number != 4:
            assert mover.move()["moved"] is False
        attached[number].close()
        mover.stop()


def test_closing_while_a_move_comes_leaves_what_arrays_refer_to(tmp_path: Path) -> None:
    for number in range(20):
        mover = Mover(tmp_path / f"socket-{number}")
        attached = api.attach("toy", socket=mover.path)
        view = np.asarray(attached["a"])
        mover.send(mover.moved(), PAYLOAD)
        attached.close()
        assert bytes(view) == PAYLOAD
        mover.stop()


READER = """
import sys, vramd
attached = [vramd.attach_allocation(name, socket=sys.argv[1]) for name in sys.argv[2].split(",")]
views = [one.buffer for one in attached]
before = [bytes(view) for view in views]
print("attached", flush=True)
while True:
    if [bytes(view) for view in views] != before:
        print("other bytes", flush=True)
        sys.exit(1)
    if min(one.generation for one in attached) > 1:
        print("moved", flush=True)
"""

KIB = 1 << 10


def fragment(vramd: Vramd, device: str) -> list[str]:
    """Two segments of 300 KiB blocks with different bytes; what is left is nearly nothing in the second."""
    client = vramd.client
    made = [client.allocate(300 * KIB, device=device, lease_seconds=600)["allocationId"] for _ in range(26)]
    for number, name in enumerate(made):
        with api.attach_allocation(name, socket=vramd.socket, access="write") as shared:
            shared.buffer[:] = bytes([number + 1]) * (300 * KIB)
    kept = made[0:13:2] + made[13:15]
    for name in made:
        if name not in kept:
            until(lambda name=name: released(client, name), "the release")  # type: ignore[misc]
    return kept


def released(client: api.Client, name: str) -> bool:
    try:
        client.release(name)
    except api.VramdError as error:
        if error.code == "CONFLICT":
            return False
        raise
    return True


@pytest.mark.parametrize("device", ["sim:0", "cpu:0"])
def test_a_defragmentation_goes_on_under_a_reader_in_another_process(vramd: Vramd, device: str) -> None:
    client = vramd.client
    kept = fragment(vramd, device)
    moving = kept[-2:]
    command = [sys.executable, "-c", READER, vramd.socket, ",".join(moving)]
    with running(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "attached\n"
        ended = client.defragment(device)
        assert ended["state"] == "Completed", json.dumps(ended)
        result = ended["result"]["devices"][0]
        assert result["fixedCount"] == 0, json.dumps(ended)
        assert result["after"]["segmentCount"] == 1
        assert reader.stdout.readline() == "moved\n"
    for name in kept:
        until(lambda name=name: released(client, name), "the release")  # type: ignore[misc]
    until(lambda: client.device_status(device)["allocatedBytes"] == 0, "all bytes to be back")


def test_a_reader_killed_in_the_middle_of_a_move_leaves_nothing(vramd: Vramd) -> None:
    client = vramd.client
    kept = fragment(vramd, "sim:0")
    command = [sys.executable, "-c", READER, vramd.socket, ",".join(kept[-2:])]
    with running(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "attached\n"
        reader.send_signal(signal.SIGSTOP)
        begun = client.defragment("sim:0", wait=False)
        until(lambda: client.operation(begun["operationId"])["bytesDone"] > 0, "the first move")
        reader.kill()
        ended = client.wait_operation(begun["operationId"], timeout=30)
        assert ended["state"] == "Completed", json.dumps(ended)
    for name in kept:
        until(lambda name=name: released(client, name), "the release")  # type: ignore[misc]
    until(lambda: client.device_status("sim:0")["allocatedBytes"] == 0, "all bytes to be back")


KEEPER = """
import sys, vramd
attached = vramd.attach_allocation(sys.argv[2], socket=sys.argv[1])
view = attached.buffer
attached.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@contextmanager
def keeper(vramd: Vramd) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """An allocation, and a process that has closed it and still has its memory mapped."""
    name = vramd.client.allocate(2 * KIB * KIB, device="cpu:0", lease_seconds=60)["allocationId"]
    command = [sys.executable, "-c", KEEPER, vramd.socket, name]
    pipe = subprocess.PIPE
    with running(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
        until(lambda: not leases(vramd.client, name), "the lease to end")
        yield name, process


def test_a_release_names_who_still_has_the_memory(vramd: Vramd) -> None:
    for keeps in (True, False):
        with keeper(vramd) as (name, process):
            if not keeps:
                process.communicate("\n")
            answer = vramd.client.release(name)
        assert answer["verified"] is not keeps
        assert [one["pid"] for one in answer.get("heldBy", [])] == ([process.pid] if keeps else [])


def test_a_transfer_names_who_still_has_the_memory_that_it_left(vramd: Vramd) -> None:
    with keeper(vramd) as (name, process):
        for target, expected in (("sim:0", [process.pid]), ("cpu:0", [])):
            ended = vramd.client.transfer([name], target)
            item = ended["result"]["items"][0]
            assert [one["pid"] for one in item.get("heldBy", [])] == expected, json.dumps(ended)
    vramd.client.release(name)


def leases(client: api.Client, name: str) -> list[str]:
    """The connections that keep an allocation."""
    kept = client.allocation(name)["leases"]
    return [one["leaseId"] for one in kept if one["kind"] == "connection"]
