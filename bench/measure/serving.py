"""The REST interface under load, beside a bare handler of the same HTTP library."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from typing import Any

from .machine import Daemon, Setup, cpu_seconds, median, say
from .table import Aim, Row, Table

DEVICE = "sim:0"
ALLOCATE = {"sizeBytes": 65536, "allocationType": "Buffer", "purpose": "scratch", "leaseSeconds": 60}
AIM = 0.6


class Bare:
    """The bare server, answering what vramd answered."""

    def __init__(self, setup: Setup, bodies: dict[str, bytes]) -> None:
        command = [str(setup.peers), "bare"]
        for name, body in bodies.items():
            path = setup.work / f"{name}.json"
            path.write_bytes(body)
            command += [f"--{name}", str(path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def measure(setup: Setup, table: Table) -> None:
    # Simulated memory: what is measured is the daemon's own work, not the zeroing of pages.
    with Daemon(setup, "--sim", "24GiB") as daemon, Bare(setup, _bodies(daemon)) as bare:
        _rounds(setup, table, daemon, bare, "GET /api/memory/status", [])
        _rounds(setup, table, daemon, bare, f"allocate and release on {DEVICE}", ["--allocate-on", DEVICE])


def _bodies(daemon: Daemon) -> dict[str, bytes]:
    allocated = _call(daemon, "POST", f"/api/memory/allocations/allocate/{DEVICE}", ALLOCATE)
    allocation_id = json.loads(allocated)["data"]["allocationId"]
    return {
        "status": _call(daemon, "GET", "/api/memory/status"),
        "allocated": allocated,
        "released": _call(daemon, "DELETE", f"/api/memory/allocations/{allocation_id}"),
    }


def _call(daemon: Daemon, method: str, path: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{daemon.address}{path}", data, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        read: bytes = answer.read()
        return read


def _rounds(setup: Setup, table: Table, daemon: Daemon, bare: Bare, what: str, options: list[str]) -> None:
    servers: dict[str, Daemon | Bare] = {"vramd": daemon, "bare axum handler, same bodies": bare}
    rates: dict[str, list[float]] = {who: [] for who in servers}
    tails: dict[str, list[float]] = {who: [] for who in servers}
    cost: dict[str, list[float]] = {who: [] for who in servers}
    for _ in range(setup.rounds(9)):
        for who, server in servers.items():
            before = cpu_seconds(server.pid)
            report = subprocess.run(
                [str(setup.peers), "hammer", server.address, *options], stdout=subprocess.PIPE, check=True
            )
            answer = json.loads(report.stdout)
            rates[who].append(answer["perSecond"])
            tails[who].append(answer["p99Micros"] / 1e3)
            cost[who].append((cpu_seconds(server.pid) - before) / answer["requests"] * 1e6)
    spread = ", ".join(f"{who} {min(all_):,.0f} to {max(all_):,.0f}" for who, all_ in rates.items())
    say(f"{what}: {spread} requests/s")
    rows = [Row(who, median(values)) for who, values in rates.items()]
    ratio = rows[0].median / rows[1].median
    table.add(
        f"{what}, 64 connections",
        "requests/s",
        rows,
        Aim(f"≥ {AIM} of bare", ratio >= AIM),
        more_is_better=True,
    )
    table.add("its p99", "ms", [Row(who, median(values)) for who, values in tails.items()])
    table.add("its CPU", "µs a request", [Row(who, median(values)) for who, values in cost.items()])
