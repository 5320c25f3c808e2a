"""Pressure on a host made small by a control group, with a real hog and three workers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vramd

from .machine import Daemon, Setup, say, until
from .model import small

MIB = 1 << 20
GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 3 << 30
WANDER = 4 << 20
HOG = """
import sys, time
held = []
print(flush=True)
sys.stdin.readline()
while True:
    held.append(b"x" * (16 << 20))
    time.sleep(0.05)
"""


def rounds(setup: Setup) -> list[tuple[float, float]]:
    """Of each round the seconds from the crossing of the threshold to the event, and to relief."""
    if not os.access(GROUPS, os.W_OK):
        say("SKIPPED pressure on the host: root is needed, and a memory control group of version 1")
        return []
    found = []
    for _ in range(setup.rounds(8)):
        with _small_host() as group:
            found.append(_round(setup, group))
    return found


@contextlib.contextmanager
def _small_host() -> Iterator[Path]:
    group = GROUPS / f"vramd-bench-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    try:
        yield group
    finally:
        for _ in range(200):
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.05)


def _free(group: Path) -> int:
    usage = int((group / "memory.usage_in_bytes").read_text())
    stat = (group / "memory.stat").read_text().splitlines()
    files = next(int(line.split()[1]) for line in stat if line.startswith("total_inactive_file "))
    return LIMIT - usage + files


def _kept(group: Path, client: vramd.Client) -> int:
    """What the daemon leaves to the system, once it has seen what was loaded and read."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(_free(group) - client.device_pressure("cpu:0")["freeMemory"])
        time.sleep(0.1)
        return len(seen) >= 5 and max(seen[-5:]) - min(seen[-5:]) <= WANDER // 2

    until(steady)
    return seen[-1]


class _Watch(threading.Thread):
    """Looks at the control group all the while: when the threshold is crossed, and when it is left."""

    def __init__(self, group: Path, kept: int) -> None:
        super().__init__(daemon=True)
        self._group = group
        # What the daemon leaves to the system counts as free for nobody.
        self._kept = kept
        self.crossed: float | None = None
        self.relieved: float | None = None
        self.start()

    def run(self) -> None:
        while self.relieved is None:
            free, now = _free(self._group) - self._kept, time.monotonic()
            # Early by what the system's figures wander, so that no dip is missed.
            if self.crossed is None and free <= LIMIT * 0.15 + WANDER:
                self.crossed = now
            # As much as is looked for at the threshold: 3 % above it.
            if self.crossed is not None and free >= LIMIT * 0.18:
                self.relieved = now
            time.sleep(0.001)


def _round(setup: Setup, group: Path) -> tuple[float, float]:
    program = f"python={sys.executable} -m vramd.worker"
    within = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"']
    weights = str(small(setup, "pressure-384m", 384 * MIB))
    with Daemon(setup, "--worker-program", program, "--cpu-limit", "2GiB", within=within) as daemon:
        client = daemon.client
        client.register_model("shared", weights, keep_alive=-1)
        for name in ("one", "two", "third"):
            client.start_worker("python", name=name)
        for name in ("one", "two", "third"):
            until(lambda name=name: client.worker(name)["state"] == "Ready")
        for name in ("one", "two"):
            client.call_worker(name, "memory.load_model", {"name": "shared"}, timeout_seconds=60)
        own = {"name": "mine", "path": weights}
        client.call_worker("third", "memory.load_model", own, timeout_seconds=60)
        for _ in range(8):
            client.touch("shared")
        arrived: dict[str, tuple[float, Any]] = {}

        def follow() -> None:
            with contextlib.suppress(Exception):
                for event in vramd.Client(f"http://{daemon.address}").events():
                    high = event["event"] == "pressure.changed" and event["data"]["level"] in (
                        "High",
                        "Critical",
                    )
                    if high or event["event"] == "pressure.relieved":
                        arrived.setdefault(event["event"], (time.monotonic(), event["data"]))

        threading.Thread(target=follow, daemon=True).start()
        hog = subprocess.Popen(
            [*within, sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert hog.stdin is not None
            assert hog.stdout is not None
            hog.stdout.readline()
            watch = _Watch(group, _kept(group, client))
            hog.stdin.write("go\n")
            hog.stdin.flush()
            until(lambda: "pressure.changed" in arrived and watch.relieved is not None)
        finally:
            hog.kill()
            hog.wait()
        assert watch.crossed is not None
        assert watch.relieved is not None
        return arrived["pressure.changed"][0] - watch.crossed, watch.relieved - watch.crossed
