"""Pressure on a simulated device, with a made-up hog and three workers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from typing import Any

import vramd

from .machine import Daemon, Setup, until
from .model import small

DEVICE = "sim:0"
DEVICE_BYTES = 1 << 30
MODEL_BYTES = 256 << 20
#: The ratio at which pressure is ``High``.
HIGH = 0.85
STEP_BYTES = DEVICE_BYTES // 200
STEP_SECONDS = 0.05
# What it prints is the daemon's input, which tells it what a driver would know: the bytes of a process.
WORKER = """
import os, sys, vramd
from vramd.worker import Worker

class OnSim(Worker):
    def on_load(self, name):
        return vramd.attach(name, self.device, socket=socket)

    def on_unload(self, model):
        if model.size_bytes:
            take(0)

def take(size):
    print("process", os.getpid(), size, flush=True)

name, socket, own = sys.argv[1], sys.argv[2], int(sys.argv[3])
with OnSim(name, device="sim:0", socket=socket) as worker:
    if own:
        take(own)
        worker.hold("mine", size_bytes=own)
    else:
        with worker.using("shared"):
            pass
    sys.stdin.read()
"""


def rounds(setup: Setup) -> list[tuple[float, float]]:
    """Of each round the seconds from the crossing of the threshold to the event, and to relief."""
    return [_round(setup) for _ in range(setup.rounds(8))]


def _round(setup: Setup) -> tuple[float, float]:
    shared = small(setup, "pressure-256m", MODEL_BYTES)
    simulated = (setup.peers, "sim", "--size", str(DEVICE_BYTES))
    with Daemon(setup, program=simulated) as daemon, contextlib.ExitStack() as workers:
        client = daemon.client
        client.register_model("shared", str(shared))
        client.load("shared", device=DEVICE, keep_alive=-1)
        for name, own in (("one", 0), ("two", 0), ("third", MODEL_BYTES)):
            workers.enter_context(_worker(daemon, name, own))
        for _ in range(8):
            client.touch("shared")
        until(lambda: _all_is_known(client))
        threshold = client.device_pressure(DEVICE)["availableMemory"] - (1 - HIGH) * DEVICE_BYTES
        arrived: dict[str, tuple[float, Any]] = {}
        relieved = threading.Event()

        def follow(events: vramd.EventStream) -> None:
            for event in events:
                kind, data = event["event"], event["data"]
                high = kind == "pressure.changed" and data["level"] in ("High", "Critical")
                if (high or kind == "pressure.relieved") and data["deviceId"] == DEVICE:
                    arrived.setdefault(kind, (time.monotonic(), data))
                if "pressure.relieved" in arrived:
                    relieved.set()
                    return

        with client.events() as events:
            threading.Thread(target=follow, args=(events,), daemon=True).start()
            crossed = _fill(daemon, threshold, relieved)
        at, changed = arrived["pressure.changed"]
        relieved_at, done = arrived["pressure.relieved"]
        assert [one["model"] for one in done["modelsUnloaded"]] == ["mine"], done
        looked_for = changed["freeBytes"] + changed["neededBytes"]
        assert client.device_pressure(DEVICE)["freeMemory"] >= looked_for, changed
        return at - crossed, relieved_at - crossed


def _worker(daemon: Daemon, name: str, own_bytes: int) -> subprocess.Popen[bytes]:
    """It ends with its input."""
    command = [sys.executable, "-c", WORKER, name, str(daemon.socket), str(own_bytes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=daemon.input)


def _all_is_known(client: vramd.Client) -> bool:
    """Whether the daemon has measured what there is, and would have the third worker's own model go first."""
    found = client.device_pressure(DEVICE)
    ways = found["recommendedActions"]
    return (
        [way["action"] for way in ways] == ["askWorker", "askToLetGo"]
        and ways[0]["bytes"] == MODEL_BYTES
        and found["freeMemory"] <= DEVICE_BYTES - 2 * MODEL_BYTES
    )


def _fill(daemon: Daemon, threshold: float, relieved: threading.Event) -> float:
    """Others take more and more until there is relief. Answers when they crossed the threshold."""
    crossed = None
    for taken in range(STEP_BYTES, DEVICE_BYTES, STEP_BYTES):
        now = time.monotonic()
        daemon.input.write(f"foreign {taken}\n".encode())
        daemon.input.flush()
        if crossed is None and taken >= threshold:
            crossed = now
        if relieved.wait(STEP_SECONDS):
            assert crossed is not None
            return crossed
    raise SystemExit(f"nothing has relieved {DEVICE}")
