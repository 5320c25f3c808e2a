"""The machine that is measured on: its state, the daemon under test, and what a process has used."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import vramd

SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MODEL = "bench"
START_SECONDS = 30
PATIENCE_SECONDS = 120


class Setup(NamedTuple):
    vramd: Path
    peers: Path
    allocators: Path
    work: Path
    quick: bool

    @property
    def model(self) -> Path:
        return self.work / ("model-512m.safetensors" if self.quick else "model-4g.safetensors")

    def rounds(self, full: int) -> int:
        return max(2, full // 4) if self.quick else full


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited too long")
        time.sleep(0.01)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int((len(values) - 1) * 0.99)]


def describe() -> str:
    """One line about the machine, so that a table says where it comes from."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{time.strftime('%Y-%m-%d')}, Linux {os.uname().release}, {os.cpu_count()} of "
        f"{names[0] if names else 'an unknown processor'}, {gib:.0f} GiB, "
        f"huge pages for shared memory: {_shmem()}, load before: {os.getloadavg()[0]:.1f}\n"
    )


def _shmem() -> str:
    try:
        return SHMEM_HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Allows huge pages for shared memory while this lasts, where that is forbidden and we may."""
    before = _shmem()
    if before != "never" or os.geteuid() != 0:
        yield
        return
    say(f"setting {SHMEM_HUGE_PAGES} from {before} to advise until the end")
    SHMEM_HUGE_PAGES.write_text("advise")
    try:
        yield
    finally:
        SHMEM_HUGE_PAGES.write_text(before)


class Daemon:
    """A daemon of its own, on a free port, that ends with the ``with`` block."""

    def __init__(
        self,
        setup: Setup,
        *options: str,
        within: Sequence[str] = (),
        program: Sequence[str | Path] | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vramd-bench-")
        home = Path(self._directory.name)
        self.socket = home / "vramd.sock"
        ready = home / "ready.json"
        self._log = open(home / "log", "w")  # noqa: SIM115 - open as long as the daemon runs
        self._process = subprocess.Popen(
            [
                *within, *(program or (setup.vramd, "serve")), "--listen", "127.0.0.1:0",
                "--socket", self.socket, "--state-dir", home / "state", "--model-root", setup.work,
                "--ready-file", ready, *options,
            ],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdin is not None
        self.input = self._process.stdin
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"the daemon did not start:\n{(home / 'log').read_text()}")
            time.sleep(0.01)
        self.address: str = json.loads(ready.read_text())["address"]
        self.client = vramd.Client(f"http://{self.address}", timeout=120)

    def hold(self, setup: Setup) -> vramd.bodies.Operation:
        """Registers the model, loads it, and answers with the operation that did."""
        self.client.register_model(MODEL, str(setup.model))
        return self.client.load(MODEL, device="cpu:0", keep_alive=-1)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._directory.cleanup()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, *kinds: str) -> float:
    """Resident memory of some kinds (``RssAnon``, ``RssFile``, ``RssShmem``)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(status[kind].split()[0]) for kind in kinds) / 1024


def read_all(path: Path) -> None:
    """Brings a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(16 << 20)
        while file.readinto(piece):
            pass


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
