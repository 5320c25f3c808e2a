"""What several tests need: a daemon that says what it is told to, and the real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from vramd import Client, frames

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "protocol" / "golden"
PAGE = 4096
LEASE = "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Waits until ``condition`` answers with something true."""
    deadline = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
        threading.Event().wait(0.001)


def open_descriptors() -> set[str]:
    return {os.readlink(entry) for entry in _descriptors() if "/proc/" not in os.readlink(entry)}


def count_descriptors() -> int:
    return len(_descriptors())


def _descriptors() -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{entry}"
        if os.path.lexists(path):  # the listing's own descriptor is gone by now
            found.append(path)
    return found


Row = tuple[str, str, Sequence[int], int, int]


def attached_body(tensors: Sequence[Row], block_bytes: int, **changes: Any) -> dict[str, Any]:
    """The body of a good answer, for a block that begins at the second page."""
    pages = 1 + -(-max(block_bytes, 1) // PAGE)
    body: dict[str, Any] = {
        "leaseId": LEASE,
        "deviceId": "cpu:0",
        "allocationId": LEASE,
        "generation": 3,
        "model": "toy",
        "component": "weights",
        "access": "read",
        "segments": [{"bytes": pages * PAGE, "pageBytes": PAGE}],
        "block": {"segment": 0, "offset": PAGE, "bytes": block_bytes},
        "tensors": tensors,
        "metadata": {"format": "pt"},
    }
    return body | changes


def memfd(payload: bytes, before: int = PAGE) -> int:
    """A memfd with ``payload`` behind ``before`` bytes, filled up to whole pages."""
    descriptor = os.memfd_create("vramd-test", os.MFD_CLOEXEC)
    size = before + max(len(payload), 1)
    os.truncate(descriptor, -(-size // PAGE) * PAGE)
    os.pwrite(descriptor, payload, before)
    return descriptor


class FakeDaemon:
    """Answers each connection with the next of its scripts; knows when a client has gone."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.requests: list[dict[str, Any]] = []
        self.ended_leases = 0
        self._scripts: list[tuple[bytes, list[int], bool]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="fake-daemon")
        self._thread.start()

    def then(self, data: bytes, descriptors: Sequence[int] = (), *, stay: bool = True) -> None:
        """Answers the next connection with ``data``; stays until the client goes, or closes at once."""
        self._scripts.append((data, list(descriptors), stay))

    def then_attached(self, body: dict[str, Any], payload: bytes) -> None:
        self.then(frames.encode(frames.ATTACHED, body, 1), [memfd(payload)])

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        for _, descriptors, _ in self._scripts:
            frames.close_all(descriptors)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                kind, body, _ = frames.receive(connection)
                assert kind == frames.ATTACH
                self.requests.append(body)
                data, descriptors, stay = self._scripts.pop(0)
                if data:
                    socket.send_fds(connection, [data], descriptors)
                frames.close_all(descriptors)
                if stay:
                    with suppress(ConnectionResetError):  # the client closed before it read everything
                        assert connection.recv(1) == b""
                    self.ended_leases += 1


class Vramd:
    """The real daemon, on ports and paths of its own."""

    def __init__(
        self, binary: str, directory: Path, environment: Mapping[str, str] | None = None, *more: str
    ) -> None:
        self.directory = directory
        self.models = directory / "models"
        self.models.mkdir()
        self.log = directory / "log"
        ready = directory / "ready.json"
        arguments: dict[str, str | Path] = {
            "--listen": "127.0.0.1:0",
            "--socket": directory / "vramd.sock",
            "--state-dir": directory / "state",
            "--model-root": self.models,
            "--cpu-limit": "256MiB",
            "--sim": "64MiB",
            "--ready-file": ready,
        }
        arguments |= dict(zip(more[::2], more[1::2], strict=True))
        command = [binary, "serve", *(str(word) for pair in arguments.items() for word in pair)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )
        until(lambda: ready.exists() or self.process.poll() is not None, "the daemon's start", 60)
        assert self.process.poll() is None, self.log.read_text()
        served = json.loads(ready.read_text())
        self.address = f"http://{served['address']}"
        self.socket = served["socket"]
        self.client = Client(self.address)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        assert code == 0, self.log.read_text()


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Sees to it that a child is gone at the end, whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
