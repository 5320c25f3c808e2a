"""Loads of 4 GB from a cold disk: one file, four shards, GGUF; beside others and the fastest plain read.

Each contestant is a process of its own (``contestants``), so that its memory and processor time are its own.
They take turns, each on files that the page cache has forgotten.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import vramd

from . import model
from .machine import MODEL, Daemon, Setup, cpu_seconds, forget, median, memory_mib, p99, say
from .table import Aim, Row, Table

ROUNDS = 5
LOAD_AIM, SUMMED_AIM, CPU_AIM, PEAK_AIM = 1.05, 1.12, 0.1, 64
CALLS, CALLS_AIM = 1000, 10
CYCLES = 1000
SMALL = 64 << 20

PEERS = {
    "safetensors": [
        "safetensors to NumPy",
        "safetensors to torch",
        "runai-model-streamer",
        "fastsafetensors",
    ],
    "shards": ["safetensors to torch", "runai-model-streamer", "fastsafetensors"],
    "gguf": ["gguf"],
}


def measure(setup: Setup, table: Table) -> None:
    for kind, peers in PEERS.items():
        files = model.files(setup, kind)
        say(f"{kind}: {len(files)} files")
        _kind(setup, table, kind, files, [peer for peer in peers if _is_there(peer, files)])
    _calls(setup, table)
    _cycles(setup, table)


def _kind(setup: Setup, table: Table, kind: str, files: list[Path], peers: list[str]) -> None:
    size = sum(file.stat().st_size for file in files)
    pool = size + (8 << 20)
    found: dict[str, list[dict[str, float]]] = {}
    with Daemon(setup) as plain, Daemon(setup, "--page-pool", str(pool)) as pooled:
        ours = {"vramd": plain, "vramd, pages made ahead": pooled}
        for daemon in ours.values():
            daemon.client.register_model(MODEL, str(model.registered(files)))
        # A virtual machine faults in memory that it once gave back far more slowly: take all of it once.
        for daemon in ours.values():
            _ours(daemon)
        floor = "O_DIRECT read into a small buffer of huge pages"
        turns = [floor, *ours, *peers]
        for number in range(setup.rounds(ROUNDS)):
            # Nobody is always the one after the same other.
            for name in turns[number % len(turns) :] + turns[: number % len(turns)]:
                # Nor is anybody measured beside the making of pages.
                _until_ready(pooled, pool)
                _forget(files)
                called = "floor" if name == floor else name
                one = _ours(ours[name]) if name in ours else _contestant(called, files)
                found.setdefault(name, []).append(one)

    def figure(name: str, what: str) -> float:
        return median([one[what] for one in found[name]])

    least = figure(floor, "load")
    say(f"the plain read ran at {size / least / 1e9:.2f} GB/s")
    for name in ours:
        # What maps a file has loaded nothing yet.
        loading = [peer for peer in peers if peer != "gguf"]
        rest = [Row(other, figure(other, "load")) for other in [floor, *loading]]
        ratio = figure(name, "load") / least
        aim = Aim(f"≤ {LOAD_AIM} of the read", ratio <= LOAD_AIM)
        table.add(f"{kind}: the load", "s", [Row(name, figure(name, "load")), *rest], aim)
        rest = [Row(floor, least), *(Row(other, figure(other, "summed")) for other in peers)]
        ratio = figure(name, "summed") / least
        aim = Aim(f"≤ {SUMMED_AIM} of the read", ratio <= SUMMED_AIM)
        table.add(f"{kind}: until every byte is summed", "s", [Row(name, figure(name, "summed")), *rest], aim)
    for name in ours:
        rest = [Row(other, figure(other, "cpu")) for other in [floor, *loading]]
        cpu = figure(name, "cpu")
        aim = Aim(f"≤ {CPU_AIM} with pages made ahead", cpu <= CPU_AIM)
        table.add(f"{kind}: processor time of the load", "s", [Row(name, cpu), *rest], aim)
        over = figure(name, "peak") - size / 2**20
        rest = [Row(other, figure(other, "peak") - size / 2**20) for other in peers]
        aim = Aim(f"≤ {PEAK_AIM}", over <= PEAK_AIM)
        table.add(f"{kind}: peak memory above the payload", "MiB", [Row(name, over), *rest], aim)


def _ours(daemon: Daemon) -> dict[str, float]:
    """A load, and the sum of all that a client then has."""
    Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
    # Pages that were made ahead are those of the payload.
    before, idle = cpu_seconds(daemon.pid), memory_mib(daemon.pid, "RssAnon", "RssFile")
    begun = time.perf_counter()
    daemon.client.load(MODEL, device="cpu:0", keep_alive=-1)
    loaded = time.perf_counter() - begun
    spent = cpu_seconds(daemon.pid) - before
    peak = memory_mib(daemon.pid, "VmHWM") - idle
    summed = _contestant("attached", [daemon.socket])["load"]
    daemon.client.unload(MODEL)
    return {"load": loaded, "summed": loaded + summed, "cpu": spent, "peak": peak}


def _contestant(name: str, files: list[Path]) -> dict[str, Any]:
    if name != "attached":
        _forget(files)
    done = subprocess.run(
        [sys.executable, "-m", "measure.contestants", name, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _is_there(peer: str, files: list[Path]) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "measure.contestants", "--there", peer, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        say(f"SKIPPED {peer}: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


def _forget(files: list[Path]) -> None:
    for file in files:
        forget(file)


def _until_ready(daemon: Daemon, pool: int) -> None:
    deadline = time.monotonic() + 60
    while daemon.client.device_status("cpu:0")["readyBytes"] < pool - (8 << 20):
        if time.monotonic() > deadline:
            say("the pool of pages is not full after a minute")
            return
        time.sleep(0.2)


def _calls(setup: Setup, table: Table) -> None:
    """Calls about a resident model while two others are loaded and evicted in turn."""
    small = [model.small(setup, name, SMALL) for name in ("resident", "one", "two")]
    times: list[float] = []
    with Daemon(setup, "--sim", str(SMALL * 2 + (32 << 20))) as daemon:
        for path in small:
            daemon.client.register_model(path.stem, str(path))
        daemon.client.load("resident", device="sim:0", keep_alive=-1)
        daemon.client.pin("resident")
        over = threading.Event()

        loads = 0

        def churn() -> None:
            nonlocal loads
            client = vramd.Client(f"http://{daemon.address}", timeout=120)
            while not over.is_set():
                for name in ("one", "two"):
                    forget(setup.work / f"{name}.safetensors")
                    client.load(name, device="sim:0")
                    # Whoever had it loaded has come: it may go.
                    vramd.attach(name, device="sim:0", socket=str(daemon.socket)).close()
                    loads += 1

        thread = threading.Thread(target=churn)
        thread.start()
        for _ in range(setup.rounds(CALLS)):
            begun = time.perf_counter()
            daemon.client.touch("resident")
            times.append((time.perf_counter() - begun) * 1000)
            time.sleep(0.002)
        over.set()
        thread.join()
    if loads < 4:
        raise SystemExit(f"only {loads} models were loaded meanwhile")
    say(f"{loads} loads meanwhile")
    aim = Aim(f"p99 < {CALLS_AIM}", p99(times) < CALLS_AIM)
    table.add(
        "a call about a resident model while others load and evict",
        "ms",
        [Row("vramd", median(times), p99(times))],
        aim,
    )


def _cycles(setup: Setup, table: Table) -> None:
    """Loads and unloads; what the system then counts more than before."""
    path = model.small(setup, "cycled", SMALL)
    with Daemon(setup) as daemon:
        daemon.client.register_model(path.stem, str(path))

        def cycle() -> None:
            daemon.client.load(path.stem, device="cpu:0", keep_alive=-1)
            daemon.client.unload(path.stem)

        for _ in range(20):
            cycle()
        before, private = _shared_kib(), memory_mib(daemon.pid, "RssAnon")
        for _ in range(setup.rounds(CYCLES)):
            cycle()
        drift = (_shared_kib() - before) / 1024
        private = memory_mib(daemon.pid, "RssAnon") - private
    rows = [Row("vramd", drift)]
    table.add(
        f"drift of the system's shared memory after {setup.rounds(CYCLES)} cycles of load and unload",
        "MiB",
        rows,
        Aim("0", drift <= 0),
    )
    table.add("the daemon's own memory, likewise", "MiB", [Row("vramd", private)])


def _shared_kib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))
