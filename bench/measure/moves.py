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
#: How often the copier copies while readers notice what that does to them.
COPIES = 20


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


def measure(setup: Setup, table: Table) -> None:
    segments = 64 if setup.quick else 256
    with Daemon(setup) as daemon:
        for load in LOADS:
            rates, copies, threads, walls = [], [], [], []
            stalls: list[float] = []
            still: list[float] = []
            for _ in range(setup.rounds(5)):
                kept = _fragment(daemon, segments)
                readers = [Reader(setup, daemon, kept[number :: load.readers], load.busy)
                           for number in range(load.readers)]  # fmt: skip
                moved = daemon.client.defragment(DEVICE, priority="High")
                result: Any = moved["result"]
                stalls += [reader.stop(result["moves"])["longestMicros"] or 0 for reader in readers]
                rates.append(result["bytes"] / result["milliseconds"] / 1e6)
                walls.append(result["milliseconds"])
                readers = [Reader(setup, daemon, kept[number :: load.readers], load.busy)
                           for number in range(load.readers)]  # fmt: skip
                for _ in range(COPIES):
                    copies.append(_copy(setup, result["bytes"], 1))
                threads.append(_copy(setup, result["bytes"], 2))
                still += [reader.stop(None)["longestMicros"] or 0 for reader in readers]
                for name in kept:
                    daemon.client.release(name)
            say(f"{load}: {result['moves']} moves in {median(walls):.0f} ms")
            ours, theirs = median(rates), median(copies)
            aim = Aim(f"≥ {AIM} of one thread", ours >= AIM * theirs) if load.readers else None
            rows = [
                Row("vramd", ours),
                Row("memcpy of as many bytes, one thread", theirs),
                Row("memcpy, two threads", median(threads)),
            ]
            table.add(f"blocks of 1 MiB moved, {load}", "GB/s", rows, aim, more_is_better=True)
            if load.busy:
                rows = [Row("vramd", median(stalls)), Row("beside the memcpy", median(still))]
                table.add("the reader's longest time between two reads", "µs", rows)


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

    def stop(self, moves: int | None) -> Any:
        """Ends it; it fails if a byte has changed."""
        out, _ = self._process.communicate("")
        if self._process.returncode != 0:
            raise SystemExit("a reader read other bytes than before")
        noticed = json.loads(out)
        if moves and not noticed["moved"]:
            raise SystemExit("a reader saw no move: what is measured is not the same")
        return noticed


def _copy(setup: Setup, total: int, threads: int) -> float:
    command = [setup.peers, "copier", "--block", str(BLOCK_BYTES), "--total", str(total),
               "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["bytesPerSecond"]) / 1e9
