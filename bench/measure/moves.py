"""Defragmentation of blocks that other processes have mapped, beside a plain copy of as many bytes."""

from __future__ import annotations

import json
import subprocess
from typing import Any, NamedTuple

import vramd

from .machine import Daemon, Setup, median, say
from .table import Aim, Row, Table

BLOCK_BYTES = 1 << 20
SEGMENT_BLOCKS = 4
DEVICE = "cpu:0"
AIM = 0.8
#: Copies are short: so many of them to one defragmentation.
COPIES = 5


class Load(NamedTuple):
    """How many processes have every block mapped between them, and whether they read all the while."""

    readers: int
    busy: bool

    def __str__(self) -> str:
        if not self.readers:
            return "no reader"
        name = "1 reader" if self.readers == 1 else f"{self.readers} readers"
        return f"{name}, {'reading all the while' if self.busy else 'at rest'}"


LOADS = (Load(0, False), Load(1, False), Load(4, False), Load(1, True))


class Round(NamedTuple):
    """One defragmentation and the copies beside it: GB/s, and what busy readers noticed of either, in µs."""

    moved: float
    copied: list[float]
    copied_by_two: float
    beside_moves: list[Any]
    beside_copies: list[Any]


def measure(setup: Setup, table: Table) -> None:
    with Daemon(setup) as daemon:
        for load in LOADS:
            say(str(load))
            rounds = [_round(setup, daemon, load) for _ in range(setup.rounds(5))]
            ours = median([one.moved for one in rounds])
            theirs = median([rate for one in rounds for rate in one.copied])
            aim = Aim(f"≥ {AIM} of one thread", ours >= AIM * theirs) if load.readers else None
            rows = [
                Row("vramd", ours),
                Row("memcpy of as many bytes, one thread", theirs),
                Row("memcpy, two threads", median([one.copied_by_two for one in rounds])),
            ]
            table.add(f"blocks of 1 MiB moved, {load}", "GB/s", rows, aim, more_is_better=True)
            if load.busy:
                _stalls(table, rounds)


def _stalls(table: Table, rounds: list[Round]) -> None:
    for what, key in (("longest time", "longestMicros"), ("p99.99", "p9999Micros")):
        rows = [
            Row("vramd", median([noticed[key] for one in rounds for noticed in one.beside_moves])),
            Row(
                "beside the memcpy", median([noticed[key] for one in rounds for noticed in one.beside_copies])
            ),
        ]
        table.add(f"between two reads of the reader, {what}", "µs", rows)


def _round(setup: Setup, daemon: Daemon, load: Load) -> Round:
    kept = _fragment(daemon, 64 if setup.quick else 256)

    def readers() -> list[Reader]:
        each = (kept[number :: load.readers] for number in range(load.readers))
        return [Reader(setup, daemon, allocations, load.busy) for allocations in each]

    attached = readers()
    result: Any = daemon.client.defragment(DEVICE, priority="High")["result"]
    beside_moves = [reader.stop(moved=True) for reader in attached]
    attached = readers()
    copied = [_copy(setup, result["bytes"], 1) for _ in range(COPIES)]
    beside_copies = [reader.stop(moved=False) for reader in attached]
    copied_by_two = _copy(setup, result["bytes"], 2)
    for name in kept:
        daemon.client.release(name)
    moved = result["bytes"] / result["milliseconds"] / 1e6
    return Round(moved, copied, copied_by_two, beside_moves, beside_copies)


def _fragment(daemon: Daemon, segments: int) -> list[str]:
    """Leaves half of every segment in use, so that half of the segments can be emptied."""
    client = daemon.client
    names = [
        client.allocate(BLOCK_BYTES, device=DEVICE, lease_seconds=3600)["allocationId"]
        for _ in range(segments * SEGMENT_BLOCKS)
    ]
    kept = []
    for number, name in enumerate(names):
        if number % SEGMENT_BLOCKS < SEGMENT_BLOCKS // 2:
            with vramd.attach_allocation(name, access="write", socket=str(daemon.socket)) as attached:
                attached.buffer[:] = number.to_bytes(4, "little") * (BLOCK_BYTES // 4)
            kept.append(name)
        else:
            client.release(name)
    return kept


class Reader:
    """A process that has blocks mapped."""

    def __init__(self, setup: Setup, daemon: Daemon, allocations: list[str], busy: bool) -> None:
        command = [setup.peers, "reader", daemon.socket, *allocations, *(["--busy"] if busy else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit("a reader did not start")

    def stop(self, *, moved: bool) -> Any:
        """Ends it; it fails if a byte has changed, or if nothing was moved that should have been."""
        out, _ = self._process.communicate("")
        if self._process.returncode != 0:
            raise SystemExit("a reader read other bytes than before")
        noticed = json.loads(out)
        if moved and not noticed["moved"]:
            raise SystemExit("a reader saw no move: what is measured is not the same")
        return noticed


def _copy(setup: Setup, total: int, threads: int) -> float:
    command = [setup.peers, "copier", "--block", str(BLOCK_BYTES), "--total", str(total),
               "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["bytesPerSecond"]) / 1e9
